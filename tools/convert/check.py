"""The check after a conversion: what was written is read back, and gives the same logits where memory allows."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers

from tools.convert.files import ConversionError, Tensor, check_finite, check_shapes
from tools.convert.checkpoint import safetensors_files


ROOT = Path(__file__).resolve().parents[2]

# Relative to the largest logit. Two implementations round differently; the same one does not.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_PROMPT_TOKENS = 24


def internlm(module: str) -> ModuleType:
    """One of the package's three modules. They import each other relatively, so they need a package around them."""
    if "internlm" not in sys.modules:
        package = ModuleType("internlm")
        package.__path__ = [str(ROOT)]
        sys.modules["internlm"] = package
    return importlib.import_module(f"internlm.{module}_internlm")


def check_files(folder: Path, config: dict[str, Any], planned: list[Tensor]) -> str:
    """Read a converted checkpoint back: names, shapes, dtypes and values. Returns a line that says what was found."""
    tensors = [tensor for held in safetensors_files(folder).values() for tensor in held]
    check_shapes(tensors, config)
    wanted = {tensor.name: tensor.dtype for tensor in planned}
    for tensor in tensors:
        if tensor.dtype != wanted[tensor.name]:
            wrong = f"{tensor.name} was written as {tensor.dtype} instead of {wanted[tensor.name]}"
            raise ConversionError(f"{wrong}: do not use {folder}, and report this.")
        check_finite(tensor.name, tensor.read())
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})
    size = sum(tensor.nbytes for tensor in tensors)
    return f"{len(tensors)} tensors, {size:,} bytes, {' and '.join(dtypes)}: names, shapes, types, values are right"


def _available_memory() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)


def _logits(load: Callable[[torch.dtype], Any], dtype: torch.dtype) -> torch.Tensor:
    model = load(dtype).eval()
    length = min(_PROMPT_TOKENS, model.config.max_position_embeddings)
    ids = (torch.arange(length)[None] * 7919 + 1) % model.config.vocab_size
    with torch.inference_mode():
        return model(input_ids=ids, use_cache=False).logits.float()


def check_logits(loaders: list[Callable[[torch.dtype], Any]], folder: Path) -> str:
    """Run a short prompt through each model, one after the other, and compare. Returns a line that says the outcome.

    Raises:
        ConversionError: The logits differ by more than rounding, or are not finite.
    """
    tensors = [tensor for held in safetensors_files(folder).values() for tensor in held]
    size, stored = sum(tensor.nbytes for tensor in tensors), tensors[0].dtype
    dtype = torch.float32 if size < 2 << 30 else stored
    needed = int(size * 1.25 * dtype.itemsize / stored.itemsize)
    available = _available_memory()
    if available is None or available < needed:
        free = "an unknown amount is" if available is None else f"{available / 1e9:.1f} GB are"
        return f"logits not compared: a model needs about {needed / 1e9:.1f} GB of memory, and {free} available"
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    results = [_logits(load, dtype) for load in loaders]
    if not all(result.isfinite().all() for result in results):
        raise ConversionError("The converted model gives NaN or infinite logits: the source is damaged.")
    if len(results) == 1:
        return f"logits of {_PROMPT_TOKENS} tokens are finite"
    difference = (results[0] - results[1]).abs().max().item()
    limit = _TOLERANCE[dtype] * results[0].abs().max().item()
    if difference > limit:
        raise ConversionError(
            f"The converted model's logits differ from the source's by {difference:.3g} (rounding explains "
            f"{limit:.3g}): do not use it, and report this with the two config.json."
        )
    return f"logits of {_PROMPT_TOKENS} tokens equal the source's (largest difference {difference:.3g})"
