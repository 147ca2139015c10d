"""`from_pretrained` of damaged, inconsistent and hostile checkpoints.

Pickled shards are tested in test_old_checkpoints.py and test_convert.py, tokenizer.model in test_tokenizer.py.
"""

import json
import random
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from support.checkpoints import SEVEN, golden_state, official_config, pickled_checkpoint
from support.hub_server import TOKEN, Hub, User, environment
from support.processes import in_child


WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.fixture
def folder(tiny_dir, tmp_path) -> Path:
    return shutil.copytree(tiny_dir, tmp_path / "broken")


def load(folder: Path, **settings: object):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **settings)


def cut(folder: Path, length: int) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:length])


def edit(folder: Path, change: Callable[[dict], object]) -> None:
    state = load_file(folder / WEIGHTS)
    change(state)
    (folder / WEIGHTS).unlink()
    save_file(state, folder / WEIGHTS, {"format": "pt"})


def index(folder: Path, content: object) -> None:
    """Replace the weights by an index: `content` is the shard of every tensor, or the whole file."""
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
    "a pickle named safetensors": (
        lambda f: torch.save({"x": torch.ones(1)}, f / WEIGHTS),
        (SafetensorError, OSError),
        "header|safetensors",
    ),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), OSError, "no file named .*model.safetensors"),
    "wrong shape": (
        lambda f: edit(f, lambda s: s.update({NORM: torch.ones(5)})),
        RuntimeError,
        "mismatched_sizes|size mismatch",
    ),
    "missing tensor": (lambda f: edit(f, lambda s: s.pop(NORM)), ValueError, f"lacks 1 parameters, {NORM} among them"),
    "no tensor of ours": (lambda f: save_file({"x": torch.ones(1)}, f / WEIGHTS), ValueError, "lacks 39 parameters"),
    "more layers in config.json": (lambda f: configure(f, num_hidden_layers=5), ValueError, "lacks 9 parameters"),
    "missing shard": (lambda f: index(f, "model-00001-of-00002.safetensors"), OSError, "model-00001-of-00002"),
    "index is not JSON": (lambda f: (index(f, {}), (f / INDEX).write_text("{")), ValueError, "line 1 column 2"),
    "index without a map": (lambda f: index(f, {"metadata": {}}), ValueError, "not an index.*'weight_map'.*fetch it"),
    "index without metadata": (lambda f: index(f, {"weight_map": {}}), ValueError, "not an index.*'metadata'"),
    "index is a list": (lambda f: index(f, [1]), ValueError, "not an index of weights"),
    "index of lists": (lambda f: index(f, {"metadata": {}, "weight_map": {"x": []}}), ValueError, "not an index"),
    "index of numbers": (lambda f: index(f, {"metadata": {}, "weight_map": {"x": 7}}), ValueError, "weights in 7"),
    "index is nested": (lambda f: (index(f, {}), (f / INDEX).write_text("[" * 10**5)), ValueError, "RecursionError"),
    "config is empty": (lambda f: (f / "config.json").write_text(""), OSError, "not a valid JSON file"),
    "config is not JSON": (lambda f: (f / "config.json").write_text("{"), OSError, "not a valid JSON file"),
    "config is bytes": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\0"), OSError, "not a valid JSON file"),
    "config is a pointer": (lambda f: (f / "config.json").write_text(POINTER), OSError, "not a valid JSON file"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), ValueError, "Unrecognized model"),
    "a negative size": (lambda f: configure(f, hidden_size=-128), ValueError, "hidden_size=-128 is not allowed"),
    "a size as a string": (lambda f: configure(f, hidden_size="128"), ValueError, "hidden_size='128' is not allowed"),
    "a field of transformers": (lambda f: configure(f, id2label=3), ValueError, "transformers refuses a field"),
    "a method's name": (lambda f: configure(f, to_dict=3), ValueError, "to_dict=3 is not allowed.*a method"),
    "an unknown dtype": (lambda f: configure(f, dtype="float7"), ValueError, "float7"),
    "pad is a list": (lambda f: configure(f, pad_token_id=[1]), ValueError, r"pad_token_id=\[1\] is not allowed"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_checkpoint_never_loads(name, folder):
    break_it, kind, message = BROKEN[name]
    weights = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).unlink()  # a hard link to the checkpoint: never write to it
    (folder / WEIGHTS).write_bytes(weights)
    break_it(folder)
    with pytest.raises(kind, match=message):
        load(folder)


