"""What every benchmark here shares: models of equal weights, alternating timing, floors, operator counts, results.

The rules of measurement (README.md): the two sides of a comparison live in one process, share their weights tensor
by tensor, must give the same logits first, and are then timed in turns. A ratio is the median over the rounds of
(their time / our time), so 1.2 means that ours is 1.2x faster, and its spread is the interquartile range.
"""

import argparse
import atexit
import importlib
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple


os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # set before torch reads it: no log lines of the profiler

import torch
import transformers
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache


ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
QUICK_RESULTS = ROOT / "build" / "benchmarks"  # ignored by git: quick numbers are no results


# The modules in the root import each other relatively, as on the Hub, so here they are a package of their own.
_package = types.ModuleType("internlm")
_package.__path__ = [str(ROOT)]
sys.modules.setdefault("internlm", _package)
InternLMConfig = importlib.import_module("internlm.configuration_internlm").InternLMConfig
InternLMForCausalLM = importlib.import_module("internlm.modeling_internlm").InternLMForCausalLM


class Shape(NamedTuple):
    """Sizes of a model, named hidden x layers."""

    hidden: int
    layers: int
    heads: int
    intermediate: int
    vocab: int = 4096  # small, so that the head, which both sides share, cannot hide the layers
    window: int = 4096
    bias: bool = False

    def __str__(self) -> str:
        return f"{self.hidden}x{self.layers}"


SMALL = Shape(hidden=256, layers=12, heads=4, intermediate=688)
MEDIUM = Shape(hidden=1024, layers=8, heads=8, intermediate=2752)
OVERHEAD = Shape(hidden=128, layers=12, heads=2, intermediate=352, vocab=512)  # a larger head is no overhead


# Models


def our_config(shape: Shape, rotary: str = "dynamic", attention: str = "sdpa") -> InternLMConfig:
    """Ours of this shape; `rotary` is "dynamic" (NTK beyond the window) or "origin" (plain)."""
    return InternLMConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        max_position_embeddings=shape.window,
        bias=shape.bias,
        rotary={"type": rotary, "base": 10000},
        attn_implementation=attention,
    )


def llama_config(shape: Shape, attention: str = "sdpa") -> LlamaConfig:
    """The library's Llama of this shape, with plain rotary."""
    return LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        max_position_embeddings=shape.window,
        attention_bias=shape.bias,
        rms_norm_eps=1e-6,
        attn_implementation=attention,
    )


def our_model(shape: Shape, dtype: torch.dtype, device: str = "cpu", rotary: str = "dynamic") -> InternLMForCausalLM:
    """Ours with random weights, made on the device."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = InternLMForCausalLM(our_config(shape, rotary))
    finally:
        torch.set_default_dtype(before)
    if shape.bias:  # freshly initialised biases are 0 and would hide a mistake
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                torch.nn.init.normal_(parameter, std=0.02)
    return model.eval()


def sharing_weights(source: torch.nn.Module, model_class: type, config: Any) -> torch.nn.Module:
    """Another model whose parameters are the tensors of `source`: no second copy, and no chance to differ."""
    with torch.device("meta"):
        model = model_class(config)
    model.load_state_dict(source.state_dict(), assign=True)
    if hasattr(model.model, "rotary_emb"):  # Llama's buffers are not in the state dict
        model.model.rotary_emb = type(model.model.rotary_emb)(config).to(source.device)
    return model.eval()


def share_layers(model: torch.nn.Module) -> None:
    """Give every layer the weights of the first: no more than a core keeps in its own cache, whatever their number."""
    first = model.model.layers[0]
    for layer in model.model.layers[1:]:
        for name, parameter in first.named_parameters():
            module, _, own_name = name.rpartition(".")
            setattr(layer.get_submodule(module), own_name, parameter)


def twins(shape: Shape, dtype: torch.dtype, device: str = "cpu") -> tuple[InternLMForCausalLM, LlamaForCausalLM]:
    """Ours and the library's Llama on the same weights."""
    ours = our_model(shape, dtype, device)
    return ours, sharing_weights(ours, LlamaForCausalLM, llama_config(shape))


def check_equal(first: torch.Tensor, second: torch.Tensor, what: str) -> None:
    """Stop the benchmark when two sides that must agree do not: a ratio of different functions means nothing."""
    tolerance = 1e-3 if first.dtype == torch.float32 else 0.1
    scale = second.float().abs().max().clamp(min=1.0)
    difference = ((first.float() - second.float()).abs().max() / scale).item()
    if not difference < tolerance:
        raise SystemExit(f"{what}: the two sides differ by {difference:.2e} (allowed {tolerance}); not timed.")


