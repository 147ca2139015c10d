"""Concurrent use of one model or one module cache, jobs to be killed at any moment, and generation for hours."""

import gc
import os
import random
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from tqdm import tqdm

import upload_to_hub
from tools import convert_checkpoint
from tools.convert.tensors import expected_shapes

from .checkpoints import pickled_checkpoint
from .paths import GOLDEN


# Threads and processes


def random_requests(count: int, max_length: int, seed: int) -> list[tuple[torch.Tensor, int]]:
    """(prompt ids, number of new tokens) of random lengths; the tiny model's window is 256 tokens."""
    rng = random.Random(seed)
    lengths = [rng.randint(1, max_length) for _ in range(count)]
    return [(torch.tensor([[1, *(rng.randrange(300, 2000) for _ in range(n))]]), rng.randint(1, 12)) for n in lengths]


def complete(model: Any, request: tuple[torch.Tensor, int]) -> list[int]:
    """Prompt and new tokens, greedy."""
    ids, new = request
    return model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False)[0].tolist()


def generate_in_threads(model: Any, rounds: int, threads: int = 8) -> tuple[int, int]:
    """(equal, total): outputs of concurrent threads on one model that equal those of the same requests in sequence."""
    requests = [(ids, 24) for ids, _ in random_requests(threads * rounds, 400, seed=8)]
    alone = [complete(model, request) for request in requests]
    found: list[Any] = [None] * len(requests)
    start = threading.Barrier(threads)

    def work(thread: int) -> None:
        start.wait()
        for number in range(thread, len(requests), threads):
            found[number] = complete(model, requests[number])

    workers = [threading.Thread(target=work, args=(n,)) for n in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(a == b for a, b in zip(alone, found, strict=True)), len(requests)


LOAD = (
    "import sys, torch\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n"
    "torch.set_num_threads(1)\n"
    "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
    "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
    "ids = tokenizer('Coming to the beautiful nature, we found', return_tensors='pt').input_ids\n"
    "print(model.generate(ids, max_new_tokens=3, do_sample=False).tolist())\n"
)


def load_in_processes(tiny: Path, home: Path, processes: int = 8) -> list[str]:
    """The outputs of concurrent processes that load the same remote code into one empty module cache."""
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("HF_MODULES_CACHE", None)
    command = [sys.executable, "-c", LOAD, str(tiny)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = [subprocess.Popen(command, env=environment, **pipes) for _ in range(processes)]
    try:
        outputs = [process.communicate(timeout=250) for process in running]
    finally:
        for process in running:
            process.kill()
    return [
        out.strip() if process.returncode == 0 else f"failed: {err.strip().splitlines()[-1]}"
        for process, (out, err) in zip(running, outputs, strict=True)
    ]


# Jobs to interrupt with kill -9


def old_checkpoint(folder: Path) -> Path:
    """A 30 MB folder as of 2023 with the official tokenizer: large enough to be killed in the middle of a file."""
    config = {"vocab_size": 103168, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4}
    config |= {"num_attention_heads": 1, "max_position_embeddings": 64, "bias": True, "rotary": None}
    rng = torch.Generator().manual_seed(9)
    state = {name: torch.randn(shape, generator=rng).half() for name, shape in expected_shapes(config).items()}
    config |= {"architectures": ["InternLMForCausalLM"], "model_type": "internlm", "torch_dtype": "float16"}
    pickled_checkpoint(folder, state, config)
    shutil.copy(GOLDEN / "tokenizer.model", folder)
    return folder


def convert(source: Path, target: Path) -> int:
    options = ["--max-shard-size", "8MB", "--no-logits", "--quiet"]
    return convert_checkpoint.main(["safetensors", str(source), str(target), *options])


def assemble(source: Path, target: Path) -> int:
    options = ["--variant", "internlm-tiny", "--no-verify-local"]
    return upload_to_hub.main(["--weights", str(source), "--local-dir", str(target), *options])


# Soak


def soak(model: Any, generations: int, different: int = 50) -> tuple[int, float, float]:
    """Repeat `different` requests in random order.

    Returns:
        (outputs equal to the first for the same request, memory growth in bytes per generation, MB at the end). The
        growth is fitted over the last three quarters: at first, allocators and caches fill.
    """
    requests, rng, process = random_requests(different, 400, seed=10), random.Random(11), psutil.Process()
    first: dict[int, list[int]] = {}
    equal, memory = 0, []
    for number in tqdm(range(generations), desc="soak", mininterval=1):
        choice = rng.randrange(different)
        found = complete(model, requests[choice])
        equal += found == first.setdefault(choice, found)
        if number >= generations // 4:
            if number % 10 == 0:
                gc.collect()
            memory.append(process.memory_info().rss)
    slope = np.polyfit(np.arange(len(memory)), memory, 1)[0]
    return equal, float(slope), memory[-1] / 1e6
