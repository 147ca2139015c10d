"""What upload_to_hub.py does without a Hub: command line, assembling a folder, variants, and the folder's check."""

import ast
import contextlib
import errno
import io
import json
import os
import re
import resource
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import httpx2
import pytest
import torch
import yaml
from huggingface_hub.errors import OfflineModeIsEnabled, StrictDataclassFieldValidationError
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

import upload_to_hub
from tools.convert.files import ConversionError
from tools.convert.tensors import expected_shapes
from tools.hub import errors
from tools.hub.assemble import SMALL_FILES, assemble
from tools.hub.card import fill_in_card
from tools.hub.check import check_files, check_loading
from tools.hub.load_and_generate import check_values
from tools.hub.variant import (
    config_json,
    detect,
    generation_json,
    load_config,
    tokenizer_json,
    variant_config,
    variants,
)
from tools.package import MODULES

from support.checkpoints import pickled_checkpoint
from support.hub_server import TOKEN
from support.paths import GOLDEN, ROOT, TINY


# The command line


def run_here(*argv: object) -> tuple[int, str]:
    """Run the command line in this process, where the Hub is not involved."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        try:
            code = upload_to_hub.main([*map(str, argv)])
        except SystemExit as end:
            code = end.code
    return code, text.getvalue()


def test_without_arguments_it_says_what_it_needs() -> None:
    code, text = run_here()
    assert code == 2
    assert "give --weights FOLDER (the old checkpoint), and --repo-id NAMESPACE/NAME" in text
    assert "hf auth login" in text


def test_without_packages_it_says_what_to_install() -> None:
    """Plain Python, as after a fresh clone: -S hides the installed packages."""
    command = [sys.executable, "-S", str(ROOT / "upload_to_hub.py")]
    child = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert child.returncode == errors.InputError.code
    assert child.stderr.startswith("upload_to_hub.py: torch, ")
    assert child.stderr.endswith(" missing: pip install -r requirements.txt\n")


def test_help_lists_every_option_and_exit_code() -> None:
    code, text = run_here("--help")
    assert code == 0
    codes = [error.code for error in errors.UploadError.__subclasses__()]
    assert len(set(codes)) == len(codes) == 11
    for code in (0, 1, 2, errors.INTERRUPTED, *codes):
        assert f"\n  {code:3}  " in text
    assert all(name in text.replace("\n", "").replace(" ", "") for name in variants())
    page = (ROOT / "docs" / "upload.md").read_text(encoding="utf-8")
    described = [int(code) for code in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)]
    assert described == sorted([1, 2, errors.INTERRUPTED, *codes])


def test_it_asks_before_overwriting(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal it asks; otherwise it refuses."""
    target = SimpleNamespace(foreign=True, repo_id="a/b", revision="main")
    arguments = SimpleNamespace(yes=False, create_pr=False)
    asked: list[str] = []
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("builtins.input", lambda question: asked.append(question) or "y")
    upload_to_hub._confirm(target, arguments)
    assert asked == ["a/b (main) holds files, and was not created by this tool. Overwrite? [y/N] "]
    monkeypatch.setattr("builtins.input", lambda question: "")
    with pytest.raises(errors.NameTaken):
        upload_to_hub._confirm(target, arguments)


