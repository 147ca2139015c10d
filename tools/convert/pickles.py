"""Reads PyTorch files without ever running code that is in them."""

import pickle
import re
import zipfile
from pathlib import Path

import torch

from tools.convert.files import ConversionError, check_not_lfs_pointer


# What PyTorch's restricted unpickler says of a pickle that names a function or class beyond tensors and containers.
_FOREIGN_CODE = re.compile(r"Unsupported (global|class)|GLOBAL|Can only|Trying to")


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
        if zipped:
            _check_not_compressed(path)
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


def _check_not_compressed(path: Path) -> None:
    """Refuse an archive that expands when it is read. PyTorch compresses nothing."""
    with zipfile.ZipFile(path) as archive:
        if packed := [entry for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]:
            size = sum(entry.file_size for entry in packed)
            raise ConversionError(
                f"{path} is compressed and expands to {size:,} bytes or more, unlike PyTorch's files; do not use it."
            )


def missing(path: Path) -> ConversionError:
    return ConversionError(f"{path} is missing; fetch it again, and the whole folder with it.")


def damaged(path: Path, error: Exception) -> ConversionError:
    """The error for a weight file that cannot be parsed, with the first sentence of the parser's reason."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0][:100]
    reason = reason.replace("Weights only load failed", "no readable pickle")
    return ConversionError(
        f"{path} ({path.stat().st_size:,} bytes) is truncated or not a weight file ({reason}); fetch it again."
    )
