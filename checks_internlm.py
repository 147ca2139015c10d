"""Checks and warnings, when the model is called and when a checkpoint is loaded, and their messages.

A check is here where torch and transformers would be silently wrong, or fail with a message that does not help.
"""

import json
import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.utils import logging

from .configuration_internlm import InternLMConfig


logger = logging.get_logger(__name__)

# Dynamic NTK is not known to work beyond this multiple of the trained window.
_MAX_SENSIBLE_WINDOWS = 8


# Calls


def embed(embedding: nn.Embedding, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
    """`embedding(input_ids)`, (B, Q) -> (B, Q, E), with errors that say what to do; or `inputs_embeds`, if passed.

    Raises:
        ValueError: Neither or both of input_ids and inputs_embeds.
        IndexError: A token id is outside the vocabulary (on a CPU; a GPU does not check without a synchronisation).
        ValueError: The ids are on another device than the weights.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("Pass exactly one of input_ids and inputs_embeds.")
    if inputs_embeds is not None:
        return inputs_embeds
    assert input_ids is not None
    try:
        return embedding(input_ids)
    except IndexError as error:
        raise IndexError(
            f"A token id is outside the vocabulary (0 to {embedding.weight.shape[0] - 1}): encode the text with this "
            "checkpoint's own tokenizer, and replace labels of -100 before they are used as input_ids."
        ) from error
    except RuntimeError as error:
        if input_ids.device == embedding.weight.device:
            raise
        raise ValueError(
            f"input_ids are on {input_ids.device} and the model is on {embedding.weight.device}: move them with "
            "inputs.to(model.device)."
        ) from error


def check_inputs(
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    cache: Any,
    min_layers: int,
    max_layers: int,
) -> None:
    """Refuse, by shape alone, what would be broadcast to nonsense or fail in some layer.

    A cache may have as many layers as the model (`max_layers`) or, in early-exit decoding, as are used (`min_layers`).
    """
    if inputs_embeds.dim() != 3:
        shape = tuple(inputs_embeds.shape[:-1])
        raise ValueError(f"input_ids must have shape (batch, tokens), and has {shape}: pass input_ids[None].")
    rows, new = inputs_embeds.shape[:2]
    if new == 0:
        raise ValueError(
            "The prompt has no tokens, or none beyond those in the cache: pass at least one, for example "
            "tokenizer.bos_token_id."
        )
    if position_ids is not None and position_ids.shape not in ((1, new), (rows, new)):
        raise ValueError(
            f"position_ids has shape {tuple(position_ids.shape)} for {rows} rows of {new} new tokens: it must be "
            f"({rows}, {new}). (generate derives them from attention_mask, which needs a column for every token.)"
        )
    if attention_mask is not None and (attention_mask.dim() not in (2, 4) or attention_mask.shape[0] not in (1, rows)):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)} for {rows} rows: it must have shape (rows, all "
            "tokens so far), with 1 for tokens and 0 for padding."
        )
    if isinstance(cache, Cache) and len(cache) and not min_layers <= len(cache) <= max_layers:
        raise ValueError(f"The cache has {len(cache)} layers, and this model {max_layers}: start with a new cache.")


def check_cache_type(past_key_values: Any, cache: Any) -> None:
    """Refuse what is not a cache. Only an engine passes one that is not the library's, and only as `cache`."""
    wrong = None
    if past_key_values is not None and not isinstance(past_key_values, Cache):
        wrong = f"past_key_values is a {type(past_key_values).__name__}"
    elif isinstance(cache, tuple | list):
        wrong = f"cache is a {type(cache).__name__}"
    if wrong is not None:
        raise ValueError(f"{wrong}: pass a transformers cache, for example DynamicCache().")


def check_mask(attention_mask: torch.Tensor, key_length: int, cache: Cache | None) -> None:
    """Refuse a (B, K) mask that does not cover every key; the library would pad it with zeros."""
    static = getattr(cache, "is_compileable", False)
    if attention_mask.shape[1] > key_length or (attention_mask.shape[1] < key_length and not static):
        raise ValueError(
            f"attention_mask has {attention_mask.shape[1]} columns for {key_length} tokens: it needs one for every "
            "token so far, those in the cache included."
        )


def explain_cache_error(error: Exception) -> None:
    """Raise a clearer error for one that a cache raised because new keys did not fit."""
    if not isinstance(error, torch.OutOfMemoryError):
        raise ValueError(
            f"The cache cannot take these tokens ({error}): it belongs to another model, has another batch size, or "
            "is a static cache that is full; start with a new one."
        ) from error


def warn_far_beyond_window(model: Any, key_length: int) -> None:
    """Warn, once per model, of a context longer than dynamic NTK is known to work for."""
    window = model.config.max_position_embeddings
    if key_length <= _MAX_SENSIBLE_WINDOWS * window or model._warned_of_length or torch.compiler.is_compiling():
        return
    model._warned_of_length = True
    logger.warning(
        f"{key_length} tokens are more than {_MAX_SENSIBLE_WINDOWS} times the window of {window} that this model was "
        "trained on. Generation continues, but may miss early context and repeat itself: shorten the text, ideally to "
        f"{4 * window} tokens."
    )


def warn_of_dropped_cache() -> None:
    """Warn of a cache that is passed to a model in training with gradient checkpointing."""
    logger.warning_once("Gradient checkpointing runs every layer twice, so the cache that was passed is not used.")


def warn_of_continuous_batching(config: InternLMConfig) -> None:
    """Warn that an engine-managed cache leaves dynamic NTK no keys to correct."""
    if config.rotary["type"] == "dynamic":
        logger.warning_once(
            "Continuous batching manages the cache itself, so there is no dynamic NTK in it: texts of more than "
            f"max_position_embeddings={config.max_position_embeddings} tokens come out wrong. For longer ones fix the "
            'base: config.rotary = {"type": "origin", "base": ...}, see docs/long-context.md.'
        )


# Loading


def check_indexes(folder: str) -> None:
    """Refuse an index of shards that names files outside its folder: transformers reads whatever path it holds."""
    for name in os.listdir(folder):
        if not (name.endswith(".json") and ".index." in name):
            continue
        path = os.path.join(folder, name)
        try:
            with open(path, "rb") as file:
                index = json.loads(file.read())
            _, shards = dict(index["metadata"]), set(index["weight_map"].values())
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} is not an index of weights ({error!r}): fetch it again.") from error
        for shard in shards:
            if not isinstance(shard, str) or "/" in shard or "\\" in shard:
                raise ValueError(
                    f"{path} places weights in {shard!r}, outside its folder: do not use this checkpoint."
                )


