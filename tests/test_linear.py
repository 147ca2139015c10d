"""How linear layers are called: one token on a CPU in slices of the weight, and everything else as ever."""

import sys
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from benchmarks.counts import count_operators

from support.changes import CHANGES
from support.golden import CHECKPOINTS, assert_near, cache_of, load


@pytest.fixture
def module(modeling):
    """linear_internlm.py, as imported by `modeling`."""
    return sys.modules[modeling.InternLMModel.__module__.replace("modeling_", "linear_")]


@pytest.fixture
def linears(module, monkeypatch):
    """linear_internlm.py where the math library reads a weight with one core, and for weights of any size."""
    monkeypatch.setattr(module, "_leaves_cores_idle", lambda threads: threads > 1)
    monkeypatch.setattr(module, "_MIN_NUMEL", 0)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield module
    torch.set_num_threads(threads)


@pytest.fixture(params=CHECKPOINTS)
def model(modeling, request):
    return load(modeling, request.param)  # the 7B's attention has biases


@pytest.fixture
def ids(model):
    return torch.randint(3, model.config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))


def cached(model, ids):
    """A function that computes the token after `ids` over a cache of them."""
    past = cache_of(model(ids[:, :-1]))

    def step():
        logits = model(ids[:, -1:], past_key_values=past).logits
        past.crop(-1)
        return logits

    return step


@torch.no_grad()
def test_one_token_is_multiplied_in_slices(linears, modeling, model, ids):
    """Every product of the step, with the logits of plain products."""
    step = cached(model, ids[:1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling, "linear_for", lambda states: linears.call)
        expected, products = step(), count_operators(step)["aten::linear"]
    operators = count_operators(step)
    assert products == 7 * len(model.model.layers) + 1 and "aten::linear" not in operators
    assert operators.get("aten::bmm", 0) + operators.get("aten::baddbmm", 0) == products
    assert_near(step(), expected, atol=1e-5)


@pytest.mark.parametrize("case", ("two rows", "several tokens", "bfloat16", "gradients", "autocast", "one thread"))
def test_everything_else_is_called_as_ever(linears, model, ids, case):
    """Two rows are read by every core already, and in bfloat16 the slices gain nothing."""
    ids = ids if case == "two rows" else ids[:1]
    model = model.bfloat16() if case == "bfloat16" else model
    torch.set_num_threads(1 if case == "one thread" else 2)
    with torch.no_grad():
        step = (lambda: model(ids)) if case == "several tokens" else cached(model, ids)
    mode = nullcontext() if case == "gradients" else torch.no_grad()
    with mode, torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        operators = count_operators(step)
    assert operators["aten::linear"] == 7 * len(model.model.layers) + 1


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_whatever_changes_a_layer_is_seen(linears, modeling, model, ids, change):
    """The step in slices is the step of modules that are called, and not that of the unchanged layers."""
    step = cached(model, ids[:1])
    plain = step()
    handle = CHANGES[change](model.lm_head)
    try:
        found = step()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(modeling, "linear_for", lambda states: linears.call)
            expected = step()
    finally:
        getattr(handle, "remove", lambda: None)()
    assert_near(found, expected, atol=1e-4)
    assert not torch.allclose(found, plain, atol=0.1)


@torch.no_grad()
def test_unusual_weights(linears):
    """A transposed one, an odd number of rows, a single one."""
    states = torch.randn(1, 1, 6)
    for weight in (torch.randn(6, 8).t(), torch.randn(7, 6), torch.randn(1, 6)):
        layer = nn.Linear(6, len(weight))
        layer.weight = nn.Parameter(weight)
        assert_near(linears.linear_for(states)(layer, states), layer(states), atol=1e-6)


def test_slices_give_every_thread_one(linears):
    for threads, rows, slices in ((2, 576, 2), (3, 576, 3), (5, 576, 6), (16, 103168, 16), (4, 7, 7), (4, 11, 1)):
        assert linears._slices(rows, threads) == slices


def test_slices_are_used_only_where_they_win(module, monkeypatch):
    """Measured once for a number of threads: half the time counts as a gain, and a few percent do not."""
    for sliced, expected in ((0.5, True), (0.95, False)):
        monkeypatch.setattr(module, "_seconds", lambda linear, *_, s=sliced: 1.0 if linear is module.call else s)
        module._leaves_cores_idle.cache_clear()
        assert module._leaves_cores_idle(2) is expected and module._leaves_cores_idle(1) is False
    module._leaves_cores_idle.cache_clear()


def test_a_written_out_product_sums_in_float32(linears):
    """(1 + 2^-7)^2 - (1 + 2^-6) is 2^-14, and nothing where bfloat16 rounds the products."""
    layer = nn.Linear(2, 1, bias=False)
    layer.weight = nn.Parameter(torch.tensor([[1 + 2**-7, -1 - 2**-6]]).bfloat16())
    found = linears._written_out(layer, torch.tensor([[[1 + 2**-7, 1]]]).bfloat16())
    assert found.dtype == torch.bfloat16 and found.item() == 2**-14
