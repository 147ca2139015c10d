"""Lays out a complete model repository: this package's code and small files beside somebody's InternLM v1 weights.

The result is made by an allow-list, never by copying a folder. tools/hub_variant.py says which file says what.
"""

import errno
import json
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tools.convert.checkpoint import has_pickles, has_safetensors, safetensors_files
from tools.convert.files import INDEX_NAME, check_shapes, read_json
from tools.convert_checkpoint import ConversionError, pickles_to_safetensors
from tools.hub.card import fill_in_card
from tools.hub.errors import DiskFull, InputError
from tools.hub.variant import (
    ROOT,
    check_tokenizer,
    config_json,
    detect,
    generation_json,
    is_lfs_pointer,
    load_config,
    tokenizer_json,
    variant_file,
)
from tools.package import MODULES


SMALL_FILES = (
    *MODULES,
    *("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("chat_template.jinja", "tokenizer.model", "README.md", "LICENSE"),
)
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|" + re.escape(INDEX_NAME))

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_BLOCK = 1 << 26


@dataclass
class Assembly:
    """What `assemble` made."""

    out: Path  # the folder
    variant: str  # a name of variants/, or internlm-tiny
    files: list[str]  # the names in `out`: exactly these are the repository
    notes: list[str] = field(default_factory=list)  # decisions that the user should know, a line each


def allowed(name: str) -> bool:
    """Whether a file of this name belongs into a repository."""
    return name in SMALL_FILES or WEIGHTS.fullmatch(name) is not None


def assemble(
    weights: Path,
    out: Path,
    variant: str | None = None,
    tokenizer: Path | None = None,
    card: Path | None = None,
    repo_id: str | None = None,
    progress: bool = True,
) -> Assembly:
    """Make `out` the complete model repository of the checkpoint in `weights`, which is only read.

    Safetensors become hard links where the file system allows, so they take no space; pickled shards are converted.
    What is there already stays, so an interrupted run continues.

    Args:
        weights: Folder with config.json, the weights (safetensors or pytorch_model*.bin) and tokenizer.model.
        out: Folder to make; on a second run the same one.
        variant: A name of variants/, or internlm-tiny; None finds it in config.json, and in the folder's name where
            two variants have equal sizes.
        tokenizer: tokenizer.model, if it does not lie in `weights`.
        card: A README.md to take instead of this package's.
        repo_id: The repository's future name, for the card; None stands for internlm/<variant>.
        progress: Whether to show progress bars.

    Returns:
        The folder, the variant, the repository's files and what was decided on the way.

    Raises:
        InputError: Something that was given is missing or wrong; the message says what to do.
        ConversionError: The weights are incomplete, damaged or not those of config.json.
        DiskFull: The disk is full; the same call continues.
    """
    weights, out = Path(weights), Path(out)
    try:
        config, raw = load_config(weights)
        variant, how = detect(weights, config, variant)
        notes = [f"variant {variant}, {how}"]
        vocab_file = tokenizer or weights / "tokenizer.model"
        pieces = check_tokenizer(vocab_file, config.vocab_size, notes)
        made = {
            "generation_config.json": generation_json(variant, weights, vocab_file, notes),
            "tokenizer_config.json": tokenizer_json(weights, pieces, config.vocab_size, notes),
        }
        _check_out(out, weights)
        out.mkdir(parents=True, exist_ok=True)
        names, stored = _lay_weights(weights, out, config.to_dict(), progress)
        made["config.json"] = config_json(variant, config, raw, stored, notes)
        _lay_small_files(out, variant, vocab_file, made)
        text = (card or ROOT / "README.md").read_text(encoding="utf-8")
        _write(out / "README.md", text if card else fill_in_card(text, variant, made["config.json"], repo_id))
    except (OSError, ConversionError) as error:
        reason = error if isinstance(error, OSError) else error.__cause__
        if isinstance(reason, OSError) and reason.errno in _DISK_FULL:
            said = f"The disk of {out} is full" if error is reason else str(error).rstrip(".")
            raise DiskFull(f"{said}. Once there is room, the same command continues.") from error
        if isinstance(error, OSError):
            raise InputError(f"{error.filename or out}: {error.strerror or error}.") from error
        raise
    return Assembly(out, variant, [*SMALL_FILES, *names], notes)


def _check_out(out: Path, weights: Path) -> None:
    """Refuse a folder in which something could be lost."""
    if out.resolve() in (weights.resolve(), ROOT, *ROOT.parents):
        raise InputError(f"{out} is in use: give --local-dir a folder of its own.")
    there = [path.name for path in out.iterdir()] if out.is_dir() else []
    if foreign := sorted(name for name in there if not allowed(name.removesuffix(".partial"))):
        raise InputError(
            f"{out} holds what does not belong into a repository ({', '.join(foreign[:5])}): give --local-dir an "
            "empty folder."
        )


def _lay_weights(weights: Path, out: Path, config: dict[str, Any], progress: bool) -> tuple[list[str], str]:
    """Link or convert the weights; returns their names in `out`, index included, and their dtype."""
    if has_safetensors(weights):
        names = _link_weights(weights, out, config, progress)
    elif has_pickles(weights):
        names = [path.name for path in pickles_to_safetensors(weights, out, progress=progress)]
    else:
        raise InputError(f"{weights} holds no weights: there is no *.safetensors and no pytorch_model*.bin.")
    if len(names) > 1:
        names.append(INDEX_NAME)
    _refuse_others(out, names)
    first = next(iter(safetensors_files(out).values()))[0]
    return names, str(first.dtype).removeprefix("torch.")


def _refuse_others(out: Path, names: list[str]) -> None:
    """Refuse a folder that holds weights of another checkpoint or another division into shards."""
    if others := sorted(p.name for p in out.iterdir() if WEIGHTS.fullmatch(p.name) and p.name not in names):
        raise InputError(f"{out} holds other weights too ({', '.join(others)}): give --local-dir an empty folder.")


def _link_weights(weights: Path, out: Path, config: dict[str, Any], progress: bool) -> list[str]:
    """Check the names and shapes of safetensors files against config.json, and lay them into `out`."""
    for path in sorted(weights.glob("*.safetensors")):
        if is_lfs_pointer(path):
            raise InputError(f"{path} is a Git LFS pointer, not the weights: run `git lfs pull` in its folder.")
    files = safetensors_files(weights)
    if odd := [path.name for path in files if not WEIGHTS.fullmatch(path.name)]:
        raise InputError(f"{weights}: {', '.join(odd)} is no name for weights, model-00001-of-00002.safetensors is.")
    # Frequencies that some 7B checkpoints store are no parameters; the model passes over them.
    tensors = [tensor for content in files.values() for tensor in content if not tensor.name.endswith("inv_freq")]
    check_shapes(tensors, config)
    _refuse_others(out, [path.name for path in files] + [INDEX_NAME])
    with tqdm(desc="weights", unit="B", unit_scale=True, disable=not progress) as total:
        total.reset(sum(path.stat().st_size for path in files))
        for path in files:
            _place(path, out / path.name, total)
    if len(files) > 1:
        _write(out / INDEX_NAME, (weights / INDEX_NAME).read_text(encoding="utf-8"))
    return [path.name for path in files]


def _lay_small_files(out: Path, variant: str, vocab_file: Path, generated: dict[str, dict[str, Any]]) -> None:
    settings = variant_file(variant, "variant.json")
    template = read_json(settings)["chat_template"] if settings.is_file() else "chat_template.jinja"
    copies = {name: ROOT / name for name in (*MODULES, "special_tokens_map.json", "LICENSE")}
    for name, source in {**copies, "chat_template.jinja": ROOT / template}.items():
        _write(out / name, source.read_text(encoding="utf-8"))
    for name, content in generated.items():
        _write(out / name, json.dumps(content, indent=2, ensure_ascii=False, sort_keys=True) + "\n")
    with tqdm(disable=True) as hidden:
        _copy(vocab_file, out / "tokenizer.model", hidden)


def _write(path: Path, content: str) -> None:
    """Write a small file whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(content, encoding="utf-8", newline="\n")
    os.replace(partial, path)


def _place(source: Path, target: Path, total: tqdm) -> None:
    """Lay a weight file at `target`: a hard link, else a copy. A file that is there already stays."""
    source = source.resolve()  # huggingface_hub's cache holds symbolic links
    wanted = source.stat()
    if target.exists():
        there = target.stat()
        if os.path.samestat(there, wanted) or (there.st_size, there.st_mtime_ns) == (
            wanted.st_size,
            wanted.st_mtime_ns,
        ):
            total.update(wanted.st_size)
            return
        target.unlink()
    try:
        os.link(source, target)
        total.update(wanted.st_size)
    except OSError:  # another file system, or one without links
        _copy(source, target, total)


def _copy(source: Path, target: Path, total: tqdm) -> None:
    """Copy a file with its time, whole or not at all; blocks are shared where the file system can."""
    partial, size, done = target.with_name(target.name + ".partial"), source.stat().st_size, 0
    if shutil.disk_usage(target.parent).free < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
    bar = tqdm(total=size, desc=target.name, unit="B", unit_scale=True, leave=False, disable=total.disable)
    try:
        with bar, source.open("rb") as read, partial.open("wb") as write:
            while count := _copy_block(read, write, done):
                done += count
                bar.update(count)
                total.update(count)
        shutil.copystat(source, partial)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def _copy_block(read: Any, write: Any, at: int) -> int:
    """Copy up to `_BLOCK` bytes from offset `at`; returns how many, 0 at the end."""
    try:  # Btrfs, XFS and others share the blocks instead of writing them again
        return os.copy_file_range(read.fileno(), write.fileno(), _BLOCK, at, at)
    except (AttributeError, OSError) as error:  # not on this system, or not between these two file systems
        if getattr(error, "errno", None) in _DISK_FULL:
            raise
    read.seek(at)
    write.seek(at)
    count = write.write(read.read(_BLOCK))
    write.flush()
    return count
