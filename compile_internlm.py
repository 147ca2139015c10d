"""What torch.compile gets on a CPU: the product of one token with a weight, as an expression that uses every core.

Such a product is bound by reading the weight. On an AMD EPYC the CPU's math library does that with one core, and
inductor's own loop, which uses all of them, takes half the time on two; on an Intel Xeon it gains less
(benchmarks/cpu.py, "compiled").

It is a mode around the layers, not a subclass of nn.Linear: bitsandbytes, GPTQ, HQQ, fine-grained FP8 and others
quantise exactly nn.Linear and silently skip subclasses. And since each layer is called as a module, hooks, replaced
forwards and offloaded weights keep working.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .compat_internlm import is_compiling


def explicit_matvec(states: torch.Tensor) -> AbstractContextManager:
    """The context in which to call linear layers on `states`, (B, Q, E)."""
    # Compilation is checked first: an export would be specialised to the number of tokens that is asked for.
    return _ExplicitMatvec() if is_compiling() and _is_one_token_on_cpu(states) else nullcontext()


class _ExplicitMatvec(TorchFunctionMode):
    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is nn.functional.linear and not kwargs:  # nn.Linear calls it so
            return _linear(*args)
        return func(*args, **(kwargs or {}))


def _linear(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    # A quantised or sharded weight is a subclass of Parameter with its own product.
    if type(weight) is not nn.Parameter or not _is_one_token_on_cpu(states):
        return nn.functional.linear(states, weight, bias)
    product = (states.float().unsqueeze(-2) * weight.float()).sum(-1)
    return (product if bias is None else product + bias).to(states.dtype)


def _is_one_token_on_cpu(states: torch.Tensor) -> bool:
    return states.device.type == "cpu" and states.shape[:-1].numel() == 1