# 2**24 x 2**24 weights would take 10**15 bytes; the process may allocate 3 GB.
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


LOAD_ALL = """
import sys
from transformers import AutoModelForCausalLM
for name in sys.argv[1:]:
    try:
        AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)
        print("loaded")
    except Exception as error:
        print(f"{type(error).__name__}: {error}".splitlines()[0])
"""


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", NORM, "model.norm.weight", "lm_head.weight"])
@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_a_single_nan_or_infinite_weight_is_refused(number, name, folder):
    """In any dtype and any tensor, also by the base model."""
    edit(folder, lambda state: state[name].view(-1)[-1:].fill_(number))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        with pytest.raises(ValueError, match=f"{name} holds NaN or infinite values in {dtype}.* or fetch it again"):
            load(folder, dtype=dtype)
    if name != "lm_head.weight":
        with pytest.raises(ValueError, match=f"{name.removeprefix('model.')} holds NaN"):
            AutoModel.from_pretrained(folder, trust_remote_code=True)


def test_the_upload_check_finds_nan(folder):
    """It reads the files, which also covers tensors that a loaded model has quantised or offloaded."""
    from tools.hub.check import check_loading
    from tools.hub.errors import LocalCheckFailed

    edit(folder, lambda state: state[NORM].fill_(float("nan")))
    with pytest.raises(LocalCheckFailed, match=NORM):
        check_loading(str(folder))


def test_large_finite_weights_are_accepted(folder):
    """Their sum overflows in float16, they do not. Where a value does, the error names the dtype."""
    edit(folder, lambda state: state[NORM].fill_(60_000))
    assert load(folder, dtype=torch.float16).get_parameter(NORM).sum().isinf()
    edit(folder, lambda state: state[NORM].fill_(70_000))
    with pytest.raises(
        ValueError, match=f"{NORM} holds NaN or infinite values in torch.float16: load .* in the dtype"
    ):
        load(folder, dtype=torch.float16)
    assert load(folder, dtype=torch.bfloat16).get_parameter(NORM).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_float8_weights_are_not_checked(dtype, modeling):
    """torch sums none: a model with quantised weights loads, and its other weights are checked."""
    checks = sys.modules[modeling.InternLMModel.__module__.replace("modeling_", "checks_")]
    model = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False).to(dtype), torch.nn.LayerNorm(4))
    checks.check_finite(model)
    torch.nn.init.constant_(model[1].weight, float("nan"))
    with pytest.raises(ValueError, match="1.weight holds NaN"):
        checks.check_finite(model)


@pytest.mark.parametrize("lost", ["q_proj.bias", "_proj.bias"])
def test_missing_biases_contradict_config_json_only_if_all_are(lost, modeling, tmp_path):
    """Without a few of them a checkpoint is damaged, and "bias": false would hide it."""
    state = {name: value for name, value in golden_state(SEVEN).items() if not name.endswith(lost)}
    config = official_config(SEVEN)
    pickled_checkpoint(tmp_path, state, config)
    layers = config["num_hidden_layers"]
    some = rf"lacks {layers} parameters, model.layers.0.self_attn.q_proj.bias among them: fetch it again"
    with pytest.raises(
        ValueError, match=some if lost == "q_proj.bias" else "has no attention biases, but config.bias"
    ):
        modeling.InternLMForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin.index.json", "model.safetensors.index.fp16.json"])
def test_an_index_of_any_name_is_looked_at(name, folder, tmp_path):
    """Of pickles, and of a variant."""
    shutil.copy(folder / WEIGHTS, tmp_path / "outside.safetensors")
    index(folder, "../outside.safetensors")
    (folder / INDEX).rename(folder / name)
    with pytest.raises(ValueError, match=f"{name} places weights in '../outside.safetensors', outside its folder"):
        load(folder, **({"variant": "fp16"} if "fp16" in name else {}))


