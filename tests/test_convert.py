"""tools/convert_checkpoint.py: exact and resumable; broken sources, full disks and interruptions lose nothing."""

import contextlib
import io
import json
import os
import pickle
import random
import re
import resource
import signal
import stat
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tools.convert.checkpoint import pickles_to_safetensors
from tools.convert.files import ConversionError, copy_file
from tools.convert.llama import llama_config
from tools.convert.ollama import go_template, modelfile
from tools.convert.shards import plan_shards, write_shards
from tools.convert.tensors import Tensor, check_shapes, expected_shapes
from tools.convert_checkpoint import _size, main

from support.checkpoints import (
    GOLDEN,
    ROOT,
    SEVEN,
    TWENTY,
    golden_state,
    official_config,
    pickled_checkpoint,
    training_checkpoint,
    write_json,
)
from support.processes import in_child, kill_at_random, tree


SOURCES = pytest.mark.parametrize("source", [SEVEN, TWENTY], ids=lambda path: path.name)
INDEX = "pytorch_model.bin.index.json"
SECOND = "pytorch_model-00002-of-00003.bin"


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as shard:
            assert shard.metadata() == {"format": "pt"}
        tensors |= load_file(path)
    return tensors


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


def old_checkpoint(folder: Path, source: Path = SEVEN, dtype: torch.dtype = torch.bfloat16) -> Path:
    return pickled_checkpoint(folder, golden_state(source, dtype), official_config(source), inv_freq=True)


def run(*arguments: object) -> int:
    return main([*map(str, arguments), "--quiet"])


# safetensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@SOURCES
def test_pickles_become_the_same_tensors(source, dtype, tmp_path, capsys):
    """Every value and dtype, without the stored inv_freq; the tool itself compares the logits of both."""
    old = old_checkpoint(tmp_path / "old", source, dtype)
    before = tree(old)
    assert run("safetensors", old, tmp_path / "new", "--max-shard-size", "100KB") == 0
    assert_equal(read_tensors(tmp_path / "new"), golden_state(source, dtype))
    assert "equal the source's (largest difference 0)" in capsys.readouterr().out
    assert tree(old) == before


def test_shards_and_index_agree(tmp_path):
    limit = 100_000
    files = pickles_to_safetensors(old_checkpoint(tmp_path / "old"), tmp_path / "new", limit, progress=False)
    index = json.loads((tmp_path / "new" / "model.safetensors.index.json").read_text())
    sizes = {}
    for path in files:
        held = load_file(path)
        assert {index["weight_map"][name] for name in held} == {path.name}
        sizes[path.name] = sum(value.nbytes for value in held.values())
    assert list(sizes) == [f"model-{n:05}-of-{len(sizes):05}.safetensors" for n in range(1, len(sizes) + 1)]
    assert all(size <= limit for size in sizes.values()) and len(sizes) > 5
    assert index["metadata"]["total_size"] == sum(sizes.values())
    assert set(tree(tmp_path / "new")) == {*sizes, "model.safetensors.index.json"}


def test_a_single_file_has_no_index(tmp_path):
    assert pickles_to_safetensors(old_checkpoint(tmp_path / "old"), tmp_path / "new", progress=False) == [
        tmp_path / "new" / "model.safetensors"
    ]
    assert set(tree(tmp_path / "new")) == {"model.safetensors"}


