"""How linear layers are called: one token on a CPU is multiplied by a weight that every core reads.

Such a product is bound by reading the weight, and some math libraries read it with one core: MKL does on processors of
other vendors than Intel. As a batch of slices of the weight, one for each core, it takes half the time on two. Whether
there is a core to gain is measured once. torch.compile gets the product written out and makes its own loop of it.

These are functions that call an nn.Linear, not a subclass of it: bitsandbytes, GPTQ, HQQ, fine-grained FP8 and others
quantise exactly nn.Linear and silently skip subclasses. A layer that anything has changed (a hook, a replaced forward,
an adapter, a quantised, sharded or offloaded weight) is called as the module that it is.
"""

import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.modules import module as nn_module

from .compat_internlm import is_compiling


Linear = Callable[[Any, torch.Tensor], torch.Tensor]  # a layer and its input, (B, Q, in) -> (B, Q, out)

# For more than these nothing is gained by one product, and its parts, which are not contiguous, cost more.
_FEW_TOKENS = 64
# A smaller weight has been read before a second core has started.
_MIN_NUMEL = 2**17


def linear_for(states: torch.Tensor) -> Linear:
    """How to call linear layers on `states`, (B, Q, E), and on what is computed from them."""
    if not states.is_cpu or torch.is_grad_enabled() or torch.jit.is_tracing():  # pyright: ignore
        return call
    compiling = torch.compiler.is_compiling()
    if compiling and not is_compiling():  # an export: its number of tokens must not be asked for, or it is fixed
        return call
    if states.shape[:-1].numel() != 1:
        return call
    if compiling:
        return _written_out
    gains = states.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    return _in_slices if gains and _leaves_cores_idle(torch.get_num_threads()) else call


def call(layer: Any, states: torch.Tensor) -> torch.Tensor:
    return layer(states)


def call_together(linear: Linear, layers: tuple[nn.Linear, ...], states: torch.Tensor) -> Sequence[torch.Tensor]:
    """The outputs of layers with the same input; as one product where `join_weights` has arranged their weights so."""
    few = states.is_cuda and states.shape[:-1].numel() <= _FEW_TOKENS and linear is call
    joined = _joined.get(layers[0]) if few and not torch.compiler.is_compiling() else None
    if joined is None or torch.is_grad_enabled() or not joined.holds(layers):
        return [linear(layer, states) for layer in layers]
    return nn.functional.linear(states, joined.weight, joined.bias).split(joined.sizes, dim=-1)


class _Joined:
    """Weights, (out, in), and biases of several layers, one after another in memory."""

    def __init__(self, layers: tuple[nn.Linear, ...]) -> None:
        self.sizes = [layer.out_features for layer in layers]
        self.weight = torch.cat([layer.weight.detach() for layer in layers])
        self.bias = None if layers[0].bias is None else torch.cat([layer.bias.detach() for layer in layers])
        self.addresses = []
        for index, (layer, weight) in enumerate(zip(layers, self.weight.split(self.sizes), strict=True)):
            # Through DLPack each part is a storage of its own. Parts of one storage are taken for tied weights by
            # what saves them (accelerate keeps the first only).
            layer.weight.data = torch.from_dlpack(weight)
            if self.bias is not None and layer.bias is not None:
                layer.bias.data = torch.from_dlpack(self.bias.split(self.sizes)[index])
            self.addresses.append(_address(layer))

    def holds(self, layers: tuple[nn.Linear, ...]) -> bool:
        """Whether the layers still have these weights, and calling them is a product and nothing else."""
        return all(is_plain(layer) for layer in layers) and [_address(layer) for layer in layers] == self.addresses


def _address(layer: nn.Linear) -> tuple[int, int]:
    return layer.weight.data_ptr(), 0 if layer.bias is None else layer.bias.data_ptr()


# By the first of the layers.
_joined: WeakKeyDictionary[nn.Module, _Joined] = WeakKeyDictionary()


def join_weights(model: Any) -> None:
    """Place each layer's weights of q_proj, k_proj and v_proj in one block of memory, and of gate_proj and up_proj.

    One token then takes two products where it took five, and a large product reads its weight at a higher share of the
    bandwidth. Parameters, their names and what is saved stay the same; each layer's weights are copied once.
    """
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for layers in ((attention.q_proj, attention.k_proj, attention.v_proj), (mlp.gate_proj, mlp.up_proj)):
            joined = _joined.get(layers[0])
            alike = len({(one.weight.dtype, one.weight.device, one.bias is None) for one in layers}) == 1
            if layers[0].weight.is_cuda and alike and (joined is None or not joined.holds(layers)):
                _joined.pop(layers[0], None)
                _joined[layers[0]] = _Joined(layers)
                torch.cuda.empty_cache()  # or the old blocks, which are too small for the next, would stay reserved


def _written_out(layer: Any, states: torch.Tensor) -> torch.Tensor:
    if not is_plain(layer):
        return layer(states)
    product = (states.float().unsqueeze(-2) * layer.weight).sum(-1)
    return (product if layer.bias is None else product + layer.bias).to(states.dtype)


def _in_slices(layer: Any, states: torch.Tensor) -> torch.Tensor:
    if not is_plain(layer):
        return layer(states)
    weight, bias = layer.weight, layer.bias
    if weight.numel() < _MIN_NUMEL:
        return layer(states)
    out_features, in_features = weight.shape
    slices = _slices(out_features, torch.get_num_threads())
    token, sliced = states.view(1, 1, -1).expand(slices, 1, -1), weight.view(slices, -1, in_features).transpose(1, 2)
    product = torch.bmm(token, sliced) if bias is None else torch.baddbmm(bias.view(slices, 1, -1), token, sliced)
    return product.view(*states.shape[:-1], out_features)


def is_plain(module: Any, kind: type[nn.Module] = nn.Linear) -> bool:
    """Whether calling it does what its class does and nothing else."""
    changed = type(module) is not kind or module._forward_hooks or module._forward_pre_hooks
    if changed or nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks:
        return False
    return "forward" not in module.__dict__ and (kind is not nn.Linear or type(module.weight) is nn.Parameter)


@lru_cache
def _slices(out_features: int, threads: int) -> int:
    """Into how many equal slices: one for each thread or a few more, or 1 where there is no such number."""
    return next((n for n in range(threads, 2 * threads + 1) if out_features % n == 0), 1)


@lru_cache
def _leaves_cores_idle(threads: int) -> bool:
    """Whether an nn.Linear multiplies one token by its weight with one core. Takes about 2 ms, once.

    On two cores the slices take 0.5 times as long where it does (an AMD EPYC, or MKL_CBWR=COMPATIBLE elsewhere) and
    1.0 times where it does not (an Intel Xeon). The gap is wide, so noise does not decide.
    """
    if threads == 1:
        return False
    layer, token = nn.Linear(1024, 1024, bias=False, dtype=torch.float32, device="cpu"), torch.ones(1, 1, 1024)
    times = [[_seconds(way, layer, token) for way in (call, _in_slices)] for _ in range(5)]
    whole, sliced = (min(column) for column in zip(*times, strict=True))
    return sliced < 0.75 * whole


def _seconds(linear: Linear, layer: nn.Module, states: torch.Tensor) -> float:
    start = time.perf_counter()
    linear(layer, states)
    return time.perf_counter() - start
