"""Full-size InternLM on one GPU: decode, generate and prefill of ours and transformers' Llama, against the floors.

Random bfloat16 weights are created on the device; ours and Llama share them, so that the 20B with 16k tokens of keys
and values fits into 80 GB. Needs only torch and transformers, no checkpoint and no network.

    python benchmarks/gpu.py                                     # 20B, then 7B, as far as --minutes allows
    python benchmarks/gpu.py --shapes 20b --minutes 5            # the heart of the table
    python benchmarks/gpu.py --shapes 20b --only compiled        # a subset
    python benchmarks/gpu.py --device cpu --shapes tiny --quick  # the same code on a CPU, to try it out

Cases run in order of importance. One that fails becomes a row with its error, and the next one runs; those that would
exceed --minutes are skipped and listed. The file is written after every case.
"""

import argparse
import gc
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.counts import DeviceWork, decode_bytes, device_work, forward_flops
from benchmarks.models import (
    Captured,
    Context,
    Decoding,
    Shape,
    SidesDiffer,
    check_equal,
    generate,
    new_tokens,
    shallow_twins,
    twins,
)
from benchmarks.report import QUICK_RESULTS, Report, parser, row_of, start, wanted
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
    # 60 layers of nothing: a step of the 20B without its work
    "overhead": Shape(hidden=128, layers=60, heads=2, intermediate=352, vocab=512),
    "tiny": Shape(hidden=64, layers=3, heads=2, intermediate=176, vocab=512, window=256, bias=True),
}
DEFAULT_SHAPES = ["20b", "overhead", "7b"]
K = 1024
LEAVE_FREE = 2 * 2**30  # bytes for activations, the compiler and fragmentation
NEW_TOKENS = 65  # of `generate`; all but the first are timed

EAGER_TARGET = 1.3  # minimum of Llama / ours
GENERATE_TARGETS = {1: 3.5}  # minimum of Llama / ours, by context in units of 1k tokens
# maximum of ours over the floor
GENERATE_FLOOR_TARGET = 1.6
COMPILED_FLOOR_TARGET = 1.2
PREFILL_FLOOR_TARGET = 1.25


class Case(NamedTuple):
    kind: str  # a method of Bench
    batch: int
    thousands: int  # tokens of context in units of 1k (of 1/4 window with the tiny shape)

    def __str__(self) -> str:
        return f"{self.kind}/b{self.batch}/{self.thousands}k"


# In order of importance. Estimated from single timings on an H200, the cases before the first captured one take two to
# three minutes; compiling a model of 60 layers took about one minute each time.
MAIN = [
    Case("equality", 1, 1),
    *(Case(kind, 1, thousands) for kind in ("eager", "generate", "prefill") for thousands in (1, 16)),
    *(Case(kind, 1, thousands) for kind in ("captured", "step_kernels") for thousands in (1, 16)),
    Case("prefill_kernels", 1, 16),
    Case("compiled", 1, 1),
]
OVERHEAD = [Case("eager", 1, 1)]
REST = [
    Case("compiled", 1, 16),
    Case("compiled_llama", 1, 1),
    *(Case(kind, 1, 4) for kind in ("eager", "generate", "prefill", "captured", "step_kernels", "prefill_kernels")),
    *(Case("eager", 8, thousands) for thousands in (1, 4, 16)),
    *(Case("compiled", batch, thousands) for batch, thousands in ((1, 4), (8, 1), (8, 4), (8, 16))),
    Case("compiled_llama", 1, 16),
]


class Clock:
    """Whether a case still fits into the time of the run, judged by the longest one of its kind so far."""

    def __init__(self, minutes: float) -> None:
        self.began = time.perf_counter()
        self.minutes = minutes
        self.longest: dict[str, float] = {}

    def passed(self) -> float:
        return time.perf_counter() - self.began

    def fits(self, kind: str) -> bool:
        return self.passed() + self.longest.get(kind, 0.0) <= 60 * self.minutes

    def record(self, kind: str, took: float) -> None:
        self.longest[kind] = max(took, self.longest.get(kind, 0.0))