def test_the_folder_is_beside_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also beside the folder in which one is."""
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    for weights in (".", "../mine", str(tmp_path / "mine")):
        made = upload_to_hub._arguments(["--weights", weights, "--repo-id", "a/b"])
        assert made.local_dir == tmp_path / "mine-hub"


def test_ctrl_c_while_assembling(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(upload_to_hub, "_assemble", interrupt)
    code, text = run_here("--weights", TINY, "--local-dir", tmp_path / "out")
    assert code == errors.INTERRUPTED
    assert text == "\nInterrupted: run the same command again to resume.\n"


def caused_by(cause: Exception, explicitly: bool) -> Exception:
    """An exception that another one led to, with `from` or while that one was handled."""
    try:
        try:
            raise cause
        except Exception as error:
            if explicitly:
                raise KeyError("led to it") from error
            raise KeyError("led to it")  # noqa: B904
    except KeyError as error:
        return error


@pytest.mark.parametrize("explicitly", [True, False])
def test_the_cause_of_an_error_is_explained(explicitly: bool) -> None:
    known = errors.explain(caused_by(httpx2.ConnectError("unplugged"), explicitly))
    assert isinstance(known, errors.NetworkLost) and "unplugged" in str(known)
    assert isinstance(errors.explain(caused_by(OfflineModeIsEnabled("x"), explicitly)), errors.NetworkLost)
    assert isinstance(errors.explain(caused_by(OSError(errno.EDQUOT, "quota"), explicitly)), errors.DiskFull)
    assert errors.explain(caused_by(OSError(errno.EACCES, "denied"), explicitly)) is None


def test_a_wrong_configuration_is_no_answer_of_a_hub() -> None:
    """transformers checks configurations with dataclasses of huggingface_hub."""
    with pytest.raises(StrictDataclassFieldValidationError) as raised:
        LlamaConfig(hidden_size="wide")
    assert errors.explain(raised.value) is None


def test_no_message_holds_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    message, code = errors.report(errors.NotFound(f"nothing at https://user:{TOKEN}@host"))
    assert (message, code) == ("upload_to_hub.py: nothing at https://user:hf_***@host", errors.NotFound.code)


@pytest.mark.parametrize(
    ("free", "remote", "error"),
    [
        (0, {"tokens": [1, 2], "logits": 5.0}, errors.DiskFull),
        (10**12, {"tokens": [1, 3], "logits": 5.0}, errors.RemoteCheckFailed),
        (10**12, {"tokens": [1, 2], "logits": 5.01}, errors.RemoteCheckFailed),
        (10**12, errors.LocalCheckFailed("does not load"), errors.RemoteCheckFailed),
        (10**12, errors.NetworkLost("cut off"), errors.NetworkLost),
        (10**12, {"tokens": [1, 2], "logits": 5.0001}, None),
    ],
)
def test_a_commit_must_give_what_the_folder_gave(
    free: int, remote: object, error: type | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """Tokens and logits, which are printed, up to rounding; and there must be room for the download."""

    def loaded(source: str, *_: object, **__: object) -> object:
        if source == str(tmp_path):
            return {"tokens": [1, 2], "logits": 5.0}
        if isinstance(remote, Exception):
            raise remote
        return remote

    monkeypatch.setattr("tools.hub.push.check_hashes", lambda *_: None)
    monkeypatch.setattr(upload_to_hub, "check_files", lambda *_: None)
    monkeypatch.setattr(upload_to_hub, "check_loading", loaded)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    (tmp_path / "weights").write_bytes(b"x")
    assembly = SimpleNamespace(out=tmp_path, files=["weights"])
    plan = SimpleNamespace(target=SimpleNamespace(repo_id="a/b"))
    arguments = SimpleNamespace(no_verify_local=False, no_verify_remote=False)
    local = upload_to_hub._verify_folder(assembly, arguments)
    assert "It loads and generates: tokens [1, 2], sum of |logits| 5\n" in capsys.readouterr().out
    expected = contextlib.nullcontext() if error is None else pytest.raises(error)
    with expected:
        upload_to_hub._verify_commit(None, plan, "0a1b", assembly, local, arguments)
    assert ("generates the same tokens" in capsys.readouterr().out) == (error is None)


def test_a_bug_in_the_tool_shows_a_traceback_without_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(*_: object) -> None:
        raise RuntimeError(f"unexpected {TOKEN}")

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(upload_to_hub, "_assemble", bug)
    code, text = run_here("--weights", TINY, "--local-dir", "unused")
    assert code == 1
    assert "RuntimeError: unexpected hf_***" in text
    assert "This is a bug in this tool; please report the lines above." in text
    assert TOKEN not in text


# Assembling

SMALL = {
    "architectures": ["InternLMForCausalLM"],
    "model_type": "internlm",
    "vocab_size": 103168,
    "hidden_size": 4,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "max_position_embeddings": 64,
    "bias": True,
    "pad_token_id": 2,
    "torch_dtype": "float16",
    "rope_theta": 10000.0,
    "rope_scaling": None,
}


def old_folder(folder: Path, **changes: object) -> Path:
    """A folder as of 2023: sharded pickles, the official tokenizer, a config.json in an old dialect."""
    config = {key: value for key, value in {**SMALL, **changes}.items() if value is not ...}
    state = {name: torch.ones(shape, dtype=torch.float16) for name, shape in expected_shapes(SMALL).items()}
    pickled_checkpoint(folder, state, config, inv_freq=True)
    shutil.copy(GOLDEN / "tokenizer.model", folder)
    shutil.copy(GOLDEN / "hub_20b" / "generation_config.json", folder)
    return folder


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return old_folder(tmp_path_factory.mktemp("old") / "weights")


def test_a_folder_of_2023_becomes_a_repository(old: Path, tmp_path: Path) -> None:
    """Pickles are converted; the checkpoint's settings are kept, in today's form; the rest is this package's."""
    before = sorted(path.name for path in old.iterdir())
    assembly = assemble(old, tmp_path / "out", "internlm-tiny", progress=False)
    assert sorted(path.name for path in assembly.out.iterdir()) == sorted(assembly.files)
    assert sorted(assembly.files) == sorted([*SMALL_FILES, "model.safetensors"])
    check_files(assembly.out)
    assert sorted(path.name for path in old.iterdir()) == before
    config = json.loads((assembly.out / "config.json").read_text())
    assert config["rotary"] == {"type": "dynamic", "base": 10000.0, "scaling_factor": 1.0}
    assert (config["dtype"], config["bias"], config["pad_token_id"]) == ("float16", True, 0)
    assert config["auto_map"] == variant_config("internlm-20b")["auto_map"]
    assert not {"rope_theta", "rope_scaling", "torch_dtype"} & config.keys()
    generation = json.loads((assembly.out / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    assert assembly.notes == [
        "variant internlm-tiny, as requested",
        "config.json: pad_token_id 2 becomes 0 (<unk>): a stop token must not pad",
    ]


def test_weights_are_links_and_a_second_run_changes_nothing(tiny_dir: Path, tmp_path: Path) -> None:
    assembly = assemble(TINY, tmp_path / "out", "internlm-tiny", progress=False)
    assert os.path.samefile(TINY / "model.safetensors", assembly.out / "model.safetensors")
    assert not os.path.samefile(ROOT / "LICENSE", assembly.out / "LICENSE")  # editing one must not change the other
    before = (assembly.out / "model.safetensors").stat()
    assemble(TINY, tmp_path / "out", "internlm-tiny", progress=False)
    assert (assembly.out / "model.safetensors").stat() == before
    assert all((tiny_dir / name).read_bytes() == (assembly.out / name).read_bytes() for name in assembly.files)


def test_where_links_are_impossible_weights_are_copied_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_link(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", no_link)
    assembly = assemble(TINY, tmp_path / "out", "internlm-tiny", progress=False)
    copied = assembly.out / "model.safetensors"
    assert copied.read_bytes() == (TINY / "model.safetensors").read_bytes()
    before = copied.stat().st_ino
    assemble(TINY, tmp_path / "out", "internlm-tiny", progress=False)
    assert copied.stat().st_ino == before


@contextlib.contextmanager
def full_disk(room: int) -> Iterator[None]:
    """Files may grow to `room` bytes: writing more fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("room", [1_000_000, 1_656_000])  # less than the weights; more, and less than tokenizer.model
def test_a_full_disk_leaves_nothing_half_written_and_a_rerun_resumes(room: int, old: Path, tmp_path: Path) -> None:
    argv = ["--weights", old, "--variant", "internlm-tiny", "--local-dir", tmp_path / "out", "--no-verify-local"]
    with full_disk(room):
        code, text = run_here(*argv)
    assert code == errors.DiskFull.code, text
    assert "Once there is room, run the same command again to resume." in text
    assert not list((tmp_path / "out").glob("*.partial"))
    assert (tmp_path / "out" / "model.safetensors").exists() == (room == 1_656_000)
    assert not (tmp_path / "out" / "tokenizer.model").exists()
    code, text = run_here(*argv)
    assert code == 0, text
    check_files(tmp_path / "out")


def test_a_disk_without_room_is_found_before_anything_is_written(
    old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(errors.DiskFull, match="has 0.00 GB free, and 0.00 GB are needed"):
        assemble(old, tmp_path / "out", "internlm-tiny", progress=False)
    assert list((tmp_path / "out").iterdir()) == []


def pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")


def break_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def write(folder: Path, name: str, content: object) -> None:
    (folder / name).write_text(json.dumps(content))


BAD_FOLDERS = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "config is a pointer": (lambda f: pointer(f / "config.json"), "config.json is a Git LFS pointer"),
    "another model": (lambda f: break_config(f, model_type="internlm2"), "has model_type='internlm2'"),
    "quantised": (lambda f: break_config(f, quantization_config={}), "is quantised: give the unquantised"),
    "an argument that is none": (lambda f: break_config(f, self=1), "config.json: "),
    "nested without end": (lambda f: (f / "config.json").write_text('{"a":' * 100_000), "config.json is not JSON"),
    "added tokens by name are a list": (
        lambda f: write(f, "added_tokens.json", []),
        "must hold a JSON object, not list",
    ),
    "an added token's id is text": (
        lambda f: write(f, "added_tokens.json", {"<a>": "x"}),
        "no added token with the id",
    ),
    "an added token's id is a fraction": (lambda f: write(f, "added_tokens.json", {"<a>": 2.5}), "with the id 2.5"),
    "added tokens are a number": (
        lambda f: write(f, "tokenizer.json", {"added_tokens": 1}),
        "added_tokens is no list",
    ),
    "an added token is text": (
        lambda f: write(f, "tokenizer.json", {"added_tokens": ["<a>"]}),
        "'<a>' is no added token with the id None",
    ),
    "an added token has no text": (
        lambda f: write(f, "tokenizer_config.json", {"added_tokens_decoder": {"103168": {"content": None}}}),
        "is no added token with the id 103168",
    ),
    "an added token's flag is text": (
        lambda f: write(
            f, "tokenizer_config.json", {"added_tokens_decoder": {"7": {"content": "a", "special": "no"}}}
        ),
        "is no added token with the id 7",
    ),
    "a stop token is an object": (
        lambda f: write(f, "generation_config.json", {"eos_token_id": {"id": 2}}),
        "must be ids: fix it.",
    ),
    "a link out of the folder": (
        lambda f: ((f.parent / "secret").write_text("{}"), (f / "added_tokens.json").symlink_to(f.parent / "secret")),
        "outside of its folder: copy the file there.",
    ),
    "a field out of range": (lambda f: break_config(f, rms_norm_eps=-1), "rms_norm_eps=-1 is not allowed"),
    "no tokenizer": (lambda f: (f / "tokenizer.model").unlink(), "tokenizer.model is missing: put InternLM's there"),
    "tokenizer is a pointer": (lambda f: pointer(f / "tokenizer.model"), "tokenizer.model is a Git LFS pointer"),
    "tokenizer is empty": (lambda f: (f / "tokenizer.model").write_bytes(b""), "not a complete SentencePiece model"),
    "vocabulary too small": (lambda f: break_config(f, vocab_size=103167), "103168 pieces, the model only 103167"),
    "no weights": (lambda f: [path.unlink() for path in f.glob("pytorch*")], "holds no weights"),
    "a shard missing": (lambda f: sorted(f.glob("pytorch*.bin"))[0].unlink(), "is missing; fetch it again"),
    "a shard is a pointer": (lambda f: pointer(sorted(f.glob("pytorch*.bin"))[0]), "is a Git LFS pointer"),
    "biases contradict the config": (lambda f: break_config(f, bias=False), 'set "bias": true'),
    "safetensors is a pointer": (lambda f: pointer(f / "model.safetensors"), "model.safetensors is a Git LFS pointer"),
    "safetensors cut short": (
        lambda f: (f / "model.safetensors").write_bytes((TINY / "model.safetensors").read_bytes()[:-1]),
        "is truncated or not a weight file",
    ),
}


@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_a_bad_folder_gets_one_clear_message(name: str, old: Path, tmp_path: Path) -> None:
    spoil, message = BAD_FOLDERS[name]
    weights = tmp_path / "weights"
    shutil.copytree(old, weights)
    spoil(weights)
    argv = ["--weights", weights, "--variant", "internlm-tiny", "--local-dir", tmp_path / "out", "--no-verify-local"]
    code, text = run_here(*argv)
    assert code == errors.InputError.code, text
    assert message in text
    assert text.count("upload_to_hub.py: ") == 1 and "Traceback" not in text


@pytest.mark.parametrize("prompt_format", ["early", "later", "none"])
def test_a_custom_model_chooses_its_prompt_format(prompt_format: str, old: Path, tmp_path: Path) -> None:
    """Sizes that are no variant's; template and stop tokens as asked for, and a card that chats or does not."""
    argv = ["--weights", old, "--local-dir", tmp_path / "out", "--no-verify-local"]
    code, text = run_here(*argv)
    assert code == errors.InputError.code
    assert "matches the sizes of no variant" in text and "--variant custom --prompt-format early|later|none" in text
    code, text = run_here(*argv, "--variant", "custom")
    assert code == errors.InputError.code and "--variant custom needs --prompt-format early, later, none" in text
    code, text = run_here(*argv, "--variant", "custom", "--prompt-format", prompt_format)
    assert code == 0, text
    assert "\n  - variant custom, as requested\n" in text
    assert text.endswith(f"{tmp_path / 'out'} is a complete repository of custom.\n")
    template = "variants/early_chat_template.jinja" if prompt_format == "early" else "chat_template.jinja"
    assert (tmp_path / "out" / "chat_template.jinja").read_bytes() == (ROOT / template).read_bytes()
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == (2 if prompt_format == "none" else [2, 103028])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["hidden_size"], config["num_hidden_layers"]) == (SMALL["hidden_size"], SMALL["num_hidden_layers"])
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "A model of its own sizes, in the architecture of InternLM v1: 2 layers, width 4" in card
    assert ('"internlm/internlm-chat-20b"' in card) == (prompt_format == "none")


def test_a_prompt_format_is_for_custom_models_only(tmp_path: Path) -> None:
    code, text = run_here("--weights", TINY, "--local-dir", tmp_path / "out", "--prompt-format", "early")
    assert code == errors.InputError.code
    assert "--prompt-format early is for --variant custom only" in text


@pytest.mark.parametrize("pickled", [True, False])
def test_a_dry_run_writes_nothing(pickled: bool, old: Path, tmp_path: Path) -> None:
    weights, out = old if pickled else TINY, tmp_path / "new" / "out"
    argv = ["--weights", weights, "--variant", "internlm-tiny", "--local-dir", out, "--no-verify-local", "--dry-run"]
    code, text = run_here(*argv)
    assert code == 0, text
    assert text.endswith("Dry run: nothing was written.\n")
    assert list(tmp_path.iterdir()) == []
    out.mkdir(parents=True)
    (out / "thesis.tex").write_text("mine")
    code, text = run_here(*argv)
    assert code == errors.InputError.code and "thesis.tex" in text  # as without --dry-run


def test_a_dry_run_where_nothing_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("tempfile.mkdtemp", denied)
    code, text = run_here("--weights", TINY, "--local-dir", tmp_path / "out", "--dry-run")
    assert code == errors.InputError.code
    assert text == f"upload_to_hub.py: {tmp_path}: Permission denied: give another --local-dir.\n"


def test_null_stands_for_nothing(old: Path, tmp_path: Path) -> None:
    """Where a file says that there are no added tokens and no quantisation."""
    weights = tmp_path / "weights"
    shutil.copytree(old, weights)
    break_config(weights, quantization_config=None)
    write(weights, "tokenizer.json", {"added_tokens": None})
    write(weights, "tokenizer_config.json", {"added_tokens_decoder": None})
    assembly = assemble(weights, tmp_path / "out", "internlm-tiny", progress=False)
    check_files(assembly.out)


def test_a_card_that_is_not_text(old: Path, tmp_path: Path) -> None:
    (tmp_path / "card.md").write_bytes(b"---\nlicense: mit\n---\n\xff")
    argv = ["--weights", old, "--variant", "internlm-tiny", "--local-dir", tmp_path / "out"]
    code, text = run_here(*argv, "--card", tmp_path / "card.md")
    assert code == errors.InputError.code
    assert "card.md is not UTF-8 text" in text and "Traceback" not in text


@pytest.mark.parametrize("pickled", [True, False])
def test_links_in_the_target_are_replaced_and_never_followed(pickled: bool, old: Path, tmp_path: Path) -> None:
    """What somebody planted where a file, or its temporary file, will be."""
    source, out, mine = old if pickled else TINY, tmp_path / "out", tmp_path / "mine"
    expected = {
        name: (tmp_path / "first" / name).read_bytes()
        for name in assemble(source, tmp_path / "first", "internlm-tiny", progress=False).files
    }
    mine.write_bytes(b"mine")
    out.mkdir()
    for name in expected:
        (out / name).symlink_to(mine)
        (out / f"{name}.partial").symlink_to(mine)
    assembly = assemble(source, out, "internlm-tiny", progress=False)
    assert mine.read_bytes() == b"mine"
    assert {name: (out / name).read_bytes() for name in assembly.files} == expected
    assert not any((out / name).is_symlink() for name in assembly.files)


def test_files_in_the_target_are_not_lost(old: Path, tmp_path: Path) -> None:
    """Neither foreign files, nor another checkpoint's weights, nor the source's weights."""
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(errors.InputError, match="thesis.tex"):
        assemble(old, tmp_path, "internlm-tiny", progress=False)
    assert (tmp_path / "thesis.tex").read_text() == "mine"
    for place in (old, ROOT, ROOT.parent):
        with pytest.raises(errors.InputError, match="is in use"):
            assemble(old, place, "internlm-tiny", progress=False)
    other = tmp_path / "other"
    other.mkdir()
    save_file({"a": torch.ones(1)}, other / "model-00001-of-00002.safetensors")
    for weights in (old, TINY):  # converted, linked
        with pytest.raises((errors.InputError, ConversionError), match="holds .*model-00001-of-00002.safetensors"):
            assemble(weights, other, "internlm-tiny", progress=False)
    assert (other / "model-00001-of-00002.safetensors").exists()


def test_a_file_of_the_same_size_is_replaced(tmp_path: Path) -> None:
    """By a link, unless it is a copy made by an earlier run, with the same time."""
    out, source = tmp_path / "out", TINY / "model.safetensors"
    out.mkdir()
    (out / source.name).write_bytes(bytes(source.stat().st_size))
    assembly = assemble(TINY, out, "internlm-tiny", progress=False)
    assert os.path.samefile(source, assembly.out / source.name)


def test_the_index_of_other_shards_is_refused(old: Path, tmp_path: Path) -> None:
    """transformers would read it instead of model.safetensors."""
    out = tmp_path / "out"
    out.mkdir()
    write(out, "model.safetensors.index.json", {"weight_map": {}})
    with pytest.raises(errors.InputError, match=r"holds other weights too \(model.safetensors.index.json\)"):
        assemble(old, out, "internlm-tiny", progress=False)


def test_names_of_shards(tmp_path: Path) -> None:
    """Others than transformers' are refused; stored inv_freq is no reason to refuse a file."""
    weights = tmp_path / "weights"
    shutil.copytree(TINY, weights)
    state = load_file(weights / "model.safetensors")
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    (weights / "model.safetensors").unlink()
    save_file(state, weights / "model.safetensors")
    assemble(weights, tmp_path / "out", "internlm-tiny", progress=False)
    (weights / "model.safetensors").rename(weights / "all.safetensors")
    write(weights, "model.safetensors.index.json", {"weight_map": dict.fromkeys(state, "all.safetensors")})
    with pytest.raises(errors.InputError, match="all.safetensors is not an allowed name for weights"):
        assemble(weights, tmp_path / "other", "internlm-tiny", progress=False)


# Variants


def config_of(folder: Path, variant: str, **changes: object) -> tuple:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**variant_config(variant), **changes}))
    return load_config(folder)


