"""Checks for every supported version of transformers; `make matrix` runs this file in a separate environment for each.

pytest does not collect it by default. It includes all tests of the test files that are imported below, run on the
classes as transformers loads them from a model folder. The environments hold torch, transformers, accelerate, jinja2
and pytest only.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from test_cache import *  # noqa: F403  (its tests and fixtures, on the `modeling` below)
from test_configuration import *  # noqa: F403
from test_golden import *  # noqa: F403
from test_layers import *  # noqa: F403
from test_masks import *  # noqa: F403
from test_trainer import *  # noqa: F403
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    DynamicCache,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from tools.package import MODULES

from support.benchmarks import run_gpu_benchmark
from support.golden import CHECKPOINTS, assert_near, jsonl, load
from support.paths import GOLDEN, ROOT
from support.versions import needs_dynamo


# On the newest version (set by tools/matrix.py), deprecated calls are errors.
if os.environ.get("MATRIX_NEWEST") == "1":
    pytestmark = [pytest.mark.filterwarnings(f"error::{kind}") for kind in ("FutureWarning", "DeprecationWarning")]

HEADS = {
    AutoModel: "InternLMModel",
    AutoModelForCausalLM: "InternLMForCausalLM",
    AutoModelForSequenceClassification: "InternLMForSequenceClassification",
    AutoModelForTokenClassification: "InternLMForTokenClassification",
    AutoModelForQuestionAnswering: "InternLMForQuestionAnswering",
}
# Run in a new process: loads the folder argv[1] and prints the last logits of the token ids argv[2].
FRESH_PROCESS = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
with torch.no_grad():
    logits = model(torch.tensor([json.loads(sys.argv[2])])).logits[0, -1]
print(json.dumps({"dtype": str(model.dtype), "logits": logits.tolist(), "ids": tokenizer("x != y 你好").input_ids}))
"""


