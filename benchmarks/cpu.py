"""Ours against transformers' Llama on the CPU, on the same weights: prefill, decode, generate, training, compile.

python benchmarks/cpu.py                       # all cases, about 9 minutes on two cores
python benchmarks/cpu.py --quick               # a trial run, about a minute
python benchmarks/cpu.py --only decode --only 256x12
"""

import itertools
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import NamedTuple

import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.counts import count_operators, decode_bytes, forward_flops
from benchmarks.models import (
    MEDIUM,
    OVERHEAD,
    REAL,
    SMALL,
    Context,
    Decoding,
    Shape,
    SidesDiffer,
    check_equal,
    generate,
    new_tokens,
    share_layers,
    train_step,
    twins,
)
from benchmarks.report import Report, dtype_name, parser, row_of, start, wanted
from benchmarks.timing import (
    MAX_ROUNDS,
    Timing,
    alternate,
    copy_bandwidth,
    matrix_rate,
    seconds,
    steps_per_sample,
    warm_up_compiler,
)


PREFILL = 512
TRAIN = 128  # tokens per row of a training step
CONTEXTS = (128, 2048, 8192)  # 8,192 tokens with one row only
NEW = 64  # tokens of a generate call, after a prompt of CONTEXTS[0]
SHARED_LAYERS = ("overhead", "overhead_generate")  # kinds in which all layers share the weights of the first


class Case(NamedTuple):
    kind: str
    shape: Shape
    dtype: torch.dtype
    batch: int
    context: int

    def __str__(self) -> str:
        return f"{self.kind}/{self.shape}/{dtype_name(self.dtype)}/b{self.batch}/{self.context}"


def cases(quick: bool) -> Iterator[Case]:
    """All cases, grouped by model."""
    for kind in ("overhead", "overhead_generate", "overhead_and_memory"):
        yield Case(kind, OVERHEAD, torch.float32, 1, 128)
    yield Case("compiled", SMALL, torch.float32, 1, 128)
    shapes, dtypes, batches = (SMALL, MEDIUM, REAL), (torch.float32, torch.bfloat16), (1, 8)
    if quick:
        shapes, dtypes, batches = (SMALL,), (torch.float32,), (1,)
    for shape, dtype in itertools.product(shapes, dtypes):
        yield Case("generate", shape, dtype, 1, CONTEXTS[0])
        yield Case("decode_one_thread", shape, dtype, 1, CONTEXTS[0])
        for batch in batches[:1] if shape == REAL else batches:
            yield Case("prefill", shape, dtype, batch, PREFILL)
            for context in CONTEXTS if batch == 1 else CONTEXTS[:2]:
                yield Case("decode", shape, dtype, batch, context)
            yield Case("train", shape, dtype, batch, TRAIN)


def decode_target(case: Case) -> float:
    """Minimum of Llama / ours. One row gains most: the past is not copied, and in float32 every core reads weights."""
    if case.batch > 1:
        return 1.0
    if case.dtype == torch.float32:
        return {128: 1.3 if case.shape == SMALL else 1.5, 2048: 1.05, 8192: 1.7}[case.context]
    return {128: 1.05, 2048: 1.05, 8192: 1.15}[case.context]


