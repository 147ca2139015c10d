"""The rotary embedding: stateless, and beyond the trained window a dynamic NTK that stays exact with a cache.

Dynamic NTK with L tokens in a row, M = max_position_embeddings, s = scaling_factor and d = head_dim rotates pair i of
a query or key at position p by p * inv_freq_i(L), where

    inv_freq_i(L) = base ** (-2i / d) * ratio(L) ** (-2i / (d - 2)),    ratio(L) = max(1, s * L / M - (s - 1)),

so the base grows to base * ratio ** (d / (d - 2)): for d = 128, M = 4096, base 10000 it is 10000 at L = 4096, 20221.3
at 8192 and 40889.9 at 16384. (Source: the official InternLM v1 code; the idea is bloc97's, 2023.)

The official code rotates every cached key again at every step. Here keys are cached rotated with the trained
inv_freq(M), as Llama's are, so nothing differs up to M. Two rotations add their angles: when keys can lie beyond M,
queries and the keys from the cache are rotated once more, by position * (inv_freq(L) - inv_freq(M)). This is the
*correction*. Its positions count the row's own tokens (positions_internlm.py); only their differences matter, so left
padding and offset position_ids need no care.

L is each row's own: its largest position so far plus one. All tokens of one forward use the L at its end, so a prompt
that is prefilled in chunks gives each chunk the L reached with it. But up to 32 tokens that come with a mask of 4
dimensions use their own L each, so that assisted decoding, which verifies its candidates in one forward, gives the
tokens of plain decoding. (The official code takes whole prompts and single tokens; for these it is the same.)

Shapes: B batch, Q new tokens, K keys including the new ones, H heads, D head_dim.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .compat_internlm import ALL_ATTENTION_FUNCTIONS, is_fixed
from .configuration_internlm import InternLMConfig
from .kernels_internlm import Scratch, new_scratch, read, rotate_together, rotate_twice, usable
from .positions_internlm import (
    Positions,
    SeenKeys,
    additive_mask,
    is_dense,
    packed_lengths,
    padded_positions,
    seen_keys,
    seen_keys_of,
    sequences,
)


Tables = tuple[torch.Tensor, torch.Tensor]  # cosines and sines, (B or 1, 1, positions, D), for `rotate`
Correction = tuple[Tables, Tables]  # of queries and of keys


class KernelRead(NamedTuple):
    """Replaces the only correction where one new token's attention is one kernel (kernels_internlm.py).

    Attributes:
        seen: Which keys each row sees.
        tables: Cosines and sines of the correction by distance, (B or 1, K, D / 2), float32; None for no correction.
        scratch: Memory for the kernel.
    """

    seen: SeenKeys
    tables: tuple[torch.Tensor, torch.Tensor] | None
    scratch: Scratch


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
    # In torch.jit.trace a size is a tensor, which roll of an older torch takes only in a tuple.
    return torch.addcmul(states * cos, states.roll((states.shape[-1] // 2,), -1), sin)


def rotate_new(
    queries: torch.Tensor, keys: torch.Tensor, head_dim: int, cos: torch.Tensor, sin: torch.Tensor, corrections: list
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Rotate queries and keys of the new tokens, as their projections return them, (B, Q, E) -> (B, H, Q, D).

    Where the kernel is not, one token's are rotated together: the number of operations is what costs.

    Returns:
        Queries and keys; and, where the kernel has made the correction as well, corrected keys for attention, to which
        the queries then belong. It does for a prompt, whose queries and keys have the same tables.
    """
    rows, tokens = queries.shape[:2]
    by_kernel = usable(queries)
    if tokens == 1 and not by_kernel:
        both = torch.cat((queries, keys), dim=-1).view(rows, -1, 1, head_dim)
        queries, keys = rotate(both, cos, sin).chunk(2, dim=1)
        return queries, keys, None
    queries = queries.view(rows, tokens, -1, head_dim).transpose(1, 2)
    keys = keys.view(rows, tokens, -1, head_dim).transpose(1, 2)
    if not by_kernel:
        return rotate(queries, cos, sin), rotate(keys, cos, sin), None
    if corrections and not isinstance(corrections[0], KernelRead) and corrections[0][0] is corrections[0][1]:
        queries, keys, corrected_keys = rotate_twice(queries, keys, (cos, sin), corrections[0][0])
        return queries, keys, corrected_keys
    queries, keys = rotate_together((queries, keys), cos, sin)
    return queries, keys, None


