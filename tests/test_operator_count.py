"""Operators of a forward: dynamic NTK adds none up to the window, and a decode step needs fewer than Llama's."""

import sys

import pytest
import torch
from transformers import DynamicCache, StaticCache

from benchmarks.counts import count_operators
from benchmarks.models import Context, Decoding, Shape, our_config, our_model, sharing_weights, twins


SHAPE = Shape(hidden=64, layers=3, heads=2, intermediate=96, vocab=128, window=32)


@pytest.fixture(scope="module")
def pair() -> dict[str, torch.nn.Module]:
    """The same weights with plain rotary and with dynamic NTK."""
    plain = our_model(SHAPE, torch.float32, rotary="origin")
    return {"origin": plain, "dynamic": sharing_weights(plain, type(plain), our_config(SHAPE))}


@torch.no_grad()
def operators(model: torch.nn.Module, past: int, new: int, static: int = 0, padded: bool = False) -> dict[str, int]:
    """Operators of a forward over `new` tokens after `past` cached ones; `static` is the length of a static cache."""
    config = model.config
    cache = StaticCache(config=config, max_cache_len=static) if static else DynamicCache(config=config)
    ids = torch.arange(2 * (past + new)).view(2, -1) % config.vocab_size
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    if past:
        model(ids[:, :past], cache=cache, attention_mask=mask[:, :past] if padded else None)
    extra = {"attention_mask": mask} if padded else {}
    return count_operators(lambda: model(ids[:, past:], cache=cache, **extra))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("past", "new", "static"),
    [(0, 32, 0), (31, 1, 0), (16, 16, 0), (8, 1, 32)],
    ids=["prompt", "token", "chunk", "static"],
)
def test_dynamic_ntk_adds_no_operator_up_to_the_window(pair, past, new, static, padded):
    counts = {name: operators(model, past, new, static, padded) for name, model in pair.items()}
    assert counts["dynamic"] == counts["origin"]


@pytest.mark.parametrize(("past", "new", "static"), [(0, 33, 0), (32, 1, 0), (8, 1, 33)])
def test_count_operators_detects_the_correction_beyond_the_window(pair, past, new, static):
    counts = {name: sum(operators(model, past, new, static).values()) for name, model in pair.items()}
    assert counts["dynamic"] > counts["origin"] > 20 * SHAPE.layers


def test_plain_rotary_adds_no_operator_beyond_the_window(pair):
    assert operators(pair["origin"], 40, 1) == operators(pair["origin"], 10, 1)


@torch.no_grad()
def test_a_decode_step_takes_at_most_60_percent_of_llamas_operators():
    ours, llama = twins(SHAPE, torch.float32)
    context = Context(ours, batch=1, length=SHAPE.window, cache="library")
    counts = {}
    for model in (ours, llama):
        side = Decoding(model, context)
        side.first_step()  # in a process's first one, linear_internlm.py measures what it gains
        counts[type(model).__name__] = sum(count_operators(side.step).values())
    assert counts["InternLMForCausalLM"] <= 0.6 * counts["LlamaForCausalLM"], counts


@torch.no_grad()
def test_a_decode_step_of_rows_without_padding_makes_no_mask(pair, monkeypatch):
    """All keys are seen. (The library's function, too, gives sdpa none then, but takes its time to find that out.)"""
    cache, calls = DynamicCache(config=pair["dynamic"].config), []
    modeling = sys.modules[type(pair["dynamic"]).__module__]
    causal_mask = modeling.causal_mask
    monkeypatch.setattr(modeling, "causal_mask", lambda *args: calls.append(args) or causal_mask(*args))
    for new in (4, 1, 1):
        pair["dynamic"](torch.ones(2, new, dtype=torch.long), cache=cache)
    assert len(calls) == 1  # for the prompt


@torch.no_grad()
def test_the_growing_cache_concatenates_nothing():
    """Four operators more than the library's cache in every layer, but none that reads the past."""
    model, counts = our_model(SHAPE, torch.float32), {}
    for kind in ("library", "growing"):
        side = Decoding(model, Context(model, batch=1, length=SHAPE.window, cache=kind))
        side.first_step()  # which grows the buffers
        counts[kind] = count_operators(side.step)
    layers = SHAPE.layers
    assert counts["library"]["aten::cat"] - counts["growing"]["aten::cat"] == 2 * layers
    assert sum(counts["growing"].values()) == sum(counts["library"].values()) + 4 * layers
