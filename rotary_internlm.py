"""The rotary embedding: stateless, and beyond the trained window a dynamic NTK that stays exact with a cache.

Dynamic NTK with L tokens in a row, M = max_position_embeddings, s = scaling_factor and d = head_dim rotates pair i of
a query or key at position p by p * inv_freq_i(L), where

    inv_freq_i(L) = base ** (-2i / d) * ratio(L) ** (-2i / (d - 2)),    ratio(L) = max(1, s * L / M - (s - 1)),

so the base grows to base * ratio ** (d / (d - 2)): for d = 128, M = 4096, base 10000 it is 10000 at L = 4096, 20221.3
at 8192 and 40889.9 at 16384. (Source: the official InternLM v1 code; the idea is bloc97's, 2023.)

The official code rotates every cached key again at every step. Here keys are cached rotated with the trained
inv_freq(M), as Llama's are, so nothing differs up to M. Two rotations add their angles: when keys can lie beyond M,
queries and the keys from the cache are rotated once more, by position * (inv_freq(L) - inv_freq(M)). This is the
*correction*. Its positions count the row's own tokens; only their differences matter, so left padding and offset
position_ids need no care.

L is each row's own: its largest position so far plus one. All tokens of one forward use the L at its end, so a prompt
that is prefilled in chunks gives each chunk the L reached with it. But up to 32 tokens that come with a mask of 4
dimensions use their own L each, so that assisted decoding, which verifies its candidates in one forward, gives the
tokens of plain decoding. (The official code takes whole prompts and single tokens; for these it is the same.)

Shapes: B batch, Q new tokens, K keys including the new ones, H heads, D head_dim.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn

from .configuration_internlm import InternLMConfig


Tables = tuple[torch.Tensor, torch.Tensor]  # cosines and sines, (B or 1, 1, positions, D), for `rotate`

# At most this many new tokens get a length L each, which costs one attention for each of them.
_MAX_OWN_LENGTHS = 32

# On a CPU, corrected scores take at most this many elements of the keys at a time: 1 MB in float32.
_CHUNK_NUMEL = 2**18


def trained_inv_freq(config: InternLMConfig, device: torch.device | str) -> torch.Tensor:
    """inv_freq(M), (D / 2,), always float32: in half precision 5000 positions keep 797 distinct angles."""
    head_dim = config.head_dim
    exponents = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    return torch.pow(config.rotary["base"], exponents).reciprocal()


def ntk_log_ratio(config: InternLMConfig, lengths: torch.Tensor) -> torch.Tensor:
    """log(inv_freq(L) / inv_freq(M)): lengths (..., 1) -> (..., D / 2), exactly 0 up to M."""
    factor, window, head_dim = config.rotary["scaling_factor"], config.max_position_embeddings, config.head_dim
    ratio = (factor * lengths.float() / window - (factor - 1)).clamp(min=1.0)
    exponents = torch.arange(0, head_dim, 2, device=lengths.device, dtype=torch.float32) / max(head_dim - 2, 1)
    return -exponents * ratio.log()


def cos_sin(positions: torch.Tensor, inv_freq: torch.Tensor, dtype: torch.dtype) -> Tables:
    """Positions (B, Q) and inv_freq (..., D / 2), broadcast to them -> tables (B, 1, Q, D).

    The angles of the first half are negative, so that its sines carry the sign that `rotate` multiplies by.
    """
    angles = (positions[..., None].float() * torch.cat((-inv_freq, inv_freq), dim=-1))[:, None]
    return angles.cos().to(dtype), angles.sin_().to(dtype)


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate pairs (i, i + D / 2) of (B, H, Q, D): Llama's rotate_half, its signs folded into `sin`."""
    return torch.addcmul(states * cos, states.roll(states.shape[-1] // 2, -1), sin)


def packed_lengths(position_ids: torch.Tensor) -> torch.Tensor:
    """Length of the sequence that each token belongs to, (B, Q), in rows that pack several (positions restart)."""
    restarts = nn.functional.pad(position_ids[:, 1:] != position_ids[:, :-1] + 1, (1, 0))
    sequence = restarts.long().cumsum(-1)
    lengths = torch.zeros_like(position_ids).scatter_reduce(1, sequence, position_ids + 1, "amax")
    return lengths.gather(1, sequence)


def key_positions(attention_mask: object, key_length: int, device: torch.device) -> torch.Tensor:
    """How many tokens of its row precede each key, (B or 1, K). Keys that no query sees get any number."""
    if not isinstance(attention_mask, torch.Tensor):
        return torch.arange(key_length, device=device)[None]
    if attention_mask.dim() == 4:  # generate makes one for a static cache; its last query sees every token so far
        seen = attention_mask[:, 0, -1]
        seen = seen if seen.dtype == torch.bool else seen >= 0
    else:
        seen = attention_mask.to(device) != 0
    seen = nn.functional.pad(seen[:, :key_length], (0, key_length - min(seen.shape[-1], key_length)))
    return (seen.long().cumsum(-1) - 1).clamp(min=0)


def rotary_tables(
    config: InternLMConfig,
    inputs_embeds: torch.Tensor,
    position_ids: torch.Tensor,
    attention_mask: object,
    causal_mask: object,
    key_length: int,
    key_source: Literal["cache", "forward", "engine"],
) -> tuple[torch.Tensor, torch.Tensor, list[Tables]]:
    """The tables of one forward, shared by all layers. Which branch is taken depends on shapes, never on values.

    Args:
        inputs_embeds: For their shape, dtype and device.
        attention_mask, causal_mask: As passed by the user, and as made from it for the attention function.
        key_length: K.
        key_source: Where attention gets its keys: from a cache, from this forward alone, or from an engine that
            manages the cache itself and passes flattened rows. An engine leaves no keys to correct and no row to
            measure, so queries and keys keep the trained inv_freq there; a longer context needs a fixed base
            (docs/long-context.md).

    Returns:
        Cosines and sines for new queries and keys, (B or 1, 1, Q, D), in the model's dtype; and the corrections,
        tables for all K keys: none up to M, else one for all new tokens or one for each of them.
    """
    inv_freq = trained_inv_freq(config, inputs_embeds.device)
    corrections = []
    if config.rotary["type"] == "dynamic" and key_length > config.max_position_embeddings:
        if key_source == "cache":
            is_4d = isinstance(causal_mask, torch.Tensor) and causal_mask.dim() == 4
            own_lengths = is_4d and inputs_embeds.shape[1] <= _MAX_OWN_LENGTHS
            lengths = (position_ids if own_lengths else position_ids.amax(-1, keepdim=True)) + 1
            deltas = inv_freq * ntk_log_ratio(config, lengths[..., None]).expm1()  # (B, 1 or Q, D / 2)
            positions = key_positions(attention_mask, key_length, inputs_embeds.device)
            corrections = [cos_sin(positions, delta, inputs_embeds.dtype) for delta in deltas.split(1, dim=1)]
        elif key_source == "forward":
            inv_freq = inv_freq * ntk_log_ratio(config, packed_lengths(position_ids)[..., None]).exp()
    return *cos_sin(position_ids, inv_freq, inputs_embeds.dtype), corrections


def corrected_attention(
    attention_interface: Callable,
    module: Any,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    attention_mask: Any,
    corrections: list[Tables],
    cache_position: torch.Tensor,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`attention_interface` on corrected queries, (B, H, Q, D), and keys, (B, H, K, D).

    Args:
        corrections: Of `rotary_tables`.
        cache_position: Which of the K keys the new tokens are, (Q,).
        kwargs: For `attention_interface`.
    """
    if len(corrections) > 1:  # one for each new token
        results = []
        for new, correction in enumerate(corrections):
            query, mask = queries[:, :, new : new + 1], attention_mask[:, :, new : new + 1]
            own = [correction], cache_position[new : new + 1]
            results.append(corrected_attention(attention_interface, module, query, keys, values, mask, *own, **kwargs))
        outputs, weights = zip(*results, strict=True)
        return torch.cat(outputs, dim=1), None if weights[0] is None else torch.cat(weights, dim=2)
    cos, sin = corrections[0]
    queries = rotate(queries, cos.index_select(2, cache_position), sin.index_select(2, cache_position))
    # Not in float16, where a product of two elements can overflow although the score does not.
    single = queries.shape[2] == 1 and (queries.dtype != torch.float16 or torch.compiler.is_compiling())
    if single and module.config._attn_implementation in ("eager", "sdpa"):
        return attend(corrected_scores(queries, keys, cos, sin) * module.scaling, values, attention_mask)
    return attention_interface(module, queries, rotate(keys, cos, sin), values, attention_mask, **kwargs)


def corrected_scores(queries: torch.Tensor, keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Products of one query, (B, H, 1, D), with keys that are rotated on the fly: (B, H, 1, K), in float32.

    To rotate a key forward is to rotate the query back, so the keys are read once and never copied. Compiled, that is
    one loop, over the half of the tables in which nothing is repeated. In eager mode a CPU takes the keys in chunks,
    so that the queries rotated back for them stay in its cache, and computes in float32, which is faster for it than
    half precision.
    """
    if torch.compiler.is_compiling():
        half = queries.shape[-1] // 2
        (q1, q2), (k1, k2) = queries.split(half, dim=-1), keys.split(half, dim=-1)
        cos, sin = cos[..., half:], sin[..., half:]
        products = k1 * (q1 * cos + q2 * sin) + k2 * (q2 * cos - q1 * sin)  # (B, H, K, D / 2)
        return products.float().sum(-1)[:, :, None]
    size = keys.shape[2]
    if keys.device.type == "cpu":
        size, queries = max(1, _CHUNK_NUMEL // keys[:, :, 0].numel()), queries.float()
    swapped = queries.roll(queries.shape[-1] // 2, -1)
    scores = []
    for k, c, s in zip(*(tensor.split(size, dim=2) for tensor in (keys, cos, sin)), strict=True):
        rotated_back = (queries * c).addcmul_(swapped, s.to(queries.dtype), value=-1)
        scores.append(rotated_back.mul_(k).sum(-1, dtype=torch.float32))
    return torch.cat(scores, dim=-1)[:, :, None]


def attend(
    scores: torch.Tensor, values: torch.Tensor, attention_mask: torch.Tensor | None, dropout: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention from its scores, (B, H, Q, K), onwards: ((B, Q, H, D), probabilities); softmax in float32."""
    largest = torch.finfo(scores.dtype).max
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, -largest)
    elif attention_mask is not None:
        scores = scores + attention_mask
    scores = scores.clamp(-largest, largest)  # float16 overflows: a row of -inf, its softmax NaN (the official clamp)
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(values.dtype)
    weights = nn.functional.dropout(weights, p=dropout)
    return torch.matmul(weights, values).transpose(1, 2).contiguous(), weights
