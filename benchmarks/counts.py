"""What can be counted instead of timed: bytes and FLOP of a forward, its operators and kernels, its memory."""

import itertools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch


os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # keeps the profiler's log lines out of the output


def weight_count(model: torch.nn.Module, head: bool = True) -> int:
    """Parameters that a forward multiplies by: all but the embedding table, of which it reads one row per token.

    A head that is tied to the table is multiplied by.
    """
    ends = {id(model.model.embed_tokens.weight), id(model.lm_head.weight)}
    body = sum(p.numel() for p in model.parameters() if id(p) not in ends)
    return body + (model.lm_head.weight.numel() if head else 0)


def decode_bytes(model: torch.nn.Module, batch: int, context: int) -> int:
    """Bytes that a decode step must read: every weight once, and the keys and values of the context."""
    config = model.config
    width = config.num_key_value_heads * config.head_dim
    cached = 2 * config.num_hidden_layers * batch * context * width
    return (weight_count(model) + cached) * model.dtype.itemsize


def forward_flops(model: torch.nn.Module, batch: int, length: int, logits: int | None = None) -> float:
    """FLOP of a forward over `length` new tokens: 2 per weight and token, and half of the square for causal attention.

    Args:
        logits: How many tokens of each row get logits; all of them by default.
    """
    config = model.config
    body = 2.0 * weight_count(model, head=False) * batch * length
    head = 2.0 * model.lm_head.weight.numel() * batch * (length if logits is None else logits)
    attention = 2.0 * config.num_hidden_layers * batch * length**2 * config.hidden_size
    return body + head + attention


# Operators, kernels and memory


def count_operators(function: Callable[[], Any]) -> dict[str, int]:
    """Operators that Python dispatches in one call, by name; operators called by other operators do not count."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    counts: dict[str, int] = {}
    for event in profile.events():
        parent = event.cpu_parent
        if event.name.startswith("aten::") and not (parent is not None and parent.name.startswith("aten::")):
            counts[event.name] = counts.get(event.name, 0) + 1
    return counts


class DeviceWork(NamedTuple):
    """What a device does in one call: kernels on a GPU; on a CPU its operators, those inside others included."""

    ms: float  # sum over the kernels, without the time between them
    count: int
    top: list[tuple[str, int, float]]  # name, count and ms of the kernels that take longest

    @property
    def summary(self) -> str:
        return f"{self.ms:.2f} ms in {self.count}"


def device_work(function: Callable[[], Any], device: str, top: int = 10) -> DeviceWork:
    """Profile one call.

    Raises:
        RuntimeError: The profiler recorded nothing, as where it may not read a GPU's counters.
    """
    kinds, on_gpu = torch.profiler.ProfilerActivity, torch.device(device).type == "cuda"
    with torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA] if on_gpu else [kinds.CPU]) as profile:
        function()
        if on_gpu:
            torch.cuda.synchronize(device)
    found = []
    for event in profile.key_averages():
        if on_gpu and event.device_type == torch.autograd.DeviceType.CUDA:
            found.append((event.key, event.count, event.self_device_time_total / 1e3))
        elif not on_gpu and event.key.startswith("aten::"):
            found.append((event.key, event.count, event.self_cpu_time_total / 1e3))
    if not found:
        raise RuntimeError(f"the profiler recorded no work of {device}")
    found.sort(key=lambda kernel: -kernel[2])
    shown = [(name[:100], count, round(ms, 3)) for name, count, ms in found[:top]]
    return DeviceWork(sum(ms for _, _, ms in found), sum(count for _, count, _ in found), shown)


class MemoryUse(NamedTuple):
    """Bytes that one call allocates on the CPU."""

    largest: int  # largest single allocation, including those inside an operator
    peak: int  # peak of the allocated memory, beyond what was allocated before


def memory_use(function: Callable[[], Any]) -> MemoryUse:
    """Trace every allocation of torch's CPU allocator during one call.

    A call precedes it within the profile: the profiler knows the size of freed memory only if it saw the allocation.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        function()
        with torch.profiler.record_function("measured"):
            result = function()
    events = sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    measured = itertools.dropwhile(lambda event: event.name() != "measured", events)
    sizes = [event.nbytes() for event in measured if event.name() == "[memory]"]
    del result
    held = itertools.accumulate(sizes)
    return MemoryUse(largest=max(sizes, default=0), peak=max(held, default=0))
