"""The check after a conversion: the result is read back, and its logits are compared where memory allows."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.utils import logging

from tools import package
from tools.convert.checkpoint import safetensors_tensors
from tools.convert.files import ConversionError
from tools.convert.tensors import Tensor, check_finite, check_shapes, dtype_name, total_bytes


Loader = Callable[[torch.dtype], Any]  # loads a model in a dtype

# Relative to the largest logit. Two implementations round differently; one does not differ from itself.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_PROMPT_TOKENS = 24


def check_files(folder: Path, config: dict[str, Any], planned: list[Tensor]) -> str:
    """Read a converted checkpoint back: names, shapes, dtypes and values. Returns one line with the result."""
    tensors = safetensors_tensors(folder)
    check_shapes(tensors, config)
    wanted = {tensor.name: tensor.dtype for tensor in planned}
    for tensor in tensors:
        if tensor.dtype != wanted[tensor.name]:
            wrong = f"{tensor.name} was written as {tensor.dtype} instead of {wanted[tensor.name]}"
            raise ConversionError(f"{wrong}: do not use {folder}, and report this.")
        check_finite(tensor.name, tensor.read())
    dtypes = " and ".join(sorted({dtype_name(tensor.dtype) for tensor in tensors}))
    size = total_bytes(tensors)
    return f"{len(tensors)} tensors, {size:,} bytes, {dtypes}: names, shapes, dtypes and values are right"


def internlm_loader(folder: Path, config: Any = None, **settings: Any) -> Loader:
    """Loads a folder as this package's InternLMForCausalLM."""
    model = package.load("modeling").InternLMForCausalLM
    return lambda dtype: model.from_pretrained(folder, config=config, dtype=dtype, **settings)


def llama_loader(folder: Path) -> Loader:
    """Loads a folder as the library's LlamaForCausalLM."""
    return lambda dtype: transformers.LlamaForCausalLM.from_pretrained(folder, dtype=dtype)


def _available_memory() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)


def _logits(load: Loader, dtype: torch.dtype) -> torch.Tensor:
    model = load(dtype).eval()
    ids = (torch.arange(_PROMPT_TOKENS)[None] * 7919 + 1) % model.config.vocab_size
    with torch.inference_mode():
        return model(input_ids=ids, use_cache=False).logits.float()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' messages and progress bars, which are set for the whole process, and set back after it."""
    verbosity, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bars:
            logging.enable_progress_bar()


def check_logits(loaders: list[Loader], folder: Path) -> str:
    """Run a short prompt through each model, one after the other, and compare. Returns one line with the result.

    Raises:
        ConversionError: The logits differ by more than rounding, or are not finite.
    """
    tensors = safetensors_tensors(folder)
    size, stored = total_bytes(tensors), tensors[0].dtype
    dtype = torch.float32 if size < 2 << 30 else stored
    needed = int(size * 1.25 * dtype.itemsize / stored.itemsize)
    available = _available_memory()
    if available is None or available < needed:
        free = "an unknown amount is" if available is None else f"{available / 1e9:.1f} GB are"
        return f"logits not compared: a model needs about {needed / 1e9:.1f} GB of memory, and {free} available"
    with _quiet():
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
