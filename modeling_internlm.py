"""InternLM v1 for today's transformers. Llama, except:

* the rotary embedding has no buffers and no state, and beyond the trained window it is a dynamic NTK that stays exact
  with a cache (see `RotaryTables`);
* one `config.bias` switches the biases of all four attention projections;
* the norm is one fused operation, and queries and keys are rotated together;
* the embedding has no padding_idx, so that training on the pad token's row works;
* `chat` and `stream_chat` speak the checkpoint's own prompt format.

Shapes: B batch, Q new tokens, K tokens in the cache including the new ones, H heads, D head_dim, E hidden_size,
V vocab_size.
"""

import functools
import inspect
import itertools
import json
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, GenerationMixin, PreTrainedModel, StoppingCriteria, TextIteratorStreamer
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as _ATTENTION_FUNCTIONS
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple

from .configuration_internlm import InternLMConfig


logger = logging.get_logger(__name__)

# What differs between the supported versions of transformers, 4.57 to 5.24, stands in this block and nowhere else.
_VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])

if _VERSION >= (5, 2):  # until 5.1 one decorator, check_model_inputs, did both jobs
    from transformers.utils.generic import merge_with_config_defaults
    from transformers.utils.output_capturing import capture_outputs
else:
    from transformers.utils.generic import check_model_inputs as capture_outputs

    def merge_with_config_defaults(func: Any) -> Any:
        return func


class _AttentionFunctions:
    """get_interface, which came with 5.1.

    Before, set_attn_implementation refused a file without "ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]".
    """

    @staticmethod
    def get_interface(name: str, default: Callable) -> Callable:
        return default if name == "eager" else _ATTENTION_FUNCTIONS[name]


ALL_ATTENTION_FUNCTIONS: Any = _ATTENTION_FUNCTIONS if _VERSION >= (5, 1) else _AttentionFunctions

_EMBEDS = "inputs_embeds" if _VERSION >= (5, 2) else "input_embeds"
_LM_HEAD_PLAN = "colwise_gather_output" if _VERSION >= (5, 1) else "colwise_rep"
_TIED_WEIGHTS: Any = {"lm_head.weight": "model.embed_tokens.weight"} if _VERSION >= (5, 0) else ["lm_head.weight"]
# From 5.4 a cache counts its own tokens; before, it was told their places (cache_position) at every call.
_CACHE_IS_TOLD_POSITIONS = _VERSION < (5, 4)
# How the library calls a cache. Until 5.23 `cache` was generate_batch's alone, and its attention functions updated it;
# from 5.24 every cache is called so, and the attention class updates generate_batch's, too.
_CACHE = "cache" if _VERSION >= (5, 24) else "past_key_values"


def _takes_cache(forward: Callable) -> Callable:
    """From 5.24, let `forward` take its `past_key_values` by the name `cache` as well."""
    if _CACHE == "past_key_values":
        return forward

    @functools.wraps(forward)
    def renamed(*args: Any, **kwargs: Any) -> Any:
        cache = kwargs.pop("cache", None)
        if isinstance(cache, Cache):
            kwargs["past_key_values"] = cache
        elif cache is not None:  # generate_batch's, which is no Cache: an argument for the attention class alone
            kwargs["cache"] = cache
        return forward(*args, **kwargs)

    # The library's pipeline parallelism drops what the signature does not name.
    signature = inspect.signature(forward)
    *named, rest = signature.parameters.values()
    cache = inspect.Parameter("cache", inspect.Parameter.KEYWORD_ONLY, default=None)
    setattr(renamed, "__signature__", signature.replace(parameters=[*named, cache, rest]))  # noqa: B010
    return renamed


def _causal_mask(config, inputs_embeds, attention_mask, cache, position_ids, cache_position):
    told = {"cache_position": cache_position} if _CACHE_IS_TOLD_POSITIONS else {}
    return create_causal_mask(
        config=config,
        attention_mask=attention_mask,
        position_ids=position_ids,
        **{_EMBEDS: inputs_embeds, _CACHE: cache},
        **told,
    )


def _cache_length(cache: Any, cache_position: torch.Tensor) -> int:
    """K: the keys that `cache.update` will hand back for these new tokens (the whole buffer of a static cache)."""
    return cache.get_mask_sizes(cache_position if _CACHE_IS_TOLD_POSITIONS else cache_position.shape[0], 0)[0]


def _update_cache(arguments: dict[str, Any], keys, values, layer_idx: int, cache_position):
    """Hand new keys and values to the cache among a layer's `arguments`, if there is one; K of each come back."""
    cache = arguments.pop(_CACHE, None)
    if cache is None:
        return keys, values
    told: dict[str, Any] = {}
    if _VERSION >= (5, 24):
        told = {"kwargs": arguments}  # generate_batch's reads and changes them
    if _CACHE_IS_TOLD_POSITIONS:
        told = {"cache_kwargs": {"cache_position": cache_position}}
    try:
        return cache.update(keys, values, layer_idx, **told)
    except (RuntimeError, IndexError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(
            f"The cache cannot take these tokens ({error}): it is another model's, or has another batch size, "
            "or is a static cache that is full; start with a new one."
        ) from error


# An exported program keeps its matrix products, for its runtime to choose from; is_exporting came with torch 2.7.
_is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)