def test_an_index_that_points_outside_its_folder_is_refused(folder, tmp_path, modeling):
    """transformers would follow it; neither the model nor the tools do."""
    from tools.convert.checkpoint import safetensors_files
    from tools.convert.files import ConversionError

    shutil.copy(folder / WEIGHTS, tmp_path / "outside.safetensors")
    for path in ("../outside.safetensors", str(tmp_path / "outside.safetensors"), "..\\outside.safetensors"):
        shutil.copy(tmp_path / "outside.safetensors", folder / WEIGHTS)
        index(folder, path)
        with pytest.raises(ValueError, match="outside its folder: do not use this checkpoint"):
            load(folder)
        with pytest.raises(ConversionError, match="outside its folder"):
            safetensors_files(folder)
        with pytest.raises(ValueError, match="outside its folder"):  # in a subfolder too
            modeling.InternLMForCausalLM.from_pretrained(tmp_path, subfolder=folder.name)


def test_a_folder_named_like_an_index_is_not_an_index(folder, tmp_path):
    """Only the file's own name counts, not its parent folders'."""
    load(folder.rename(tmp_path / "model.index.old"))


@pytest.mark.skipif(
    int(huggingface_hub.__version__.split(".")[0]) < 2,
    reason="huggingface_hub before 2.0 reads ../file if it exists",
)
def test_an_index_on_the_hub_that_points_outside_its_repository_is_refused(folder, tmp_path):
    """huggingface_hub refuses the name, whether the file exists (the second does) or not."""
    shutil.copy(folder / WEIGHTS, tmp_path / "outside.safetensors")
    paths = ("../outside.safetensors", "../../../../../outside.safetensors", str(tmp_path / "outside.safetensors"))
    with Hub() as hub:
        hub.users[TOKEN] = User("user")
        for number, path in enumerate(paths):
            shutil.copy(tmp_path / "outside.safetensors", folder / WEIGHTS)
            index(folder, path)
            hub.add_repository(f"user/{number}", {path.name: path.read_bytes() for path in folder.iterdir()})
        child = subprocess.run(
            [sys.executable, "-c", LOAD_ALL, *(f"user/{number}" for number in range(len(paths)))],
            env=environment(hub, tmp_path / "home", "lfs"),
            capture_output=True,
            text=True,
            timeout=200,
        )
    assert child.returncode == 0, child.stderr
    lines = child.stdout.splitlines()
    assert len(lines) == len(paths) and all("ValueError: Invalid filename" in line for line in lines), lines


@pytest.mark.parametrize("name", ["pytorch_model.bin.index.json", "model.safetensors.index.fp16.json"])
def test_an_index_of_another_format_or_variant_is_read(name, folder):
    """transformers would read it if the other weights were missing, or for `variant`."""
    (folder / name).write_text('{"metadata": {}, "weight_map": {"x": "../outside.bin"}}')
    with pytest.raises(ValueError, match="places weights in '../outside.bin', outside its folder"):
        load(folder)


@pytest.mark.parametrize("name", ["faiss.index.json", "model.index.html.json", "safetensors.index.md"])
def test_other_files_called_index_are_left_alone(name, folder):
    (folder / name).write_text("[1]")
    assert load(folder).config.num_hidden_layers == 4


@pytest.mark.parametrize("content", ["null", "7", "[" * 100_000], ids=["null", "7", "nested"])
def test_a_config_that_is_not_a_json_object_is_refused(content, folder):
    """transformers reads config.json before it knows the model type, and raises only this."""
    (folder / "config.json").write_text(content)
    with pytest.raises((TypeError, RecursionError)):
        AutoConfig.from_pretrained(folder, trust_remote_code=True)


@pytest.mark.parametrize("changes", [{"model_input_names": None}, {"added_tokens_decoder": 3}, {"padding_side": 7}])
def test_a_tokenizer_config_of_wrong_types_is_refused(changes, folder):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError):
        AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