# Workloads


def new_tokens(model: torch.nn.Module, batch: int, length: int) -> torch.Tensor:
    """Random token ids, (batch, length), the same at every call."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, model.config.vocab_size, (batch, length), generator=generator).to(model.device)


class Context:
    """A cache from which several sides decode in turns, up to `length` tokens; then it is set back, untimed.

    The cache is filled with random keys and values instead of a prefill, which would cost minutes on the CPU. The
    sides share it, so that the largest context fits into a GPU once.

    Args:
        model: Whose sizes, dtype and device the cache gets.
        batch, length: Rows, and tokens per row at the end of the decoding, where the cache starts `room` tokens less.
        static: A static cache of `length` tokens instead of a growing one.
    """

    def __init__(self, model: torch.nn.Module, batch: int, length: int, static: bool = False) -> None:
        self.model, self.batch, self.length, self.static = model, batch, length, static
        self.room = max(16, length // 16)
        self.ids = new_tokens(model, batch, 1)
        self.cache = None
        self.rewind()

    def rewind(self) -> None:
        """Set the context back to its start, with the same content every time."""
        config, device = self.model.config, self.model.device
        self.position = self.length - self.room
        if not self.static:
            self.cache = DynamicCache(config=config)
        elif self.cache is None:
            self.cache = StaticCache(config=config, max_cache_len=self.length)
        else:
            self.cache.reset()
        generator = torch.Generator(device).manual_seed(2)
        head_dim = config.hidden_size // config.num_attention_heads
        shape = (self.batch, config.num_attention_heads, self.position, head_dim)
        noise = torch.randn(shape, generator=generator, device=device, dtype=self.model.dtype)
        places = {"cache_position": torch.arange(self.position, device=device)}  # read up to 5.3 only
        for layer in range(config.num_hidden_layers):
            self.cache.update(noise, noise, layer, places)

    def arguments_of_generate(self) -> dict[str, torch.Tensor]:
        """What `generate` hands to a decode step besides the new tokens."""
        keys = self.length if self.static else self.position + 1
        mask = torch.ones(self.batch, keys, dtype=torch.long, device=self.model.device)
        mask[:, self.position + 1 :] = 0
        positions = torch.full((self.batch, 1), self.position, device=self.model.device)
        return {"attention_mask": mask, "position_ids": positions}


class Decoding:
    """One side's decode steps in a context.

    Args:
        forward: A model, or its compiled forward.
        as_generate: Hand over attention mask and position ids at each step, as `generate` does.
    """

    def __init__(self, forward: Callable, context: Context, as_generate: bool = False) -> None:
        self.forward, self.context, self.as_generate = forward, context, as_generate

    def step(self) -> torch.Tensor:
        """One new token; logits (batch, 1, vocabulary)."""
        context = self.context
        if context.position == context.length:
            context.rewind()
        extra = context.arguments_of_generate() if self.as_generate else {}
        context.position += 1
        return self.forward(input_ids=context.ids, cache=context.cache, **extra).logits

    def first_step(self) -> torch.Tensor:
        """The step at the start of the context, the same one for every side."""
        self.context.rewind()
        return self.step().clone()

    def sample(self, steps: int) -> float:
        """Seconds per step over `steps` steps, which must fit into the context's room."""
        if self.context.position + steps > self.context.length:
            self.context.rewind()
        synchronize(self.context.model.device)
        start = time.perf_counter()
        for _ in range(steps):
            self.step()
        synchronize(self.context.model.device)
        return (time.perf_counter() - start) / steps


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


