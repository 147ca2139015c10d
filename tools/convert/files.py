"""Checkpoint shards: planned from names and shapes alone, streamed to disk, and never left half-written.

A conversion is a list of `Tensor`s that are still unread, which `write_shards` writes as safetensors. The plan depends
on the list alone, so an interrupted conversion that is started again plans the same files, keeps those whose bytes are
already right, and goes on. A file gets its final name when it is complete and on disk; memory holds one tensor at a
time, beside what the source maps.
"""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm


DEFAULT_SHARD_BYTES = 5_000_000_000
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

_DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_CHUNK_BYTES = 1 << 26


class ConversionError(ValueError):
    """Why a conversion cannot go on, in one line that says what to do."""


class Tensor(NamedTuple):
    """One tensor of the result. `read` fetches its values; nothing is in memory before."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        count = self.dtype.itemsize
        for size in self.shape:
            count *= size
        return count


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ConversionError: It cannot be read, is not JSON, or is not an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConversionError(f"{path} cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise ConversionError(f"{path} is not JSON ({error}); fetch it again.") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path} must hold a JSON object, not {type(content).__name__}.")
    return content


def expected_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of the checkpoint that a config.json describes, Hub (= Llama) names."""
    try:
        vocab, hidden, middle = (config[key] for key in ("vocab_size", "hidden_size", "intermediate_size"))
        layers = config["num_hidden_layers"]
    except KeyError as error:
        raise ConversionError(f"config.json lacks {error.args[0]!r}; take the one of variants/.") from error
    if not all(type(size) is int and 0 < size <= 2**24 for size in (vocab, hidden, middle, layers)):
        raise ConversionError("config.json: the sizes must be positive integers; take the one of variants/.")
    has_bias = config.get("bias", config.get("attention_bias", True))
    shapes = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for projection in "qkvo":
            shapes[f"{prefix}self_attn.{projection}_proj.weight"] = (hidden, hidden)
            if has_bias:
                shapes[f"{prefix}self_attn.{projection}_proj.bias"] = (hidden,)
        shapes[f"{prefix}mlp.gate_proj.weight"] = (middle, hidden)
        shapes[f"{prefix}mlp.up_proj.weight"] = (middle, hidden)
        shapes[f"{prefix}mlp.down_proj.weight"] = (hidden, middle)
        shapes[f"{prefix}input_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def _some(names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def check_shapes(tensors: list[Tensor], config: dict[str, Any]) -> None:
    """Compare names and shapes with a config.json.

    Raises:
        ConversionError: A name is missing or unknown, or a shape differs; the message names it and the fix.
    """
    expected = expected_shapes(config)
    found = {tensor.name: tensor.shape for tensor in tensors}
    missing, unknown = expected.keys() - found.keys(), found.keys() - expected.keys()
    if config.get("tie_word_embeddings"):
        missing.discard("lm_head.weight")
    for names, held, fix in ((missing, "no attention biases", "false"), (unknown, "attention biases", "true")):
        if names and all(name.endswith("_proj.bias") for name in names):
            raise ConversionError(
                f'The weights hold {held} ({_some(names)}), but config.json says otherwise: set "bias": {fix} in it.'
            )
    if missing:
        raise ConversionError(f"The weights lack {_some(missing)}, which config.json asks for: a shard is missing.")
    if unknown:
        raise ConversionError(f"The weights hold {_some(unknown)}, which config.json does not know.")
    for name, shape in found.items():
        if shape != expected[name]:
            raise ConversionError(
                f"{name} has shape {shape}, but config.json asks for {expected[name]}: take the config.json that "
                "belongs to these weights."
            )


def check_finite(name: str, values: torch.Tensor) -> None:
    low, high = torch.aminmax(values)
    if not (low.isfinite() and high.isfinite()):
        raise ConversionError(f"{name} holds NaN or infinite values: the source is damaged; fetch it again.")


def plan_shards(tensors: list[Tensor], max_shard_bytes: int) -> dict[str, list[Tensor]]:
    """Divide the tensors, in their order, among files of at most `max_shard_bytes` (a larger tensor gets its own)."""
    if max_shard_bytes < 1:
        raise ConversionError(f"max_shard_bytes={max_shard_bytes!r} must be at least 1.")
    shards: list[list[Tensor]] = [[]]
    room = max_shard_bytes
    for tensor in tensors:
        if tensor.dtype not in _DTYPE_NAMES:
            raise ConversionError(f"{tensor.name} is {tensor.dtype}; a checkpoint holds float32, float16 or bfloat16.")
        if shards[-1] and tensor.nbytes > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(tensor)
        room -= tensor.nbytes
    # Wider types first, so that every tensor lies at a multiple of its own width.
    shards = [sorted(shard, key=lambda tensor: -tensor.dtype.itemsize) for shard in shards]
    if len(shards) == 1:
        return {SINGLE_NAME: shards[0]}
    return {f"model-{n:05}-of-{len(shards):05}.safetensors": shard for n, shard in enumerate(shards, 1)}


def _header(shard: list[Tensor]) -> bytes:
    """What a safetensors file starts with: the length of a JSON object, and the object."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for tensor in shard:
        entries[tensor.name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, start + tensor.nbytes],
        }
        start += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _content(shard: list[Tensor]) -> Iterator[memoryview]:
    """The bytes of a shard, piece by piece; every tensor is checked as it passes."""
    yield memoryview(_header(shard))
    for tensor in shard:
        values = tensor.read()
        if tuple(values.shape) != tensor.shape or values.dtype != tensor.dtype:
            raise ConversionError(f"{tensor.name} changed while it was being converted; leave the source alone.")
        check_finite(tensor.name, values)
        flat = memoryview(values.contiguous().reshape(-1).view(torch.uint8).numpy())
        for start in range(0, len(flat), _CHUNK_BYTES):
            yield flat[start : start + _CHUNK_BYTES]


def write_file(path: Path, content: Iterator[bytes | memoryview], bar: Any = None) -> None:
    """Write a file so that it is complete, and on disk, when its name appears. A file that is there must be equal.

    Raises:
        ConversionError: The file exists with other content (nothing is overwritten), or the disk is full.
    """
    exists = path.exists()
    partial = path.with_name(path.name + ".partial")
    try:
        with open(path if exists else partial, "rb" if exists else "wb") as file:
            for piece in content:
                if not exists:
                    file.write(piece)
                elif file.read(len(piece)) != piece:
                    raise _differs(path)
                if bar is not None:
                    bar.update(len(piece))
            if exists:
                if file.read(1):
                    raise _differs(path)
                return
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        _sync_folder(path.parent)
    except BaseException as error:  # a keyboard interrupt too must not leave a partial file behind
        with suppress(OSError):
            partial.unlink()
        if isinstance(error, OSError):
            raise ConversionError(
                f"{path.name} cannot be written to {path.parent} ({error.strerror}): make room or choose another "
                "target, then run the same command again; finished files are kept."
            ) from error
        raise


def _differs(path: Path) -> ConversionError:
    return ConversionError(
        f"{path} exists already and is not what this conversion would write: choose an empty target folder, or delete "
        "that file."
    )


def _sync_folder(folder: Path) -> None:
    """Put a rename on disk, where the system can (Windows cannot open folders)."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file as `write_file` does."""
    write_file(path, iter([(json.dumps(content, indent=2, sort_keys=True) + "\n").encode()]))


def _check_target(target: Path, shards: dict[str, list[Tensor]]) -> None:
    """Refuse a disk without room, and a folder with weights that would be mixed up with these."""
    strangers = {path.name for path in target.glob("model*.safetensors")} - shards.keys()
    if strangers:
        raise ConversionError(
            f"{target} holds {_some(strangers)} of another conversion: choose an empty target folder, or delete them."
        )
    needed = sum(t.nbytes for name, shard in shards.items() if not (target / name).exists() for t in shard)
    free = shutil.disk_usage(target).free
    if needed > free:
        raise ConversionError(
            f"The disk of {target} has {free / 1e9:.2f} GB free, and {needed / 1e9:.2f} GB are needed: make room or "
            "choose another target."
        ) from OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def write_shards(
    tensors: list[Tensor], target: Path, max_shard_bytes: int = DEFAULT_SHARD_BYTES, progress: bool = True
) -> list[Path]:
    """Write the tensors as safetensors files into a folder, with an index where there is more than one.

    Args:
        tensors: What to write, in the order in which it is cheapest to read.
        target: The folder; it is made if need be. Finished files of an earlier run are kept if their bytes are right.
        max_shard_bytes: Largest size of the tensors in one file.
        progress: Show a progress bar on stderr.

    Returns:
        The weight files; the index, which is written last, is not among them.

    Raises:
        ConversionError: Values that are not finite, a full disk, or a file in the way.
    """
    shards = plan_shards(tensors, max_shard_bytes)
    target.mkdir(parents=True, exist_ok=True)
    _check_target(target, shards)
    total = sum(len(_header(shard)) + sum(tensor.nbytes for tensor in shard) for shard in shards.values())
    with tqdm(total=total, unit="B", unit_scale=True, disable=not progress) as bar:
        for name, shard in shards.items():
            bar.set_description(name)
            write_file(target / name, _content(shard), bar)
    if len(shards) > 1:
        weight_map = {tensor.name: name for name, shard in shards.items() for tensor in shard}
        size = sum(tensor.nbytes for tensor in tensors)
        write_json(target / INDEX_NAME, {"metadata": {"total_size": size}, "weight_map": weight_map})
    return [target / name for name in shards]