def _rotated(states: torch.Tensor, tables: Tables) -> torch.Tensor:
    """A rotated copy."""
    return rotate_together((states,), *tables)[0] if usable(states) else rotate(states, *tables)


def rotary_tables(
    config: InternLMConfig,
    inputs_embeds: torch.Tensor,
    positions: Positions,
    attention_mask: Any,
    mask: Any,
    key_source: Literal["cache", "pages", "forward", "engine"],
) -> tuple[torch.Tensor, torch.Tensor, list[Any]]:
    """The tables of one forward, shared by all layers. Which branch is taken depends on shapes, never on values.

    Args:
        inputs_embeds: For their shape, dtype and device.
        attention_mask, mask: As passed by the user, and as the attention function gets it.
        key_source: Where attention gets its keys: from a cache; from the pages of a cache that holds the rows of many
            requests; from this forward alone; or from an engine that manages the cache itself. An engine leaves no
            keys to correct and no row to measure, so queries and keys keep the trained inv_freq there; a longer
            context needs a fixed base (docs/long-context.md).

    Returns:
        Cosines and sines for new queries and keys, (B or 1, 1, Q, D), in the model's dtype; and the corrections: none
        up to M, else one for all new tokens or one for each of them. Or a KernelRead, within M too.
    """
    inv_freq, corrections = trained_inv_freq(config, inputs_embeds.device), []
    length = mask.shape[-1] if key_source == "pages" else positions.key_offset + positions.key_length
    beyond = (
        config.rotary["type"] == "dynamic"
        and key_source != "engine"
        and not (is_fixed(length) and length <= config.max_position_embeddings)
    )
    if key_source == "cache" and _one_kernel_reads(config, inputs_embeds, mask):
        corrections = [kernel_read(config, inputs_embeds, positions, mask, beyond)]
    elif beyond:
        if key_source == "forward":
            inv_freq = inv_freq * ntk_log_ratio(config, packed_lengths(positions.new)[..., None]).exp()
        else:
            corrections = corrections_of(config, inputs_embeds, positions, attention_mask, mask, key_source == "pages")
    return *cos_sin(positions.new, inv_freq, inputs_embeds.dtype), corrections


def _one_kernel_reads(config: InternLMConfig, inputs_embeds: torch.Tensor, mask: Any) -> bool:
    """Whether attention of one new token is the kernel: where it replaces torch's, and the kernel can run.

    It is as fast as torch's without a mask, and several times as fast with one, which reads all keys, seen or not.
    And torch may choose cuDNN, which takes tens of milliseconds to prepare for each number of keys that is new to it.
    """
    single = inputs_embeds.shape[1] == 1 and (mask is None or is_dense(mask))
    if not single or config._attn_implementation != "sdpa" or not usable(inputs_embeds, compiled=True):
        return False
    return ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", None) is sdpa_attention_forward  # and not a user's own


def kernel_read(
    config: InternLMConfig, inputs_embeds: torch.Tensor, positions: Positions, mask: Any, corrected: bool
) -> KernelRead:
    """Which keys one new token sees, and the correction by their distances from it."""
    device, keys = inputs_embeds.device, positions.key_length
    if mask is None:
        seen = torch.ones((1, keys), dtype=torch.bool, device=device)
    else:
        seen = seen_keys(mask, 1, keys, device)[:, 0]
    tables = None
    if corrected:
        log_ratio = ntk_log_ratio(config, positions.new[..., None] + 1)  # (B or 1, 1, D / 2)
        distances = torch.arange(keys, device=device, dtype=torch.float32)[:, None]
        angles = distances * (trained_inv_freq(config, device) * log_ratio.expm1())
        tables = angles.cos(), angles.sin()
    scratch = new_scratch(len(inputs_embeds), config.num_attention_heads, config.head_dim, device)
    return KernelRead(seen_keys_of(seen), tables, scratch)