@pytest.mark.parametrize(
    ("name", "variant", "changes", "found"),
    [
        ("internlm-20b", "internlm-20b", {}, "internlm-20b"),
        ("InternLM-Chat-20B-mine", "internlm-20b", {}, "internlm-chat-20b"),
        ("models--internlm--internlm-chat-7b/snapshots/0a1b", "internlm-7b", {}, "internlm-chat-7b"),
        ("internlm-chat-7b-v1_1", "internlm-7b", {}, "internlm-chat-7b-v1_1"),
        ("anything", "internlm-7b", {"max_position_embeddings": 8192}, "internlm-chat-7b-8k"),
        ("internlm-7b-longer", "internlm-7b", {"max_position_embeddings": 32768}, "internlm-7b"),
        ("internlm-7b-more-tokens", "internlm-7b", {"vocab_size": 103424}, "internlm-7b"),
    ],
)
def test_the_variant_is_detected(name: str, variant: str, changes: dict, found: str, tmp_path: Path) -> None:
    config, _ = config_of(tmp_path / name, variant, **changes)
    assert detect(tmp_path / name, config, None)[0] == found


def test_an_ambiguous_variant_must_be_given(tmp_path: Path) -> None:
    config, _ = config_of(tmp_path / "weights", "internlm-20b")
    with pytest.raises(errors.InputError, match="can be internlm-20b or internlm-chat-20b.*--variant"):
        detect(tmp_path / "weights", config, None)
    assert detect(tmp_path / "weights", config, "internlm-chat-20b")[0] == "internlm-chat-20b"
    with pytest.raises(errors.InputError, match="is not internlm-7b"):
        detect(tmp_path / "weights", config, "internlm-7b")
    with pytest.raises(errors.InputError, match="--variant internlm-30b is unknown: choose one of internlm-20b"):
        detect(tmp_path / "weights", config, "internlm-30b")
    config, _ = config_of(tmp_path / "weights", "internlm-20b", num_hidden_layers=61)
    with pytest.raises(errors.InputError, match="matches the sizes of no variant"):
        detect(tmp_path / "weights", config, None)