def train_step(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Forward, loss and backward, without the optimizer, which is the same code on both sides. Returns the loss."""
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    model.zero_grad(set_to_none=True)
    return loss.detach()


# Timing


class Timing(NamedTuple):
    """What came of timing sides in turns. Times are medians in ms; ratios are other / first, per round."""

    milliseconds: dict[str, float]
    ratio: dict[str, float]
    quartiles: dict[str, tuple[float, float]]
    rounds: int


FEWEST_ROUNDS, MOST_ROUNDS = 3, 41


def alternate(sides: dict[str, Callable[[], float]], budget: float, most_rounds: int = MOST_ROUNDS) -> Timing:
    """Time the sides in turns for about `budget` seconds; every second round runs in reverse order.

    Args:
        sides: Name -> function that runs its side once and returns the seconds that count. The first is ours.
        budget: Seconds for all rounds together; FEWEST_ROUNDS run whatever they cost.
    """
    names = list(sides)
    for name in names:
        sides[name]()  # warm up
    times: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + budget
    done = 0
    while done < FEWEST_ROUNDS or (done < most_rounds and time.perf_counter() < end):
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


def steps_per_sample(step_seconds: float, wanted: float = 0.05, most: int = 16) -> int:
    """How many steps make a sample long enough for the clock and the scheduler."""
    return max(1, min(most, math.ceil(wanted / step_seconds)))


def warm_up_compiler(device: str = "cpu") -> None:
    """Compile something first: starting the compiler once must not count as the first side's compile time."""
    torch.compile(lambda x: x + 1)(torch.ones(8, device=device))


# Floors


def copy_bandwidth(device: str = "cpu", megabytes: int = 256) -> float:
    """Bytes per second that a copy of `megabytes` moves, reads and writes together: the best of 7."""
    source = torch.ones(megabytes * 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / min(seconds(lambda: target.copy_(source), device) for _ in range(7))


def matrix_rate(dtype: torch.dtype, device: str = "cpu", size: int = 1024) -> float:
    """FLOP per second of a square matrix product: the best of 7."""
    a = torch.randn(size, size, device=device, dtype=dtype)
    b = torch.randn(size, size, device=device, dtype=dtype)
    return 2 * size**3 / min(seconds(lambda: a @ b, device) for _ in range(7))


def weight_count(model: torch.nn.Module, head: bool = True) -> int:
    """Parameters that a forward multiplies by: all but the embedding table, of which it reads a row per token."""
    skipped = {id(model.model.embed_tokens.weight)} | (set() if head else {id(model.lm_head.weight)})
    return sum(p.numel() for p in model.parameters() if id(p) not in skipped)


def decode_bytes(model: torch.nn.Module, batch: int, context: int) -> int:
    """Bytes that one decode step must read: every weight once, and the keys and values of the context."""
    config = model.config
    kept = 2 * config.num_hidden_layers * batch * context * config.hidden_size
    return (weight_count(model) + kept) * model.dtype.itemsize


def forward_flops(model: torch.nn.Module, batch: int, length: int, logits: int | None = None) -> float:
    """FLOP of a forward over `length` new tokens: 2 per weight and token, and causal attention at half its square.

    Args:
        logits: How many tokens of each row get logits; all of them by default.
    """
    config = model.config
    body = 2.0 * weight_count(model, head=False) * batch * length
    head = 2.0 * model.lm_head.weight.numel() * batch * (length if logits is None else logits)
    attention = 2.0 * config.num_hidden_layers * batch * length**2 * config.hidden_size
    return body + head + attention


# Operators and memory


def count_operators(function: Callable[[], Any]) -> dict[str, int]:
    """Operators that Python dispatches in one call, by name; those that an operator calls inside are not counted."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    counts: dict[str, int] = {}
    for event in profile.events():
        parent = event.cpu_parent
        if event.name.startswith("aten::") and not (parent is not None and parent.name.startswith("aten::")):
            counts[event.name] = counts.get(event.name, 0) + 1
    return counts


class MemoryUse(NamedTuple):
    """Bytes that one call allocates on the CPU."""

    largest: int  # the largest single allocation, also inside an operator
    peak: int  # the most that was held at one time, beyond what was there before


def memory_use(function: Callable[[], Any]) -> MemoryUse:
    """Follow every allocation of torch's CPU allocator during one call.

    There is a call before it, because the size of what it frees is known only for what was allocated in the profile.
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


# Command line and results


def parser(description: str, epilog: str | None = None) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    made = argparse.ArgumentParser(
        description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--quick", action="store_true", help="fewer cases and rounds: a look, not a result")
    made.add_argument("--only", action="append", default=[], metavar="TEXT", help="cases whose name holds every TEXT")
    made.add_argument("--threads", type=int, help="torch threads on the CPU (default: torch's choice)")
    made.add_argument("--out", type=Path, help="result file (default: benchmarks/results, or build/ with --quick)")
    return made


def start(arguments: argparse.Namespace) -> None:
    """Apply the common options, and give torch.compile an empty cache, so that a first call really compiles."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    compiled = tempfile.TemporaryDirectory(prefix="compiled-")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = compiled.name
    os.environ["TORCHINDUCTOR_FX_GRAPH_CACHE"] = "0"
    atexit.register(compiled.cleanup)


def wanted(name: str, arguments: argparse.Namespace) -> bool:
    return all(text in name for text in arguments.only)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def environment(device: str = "cpu") -> dict[str, Any]:
    """Hardware, versions and commit: what a number means nothing without."""
    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        processor = names[0] if names else processor
    found = {
        "processor": processor,
        "cores": os.cpu_count(),
        "vector_unit": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"gpu": properties.name, "gpu_memory_gib": round(properties.total_memory / 2**30, 1)}
        found |= {"cuda": torch.version.cuda}
    return found


def commit() -> str:
    """The commit of this tree, with "+changes" when a module that is measured differs from it."""
    try:
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        modules = ("modeling_internlm.py", "configuration_internlm.py", "tokenization_internlm.py")
        changes = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", *modules], cwd=ROOT, capture_output=True)
    except OSError:
        return "unknown"
    return "unknown" if head.returncode else head.stdout.strip() + ("+changes" if changes.returncode else "")


class Report:
    """Rows of one benchmark: printed as they come, written as one JSON file at the end."""

    def __init__(self, name: str, arguments: argparse.Namespace, device: str = "cpu") -> None:
        self.quick = arguments.quick or bool(arguments.only) or "tiny" in getattr(arguments, "shapes", ())
        folder = QUICK_RESULTS if self.quick else RESULTS
        self.path = arguments.out or folder / f"{name}.json"
        self.content = {"benchmark": name, "quick": self.quick, "environment": environment(device), "rows": []}
        env = self.content["environment"]
        where = env.get("gpu") or f"{env['processor']}, {env['threads']} of {env['cores']} cores"
        print(f"{name}: {where}; torch {env['torch']}, transformers {env['transformers']}, commit {env['commit']}")

    def add(self, row: dict[str, Any], text: str) -> None:
        """Keep a row and print its text."""
        self.content["rows"].append(row)
        print(text, flush=True)

    def note(self, **facts: Any) -> None:
        """Facts about the whole run, such as the measured bandwidth."""
        self.content.update(facts)

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        shown = self.path.relative_to(ROOT) if self.path.is_relative_to(ROOT) else self.path
        print(f"written: {shown}")


def row_of(
    name: str,
    timing: Timing,
    other: str | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    floor: float | None = None,
    floor_at_most: float | None = None,
    **facts: Any,
) -> tuple[dict[str, Any], str]:
    """A row for the report and its line: the ratio `other` / first side, and the first side over its floor.

    Args:
        at_least, at_most: The target of the ratio; one of them, or neither for a row that only informs.
        floor: Seconds that the hardware needs at least for the first side's work.
        floor_at_most: The target of first side / floor.
    """
    first = next(iter(timing.milliseconds))
    times = {side: timing.milliseconds[side] for side in (first, other) if side}
    row = {"case": name, **facts, "ms": times, "rounds": timing.rounds}
    text = f"{name:40s}" + "".join(f" {side} {ms:8.2f} ms " for side, ms in times.items())
    verdicts = []
    if other is not None:
        ratio, (low, high) = timing.ratio[other], timing.quartiles[other]
        row |= {"ratio_of": f"{other} / {first}", "ratio": ratio, "ratio_quartiles": [low, high]}
        text += f" {other} / {first} {ratio:5.3f} [{low:5.3f} {high:5.3f}]"
        if at_least is not None or at_most is not None:
            verdicts.append(_verdict(ratio, low, high, at_least, at_most))
            row["target"] = f"<= {at_most:.2f}" if at_least is None else f">= {at_least:.2f}"
            text += f" {row['target']} {verdicts[-1]:6s}"
    if floor is not None:
        over = times[first] / (1e3 * floor)
        row |= {"floor_ms": 1e3 * floor, "over_floor": over, "floor_target": floor_at_most}
        text += f" floor {1e3 * floor:8.2f} ms, {over:4.2f}x"
        if floor_at_most is not None:
            verdicts.append(_verdict(over, over, over, None, floor_at_most))
            text += f" <= {floor_at_most:.2f} {verdicts[-1]:6s}"
    row["verdict"] = max(verdicts, key=VERDICTS.index) if verdicts else None
    return row, text


VERDICTS = ("ok", "noise", "MISSED")


def _verdict(value: float, low: float, high: float, at_least: float | None, at_most: float | None) -> str:
    """ "ok" when the median meets the target, "noise" when only a quartile does, else "MISSED"."""
    if at_least is not None:
        return "ok" if value >= at_least else "noise" if high >= at_least else "MISSED"
    return "ok" if value <= at_most else "noise" if low <= at_most else "MISSED"


def summarise(rows: Iterable[dict[str, Any]]) -> str:
    """One closing line: how many comparisons met their target."""
    verdicts = [row.get("verdict") for row in rows]
    return ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in VERDICTS)