def corrections_of(
    config: InternLMConfig,
    inputs_embeds: torch.Tensor,
    positions: Positions,
    attention_mask: Any,
    mask: Any,
    paged: bool,
) -> list[Correction]:
    """Tables of the queries, (B, 1, Q, D), and of the keys, (B, 1, K, D): for all new tokens, or for each of them."""
    new, device, lengths = inputs_embeds.shape[1], inputs_embeds.device, positions.new + 1

    def tables(where: torch.Tensor, lengths: torch.Tensor) -> Tables:
        inv_freq = trained_inv_freq(config, device) * ntk_log_ratio(config, lengths[..., None]).expm1()
        return cos_sin(where, inv_freq, inputs_embeds.dtype)

    few = new == 1 or (is_fixed(new) and new <= _MAX_OWN_LENGTHS)
    if few and not paged and is_dense(mask) and (new > 1 or mask is attention_mask or isinstance(mask, torch.Tensor)):
        counts = seen_keys(mask, new, positions.key_length, device).cumsum(-1)  # (B, Q, K)
        return [
            (tables(count[:, -1:] - 1, length), tables((count - 1).clamp(min=0), length))
            for count, length in zip(counts.unbind(1), lengths.split(1, dim=1), strict=True)
        ]
    if is_dense(attention_mask):
        seen = seen_keys(attention_mask, new, attention_mask.shape[-1], device)
        rows = max(seen.shape[0], lengths.shape[0])
        seen, lengths = seen.expand(rows, -1, -1), lengths.expand(rows, -1)
        keys, key_lengths, lengths = sequences(seen, lengths)
        return [(tables(seen.sum(-1) - 1, lengths), tables(keys, key_lengths))]
    length, first = lengths.amax(-1, keepdim=True), positions.key_offset
    keys = padded_positions(attention_mask, first + positions.key_length, device)[:, first:]
    cos, sin = tables(keys, length)
    if is_fixed(new) and new == positions.key_length:  # the first tokens: the same tables, not a copy
        same = cos, sin
        return [(same, same)]
    slots = positions.slots - first
    return [((cos.index_select(2, slots), sin.index_select(2, slots)), (cos, sin))]


def corrected_attention(
    attention_interface: Callable,
    module: Any,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    attention_mask: Any,
    corrections: list[Any],
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`attention_interface` on corrected queries, (B, H, Q, D), and keys, (B, H, K, D).

    Args:
        corrections: Of `rotary_tables`.
        kwargs: For `attention_interface`.
    """
    if isinstance(corrections[0], KernelRead):
        return read(queries, keys, values, *corrections[0], module.scaling), None
    if len(corrections) > 1:  # one for each new token
        results = []
        attention_mask = additive_mask(attention_mask, queries, keys)
        for new, correction in enumerate(corrections):
            query, mask = queries[:, :, new : new + 1], attention_mask[:, :, new : new + 1]
            states = query, keys, values, mask
            results.append(corrected_attention(attention_interface, module, *states, [correction], **kwargs))
        outputs, weights = zip(*results, strict=True)
        return torch.cat(outputs, dim=1), None if weights[0] is None else torch.cat(weights, dim=2)
    of_queries, of_keys = corrections[0]
    queries = _rotated(queries, of_queries)
    # Not in float16, where a product of two elements can overflow although the score does not.
    single = queries.shape[2] == 1 and (queries.dtype != torch.float16 or torch.compiler.is_compiling())
    plain = attention_mask is None or isinstance(attention_mask, torch.Tensor)
    if single and plain and module.config._attn_implementation in ("eager", "sdpa", "flex_attention"):
        return attend(corrected_scores(queries, keys, *of_keys) * module.scaling, values, attention_mask)
    return attention_interface(module, queries, _rotated(keys, of_keys), values, attention_mask, **kwargs)


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