def test_tensors_of_different_dtypes_are_aligned(tmp_path):
    """An odd number of half-precision values must not leave a float32 tensor unaligned."""
    state = {"a": torch.ones(3, dtype=torch.float16), "b": torch.ones(5), "c": torch.ones((), dtype=torch.bfloat16)}
    (tmp_path / "old").mkdir()
    torch.save(state, tmp_path / "old" / "pytorch_model.bin")
    pickles_to_safetensors(tmp_path / "old", tmp_path / "new", progress=False)
    assert_equal(read_tensors(tmp_path / "new"), state)
    content = (tmp_path / "new" / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    entries = json.loads(content[8 : 8 + length])
    assert (8 + length) % 8 == 0 and entries["b"]["data_offsets"] == [0, 20]


def test_files_from_before_pytorch_1_6_are_converted(tmp_path):
    """Such files cannot be memory-mapped; they are read into memory."""
    (tmp_path / "old").mkdir()
    state = golden_state(SEVEN)
    torch.save(state, tmp_path / "old" / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    pickles_to_safetensors(tmp_path / "old", tmp_path / "new", progress=False)
    assert_equal(read_tensors(tmp_path / "new"), state)


def test_converting_in_place_and_twice(tmp_path):
    """Source and target may be the same folder; a second run changes nothing."""
    old = old_checkpoint(tmp_path / "old")
    assert run("safetensors", old, old) == 0
    before = tree(old)
    assert run("safetensors", old, old) == 0
    assert tree(old) == before and "model.safetensors" in before


COMMANDS = pytest.mark.parametrize("command", ["safetensors", "llama", "training"])


def source_and_options(command: str, folder: Path) -> tuple[Path, list[object]]:
    if command == "training":
        return training_checkpoint(folder, golden_state(SEVEN), 4, ranks=2), ["--window", 64]
    return old_checkpoint(folder), ["--no-tokenizer"] if command == "llama" else []


@COMMANDS
def test_the_progress_bar_finishes(command, tmp_path, capsys):
    """It reaches 100 % and names the file; --quiet hides it."""
    source, options = source_and_options(command, tmp_path / "old")
    assert main([str(part) for part in (command, source, tmp_path / "new", "--no-logits", *options)]) == 0
    assert "model.safetensors: 100%" in capsys.readouterr().err
    assert run(command, source, tmp_path / "again", "--no-logits", *options) == 0
    assert not capsys.readouterr().err


def test_the_progress_bar_of_links_finishes(tmp_path, capsys):
    hub = hub_folder(tmp_path / "hub", TWENTY)
    assert main(["llama", str(hub), str(tmp_path / "new"), "--no-logits", "--no-tokenizer"]) == 0
    last = capsys.readouterr().err.splitlines()[-1]
    assert ": 100%|" in last and "1.07M/1.07M" in last, last


@COMMANDS
def test_an_unusable_folder_is_one_clear_error(command, tmp_path, capsys):
    source, options = source_and_options(command, tmp_path / "old")
    (tmp_path / "file").write_text("in the way")
    for old, new in ((source, tmp_path / "file"), (source, tmp_path / "file" / "new"), (tmp_path / "no", tmp_path)):
        assert run(command, old, new, *options) == 1
        error = capsys.readouterr().err
        assert error.startswith("convert_checkpoint.py: ") and error.count("\n") == 1 and str(tmp_path) in error


@COMMANDS
def test_dry_run_writes_nothing(command, tmp_path, capsys):
    source, options = source_and_options(command, tmp_path / "old")
    before = tree(source)
    assert run(command, source, tmp_path / "new", "--dry-run", *options) == 0
    assert "model.safetensors  55 tensors" in capsys.readouterr().out
    assert not (tmp_path / "new").exists() and tree(source) == before


def test_it_runs_as_a_script_from_any_folder():
    command = [sys.executable, str(ROOT / "tools" / "convert_checkpoint.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT.parent)
    assert done.returncode == 0 and "safetensors SOURCE TARGET" in done.stdout


# broken sources


class _Code:
    """Unpickling it would create a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


class _Bytes:
    """A hundred bytes that would become a gigabyte."""

    def __reduce__(self):
        return bytearray, (1 << 30,)


def edit_index(folder: Path, change: Callable[[dict], None], file: str = INDEX) -> None:
    index = json.loads((folder / file).read_text())
    change(index["weight_map"])
    write_json(folder / file, index)


def edit_shard(folder: Path, change: Callable[[dict], None]) -> None:
    state = torch.load(folder / SECOND)
    change(state)
    torch.save(state, folder / SECOND)


def edit_config(folder: Path, **changes: object) -> None:
    write_json(folder / "config.json", json.loads((folder / "config.json").read_text()) | changes)


def keep(folder: Path, file: str, part: Callable[[bytes], bytes]) -> None:
    (folder / file).write_bytes(part((folder / file).read_bytes()))


def compress(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)


NORM = "model.layers.2.input_layernorm.weight"  # in the second shard
BREAKS = {
    "truncated at the end": (lambda d: keep(d, SECOND, lambda b: b[:-1]), "truncated"),
    "truncated in the middle": (lambda d: keep(d, SECOND, lambda b: b[: len(b) // 2]), "truncated"),
    "empty": (lambda d: keep(d, SECOND, lambda b: b""), "truncated"),
    "random bytes": (lambda d: keep(d, SECOND, lambda b: random.Random(1).randbytes(5000)), "not a weight file"),
    "LFS pointer": (lambda d: (d / SECOND).write_text("version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    "missing shard": (lambda d: (d / SECOND).unlink(), f"{SECOND} is missing"),
    "no weights": (lambda d: (d / INDEX).unlink(), "holds no weights"),
    "index is not JSON": (lambda d: (d / INDEX).write_text("{"), "not JSON"),
    "index without map": (lambda d: write_json(d / INDEX, {}), "no weight_map"),
    "index with an empty map": (lambda d: write_json(d / INDEX, {"weight_map": {}}), "no weight_map"),
    "name outside the index": (lambda d: edit_index(d, lambda m: m.pop(NORM)), "index does not list"),
    "name only in the index": (lambda d: edit_index(d, lambda m: m.update({"ghost": SECOND})), "lacks ghost"),
    "index points to a parent folder": (
        lambda d: edit_index(d, lambda m: m.update({NORM: "../x.bin"})),
        "outside its folder",
    ),
    "index holds an absolute path": (
        lambda d: edit_index(d, lambda m: m.update({NORM: "/etc/passwd"})),
        "outside its folder",
    ),
    "index holds a Windows path": (
        lambda d: edit_index(d, lambda m: m.update({NORM: "..\\x.bin"})),
        "outside its folder",
    ),
    "index holds a number": (lambda d: edit_index(d, lambda m: m.update({NORM: 7})), "outside its folder"),
    "not a state": (lambda d: torch.save([1, 2], d / SECOND), "dictionary of tensors"),
    "a state in a state": (lambda d: torch.save({"state_dict": {}}, d / SECOND), "dictionary of tensors"),
    "integers": (lambda d: edit_shard(d, lambda s: s.update({NORM: s[NORM].int()})), "float32, float16 or bfloat16"),
    "NaN": (lambda d: edit_shard(d, lambda s: s[NORM].fill_(float("nan"))), f"{NORM} holds NaN"),
    "infinity": (lambda d: edit_shard(d, lambda s: s[NORM].view(-1)[3:4].fill_(float("-inf"))), "infinite"),
    "wrong shape": (lambda d: edit_shard(d, lambda s: s.update({NORM: torch.ones(63)})), r"shape \(63,\).*\(64,\)"),
    "fewer layers in config": (lambda d: edit_config(d, num_hidden_layers=3), "config.json does not describe"),
    "more layers in config": (lambda d: edit_config(d, num_hidden_layers=5), "which config.json requires"),
    "biases contradict config": (lambda d: edit_config(d, bias=False), 'set "bias": true'),
    "a size is a string": (lambda d: edit_config(d, hidden_size="wide"), "positive integers"),
    "more layers than any model": (lambda d: edit_config(d, num_hidden_layers=2**24), "16777216 is more than 1024"),
    "a tensor of nothing": (
        lambda d: edit_shard(d, lambda s: s.update({NORM: torch.ones(1).expand(1 << 34)})),
        f"{NORM} is larger than what is stored of it",
    ),
    "a compressed archive": (lambda d: compress(d / SECOND), "expands when it is loaded"),
    "bytes made by number": (lambda d: torch.save({NORM: _Bytes()}, d / SECOND), "expands when it is loaded"),
    "bytes made by number, before PyTorch 1.6": (
        lambda d: torch.save({NORM: _Bytes()}, d / SECOND, _use_new_zipfile_serialization=False),
        "expands when it is loaded",
    ),
    "nested without end": (lambda d: (d / "config.json").write_text('{"a":' * 100_000), "config.json is not JSON"),
    "config is not JSON": (lambda d: (d / "config.json").write_text("no"), "config.json is not JSON"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_source_is_one_clear_error(name, tmp_path, capsys):
    """Exit code 1, one line, no half-written file, and an unchanged source."""
    break_it, message = BREAKS[name]
    old = old_checkpoint(tmp_path / "old")
    break_it(old)
    before = tree(old)
    assert run("safetensors", old, tmp_path / "new", "--max-shard-size", "300KB") == 1
    output = capsys.readouterr()
    assert output.err.startswith("convert_checkpoint.py: ") and output.err.count("\n") == 1
    assert re.search(message, output.err), output.err
    assert tree(old) == before
    # Complete files may exist; partial files, and the index, without which nothing loads, may not.
    assert all(file.startswith("model-") and file.endswith(".safetensors") for file in tree(tmp_path / "new"))


def test_safetensors_need_no_conversion(tmp_path, capsys):
    assert run("safetensors", hub_folder(tmp_path / "hub", TWENTY), tmp_path / "new") == 1
    assert "holds safetensors already: there is nothing to convert." in capsys.readouterr().err


def test_missing_biases_contradict_the_config(tmp_path):
    old = pickled_checkpoint(tmp_path / "old", golden_state(TWENTY), official_config(TWENTY, bias=True))
    with pytest.raises(ConversionError, match='no attention biases.*set "bias": false'):
        pickles_to_safetensors(old, tmp_path / "new", progress=False)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "bare pickle"])
def test_code_in_a_pickle_never_runs(zipped, tmp_path):
    old, marker = old_checkpoint(tmp_path / "old"), tmp_path / "it-ran"
    if zipped:
        edit_shard(old, lambda state: state.update({NORM: _Code(marker)}))
    else:
        (old / SECOND).write_bytes(pickle.dumps({NORM: _Code(marker)}, protocol=2))
    with pytest.raises(ConversionError, match="requires code to be run"):
        pickles_to_safetensors(old, tmp_path / "new", progress=False)
    assert not marker.exists() and not tree(tmp_path / "new")


def test_random_damage_raises_only_conversion_errors(tmp_path):
    """500 damaged shards: each is converted or refused with ConversionError."""
    old, rng = old_checkpoint(tmp_path / "old"), random.Random(2)
    whole, outcomes = (old / SECOND).read_bytes(), {True: 0, False: 0}
    for _ in range(500):
        damaged = bytearray(whole)
        for _ in range(rng.randrange(1, 30)):
            # Half of the damage goes into the pickle at the start, which is a hundredth of the file.
            damaged[rng.randrange(len(damaged) if rng.random() < 0.5 else 4000)] = rng.randrange(256)
        (old / SECOND).write_bytes(damaged)
        try:
            pickles_to_safetensors(old, tmp_path / "new" / str(sum(outcomes.values())), progress=False)
            outcomes[True] += 1
        except ConversionError:
            outcomes[False] += 1
    assert outcomes[False] > 250


def test_nothing_is_overwritten(tmp_path):
    """A file of the same name with other content, or shards of another conversion, are refused."""
    old, new = old_checkpoint(tmp_path / "old"), tmp_path / "new"
    new.mkdir()
    (new / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(ConversionError, match="exists already"):
        pickles_to_safetensors(old, new, progress=False)
    assert (new / "model.safetensors").read_bytes() == b"other weights"
    pickles_to_safetensors(old, tmp_path / "whole", progress=False)
    content = bytearray((tmp_path / "whole" / "model.safetensors").read_bytes())
    content[-100] ^= 1  # the right length, but one wrong bit
    (tmp_path / "whole" / "model.safetensors").write_bytes(content)
    with pytest.raises(ConversionError, match="exists already"):
        pickles_to_safetensors(old, tmp_path / "whole", progress=False)
    with pytest.raises(ConversionError, match="of another conversion"):
        pickles_to_safetensors(old, new, 100_000, progress=False)
    assert set(tree(new)) == {"model.safetensors"}


# full disks and interruptions


CONVERSIONS = {"safetensors": [], "training": ["--window", 64], "llama": ["--no-tokenizer", "--copy"]}


def big_source(command: str, folder: Path, layers: int = 8) -> Path:
    """2.6 MB a layer, in six files: large enough to stop a conversion in the middle of a file."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 1024, "num_hidden_layers": layers}
    config, rng = official_config(SEVEN, **sizes), torch.Generator().manual_seed(3)
    state = {name: torch.randn(shape, generator=rng) for name, shape in expected_shapes(config).items()}
    if command == "training":
        return training_checkpoint(folder, state, layers, ranks=2, stages=3)
    pickled_checkpoint(folder, state, config, shards=6)
    if command == "llama":
        pickles_to_safetensors(folder, folder, sum(value.nbytes for value in state.values()) // 5, progress=False)
    return folder


def convert(command: str, source: Path, target: Path) -> int:
    return run(command, source, target, "--max-shard-size", "6MB", "--no-logits", *CONVERSIONS[command])


def convert_without_sharing_blocks(command: str, source: Path, target: Path) -> int:
    """In a child: as on a file system where a copy takes long enough to be killed in the middle."""
    if hasattr(os, "copy_file_range"):
        del os.copy_file_range
    return convert(command, source, target)


def convert_with_a_full_disk(command: str, source: Path, target: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (3_500_000, 3_500_000))
    with contextlib.redirect_stderr(io.StringIO()) as output:
        assert convert(command, source, target) == 1
    assert re.search("cannot be written.*File too large.*make room", output.getvalue()), output.getvalue()


@pytest.mark.parametrize("command", CONVERSIONS)
def test_a_full_disk_is_one_clear_error(command, tmp_path):
    """The kernel refuses a write in the middle of a file; once there is room, the same command finishes."""
    source, target = big_source(command, tmp_path / "big"), tmp_path / "new"
    before = tree(source)
    assert convert(command, source, tmp_path / "whole") == 0
    child = in_child(convert_with_a_full_disk, command, source, target)
    child.join()
    assert child.exitcode == 0
    assert not tree(target) and tree(source) == before
    assert convert(command, source, target) == 0
    assert tree(target) == tree(tmp_path / "whole")


def test_a_disk_without_room_is_refused_before_writing(tmp_path, monkeypatch):
    """Free space is checked first: no hour of writing 40 GB that ends in an error."""
    old = old_checkpoint(tmp_path / "old")
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr("tools.convert.shards.shutil.disk_usage", lambda path: usage)
    with pytest.raises(ConversionError, match="0.00 GB free"):
        pickles_to_safetensors(old, tmp_path / "new", progress=False)
    assert not tree(tmp_path / "new")


def test_ctrl_c_leaves_no_partial_file(tmp_path):
    big, new = big_source("safetensors", tmp_path / "big"), tmp_path / "new"
    assert convert("safetensors", big, tmp_path / "whole") == 0
    script, options = ROOT / "tools" / "convert_checkpoint.py", ["--max-shard-size=6MB", "--no-logits"]
    child = subprocess.Popen(
        [sys.executable, script, "safetensors", big, new, *options], stderr=subprocess.PIPE, text=True
    )
    while not any(new.glob("*.partial")) and child.poll() is None:
        time.sleep(0.0005)
    child.send_signal(signal.SIGINT)
    error = child.communicate(timeout=60)[1]
    assert child.returncode == 130 and "same command again" in error
    assert not list(new.glob("*.partial")) and not (new / "model.safetensors.index.json").exists()
    assert convert("safetensors", big, new) == 0
    assert tree(new) == tree(tmp_path / "whole")


@pytest.mark.parametrize("command", CONVERSIONS)
def test_kill_9_at_any_moment_loses_nothing(command, tmp_path):
    """A file with its final name is always complete; the next run keeps it, and writes the rest."""
    source = big_source(command, tmp_path / "source")
    before = tree(source)
    work = partial(convert_without_sharing_blocks, command)
    found = kill_at_random(work, source, tmp_path, points=12, torn=3, complete=4)
    assert found["equal"] == found["reruns"] and not found["wrong"] and not found["rewritten"], found
    assert found["kept"] > 3 and tree(source) == before, found


def convert_and_measure_peak_memory(command: str, source: Path, target: Path, peak: Path) -> None:
    """Write to `peak` how many kilobytes the conversion adds to the process's memory."""

    def field(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if name in line)

    assert convert(command, source.with_name("small"), target.with_name("warm")) == 0  # imports do not count
    start = field("VmRSS")
    assert convert(command, source, target) == 0
    peak.write_text(str(field("VmHWM") - start))


@pytest.mark.parametrize("command", CONVERSIONS)
def test_peak_memory_is_about_one_shard(command, tmp_path):
    """120 MB in six files of 20 MB (a training run's are needed in pairs): never the whole checkpoint."""
    source, peak = big_source(command, tmp_path / "big", layers=45), tmp_path / "peak"
    big_source(command, tmp_path / "small", layers=3)
    child = in_child(convert_and_measure_peak_memory, command, source, tmp_path / "new", peak)
    child.join()
    assert child.exitcode == 0 and int(peak.read_text()) < 50_000


# training checkpoints


@pytest.mark.parametrize(
    ("ranks", "stages", "chunks", "split_hidden"),
    [
        (1, 1, 1, True),
        (2, 1, 1, True),
        (1, 2, 1, True),
        (4, 2, 1, False),
        (2, 4, 1, True),
        (2, 2, 2, False),
        (1, 3, 1, True),
    ],
)
@SOURCES
def test_training_shards_become_the_model(source, ranks, stages, chunks, split_hidden, tmp_path):
    """Every value of the model, from any number of tensor- and pipeline-parallel shards, with and without biases."""
    state = golden_state(source)
    shards = training_checkpoint(tmp_path / "run", state, 4, ranks, stages, chunks, split_hidden)
    before = tree(shards)
    assert run("training", shards, tmp_path / "new", "--window", 64, "--max-shard-size", "200KB", "--no-logits") == 0
    assert_equal(read_tensors(tmp_path / "new"), state)
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    expected = official_config(source)
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "bias")
    assert {field: config[field] for field in same} == {field: expected[field] for field in same}
    assert config["max_position_embeddings"] == 64 and config["dtype"] == "float32"
    assert tree(shards) == before


@pytest.mark.parametrize(("ranks", "stages", "chunks"), [(8, 12, 1), (3, 5, 1), (12, 2, 4)])
@pytest.mark.parametrize("bias", [True, False])
def test_many_training_shards_become_the_model(bias, ranks, stages, chunks, tmp_path):
    """More than ten ranks or stages, where file names no longer sort by number, and stages of unequal length."""
    sizes = {"hidden_size": 48, "intermediate_size": 96, "vocab_size": 120, "num_hidden_layers": 24}
    config = official_config(SEVEN, **sizes, num_attention_heads=24, bias=bias)
    state = {name: torch.randn(shape) for name, shape in expected_shapes(config).items()}
    settings = {"num_attention_heads": 24}
    shards = training_checkpoint(tmp_path / "run", state, 24, ranks, stages, chunks, settings=settings)
    assert run("training", shards, tmp_path / "new", "--window", 64) == 0
    assert_equal(read_tensors(tmp_path / "new"), state)


@SOURCES
def test_the_converted_model_gives_the_official_logits(source, tmp_path, modeling):
    """From training shards to the logits that the official code computed with these weights."""
    import numpy as np

    shards = training_checkpoint(tmp_path / "run", golden_state(source), 4, ranks=2, stages=2)
    assert run("training", shards, tmp_path / "new", "--config", source / "config.json") == 0
    model = modeling.InternLMForCausalLM.from_pretrained(tmp_path / "new", dtype=torch.float32).eval()
    golden = np.load(source / "golden.npz")
    ids = torch.from_numpy(golden["ids256"]).reshape(1, -1)[:, :63]
    with torch.inference_mode():
        found = model(input_ids=ids).logits[0, golden["full_63_pos"]]
    torch.testing.assert_close(found, torch.from_numpy(golden["full_63_logits"]).view_as(found), atol=1e-3, rtol=0)


def test_training_shards_are_converted_to_a_dtype(tmp_path):
    shards = training_checkpoint(tmp_path / "run", golden_state(SEVEN), 4, ranks=2)
    assert run("training", shards, tmp_path / "new", "--window", 64, "--dtype", "bfloat16") == 0
    assert_equal(read_tensors(tmp_path / "new"), golden_state(SEVEN, torch.bfloat16))
    assert json.loads((tmp_path / "new" / "config.json").read_text())["dtype"] == "bfloat16"


def test_settings_saved_as_the_training_codes_class_are_read(tmp_path):
    """model_config.pt names a class of the training code, which is not installed; its items are loaded as data."""
    shards = training_checkpoint(tmp_path / "run", golden_state(SEVEN), 4, settings={"layer_norm_epsilon": 1e-5})
    script = (
        "import sys, types, torch\n"
        "names = ['internlm', 'internlm.core', 'internlm.core.context', 'internlm.core.context.parallel_context']\n"
        "for name in names: sys.modules[name] = types.ModuleType(name)\n"
        "class Config(dict): pass\n"
        "Config.__module__ = names[-1]; sys.modules[names[-1]].Config = Config\n"
        "path = sys.argv[1]\n"
        "torch.save(Config(torch.load(path), rope_base=20000, nested=Config(a=1)), path)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(shards / "model_config.pt")], check=True, timeout=60)
    assert run("training", shards, tmp_path / "new", "--window", 64, "--no-logits") == 0
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert config["rms_norm_eps"] == 1e-5 and config["rotary"]["base"] == 20000.0


def edit_run(folder: Path, change: Callable[[dict], None], file: str = "model_tp1_pp0.pt") -> None:
    state = torch.load(folder / file)
    change(state)
    torch.save(state, folder / file)


FUSED = "model.blocks.0.mixer.Wqkv.weight"
RUN_BREAKS = {
    "missing shard": (lambda d: (d / "model_tp1_pp0.pt").unlink(), "model_tp1_pp0.pt is missing"),
    "no shards": (lambda d: [path.unlink() for path in d.glob("model_tp*")], "no training checkpoint"),
    "truncated": (lambda d: keep(d, "model_tp0_pp1.pt", lambda b: b[:-9]), "truncated"),
    "no settings": (lambda d: (d / "model_config.pt").unlink(), "model_config.pt is missing"),
    "settings of another run": (lambda d: edit_run(d, lambda s: s.update(hidden_size=128), "model_config.pt"), "128"),
    "settings without heads": (
        lambda d: edit_run(d, lambda s: s.pop("num_attention_heads"), "model_config.pt"),
        "heads",
    ),
    "missing tensor": (lambda d: edit_run(d, lambda s: s.pop(FUSED)), "1 of 2 tensor-parallel"),
    "different widths": (lambda d: edit_run(d, lambda s: s.update({FUSED: torch.ones(96, 32)})), "cannot be joined"),
    "not three parts": (lambda d: edit_run(d, lambda s: s.update({FUSED: torch.ones(95, 64)})), "three equal parts"),
    "unknown field": (
        lambda d: [edit_run(d, add_field, f"model_tp{rank}_pp0.pt") for rank in (0, 1)],
        "no InternLM v1",
    ),
    "unknown name": (lambda d: edit_run(d, lambda s: s.update({"???": torch.ones(1)})), "not a name"),
    "missing layer": (
        lambda d: [edit_run(d, drop_layer, f"model_tp{rank}_pp1.pt") for rank in (0, 1)],
        r"holds only the layers \[1\]",
    ),
    "unequal shares": (lambda d: edit_run(d, lambda s: s.update({FUSED: torch.ones(48, 64)})), "requires"),
}


def add_field(state: dict) -> None:
    state["model.blocks.0.moe.weight"] = torch.ones(1)


def drop_layer(state: dict) -> None:
    for name in [name for name in state if ".blocks.0." in name]:
        del state[name]


@pytest.mark.parametrize("name", RUN_BREAKS)
def test_a_broken_run_is_one_clear_error(name, tmp_path, capsys):
    break_it, message = RUN_BREAKS[name]
    shards = training_checkpoint(tmp_path / "run", golden_state(SEVEN), 4, ranks=2, stages=2)
    break_it(shards)
    before = tree(shards)
    assert run("training", shards, tmp_path / "new", "--window", 64) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(message, error), error
    assert tree(shards) == before and not tree(tmp_path / "new")


def test_window_or_config_is_required(tmp_path, capsys):
    shards = training_checkpoint(tmp_path / "run", golden_state(SEVEN), 4)
    for options in ((), ("--window", 64, "--config", ROOT / "config.json")):
        assert run("training", shards, tmp_path / "new", *options) == 1
        assert "--window and --config" in capsys.readouterr().err


def test_a_tied_embedding_is_the_first_stages(tmp_path):
    """The last stage may store one too. Sizes of -1 in model_config.pt say nothing."""
    shards = training_checkpoint(tmp_path / "run", golden_state(SEVEN), 4, stages=2)
    edit_run(shards, lambda s: s.update(vocab_size=-1, hidden_size=-1), "model_config.pt")
    name, first = next((n, t) for n, t in torch.load(shards / "model_tp0_pp0.pt").items() if "embedding" in n)
    edit_run(shards, lambda s: s.update({name: torch.zeros_like(first)}), "model_tp0_pp1.pt")
    assert run("training", shards, tmp_path / "new", "--window", 64, "--no-logits") == 0
    assert_equal(read_tensors(tmp_path / "new"), golden_state(SEVEN))


@pytest.mark.parametrize(("text", "size"), [("1KB", 1000), ("2.5M", 2_500_000), ("5GB", 5_000_000_000), ("7", 7)])
def test_sizes_are_decimal(text, size):
    assert _size(text) == size


def test_only_dtypes_of_checkpoints_are_accepted(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run("training", tmp_path, tmp_path / "new", "--window", 64, "--dtype", "int8")
    assert "invalid choice: 'int8'" in capsys.readouterr().err


def test_settings_and_tokenizer_travel_and_are_reported(tmp_path, capsys):
    """As upload_to_hub.py needs them; the Llama copy gets only the settings that transformers knows."""
    old = old_checkpoint(tmp_path / "old")
    (old / "chat_template.jinja").write_text("{{ messages }}")
    write_json(old / "generation_config.json", {"do_sample": True, "api_key": "secret"})
    assert run("safetensors", old, tmp_path / "new") == 0
    assert "names, shapes, dtypes and values are right" in capsys.readouterr().out
    for name in ("chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "new" / name).read_bytes() == (old / name).read_bytes()
    assert run("llama", tmp_path / "new", tmp_path / "llama", "--no-tokenizer") == 0
    assert "tokenizer: none, as requested" in capsys.readouterr().out
    assert json.loads((tmp_path / "llama" / "generation_config.json").read_text()) == {"do_sample": True}


def test_shapes_of_a_config_that_leaves_things_out():
    """Biases are the default, as in 2023; a tied lm_head need not be stored; four missing names are three and one."""
    config = {"vocab_size": 8, "hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 1}
    named = [Tensor(name, shape, torch.float32, lambda: None) for name, shape in expected_shapes(config).items()]
    assert any(tensor.name.endswith("q_proj.bias") for tensor in named)
    tied = [tensor for tensor in named if tensor.name != "lm_head.weight"]
    check_shapes(tied, {**config, "tie_word_embeddings": True})
    with pytest.raises(ConversionError, match="lack lm_head.weight, which"):
        check_shapes(tied, config)
    with pytest.raises(ConversionError, match=r"lack lm_head.weight, \S+, \S+ and 1 more, which"):
        check_shapes(named[:-4], config)


def test_shards_in_the_making(tmp_path, monkeypatch):
    """No file is empty; a source that changes is found; finished files need no room; files are flushed to disk."""

    def tensor(name, count, made=None):
        return Tensor(name, (count,), torch.float32, lambda: torch.ones(made or count))

    assert [len(shard) for shard in plan_shards([tensor("a", 100), tensor("b", 1)], 40).values()] == [1, 1]
    with pytest.raises(ConversionError, match="a changed while it was being converted"):
        write_shards([tensor("a", 4, made=5)], tmp_path / "torn", progress=False)
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(stat.S_ISREG(os.fstat(descriptor).st_mode)))
    write_shards([tensor("a", 4)], tmp_path / "new", progress=False)
    assert any(flushed)  # a file, not only its folder
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=0))
    write_shards([tensor("a", 4)], tmp_path / "new", progress=False)
    with (tmp_path / "new" / "model.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ConversionError, match="is not what this conversion would write"):
        write_shards([tensor("a", 4)], tmp_path / "new", progress=False)


def test_a_copy_goes_on_by_hand_where_the_system_gives_up(tmp_path, monkeypatch):
    """After the first blocks have been shared, at the right place."""
    source = tmp_path / "source"
    source.write_bytes(random.Random(3).randbytes(300_000))
    real, calls = os.copy_file_range, []

    def once(*arguments):
        calls.append(arguments)
        if len(calls) > 1:
            raise OSError(22, "Invalid argument")
        return real(*arguments)

    monkeypatch.setattr("tools.convert.files.CHUNK_BYTES", 100_000)
    monkeypatch.setattr(os, "copy_file_range", once)
    copy_file(source, tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == source.read_bytes() and len(calls) > 2


@pytest.mark.parametrize("context", [1, 64, None])
def test_within_the_window_the_base_is_the_models(context):
    assert llama_config(official_config(TWENTY), context)["rope_theta"] == 10000.0


@pytest.mark.parametrize("context", [0, -5])
def test_a_context_without_tokens_is_refused(context):
    with pytest.raises(ConversionError, match=f"--context {context} must be at least 1"):
        llama_config(official_config(TWENTY), context)


# the Llama layout


def hub_folder(folder: Path, source: Path, tokenizer: bool = False, dtype: torch.dtype = torch.float32) -> Path:
    """A golden checkpoint in the Hub's layout, in two safetensors files, optionally with the official tokenizer."""
    folder.mkdir()
    pickled = pickled_checkpoint(folder.with_name("pickled"), golden_state(source, dtype), official_config(source))
    pickles_to_safetensors(pickled, folder, 600_000 if dtype == torch.float32 else 300_000, progress=False)
    write_json(folder / "config.json", official_config(source))
    if tokenizer:
        for file in (ROOT / "tokenizer_config.json", ROOT / "chat_template.jinja", GOLDEN / "tokenizer.model"):
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


def llama_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.inference_mode():
        return model.eval()(input_ids=ids).logits


@SOURCES
def test_llama_copy_is_exact_within_the_window(source, tmp_path, modeling):
    hub = hub_folder(tmp_path / "hub", source)
    assert run("llama", hub, tmp_path / "llama", "--no-tokenizer", "--no-logits") == 0
    ids = torch.randint(0, 512, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        ours = modeling.InternLMForCausalLM.from_pretrained(hub).eval()(input_ids=ids).logits
    torch.testing.assert_close(llama_logits(tmp_path / "llama", ids), ours, atol=1e-4, rtol=0)
    for path in hub.glob("*.safetensors"):
        assert path.samefile(tmp_path / "llama" / path.name)


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_llama_copy_with_a_fixed_base_is_exact(factor, tmp_path, modeling, configuration):
    """256 tokens, four windows: equal to this package's model with a plain rotary embedding and that base."""
    hub = hub_folder(tmp_path / "hub", TWENTY)
    fields = official_config(TWENTY, rotary={"type": "dynamic", "base": 10000, "scaling_factor": factor})
    write_json(hub / "config.json", fields)
    assert run("llama", hub, tmp_path / "llama", "--no-tokenizer", "--context", 256) == 0
    base = 10000 * (factor * 256 / 64 - (factor - 1)) ** (16 / 14)
    settings = json.loads((tmp_path / "llama" / "config.json").read_text())
    assert settings["rope_theta"] == pytest.approx(base) and settings["max_position_embeddings"] == 256
    changes = {"rotary": {"type": "origin", "base": base}, "max_position_embeddings": 256}
    config = configuration.InternLMConfig(**(fields | changes))
    ids = torch.randint(0, 512, (1, 256), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        ours = modeling.InternLMForCausalLM.from_pretrained(hub, config=config).eval()(input_ids=ids).logits
    found = llama_logits(tmp_path / "llama", ids)
    torch.testing.assert_close(found, ours, atol=2e-4, rtol=0)
    # The comparison is sharp: with the trained base the logits differ widely.
    write_json(tmp_path / "llama" / "config.json", settings | {"rope_theta": 10000.0})
    assert (llama_logits(tmp_path / "llama", ids) - ours).abs().max() > 0.1


@pytest.mark.parametrize(("context", "base"), [(None, 10000.0), (4096, 10000.0), (8192, 20221.3), (16384, 40889.9)])
def test_the_base_of_the_20b(context, base):
    from tools.convert.llama import llama_config

    settings = llama_config(json.loads((ROOT / "config.json").read_text()), context)
    assert settings["rope_theta"] == pytest.approx(base, abs=0.05)
    assert settings["max_position_embeddings"] == (context or 4096) and settings["attention_bias"] is False


def test_llama_copy_of_pickles_and_of_stored_inv_freq(tmp_path):
    """Weights that engines refuse are rewritten instead of linked."""
    old = old_checkpoint(tmp_path / "old", SEVEN, torch.float32)
    assert run("llama", old, tmp_path / "a", "--no-tokenizer") == 0
    write_json(tmp_path / "config.json", official_config(SEVEN))
    surplus = golden_state(SEVEN) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    save_file(surplus, tmp_path / "model.safetensors", {"format": "pt"})
    assert run("llama", tmp_path, tmp_path / "b", "--no-tokenizer") == 0
    for folder in (tmp_path / "a", tmp_path / "b"):
        assert_equal(read_tensors(folder), golden_state(SEVEN))


def cached(folder: Path, cache: Path, shared: bool) -> Path:
    """A snapshot in huggingface_hub's cache with the files of a folder: links to blobs, which may be shared."""
    repository = cache / "models--internlm--internlm-20b"
    snapshot, blobs = repository / "snapshots" / "0a1b", (cache if shared else repository) / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in folder.iterdir():
        path.rename(blobs / path.name)
        (snapshot / path.name).symlink_to(os.path.relpath(blobs / path.name, snapshot))
    return snapshot


@pytest.mark.parametrize("shared", [False, True])
def test_llama_copy_links_the_file_behind_a_symbolic_link(shared, tmp_path):
    """The Hub's cache holds symbolic links; the copy must outlive them."""
    snapshot = cached(hub_folder(tmp_path / "hub", TWENTY), tmp_path / "cache", shared)
    assert run("llama", snapshot, tmp_path / "llama", "--no-tokenizer", "--no-logits") == 0
    assert not any(path.is_symlink() for path in (tmp_path / "llama").iterdir())
    for path in (tmp_path / "llama").glob("*.safetensors"):
        assert path.samefile(snapshot / path.name)
    assert_equal(read_tensors(tmp_path / "llama"), golden_state(TWENTY))


@pytest.mark.parametrize("command", ["safetensors", "training", "llama"])
def test_a_link_out_of_the_source_is_refused(command, tmp_path, capsys):
    """What it points to would be copied, and published with the model."""
    source, options = source_and_options(command, tmp_path / "source")
    (tmp_path / "secret").write_text("{}")
    (source / "generation_config.json").symlink_to(tmp_path / "secret")
    assert run(command, source, tmp_path / "new", *options) == 1
    message = "generation_config.json is a link to .*secret, outside of its folder: copy the file there."
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("command", ["safetensors", "training", "llama"])
def test_links_in_the_target_are_replaced_and_never_followed(command, tmp_path):
    source, options = source_and_options(command, tmp_path)
    new, mine = tmp_path / "new", tmp_path / "mine"
    assert run(command, source, new, *options) == 0
    names = [path.name for path in new.iterdir()]
    expected = {name: (new / name).read_bytes() for name in names}
    mine.write_bytes(b"mine")
    for name in names:
        (new / name).unlink()
        (new / name).symlink_to(mine)
        (new / f"{name}.partial").symlink_to(mine)
    assert run(command, source, new, *options) == 0
    assert mine.read_bytes() == b"mine"
    assert not any(path.is_symlink() for path in new.iterdir() if path.suffix != ".partial")
    assert {name: (new / name).read_bytes() for name in names} == expected


def test_llama_tokenizer_needs_no_remote_code(tmp_path):
    """tokenizer.json gives the official ids and the chat template, through AutoTokenizer without trust_remote_code."""
    from transformers import AutoTokenizer

    hub = hub_folder(tmp_path / "hub", TWENTY, tokenizer=True)
    assert run("llama", hub, tmp_path / "llama", "--no-logits") == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "llama", trust_remote_code=False)
    rows = [json.loads(line) for line in (GOLDEN / "tokenizer.jsonl").open(encoding="utf-8")]
    assert [tokenizer(row["text"])["input_ids"] for row in rows] == [row["ids"] for row in rows] and len(rows) > 300
    assert tokenizer.padding_side == "left" and tokenizer.pad_token_id == 0
    assert tokenizer.decode(tokenizer("a . 你好")["input_ids"], skip_special_tokens=True) == "a . 你好"
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert prompt.startswith("<s><|System|>:") and "<|User|>:hi\n" in prompt
    # What llama.cpp's converter reads (tests/engines/test_llamacpp.py): no space before a text, <eoa> is special.
    config = json.loads((tmp_path / "llama" / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["add_prefix_space"] is False
    # By model_type, transformers 4.57.6 would make a LlamaTokenizer, which needs protobuf, 5.4.0 a CodeLlamaTokenizer.
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["added_tokens_decoder"]["103028"] == {"content": "<eoa>", "special": True}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "only internlm"),
        ({"rotary": {"type": "linear"}}, "rotary"),
        ({"hidden_size": -64}, "hidden_size"),
        ({"num_hidden_layers": 5}, "which config.json requires"),
        ({"bias": True}, 'set "bias": false'),
    ],
    ids=str,
)
def test_llama_copy_refuses_a_wrong_config(changes, message, tmp_path, capsys):
    hub = hub_folder(tmp_path / "hub", TWENTY)
    write_json(hub / "config.json", official_config(TWENTY, **changes))
    assert run("llama", hub, tmp_path / "llama", "--no-tokenizer") == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not tree(tmp_path / "llama")


SAFE = "model-00002-of-00002.safetensors"
SAFE_BREAKS = {
    "truncated": (lambda d: keep(d, SAFE, lambda b: b[:-1]), "truncated"),
    "empty": (lambda d: keep(d, SAFE, lambda b: b""), "truncated"),
    "LFS pointer": (lambda d: (d / SAFE).write_text("version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    "missing shard": (lambda d: (d / SAFE).unlink(), f"{SAFE} is missing"),
    "index points to a parent folder": (
        lambda d: edit_index(d, lambda m: m.update(x="../x"), SAFE_INDEX),
        "outside its folder",
    ),
    "name outside the index": (
        lambda d: edit_index(d, lambda m: m.pop("lm_head.weight"), SAFE_INDEX),
        "does not list",
    ),
    "NaN": (lambda d: save_file(fill(load_file(d / SAFE)), d / SAFE, {"format": "pt"}), "holds NaN"),
    "no config": (lambda d: (d / "config.json").unlink(), "config.json cannot be read"),
}
SAFE_INDEX = "model.safetensors.index.json"


def fill(state: dict) -> dict:
    next(iter(state.values())).view(-1)[5:6] = float("nan")
    return state


@pytest.mark.parametrize("name", SAFE_BREAKS)
def test_llama_copy_of_a_broken_source_is_one_clear_error(name, tmp_path, capsys):
    break_it, message = SAFE_BREAKS[name]
    hub = hub_folder(tmp_path / "hub", TWENTY)
    break_it(hub)
    before = tree(hub)
    assert run("llama", hub, tmp_path / "llama", "--no-tokenizer") == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert tree(hub) == before and "config.json" not in tree(tmp_path / "llama")


def test_llama_copy_requires_another_folder_and_a_tokenizer(tmp_path, capsys):
    hub = hub_folder(tmp_path / "hub", TWENTY)
    before = tree(hub)
    assert run("llama", hub, hub) == 1 and "another target" in capsys.readouterr().err
    assert run("llama", hub, tmp_path / "llama") == 1 and "tokenizer.model is missing" in capsys.readouterr().err
    assert tree(hub) == before and not tree(tmp_path / "llama")


# GGUF, without the packages that tests/engines/test_llamacpp.py needs


def test_gguf_without_its_package_is_one_clear_error(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.delitem(sys.modules, "tools.convert.gguf", raising=False)
    assert run("gguf", tmp_path, tmp_path / "new.gguf") == 1
    error = capsys.readouterr().err
    assert "The package gguf is missing: pip install gguf (requirements-" in error and error.count("\n") == 1
    assert not (tmp_path / "new.gguf").exists()


def test_gguf_of_an_unknown_type_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        run("gguf", tmp_path, tmp_path / "new.gguf", "--type", "q3")
    assert "invalid choice: 'q3'" in capsys.readouterr().err


LATER_TEMPLATE = """{{ $system := "" }}{{ range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}\
{{ if and (eq $i 0) (ne .Role "system") }}DEFAULT{{ end }}\
{{ if eq .Role "system" }}{{ if .Content }}<|System|>:{{ .Content }}
{{ end }}{{ else if eq .Role "user" }}<|User|>:{{ .Content }}
{{ else if eq .Role "assistant" }}<|Bot|>:{{ .Content }}{{ if not $last }}<eoa>
{{ end }}{{ end }}{{ if and $last (ne .Role "assistant") }}<|Bot|>:{{ end }}{{ end }}"""
EARLY_TEMPLATE = """{{ $system := "" }}{{ range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}\
{{ if eq .Role "system" }}{{ $system = printf "%s%s\\n" $system .Content }}\
{{ else if eq .Role "user" }}<|User|>:{{ $system }}{{ .Content }}<eoh>
{{ $system = "" }}{{ else if eq .Role "assistant" }}<|Bot|>:{{ .Content }}{{ if not $last }}<eoa>
{{ end }}{{ end }}{{ if and $last (ne .Role "assistant") }}<|Bot|>:{{ end }}{{ end }}"""


def test_the_modelfile_has_the_prompt_format(tiny_tokenizer, monkeypatch):
    """Rendered with Go's text/template, these gave the prompts of the two chat templates for 242 conversations."""
    user = tiny_tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    default = user.removeprefix("<s>").removesuffix("<|User|>:x\n")
    assert default.startswith("<|System|>:You are an AI assistant whose name is InternLM") and default.endswith("\n")
    assert go_template(tiny_tokenizer) == LATER_TEMPLATE.replace("DEFAULT", default)
    early = (ROOT / "variants" / "early_chat_template.jinja").read_text(encoding="utf-8")
    monkeypatch.setattr(tiny_tokenizer, "chat_template", early)
    assert go_template(tiny_tokenizer) == EARLY_TEMPLATE
    monkeypatch.setattr(tiny_tokenizer, "chat_template", "{{ bos_token }}{{ messages[0].content }}")
    assert go_template(tiny_tokenizer) is None


def test_the_modelfile_has_the_settings():
    text = modelfile("m.gguf", 2048, "T", {"top_p": 0.7, "eos_token_id": [2, 4]})
    parameters = ["num_ctx 2048", "temperature 0.8", "top_p 0.7", "top_k 50", "repeat_penalty 1.0", 'stop "<eoa>"']
    lines = ["FROM ./m.gguf", *(f"PARAMETER {parameter}" for parameter in parameters), 'TEMPLATE """T"""']
    assert text.splitlines() == lines
    assert modelfile("m.gguf", 2048, None, None) == "FROM ./m.gguf\nPARAMETER num_ctx 2048\n"


# the check after a conversion


def test_the_check_finds_a_wrong_dtype(tmp_path):
    """bfloat16 bits labelled float16 are finite, and have the right shape."""
    from tools.convert.check import check_files
    from tools.convert.checkpoint import pickled_tensors

    old, config = old_checkpoint(tmp_path / "old"), official_config(SEVEN)
    pickles_to_safetensors(old, tmp_path / "new", progress=False)
    assert "dtypes and values are right" in check_files(tmp_path / "new", config, pickled_tensors(old))
    keep(tmp_path / "new", "model.safetensors", lambda b: b.replace(b'"BF16"', b'"F16" ', 1))
    with pytest.raises(ConversionError, match="was written as torch.float16 instead of torch.bfloat16"):
        check_files(tmp_path / "new", config, pickled_tensors(old))


def test_the_check_finds_wrong_logits(tmp_path, modeling):
    """Two models that differ in one norm weight are not equal."""
    from tools.convert.check import check_logits

    hub = hub_folder(tmp_path / "hub", TWENTY)
    right = modeling.InternLMForCausalLM.from_pretrained(hub)
    wrong = modeling.InternLMForCausalLM.from_pretrained(hub)
    wrong.model.norm.weight.data[0] *= 1.5
    assert "largest difference 0)" in check_logits([lambda dtype: right, lambda dtype: right], hub)
    with pytest.raises(ConversionError, match="logits differ"):
        check_logits([lambda dtype: right, lambda dtype: wrong], hub)


def test_the_check_compares_to_rounding_and_beyond_the_window(tmp_path, modeling):
    """In float32, a thousandth is no rounding; beyond a window of eight tokens the two still agree."""
    from tools.convert.check import check_logits

    hub = hub_folder(tmp_path / "hub", TWENTY)
    right = modeling.InternLMForCausalLM.from_pretrained(hub)
    wrong = modeling.InternLMForCausalLM.from_pretrained(hub)
    wrong.lm_head.weight.data *= 1.001
    with pytest.raises(ConversionError, match="logits differ"):
        check_logits([lambda dtype: right, lambda dtype: wrong], hub)
    edit_config(hub, max_position_embeddings=8)
    assert run("llama", hub, tmp_path / "llama", "--no-tokenizer") == 0


def test_the_check_refuses_values_and_logits_that_are_not_finite(tmp_path, modeling):
    from tools.convert.check import check_files, check_logits
    from tools.convert.checkpoint import safetensors_tensors

    hub = hub_folder(tmp_path / "hub", TWENTY)
    model = modeling.InternLMForCausalLM.from_pretrained(hub)
    model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(ConversionError, match="NaN or infinite logits"):
        check_logits([lambda dtype: model], hub)
    planned = safetensors_tensors(hub)
    file = next(hub.glob("model-*.safetensors"))
    state = load_file(file)
    state["model.embed_tokens.weight"][0] = float("inf")
    file.unlink()
    save_file(state, file)
    with pytest.raises(ConversionError, match="holds NaN or infinite values"):
        check_files(hub, official_config(TWENTY), planned)


def test_the_check_says_why_logits_were_not_compared(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tools.convert.check._available_memory", lambda: 1000)
    assert run("safetensors", old_checkpoint(tmp_path / "old"), tmp_path / "new") == 0
    assert "logits not compared: a model needs" in capsys.readouterr().out