# End of the version block.


# So many new tokens at most get a length L each, at the price of one attention each (see RotaryTables).
_OWN_LENGTH_LIMIT = 32

# So many logits at a time go through the loss: 128 MB of them in float32.
_LOSS_PIECE = 2**25

# So many numbers of the cached keys at a time are read on a CPU: 2 MB in float32.
_READ_PIECE = 2**19

# Beyond so many windows nobody has seen dynamic NTK work; a longer text is read, with a warning.
_SENSIBLE_WINDOWS = 8

# A serving engine that keeps the keys itself hands one of these down to its attention function: vLLM's and SGLang's
# transformers backends, and generate_batch. There is no read to correct and no row to measure, so keys and queries
# keep the trained theta; a longer context needs a fixed base (docs/long-context.md).
_ENGINE_ARGUMENTS = {"attention_instances", "cache"}


class InternLMRMSNorm(nn.Module):
    """Llama's RMSNorm as one operation: mean square and normalisation in float32, result in the weight's dtype."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        if hidden_states.dtype != weight.dtype:  # a quantised or mixed-precision model keeps norms in float32
            normed = torch.rms_norm(hidden_states.float(), weight.shape, None, self.variance_epsilon)
            return weight * normed.to(weight.dtype)
        return torch.rms_norm(hidden_states, weight.shape, weight, self.variance_epsilon)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


class RotaryTables(NamedTuple):
    """Cosines and sines of one forward, shared by all layers; nothing of it outlives the forward.

    Dynamic NTK with L tokens in a row, M = max_position_embeddings, s = scaling_factor and d = head_dim turns pair i
    of a query or key at position p by p * theta_i(L), where

        theta_i(L) = base ** (-2i / d) * ratio(L) ** (-2i / (d - 2)),    ratio(L) = max(1, s * L / M - (s - 1)),

    so the base grows to base * ratio ** (d / (d - 2)): for d = 128, M = 4096, base 10000 it is 10000 at L = 4096,
    20221.3 at 8192 and 40889.9 at 16384. (Source: the official InternLM v1 code; the idea is bloc97's, 2023.)

    The official code rotates every cached key anew at every step. Here keys are cached turned by the trained theta, as
    Llama's are, so nothing differs up to M. Two turns add their angles: when keys can lie beyond M, queries and the
    keys read from the cache are turned once more, by slot * (theta(L) - theta(M)), where a slot counts the row's own
    tokens. Only differences of slots matter, so left padding and offset position_ids need no care.

    L is each row's own: its largest position so far plus one. All tokens of one forward use the L at its end, so a
    prompt that is read in chunks gives each chunk the L reached with it. But a few tokens (up to 32) that come with a
    mask of 4 dimensions use their own L each, so that assisted decoding, which verifies its guesses in one forward,
    gives the tokens of plain decoding. (The official code reads whole prompts and single tokens; for these it is so.)

    Attributes:
        cos, sin: The turn of new queries and keys, (B or 1, 1, Q, D), in the model's dtype.
        read: The further turns of what is read from the cache, cosines and sines, (B or 1, 1, K, D): none up to M,
            else one for all new tokens or one for each.
        cache_position: Places of the new tokens in the cache, (Q,): their rows of `read`.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    read: list[tuple[torch.Tensor, torch.Tensor]]
    cache_position: torch.Tensor


def _frequencies(config: InternLMConfig, device: torch.device) -> torch.Tensor:
    """The trained theta, (D / 2,), always float32: in half precision 5000 positions keep 797 distinct angles."""
    head_dim = config.head_dim
    exponents = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    return torch.pow(config.rotary["base"], exponents).reciprocal()


def _ntk_log_ratio(config: InternLMConfig, lengths: torch.Tensor) -> torch.Tensor:
    """log(theta(L) / theta(M)) of `RotaryTables`: (..., 1) lengths -> (..., D / 2), exactly 0 up to M."""
    factor, window, head_dim = config.rotary["scaling_factor"], config.max_position_embeddings, config.head_dim
    ratio = (factor * lengths.float() / window - (factor - 1)).clamp(min=1.0)
    exponents = torch.arange(0, head_dim, 2, device=lengths.device, dtype=torch.float32) / max(head_dim - 2, 1)
    return -exponents * ratio.log()


def _cos_sin(places: torch.Tensor, theta: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, Q) places and (..., D / 2) angles per place -> tables (B, 1, Q, D), for `_rotate`.

    The angles of the first half are negative, so that its sines carry the sign with which they multiply.
    """
    angles = (places[..., None].float() * torch.cat((-theta, theta), dim=-1))[:, None]
    return angles.cos().to(dtype), angles.sin_().to(dtype)


def _rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn pairs (i, i + D / 2) of (B, H, Q, D): Llama's rotate_half, its signs folded into `sin`."""
    return torch.addcmul(states * cos, states.roll(states.shape[-1] // 2, -1), sin)


def _packed_lengths(position_ids: torch.Tensor) -> torch.Tensor:
    """Length of the sequence that each token belongs to, (B, Q), where a row packs several (positions start anew)."""
    breaks = nn.functional.pad(position_ids[:, 1:] != position_ids[:, :-1] + 1, (1, 0))
    sequence = breaks.long().cumsum(-1)
    longest = torch.zeros_like(position_ids).scatter_reduce(1, sequence, position_ids + 1, "amax")
    return longest.gather(1, sequence)


def _slots(attention_mask: Any, key_length: int, device: torch.device) -> torch.Tensor:
    """How many of its row's tokens stand before each key, (B or 1, K). Keys that nobody sees get any number."""
    if not isinstance(attention_mask, torch.Tensor):
        return torch.arange(key_length, device=device)[None]
    if attention_mask.dim() == 4:  # what generate makes for a static cache; its last query sees every token so far
        seen = attention_mask[:, 0, -1]
        seen = seen if seen.dtype == torch.bool else seen >= 0
    else:
        seen = attention_mask.to(device) != 0
    seen = nn.functional.pad(seen[:, :key_length], (0, key_length - min(seen.shape[-1], key_length)))
    return (seen.long().cumsum(-1) - 1).clamp(min=0)


def _check_inputs(embeds: Any, attention_mask: Any, position_ids: Any, cache: Any, fewest: int, most: int) -> None:
    """Refuse, by shapes alone, what would be broadcast to nonsense or stumble over in some layer.

    A cache may have as many layers as the model (`most`), or, in early-exit decoding, as are used (`fewest`).
    """
    if embeds.dim() != 3:
        raise ValueError(
            f"input_ids must be (batch, tokens): give input_ids[None] (found {tuple(embeds.shape[:-1])})."
        )
    rows, new = embeds.shape[:2]
    if position_ids is not None and position_ids.shape not in ((1, new), (rows, new)):
        raise ValueError(
            f"position_ids has shape {tuple(position_ids.shape)} for {rows} rows of {new} new tokens: one for each "
            "is needed. (generate counts them from attention_mask, which needs a column for each token so far.)"
        )
    if attention_mask is not None and (attention_mask.dim() not in (2, 4) or attention_mask.shape[0] not in (1, rows)):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)} for {rows} rows: it must be (rows, all tokens so "
            "far), 1 for tokens and 0 for padding."
        )
    if cache is not None and not isinstance(cache, Cache):
        raise ValueError(f"past_key_values is a {type(cache).__name__}: give a transformers cache, as DynamicCache().")
    if cache is not None and len(cache) and not fewest <= len(cache) <= most:
        raise ValueError(f"past_key_values has {len(cache)} layers, and this model {most}: start with a new cache.")


def _check_mask(attention_mask: Any, key_length: int, cache: Cache | None) -> None:
    """Refuse a mask that does not say of every key whether it is padding; the library would pad it with zeros."""
    static = getattr(cache, "is_compileable", False)
    if attention_mask.shape[1] > key_length or (attention_mask.shape[1] < key_length and not static):
        raise ValueError(
            f"attention_mask has {attention_mask.shape[1]} columns for {key_length} tokens: it needs one for each "
            "token read so far, those in past_key_values included."
        )


def _rotary_tables(
    config: InternLMConfig,
    embeds: torch.Tensor,
    position_ids: torch.Tensor,
    attention_mask: Any,
    causal_mask: Any,
    cache_position: torch.Tensor,
    key_length: int,
    keys: Literal["cached", "new", "engine's"],
) -> RotaryTables:
    """Build the tables of one forward. Which branch is taken depends on shapes alone, never on a tensor's values."""
    theta = _frequencies(config, embeds.device)
    read = []
    if config.rotary["type"] == "dynamic" and key_length > config.max_position_embeddings:
        if keys == "cached":
            few = (
                embeds.shape[1] <= _OWN_LENGTH_LIMIT
                and isinstance(causal_mask, torch.Tensor)
                and causal_mask.dim() == 4
            )
            lengths = (position_ids if few else position_ids.amax(-1, keepdim=True)) + 1
            deltas = theta * _ntk_log_ratio(config, lengths[..., None]).expm1()  # (B, 1 or Q, D / 2)
            slots = _slots(attention_mask, key_length, embeds.device)
            read = [_cos_sin(slots, delta, embeds.dtype) for delta in deltas.split(1, dim=1)]
        elif keys == "new":
            theta = theta * _ntk_log_ratio(config, _packed_lengths(position_ids)[..., None]).exp()
    return RotaryTables(*_cos_sin(position_ids, theta, embeds.dtype), read, cache_position)


def _projection() -> Callable[[Any, torch.Tensor], torch.Tensor]:
    """What applies a linear layer to states: the layer's own call, and in torch.compile `_project`."""
    return _project if torch.compiler.is_compiling() else nn.Module.__call__


def _project(linear: Any, states: torch.Tensor) -> torch.Tensor:
    """`linear(states)` for torch.compile, with the product of one token on a CPU written out.

    The weight is all that such a product reads, and the CPU's math libraries read it with one core: inductor's own
    loop, which takes all of them, needs half the time on two (benchmarks/cpu.py, "compiled").
    """
    if _is_exporting() or not _is_plain(linear):  # first: to count an export's tokens would fix their number
        return linear(states)
    if states.device.type != "cpu" or states.shape[:-1].numel() != 1:
        return linear(states)
    product = (states.float().unsqueeze(-2) * linear.weight.float()).sum(-1)
    return (product if linear.bias is None else product + linear.bias).to(states.dtype)


def _is_plain(linear: Any) -> bool:
    """Whether calling it is the product and nothing else: not quantised, adapted, sharded or hooked."""
    plain = type(linear) is nn.Linear and type(linear.weight) is nn.Parameter
    return plain and not (linear._forward_hooks or linear._forward_pre_hooks)


class InternLMMLP(nn.Module):
    def __init__(self, config: InternLMConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        project = _projection()
        gate, up = project(self.gate_proj, hidden_states), project(self.up_proj, hidden_states)
        return project(self.down_proj, self.act_fn(gate) * up)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain attention, (B, H, Q, D) -> ((B, Q, H, D), probabilities (B, H, Q, K)); softmax in float32."""
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    return _weigh(scores, value, attention_mask, dropout if module.training else 0.0)


def _weigh(
    scores: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None, dropout: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention from its scores, (B, H, Q, K), on: mask, softmax and the weighted sum of the values."""
    largest = torch.finfo(scores.dtype).max
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, -largest)
    elif attention_mask is not None:
        scores = scores + attention_mask
    scores = scores.clamp(-largest, largest)  # float16 overflows: a row of -inf, its softmax NaN (the official clamp)
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
    weights = nn.functional.dropout(weights, p=dropout)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class InternLMAttention(nn.Module):
    """Llama's attention, except: `config.bias`, joint rotation, and the further turn of what is read beyond M."""

    def __init__(self, config: InternLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = 1
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.bias)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.bias)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.bias)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: RotaryTables,
        attn_implementation: str,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        cos, sin, read, cache_position = position_embeddings
        project = _projection()
        input_shape = hidden_states.shape[:-1]
        queries, keys = project(self.q_proj, hidden_states), project(self.k_proj, hidden_states)  # (B, Q, E)
        if input_shape[-1] == 1:  # one turn for both: for one token the number of operations is what costs
            both = torch.cat((queries, keys), dim=-1).view(input_shape[0], -1, 1, self.head_dim)
            queries, keys = _rotate(both, cos, sin).chunk(2, dim=1)  # (B, H, Q, D)
        else:
            queries = _rotate(queries.view(*input_shape, -1, self.head_dim).transpose(1, 2), cos, sin)
            keys = _rotate(keys.view(*input_shape, -1, self.head_dim).transpose(1, 2), cos, sin)
        values = project(self.v_proj, hidden_states).view(*input_shape, -1, self.head_dim).transpose(1, 2)
        keys, values = _update_cache(kwargs, keys, values, self.layer_idx, cache_position)  # (B, H, K, D)

        # In every layer, for vLLM looks for this call. The name is handed down, for the config takes long to read.
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            attn_implementation, eager_attention_forward
        )
        if read:
            attention_interface = _turned(attention_interface, read, cache_position)
        output, weights = attention_interface(
            self, queries, keys, values, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs
        )
        return project(self.o_proj, output.reshape(*input_shape, -1)), weights


