"""What users and files do to the package, done to it: fuzzed files, threads, processes, kill -9, and long use.

    python tests/reliability.py               # at full length, 3.5 minutes: `make reliability`
    python tests/reliability.py --share 0.05  # a twentieth of it

Prints the figures that docs/reliability.md states, and fails where something did not hold. test_reliability.py runs
the same experiments at a smaller size.
"""

import argparse
import contextlib
import gc
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tqdm import tqdm


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import upload_to_hub
from tools import convert_checkpoint, package
from tools.convert.tensors import expected_shapes

from support.checkpoints import pickled_checkpoint
from support.paths import GOLDEN, TINY
from support.processes import kill_at_random


# Fuzzing: every outcome is success or an exception of this list.

REFUSALS = (ValueError, OSError)  # the class's own word; what transformers says of a file that cannot be read
FOREIGN = (TypeError, AttributeError, RecursionError)  # transformers', before our code runs, see `_is_object`
DEADLINE = 10_000  # milliseconds for one input, on a machine that others use too

# Fields that transformers reads from these files beside our own, and names that it would be wrong to set.
_CONFIG_FIELDS = (
    *("num_labels", "id2label", "label2id", "problem_type", "dtype", "torch_dtype", "layer_types", "architectures"),
    *("rope_theta", "rope_scaling", "rope_parameters", "head_dim", "num_key_value_heads", "quantization_config"),
    *("to_dict", "__class__", "attribute_map", "use_return_dict", "_attn_implementation", "name_or_path"),
)
_TOKENIZER_FIELDS = (
    *("add_bos_token", "add_eos_token", "added_tokens_decoder", "additional_special_tokens", "chat_template"),
    *("padding_side", "truncation_side", "model_max_length", "split_special_tokens", "tokenizer_object", "vocab_file"),
    *("clean_up_tokenization_spaces", "extra_special_tokens", "model_input_names", "unk_token", "decode", "__class__"),
)
_SCALARS = st.one_of(
    *(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
    st.sampled_from([-1, 2**20, 2**31, 2**63, 10**30, "dynamic", "</s>", "left"]),
)
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def _damage(content: bytes, at: float, data: bytes, cut: bool) -> bytes:
    start = int(at * len(content))
    return content[:start] + data + (b"" if cut else content[start + len(data) :])


def damaged(content: bytes, rest: bytes = b"") -> st.SearchStrategy[Callable[[], bytes]]:
    """A file with some bytes of `content` replaced, or cut there. Made when it is called: hypothesis keeps values."""

    def later(*where: Any) -> Callable[[], bytes]:
        return lambda: _damage(content, *where) + rest

    return st.builds(later, st.floats(0, 1), st.binary(min_size=1, max_size=8), st.booleans())


def broken_json(content: bytes, fields: tuple[str, ...]) -> st.SearchStrategy[Any]:
    """A JSON file with some fields changed, with damaged bytes, of another form, or of another kind."""
    real = json.loads(content)
    names = st.sampled_from([*real, *fields]) | st.text(max_size=8)
    changed = st.dictionaries(names, _VALUES, min_size=1, max_size=4).map(lambda changes: real | changes)
    return st.one_of(
        changed.map(lambda value: json.dumps(value).encode()),
        damaged(content),
        st.one_of(_VALUES.map(lambda value: json.dumps(value).encode()), st.binary(max_size=64)),
    )


def _is_object(data: bytes) -> bool:
    """Whether a JSON file holds an object: of another one transformers itself raises whatever comes."""
    try:
        return isinstance(json.loads(data), dict)
    except ValueError:
        return True
    except RecursionError:
        return False


def fuzz(load: Callable[[Path], Any], folder: Path, files: dict[str, st.SearchStrategy], inputs: int) -> Counter:
    """Load a folder `inputs` times, one of `files` broken each time; counts the outcomes by exception."""
    outcomes: Counter = Counter()
    whole = {name: (folder / name).read_bytes() for name in files}
    bar = tqdm(total=inputs, desc=f"fuzz {', '.join(files)}", mininterval=1)
    choices = st.one_of(*(strategy.map(lambda data, name=name: (name, data)) for name, strategy in files.items()))

    @settings(max_examples=inputs, derandomize=True, deadline=DEADLINE, suppress_health_check=list(HealthCheck))
    @given(choices)
    def attempt(choice: tuple[str, Any]) -> None:
        name, data = choice
        data = data() if callable(data) else data
        (folder / name).write_bytes(data)
        allowed = REFUSALS if name.endswith(".model") or _is_object(data) else (*REFUSALS, *FOREIGN)
        try:
            load(folder)
            outcomes["loaded"] += 1
        except allowed as error:
            outcomes[next(kind.__name__ for kind in allowed if isinstance(error, kind))] += 1
        finally:
            (folder / name).write_bytes(whole[name])
            bar.update()

    with contextlib.redirect_stdout(io.StringIO()), bar:
        attempt()
    return outcomes


def _copy(folder: Path, scratch: Path) -> Path:
    """A folder that may be written to: none of its files is a link."""
    return shutil.copytree(folder, scratch, dirs_exist_ok=True)


def fuzz_config(tiny: Path, scratch: Path, inputs: int) -> Counter:
    folder = _copy(tiny, scratch)
    load = package.load("configuration").InternLMConfig.from_pretrained
    return fuzz(
        load, folder, {"config.json": broken_json((folder / "config.json").read_bytes(), _CONFIG_FIELDS)}, inputs
    )


def fuzz_tokenizer(tiny: Path, scratch: Path, inputs: int) -> Counter:
    """tokenizer.model and tokenizer_config.json, in turn."""
    folder = _copy(tiny, scratch)
    load = package.load("tokenization").InternLMTokenizer.from_pretrained
    files = {
        "tokenizer.model": damaged((folder / "tokenizer.model").read_bytes()) | st.binary(max_size=64),
        "tokenizer_config.json": broken_json((folder / "tokenizer_config.json").read_bytes(), _TOKENIZER_FIELDS),
    }
    return fuzz(load, folder, files, inputs)


def fuzz_saved_tokenizer(tiny: Path, scratch: Path, inputs: int) -> Counter:
    """tokenizer.json, which the Rust library reads."""
    tokenizer = package.load("tokenization").InternLMTokenizer
    tokenizer.from_pretrained(tiny).save_pretrained(scratch)
    content = (scratch / "tokenizer.json").read_bytes()
    # Half of the hits go into the settings at its start: pieces and merges, which follow, are all alike.
    files = {"tokenizer.json": damaged(content) | damaged(content[:4000], rest=content[4000:])}
    return fuzz(tokenizer.from_pretrained, scratch, files, inputs)


# Threads and processes


def some_requests(count: int, longest: int, seed: int) -> list[tuple[torch.Tensor, int]]:
    """(prompt ids, new tokens) of random lengths; the tiny model's window is 256 tokens."""
    rng = random.Random(seed)
    lengths = [rng.randint(1, longest) for _ in range(count)]
    return [(torch.tensor([[1, *(rng.randrange(300, 2000) for _ in range(n))]]), rng.randint(1, 12)) for n in lengths]


def answer(model: Any, request: tuple[torch.Tensor, int]) -> list[int]:
    ids, new = request
    return model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False)[0].tolist()


