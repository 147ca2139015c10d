"""Reads PyTorch files without ever running code that is in them."""

import io
import os
import pickle
import pickletools
import re
import zipfile
from pathlib import Path
from typing import IO

import torch

from tools.convert.files import ConversionError, check_not_lfs_pointer


# What PyTorch's restricted unpickler says of a pickle that names a function or class beyond tensors and containers.
_FOREIGN_CODE = re.compile(r"Unsupported (global|class)|GLOBAL|Can only|Trying to")

_LEGACY_PICKLES = 5  # in a file from before PyTorch 1.6: magic number, version, the machine's sizes, content, storages


def load_pickle(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a PyTorch file, memory-mapped, by an unpickler that runs no code from the file.

    Raises:
        ConversionError: The file is missing, damaged, a Git LFS pointer, tries to run code, or holds something else.
    """
    content = load_untrusted(path)
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ConversionError(f"{path} does not hold a plain dictionary of tensors; it is not a model's weights.")
    for name, value in content.items():
        if value.is_sparse or value.is_meta or value.numel() * value.itemsize > value.untyped_storage().nbytes():
            raise ConversionError(f"{path}: {name} is larger than what is stored of it; do not use this checkpoint.")
    return {str(name): value.detach() for name, value in content.items()}


def load_untrusted(path: Path) -> object:
    """The content of a PyTorch file, if it is data only. Raises `ConversionError` as `load_pickle` does."""
    if not path.is_file():
        raise missing(path)
    check_not_lfs_pointer(path)
    with path.open("rb") as file:
        zipped = file.read(2) == b"PK"
    try:
        _check_size(path, zipped)
        # Only the zip format, PyTorch's since 1.6, can be mapped; an older file is read into memory.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except ConversionError:
        raise
    except pickle.UnpicklingError as error:
        if _FOREIGN_CODE.search(str(error)) is None:
            raise damaged(path, error) from error
        raise ConversionError(
            f"{path} requires code to be run when it is loaded, and was not loaded: weights do not need that. "
            "Get them from a source that you trust."
        ) from error
    except Exception as error:  # damaged bytes can raise anything
        raise damaged(path, error) from error


def _check_size(path: Path, zipped: bool) -> None:
    """Refuse a file that expands when it is loaded: compressed, which PyTorch's are not, or with bytes made by number.

    Raises:
        ConversionError: It would expand.
        Exception: It is no PyTorch file.
    """
    grows = ConversionError(f"{path} expands when it is loaded, as no weights do; do not use this checkpoint.")
    if not zipped:
        with path.open("rb") as file:
            return _check_pickles(file, _LEGACY_PICKLES, grows)
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise grows
        for entry in entries:
            if entry.filename.endswith(".pkl"):
                _check_pickles(io.BytesIO(archive.read(entry)), 1, grows)


def _check_pickles(file: IO[bytes], count: int, error: ConversionError) -> None:
    for _ in range(count):
        if not file.read(1):
            return
        file.seek(-1, os.SEEK_CUR)
        if any(isinstance(value, str) and "bytearray" in value for _, value, _ in pickletools.genops(file)):
            raise error


def missing(path: Path) -> ConversionError:
    return ConversionError(f"{path} is missing; fetch it again, and the whole folder with it.")


def damaged(path: Path, error: Exception) -> ConversionError:
    """The error for a weight file that cannot be parsed, with the first sentence of the parser's reason."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0][:100]
    reason = reason.replace("Weights only load failed", "no readable pickle")
    return ConversionError(
        f"{path} ({path.stat().st_size:,} bytes) is truncated or not a weight file ({reason}); fetch it again."
    )
