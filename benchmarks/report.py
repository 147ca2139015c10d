"""What every benchmark has: options, the environment of a run, rows with their verdicts, one result file."""

import argparse
import atexit
import json
import os
import platform
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from tools.package import MODULES, ROOT

from .timing import Timing


RESULTS = ROOT / "benchmarks" / "results"
QUICK_RESULTS = ROOT / "build" / "benchmarks"  # ignored by git: these numbers are not results


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser with the options of every benchmark; the script's docstring becomes description and epilog."""
    description, _, epilog = (doc or "").partition("\n")
    made = argparse.ArgumentParser(
        description=description, epilog=epilog.strip("\n"), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--quick", action="store_true", help="fewer cases and rounds: a trial run, not a result")
    made.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="TEXT",
        help="only cases whose name contains TEXT; repeatable, all must match",
    )
    made.add_argument("--threads", type=int, help="torch threads on the CPU (default: torch's choice)")
    made.add_argument("--out", type=Path, help="result file (default: benchmarks/results, or build/ with --quick)")
    return made


def start(arguments: argparse.Namespace) -> None:
    """Apply the common options, and give torch.compile an empty cache, so that first calls really compile."""
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
    """Hardware, versions and commit, without which a number means nothing."""
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
    if choice := os.environ.get("MKL_CBWR"):  # the path that MKL takes, which differs by the processor's vendor
        found["mkl_cbwr"] = choice
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"gpu": properties.name, "gpu_memory_gib": round(properties.total_memory / 2**30, 1)}
        found |= {"cuda": torch.version.cuda}
    return found


def commit() -> str:
    """The commit of this tree, with "+changes" if a measured module differs from it."""
    try:
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        changes = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", *MODULES], cwd=ROOT, capture_output=True)
    except OSError:
        return "unknown"
    return "unknown" if head.returncode else head.stdout.strip() + ("+changes" if changes.returncode else "")


class Report:
    """The rows of one benchmark: printed as they are added, and the result file written with each of them."""

    def __init__(self, name: str, arguments: argparse.Namespace, device: str = "cpu") -> None:
        self.quick = arguments.quick or bool(arguments.only) or "tiny" in getattr(arguments, "shapes", ())
        folder = QUICK_RESULTS if self.quick else RESULTS
        self.path = arguments.out or folder / f"{name}.json"
        self.content = {"benchmark": name, "quick": self.quick, "environment": environment(device), "rows": []}
        env = self.content["environment"]
        where = env.get("gpu") or f"{env['processor']}, {env['threads']} of {env['cores']} cores"
        print(f"{name}: {where}; torch {env['torch']}, transformers {env['transformers']}, commit {env['commit']}")

    def add(self, row: dict[str, Any], text: str) -> None:
        """Add a row, print its line and write the file: a run that is cut short leaves the rows that it has."""
        self.content["rows"].append(row)
        print(text, flush=True)
        self.write()

    def fail(self, name: str, error: Exception, **facts: Any) -> None:
        """Add a row for a case that could not be measured, with the reason."""
        reason = f"{type(error).__name__}: {error}"[:500]
        text = f"{name:40s} FAILED {' '.join(reason.split())[:200]}"
        self.add({"case": name, **facts, "error": reason, "verdict": "FAILED"}, text)

    @property
    def failed(self) -> bool:
        return any(row.get("verdict") == "FAILED" for row in self.content["rows"])

    def note(self, **facts: Any) -> None:
        """Add facts about the whole run, such as the measured bandwidth."""
        self.content.update(facts)

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")

    def finish(self, remark: str = "") -> None:
        """Print how many comparisons met their target, and write the result file."""
        verdicts = [row.get("verdict") for row in self.content["rows"]]
        print(", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in VERDICTS) + remark)
        self.write()
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
    limits: dict[str, tuple[float, float | None]] | None = None,
    **facts: Any,
) -> tuple[dict[str, Any], str]:
    """A row for the report and its printed line: the ratio `other` / first side, and the first side over its floor.

    Args:
        name: Name of the case.
        timing: Result of `alternate`.
        other: Name of the side that is compared with the first.
        at_least, at_most: Target of the ratio: one of them, or neither if the row has no target.
        floor: Minimum seconds that the hardware needs for the first side's work.
        floor_at_most: Target of first side / floor.
        limits: Further numbers by name, each with its maximum, or None if it has no target.
        facts: Further fields of the row.
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
    for number, (value, maximum) in (limits or {}).items():
        row.setdefault("limits", {})[number] = {"value": value, "at_most": maximum}
        text += f" {number} {value:.5g}"
        if maximum is not None:
            verdicts.append(_verdict(value, value, value, None, maximum))
            row["limits"][number]["verdict"] = verdicts[-1]
            text += f" <= {maximum:.5g} {verdicts[-1]:6s}"
    row["verdict"] = max(verdicts, key=VERDICTS.index) if verdicts else None
    return row, text


VERDICTS = ("ok", "noise", "MISSED", "FAILED")


def _verdict(value: float, low: float, high: float, at_least: float | None, at_most: float | None) -> str:
    """ "ok" if the median meets the target, "noise" if only a quartile does, else "MISSED"."""
    if at_least is not None:
        return "ok" if value >= at_least else "noise" if high >= at_least else "MISSED"
    return "ok" if value <= at_most else "noise" if low <= at_most else "MISSED"