class Bench:
    """Runs cases one by one; a pair of models is kept for consecutive cases of the same model."""

    def __init__(self, report: Report, budget: float) -> None:
        self.report, self.budget = report, budget
        self.bandwidth: dict[int, float] = {}
        self.rate = {dtype: matrix_rate(dtype) for dtype in (torch.float32, torch.bfloat16)}
        self.pair_of, self.pair = None, None
        report.note(matrix_gflops={dtype_name(dtype): rate / 1e9 for dtype, rate in self.rate.items()})

    def models(self, case: Case):
        shared = case.kind in SHARED_LAYERS
        if self.pair_of != (case.shape, case.dtype, shared):
            self.pair_of, self.pair = (case.shape, case.dtype, shared), twins(case.shape, case.dtype)
            if shared:
                for model in self.pair:
                    share_layers(model)
        return self.pair

    def run(self, case: Case) -> None:
        runner: Callable[[Case], None] = getattr(self, case.kind)
        runner(case)

    def compare(
        self, case: Case, sides: dict, at_least: float, floor: float, max_rounds: int = MAX_ROUNDS, **facts
    ) -> Timing:
        timing = alternate(sides, self.budget, max_rounds=max_rounds)
        for other in timing.ratio:
            row, text = row_of(
                str(case),
                timing,
                other,
                at_least=at_least,
                floor=floor,
                kind=case.kind,
                model=str(case.shape),
                dtype=dtype_name(case.dtype),
                batch=case.batch,
                context=case.context,
                threads=torch.get_num_threads(),
                **facts,
            )
            self.report.add(row, text)
        return timing

    @torch.no_grad()
    def prefill(self, case: Case) -> None:
        """A prompt into an empty cache, with logits of its last token only, as generate does."""
        ours, llama = self.models(case)
        ids = new_tokens(ours, case.batch, case.context)
        calls = {"ours": partial(ours, ids, logits_to_keep=1), "llama": partial(llama, ids, logits_to_keep=1)}
        check_equal(calls["ours"]().logits, calls["llama"]().logits, str(case))
        floor = forward_flops(ours, case.batch, case.context, logits=1) / self.rate[case.dtype]
        self.compare(case, {name: partial(seconds, call) for name, call in calls.items()}, 1.0, floor)

    def train(self, case: Case) -> None:
        """Forward, loss and backward."""
        ours, llama = self.models(case)
        ids = new_tokens(ours, case.batch, case.context)
        calls = {"ours": partial(train_step, ours.train(), ids), "llama": partial(train_step, llama.train(), ids)}
        check_equal(calls["ours"](), calls["llama"](), str(case))
        floor = 3 * forward_flops(ours, case.batch, case.context) / self.rate[case.dtype]
        self.compare(case, {name: partial(seconds, call) for name, call in calls.items()}, 1.0, floor)
        ours.eval(), llama.eval()

    @torch.no_grad()
    def decode(
        self, case: Case, target: float | None = None, as_generate: bool = False, max_rounds: int = MAX_ROUNDS
    ) -> None:
        """One token at a time with each side's default cache, the forward only."""
        ours, llama = self.models(case)
        sides = {
            name: Decoding(model, Context(model, case.batch, case.context), as_generate)
            for name, model in (("ours", ours), ("llama", llama))
        }
        check_equal(sides["ours"].first_step(), sides["llama"].first_step(), str(case))
        steps = steps_per_sample(seconds(sides["ours"].step))
        operators = {name: sum(count_operators(side.step).values()) for name, side in sides.items()}
        samples = {name: partial(side.sample, steps) for name, side in sides.items()}
        target = decode_target(case) if target is None else target
        self.compare(case, samples, target, self.decode_floor(ours, case), max_rounds, operators=operators)
        print(f"{'':40s} operators per step: ours {operators['ours']}, llama {operators['llama']}")

    def decode_one_thread(self, case: Case) -> None:
        """The same where there is no second core to use."""
        with one_thread():
            self.decode(case, target=1.0)

    @torch.no_grad()
    def generate(self, case: Case) -> None:
        """A generate call from prompt to last token, as a user makes it, and how much of it is not the forward."""
        ours, llama = self.models(case)
        ids = new_tokens(ours, case.batch, case.context)
        if case.dtype == torch.float32 and not torch.equal(generate(ours, ids, 8), generate(llama, ids, 8)):
            raise SidesDiffer(f"{case}: the two sides generate different tokens; not timed.")
        calls = {name: partial(generate, model, ids, NEW) for name, model in (("ours", ours), ("llama", llama))}
        outside = {name: outside_forward(model, calls[name]) for name, model in (("ours", ours), ("llama", llama))}
        samples = {name: lambda call=call: seconds(call) / NEW for name, call in calls.items()}
        floor = (
            self.decode_floor(ours, case)
            + forward_flops(ours, 1, case.context, logits=1) / self.rate[case.dtype] / NEW
        )
        timing = self.compare(case, samples, 1.0, floor, outside_forward=outside, new_tokens=NEW)
        print(
            f"{'':40s} "
            + ", ".join(
                f"{name} {1e3 / ms:.1f} tokens/s, {outside[name]:.1%} outside the forward"
                for name, ms in timing.milliseconds.items()
            )
        )

    def overhead(self, case: Case, target: float = 1.2, as_generate: bool = False) -> None:
        """A decode step so small that only overhead counts.

        On one thread, as synchronising more would cost longer than a product of a few microseconds. All layers share
        one layer's weights: 10 MB of separate weights would come from memory that a rented machine shares.
        """
        with one_thread():
            self.decode(case, target, as_generate, max_rounds=121)

    def overhead_generate(self, case: Case) -> None:
        """The same, creating and passing attention mask and positions as generate does, which both sides share."""
        self.overhead(case, target=1.0, as_generate=True)

    def overhead_and_memory(self, case: Case) -> None:
        """The same with separate weights for every layer, as in a real model."""
        self.overhead(case, target=1.0)

    @torch.no_grad()
    def compiled(self, case: Case) -> None:
        """Ours with a static cache and torch.compile, against eager Llama, and against Llama compiled the same way."""
        ours, llama = self.models(case)
        static = Context(ours, case.batch, case.context, cache="static")
        sides = {
            "ours": Decoding(torch.compile(ours, fullgraph=True), static),
            "llama": Decoding(llama, Context(llama, case.batch, case.context)),
            "llama_compiled": Decoding(torch.compile(llama, fullgraph=True), static),
        }
        warm_up_compiler()
        for side in sides.values():
            side.context.rewind()  # otherwise the first call would fill the cache
        first_call = {name: seconds(side.step) for name, side in sides.items()}
        check_equal(sides["ours"].first_step(), sides["llama"].first_step(), str(case))
        steps = steps_per_sample(seconds(sides["llama"].step))
        samples = {name: partial(side.sample, steps) for name, side in sides.items()}
        pair = {name: samples[name] for name in ("ours", "llama")}
        self.compare(case, pair, 1.5, self.decode_floor(ours, case), first_call_s=first_call)
        pair = {name: samples[name] for name in ("ours", "llama_compiled")}
        self.compare(case, pair, 1.0, self.decode_floor(ours, case), first_call_s=first_call)
        print(f"{'':40s} first call: " + ", ".join(f"{name} {took:.1f} s" for name, took in first_call.items()))

    def decode_floor(self, model: torch.nn.Module, case: Case) -> float:
        """Seconds to read what a step must read, at the copy bandwidth for that size (it may fit into CPU caches)."""
        size = decode_bytes(model, case.batch, case.context)
        megabytes = max(1, min(256, 2 ** round(size / 2 / 2**20).bit_length()))
        if megabytes not in self.bandwidth:
            self.bandwidth[megabytes] = copy_bandwidth(megabytes=megabytes)
            self.report.note(copy_gb_per_s={f"{m} MB": b / 1e9 for m, b in self.bandwidth.items()})
        return size / self.bandwidth[megabytes]


@contextmanager
def one_thread() -> Iterator[None]:
    """The other cases get the threads back, also after one that failed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def outside_forward(model: torch.nn.Module, call: Callable[[], object]) -> float:
    """The share of a call's time that is not spent in the model's forward."""
    inside, forward = 0.0, model.forward

    @wraps(forward)
    def timed(*args, **kwargs):
        nonlocal inside
        begin = time.perf_counter()
        output = forward(*args, **kwargs)
        inside += time.perf_counter() - begin
        return output

    model.forward = timed
    try:
        total = seconds(call)
    finally:
        del model.forward
    return 1 - inside / total


def main() -> int:
    """Run the benchmark; 1 if a case failed."""
    arguments = parser(__doc__).parse_args()
    start(arguments)
    report = Report("cpu", arguments)
    bench = Bench(report, budget=1.0 if arguments.quick else 4.0)
    for case in cases(arguments.quick):
        if wanted(str(case), arguments):
            try:
                bench.run(case)
            except SidesDiffer as error:
                report.fail(str(case), error)
    report.finish()
    return int(report.failed)


if __name__ == "__main__":
    sys.exit(main())
