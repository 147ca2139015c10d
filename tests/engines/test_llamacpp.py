"""llama.cpp runs the GGUF file of convert_checkpoint.py, and accepts the Llama copy through its own converter.

Ids and greedy tokens are those of transformers, a reply stops by itself, and quantised weights lose little.
benchmarks/llamacpp.py, which compares logits before it times anything, runs to its end.
"""

import copy
import json
import math
import shutil
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import gguf
import pytest
import torch
from llama_cpp import GGML_TYPE_F32, Llama
from transformers import LlamaForCausalLM

from tools.convert.gguf import interleave
from tools.convert.llama import llama_config, llama_tokenizer
from tools.convert.tensors import expected_shapes
from tools.convert_checkpoint import main
from tools.tiny.corpus import documents

from support.checkpoints import SEVEN, official_config, pickled_checkpoint
from support.paths import GOLDEN, ROOT
from support.processes import tree


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


def convert(source: Path, target: Path, *options: object) -> int:
    return main([*map(str, ("gguf", source, target, *options)), "--quiet"])


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


# convert_checkpoint.py gguf


def test_gguf_has_the_same_ids_and_tokens(tiny_dir, tiny_model, tiny_tokenizer, tmp_path):
    assert convert(tiny_dir, tmp_path / "tiny.gguf", "--type", "f32") == 0
    model = open_gguf(tmp_path / "tiny.gguf", 256)
    for prompt in PROMPTS:
        ids = tiny_tokenizer(prompt)["input_ids"]
        assert model.tokenize(prompt.encode(), special=True) == ids
        assert greedy(model, ids) == expected(tiny_model, ids)


def gguf_logits(path: Path, ids: list[int]) -> torch.Tensor:
    model = open_gguf(path, 256, logits_all=True)
    model.eval(ids)
    return torch.tensor(model.scores[: len(ids)])


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_gguf_in_half_precision(kind, tiny_dir, tiny_model, tmp_path):
    """The values are the checkpoint's, rounded to the type. llama.cpp also rounds what it multiplies by them, so its
    token differs from ours in float32 where two are almost equal: no more often than our own model's in bfloat16."""
    assert convert(tiny_dir, tmp_path / "tiny.gguf", "--type", kind) == 0
    weights = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "tiny.gguf").tensors}
    found = gguf.dequantize(weights["output.weight"].data, weights["output.weight"].tensor_type)
    ours = tiny_model.lm_head.weight.detach()
    assert torch.equal(torch.tensor(found), ours.to(torch.float16 if kind == "f16" else torch.bfloat16).float())
    ids = tiny_model.generate(torch.tensor([[1]]), min_length=250, max_length=250, do_sample=False)
    with torch.inference_mode():
        logits = tiny_model(input_ids=ids).logits[0]
        rounded = copy.deepcopy(tiny_model).bfloat16()(input_ids=ids).logits[0]
    copied = gguf_logits(tmp_path / "tiny.gguf", ids[0].tolist())
    changed = [(other.argmax(-1) != logits.argmax(-1)).sum().item() for other in (copied, rounded)]
    assert changed[0] <= changed[1]
    assert (copied - logits).norm() < (rounded - logits).norm()


CONVERSATIONS = (
    [{"role": "user", "content": "Who are you?"}],
    [{"role": "system", "content": "Answer briefly."}, {"role": "user", "content": "你是谁？"}],
    [
        {"role": "user", "content": " two  spaces\n"},
        {"role": "assistant", "content": "你好！"},
        {"role": "user", "content": "Where is the lake?"},
    ],
)