def test_the_published_20b_config_becomes_ours() -> None:
    """In 2023's dialect it means the same, except for the padding."""
    config, raw = load_config(GOLDEN / "hub_20b")
    notes: list[str] = []
    assert config_json("internlm-20b", config, raw, "float32", notes) == variant_config("internlm-20b")
    assert notes == ["config.json: pad_token_id 2 becomes 0 (<unk>): a stop token must not pad"]


def test_a_fine_tuned_models_settings_are_kept_and_reported(tmp_path: Path) -> None:
    changes = {"max_position_embeddings": 16384, "rotary": {"type": "origin", "base": 40889.9}, "vocab_size": 103424}
    config, raw = config_of(tmp_path / "internlm-20b", "internlm-20b", **changes)
    notes: list[str] = []
    made = config_json("internlm-20b", config, raw, "float32", notes)
    assert (made["max_position_embeddings"], made["vocab_size"]) == (16384, 103424)
    assert made["rotary"] == {"type": "origin", "base": 40889.9, "scaling_factor": 1.0}
    assert len(notes) == 3
    assert "config.json: max_position_embeddings 16384 is the checkpoint's own (internlm-20b has 4096)" in notes


@pytest.mark.parametrize("variant", [name for name in variants() if name != "internlm-tiny"])
def test_chat_variants_stop_at_eoa_and_base_variants_do_not(variant: str) -> None:
    """<eoa> is looked up in the tokenizer; the published settings name only </s>."""
    notes: list[str] = []
    made = generation_json(variant, GOLDEN / "hub_20b", GOLDEN / "tokenizer.model", notes)
    assert made == {"bos_token_id": 1, "eos_token_id": [2, 103028] if "chat" in variant else 2, "pad_token_id": 0}
    assert bool(notes) == ("chat" in variant)


