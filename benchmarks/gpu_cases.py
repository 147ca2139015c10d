"""What `gpu.py` runs, and in which order: shapes, cases, their targets, and the time that they take."""

import importlib.util
import time
from typing import NamedTuple

from .models import Shape


SHAPES = {
    "20b": Shape(hidden=5120, layers=60, heads=40, intermediate=13824, vocab=103168, window=4096),
    "7b": Shape(hidden=4096, layers=32, heads=32, intermediate=11008, vocab=103168, window=2048, bias=True),
    # 60 layers of nothing: a step of the 20B without its work
    "overhead": Shape(hidden=128, layers=60, heads=2, intermediate=352, vocab=512),
    "tiny": Shape(hidden=64, layers=3, heads=2, intermediate=176, vocab=512, window=256, bias=True),
}
DEFAULT_SHAPES = ["20b", "7b", "overhead"]

EAGER_TARGET = 1.3  # minimum of Llama / ours
GENERATE_TARGETS = {1: 3.5}  # minimum of Llama / ours, by context in units of 1k tokens
# maximum of ours over the floor
GENERATE_FLOOR_TARGET = 1.6
COMPILED_FLOOR_TARGET = 1.2
PREFILL_FLOOR_TARGET = 1.25
# maximum of ours over the same with plain rotary, beyond the window
STEP_ROTARY_TARGET = 1.3  # of the time in which the device works
COMPILED_ROTARY_TARGET = 1.1
READ_TARGETS = {16: 1.4}  # by context


class Case(NamedTuple):
    kind: str  # a method of Bench
    batch: int
    thousands: int  # tokens of context in units of 1k (of 1/4 window with the tiny shape)
    more: int = 0  # tokens of context besides

    def __str__(self) -> str:
        return f"{self.kind}/b{self.batch}/{self.thousands}k" + (f"+{self.more}" if self.more else "")


# In order of importance: a run that is cut short has the rows with targets. The cases that compile come late, because
# compiling a model of 60 layers takes about a minute.
MAIN = [
    Case("equality", 1, 1),
    *(Case(kind, 1, thousands) for kind in ("generate", "eager") for thousands in (1, 16)),
    Case("read", 1, 4, 64),
    Case("read", 1, 16),
    *(Case("step_kernels", 1, thousands) for thousands in (16, 1)),
    Case("generate_kernels", 1, 1),
    *(Case("prefill", 1, thousands) for thousands in (4, 16)),
]
SECOND = [
    *(Case(kind, 1, 1) for kind in ("equality", "generate", "eager", "prefill")),
    Case("generate", 1, 16),
]
OVERHEAD = [Case("eager", 1, 1)]
REST = [
    *(Case(kind, 8, 1) for kind in ("generate", "eager")),
    Case("eager", 8, 4),
    *(Case("compiled", 1, thousands) for thousands in (1, 16)),
    *(Case("generate_plain", 1, thousands) for thousands in (1, 16)),
    Case("generate", 8, 4),
    Case("generate_kernels", 1, 16),
    *(Case(kind, 1, 4) for kind in ("generate", "eager")),
    Case("prefill_kernels", 1, 16),
    *(Case("captured", 1, thousands) for thousands in (1, 16)),
    Case("prefill", 1, 1),
    *(Case("compiled_llama", 1, thousands) for thousands in (1, 16)),
    *(Case("compiled", batch, thousands) for batch, thousands in ((1, 4), (8, 1), (8, 4))),
    Case("four_bit", 1, 1),
]


def trial() -> list[Case]:
    """The main cases, and one of each other kind, except that of the library's model alone: its compiler's errors are
    not ours (4.57 with torch 2.13)."""
    others = {case.kind: case for case in reversed(REST) if case.kind != "compiled_llama"}
    return MAIN + [case for case in REST if case is others.get(case.kind) and case.kind not in {c.kind for c in MAIN}]


def plan(shapes: list[str], quick: bool) -> list[tuple[str, list[Case]]]:
    """Shapes with their cases, in the order in which they run. The 20B comes twice: the 7B precedes its last cases."""
    order = [("20b", MAIN), ("7b", SECOND), ("overhead", OVERHEAD), ("20b", REST)]
    order = [(name, cases) for name, cases in order if cases is not REST or not quick]
    order += [("tiny", trial() if quick else MAIN + REST)]
    return [(name, cases) for name, cases in order if name in shapes]


def missing(case: Case) -> str | None:
    """What a case needs and is not installed, or None."""
    if case.kind == "four_bit" and importlib.util.find_spec("bitsandbytes") is None:
        return "bitsandbytes is not installed"
    return None


class Clock:
    """Whether a case still fits into the time of the run, judged by the longest one of its kind so far."""

    def __init__(self, minutes: float) -> None:
        self.began = time.perf_counter()
        self.minutes = minutes
        self.longest: dict[str, float] = {}

    def passed(self) -> float:
        return time.perf_counter() - self.began

    def fits(self, kind: str, times: int = 1) -> bool:
        return self.passed() + times * self.longest.get(kind, 0.0) <= 60 * self.minutes

    def record(self, kind: str, took: float) -> None:
        self.longest[kind] = max(took, self.longest.get(kind, 0.0))
