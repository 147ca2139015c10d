"""Where tokens and keys are in their rows: positions counted from masks, caches and position_ids.

Shapes: B batch, Q new tokens, K keys including the new ones.
"""

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_mask
from transformers.cache_utils import Cache

from .checks_internlm import check_mask
from .compat_internlm import mask_sizes


# Ranks of keys are counted for at most this many pairs of query and key at a time: 64 MB.
_PAIRS = 2**24


class Positions(NamedTuple):
    """Where the new tokens of one forward are, and which keys they get.

    Attributes:
        new: Positions of the new tokens in their rows, (B or 1, Q).
        slots: Which tokens of the cache they are, padding and dropped ones counted, (Q,).
        key_length: K.
        key_offset: Tokens of the cache before its first key, which a sliding window has dropped.
    """

    new: torch.Tensor
    slots: torch.Tensor
    key_length: int
    key_offset: int


def new_positions(
    inputs_embeds: torch.Tensor,
    attention_mask: Any,
    position_ids: torch.Tensor | None,
    cache: Cache | None,
    cache_position: torch.Tensor | None,
) -> Positions:
    """Positions as passed; else counted from a mask of 2 dimensions, or from the cache's length."""
    new, device = inputs_embeds.shape[1], inputs_embeds.device
    if cache_position is None:  # until 5.3 generate passes it
        cache_position = torch.arange(new, device=device) + (0 if cache is None else cache.get_seq_length())
    key_length, key_offset = (new, 0) if cache is None else mask_sizes(cache, cache_position)
    if attention_mask is not None and len(attention_mask.shape) == 2:
        check_mask(attention_mask, key_offset + key_length, cache)
        if position_ids is None:
            counted = padded_positions(attention_mask, key_offset + key_length, device)
            position_ids = counted.index_select(1, cache_position)
    elif position_ids is None:
        position_ids = cache_position[None]
    return Positions(position_ids.to(device), cache_position, key_length, key_offset)


def padded_positions(attention_mask: torch.Tensor | None, length: int, device: torch.device) -> torch.Tensor:
    """How many tokens precede each of the first `length` of a row, (B or 1, length). Padding gets any number.

    Args:
        attention_mask: (B, tokens), at most `length` of them; None where nothing is padding.
    """
    if attention_mask is None:
        return torch.arange(length, device=device)[None]
    tokens = attention_mask.to(device) != 0
    tokens = nn.functional.pad(tokens, (0, length - tokens.shape[-1]))
    return (tokens.long().cumsum(-1) - 1).clamp(min=0)


def packed_lengths(position_ids: torch.Tensor) -> torch.Tensor:
    """Length of the sequence that each token belongs to, (B, Q), in rows that pack several (positions restart)."""
    restarts = nn.functional.pad(position_ids[:, 1:] != position_ids[:, :-1] + 1, (1, 0))
    sequence = restarts.long().cumsum(-1)
    lengths = torch.zeros_like(position_ids).scatter_reduce(1, sequence, position_ids + 1, "amax")
    return lengths.gather(1, sequence)


def is_dense(mask: object) -> bool:
    """Whether `mask` has a row for each query: a tensor of 4 dimensions or a BlockMask."""
    return isinstance(mask, BlockMask) or (isinstance(mask, torch.Tensor) and mask.dim() == 4)


def seen_keys(mask: Any, queries: int, keys: int, device: torch.device) -> torch.Tensor:
    """Which keys each query sees, (B or 1, Q, K), from a boolean or additive tensor of 4 dimensions or a BlockMask."""
    if isinstance(mask, BlockMask):
        return create_mask(mask.mask_mod, mask.shape[0], 1, queries, keys, device=device)[:, 0]  # pyright: ignore
    seen = mask[:, 0, :, :keys]
    return seen if seen.dtype == torch.bool else seen >= 0


class SeenKeys(NamedTuple):
    """Which keys the new token of each row sees.

    Attributes:
        rows: Index of the first key, one past the last, and whether any between them is masked, (B or 1, 3), int32.
        distances: How many visible keys follow each key, (B or 1, K), int32; -1 where it is masked.
    """

    rows: torch.Tensor
    distances: torch.Tensor


def seen_keys_of(seen: torch.Tensor) -> SeenKeys:
    """`SeenKeys` of a boolean mask, (B or 1, K)."""
    keys = seen.shape[-1]
    ranks = seen.cumsum(-1, dtype=torch.int32)
    count = ranks[:, -1:]
    first = (ranks == 0).sum(-1, keepdim=True)
    end = keys - (ranks == count).sum(-1, keepdim=True) + 1
    rows = torch.cat((first, end, end - first != count), dim=-1).int()
    return SeenKeys(rows, torch.where(seen, count - ranks, -1))


def additive_mask(mask: Any, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """A BlockMask as a tensor that is added to scores, (B or 1, 1, Q, K); a tensor as it is."""
    if not isinstance(mask, BlockMask):
        return mask
    seen = seen_keys(mask, queries.shape[2], keys.shape[2], queries.device)[:, None]
    return torch.zeros_like(seen, dtype=queries.dtype).masked_fill_(~seen, torch.finfo(queries.dtype).min)


def sequences(seen: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Which position in which sequence each key has, where every query has a row of its own in the mask.

    A sequence is what begins at the same key. A row of the batch may hold several, one after another (packed rows),
    and a sequence may branch (a tree of guesses): a key has the same predecessors for every query that sees it.

    Args:
        seen: Of `seen_keys`, (B, Q, K).
        lengths: Of each query's row up to it, (B, Q).

    Returns:
        Positions of the keys, (B, K), the largest length in each key's sequence, (B, K), and in each query's, (B, Q).
        Keys that no query sees get any number.
    """
    first = seen.byte().argmax(-1)  # (B, Q), the first of equals
    positions = owners = seen.new_zeros((seen.shape[0], seen.shape[2]), dtype=torch.int32)
    rows = seen.shape[1] if torch.compiler.is_compiling() else max(1, _PAIRS // positions.numel())
    for some, beginning in zip(seen.split(rows, dim=1), first.split(rows, dim=1), strict=True):
        ranks = some.cumsum(-1, dtype=torch.int32).mul_(some)  # (B, rows, K), from 1; 0 where not seen
        positions = torch.maximum(positions, ranks.amax(1))
        owners = torch.maximum(owners, (some * beginning[..., None].int()).amax(1))
    longest = lengths.new_zeros(positions.shape).scatter_reduce(1, first, lengths, "amax")
    return (positions - 1).clamp(min=0), longest.gather(1, owners.long()), longest.gather(1, first)
