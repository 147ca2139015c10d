"""The Llama copy in llama.cpp: its converter accepts it; ids and greedy tokens are those of transformers.

And benchmarks/llamacpp.py, which compares logits before it times anything, runs to its end.
"""

import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from llama_cpp import GGML_TYPE_F32, Llama
from transformers import LlamaForCausalLM

from tools.convert.llama import llama_config, llama_tokenizer

from support.paths import GOLDEN, ROOT


pytestmark = [pytest.mark.llamacpp, pytest.mark.filterwarnings("ignore::DeprecationWarning:llama_cpp")]

# The source of the Python package includes llama.cpp's source with the converter; `make test-llamacpp` unpacks it.
CONVERTER = Path(sys.prefix) / "source" / "vendor" / "llama.cpp" / "convert_hf_to_gguf.py"
PROMPTS = (
    "Coming to the beautiful nature, we found",
    "来到美丽的大自然，我们发现",
    "In the evening",
    "Hello! 你好 <eoa> x",
)


def run(*command: object) -> None:
    process = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, timeout=240)
    assert process.returncode == 0, process.stderr.decode()


def to_gguf(folder: Path, *options: str) -> Path:
    run(CONVERTER, folder, "--outfile", folder / "model.gguf", *options)
    return folder / "model.gguf"


def open_gguf(path: Path, context: int, **settings) -> Llama:
    """Keys and values in float32 as in the reference; one thread sums in a fixed order."""
    types = {"type_k": GGML_TYPE_F32, "type_v": GGML_TYPE_F32}
    return Llama(str(path), n_ctx=context, n_threads=1, n_threads_batch=1, verbose=False, **types, **settings)


def greedy(model: Llama, ids: list[int], new: int = 24) -> list[int]:
    """llama.cpp's tokens up to the first stop token."""
    model.reset()
    tokens = []
    for token in model.generate(ids, temp=0.0):
        tokens.append(token)
        if len(tokens) == new or token in (2, 4):
            return tokens
    return tokens


def expected(model, ids: list[int], new: int = 24) -> list[int]:
    return model.generate(torch.tensor([ids]), max_new_tokens=new, do_sample=False)[0, len(ids) :].tolist()


def test_same_tokens(tiny_dir, tiny_model, tiny_tokenizer, tmp_path):
    """Within the window: token ids, greedy tokens, and a chat turn that stops at <eoa> when configured to."""
    run("tools/convert_checkpoint.py", "llama", tiny_dir, tmp_path / "llama", "--quiet")
    path = to_gguf(tmp_path / "llama", "--outtype", "f32")
    eoa = tiny_tokenizer.convert_tokens_to_ids("<eoa>")
    model = open_gguf(path, 256, kv_overrides={"tokenizer.ggml.eot_token_id": eoa})
    for prompt in PROMPTS:
        ids = tiny_tokenizer(prompt)["input_ids"]
        assert model.tokenize(prompt.encode(), special=True) == ids
        assert greedy(model, ids) == expected(tiny_model, ids)
    messages = [{"role": "user", "content": "Who are you?"}]
    reply = model.create_chat_completion(messages, temperature=0, max_tokens=100)["choices"][0]
    assert reply["message"]["content"] == tiny_model.chat(tiny_tokenizer, "Who are you?", do_sample=False)[0]
    assert reply["finish_reason"] == "stop"


def test_beyond_the_window(tiny_dir, tiny_model, tiny_tokenizer, tmp_path):
    """A copy made with --context stores its base in the GGUF file; plain Llama with that base is the reference."""
    run("tools/convert_checkpoint.py", "llama", tiny_dir, tmp_path / "llama", "--context", "1024", "--quiet")
    model = open_gguf(to_gguf(tmp_path / "llama", "--outtype", "f32"), 1024)
    ids = tiny_tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    ids = tiny_model.generate(ids, min_length=300, max_length=300, do_sample=False)[0].tolist()
    reference = LlamaForCausalLM.from_pretrained(tmp_path / "llama", dtype=torch.float32)
    assert greedy(model, ids) == expected(reference, ids)


def test_real_vocabulary(tmp_path):
    """The official ids for every golden text, except those with NUL, where SentencePiece itself has changed."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    for file in (ROOT / "config.json", ROOT / "tokenizer_config.json", GOLDEN / "tokenizer.model"):
        shutil.copy(file, source)
    for name, content in llama_tokenizer(source).items():
        (target / name).write_bytes(content)
    config = llama_config(json.loads((source / "config.json").read_text()))
    (target / "config.json").write_text(json.dumps(config))
    model = Llama(str(to_gguf(target, "--vocab-only")), vocab_only=True, verbose=False)
    rows = [json.loads(line) for line in (GOLDEN / "tokenizer.jsonl").open(encoding="utf-8")]
    wrong = [row["text"] for row in rows if model.tokenize(row["text"].encode(), special=True) != row["ids"]]
    assert all("\0" in text for text in wrong) and len(rows) > 300


def test_benchmark_writes_every_row(tiny_dir, tmp_path):
    """On the tiny checkpoint and a GGUF file of its Llama copy; the numbers mean nothing."""
    run("tools/convert_checkpoint.py", "llama", tiny_dir, tmp_path / "llama", "--quiet")
    folder = tmp_path / "tiny"
    shutil.copytree(tiny_dir, folder)
    shutil.copy(to_gguf(tmp_path / "llama", "--outtype", "f32"), folder)
    options = ("--quick", "--threads", "1", "--model", folder)  # waiting threads would take a busy machine's time
    run("benchmarks/llamacpp.py", *options, "--out", tmp_path / "result.json")
    rows = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))["rows"]
    kinds = {"prompt": 2, "decode": 2, "compiled": 1, "generate": 2, "generate_compiled": 1}
    for dtype in ("float32", "bfloat16"):
        assert Counter(row["kind"] for row in rows if row["dtype"] == dtype) == kinds
    targets = {(row["kind"], row["dtype"]): row["target"] for row in rows if row["verdict"] is not None}
    assert targets == {
        ("decode", "float32"): ">= 0.50",
        ("compiled", "float32"): ">= 1.00",
        ("compiled", "bfloat16"): ">= 1.00",
    }
    assert all(rate > 0 for row in rows for rate in row["tokens_per_second"].values())
