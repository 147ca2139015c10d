"""What differs between the supported versions of transformers, 4.57 to 5.24, and of torch.

Each entry says from or until which version it is needed. An entry is chosen by version, never by trying.
"""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as _ATTENTION_FUNCTIONS

from .checks_internlm import check_cache_type, explain_cache_error, warn_of_dropped_cache
from .configuration_internlm import InternLMConfig


_VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
_TORCH_VERSION = tuple(int(part) for part in torch.__version__.split(".")[:2])

if _VERSION >= (5, 2):  # until 5.1 one decorator, check_model_inputs, did both jobs
    from transformers.utils.generic import merge_with_config_defaults
    from transformers.utils.output_capturing import capture_outputs
else:
    from transformers.utils.generic import check_model_inputs as capture_outputs

    def merge_with_config_defaults(func: Callable) -> Callable:
        return func


class _AttentionFunctions:
    """get_interface, which came with 5.1."""

    @staticmethod
    def get_interface(name: str, default: Callable) -> Callable:
        return default if name == "eager" else _ATTENTION_FUNCTIONS[name]


ALL_ATTENTION_FUNCTIONS: Any = _ATTENTION_FUNCTIONS if _VERSION >= (5, 1) else _AttentionFunctions

LM_HEAD_PLAN = "colwise_gather_output" if _VERSION >= (5, 1) else "colwise_rep"
TIED_WEIGHTS: Any = {"lm_head.weight": "model.embed_tokens.weight"} if _VERSION >= (5, 0) else ["lm_head.weight"]
# The library's name for a cache, as an argument and as a field of output classes. Until 5.23 `cache` was the name of
# generate_batch's cache alone, which the attention functions updated; from 5.24 it is the name of every cache, and the
# attention class updates generate_batch's, too.
CACHE = "cache" if _VERSION >= (5, 24) else "past_key_values"
# From then on the model itself gets the keys of generate_batch's cache, and can correct them beyond the window.
PAGES_ARE_EXACT = _VERSION >= (5, 24)
if _VERSION >= (5, 24):
    from transformers.utils.deprecation import deprecate_kwarg

    # As the library's own models do, down to the version.
    deprecate_past_key_values = deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
else:

    def deprecate_past_key_values(func: Callable) -> Callable:
        return func


# Until 5.3 a cache does not count its tokens, but needs their positions (cache_position) at every call.
_CACHE_NEEDS_POSITIONS = _VERSION < (5, 4)
_INPUTS_EMBEDS = "inputs_embeds" if _VERSION >= (5, 2) else "input_embeds"


def is_exporting() -> bool:
    """Whether a program is exported now. (torch 2.6 cannot tell; from 2.7.)"""
    # Dynamo of 2.11 takes the public function for true in every trace, and 2.13's does not.
    return torch.compiler._is_exporting_flag if _TORCH_VERSION < (2, 13) else torch.compiler.is_exporting()


def is_compiling() -> bool:
    """Whether torch.compile traces this call, to run it here and not to export it.

    False until torch 2.6, which cannot tell an export (is_exporting came with 2.7).
    """
    return _TORCH_VERSION >= (2, 7) and torch.compiler.is_compiling() and not is_exporting()


def is_fixed(size: int) -> bool:
    """Whether a size is the same wherever the code that is traced now, if any, will run.

    torch.compile traces again where a comparison of sizes comes out differently; an exported program, or one of
    torch.jit.trace, keeps what held when it was traced. (Until torch 2.6 a strict export refuses such sizes instead.)
    """
    if torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
        return False
    if torch.compiler.is_dynamo_compiling():
        return _TORCH_VERSION < (2, 7) or not is_exporting()
    return not isinstance(size, torch.SymInt)


def causal_mask(
    config: InternLMConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cache: Cache | None,
    position_ids: torch.Tensor,
    cache_position: torch.Tensor,
) -> Any:
    """The library's causal mask, in the form that the configured attention function takes: a tensor, BlockMask, ..."""
    renamed: dict[str, Any] = {_INPUTS_EMBEDS: inputs_embeds, CACHE: cache}
    if _CACHE_NEEDS_POSITIONS:
        renamed["cache_position"] = cache_position
    return create_causal_mask(config=config, attention_mask=attention_mask, position_ids=position_ids, **renamed)


def mask_sizes(cache: Cache, cache_position: torch.Tensor) -> tuple[int, int]:
    """K, the keys that `cache.update` will return for these new tokens (the whole buffer of a static cache), and how
    many tokens of the cache precede them, which a sliding window has dropped."""
    new_tokens: Any = cache_position if _CACHE_NEEDS_POSITIONS else cache_position.shape[0]
    return cache.get_mask_sizes(new_tokens, 0)


def resolve_cache(model: Any, past_key_values: Cache | None, cache: Any) -> Any:
    """The cache, by whichever name it was passed; none where gradient checkpointing would fill it twice.

    From 5.24 GradientCheckpointingLayer itself drops a `cache`; until 5.23 it knows the old name only.
    """
    cache = past_key_values if cache is None else cache
    check_cache_type(cache)
    if cache is not None and model.gradient_checkpointing and model.training and torch.is_grad_enabled():
        warn_of_dropped_cache()
        return None
    return cache


def update_cache(
    cache: Any,
    keys: torch.Tensor,
    values: torch.Tensor,
    layer_idx: int,
    cache_position: torch.Tensor,
    attention_kwargs: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Append new keys and values, (B, H, Q, D), to a layer's cache and return all of them, (B, H, K, D).

    Args:
        cache: A library cache, or the engine-managed cache of generate_batch.
        attention_kwargs: What the attention function gets; an engine-managed cache adds its own arguments to it.

    Raises:
        ValueError: The cache cannot take these tokens.
    """
    extra: dict[str, Any] = {}
    if _VERSION >= (5, 24):
        extra = {"kwargs": attention_kwargs}
    elif not isinstance(cache, Cache):  # the attention function updates it
        attention_kwargs["cache"] = cache
        return keys, values
    elif _CACHE_NEEDS_POSITIONS:
        extra = {"cache_kwargs": {"cache_position": cache_position}}
    try:
        return cache.update(keys, values, layer_idx, **extra)
    except (RuntimeError, IndexError) as error:
        explain_cache_error(error)
        raise


__all__ = [
    "ALL_ATTENTION_FUNCTIONS",
    "CACHE",
    "LM_HEAD_PLAN",
    "PAGES_ARE_EXACT",
    "TIED_WEIGHTS",
    "capture_outputs",
    "causal_mask",
    "deprecate_past_key_values",
    "is_compiling",
    "is_exporting",
    "is_fixed",
    "mask_sizes",
    "merge_with_config_defaults",
    "resolve_cache",
    "update_cache",
]