def generate_in_threads(model: Any, rounds: int, threads: int = 8) -> tuple[int, int]:
    """(equal, asked): answers of threads that run on one model at once against the same requests alone."""
    requests = [(ids, 24) for ids, _ in some_requests(threads * rounds, 400, seed=8)]
    alone = [answer(model, request) for request in requests]
    found: list[Any] = [None] * len(requests)
    start = threading.Barrier(threads)

    def work(thread: int) -> None:
        start.wait()
        for number in range(thread, len(requests), threads):
            found[number] = answer(model, requests[number])

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
    """What processes say that load the same remote code into one empty module cache at once: tokens, or the error."""
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("HF_MODULES_CACHE", None)
    command = [sys.executable, "-c", LOAD, str(tiny)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = [subprocess.Popen(command, env=environment, **pipes) for _ in range(processes)]
    try:
        said = [process.communicate(timeout=250) for process in running]
    finally:
        for process in running:
            process.kill()
    return [
        out.strip() if process.returncode == 0 else f"failed: {err.strip().splitlines()[-1]}"
        for process, (out, err) in zip(running, said, strict=True)
    ]


# kill -9


def old_checkpoint(folder: Path) -> Path:
    """A folder of 2023 of 30 MB with the official tokenizer, large enough to be stopped in the middle of a file."""
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
    """(answers that equal the first, bytes of memory per generation, megabytes at the end).

    The slope is fitted over the last three quarters: at first, allocators and caches fill.
    """
    requests, rng, process = some_requests(different, 400, seed=10), random.Random(11), psutil.Process()
    first: dict[int, list[int]] = {}
    equal, memory = 0, []
    for number in tqdm(range(generations), desc="soak", mininterval=1):
        choice = rng.randrange(different)
        found = answer(model, requests[choice])
        equal += found == first.setdefault(choice, found)
        if number >= generations // 4:
            if number % 10 == 0:
                gc.collect()
            memory.append(process.memory_info().rss)
    slope = np.polyfit(np.arange(len(memory)), memory, 1)[0]
    return equal, float(slope), memory[-1] / 1e6


# The command


def _check(line: str, holds: bool) -> bool:
    print(f"{'ok  ' if holds else 'FAIL'} {line}", flush=True)
    return holds


def report_fuzzing(tiny: Path, scratch: Path, inputs: int) -> bool:
    held = True
    kinds = {"config": fuzz_config, "tokenizer": fuzz_tokenizer, "saved tokenizer": fuzz_saved_tokenizer}
    for name, run in kinds.items():
        before, start = psutil.Process().memory_info().rss, time.perf_counter()
        outcomes = run(tiny, scratch / f"fuzz-{name}", inputs)
        grown = (psutil.Process().memory_info().rss - before) / 1e6
        text = f"{name}: {outcomes.total()} inputs, {dict(outcomes)}, memory {grown:+.0f} MB"
        held &= _check(f"{text}, {time.perf_counter() - start:.0f} s", grown < 500)
    return held


def report_soak(model: Any, generations: int) -> bool:
    equal, slope, megabytes = soak(model, generations)
    text = f"{equal} of {generations} answers as at first, {slope:+.0f} bytes a generation, {megabytes:.0f} MB"
    return _check(f"soak: {text}", equal == generations and slope < 1024)


def report_concurrency(model: Any, tiny: Path, home: Path, rounds: int) -> bool:
    equal, asked = generate_in_threads(model, rounds)
    held = _check(f"8 threads on one model: {equal} of {asked} answers as alone", equal == asked)
    said = load_in_processes(tiny, home)
    same = said.count(said[0])
    return held & _check(f"8 processes, one empty cache: {same} say {said[0]}", same == 8 and "failed" not in said[0])


def report_kills(scratch: Path, points: int) -> bool:
    held = True
    for work in (convert, assemble):
        folder = scratch / work.__name__
        found = kill_at_random(work, old_checkpoint(folder / "source"), folder, points)
        text = f"killed {found['points']} times, {found['torn']} in the middle of a file"
        text = f"{work.__name__}: {text}; {found['equal']} of {found['reruns']} byte-equal after a rerun"
        held &= _check(text, found["equal"] == found["reruns"])
    return held


def main(share: float) -> int:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity(logging.CRITICAL)  # not what transformers says of each broken file
    torch.set_num_threads(1)  # the model is too small for more
    scratch = Path(tempfile.mkdtemp())
    tiny = scratch / "tiny"
    upload_to_hub.assemble(weights=TINY, out=tiny, progress=False)
    model = AutoModelForCausalLM.from_pretrained(tiny, trust_remote_code=True, dtype=torch.float32).eval()

    def part(full: int) -> int:
        return max(1, int(full * share))

    held = (
        report_soak(model, part(2000)),  # first: later, memory that was freed would hide a leak
        report_concurrency(model, tiny, scratch / "home", part(10)),
        report_kills(scratch, part(30)),
        report_fuzzing(tiny, scratch, part(10_000)),
    )
    shutil.rmtree(scratch)
    return 0 if all(held) else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=1.0, help="of the full length (default: %(default)s)")
    sys.exit(main(parser.parse_args().share))