def _turned(
    attention: Callable, read: list[tuple[torch.Tensor, torch.Tensor]], cache_position: torch.Tensor
) -> Callable:
    """`attention`, with queries and keys given the further turns of `RotaryTables.read` first."""

    def turn_and_attend(module, queries, keys, values, attention_mask, **kwargs):
        if len(read) > 1:
            return one_by_one(module, queries, keys, values, attention_mask, **kwargs)
        queries = _rotate(queries, *(table.index_select(2, cache_position) for table in read[0]))
        # Not in float16: a product of two numbers can overflow where the score does not.
        single = queries.shape[2] == 1 and (queries.dtype != torch.float16 or torch.compiler.is_compiling())
        if single and module.config._attn_implementation in ("eager", "sdpa"):
            scores = _turned_scores(queries, keys, *read[0]) * module.scaling
            return _weigh(scores, values, attention_mask)
        return attention(module, queries, _rotate(keys, *read[0]), values, attention_mask, **kwargs)

    def one_by_one(module, queries, keys, values, attention_mask, **kwargs):
        results = [
            _turned(attention, [turn], cache_position[new : new + 1])(
                module, queries[:, :, new : new + 1], keys, values, attention_mask[:, :, new : new + 1], **kwargs
            )
            for new, turn in enumerate(read)
        ]
        outputs, weights = zip(*results, strict=True)
        return torch.cat(outputs, dim=1), None if weights[0] is None else torch.cat(weights, dim=2)

    return turn_and_attend


