"""Full-size InternLM on one GPU: decode and prefill of ours and transformers' Llama, against the hardware's floors.

Random bfloat16 weights are created on the device; ours and Llama share them and the cache, so that the 20B with 16k
tokens of keys and values fits into 80 GB. Needs only torch and transformers, no checkpoint and no network.

    python benchmarks/gpu.py                                  # 20B and 7B, a table in under 8 minutes
    python benchmarks/gpu.py --shapes 20b --only compiled     # a subset
    python benchmarks/gpu.py --device cpu --shapes tiny       # the same code on a CPU, to try it out

Cases run in order of importance; those that would exceed --minutes are skipped and reported.
"""

import argparse
import gc
import sys
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.counts import decode_bytes, forward_flops
from benchmarks.models import Context, Decoding, Shape, check_equal, new_tokens, twins
from benchmarks.report import Report, parser, row_of, start, wanted
from benchmarks.timing import (
    Timing,
    alternate,
    copy_bandwidth,
    matrix_rate,
    seconds,
    steps_per_sample,
    synchronize,
    warm_up_compiler,
)


SHAPES = {
    "20b": Shape(hidden=5120, layers=60, heads=40, intermediate=13824, vocab=103168, window=4096),
    "7b": Shape(hidden=4096, layers=32, heads=32, intermediate=11008, vocab=103168, window=2048, bias=True),
    "tiny": Shape(hidden=64, layers=2, heads=2, intermediate=176, vocab=512, window=64),
}
K = 1024
LEAVE_FREE = 2 * 2**30  # bytes for activations, the compiler and fragmentation

# maximum of compiled decode over the byte floor, by context in units of 1k tokens
COMPILED_TARGETS = {1: 1.10, 4: 1.15, 16: 1.15}
EAGER_TARGET = 1.3  # minimum of Llama / ours
PREFILL_TARGET = 1.3  # maximum of ours over the FLOP floor


class Case(NamedTuple):
    kind: str  # prefill, eager, compiled or compiled_llama
    batch: int
    thousands: int  # tokens of context in units of 1k (of 1/4 window with the tiny shape)

    def __str__(self) -> str:
        return f"{self.kind}/b{self.batch}/{self.thousands}k"


# Cheap cases of every shape first; compiling a model of 60 layers takes about a minute each time.
CHEAP = [
    *(Case("eager", 1, thousands) for thousands in (1, 4, 16)),
    Case("prefill", 1, 4),
    Case("prefill", 1, 16),
    *(Case("eager", 8, thousands) for thousands in (1, 4, 16)),
]
COMPILED = [
    Case("compiled", 1, 1),
    Case("compiled", 1, 16),
    Case("compiled_llama", 1, 1),
    Case("compiled", 1, 4),
    Case("compiled", 8, 1),
    Case("compiled", 8, 4),
    Case("compiled", 8, 16),
    Case("compiled_llama", 1, 16),
]