def test_a_chat_model_without_its_stop_token_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.hub.variant._pieces", lambda vocab_file: ["<unk>", "<s>", "</s>"])
    with pytest.raises(errors.InputError, match="tokenizer.model has no <eoa>, which ends a chat model's replies"):
        generation_json("internlm-chat-7b", tmp_path, tmp_path / "tokenizer.model", [])


def test_the_checkpoints_sampling_settings_are_kept(tmp_path: Path) -> None:
    """And nothing else: people keep paths and tokens there."""
    own = {"temperature": 0.5, "do_sample": True, "eos_token_id": [2, 103027], "transformers_version": "4.33.1"}
    own |= {"api_key": "hf_secret", "data_path": "/home/me", "pad_token_id": 2}
    notes: list[str] = []
    (tmp_path / "generation_config.json").write_text(json.dumps(own))
    made = generation_json("internlm-chat-7b", tmp_path, GOLDEN / "tokenizer.model", notes)
    assert notes[0] == "generation_config.json: api_key, data_path left out, which transformers does not know"
    assert made == {
        **{"bos_token_id": 1, "eos_token_id": [2, 103027, 103028], "pad_token_id": 0},
        **{"temperature": 0.5, "do_sample": True},
    }


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("added_tokens.json", {"<|b|>": 2049, "<|a|>": 2048, "<unk>": 0}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"2048": {"content": "<|a|>", "special": True}}}),
        ("tokenizer.json", {"added_tokens": [{"id": 2048, "content": "<|a|>", "special": True}]}),
    ],
)
def test_tokens_added_to_a_tokenizer_are_kept(file: str, content: dict, tiny_dir: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    own, made = tmp_path / "own", tmp_path / "made"
    own.mkdir()
    (own / file).write_text(json.dumps(content))
    notes: list[str] = []
    settings = tokenizer_json(own, 2048, 2112, notes)
    assert len(notes) == 1 and "added tokens are the checkpoint's own (<|" in notes[0]
    shutil.copytree(tiny_dir, made, ignore=shutil.ignore_patterns("*.safetensors", "tokenizer_config.json"))
    (made / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = AutoTokenizer.from_pretrained(made, trust_remote_code=True)
    assert tokenizer("<|a|>", add_special_tokens=False).input_ids == [2048]
    assert tokenizer.decode([2048]) == "<|a|>"


def test_added_tokens_with_a_gap_or_beyond_the_vocabulary_are_refused(tmp_path: Path) -> None:
    for number, vocab_size in ((2050, 2112), (2048, 2048)):
        (tmp_path / "added_tokens.json").write_text(json.dumps({"<|a|>": number}))
        with pytest.raises(errors.InputError, match="must follow the 2048 pieces"):
            tokenizer_json(tmp_path, 2048, vocab_size, [])


@pytest.mark.parametrize("variant", variants())
def test_the_card_describes_the_variant(variant: str) -> None:
    """Name, base model, snippets and sections; no link to a file that is not uploaded."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    card = fill_in_card(text, variant, variant_config(variant), f"me/{variant}")
    _, front, body = card.split("---\n", 2)
    metadata = yaml.safe_load(front)
    assert metadata["license"] == "apache-2.0"
    family = "internlm/internlm-20b" if variant.endswith("20b") else "internlm/internlm-7b"
    assert metadata.get("base_model") == (family if "chat" in variant else None)
    assert body.strip().lower().startswith(f"# {variant}")
    assert body.count(f'repo = "me/{variant}"') >= 2  # in English and in Chinese
    assert '"internlm/internlm-20b"' not in body
    assert ("## Evaluation" in body) == ("## 评测" in body) == (variant == "internlm-20b")
    assert ("## Long context" in body) == ("## 长上下文" in body) == variant.endswith("20b")
    assert ('"internlm/internlm-chat-20b"' in body) == (variant in ("internlm-20b", "internlm-7b"))
    assert "## License" in body and "## 开源许可证" in body and "make test" not in body
    assert "](docs/" not in body and "](#" in body and "](https://" in body


# The check of a folder


def reachable_modules(folder: Path) -> set[str]:
    """The modules that are reached by relative imports from the classes in the auto_maps."""
    found: set[str] = set()
    maps = [json.loads((folder / name).read_text())["auto_map"] for name in ("config.json", "tokenizer_config.json")]
    entries = [entry for auto_map in maps for entry in auto_map.values()]
    references = [name for entry in entries for name in (entry if isinstance(entry, list) else [entry]) if name]
    open_modules = {reference.split(".")[0] for reference in references}
    while open_modules:
        module = open_modules.pop()
        found.add(f"{module}.py")
        nodes = ast.walk(ast.parse((folder / f"{module}.py").read_text(encoding="utf-8")))
        for node in (node for node in nodes if isinstance(node, ast.ImportFrom) and node.level):
            imported = [node.module] if node.module else [alias.name for alias in node.names]
            open_modules |= {name for name in imported if f"{name}.py" not in found}
    return found


def test_files_have_the_usual_permissions(old: Path, tmp_path: Path) -> None:
    """Those that the user's umask gives to every new file."""
    umask = os.umask(0)
    try:
        out = assemble(old, tmp_path / "new", "internlm-tiny", progress=False).out
    finally:
        os.umask(umask)
    for made in ("config.json", "model.safetensors"):
        assert stat.S_IMODE((out / made).stat().st_mode) == 0o666, made


def test_json_is_written_as_text_files_are(tiny_dir: Path) -> None:
    """Indented, with Chinese as it is, and a newline at the end, so that differences are legible."""
    files = {path.name: path.read_text(encoding="utf-8") for path in tiny_dir.glob("*.json")}
    assert len(files) == 4
    for name, text in files.items():
        assert text == json.dumps(json.loads(text), indent=2, ensure_ascii=False) + "\n", name


def test_a_folder_holds_exactly_the_modules_that_its_classes_import(tiny_dir: Path) -> None:
    """No module is missing, and none is uploaded that nothing loads."""
    modules = {path.name for path in tiny_dir.glob("*.py")}
    assert modules == reachable_modules(tiny_dir) == set(MODULES)


def replace(path: Path, old_text: str, new_text: str) -> None:
    """Change a file of an assembled folder. It may be a link, so never in place."""
    content = path.read_text(encoding="utf-8")
    assert old_text in content
    path.unlink()
    path.write_text(content.replace(old_text, new_text, 1), encoding="utf-8")


UNSOUND = {
    "a pickle": (
        lambda f: (f / "pytorch_model.bin").write_bytes(b""),
        "do not belong.*pytorch_model.bin",
    ),
    "a file missing": (lambda f: (f / "LICENSE").unlink(), "lacks LICENSE"),
    "a pointer": (lambda f: pointer(f / "tokenizer.model"), "Git LFS pointers instead of files: tokenizer.model"),
    "auto_map": (
        lambda f: replace(f / "config.json", "modeling_internlm.InternLMModel", "modeling_internlm.Nothing"),
        "auto_map's AutoModel names modeling_internlm.Nothing",
    ),
    "a foreign import": (
        lambda f: replace(f / "modeling_internlm.py", "import itertools", "import einops.layers"),
        r"modeling_internlm.py, line \d+: users may not have einops.layers",
    ),
    "an import in a try block that hides any error": (
        lambda f: replace(
            f / "modeling_internlm.py", "import itertools", "try:\n    import einops\nexcept ValueError:\n    pass"
        ),
        r"modeling_internlm.py, line \d+: users may not have einops",
    ),
    "a missing sibling": (
        lambda f: replace(f / "modeling_internlm.py", "import itertools", "from .absent_internlm import absent"),
        r"modeling_internlm.py, line \d+: imports .absent_internlm, but the folder lacks absent_internlm.py",
    ),
    "a sibling imported from the package": (
        lambda f: replace(f / "modeling_internlm.py", "import itertools", "from . import absent_internlm"),
        r"modeling_internlm.py, line \d+: imports .absent_internlm, but the folder lacks absent_internlm.py",
    ),
    "a sibling in the parent package": (
        lambda f: replace(f / "modeling_internlm.py", "import itertools", "from ..tools import package"),
        r"modeling_internlm.py, line \d+: imports ..tools, but the folder lacks",
    ),
    "card": (lambda f: replace(f / "README.md", "license: ", "licence: "), "must give at least a license"),
    "card's yaml": (lambda f: replace(f / "README.md", "license: ", "license: ["), "README.md: its front matter"),
    "another config": (
        lambda f: replace(f / "config.json", '"num_hidden_layers": 2', '"num_hidden_layers": 3'),
        "The weights lack model.layers.2",
    ),
}


@pytest.mark.parametrize("name", UNSOUND)
def test_an_unsound_folder_is_not_uploaded(name: str, old: Path, tmp_path: Path) -> None:
    spoil, message = UNSOUND[name]
    assembly = assemble(old, tmp_path / "out", "internlm-tiny", progress=False)
    check_files(assembly.out)
    spoil(assembly.out)
    with pytest.raises((errors.LocalCheckFailed, ConversionError), match=message):
        check_files(assembly.out)


def test_nan_in_the_weights_is_found(tmp_path: Path) -> None:
    save_file({"good": torch.ones(3), "bad": torch.tensor([1.0, float("nan")])}, tmp_path / "model.safetensors")
    with pytest.raises(ConversionError, match="bad holds NaN or infinite values"):
        check_values(tmp_path)


def broken(folder: Path, how: str) -> None:
    state = load_file(folder / "model.safetensors")
    if how == "a tensor missing":
        state.pop("model.norm.weight")
    elif how == "logits overflow":
        state["lm_head.weight"] = torch.full_like(state["lm_head.weight"].float(), 1e38)
        state["model.norm.weight"] = torch.full_like(state["model.norm.weight"].float(), 1e20)
        replace(folder / "config.json", '"dtype": "float16"', '"dtype": "float32"')
    elif how == "killed":
        replace(folder / "modeling_internlm.py", "import itertools", "import os; os.kill(os.getpid(), 9)")
    else:
        replace(folder / "config.json", "InternLMForSequenceClassification", "InternLMForNothing")
    (folder / "model.safetensors").unlink()
    save_file(state, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("a tensor missing", "the weights do not match the model: {'missing_keys': ..model.norm.weight"),
        ("logits overflow", "the logits are not finite"),
        ("killed", "was killed by signal 9 .out of memory"),
        ("a class missing", "InternLMForNothing"),
    ],
)
def test_a_folder_that_loads_wrongly_is_found(
    how: str, message: str, old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the fresh process, which leaves nothing in the user's cache of modules."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    assembly = assemble(old, tmp_path / "out", "internlm-tiny", progress=False)
    broken(assembly.out, how)
    with pytest.raises(errors.LocalCheckFailed, match=message):
        check_loading(str(assembly.out))
    assert not (tmp_path / "modules").exists()


def test_a_folder_that_does_not_load_is_reported_with_its_error(old: Path, tmp_path: Path) -> None:
    """The fresh process's message, in one line."""
    assembly = assemble(old, tmp_path / "out", "internlm-tiny", progress=False)
    replace(assembly.out / "modeling_internlm.py", "import itertools", "raise RuntimeError('broken on purpose')")
    with pytest.raises(errors.LocalCheckFailed, match="does not load: RuntimeError: broken on purpose"):
        check_loading(str(assembly.out))
