"""The cost of dynamic NTK beyond the trained window: ours against the same model with plain rotary, at equal length.

Decode steps at 0.5x, 2x, 4x and 8x of the window, eager with a growing cache and compiled with a static one, and the
prefill of a prompt of four windows. Up to the window both must run the same operators.

    python benchmarks/long_context.py              # all cases, about 4 minutes on two cores
    python benchmarks/long_context.py --quick --only eager
"""

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.counts import count_operators, decode_bytes, forward_flops, memory_use
from benchmarks.models import (
    Context,
    Decoding,
    InternLMForCausalLM,
    Shape,
    new_tokens,
    our_config,
    our_model,
    sharing_weights,
)
from benchmarks.report import Report, dtype_name, parser, row_of, start, wanted
from benchmarks.timing import alternate, copy_bandwidth, matrix_rate, seconds, steps_per_sample, warm_up_compiler


# The family's head_dim, 128, and the 20B's ratio of cache to weights: at 8x the window keys and values are as large as
# the weights (20B: 40.3 GB and 39.1 GB in bf16), at 4x half as large.
SHAPE = Shape(hidden=1024, layers=4, heads=8, intermediate=2752, window=768)
SMALLER = Shape(hidden=512, layers=6, heads=4, intermediate=1376, window=768)  # overhead counts for more
MULTIPLES = (0.5, 2, 4, 8)
PREFILL_MULTIPLE = 4
# maximum of dynamic / plain; up to the window dynamic NTK costs nothing, so 1.05 only allows for noise
TARGETS = {"eager": 1.25, "compiled": 1.1, "prefill": 1.25}
WITHIN_WINDOW = 1.05


class Case(NamedTuple):
    kind: str  # eager, compiled or prefill
    shape: Shape
    dtype: torch.dtype
    batch: int
    multiple: float

    @property
    def context(self) -> int:
        return int(self.multiple * self.shape.window)

    def __str__(self) -> str:
        return f"{self.kind}/{self.shape}/{dtype_name(self.dtype)}/b{self.batch}/{self.multiple:g}x"


def cases(quick: bool) -> Iterator[Case]:
    multiples = (0.5, 4) if quick else MULTIPLES
    for multiple in multiples:
        yield Case("eager", SHAPE, torch.float32, 1, multiple)
    yield Case("prefill", SHAPE, torch.float32, 1, PREFILL_MULTIPLE)
    for multiple in multiples:
        yield Case("compiled", SHAPE, torch.float32, 1, multiple)
    if not quick:
        yield Case("eager", SHAPE, torch.float32, 4, 4)
        for multiple in multiples:
            yield Case("eager", SHAPE, torch.bfloat16, 1, multiple)
        for multiple in multiples[1:]:
            yield Case("eager", SMALLER, torch.float32, 1, multiple)


class Bench:
    """Runs cases on the two models, which share their weights."""

    def __init__(self, report: Report, budget: float) -> None:
        self.report, self.budget = report, budget
        self.bandwidth = copy_bandwidth(megabytes=64)
        self.rate = matrix_rate(torch.float32)
        report.note(copy_gb_per_s=self.bandwidth / 1e9, matrix_gflops=self.rate / 1e9, window=SHAPE.window)

    def models(self, case: Case) -> dict[str, InternLMForCausalLM]:
        plain = our_model(case.shape, case.dtype, rotary="origin")
        return {"plain": plain, "dynamic": sharing_weights(plain, InternLMForCausalLM, our_config(case.shape))}

    @torch.no_grad()
    def run(self, case: Case) -> None:
        torch._dynamo.reset()  # a separate program for each case: no dynamic shapes because of an earlier one
        models = self.models(case)
        if case.kind == "prefill":
            self.prefill(case, models)
        else:
            self.decode(case, models)

    def compare(self, case: Case, sides: dict, floor: float, **facts) -> None:
        timing = alternate(sides, self.budget)
        row, text = row_of(
            str(case),
            timing,
            "dynamic",
            at_most=TARGETS[case.kind] if case.multiple > 1 else WITHIN_WINDOW,
            floor=floor,
            kind=case.kind,
            model=str(case.shape),
            dtype=dtype_name(case.dtype),
            batch=case.batch,
            context=case.context,
            **facts,
        )
        self.report.add(row, text)

    def decode(self, case: Case, models: dict) -> None:
        compiled = case.kind == "compiled"
        context = Context(models["plain"], case.batch, case.context, "static" if compiled else "default")
        sides = {
            name: Decoding(torch.compile(model, fullgraph=True, dynamic=False) if compiled else model, context)
            for name, model in models.items()
        }
        if compiled:
            warm_up_compiler()
        context.rewind()
        first_call = {name: seconds(side.step) for name, side in sides.items()}
        facts = {"first_call_s": first_call}
        if not compiled:
            facts["operators"] = {name: sum(count_operators(side.step).values()) for name, side in sides.items()}
        context.rewind()  # at the end, a step would refill the cache
        uses = {name: memory_use(side.step) for name, side in sides.items()}
        facts["peak_bytes"] = {name: use.peak for name, use in uses.items()}
        steps = steps_per_sample(seconds(sides["plain"].step))
        floor = decode_bytes(models["plain"], case.batch, case.context) / self.bandwidth
        self.compare(case, {name: partial(side.sample, steps) for name, side in sides.items()}, floor, **facts)
        details = [f"peak {name} {use.peak / 2**20:.1f} MiB" for name, use in uses.items()]
        details += [f"operators {name} {count}" for name, count in facts.get("operators", {}).items()]
        details += [f"first call {name} {took:.1f} s" for name, took in first_call.items() if compiled]
        print(f"{'':40s} {', '.join(details)}")

    def prefill(self, case: Case, models: dict) -> None:
        ids = new_tokens(models["plain"], case.batch, case.context)
        calls = {name: partial(model, ids, logits_to_keep=1) for name, model in models.items()}
        uses = {name: memory_use(call) for name, call in calls.items()}
        floor = forward_flops(models["plain"], case.batch, case.context, logits=1) / self.rate
        peak_bytes = {name: use.peak for name, use in uses.items()}
        sides = {name: partial(seconds, call) for name, call in calls.items()}
        self.compare(case, sides, floor, peak_bytes=peak_bytes)
        print(f"{'':40s} " + ", ".join(f"peak {name} {use.peak / 2**20:.1f} MiB" for name, use in uses.items()))


def main() -> None:
    arguments = parser(__doc__).parse_args()
    start(arguments)
    report = Report("long_context", arguments)
    bench = Bench(report, budget=1.0 if arguments.quick else 6.0)
    for case in cases(arguments.quick):
        if wanted(str(case), arguments):
            bench.run(case)
    report.finish()


if __name__ == "__main__":
    main()