class Bench:
    """Runs the cases of one shape on one pair of models."""

    def __init__(self, name: str, shape: Shape, device: str, report: Report, floors: tuple[float, float]) -> None:
        self.name, self.shape, self.device, self.report = name, shape, device, report
        self.bandwidth, self.rate = floors
        self.unit = shape.window // 4 if name == "tiny" else K
        self.slowest_compile = 0.0
        made = seconds(self.make, device)
        size = sum(p.numel() for p in self.ours.parameters()) * self.ours.dtype.itemsize
        print(f"{name}: {size / 1e9:.2f} GB of bfloat16 weights made in {made:.1f} s")

    def make(self) -> None:
        self.ours, self.llama = twins(self.shape, torch.bfloat16, self.device)

    def reason_to_skip(self, case: Case, deadline: float) -> str | None:
        """Why this case cannot run, or None."""
        if case.kind.startswith("compiled") and time.perf_counter() + self.slowest_compile > deadline:
            return "out of time; run it alone with --only, or raise --minutes"
        if not self.device.startswith("cuda"):
            return None
        tokens = case.batch * case.thousands * self.unit
        needed = 2 * self.shape.layers * self.shape.hidden * tokens * self.ours.dtype.itemsize
        free = torch.cuda.mem_get_info(self.device)[0] - LEAVE_FREE
        if needed > free:
            return f"keys and values need {needed / 2**30:.0f} GiB and {max(free, 0) / 2**30:.0f} GiB are free"
        return None

    @torch.no_grad()
    def run(self, case: Case) -> None:
        began = time.perf_counter()
        getattr(self, case.kind)(case, case.thousands * self.unit)
        self.free()
        if case.kind.startswith("compiled"):
            self.slowest_compile = max(self.slowest_compile, time.perf_counter() - began)

    def free(self) -> None:
        """Release compiled programs, their CUDA graphs and caches before the next case."""
        torch._dynamo.reset()
        gc.collect()
        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()

    def add(self, case: Case, timing: Timing, other: str | None = None, **facts) -> None:
        names = {"kind": case.kind, "model": self.name, "dtype": "bfloat16", "batch": case.batch}
        context = case.thousands * self.unit
        self.report.add(*row_of(f"{self.name}/{case}", timing, other, **names, context=context, **facts))

    def peaks(self, calls: dict) -> dict[str, float]:
        """Peak memory in GiB during one call of each side, including weights and cache."""
        if not self.device.startswith("cuda"):
            return {name: float("nan") for name in calls}
        found = {}
        for name, call in calls.items():
            torch.cuda.reset_peak_memory_stats(self.device)
            call()
            synchronize(self.device)
            found[name] = torch.cuda.max_memory_allocated(self.device) / 2**30
        print(f"{'':24s} peak memory: " + ", ".join(f"{name} {peak:.1f} GiB" for name, peak in found.items()))
        return found

    def prefill(self, case: Case, length: int) -> None:
        """A prompt into an empty cache, with logits of its last token only."""
        ids = new_tokens(self.ours, case.batch, length)
        calls = {
            "ours": lambda: self.ours(ids, logits_to_keep=1).logits,
            "llama": lambda: self.llama(ids, logits_to_keep=1).logits,
        }
        if length <= self.shape.window:  # beyond it, Llama with plain rotary is a different function
            check_equal(calls["ours"](), calls["llama"](), f"{self.name}/{case}")
        peak_gib = self.peaks(calls)
        timing = alternate({name: partial(seconds, call, self.device) for name, call in calls.items()}, budget=3.0)
        floor = forward_flops(self.ours, case.batch, length, logits=1) / self.rate
        self.add(case, timing, "llama", floor=floor, floor_at_most=PREFILL_TARGET, peak_gib=peak_gib)

    def eager(self, case: Case, length: int) -> None:
        """Decode with a growing cache."""
        context = Context(self.ours, case.batch, length)
        sides = {"ours": Decoding(self.ours, context), "llama": Decoding(self.llama, context)}
        if length <= self.shape.window:
            check_equal(sides["ours"].first_step(), sides["llama"].first_step(), f"{self.name}/{case}")
        peak_gib = self.peaks({name: side.step for name, side in sides.items()})
        steps = steps_per_sample(seconds(sides["ours"].step, self.device), sample_seconds=0.2)
        timing = alternate({name: partial(side.sample, steps) for name, side in sides.items()}, budget=3.0)
        floor = decode_bytes(self.ours, case.batch, length) / self.bandwidth
        self.add(case, timing, "llama", at_least=EAGER_TARGET, floor=floor, peak_gib=peak_gib)

    def compiled(self, case: Case, length: int) -> None:
        """Decode with a static cache and torch.compile (CUDA graphs, as generate compiles)."""
        self._compiled(case, length, "ours", self.ours, COMPILED_TARGETS[case.thousands])

    def compiled_llama(self, case: Case, length: int) -> None:
        """The same for Llama, for comparison, without a target."""
        self._compiled(case, length, "llama", self.llama, None)

    def _compiled(self, case: Case, length: int, name: str, model: torch.nn.Module, target: float | None) -> None:
        context = Context(model, case.batch, length, static=True)
        compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True, dynamic=False)
        side = Decoding(compiled, context)
        first_call = seconds(side.step, self.device)
        check_equal(side.first_step(), Decoding(model, context).first_step(), f"{self.name}/{case}")
        for _ in range(3):  # CUDA graphs are captured in the second call
            side.step()
        peak_gib = self.peaks({name: side.step})
        steps = steps_per_sample(seconds(side.step, self.device), sample_seconds=0.2)
        timing = alternate({name: partial(side.sample, steps)}, budget=2.0)
        floor = decode_bytes(self.ours, case.batch, length) / self.bandwidth
        self.add(case, timing, floor=floor, floor_at_most=target, peak_gib=peak_gib, first_call_s=first_call)
        print(f"{'':24s} first call {first_call:.1f} s")


def measure_floors(report: Report, device: str) -> tuple[float, float]:
    """Copy bandwidth in bytes/s and bfloat16 matrix rate in FLOP/s, at sizes that exceed every cache."""
    on_gpu = device.startswith("cuda")
    bandwidth = copy_bandwidth(device, megabytes=2048 if on_gpu else 64)
    rate = matrix_rate(torch.bfloat16, device, size=8192 if on_gpu else 512)
    report.note(copy_gb_per_s=bandwidth / 1e9, matrix_tflops=rate / 1e12)
    print(f"floors: copy {bandwidth / 1e9:.0f} GB/s, bfloat16 matrix product {rate / 1e12:.3g} TFLOP/s")
    return bandwidth, rate


def run_cases(cases: list[Case], names: list[str], arguments, report: Report, floors, deadline: float) -> None:
    for name in names:
        chosen = [case for case in cases if wanted(f"{name}/{case}", arguments)]
        if not chosen:
            continue
        bench = Bench(name, SHAPES[name], arguments.device, report, floors)
        for case in chosen:
            reason = bench.reason_to_skip(case, deadline)
            if reason:
                print(f"{name}/{case}: skipped, {reason}")
                report.content.setdefault("skipped", {})[f"{name}/{case}"] = reason
            else:
                bench.run(case)
        bench.ours = bench.llama = None
        bench.free()


def parse() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--device", default="cuda", help='torch device (default "cuda")')
    made.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["20b", "7b"], help="which models")
    made.add_argument("--minutes", type=float, default=8.0, help="start no case that would end after this (default 8)")
    return made.parse_args()


def main() -> None:
    began = time.perf_counter()
    arguments = parse()
    start(arguments)
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        print("gpu: skipped, torch sees no CUDA device (--device cpu --shapes tiny runs the same code on a CPU)")
        return
    report = Report("gpu", arguments, arguments.device)
    if not arguments.out and not report.quick and arguments.device.startswith("cuda"):
        gpu = report.content["environment"]["gpu"].lower().replace(" ", "-")
        report.path = report.path.with_name(f"gpu-{gpu}.json")
    floors = measure_floors(report, arguments.device)
    deadline = began + 60 * arguments.minutes
    run_cases(CHEAP, arguments.shapes, arguments, report, floors, deadline)
    warm_up_compiler(arguments.device)
    run_cases(COMPILED, arguments.shapes, arguments, report, floors, deadline)
    report.finish(remark=f"; {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