def check_keys(model: Any, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Refuse a checkpoint that lacks parameters, or whose attention biases contradict `config.bias`."""
    config = model.config
    # torchao's loader does not list the missing biases of layers that it quantised; they stay on the meta device.
    missing = set(missing) | {
        f"{name}.bias"
        for name, layer in model.named_modules()
        if getattr(layer, "bias", None) is not None and layer.bias.is_meta and not layer.weight.is_meta
    }
    # A classification head is never in a base checkpoint, and starts at random.
    missing = {key for key in missing if key.startswith(("model.", "layers.", "embed_tokens.", "norm.", "lm_head."))}
    surplus = any(key.endswith("_proj.bias") for key in unexpected)
    if surplus or (len(missing) == 4 * config.num_hidden_layers and all(key.endswith(".bias") for key in missing)):
        raise ValueError(
            f"The checkpoint has {'' if surplus else 'no '}attention biases, but config.bias is {config.bias}: set "
            f'"bias": {"true" if surplus else "false"} in its config.json (true for the 7B models, false for the 20B).'
        )
    if missing:
        raise ValueError(f"The checkpoint lacks {len(missing)} parameters, {min(missing)} among them: fetch it again.")


def check_finite(model: nn.Module) -> None:
    """Refuse weights that are NaN or infinite; quantised, offloaded and sharded weights are not checked.

    Every weight is read once, which takes about as long as one token.
    """
    for name, parameter in model.named_parameters():
        weight = parameter.detach()
        if type(weight) is not torch.Tensor or weight.is_meta or weight.dtype.itemsize == 1:
            continue
        # The sum is faster to compute, but may overflow where every element is finite.
        if weight.is_floating_point() and not weight.sum().isfinite() and not weight.isfinite().all():
            raise ValueError(
                f"{name} holds NaN or infinite values in {weight.dtype}: load the checkpoint in the dtype that it was "
                "saved in, or fetch it again."
            )
