"""Assembles a complete model repository: this package's code and small files beside a user's InternLM v1 weights.

The result is built from an allow-list, never by copying a folder. variant.py decides the content of the JSON files.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tools.convert import checkpoint
from tools.convert.checkpoint import has_pickles, has_safetensors, pickles_to_safetensors, safetensors_files
from tools.convert.files import (
    DISK_FULL,
    PARTIAL,
    ConversionError,
    check_links,
    check_not_lfs_pointer,
    copy_file,
    json_bytes,
    link_or_copy,
    new_file,
    read_json,
)
from tools.convert.shards import INDEX_NAME
from tools.convert.tensors import check_shapes, dtype_name, parameters
from tools.hub.card import fill_in_card
from tools.hub.errors import DiskFull, InputError
from tools.hub.variant import (
    check_tokenizer,
    config_json,
    detect,
    generation_json,
    load_config,
    template_of,
    tokenizer_json,
    variant_file,
)
from tools.package import MODULES, ROOT


SMALL_FILES = (*MODULES, *checkpoint.SMALL_FILES, "README.md", "LICENSE")
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|" + re.escape(INDEX_NAME))


@dataclass
class Assembly:
    """The result of `assemble`."""

    out: Path  # the folder
    variant: str  # a name in variants/, internlm-tiny, or custom
    files: list[str]  # the names in `out`: exactly these are the repository
    notes: list[str] = field(default_factory=list)  # decisions that the user should know, one line each


def allowed(name: str) -> bool:
    """Whether a file of this name may be in a repository."""
    return name in SMALL_FILES or WEIGHTS.fullmatch(name) is not None


def assemble(
    weights: Path,
    out: Path,
    variant: str | None = None,
    tokenizer: Path | None = None,
    card: Path | None = None,
    repo_id: str | None = None,
    progress: bool = True,
    prompt_format: str | None = None,
) -> Assembly:
    """Make `out` the complete model repository of the checkpoint in `weights`, which is only read.

    Safetensors become hard links where the file system allows, so they take no space; pickled shards are converted.
    Existing files are kept, so an interrupted run resumes.

    Args:
        weights: Folder with config.json, the weights (safetensors or pytorch_model*.bin) and tokenizer.model.
        out: Folder to create; on a second run the same one.
        variant: A name in variants/, internlm-tiny, or custom; None detects it from config.json, and from the folder's
            name where two variants have equal sizes.
        tokenizer: tokenizer.model, if it is not in `weights`.
        card: A README.md to use instead of this package's.
        repo_id: The repository's future name, for the card; None means internlm/<variant>.
        progress: Whether to show progress bars.
        prompt_format: The chat template and stop tokens of a custom variant: early, later or none.

    Returns:
        The folder, the variant, the repository's files and the decisions made.

    Raises:
        InputError: An argument or file is missing or wrong; the message says what to do.
        ConversionError: The weights are incomplete, damaged or do not match config.json.
        DiskFull: The disk is full; the same call resumes.
    """
    weights, out = Path(weights), Path(out)
    try:
        check_links(weights)
        template = template_of(variant, prompt_format)
        config, raw = load_config(weights)
        variant, how = detect(weights, config, variant)
        template = template or variant
        notes = [f"variant {variant}, {how}"]
        vocab_file = tokenizer or weights / "tokenizer.model"
        pieces = check_tokenizer(vocab_file, config.vocab_size, notes)
        made = {
            "generation_config.json": generation_json(template, weights, vocab_file, notes),
            "tokenizer_config.json": tokenizer_json(weights, pieces, config.vocab_size, notes),
        }
        check_out(out, weights)
        out.mkdir(parents=True, exist_ok=True)
        names, stored = _write_weights(weights, out, config.to_dict(), progress)
        made["config.json"] = config_json(variant, config, raw, stored, notes)
        _write_small_files(out, template, vocab_file, made)
        text = _card_text(card or ROOT / "README.md")
        _write(
            out / "README.md", text if card else fill_in_card(text, variant, made["config.json"], repo_id, template)
        )
    except (OSError, ConversionError) as error:
        reason = error if isinstance(error, OSError) else error.__cause__
        if isinstance(reason, OSError) and reason.errno in DISK_FULL:
            message = f"The disk of {out} is full" if error is reason else str(error).rstrip(".")
            raise DiskFull(f"{message}. Once there is room, run the same command again to resume.") from error
        if isinstance(error, OSError):
            raise InputError(f"{error.filename or out}: {error.strerror or error}.") from error
        raise
    return Assembly(out, variant, [*SMALL_FILES, *names], notes)


def check_out(out: Path, weights: Path) -> None:
    """Refuse a folder in which something could be lost."""
    if out.resolve() in (weights.resolve(), ROOT, *ROOT.parents):
        raise InputError(f"{out} is in use: give --local-dir another folder.")
    names = [path.name for path in out.iterdir()] if out.is_dir() else []
    if foreign := sorted(name for name in names if not allowed(name.removesuffix(PARTIAL))):
        raise InputError(
            f"{out} holds files that do not belong in a repository ({', '.join(foreign[:5])}): give --local-dir an "
            "empty folder."
        )


def _write_weights(weights: Path, out: Path, config: dict[str, Any], progress: bool) -> tuple[list[str], str]:
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
    return names, dtype_name(first.dtype)


def _refuse_others(out: Path, names: list[str]) -> None:
    """Refuse a folder that holds the weights of another checkpoint, or the same in other shards."""
    if others := sorted(p.name for p in out.iterdir() if WEIGHTS.fullmatch(p.name) and p.name not in names):
        raise InputError(f"{out} holds other weights too ({', '.join(others)}): give --local-dir an empty folder.")


def _link_weights(weights: Path, out: Path, config: dict[str, Any], progress: bool) -> list[str]:
    """Check the names and shapes of safetensors files against config.json, and link the files into `out`."""
    for path in sorted(weights.glob("*.safetensors")):
        check_not_lfs_pointer(path)
    files = safetensors_files(weights)
    if odd := [path.name for path in files if not WEIGHTS.fullmatch(path.name)]:
        raise InputError(
            f"{weights}: {', '.join(odd)} is not an allowed name for weights, model-00001-of-00002.safetensors is."
        )
    check_shapes(parameters(tensor for tensors in files.values() for tensor in tensors), config)
    _refuse_others(out, [path.name for path in files] + [INDEX_NAME])
    with tqdm(desc="weights", unit="B", unit_scale=True, disable=not progress) as bar:
        bar.reset(sum(path.stat().st_size for path in files))
        for path in files:
            if _is_there(path, out / path.name):
                bar.update(path.stat().st_size)
            else:
                (out / path.name).unlink(missing_ok=True)
                link_or_copy(path, out / path.name, bar)
    if len(files) > 1:
        _write(out / INDEX_NAME, (weights / INDEX_NAME).read_text(encoding="utf-8"))
    return [path.name for path in files]


def _is_there(source: Path, target: Path) -> bool:
    """Whether a target is a hard link to, or a copy of, its source."""
    if target.is_symlink() or not target.exists():
        return False
    old, new = source.stat(), target.stat()
    return target.samefile(source) or (new.st_size, new.st_mtime_ns) == (old.st_size, old.st_mtime_ns)


def _write_small_files(out: Path, variant: str, vocab_file: Path, generated: dict[str, dict[str, Any]]) -> None:
    settings = variant_file(variant, "variant.json")
    template = read_json(settings)["chat_template"] if settings.is_file() else "chat_template.jinja"
    copies = {name: ROOT / name for name in (*MODULES, "special_tokens_map.json", "LICENSE")}
    for name, source in {**copies, "chat_template.jinja": ROOT / template}.items():
        _write(out / name, source.read_text(encoding="utf-8"))
    for name, content in generated.items():
        _write(out / name, json_bytes(content).decode())
    copy_file(vocab_file, out / "tokenizer.model")


def _card_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error}): save it as such.") from error


def _write(path: Path, content: str) -> None:
    with new_file(path) as file:
        file.write(content.encode())
