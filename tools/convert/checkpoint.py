"""Checkpoints in the Hub's layout, read without building a model: pickled or safetensors, sharded or not."""

import pickle
import re
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from tools.convert.files import (
    DEFAULT_SHARD_BYTES,
    INDEX_NAME,
    SINGLE_NAME,
    ConversionError,
    Tensor,
    check_shapes,
    read_json,
    write_shards,
)


PICKLE_INDEX_NAME = "pytorch_model.bin.index.json"
PICKLE_NAME = "pytorch_model.bin"

# Some 7B checkpoints hold the rotary frequencies, rounded to half precision; every reader computes them itself.
DROPPED = re.compile(r"rotary_emb\.inv_freq$")
_SAFETENSORS_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# What PyTorch's restricted reader says of a pickle that names a function or class beyond tensors and containers.
_FOREIGN_CODE = re.compile(r"Unsupported (global|class)|GLOBAL|Can only|Trying to")


def load_pickle(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a PyTorch file, mapped rather than read, by a reader that runs no code of the file.

    Raises:
        ConversionError: The file is missing, damaged, a Git LFS pointer, tries to run code, or holds something else.
    """
    content = load_untrusted(path)
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ConversionError(f"{path} does not hold a plain dictionary of tensors; it is not a model's weights.")
    return {str(name): value.detach() for name, value in content.items()}


def load_untrusted(path: Path) -> object:
    """Whatever a PyTorch file holds, if it is data only. Raises `ConversionError` as `load_pickle` does."""
    if not path.is_file():
        raise ConversionError(f"{path} is missing; fetch it again, and with it the whole folder.")
    with open(path, "rb") as file:
        start = file.read(40)
    if start.startswith(b"version https://git-lfs"):
        raise ConversionError(f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` in its folder.")
    try:
        # Only the zip format, PyTorch's since 1.6, can be mapped; an older file is read into memory.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=start.startswith(b"PK"))
    except pickle.UnpicklingError as error:
        if _FOREIGN_CODE.search(str(error)) is None:
            raise _damaged(path, error) from error
        raise ConversionError(
            f"{path} asks for code to be run when it is read, and was not read: weights have no need to. "
            "Get them from a source that you trust."
        ) from error
    except Exception as error:  # damaged bytes make the reader fail in every way there is
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> ConversionError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0][:100]
    reason = reason.replace("Weights only load failed", "no readable pickle")
    return ConversionError(
        f"{path} ({path.stat().st_size:,} bytes) is truncated or not a weight file ({reason}); fetch it again."
    )


def _listed_files(folder: Path, index_name: str, single_name: str) -> dict[str, set[str] | None]:
    """The weight files of a folder with the names that its index lists for them, None without an index."""
    if (folder / index_name).is_file():
        weight_map = read_json(folder / index_name).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ConversionError(f"{folder / index_name} has no weight_map; fetch it again.")
        listed: dict[str, set[str] | None] = {}
        for name, file in weight_map.items():
            if not isinstance(file, str) or Path(file).name != file or "\\" in file:
                raise ConversionError(
                    f"{folder / index_name} places {name} in {file!r}, outside its folder; do not use this checkpoint."
                )
            listed.setdefault(file, set()).add(name)
        return dict(sorted(listed.items()))
    if (folder / single_name).is_file():
        return {single_name: None}
    raise ConversionError(f"{folder} holds no weights: there is neither {index_name} nor {single_name}.")


def _check_index(path: Path, held: set[str], listed: set[str] | None) -> None:
    if listed is None or held == listed:
        return
    if lacking := sorted(listed - held):
        raise ConversionError(f"{path} lacks {lacking[0]}, which the index places there; fetch both again.")
    raise ConversionError(f"{path} holds {sorted(held - listed)[0]}, which the index does not name; fetch both again.")


def _unique(tensors: list[Tensor]) -> list[Tensor]:
    seen: set[str] = set()
    for tensor in tensors:
        if tensor.name in seen:
            raise ConversionError(f"{tensor.name} is in two shards; the checkpoint is inconsistent, fetch it again.")
        seen.add(tensor.name)
    return tensors


def pickled_tensors(folder: Path) -> list[Tensor]:
    """The tensors of a folder of pickled shards, in the order of the files; one file is mapped at a time.

    Raises:
        ConversionError: See `load_pickle`; also an index that does not fit its files.
    """
    open_file = lru_cache(maxsize=1)(load_pickle)
    tensors = []
    for file, listed in _listed_files(folder, PICKLE_INDEX_NAME, PICKLE_NAME).items():
        path = folder / file
        state = open_file(path)
        _check_index(path, set(state), listed)
        for name, value in state.items():
            if not DROPPED.search(name):
                read = partial(lambda path, name: open_file(path)[name], path, name)
                tensors.append(Tensor(name, tuple(value.shape), value.dtype, read))
    return _unique(tensors)


def safetensors_files(folder: Path) -> dict[Path, list[Tensor]]:
    """The tensors of a folder of safetensors files, by file. Raises `ConversionError` as `pickled_tensors` does."""
    files = {}
    for file, listed in _listed_files(folder, INDEX_NAME, SINGLE_NAME).items():
        path = folder / file
        if not path.is_file():
            raise ConversionError(f"{path} is missing; fetch it again, and with it the whole folder.")
        try:
            with safe_open(path, "pt") as shard:
                names = list(shard.keys())
                _check_index(path, set(names), listed)
                files[path] = [_safetensor(path, name, shard.get_slice(name)) for name in names]
        except (SafetensorError, OSError) as error:
            raise _damaged(path, error) from error
    _unique([tensor for tensors in files.values() for tensor in tensors])
    return files


def _safetensor(path: Path, name: str, view: Any) -> Tensor:
    def read() -> torch.Tensor:
        try:
            with safe_open(path, "pt") as shard:
                return shard.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise _damaged(path, error) from error

    dtype = _SAFETENSORS_DTYPES.get(view.get_dtype())
    if dtype is None:
        raise ConversionError(f"{name} in {path} is {view.get_dtype()}; a checkpoint holds F32, F16 or BF16.")
    return Tensor(name, tuple(view.get_shape()), dtype, read)


def has_pickles(folder: Path) -> bool:
    return (folder / PICKLE_INDEX_NAME).is_file() or (folder / PICKLE_NAME).is_file()


def has_safetensors(folder: Path) -> bool:
    return (folder / INDEX_NAME).is_file() or (folder / SINGLE_NAME).is_file()


def pickles_to_safetensors(
    source: Path, target: Path, max_shard_bytes: int = DEFAULT_SHARD_BYTES, progress: bool = True
) -> list[Path]:
    """Write a folder of pickled shards as safetensors; the same call after an interruption goes on.

    Stored rotary frequencies are dropped. Where the source has a config.json, names and shapes must fit it.

    Args:
        source: Folder with pytorch_model.bin, or with pytorch_model.bin.index.json and its shards. Never written to,
            unless it is the target too.
        target: Folder for model.safetensors, or model-0000N-of-0000M.safetensors and model.safetensors.index.json.
        max_shard_bytes: Largest size of the tensors in one file.
        progress: Show a progress bar on stderr.

    Returns:
        The weight files, without the index.

    Raises:
        ConversionError: The source is damaged, inconsistent or hostile, or the target cannot take it.
    """
    return write_shards(plan_pickles(Path(source)), Path(target), max_shard_bytes, progress)


def plan_pickles(source: Path) -> list[Tensor]:
    """`pickled_tensors`, compared with the folder's config.json if it has one."""
    tensors = pickled_tensors(source)
    if (source / "config.json").is_file():
        check_shapes(tensors, read_json(source / "config.json"))
    return tensors