def _turned_scores(queries: torch.Tensor, keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Products of one query, (B, H, 1, D), with keys turned as they are read: (B, H, 1, K), in float32.

    To turn a key forth is to turn the query back, so the keys are read once and never copied. Compiled, that is one
    loop, over the half of the tables in which nothing is repeated. In eager mode a CPU takes the keys in pieces, so
    that the queries turned back for them stay in its cache.
    """
    if torch.compiler.is_compiling():
        half = queries.shape[-1] // 2
        (q1, q2), (k1, k2) = queries.split(half, dim=-1), keys.split(half, dim=-1)
        cos, sin = cos[..., half:], sin[..., half:]
        products = k1 * (q1 * cos + q2 * sin) + k2 * (q2 * cos - q1 * sin)  # (B, H, K, D / 2)
        return products.float().sum(-1)[:, :, None]
    across = queries.roll(queries.shape[-1] // 2, -1)
    size = max(1, _READ_PIECE // keys[:, :, 0].numel()) if keys.device.type == "cpu" else keys.shape[2]
    scores = []
    for k, c, s in zip(*(tensor.split(size, dim=2) for tensor in (keys, cos, sin)), strict=True):
        turned_back = (queries * c).addcmul_(across, s, value=-1)
        scores.append(turned_back.mul_(k).sum(-1, dtype=torch.float32))
    return torch.cat(scores, dim=-1)[:, :, None]


class InternLMDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: InternLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = InternLMAttention(config, layer_idx)
        self.mlp = InternLMMLP(config)
        self.input_layernorm = InternLMRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = InternLMRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class InternLMPreTrainedModel(PreTrainedModel):
    config_class = InternLMConfig
    config: InternLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["InternLMDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]  # its name until 5.23, and since
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": InternLMDecoderLayer, "attentions": InternLMAttention}
    # Some 7B checkpoints hold it, rounded to half precision; it is recomputed.
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq"]

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        """The library's, except that a checkpoint that is not sound is an error, not a model that talks nonsense.

        Raises:
            ValueError: The checkpoint's index leads out of its folder; the checkpoint lacks parameters, or its
                attention biases contradict `config.bias` (who asks for output_loading_info gets the lists instead; an
                empty state_dict asks for a random model); a weight is NaN or infinite.
        """
        folder = os.path.join(str(pretrained_model_name_or_path), kwargs.get("subfolder") or "")
        if os.path.isdir(folder):  # of a repository on the Hub, huggingface_hub refuses such names
            _check_indexes(folder)
        loaded: Any = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        model, info = loaded
        if not output_loading_info and kwargs.get("state_dict") != {}:
            # torchao's loader does not list the missing biases of layers that it quantised; they stay without storage.
            lost = {
                f"{name}.bias"
                for name, layer in model.named_modules()
                if getattr(layer, "bias", None) is not None and layer.bias.is_meta and not layer.weight.is_meta
            }
            _check_loaded(model.config, {*info["missing_keys"], *lost}, info["unexpected_keys"])
        _check_finite(model)
        return (model, info) if output_loading_info else model


def _check_indexes(folder: str) -> None:
    """Refuse an index of shards that names files elsewhere: transformers reads whatever stands in it."""
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


def _check_loaded(config: InternLMConfig, missing: set[str], unexpected: Any) -> None:
    # What was never in the checkpoint, the classification heads, starts at random by right.
    missing = {key for key in missing if key.startswith(("model.", "layers.", "embed_tokens.", "norm.", "lm_head."))}
    surplus = any(key.endswith("_proj.bias") for key in unexpected)
    if surplus or (len(missing) == 4 * config.num_hidden_layers and all(key.endswith(".bias") for key in missing)):
        raise ValueError(
            f"The checkpoint has {'' if surplus else 'no '}attention biases, but config.bias is {config.bias}: set "
            f'"bias": {"true" if surplus else "false"} in its config.json (true for the 7B models, false for the 20B).'
        )
    if missing:
        raise ValueError(f"The checkpoint lacks {len(missing)} parameters, {min(missing)} among them: fetch it again.")


def _check_finite(model: nn.Module) -> None:
    """Refuse weights that are NaN or infinite; those that are quantised, offloaded or sharded are not looked at.

    Every weight is read once, which the first forward would do otherwise: about the time of one token.
    """
    for name, parameter in model.named_parameters():
        weight = parameter.detach()
        if type(weight) is not torch.Tensor or weight.is_meta or weight.dtype.itemsize == 1:
            continue
        # The sum, which is read faster, may overflow where every number is finite.
        if weight.is_floating_point() and not weight.sum().isfinite() and not weight.isfinite().all():
            raise ValueError(
                f"{name} holds NaN or infinite values in {weight.dtype}: load the checkpoint in the dtype that it was "
                "made in, or fetch it again."
            )


class InternLMModel(InternLMPreTrainedModel):
    """The decoder without a head: token ids (B, Q) -> hidden states (B, Q, E). Llama's, except the rotary tables."""

    _auto_class = "AutoModel"
    _warned = False

    def __init__(self, config: InternLMConfig) -> None:
        super().__init__(config)
        # No padding_idx: it would freeze that row, and published configurations pad with eos.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([InternLMDecoderLayer(config, index) for index in range(config.num_hidden_layers)])
        self.norm = InternLMRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @_takes_cache
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """
        Args:
            input_ids: Token ids, (B, Q); or give `inputs_embeds`, (B, Q, E), not both.
            attention_mask: 1 for tokens and 0 for padding, (B, K), or a prepared mask of 4 dimensions.
            position_ids: (B, Q); by default counted from the attention mask, or from the cache's length.
            past_key_values: A transformers cache with the tokens read before.

        Raises:
            ValueError: Neither or both of input_ids and inputs_embeds.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        hidden_states = inputs_embeds if input_ids is None else self._embed(input_ids)
        assert hidden_states is not None
        layers = self.config.num_hidden_layers
        _check_inputs(hidden_states, attention_mask, position_ids, past_key_values, layers, len(self.layers))
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        arguments = self._layer_arguments(hidden_states, attention_mask, position_ids, past_key_values, kwargs)
        for layer in itertools.islice(self.layers, layers):  # fewer for early-exit decoding
            hidden_states = layer(hidden_states, **arguments)
        cache: dict[str, Any] = {_CACHE: past_key_values}
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **cache)

    def _layer_arguments(
        self, embeds: torch.Tensor, attention_mask: Any, position_ids: Any, cache: Any, kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """What every layer of one forward gets: where the tokens stand, what they see, how they turn and attend."""
        new, device = embeds.shape[1], embeds.device
        cache_position: Any = kwargs.pop("cache_position", None)
        if cache_position is None:
            cache_position = torch.arange(new, device=device) + (0 if cache is None else cache.get_seq_length())
        key_length = new if cache is None else _cache_length(cache, cache_position)
        self._warn_far_beyond_the_window(key_length)
        has_padding_mask = attention_mask is not None and attention_mask.dim() == 2
        if has_padding_mask:
            _check_mask(attention_mask, key_length, cache)
        if position_ids is None:
            position_ids = cache_position[None]
            if has_padding_mask:
                position_ids = _slots(attention_mask, key_length, device).index_select(1, cache_position)
        position_ids = position_ids.to(device)
        causal_mask = None
        if not self._sees_all(new, attention_mask, cache):
            causal_mask = _causal_mask(self.config, embeds, attention_mask, cache, position_ids, cache_position)
        keys = "engine's" if kwargs.keys() & _ENGINE_ARGUMENTS else "new" if cache is None else "cached"
        tables = _rotary_tables(
            self.config, embeds, position_ids, attention_mask, causal_mask, cache_position, key_length, keys
        )
        return {
            "attention_mask": causal_mask,
            "position_ids": position_ids,
            "position_embeddings": tuple(tables),  # plain: GPTQ of optimum rebuilds it as type(x)([...])
            "attn_implementation": self.config._attn_implementation,
            _CACHE: cache,
            **kwargs,  # last: generate_batch's cache is among them
        }

    def _sees_all(self, new: int, attention_mask: Any, cache: Any) -> bool:
        """Whether there is nothing to mask: one new token, no padding, no empty places as in a static cache."""
        unpadded = new == 1 and attention_mask is None and not getattr(cache, "is_compileable", False)
        return unpadded and self.config._attn_implementation == "sdpa"

    def _warn_far_beyond_the_window(self, key_length: int) -> None:
        window = self.config.max_position_embeddings
        if key_length <= _SENSIBLE_WINDOWS * window or self._warned or torch.compiler.is_compiling():
            return
        self._warned = True
        logger.warning(
            f"{key_length} tokens are more than {_SENSIBLE_WINDOWS} times the window of {window} that this model was "
            "trained on. It reads on, but expect it to miss what stands far back and to repeat itself: shorten the "
            f"text, best to {4 * window} tokens."
        )

    def _embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[-1] == 0:
            raise ValueError(
                "The prompt has no tokens, or none beyond those in past_key_values: give at least one, for example "
                "tokenizer.bos_token_id."
            )
        try:
            return self.embed_tokens(input_ids)
        except IndexError as error:  # on a CPU; a GPU checks nothing without waiting for it
            raise IndexError(
                f"A token id is outside the vocabulary (0 to {self.config.vocab_size - 1}): encode the text with this "
                "checkpoint's own tokenizer, and replace labels of -100 before they are used as input_ids."
            ) from error
        except RuntimeError as error:
            if input_ids.device == self.embed_tokens.weight.device:
                raise
            raise ValueError(
                f"input_ids are on {input_ids.device} and the model on {self.embed_tokens.weight.device}: move them "
                "with inputs.to(model.device)."
            ) from error

    def chat(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: years of scripts call `AutoModel.from_pretrained(...).chat(...)`, which was the causal LM once."""
        raise AttributeError(
            "InternLMModel has no head and cannot chat or generate: load the checkpoint with "
            "AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True) instead of AutoModel."
        )

    stream_chat = chat


def _loss(function: Callable, logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, **kwargs: Any) -> Any:
    """The library's loss; of many logits in pieces, so that it never holds float32 copies of them all.

    On 16,384 tokens of 103,168 pieces each of its copies takes 6.8 GB. Every piece is computed again for the backward
    pass, and divided by the number of all labels, so that the sum is the loss of the whole.
    """
    size = max(1, _LOSS_PIECE // vocab_size)
    if labels.numel() <= size or function is not ForCausalLMLoss:  # somebody's own loss may not be a sum over tokens
        return function(logits=logits, labels=labels, vocab_size=vocab_size, **kwargs)
    targets, count = kwargs.pop("shift_labels", None), kwargs.pop("num_items_in_batch", None)
    ignored = kwargs.get("ignore_index", -100)
    if targets is None:
        targets = nn.functional.pad(labels, (0, 1), value=ignored)[..., 1:]
    if count is None:
        count = (targets != ignored).sum()
    pieces = zip(logits.reshape(-1, vocab_size).split(size), targets.reshape(-1).split(size), strict=True)
    parts = {"labels": None, "vocab_size": vocab_size, "num_items_in_batch": count, **kwargs}
    losses = [
        checkpoint(function, piece, use_reentrant=False, preserve_rng_state=False, shift_labels=target, **parts)
        for piece, target in pieces
    ]
    return torch.stack(losses).sum()


class InternLMForCausalLM(InternLMPreTrainedModel, GenerationMixin):
    _auto_class = "AutoModelForCausalLM"
    _tied_weights_keys = _TIED_WEIGHTS
    _tp_plan = {"lm_head": _LM_HEAD_PLAN}
    _pp_plan: Any = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: InternLMConfig) -> None:
        super().__init__(config)
        self.model = InternLMModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @_takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """
        Args:
            labels: Token ids, (B, Q), -100 where a token does not count; the loss shifts them by one.
            logits_to_keep: Logits of the last N tokens only, or of the token indices given; 0 is all, (B, Q, V).

        The other arguments are `InternLMModel.forward`'s.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = _projection()(self.lm_head, outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = _loss(self.loss_function, logits, labels, self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{_CACHE: getattr(outputs, _CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """The library's (generate_batch and `transformers serve --continuous-batching` start here), with a warning."""
        if self.config.rotary["type"] == "dynamic":
            logger.warning_once(
                "Continuous batching keeps the keys itself, so there is no dynamic NTK in it: texts of more than "
                f"max_position_embeddings={self.config.max_position_embeddings} tokens come out wrong. For longer "
                'ones fix the base: config.rotary = {"type": "origin", "base": ...}, see docs/long-context.md.'
            )
        return super().init_continuous_batching(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    def chat(
        self,
        tokenizer: Any,
        query: str,
        history: list[tuple[str, str]] | None = None,
        streamer: Any = None,
        max_new_tokens: int = 1024,
        do_sample: bool = True,
        temperature: float = 0.8,
        top_p: float = 0.8,
        meta_instruction: str | None = None,
        **kwargs: Any,
    ) -> tuple[str, list[tuple[str, str]]]:
        """Answer one turn of a conversation, in the prompt format of the tokenizer's chat template.

        Args:
            tokenizer: The checkpoint's tokenizer.
            query: What the user says now.
            history: (query, response) pairs of the turns before; it is not changed.
            streamer: A transformers streamer of your own, for example TextStreamer.
            meta_instruction: The system text; None is the prompt format's own default, "" is none.
            max_new_tokens, do_sample, temperature, top_p, kwargs: For `generate`. The four count more than a
                `generation_config` among them, or the checkpoint's.

        Returns:
            The response, and the history with this turn added. The response ends at `<eoa>` or at a token of
            `generation_config.eos_token_id`, neither of which is part of it, unless `eos_token_id` says otherwise.
        """
        inputs = _chat_inputs(tokenizer, query, history, meta_instruction).to(self.device)
        settings = {"max_new_tokens": max_new_tokens, "do_sample": do_sample, "streamer": streamer, **kwargs}
        settings["tokenizer"] = tokenizer  # generate needs it for stop_strings
        if do_sample:
            settings = {"temperature": temperature, "top_p": top_p, **settings}
        configs = (kwargs.get("generation_config"), self.generation_config)
        settings.setdefault("eos_token_id", _stop_tokens(tokenizer, *filter(None, configs)))
        try:
            output: Any = self.generate(**inputs, **settings)  # pyright: ignore[reportAttributeAccessIssue]
        except (RuntimeError, MemoryError) as error:
            if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "allocate memory" not in str(error):
                raise
            raise torch.OutOfMemoryError(
                f"Out of memory at a prompt of {inputs['input_ids'].shape[1]} tokens with {len(history or [])} "
                f"earlier turns: cut the oldest (history[1:]) or set a smaller max_new_tokens ({max_new_tokens} now)."
            ) from error
        tokens = getattr(output, "sequences", output)  # with return_dict_in_generate it is an output class
        response = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return response, [*(history or []), (query, response)]

    def stream_chat(
        self,
        tokenizer: Any,
        query: str,
        history: list[tuple[str, str]] | None = None,
        max_new_tokens: int = 1024,
        do_sample: bool = True,
        temperature: float = 0.8,
        top_p: float = 0.8,
        **kwargs: Any,
    ) -> Iterator[tuple[str, list[tuple[str, str]]]]:
        """`chat`, word by word: yields (response so far, history with it); the last pair is what `chat` returns.

        Generation runs in a thread of its own. What it raises is raised here; when the iterator is dropped, it stops.

        Args:
            tokenizer, query, history, max_new_tokens, do_sample, temperature, top_p, kwargs: As for `chat`, except
                `streamer`.
        """
        abandoned = threading.Event()
        criteria = [*kwargs.pop("stopping_criteria", []), _StopWhen(abandoned)]
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        errors: list[BaseException] = []
        kwargs |= {"max_new_tokens": max_new_tokens, "do_sample": do_sample}
        kwargs |= {"temperature": temperature, "top_p": top_p}

        def work() -> None:
            try:
                self.chat(tokenizer, query, history, streamer=streamer, stopping_criteria=criteria, **kwargs)
            except BaseException as error:  # handed over: the consumer must not wait for a thread that has died
                errors.append(error)
                streamer.on_finalized_text("", stream_end=True)  # not end(): it decodes what may just have failed

        thread = threading.Thread(target=work, daemon=True)
        response = ""
        try:
            thread.start()  # in here: Ctrl-C at this moment must stop it too
            for text in streamer:
                if text:
                    response += text
                    yield response, [*(history or []), (query, response)]
            if errors:
                raise errors[0]
        finally:
            abandoned.set()
            if thread.is_alive():
                thread.join()


class _StopWhen(StoppingCriteria):
    """Ends generation at the next token once `event` is set."""

    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> Any:
        return torch.full((input_ids.shape[0],), self.event.is_set(), device=input_ids.device)


def _chat_inputs(tokenizer, query: str, history: list[tuple[str, str]] | None, meta_instruction: str | None):
    messages = [] if meta_instruction is None else [{"role": "system", "content": meta_instruction}]
    for asked, answered in history or []:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    messages.append({"role": "user", "content": query})
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)


def _stop_tokens(tokenizer, *generation_configs: Any) -> list[int]:
    """What ends a reply: the eos tokens of the first that has some, and `<eoa>`, which published configs lack."""
    eos: Any = next((config.eos_token_id for config in generation_configs if config.eos_token_id is not None), None)
    stops = set(eos if isinstance(eos, list | tuple) else [eos]) | {tokenizer.convert_tokens_to_ids("<eoa>")}
    return sorted(stops - {None, tokenizer.unk_token_id})


class InternLMForSequenceClassification(GenericForSequenceClassification, InternLMPreTrainedModel):
    _auto_class = "AutoModelForSequenceClassification"

    # The three heads build their own base model: the generic __init__ goes through AutoModel, which asks for trust.
    def __init__(self, config: InternLMConfig) -> None:
        InternLMPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = InternLMModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


class InternLMForTokenClassification(GenericForTokenClassification, InternLMPreTrainedModel):
    _auto_class = "AutoModelForTokenClassification"

    def __init__(self, config: InternLMConfig) -> None:
        InternLMPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = InternLMModel(config)
        self.dropout = nn.Dropout(getattr(config, "classifier_dropout", None) or 0.0)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


class InternLMForQuestionAnswering(GenericForQuestionAnswering, InternLMPreTrainedModel):
    _auto_class = "AutoModelForQuestionAnswering"

    def __init__(self, config: InternLMConfig) -> None:
        InternLMPreTrainedModel.__init__(self, config)
        self.model = InternLMModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()


__all__ = [
    "InternLMForCausalLM",
    "InternLMForQuestionAnswering",
    "InternLMForSequenceClassification",
    "InternLMForTokenClassification",
    "InternLMModel",
    "InternLMPreTrainedModel",
]