def test_gguf_chat_has_the_same_prompt_and_stops_by_itself(tiny_dir, tiny_model, tiny_tokenizer, tmp_path):
    """Nothing but the file says where to stop; the last request is for more tokens than a reply has."""
    assert convert(tiny_dir, tmp_path / "tiny.gguf", "--type", "f32") == 0
    model = open_gguf(tmp_path / "tiny.gguf", 256)
    for messages in CONVERSATIONS:
        ids = tiny_tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        model.reset()
        reply = model.create_chat_completion(messages, temperature=0, max_tokens=100)["choices"][0]
        assert model.input_ids[: len(ids)].tolist() == ids
        answer = expected(tiny_model, ids, 100)
        assert reply["message"]["content"] == tiny_tokenizer.decode(answer, skip_special_tokens=True)
        assert reply["finish_reason"] == "stop" and len(answer) < 100
    assert (
        (tmp_path / "tiny.Modelfile")
        .read_text(encoding="utf-8")
        .startswith("FROM ./tiny.gguf\nPARAMETER num_ctx 256\n")
    )


def test_gguf_beyond_the_window(tiny_dir, tiny_model, tiny_tokenizer, tmp_path):
    """--context is the length in the file and in the Modelfile; plain Llama with the fixed base is the reference."""
    assert convert(tiny_dir, tmp_path / "tiny.gguf", "--type", "f32", "--context", 1024) == 0
    assert main(["llama", *map(str, (tiny_dir, tmp_path / "llama")), "--context", "1024", "--quiet"]) == 0
    model = open_gguf(tmp_path / "tiny.gguf", 1024, logits_all=True)
    assert model.metadata["llama.context_length"] == "1024"
    assert "PARAMETER num_ctx 1024\n" in (tmp_path / "tiny.Modelfile").read_text(encoding="utf-8")
    ids = tiny_tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    ids = tiny_model.generate(ids, min_length=300, max_length=300, do_sample=False)[0].tolist()
    reference = LlamaForCausalLM.from_pretrained(tmp_path / "llama", dtype=torch.float32)
    assert greedy(model, ids) == expected(reference, ids)
    model.reset()
    model.eval(ids)
    with torch.inference_mode():
        logits = reference(input_ids=torch.tensor([ids])).logits[0]
    assert (torch.tensor(model.scores[:300]) - logits).norm() < 1e-3 * logits.norm()


def held_out_texts(tokenizer, count: int = 24) -> list[list[int]]:
    """The first window of documents that the tiny model was not trained on."""
    texts = ("".join(text for text, _ in document.parts) for document in documents("held out"))
    return [tokenizer(text)["input_ids"][:256] for text in islice(texts, count)]


def perplexity(path: Path, texts: list[list[int]]) -> float:
    model, losses = open_gguf(path, 256, logits_all=True), []
    for ids in texts:
        model.reset()
        model.eval(ids)
        logits = torch.tensor(model.scores[: len(ids) - 1])
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none"))
    return math.exp(torch.cat(losses).mean().item())


def test_quantised_gguf_loses_little(tiny_dir, tiny_model, tiny_tokenizer, tmp_path):
    """Perplexity on held-out text, relative to float32: measured 0.9993 in Q8_0 and 0.9962 in Q4_K_M.

    The tiny model's rows are no multiple of 256 values, so llama.cpp takes Q5_0 and Q8_0 in place of k-quants.
    """
    texts, found = held_out_texts(tiny_tokenizer), {}
    for kind in ("f32", "q8_0", "q4_k_m"):
        assert convert(tiny_dir, tmp_path / f"{kind}.gguf", "--type", kind) == 0
        found[kind] = perplexity(tmp_path / f"{kind}.gguf", texts)
    with torch.inference_mode():
        losses = [
            tiny_model(input_ids=ids, labels=ids).loss * (len(row) - 1)
            for row in texts
            for ids in [torch.tensor([row])]
        ]
    ours = math.exp(sum(losses) / sum(len(row) - 1 for row in texts))
    assert found["f32"] == pytest.approx(ours, rel=1e-3)
    assert found["q8_0"] == pytest.approx(found["f32"], rel=0.005)
    assert found["q4_k_m"] == pytest.approx(found["f32"], rel=0.02)
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{kind}.{suffix}" for kind in found for suffix in ("gguf", "Modelfile")
    }


