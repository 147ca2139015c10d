"""Positions beyond the window follow each query's own row of the mask: branches, packed rows, padding, sliding caches.

Imported by tests/matrix_check.py.
"""

import copy
import functools
import itertools
import sys
import warnings

import pytest
import torch
import transformers
from torch.nn.attention.flex_attention import create_block_mask
from transformers import DynamicCache

from support.generation import greedy_rows, pad_left
from support.golden import assert_near, load, new_cache, one_layer, with_fixed_base


GENERATING = [*itertools.product(("eager", "sdpa", "flex_attention"), ("dynamic", "static"))]
_VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
if (5, 4) <= _VERSION < (5, 16) or (5, 19) <= _VERSION < (5, 24):
    # generate itself takes a BlockMask for a tensor: Llama fails, too (docs/compatibility.md).
    GENERATING.remove(("flex_attention", "static"))


@pytest.fixture(scope="module")
def dynamic(modeling):
    """The golden checkpoint with dynamic NTK and a window of 64."""
    return load(modeling, "tiny_20b_dynamic")


@pytest.fixture(scope="module")
def texts(dynamic):
    return torch.randint(3, dynamic.config.vocab_size, (3, 300), generator=torch.Generator().manual_seed(0))


def rows_of(mask_rows, implementation):
    """For each query the keys that it sees -> a mask (1, 1, Q, K), as that attention takes it."""
    mask = torch.zeros(len(mask_rows), max(map(max, mask_rows)) + 1, dtype=torch.bool)
    for query, seen in enumerate(mask_rows):
        mask[query, seen] = True
    if implementation == "flex_attention":
        return create_block_mask(lambda b, h, q, k: mask[q, k], 1, None, *mask.shape, device="cpu")
    mask = mask[None, None]
    return mask if implementation == "sdpa" else torch.zeros(mask.shape).masked_fill(~mask, -1e9)


@pytest.fixture(params=("eager", "sdpa", "flex_attention"))
def implementation(request):
    """Flex attention is not compiled: torch 2.13 cannot compile its masks for a CPU."""
    with torch.compiler.set_stance("force_eager"):
        yield request.param


def without_warnings_of_flex(test):
    """Of torch, that it is not compiled; and what transformers and torch tell each other is deprecated in it."""

    @functools.wraps(test)
    def quiet(**kwargs):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
            warnings.simplefilter("ignore", DeprecationWarning)
            test(**kwargs)

    return quiet


def with_attention(dynamic, implementation):
    copied = copy.deepcopy(dynamic)
    copied.set_attn_implementation(implementation)
    return copied


@without_warnings_of_flex
@pytest.mark.parametrize("branches", ((3, 2), (40, 40), (40, 25)))
@torch.no_grad()
def test_branches_in_one_forward(dynamic, texts, implementation, branches):
    """Two continuations verified at once, as EAGLE and Medusa do: each equals that continuation alone.

    More than 32 tokens share the length at the end of the longest, so the shorter of two is compared, in one layer,
    with the fixed base of that length.
    """
    dynamic = with_attention(one_layer(dynamic) if branches == (40, 25) else dynamic, implementation)
    past, prefix, start = new_cache("dynamic", dynamic), list(range(100)), 100
    dynamic(texts[:1, :100], cache=past)
    rows, positions, expected = [], [], []
    for row, count in enumerate(branches, start=1):
        rows += [prefix + list(range(start, start + new + 1)) for new in range(count)]
        start += count
        positions.append(torch.arange(100, 100 + count))
        if branches == (40, 25):
            tokens = torch.cat((texts[:1, :100], texts[row : row + 1, :count]), dim=1)
            expected.append(with_fixed_base(dynamic, 140)(tokens).logits[0, 100:])
        else:
            expected.append(dynamic(texts[row : row + 1, :count], cache=copy.deepcopy(past)).logits[0])
    logits = dynamic(
        torch.cat([texts[row, :count] for row, count in enumerate(branches, start=1)])[None],
        attention_mask=rows_of(rows, implementation),
        position_ids=torch.cat(positions)[None],
        cache=past,
    ).logits[0]
    assert_near(logits, torch.cat(expected))