class Bench:
    """Runs the cases of one shape on one pair of models."""

    def __init__(self, name: str, device: str, report: Report, floors: tuple[float, float], clock: Clock) -> None:
        self.name, self.shape, self.device, self.report, self.clock = name, SHAPES[name], device, report, clock
        self.bandwidth, self.rate = floors
        self.on_gpu, self.tiny = torch.device(device).type == "cuda", name == "tiny"
        self.unit = self.shape.window // 4 if self.tiny else K
        self.budget = 0.0 if report.quick and not self.on_gpu else 3.0  # seconds for the rounds of a case
        made = seconds(self.make, device)
        size = sum(p.numel() for p in self.models["ours"].parameters()) * torch.bfloat16.itemsize
        print(f"{name}: {size / 1e9:.2f} GB of bfloat16 weights made in {made:.1f} s", flush=True)

    def make(self) -> None:
        ours, llama = twins(self.shape, torch.bfloat16, self.device)
        self.models = {"ours": ours, "llama": llama}

    def reason_to_skip(self, case: Case) -> str | None:
        """Why this case cannot run, or None."""
        if not self.clock.fits(case.kind):
            return "out of time; run it alone with --only, or raise --minutes"
        if not self.on_gpu:
            return None
        tokens = case.batch * case.thousands * self.unit
        needed = 2 * self.shape.layers * self.shape.hidden * tokens * torch.bfloat16.itemsize
        free = torch.cuda.mem_get_info(self.device)[0] - LEAVE_FREE
        if needed > free:
            return f"keys and values need {needed / 2**30:.0f} GiB and {max(free, 0) / 2**30:.0f} GiB are free"
        return None

    @torch.no_grad()
    def run(self, case: Case) -> None:
        """Add the row of a case: its measurements, or the error with which it failed."""
        began = time.perf_counter()
        runner: Callable[[Case, int], None] = getattr(self, case.kind)
        try:
            runner(case, case.thousands * self.unit)
        except Exception as error:  # out of memory, a compiler's error, sides that differ: the next case can still run
            self.report.fail(f"{self.name}/{case}", error, **self.facts(case))
        self.free()  # not before the error has released what its frames hold
        self.clock.record(case.kind, time.perf_counter() - began)

    def free(self) -> None:
        """Release compiled programs, their CUDA graphs and caches before the next case."""
        torch._dynamo.reset()
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    def facts(self, case: Case) -> dict[str, Any]:
        facts = {"kind": case.kind, "model": self.name, "dtype": "bfloat16", "batch": case.batch}
        return facts | {"context": case.thousands * self.unit}

    def add(self, case: Case, timing: Timing, other: str | None = None, **facts: Any) -> None:
        row, text = row_of(f"{self.name}/{case}", timing, other, **self.facts(case), **facts)
        row["ms"] = timing.milliseconds  # of all sides, where there are more than two
        self.report.add(row, text)
        if self.on_gpu and "peak_gib" in facts:
            print(
                f"{'':24s} peak memory: " + ", ".join(f"{n} {peak:.1f} GiB" for n, peak in facts["peak_gib"].items())
            )

    def peak(self, call: Callable[[], Any]) -> float | None:
        """Peak memory in GiB during one call, including weights and cache."""
        if not self.on_gpu:
            return None
        torch.cuda.reset_peak_memory_stats(self.device)
        call()
        synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) / 2**30

    # Equality

    def equality(self, case: Case, length: int) -> None:
        """Ours and Llama in float32 with two layers: logits of a prompt and of decode steps, and generated tokens."""
        ours, llama = shallow_twins(self.models["ours"], self.models["llama"])
        ids, what = new_tokens(ours, case.batch, length), f"{self.name}/{case}"
        logits = [model(ids, logits_to_keep=1).logits for model in (ours, llama)]
        found = {"prompt": check_equal(*logits, f"{what}, prompt")}
        sides = [Decoding(model, Context(model, case.batch, length)) for model in (ours, llama)]
        steps = [torch.cat([side.first_step(), side.step(), side.step()]) for side in sides]
        found["decode"] = check_equal(*steps, f"{what}, decode")
        tokens = [generate(model, ids[:, : length // 2], 8) for model in (ours, llama)]
        if not torch.equal(*tokens):
            raise SidesDiffer(f"{what}: generate gives {tokens[0].tolist()} and {tokens[1].tolist()}")
        text = ", ".join(f"{name} {difference:.1e}" for name, difference in found.items())
        row = {"case": what, **self.facts(case), "dtype": "float32", "layers": 2, "difference": found, "verdict": "ok"}
        self.report.add(row, f"{what:40s} float32, 2 layers: {text}, allowed 1e-3, same tokens ok")

    def check(self, first: torch.Tensor, second: torch.Tensor, case: Case) -> float:
        return check_equal(first, second, f"{self.name}/{case}", self.shape.layers)

    # Decode and generate

    def decodings(self, case: Case, length: int, kinds: dict[str, tuple[str, str]]) -> dict[str, Decoding]:
        """Sides by name, from (model, kind of cache); each has its own context, which is filled at its first step."""
        return {
            name: Decoding(self.models[model], Context(self.models[model], case.batch, length, kind))
            for name, (model, kind) in kinds.items()
        }

    def alone(self, sides: dict[str, Decoding], name: str, call: Callable[[], Any]) -> Any:
        """`call` of one side, after the others' caches are dropped: two of 20 GB do not fit beside the weights."""
        for other in sides.values():
            if other is not sides[name]:
                other.context.drop()
        return call()

    def eager(self, case: Case, length: int) -> None:
        """The forward of one token, each side with its default cache."""
        sides = self.decodings(case, length, {"ours": ("ours", "default"), "llama": ("llama", "default")})
        logits, peak_gib, difference = [], {}, None
        for name, side in sides.items():
            logits.append(self.alone(sides, name, side.first_step))
            peak_gib[name] = self.peak(side.step)
        if length <= self.shape.window:  # beyond it, Llama with plain rotary is a different function
            difference = self.check(*logits, case)
        steps = steps_per_sample(self.alone(sides, "ours", partial(sides["ours"].sample, 1)), sample_seconds=0.2)
        samples = {name: partial(self.alone, sides, name, partial(side.sample, steps)) for name, side in sides.items()}
        timing = alternate(samples, self.budget)
        floor = decode_bytes(self.models["ours"], case.batch, length) / self.bandwidth
        facts = {"floor": floor, "peak_gib": peak_gib, "difference": difference}
        self.add(case, timing, "llama", at_least=EAGER_TARGET, **facts)

    def generate(self, case: Case, length: int) -> None:
        """Time per token after the first: a whole `generate`, less one that ends with the first token.

        It includes what every call does once, such as growing the cache's buffers after the prompt.
        """
        new = 9 if self.tiny else NEW_TOKENS
        ids, first = new_tokens(self.models["ours"], case.batch, length - new), {}

        def per_token(name: str) -> float:
            model = self.models[name]
            first[name] = seconds(partial(generate, model, ids, 1), self.device)
            return (seconds(partial(generate, model, ids, new), self.device) - first[name]) / (new - 1)

        timing = alternate({name: partial(per_token, name) for name in self.models}, self.budget)
        floor = decode_bytes(self.models["ours"], case.batch, length) / self.bandwidth
        targets = {"at_least": GENERATE_TARGETS.get(case.thousands), "floor_at_most": GENERATE_FLOOR_TARGET}
        self.add(case, timing, "llama", floor=floor, **targets, first_token_s=first, new_tokens=new)
        print(f"{'':24s} prompt and first token: " + ", ".join(f"{name} {s:.2f} s" for name, s in first.items()))

    # Prefill

    def prefill_calls(self, case: Case, length: int) -> dict[str, Callable[[], torch.Tensor]]:
        """A prompt into an empty cache, with logits of its last token only."""
        ids = new_tokens(self.models["ours"], case.batch, length)
        return {
            name: lambda model=model: model(ids, logits_to_keep=1, use_cache=True).logits
            for name, model in self.models.items()
        }

    def prefill(self, case: Case, length: int) -> None:
        calls, difference = self.prefill_calls(case, length), None
        if length <= self.shape.window:
            difference = self.check(calls["ours"](), calls["llama"](), case)
        peak_gib = {name: self.peak(call) for name, call in calls.items()}
        timing = alternate({name: partial(seconds, call, self.device) for name, call in calls.items()}, self.budget)
        floor = forward_flops(self.models["ours"], case.batch, length, logits=1) / self.rate
        facts = {"floor": floor, "peak_gib": peak_gib, "difference": difference}
        self.add(case, timing, "llama", floor_at_most=PREFILL_FLOOR_TARGET, **facts)

    # Where the time goes

    def step_kernels(self, case: Case, length: int) -> None:
        """Of an eager step: its time, and for how much of it the device works; with both kinds of growing cache."""
        kinds = {"ours": ("ours", "growing"), "llama": ("llama", "library")}
        kinds |= {"ours_library": ("ours", "library"), "llama_growing": ("llama", "growing")}
        sides = self.decodings(case, length, kinds)
        samples = {name: partial(self.alone, sides, name, partial(side.sample, 4)) for name, side in sides.items()}
        timing = alternate(samples, budget=0.0)
        work = {}
        for name, side in sides.items():
            samples[name]()  # a step that starts a new cache, or is the first with it, would count that
            work[name] = device_work(side.step, self.device)
        self.add_work(case, timing, work, decode_bytes(self.models["ours"], case.batch, length) / self.bandwidth)

    def prefill_kernels(self, case: Case, length: int) -> None:
        """The same of a prefill."""
        calls = self.prefill_calls(case, length)
        timing = alternate({name: partial(seconds, call, self.device) for name, call in calls.items()}, budget=0.0)
        work = {name: device_work(call, self.device) for name, call in calls.items()}
        floor = forward_flops(self.models["ours"], case.batch, length, logits=1) / self.rate
        self.add_work(case, timing, work, floor)

    def add_work(self, case: Case, timing: Timing, work: dict[str, DeviceWork], floor: float) -> None:
        facts = {
            "device_ms": {name: each.ms for name, each in work.items()},
            "counted": "kernels" if self.on_gpu else "operators",
            "count": {name: each.count for name, each in work.items()},
            "top": {name: each.top for name, each in work.items()},
        }
        self.add(case, timing, "llama", floor=floor, **facts)
        lines = ", ".join(f"{name} {each.summary}" for name, each in work.items())
        print(f"{'':24s} device: {lines} {facts['counted']}")
        for name, count, ms in work["ours"].top[:5]:
            print(f"{'':24s} {ms:9.3f} ms {count:5d} x {name[:70]}")

    # Without Python: captured and compiled

    def captured(self, case: Case, length: int) -> None:
        """Both sides' decode step over one static cache, captured as CUDA graphs without a compiler."""
        context = Context(self.models["ours"], case.batch, length, "static")
        sides, ready, difference = {}, {}, {}
        for name, model in self.models.items():
            eager = Decoding(model, context).first_step()
            context.rewind()
            began = time.perf_counter()
            sides[name] = Decoding(Captured(model, context), context)
            synchronize(self.device)
            ready[name] = time.perf_counter() - began
            difference[name] = self.check(sides[name].first_step(), eager, case)
        steps = steps_per_sample(sides["ours"].sample(1), sample_seconds=0.2)
        timing = alternate({name: partial(side.sample, steps) for name, side in sides.items()}, self.budget)
        floor = decode_bytes(self.models["ours"], case.batch, length) / self.bandwidth
        self.add(case, timing, "llama", floor=floor, ready_s=ready, captured=self.on_gpu, difference=difference)
        print(f"{'':24s} warm-up and capture: " + ", ".join(f"{name} {took:.2f} s" for name, took in ready.items()))

    def compiled(self, case: Case, length: int) -> None:
        """Decode with a static cache and torch.compile (CUDA graphs, as generate compiles)."""
        self.compile(case, length, "ours", COMPILED_FLOOR_TARGET)

    def compiled_llama(self, case: Case, length: int) -> None:
        """The same for Llama, for comparison, without a target."""
        self.compile(case, length, "llama", None)

    def compile(self, case: Case, length: int, name: str, target: float | None) -> None:
        """On a CPU only torch.compile's tracing runs: a CPU's compiler has nothing to say about a GPU's."""
        if self.on_gpu:
            warm_up_compiler(self.device)
        model, how = self.models[name], {"mode": "reduce-overhead"} if self.on_gpu else {"backend": "eager"}
        context = Context(model, case.batch, length, "static")
        context.rewind()
        side = Decoding(torch.compile(model, fullgraph=True, dynamic=False, **how), context)
        first_call = seconds(side.step, self.device)
        difference = self.check(side.first_step(), Decoding(model, context).first_step(), case)
        for _ in range(3):  # CUDA graphs are captured in the second call
            side.step()
        peak_gib = {name: self.peak(side.step)}
        steps = steps_per_sample(seconds(side.step, self.device), sample_seconds=0.2)
        timing = alternate({name: partial(side.sample, steps)}, self.budget)
        floor = decode_bytes(self.models["ours"], case.batch, length) / self.bandwidth
        facts = {"peak_gib": peak_gib, "first_call_s": first_call, "difference": difference, "how": how}
        self.add(case, timing, floor=floor, floor_at_most=target, **facts)
        print(f"{'':24s} first call {first_call:.1f} s")


def measure_floors(report: Report, device: str) -> tuple[float, float]:
    """Copy bandwidth in bytes/s and bfloat16 matrix rate in FLOP/s, at sizes that exceed every cache."""
    on_gpu = device.startswith("cuda")
    bandwidth = copy_bandwidth(device, megabytes=2048 if on_gpu else 64)
    rate = matrix_rate(torch.bfloat16, device, size=8192 if on_gpu else 512)
    report.note(copy_gb_per_s=bandwidth / 1e9, matrix_tflops=rate / 1e12)
    print(f"floors: copy {bandwidth / 1e9:.0f} GB/s, bfloat16 matrix product {rate / 1e12:.3g} TFLOP/s")
    return bandwidth, rate


def run_cases(arguments: argparse.Namespace, report: Report, clock: Clock) -> None:
    floors = measure_floors(report, arguments.device)
    for name in arguments.shapes:
        cases = OVERHEAD if name == "overhead" else MAIN if arguments.quick else MAIN + REST
        chosen = [case for case in cases if wanted(f"{name}/{case}", arguments)]
        if not chosen:
            continue
        bench = Bench(name, arguments.device, report, floors, clock)
        for case in chosen:
            reason = bench.reason_to_skip(case)
            if reason:
                print(f"{name}/{case}: skipped, {reason}", flush=True)
                report.content.setdefault("skipped", {})[f"{name}/{case}"] = reason
            else:
                bench.run(case)
        bench.models.clear()
        bench.free()


def parse(words: list[str] | None = None) -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--device", default="cuda", help='torch device (default "cuda")')
    made.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=DEFAULT_SHAPES, help="which models")
    made.add_argument("--minutes", type=float, default=10.0, help="start no case that would end after this")
    return made.parse_args(words)


def main(words: list[str] | None = None) -> int:
    """Run the benchmark; 1 if a case failed."""
    arguments = parse(words)
    clock = Clock(arguments.minutes)
    start(arguments)
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        print("gpu: skipped, torch sees no CUDA device (--device cpu --shapes tiny runs the same code on a CPU)")
        return 0
    report = Report("gpu", arguments, arguments.device)
    if not arguments.out and not arguments.device.startswith("cuda"):
        report.path = QUICK_RESULTS / "gpu.json"  # not a GPU's result, whatever the shapes
    elif not arguments.out and not report.quick:
        gpu = report.content["environment"]["gpu"].lower().replace(" ", "-")
        report.path = report.path.with_name(f"gpu-{gpu}.json")
    run_cases(arguments, report, clock)
    report.finish(remark=f"; {clock.passed():.0f} s")
    return int(report.failed)


if __name__ == "__main__":
    sys.exit(main())