def write_folder(folder: Path, name: str) -> Path:
    """A complete model folder: the weights of a golden checkpoint with this repository's code and tokenizer."""
    shutil.copytree(GOLDEN / name, folder)
    for file in (*ROOT.glob("*_internlm.py"), ROOT / "chat_template.jinja", GOLDEN / "tokenizer.model"):
        shutil.copyfile(file, folder / file.name)
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(ROOT / file, folder / file)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = json.loads((ROOT / "config.json").read_text())["auto_map"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Both golden checkpoints as model folders, with difficult but valid names."""
    parent = tmp_path_factory.mktemp("hub") / "a.b-c 模型 7B"
    return {name: write_folder(parent / f"{name}.v1 模型", name) for name in CHECKPOINTS}


@pytest.fixture(scope="session")
def folder(folders):
    return folders["tiny_20b_dynamic"]


@pytest.fixture(scope="session")
def modeling(folder):
    """modeling_internlm.py as transformers copied and imported it from a model folder."""
    loaded = get_class_from_dynamic_module("modeling_internlm.InternLMForCausalLM", str(folder))
    return sys.modules[loaded.__module__]


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=True)


@pytest.mark.parametrize("auto", HEADS, ids=lambda auto: auto.__name__)
def test_loading_every_head(folders, name, auto):
    """Each Auto class loads its head; only weights of heads that the checkpoint lacks are newly initialised."""
    model, info = auto.from_pretrained(folders[name], trust_remote_code=True, output_loading_info=True)
    assert type(model).__name__ == HEADS[auto]
    assert type(model.config).__name__ == "InternLMConfig"
    assert all(key.startswith(("score.", "qa_outputs.")) for key in info["missing_keys"]), info
    assert set(info["unexpected_keys"]) <= {"lm_head.weight"}, info
    assert not info["mismatched_keys"], info
    assert not list(model.named_buffers())


def test_loading_then_changing_the_attention_implementation(folders):
    """set_attn_implementation: until 5.0, transformers first inspected the source of the module."""
    model = AutoModelForCausalLM.from_pretrained(folders["tiny_7b_origin"], trust_remote_code=True)
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        assert model.config._attn_implementation == name


def test_loading_config(folders, name):
    config = AutoConfig.from_pretrained(folders[name], trust_remote_code=True)
    assert config.rotary["type"] == name.rpartition("_")[2]
    assert config.bias is (name == "tiny_7b_origin")


@torch.no_grad()
def test_loading_a_saved_copy(folders, name, tmp_path):
    """save_pretrained copies the code: the copy loads in a new process without the original folder."""
    folder, copy = tmp_path / "from.here 模型", tmp_path / "to.there 模型"
    shutil.copytree(folders[name], folder)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model.save_pretrained(copy)
    tokenizer.save_pretrained(copy)
    assert {path.name for path in copy.glob("*.py")} == set(MODULES)
    shutil.rmtree(folder)

    ids = [1, *range(20, 90)]
    command = [sys.executable, "-c", FRESH_PROCESS, str(copy), json.dumps(ids)]
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stderr
    loaded = json.loads(process.stdout)
    assert loaded["dtype"] == str(model.dtype)
    assert loaded["ids"] == tokenizer("x != y 你好").input_ids
    assert_near(torch.tensor(loaded["logits"]), model(torch.tensor([ids])).logits[0, -1], atol=1e-5)


@pytest.mark.parametrize("settings", ({}, {"use_fast": True}), ids=("unset", "use_fast"))
def test_tokenizer_ids(folder, settings):
    """All ids equal the official ones, one text at a time and as a batch."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True, **settings)
    assert tokenizer.is_fast and type(tokenizer).__name__ == "InternLMTokenizer"
    rows = jsonl("tokenizer.jsonl")
    assert [tokenizer(row["text"]).input_ids for row in rows] == [row["ids"] for row in rows]
    assert tokenizer([row["text"] for row in rows]).input_ids == [row["ids"] for row in rows]


def test_tokenizer_decode(tokenizer):
    """With clean-up the official text, without it exactly the encoded text."""
    for row in jsonl("tokenizer_decode.jsonl"):
        if max(row["ids"], default=0) < 103027:  # <eoh> and <eoa> are special tokens only here
            clean = tokenizer.decode(row["ids"], skip_special_tokens=True, clean_up_tokenization_spaces=True)
            assert clean == row["dec_skip"]
    for text in ("def f(x):\n    return x != 1 , 2 .\n", "  来到 美丽的大自然 ！", "👩‍👩‍👧 e\u0301 \x00"):
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        assert tokenizer.batch_decode([ids], skip_special_tokens=True) == [text]


def test_tokenizer_padding_and_saving(tokenizer, tmp_path):
    """Rows are left-padded with <unk>, and a saved tokenizer gives the same ids."""
    texts = ["Hello", "你好，世界 <eoa>"]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    assert tokenizer.pad_token_id == 0 and batch["input_ids"][0, 0] == 0 and batch["attention_mask"][0, 0] == 0
    tokenizer.save_pretrained(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True)
    assert saved(texts).input_ids == tokenizer(texts).input_ids
    assert saved.padding_side == "left" and saved.chat_template == tokenizer.chat_template


@pytest.mark.filterwarnings("ignore:Calling InternLMTokenizer:FutureWarning")  # of 4.57; allowed again in 5
def test_tokenizer_from_tokenizer_model_alone(tokenizer):
    file = GOLDEN / "tokenizer.model"
    assert type(tokenizer).from_pretrained(str(file))("x != y 你好").input_ids == tokenizer("x != y 你好").input_ids


def test_tokenizer_settings_assigned_later(folder):
    """Each changes the next call, on versions where it is a property and where it is not."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    plain = tokenizer("Hello", add_special_tokens=False).input_ids
    for name, value, ids in (
        ("add_bos_token", False, plain),
        ("add_eos_token", True, [*plain, 2]),
        ("eos_token", "<eoa>", [*plain, 103028]),
        ("add_bos_token", True, [1, *plain, 103028]),
        ("bos_token_id", 103027, [103027, *plain, 103028]),
    ):
        setattr(tokenizer, name, value)
        assert tokenizer("Hello").input_ids == ids


@pytest.mark.parametrize("format", ("early", "later"))
def test_chat_template(tokenizer, format):
    """Both prompt formats give the ids of the official chat(), and user text never becomes a control token."""
    early = (ROOT / "variants/early_chat_template.jinja").read_text(encoding="utf-8") if format == "early" else None
    rows = [row for row in jsonl("chat.jsonl") if row["impl"] == ("v1" if format == "early" else "v2")]
    for row in rows:
        messages = [] if early or row["meta"] is None else [{"role": "system", "content": row["meta"]}]
        for asked, answered in row["history"]:
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        messages.append({"role": "user", "content": row["query"]})
        ids = tokenizer.apply_chat_template(
            messages, chat_template=early, add_generation_prompt=True, return_dict=True
        )["input_ids"]
        if "<eoa>" in row["query"]:  # in the official chat(), users could end the turn
            assert 103028 in row["ids"] and 103028 not in ids
            assert tokenizer.decode(ids, skip_special_tokens=False) == "<s>" * early_bos(row) + row["prompt"]
        else:
            assert ids == row["ids"]


def early_bos(row: dict) -> bool:
    """Whether the golden prompt lacks the <s> that its ids start with."""
    return not row["prompt"].startswith("<s>")


@pytest.mark.parametrize("use_cache", (None, False))
@pytest.mark.parametrize("reentrant", (False, True))
def test_training_gradient_checkpointing(modeling, name, reentrant, use_cache):
    """Gradients beyond the window equal those of a model that keeps its activations, with and without a cache.

    Bit for bit without a cache. With one, the plain model rotates keys twice, which rounds differently.
    """
    gradients = []
    for checkpointing in (False, True):
        model, calls = load(modeling, name).train(), []
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        if checkpointing:
            enable_checkpointing(model, reentrant)
        ids = torch.arange(10, 90)[None]
        model(ids, labels=ids, use_cache=use_cache).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
        assert len(calls) == (2 if checkpointing else 1)
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain, rtol=0, atol=1e-4 * plain.abs().max().item() * (use_cache is None))


def test_training_checkpointing_fills_no_cache(modeling, name):
    """The backward pass runs every layer again: a cache that was passed would hold each key twice."""
    model, cache = load(modeling, name).train(), DynamicCache()
    enable_checkpointing(model, reentrant=False)
    ids, gradients = torch.arange(10, 90)[None], []
    for passed in (None, cache):
        model.zero_grad()
        model(ids, labels=ids, cache=passed).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for without, with_cache in zip(*gradients, strict=True):
        assert torch.equal(without, with_cache)
    assert cache.get_seq_length() == 0
    with torch.no_grad():  # no backward pass, so the cache fills as in evaluation mode
        model(ids, cache=cache)
    assert cache.get_seq_length() == 80


def enable_checkpointing(model, reentrant: bool) -> None:
    # Renamed in transformers 5.20, where the old name warns.
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{kind}_checkpointing_enable")(**{f"{kind}_checkpointing_kwargs": {"use_reentrant": reentrant}})
    model.enable_input_require_grads()


@needs_dynamo  # its compiled case
def test_the_gpu_benchmark(tmp_path):
    """Its cases run on a CPU, with caches under the version's name and of the version's classes; none fails."""
    rows = run_gpu_benchmark(tmp_path)
    assert {row["kind"] for row in rows} > {"equality", "eager", "generate", "prefill", "captured", "compiled"}
    assert not [row for row in rows if row["verdict"] == "FAILED"]


def test_continuous_batching_beyond_the_window(folders):
    """Refused before 5.24, where attention functions alone read the pages; exact since (tests/test_generation.py)."""
    if tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 24):
        return
    model = AutoModelForCausalLM.from_pretrained(folders["tiny_20b_dynamic"], trust_remote_code=True)
    for length, limit in ((60, 5), (65, 1)):
        with pytest.raises(ValueError, match=f"A request of {length} tokens and max_new_tokens={limit} can exceed"):
            model.generate_batch([[5, 6], [5] * length], max_new_tokens=limit)


def test_version():
    """The environment holds the version of its name."""
    assert transformers.__version__ == os.environ.get("MATRIX_VERSION", transformers.__version__)
