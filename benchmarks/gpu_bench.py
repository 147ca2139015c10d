"""The measurements of `gpu.py`: a method for each kind of case."""

import gc
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from .allocations import largest_allocation
from .counts import DeviceWork, decode_bytes, device_work, forward_flops
from .gpu_cases import (
    COMPILED_FLOOR_TARGET,
    COMPILED_ROTARY_TARGET,
    EAGER_TARGET,
    GENERATE_FLOOR_TARGET,
    GENERATE_TARGETS,
    PREFILL_FLOOR_TARGET,
    READ_TARGETS,
    SHAPES,
    STEP_ROTARY_TARGET,
    Case,
    Clock,
    missing,
)
from .models import (
    Captured,
    Context,
    Decoding,
    SidesDiffer,
    check_equal,
    generate,
    llama_config,
    new_tokens,
    our_config,
    plain_rotary,
    quantize,
    shallow_twins,
    sharing_weights,
    twins,
)
from .one_layer import OneLayer
from .report import Report, row_of
from .timing import (
    MIN_ROUNDS,
    Timing,
    alternate,
    seconds,
    steps_per_sample,
    synchronize,
    warm_up_compiler,
)


K = 1024
LEAVE_FREE = 2 * 2**30  # bytes for activations, the compiler and fragmentation
NEW_TOKENS = 65  # of `generate`; all but the first are timed
ALL_KERNELS = 10_000
SIDES = ("ours", "llama")


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
        self.models = {"ours": ours, "llama": llama, "plain_rotary": plain_rotary(ours, self.shape)}

    def length(self, case: Case) -> int:
        return case.thousands * self.unit + case.more

    def reason_to_skip(self, case: Case) -> str | None:
        """Why this case cannot run, or None."""
        if needs := missing(case):
            return needs
        twice = case.kind == "compiled" and self.beyond(self.length(case))  # two models are compiled
        if not self.clock.fits(case.kind, times=1 + twice):
            return "out of time; run it alone with --only, or raise --minutes"
        if not self.on_gpu:
            return None
        tokens = case.batch * self.length(case)
        needed, free = self.cache_gib(tokens), (torch.cuda.mem_get_info(self.device)[0] - LEAVE_FREE) / 2**30
        if needed > free:
            return f"keys and values need {needed:.0f} GiB and {max(free, 0):.0f} GiB are free"
        return None

    def cache_gib(self, tokens: int) -> float:
        """Keys and values of all layers."""
        return 2 * self.shape.layers * self.shape.hidden * tokens * torch.bfloat16.itemsize / 2**30

    @torch.no_grad()
    def run(self, case: Case) -> None:
        """Add the row of a case: its measurements, or the error with which it failed."""
        began = time.perf_counter()
        runner: Callable[[Case, int], None] = getattr(self, case.kind)
        try:
            runner(case, self.length(case))
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
        dtype = "nf4" if case.kind == "four_bit" else "bfloat16"
        facts = {"kind": case.kind, "model": self.name, "dtype": dtype, "batch": case.batch}
        return facts | {"context": self.length(case)}

    def decode_floor(self, case: Case, length: int) -> float:
        """Seconds of a decode step: its bytes over the bandwidth of a copy."""
        return decode_bytes(self.models["ours"], case.batch, length) / self.bandwidth

    def prefill_floor(self, case: Case, length: int) -> float:
        """Seconds of a prefill: its FLOP over the rate of a matrix product."""
        return forward_flops(self.models["ours"], case.batch, length, logits=1) / self.rate

    def beyond(self, length: int) -> bool:
        """Whether ours computes another function than plain rotary, Llama's."""
        return length > self.shape.window

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
        """Ours and Llama in float32 with two layers: logits of a prompt and of decode steps, and generated tokens.

        Beyond the window, where Llama is another function: the tokens of our `generate` and of its plain steps.
        """
        ours, llama = shallow_twins(*(self.models[name] for name in SIDES))
        ids, what = new_tokens(ours, case.batch, length), f"{self.name}/{case}"
        logits = [model(ids, logits_to_keep=1).logits for model in (ours, llama)]
        found = {"prompt": check_equal(*logits, f"{what}, prompt")}
        sides = [Decoding(model, Context(model, case.batch, length)) for model in (ours, llama)]
        steps = [torch.cat([side.first_step(), side.step(), side.step()]) for side in sides]
        found["decode"] = check_equal(*steps, f"{what}, decode")
        tokens = [generate(model, ids[:, : length // 2], 8) for model in (ours, llama)]
        if not torch.equal(*tokens):
            raise SidesDiffer(f"{what}: generate gives {tokens[0].tolist()} and {tokens[1].tolist()}")
        beyond = new_tokens(ours, case.batch, self.shape.window + 8)
        tokens = [generate(ours, beyond, 8, disable_compile=plainly) for plainly in (False, True)]
        if not torch.equal(*tokens):
            raise SidesDiffer(f"{what}, beyond the window: captured {tokens[0].tolist()}, plain {tokens[1].tolist()}")
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
        """The forward of one token, each side with its default cache; beyond the window also of plain rotary."""
        names = [*SIDES, "plain_rotary"] if self.beyond(length) else SIDES
        sides = self.decodings(case, length, {name: (name, "default") for name in names})
        logits, peak_gib = {}, {}
        for name, side in sides.items():
            logits[name] = self.alone(sides, name, side.first_step)
            peak_gib[name] = self.peak(side.step)
        plain = "plain_rotary" if self.beyond(length) else "ours"  # the side that computes what Llama does
        difference = self.check(logits[plain], logits["llama"], case)
        steps = steps_per_sample(self.alone(sides, "ours", partial(sides["ours"].sample, 1)), sample_seconds=0.2)
        samples = {name: partial(self.alone, sides, name, partial(side.sample, steps)) for name, side in sides.items()}
        timing = alternate(samples, self.budget)
        facts = {"floor": self.decode_floor(case, length), "peak_gib": peak_gib, "difference": difference}
        self.add(case, timing, "llama", at_least=EAGER_TARGET if case.batch == 1 else None, **facts)

    def generate(self, case: Case, length: int) -> None:
        """Time per token after the first: a whole `generate`, less one that ends with the first token.

        It includes what every call does once, such as growing the cache's buffers after the prompt.
        """
        targets = {}
        if case.batch == 1:
            targets = {"at_least": GENERATE_TARGETS.get(case.thousands), "floor_at_most": GENERATE_FLOOR_TARGET}
        models = {name: self.models[name] for name in SIDES}
        self.time_generate(case, length, models, floor=self.decode_floor(case, length), **targets)

    def generate_plain(self, case: Case, length: int) -> None:
        """The same of ours with `disable_compile=True`: a forward for each token, without a captured step."""
        models, floor = {"ours": self.models["ours"]}, self.decode_floor(case, length)
        self.time_generate(case, length, models, {"disable_compile": True}, floor=floor)

    def four_bit(self, case: Case, length: int) -> None:
        """The same of both sides with linear layers in 4 bits, quantized on the device."""
        ours = sharing_weights(self.models["ours"], type(self.models["ours"]), our_config(self.shape))
        llama = sharing_weights(self.models["ours"], type(self.models["llama"]), llama_config(self.shape))
        saved = quantize(ours, llama)
        ids = new_tokens(ours, case.batch, length // 4)
        difference = self.check(ours(ids, logits_to_keep=1).logits, llama(ids, logits_to_keep=1).logits, case)
        floor = self.decode_floor(case, length) - saved / self.bandwidth
        self.time_generate(case, length, {"ours": ours, "llama": llama}, floor=floor, difference=difference)

    def time_generate(
        self, case: Case, length: int, models: dict, settings: dict[str, Any] | None = None, **facts: Any
    ) -> None:
        new, settings = 9 if self.tiny else NEW_TOKENS, settings or {}
        ids, first = new_tokens(self.models["ours"], case.batch, length - new), {}

        def per_token(name: str) -> float:
            call = partial(generate, models[name], ids, **settings)
            first[name] = seconds(partial(call, 1), self.device)
            return (seconds(partial(call, new), self.device) - first[name]) / (new - 1)

        timing = alternate({name: partial(per_token, name) for name in models}, self.budget, max_rounds=MIN_ROUNDS)
        other = "llama" if "llama" in models else None
        self.add(case, timing, other, **facts, first_token_s=first, new_tokens=new)
        print(f"{'':24s} prompt and first token: " + ", ".join(f"{name} {s:.2f} s" for name, s in first.items()))

    # Prefill

    def prefill_calls(self, case: Case, length: int) -> dict[str, Callable[[], torch.Tensor]]:
        """A prompt into an empty cache, with logits of its last token only."""
        ids = new_tokens(self.models["ours"], case.batch, length)
        return {
            name: lambda model=self.models[name]: model(ids, logits_to_keep=1, use_cache=True).logits for name in SIDES
        }

    def prefill(self, case: Case, length: int) -> None:
        """Its time and memory: no tensor as large as (tokens, vocabulary), or as the scores or a mask, (L, L)."""
        calls, difference = self.prefill_calls(case, length), None
        if not self.beyond(length):
            difference = self.check(calls["ours"](), calls["llama"](), case)
        tokens = case.batch * length
        limit = self.shape.vocab
        if length > self.shape.intermediate:  # else the MLP's own tensors are larger than (L, L)
            limit = min(limit, length)
        limits: dict[str, tuple[float, float]] = {}
        limits["largest tensor / token"] = (largest_allocation(calls["ours"]) / tokens, limit - 1)
        gc.collect()  # caches of the calls so far would count as kept
        kept = self.cache_gib(tokens) + (torch.cuda.memory_allocated(self.device) / 2**30 if self.on_gpu else 0.0)
        peak_gib = {name: self.peak(call) for name, call in calls.items()}
        if self.on_gpu:
            logits_gib = tokens * self.shape.vocab * torch.bfloat16.itemsize / 2**30
            limits["GiB beyond weights and cache"] = (peak_gib["ours"] - kept, logits_gib)
        timing = alternate({name: partial(seconds, call, self.device) for name, call in calls.items()}, self.budget)
        facts = {"floor": self.prefill_floor(case, length), "peak_gib": peak_gib, "difference": difference}
        target = PREFILL_FLOOR_TARGET if case.batch == 1 else None
        self.add(case, timing, "llama", floor_at_most=target, limits=limits, **facts)

    # One layer beyond the window

    def read(self, case: Case, length: int) -> None:
        """Attention of one new token in one layer, with the correction, over that of torch without one."""
        layer = OneLayer(self.models["ours"], length)
        difference = layer.check(f"{self.name}/{case}")
        timing = alternate({"ours": layer.sampler(layer.ours), "plain": layer.sampler(layer.plain)}, self.budget)
        limits = {"ours / plain": (1 / timing.ratio["plain"], READ_TARGETS.get(case.thousands))}
        floor = self.cache_gib(length) * 2**30 / self.shape.layers / self.bandwidth
        self.add(case, timing, "plain", floor=floor, limits=limits, difference=difference, captured=self.on_gpu)

    # Where the time goes

    def step_kernels(self, case: Case, length: int) -> None:
        """Of an eager step: its time, and for how much of it the device works; with both kinds of growing cache.

        Beyond the window also of ours with plain rotary: what the correction costs.
        """
        kinds = {"ours": ("ours", "growing"), "llama": ("llama", "library")}
        kinds |= {"ours_library": ("ours", "library"), "llama_growing": ("llama", "growing")}
        if self.beyond(length):
            kinds["plain_rotary"] = ("plain_rotary", "growing")
        sides = self.decodings(case, length, kinds)
        samples = {name: partial(self.alone, sides, name, partial(side.sample, 4)) for name, side in sides.items()}
        timing = alternate(samples, budget=0.0)
        work = {}
        for name, side in sides.items():
            samples[name]()  # a step that starts a new cache, or is the first with it, would count that
            work[name] = device_work(side.step, self.device)
        limits = None
        if self.beyond(length):
            limits = {"device, ours / plain_rotary": (work["ours"].ms / work["plain_rotary"].ms, STEP_ROTARY_TARGET)}
        self.add_work(case, timing, work, self.decode_floor(case, length), limits=limits)

    def generate_kernels(self, case: Case, length: int) -> None:
        """The same of a token of our `generate`, without what a call does once: a longer call less a shorter one."""
        few, many = (3, 5) if self.tiny else (9, 41)
        ids = new_tokens(self.models["ours"], case.batch, length - many)
        calls = {new: partial(generate, self.models["ours"], ids, new) for new in (few, many)}

        def per_token() -> float:
            took = {new: seconds(call, self.device) for new, call in calls.items()}
            return (took[many] - took[few]) / (many - few)

        timing = alternate({"ours": per_token}, budget=0.0)
        work = {new: device_work(call, self.device, top=ALL_KERNELS) for new, call in calls.items()}
        step = work_per_token(work[few], work[many], many - few)
        self.add_work(case, timing, {"ours": step}, self.decode_floor(case, length))

    def prefill_kernels(self, case: Case, length: int) -> None:
        """The same of a prefill."""
        calls = self.prefill_calls(case, length)
        timing = alternate({name: partial(seconds, call, self.device) for name, call in calls.items()}, budget=0.0)
        work = {name: device_work(call, self.device) for name, call in calls.items()}
        self.add_work(case, timing, work, self.prefill_floor(case, length))

    def add_work(
        self, case: Case, timing: Timing, work: dict[str, DeviceWork], floor: float, limits: dict | None = None
    ) -> None:
        facts = {
            "device_ms": {name: each.ms for name, each in work.items()},
            "counted": "kernels" if self.on_gpu else "operators",
            "count": {name: each.count for name, each in work.items()},
            "top": {name: each.top[:10] for name, each in work.items()},
        }
        other = "llama" if "llama" in work else None
        self.add(case, timing, other, floor=floor, limits=limits, **facts)
        lines = ", ".join(f"{name} {each.summary}" for name, each in work.items())
        print(f"{'':24s} device: {lines} {facts['counted']}")
        for name, count, ms in work["ours"].top[:5]:
            print(f"{'':24s} {ms:9.3f} ms {count:5d} x {name[:70]}")

    # Without Python: captured and compiled

    def captured(self, case: Case, length: int) -> None:
        """Both sides' decode step over one static cache, captured as CUDA graphs without a compiler."""
        context = Context(self.models["ours"], case.batch, length, "static")
        sides, ready, difference = {}, {}, {}
        for name in SIDES:
            model = self.models[name]
            eager = Decoding(model, context).first_step()
            context.rewind()
            began = time.perf_counter()
            sides[name] = Decoding(Captured(model, context), context)
            synchronize(self.device)
            ready[name] = time.perf_counter() - began
            difference[name] = self.check(sides[name].first_step(), eager, case)
        steps = steps_per_sample(sides["ours"].sample(1), sample_seconds=0.2)
        timing = alternate({name: partial(side.sample, steps) for name, side in sides.items()}, self.budget)
        facts = {"floor": self.decode_floor(case, length), "ready_s": ready, "difference": difference}
        self.add(case, timing, "llama", captured=self.on_gpu, **facts)
        print(f"{'':24s} warm-up and capture: " + ", ".join(f"{name} {took:.2f} s" for name, took in ready.items()))

    def compiled(self, case: Case, length: int) -> None:
        """Decode with a static cache and torch.compile; beyond the window beside ours with plain rotary."""
        names = ["ours", "plain_rotary"] if self.beyond(length) else ["ours"]
        self.compile(case, length, names, COMPILED_FLOOR_TARGET if case.batch == 1 else None)

    def compiled_llama(self, case: Case, length: int) -> None:
        """The same for Llama, for comparison, without a target."""
        self.compile(case, length, ["llama"], None)

    def compile(self, case: Case, length: int, names: list[str], target: float | None) -> None:
        """With CUDA graphs, as `generate` compiles. On a CPU only torch.compile's tracing runs: a CPU's compiler has
        nothing to say about a GPU's."""
        if self.on_gpu:
            warm_up_compiler(self.device)
        how = {"mode": "reduce-overhead"} if self.on_gpu else {"backend": "eager"}
        context = Context(self.models["ours"], case.batch, length, "static")
        sides, first_call, difference, peak_gib = {}, {}, {}, {}
        for name in names:
            model = self.models[name]
            side = sides[name] = Decoding(torch.compile(model, fullgraph=True, dynamic=False, **how), context)
            context.rewind()
            first_call[name] = seconds(side.step, self.device)
            difference[name] = self.check(side.first_step(), Decoding(model, context).first_step(), case)
            for _ in range(3):  # CUDA graphs are captured in the second call
                side.step()
            peak_gib[name] = self.peak(side.step)
        steps = steps_per_sample(sides[names[0]].sample(1), sample_seconds=0.2)
        timing = alternate({name: partial(side.sample, steps) for name, side in sides.items()}, self.budget)
        facts = {"peak_gib": peak_gib, "first_call_s": first_call, "difference": difference, "how": how}
        if other := "plain_rotary" if "plain_rotary" in sides else None:
            maximum = COMPILED_ROTARY_TARGET if case.batch == 1 else None
            facts["limits"] = {"ours / plain_rotary": (1 / timing.ratio[other], maximum)}
        self.add(case, timing, other, floor=self.decode_floor(case, length), floor_at_most=target, **facts)
        print(f"{'':24s} first call: " + ", ".join(f"{name} {took:.1f} s" for name, took in first_call.items()))


def work_per_token(shorter: DeviceWork, longer: DeviceWork, tokens: int) -> DeviceWork:
    """What `tokens` more tokens add. Kernels that ran as often in both are the prompt's, whose time varies by more."""
    counts, times = Counter(), defaultdict(float)
    for sign, work in ((1, longer), (-1, shorter)):
        for name, count, ms in work.top:
            counts[name] += sign * count
            times[name] += sign * ms
    top = [(name, round(counts[name] / tokens), times[name] / tokens) for name in counts if counts[name] > 0]
    top.sort(key=lambda kernel: -kernel[2])
    return DeviceWork(sum(ms for _, _, ms in top), round(sum(counts.values()) / tokens), top)