@without_warnings_of_flex
@torch.no_grad()
def test_packed_rows_with_a_cache(modeling, dynamic, texts, implementation, monkeypatch):
    """Two texts in one row and one cache, kept apart by the mask: each has its own positions and length."""
    monkeypatch.setattr(
        sys.modules[modeling.new_positions.__module__], "_PAIRS", 3000
    )  # ranks are counted for a few queries at a time
    dynamic = with_attention(dynamic, implementation)
    rows_of_text, cuts = ((texts[1], 90, 130), (texts[2], 70, 120)), (0, 90, 160)
    past, alone = new_cache("dynamic", dynamic), [new_cache("dynamic", dynamic) for _ in rows_of_text]
    for step in range(2):
        tokens, places, rows, expected, start = [], [], [], [], 160 * step
        for number, (text, *ends) in enumerate(rows_of_text):
            begin, end = (0, *ends)[step : step + 2]
            cached = list(range(*cuts[number : number + 2])) if step else []
            rows += [cached + list(range(start, start + new + 1)) for new in range(end - begin)]
            start += end - begin
            tokens.append(text[begin:end])
            places.append(torch.arange(begin, end))
            expected.append(dynamic(text[None, begin:end], cache=alone[number]).logits[0])
        inputs = {"attention_mask": rows_of(rows, implementation), "position_ids": torch.cat(places)[None]}
        logits = dynamic(torch.cat(tokens)[None], cache=past, **inputs).logits[0]
        assert_near(logits, torch.cat(expected))


@without_warnings_of_flex
@pytest.mark.parametrize(("implementation", "cache"), GENERATING, indirect=["implementation"])
def test_padded_rows_across_the_window(dynamic, texts, implementation, cache):
    """generate over left-padded rows gives each row the tokens of the row without padding."""
    dynamic = with_attention(dynamic, implementation)
    rows = [texts[0, :90], texts[1, :50]]
    padded, mask = pad_left(rows, 90)
    together = greedy_rows(dynamic, padded, attention_mask=mask, cache_implementation=cache)[:, 90:]
    for row, tokens in enumerate(rows):
        assert greedy_rows(dynamic, tokens[None])[0, len(tokens) :].tolist() == together[row].tolist()


@pytest.mark.parametrize("kind", ("dynamic", "static"))
@torch.no_grad()
def test_a_cache_that_drops_what_left_its_sliding_window(dynamic, texts, kind):
    """With config.sliding_window = 16, padded rows, 10 to 100 tokens: as with a mask that hides older keys."""
    sliding = copy.deepcopy(dynamic)
    sliding.config.sliding_window = 16
    past, full = new_cache(kind, sliding, 128), DynamicCache()
    mask = torch.ones(2, 100, dtype=torch.long)
    mask[1, :7] = 0
    assert past.layers[0].is_sliding
    for start, end in ((0, 10), (10, 11), (11, 40), *((step, step + 1) for step in range(40, 100))):
        seen = mask[:, None, None, :end].bool() & (torch.arange(end) <= torch.arange(start, end)[:, None])
        if end - start == 1:
            seen &= torch.arange(end) > end - 1 - 16
        elif start:  # the library's masks let a chunk see what is still there
            seen &= torch.arange(end) > start - 16
        places = (mask.cumsum(-1) - 1).clamp(min=0)[:, start:end]
        expected = dynamic(texts[:2, start:end], attention_mask=seen, position_ids=places, cache=full).logits
        found = sliding(texts[:2, start:end], attention_mask=mask[:, :end], cache=past).logits
        real = mask[:, start:end].bool()
        assert_near(found[real], expected[real])
