"""Checkpoints that are damaged, contradict themselves or mean harm: what `from_pretrained` makes of each.

Pickled shards are test_old_checkpoints.py's and test_convert.py's, tokenizer.model is test_tokenizer.py's.
"""

import json
import random
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from processes import in_child
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.fixture
def folder(tiny_dir, tmp_path) -> Path:
    return shutil.copytree(tiny_dir, tmp_path / "broken")


def load(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


def cut(folder: Path, length: int) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:length])


def edit(folder: Path, change: Callable[[dict], object]) -> None:
    state = load_file(folder / WEIGHTS)
    change(state)
    (folder / WEIGHTS).unlink()
    save_file(state, folder / WEIGHTS, {"format": "pt"})


def index(folder: Path, content: object) -> None:
    """Weights by an index: `content` is the shard of every tensor, or the whole file."""
    names = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    if isinstance(content, str):
        content = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, content)}
    (folder / INDEX).write_text(json.dumps(content))


def configure(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


NORM = "model.layers.2.input_layernorm.weight"
BROKEN = {
    "empty": (lambda f: cut(f, 0), SafetensorError, "header too small"),
    "cut in the header": (lambda f: cut(f, 1000), SafetensorError, "header"),
    "cut in the middle": (lambda f: cut(f, 1_000_000), SafetensorError, "not fully covered"),
    "cut at the end": (lambda f: cut(f, -1), SafetensorError, "not fully covered"),
    "random bytes": (lambda f: (f / WEIGHTS).write_bytes(random.Random(0).randbytes(5000)), SafetensorError, "header"),
    "LFS pointer": (lambda f: (f / WEIGHTS).write_text(POINTER), SafetensorError, "header"),
    "a pickle by another name": (
        lambda f: torch.save({"x": torch.ones(1)}, f / WEIGHTS),
        (SafetensorError, OSError),
        "header|safetensors",
    ),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), OSError, "no file named model.safetensors"),
    "wrong shape": (lambda f: edit(f, lambda s: s.update({NORM: torch.ones(5)})), RuntimeError, "mismatched_sizes"),
    "missing tensor": (lambda f: edit(f, lambda s: s.pop(NORM)), ValueError, f"lacks 1 parameters, {NORM} among them"),
    "no tensor of ours": (lambda f: save_file({"x": torch.ones(1)}, f / WEIGHTS), ValueError, "lacks 39 parameters"),
    "more layers in config.json": (lambda f: configure(f, num_hidden_layers=5), ValueError, "lacks 9 parameters"),
    "missing shard": (lambda f: index(f, "model-00001-of-00002.safetensors"), OSError, "model-00001-of-00002"),
    "index is not JSON": (lambda f: (index(f, {}), (f / INDEX).write_text("{")), ValueError, "line 1 column 2"),
    "index without a map": (lambda f: index(f, {}), KeyError, "weight_map"),
    "config is empty": (lambda f: (f / "config.json").write_text(""), OSError, "not a valid JSON file"),
    "config is not JSON": (lambda f: (f / "config.json").write_text("{"), OSError, "not a valid JSON file"),
    "config is bytes": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\0"), OSError, "not a valid JSON file"),
    "config is a pointer": (lambda f: (f / "config.json").write_text(POINTER), OSError, "not a valid JSON file"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), ValueError, "Unrecognized model"),
    "a negative size": (lambda f: configure(f, hidden_size=-128), ValueError, "hidden_size=-128 is not allowed"),
    "a size in words": (lambda f: configure(f, hidden_size="128"), ValueError, "hidden_size='128' is not allowed"),
    "a field of transformers": (lambda f: configure(f, id2label=3), ValueError, "transformers refuses a field"),
    "a method's name": (lambda f: configure(f, to_dict=3), ValueError, "to_dict=3 is not allowed.*a method"),
    "an unknown dtype": (lambda f: configure(f, dtype="float7"), ValueError, "float7"),
    "pad is a list": (lambda f: configure(f, pad_token_id=[1]), ValueError, r"pad_token_id=\[1\] is not allowed"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_checkpoint_never_loads(name, folder):
    break_it, kind, message = BROKEN[name]
    weights = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).unlink()  # a hard link to the checkpoint: other bytes go into a file of their own
    (folder / WEIGHTS).write_bytes(weights)
    break_it(folder)
    with pytest.raises(kind, match=message):
        load(folder)


# (2**24 x 2**24 weights would take 10**15 bytes; a fresh process may have 3 GB more than it starts with)
HUGE = {
    "vocab_size": {"vocab_size": 2**24},
    "hidden_size": {"hidden_size": 2**24},
    "intermediate_size": {"intermediate_size": 2**24},
    "all sizes": {"vocab_size": 2**24, "hidden_size": 2**24, "intermediate_size": 2**24},
    "beyond any size": {"hidden_size": 2**40},
    "layers": {"num_hidden_layers": 2**24},
    "labels": {"num_labels": 2**40},
}


def load_in_little_memory(folder: Path) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + 3 * 2**30
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    with pytest.raises((ValueError, RuntimeError), match="is not allowed|mismatched_sizes"):
        load(folder)


@pytest.mark.parametrize("name", HUGE)
def test_huge_sizes_fail_before_anything_is_allocated(name, folder):
    configure(folder, **HUGE[name])
    child = in_child(load_in_little_memory, folder)
    child.join(60)
    child.kill()
    assert child.exitcode == 0


def test_weights_that_are_not_numbers_are_seen_by_the_tool(folder):
    """Loading reads no value. Sampling then refuses; the tool that assembles and verifies a folder refuses before."""
    from tools.hub_check import LocalCheckFailed, check_loading

    edit(folder, lambda state: state[NORM].fill_(float("nan")))
    model = load(folder)
    with pytest.raises(RuntimeError, match="inf.*nan"):
        model.generate(torch.tensor([[1, 5]]), do_sample=True, max_new_tokens=1)
    with pytest.raises(LocalCheckFailed, match=NORM):
        check_loading(str(folder))


def test_an_index_that_leads_out_of_its_folder(folder, tmp_path):
    """transformers follows it, as data: nothing is run. The tool that assembles a folder refuses it."""
    from tools.convert_files import ConversionError
    from tools.convert_hub import safetensors_files

    shutil.copy(folder / WEIGHTS, tmp_path / "outside.safetensors")
    for place in ("../outside.safetensors", str(tmp_path / "outside.safetensors")):
        (folder / WEIGHTS).exists() or shutil.copy(tmp_path / "outside.safetensors", folder / WEIGHTS)
        index(folder, place)
        with pytest.raises(ConversionError, match="outside its folder"):
            safetensors_files(folder)


@pytest.mark.parametrize("content", ["null", "7", "[" * 100_000], ids=["null", "7", "nested"])
def test_json_that_is_no_object(content, folder):
    """transformers reads config.json before it knows whose it is, and says no more than this."""
    (folder / "config.json").write_text(content)
    with pytest.raises((TypeError, RecursionError)):
        AutoConfig.from_pretrained(folder, trust_remote_code=True)


@pytest.mark.parametrize("changes", [{"model_input_names": None}, {"added_tokens_decoder": 3}, {"padding_side": 7}])
def test_a_tokenizer_config_of_wrong_types(changes, folder):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError):
        AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
