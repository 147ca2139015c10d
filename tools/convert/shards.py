"""Writes safetensors shards: planned from names and shapes alone, streamed to disk, never left half-written.

A conversion is a list of unread `Tensor`s. The plan depends on that list alone, so a conversion that is started again
after an interruption plans the same files, keeps those whose bytes are right, and resumes. Memory holds one tensor at
a time, besides what the source maps.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from tools.convert.files import CHUNK_BYTES, ConversionError, write_file, write_json
from tools.convert.tensors import Tensor, abbreviated, read_checked, total_bytes


DEFAULT_SHARD_BYTES = 5_000_000_000
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # by their name in safetensors

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


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
    # Wider types first, so that every tensor starts at a multiple of its own width.
    shards = [sorted(shard, key=lambda tensor: -tensor.dtype.itemsize) for shard in shards]
    if len(shards) == 1:
        return {SINGLE_NAME: shards[0]}
    return {f"model-{n:05}-of-{len(shards):05}.safetensors": shard for n, shard in enumerate(shards, 1)}


def _header(shard: list[Tensor]) -> bytes:
    """The start of a safetensors file: the length of a JSON object, and the object."""
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
    """The bytes of a shard in chunks; each tensor's values are checked on the way."""
    yield memoryview(_header(shard))
    for tensor in shard:
        flat = memoryview(read_checked(tensor).contiguous().reshape(-1).view(torch.uint8).numpy())
        for start in range(0, len(flat), CHUNK_BYTES):
            yield flat[start : start + CHUNK_BYTES]


def _check_target(target: Path, shards: dict[str, list[Tensor]]) -> None:
    """Refuse a disk without room, and a folder with other weights that would be mixed up with these."""
    others = {path.name for path in target.glob("model*.safetensors")} - shards.keys()
    if others:
        raise ConversionError(
            f"{target} holds {abbreviated(others)} of another conversion: choose an empty target folder, or delete "
            "them."
        )
    check_room(target, sum(total_bytes(shard) for name, shard in shards.items() if not (target / name).exists()))


def check_room(target: Path, needed: int) -> None:
    """Refuse a disk without room.

    Args:
        target: A folder on it.
        needed: Bytes to write.

    Raises:
        ConversionError: Fewer are free.
    """
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
        tensors: What to write, in the order that is cheapest to read.
        target: The folder, created if necessary. Finished files of an earlier run are kept if their bytes are right.
        max_shard_bytes: Maximum size of the tensors in one file.
        progress: Whether to show a progress bar on stderr.

    Returns:
        The weight files; the index, which is written last, is not among them.

    Raises:
        ConversionError: Values that are not finite, a full disk, or another file of the same name.
    """
    shards = plan_shards(tensors, max_shard_bytes)
    target.mkdir(parents=True, exist_ok=True)
    _check_target(target, shards)
    total = sum(len(_header(shard)) + total_bytes(shard) for shard in shards.values())
    with tqdm(total=total, unit="B", unit_scale=True, disable=not progress) as bar:
        for name, shard in shards.items():
            bar.set_description(name)
            write_file(target / name, _content(shard), bar)
    if len(shards) > 1:
        weight_map = {tensor.name: name for name, shard in shards.items() for tensor in shard}
        write_json(target / INDEX_NAME, {"metadata": {"total_size": total_bytes(tensors)}, "weight_map": weight_map})
    return [target / name for name in shards]