def test_quantising_is_measured_on_the_same_model(tiny_dir, tmp_path):
    """tools/measure_quantising.py: in float32, llama.cpp has the original's logits; in Q8_0 almost."""
    out = tmp_path / "results.json"
    methods = ("GGUF f32", "GGUF q8_0")
    run("tools/measure_quantising.py", "--model", tiny_dir, "--tokens", 512, "--out", out, "--only", *methods)
    original, f32, q8_0 = json.loads(out.read_text())["rows"]
    assert f32["cosine"] == pytest.approx(1, abs=1e-6) and f32["same_token"] == 1
    assert f32["perplexity"] == pytest.approx(original["perplexity"], rel=1e-4)
    assert (f32["bytes"], f32["layer_bytes"]) == (original["bytes"], original["layer_bytes"])
    assert 0.999 < q8_0["cosine"] < 0.99999 and q8_0["layer_bytes"] * 3.5 < f32["layer_bytes"]


def wide_checkpoint(folder: Path) -> Path:
    """Pickles of 2023 of a base model with biases, whose rows are multiples of 256; more rows than pieces."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 2304, "num_hidden_layers": 2}
    config = official_config(SEVEN, **sizes, num_attention_heads=4)
    rng = torch.Generator().manual_seed(0)
    state = {name: torch.randn(shape, generator=rng) * 0.2 for name, shape in expected_shapes(config).items()}
    pickled_checkpoint(folder, state, config, inv_freq=True)
    shutil.copy(ROOT / "checkpoints" / "tiny" / "tokenizer.model", folder)
    shutil.copy(ROOT / "tokenizer_config.json", folder)
    shutil.copy(ROOT / "chat_template.jinja", folder)
    return folder


def test_gguf_of_pickles_with_biases(tmp_path, modeling):
    """The 7B has biases on q, k, v and o, which make these logits; in Q4_K_M they stay near, with k-quants."""
    source, ids = wide_checkpoint(tmp_path / "source"), [1, *range(5, 1000, 50)]
    model = modeling.InternLMForCausalLM.from_pretrained(source, dtype=torch.float32, use_safetensors=False).eval()
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([ids])).logits[0]
    for kind, tolerance in (("f32", 1e-4), ("q4_k_m", 0.3)):
        assert convert(source, tmp_path / f"{kind}.gguf", "--type", kind) == 0
        difference = gguf_logits(tmp_path / f"{kind}.gguf", ids) - logits
        assert difference.norm() < tolerance * logits.norm()
    kinds = Counter(tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "q4_k_m.gguf").tensors)
    assert kinds["Q4_K"] > 8 and kinds["Q6_K"] >= 1 and kinds["F32"] == 13, kinds


def test_gguf_of_a_base_model_has_no_chat(tmp_path, capsys):
    """Its folder holds a chat template, but it was not trained on it: generation_config.json does not list <eoa>."""
    source = wide_checkpoint(tmp_path / "source")
    assert convert(source, tmp_path / "base.gguf", "--type", "q8_0") == 0
    assert "base model: stops at </s>, no chat template" in capsys.readouterr().out
    metadata = Llama(str(tmp_path / "base.gguf"), vocab_only=True, verbose=False).metadata
    assert not {"tokenizer.chat_template", "tokenizer.ggml.eot_token_id"} & metadata.keys()
    text = (tmp_path / "base.Modelfile").read_text(encoding="utf-8")
    assert text == f"FROM ./base.gguf\nPARAMETER num_ctx {metadata['llama.context_length']}\n"


def test_gguf_has_the_real_vocabulary(tmp_path):
    """The official ids for every golden text without NUL, <eoa> as stop token, and one piece for each row."""
    source = tmp_path / "source"
    sizes = {"hidden_size": 32, "intermediate_size": 32, "vocab_size": 103168, "num_hidden_layers": 1}
    config = official_config(SEVEN, **sizes, num_attention_heads=1)
    state = {name: torch.zeros(shape, dtype=torch.float16) for name, shape in expected_shapes(config).items()}
    pickled_checkpoint(source, state, config)
    for file in (ROOT / "tokenizer_config.json", ROOT / "chat_template.jinja", GOLDEN / "tokenizer.model"):
        shutil.copy(file, source)
    shutil.copy(ROOT / "variants" / "internlm-chat-20b" / "generation_config.json", source)
    assert convert(source, tmp_path / "real.gguf", "--type", "q8_0") == 0
    model = Llama(str(tmp_path / "real.gguf"), vocab_only=True, verbose=False)
    assert model.n_vocab() == 103168 and model.metadata["tokenizer.ggml.eot_token_id"] == "103028"
    rows = [json.loads(line) for line in (GOLDEN / "tokenizer.jsonl").open(encoding="utf-8")]
    wrong = [row["text"] for row in rows if model.tokenize(row["text"].encode(), special=True) != row["ids"]]
    assert all("\0" in text for text in wrong) and len(rows) > 300
    plain = model.tokenize(b"<eoa>", add_bos=False, special=False)
    assert len(plain) > 1 and model.detokenize(plain) == b"<eoa>"  # a user's text


def test_gguf_permutation():
    """A head's rows 0 to 5 rotate in the pairs (0, 3), (1, 4), (2, 5)."""
    rows = torch.arange(12)
    assert interleave(rows, 2).tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    assert interleave(rows[:, None], 2)[:, 0].tolist() == interleave(rows, 2).tolist()


