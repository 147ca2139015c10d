"""Timing: seconds of a call, alternating rounds, and the rates at which the hardware copies and multiplies."""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch


def seconds(function: Callable[[], Any], device: Any = "cpu") -> float:
    """Wall time of one call."""
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: Any) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


class Timing(NamedTuple):
    """Result of `alternate`. Times are medians in ms; ratios are other / first within a round."""

    milliseconds: dict[str, float]
    ratio: dict[str, float]
    quartiles: dict[str, tuple[float, float]]
    rounds: int


MIN_ROUNDS, MAX_ROUNDS = 3, 41


def alternate(sides: dict[str, Callable[[], float]], budget: float, max_rounds: int = MAX_ROUNDS) -> Timing:
    """Time the sides alternately for about `budget` seconds; every second round runs in reverse order.

    Args:
        sides: Name -> function that runs its side once and returns the measured seconds. The first is ours.
        budget: Seconds for all rounds together; MIN_ROUNDS always run.
        max_rounds: Maximum number of rounds.
    """
    names = list(sides)
    for name in names:
        sides[name]()  # warm up
    times: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + budget
    done = 0
    while done < MIN_ROUNDS or (done < max_rounds and time.perf_counter() < end):
        for name in names if done % 2 == 0 else reversed(names):
            times[name].append(sides[name]())
        done += 1
    ratios = {n: sorted(b / a for a, b in zip(times[names[0]], times[n], strict=True)) for n in names[1:]}
    return Timing(
        milliseconds={name: 1e3 * statistics.median(values) for name, values in times.items()},
        ratio={name: statistics.median(values) for name, values in ratios.items()},
        quartiles={name: _quartiles(values) for name, values in ratios.items()},
        rounds=done,
    )


def _quartiles(values: list[float]) -> tuple[float, float]:
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def steps_per_sample(step_seconds: float, sample_seconds: float = 0.05, max_steps: int = 16) -> int:
    """How many steps to time together, so that timer resolution and scheduling do not matter."""
    return max(1, min(max_steps, math.ceil(sample_seconds / step_seconds)))


def warm_up_compiler(device: str = "cpu") -> None:
    """Compile something trivial, so that the compiler's startup does not count as compile time of the first side."""
    torch.compile(lambda x: x + 1)(torch.ones(8, device=device))


# Rates of the hardware


def copy_bandwidth(device: str = "cpu", megabytes: int = 256) -> float:
    """Bytes read and written per second by a copy of `megabytes`: best of 7."""
    source = torch.ones(megabytes * 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / min(seconds(lambda: target.copy_(source), device) for _ in range(7))


def matrix_rate(dtype: torch.dtype, device: str = "cpu", size: int = 1024) -> float:
    """FLOP per second of a square matrix product: best of 7."""
    a = torch.randn(size, size, device=device, dtype=dtype)
    b = torch.randn(size, size, device=device, dtype=dtype)
    return 2 * size**3 / min(seconds(lambda: a @ b, device) for _ in range(7))