@pytest.mark.parametrize("kind", ["f16", "q4_k_m"])
def test_gguf_is_complete_or_absent(kind, tiny_dir, tmp_path, capsys):
    """A second run keeps an equal file; another one of that name is refused; a broken source leaves nothing."""
    target = tmp_path / "new" / "tiny.gguf"
    assert convert(tiny_dir, target, "--type", kind) == 0
    before = tree(target.parent)
    assert before.keys() == {"tiny.gguf", "tiny.Modelfile"}
    assert convert(tiny_dir, target, "--type", kind) == 0 and tree(target.parent) == before
    target.write_bytes(b"mine")
    assert convert(tiny_dir, target, "--type", kind) == 1
    assert target.read_bytes() == b"mine" and "exists already" in capsys.readouterr().err
    source = wide_checkpoint(tmp_path / "source")
    shard = next(source.glob("pytorch_model-00003*"))
    torch.save({name: value.fill_(float("nan")) for name, value in torch.load(shard).items()}, shard)
    assert convert(source, tmp_path / "broken" / "b.gguf", "--type", kind) == 1
    assert "NaN" in capsys.readouterr().err and not tree(tmp_path / "broken")


def test_gguf_refusals_are_one_clear_error(tiny_dir, tmp_path, capsys, monkeypatch):
    """Values beyond float16, more tokens than rows, another kind of target, and no llama-cpp-python."""
    source = wide_checkpoint(tmp_path / "source")
    shard = next(source.glob("pytorch_model-00001*"))
    state = torch.load(shard)
    next(value for value in state.values() if value.dim() == 2)[3, 3] = 7e4
    torch.save(state, shard)
    small = tmp_path / "small"
    shutil.copytree(tiny_dir, small)
    shutil.copy(GOLDEN / "tokenizer.model", small)
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    for folder, target, kind, message in (
        (source, "a.gguf", "f16", "holds 7e+04, which float16 cannot: use --type bf16"),
        (small, "a.gguf", "f32", "has 103168 tokens, but config.json's vocab_size is 2048"),
        (tiny_dir, "folder", "f32", "folder must be the name of a file that ends in .gguf"),
        (tiny_dir, "a.gguf", "q4_k_m", "The package llama-cpp-python is missing: pip install llama-cpp-python"),
    ):
        assert convert(folder, tmp_path / target, "--type", kind) == 1
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
    assert not list(tmp_path.glob("a*"))


def test_gguf_dry_run_writes_nothing(tiny_dir, tmp_path, capsys):
    assert convert(tiny_dir, tmp_path / "new" / "tiny.gguf", "--type", "q4_k_m", "--dry-run") == 0
    output = capsys.readouterr().out
    assert "tiny.gguf  39 tensors, 2,757,120 bytes as bf16, then made q4_k_m by llama.cpp" in output
    assert not (tmp_path / "new").exists()


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
