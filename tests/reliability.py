"""What users and broken files do to the package: fuzzed files, threads, processes, kill -9, and a soak test.

    python tests/reliability.py               # full length, 3.5 minutes: `make reliability`
    python tests/reliability.py --share 0.05  # a twentieth of it, but 500 generations

Prints the figures that docs/reliability.md states; exits with 1 if a check failed. test_reliability.py runs the same
experiments (tests/support/fuzzing.py, stress.py and processes.py) at a smaller size.
"""

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import upload_to_hub

from support import fuzzing, stress
from support.paths import TINY
from support.processes import kill_at_random
from support.report import check


def report_fuzzing(tiny: Path, scratch: Path, inputs: int) -> bool:
    passed = True
    for name in ("config", "tokenizer", "saved_tokenizer"):
        before, start = psutil.Process().memory_info().rss, time.perf_counter()
        outcomes = getattr(fuzzing, f"fuzz_{name}")(tiny, scratch / f"fuzz-{name}", inputs)
        grown = (psutil.Process().memory_info().rss - before) / 1e6
        text = f"{name}: {outcomes.total()} inputs, {dict(outcomes)}, memory {grown:+.0f} MB"
        passed &= check(f"{text}, {time.perf_counter() - start:.0f} s", grown < 500)
    return passed


def report_soak(model: Any, generations: int) -> bool:
    equal, slope, megabytes = stress.soak(model, generations)
    # The allocator's own steps of a megabyte are no leak: at full length 1,024 bytes per generation are allowed.
    grown = slope * generations * 3 / 4
    text = f"{equal} of {generations} outputs unchanged, {slope:+.0f} bytes per generation, {megabytes:.0f} MB"
    return check(f"soak: {text}", equal == generations and grown < 1024 * 1500)


def report_concurrency(model: Any, tiny: Path, home: Path, rounds: int) -> bool:
    equal, total = stress.generate_in_threads(model, rounds)
    passed = check(f"8 threads on one model: {equal} of {total} outputs as in a single thread", equal == total)
    outputs = stress.load_in_processes(tiny, home)
    same = outputs.count(outputs[0])
    text = f"8 processes, one empty module cache: {same} output {outputs[0]}"
    return passed & check(text, same == 8 and "failed" not in outputs[0])


def report_kills(scratch: Path, points: int) -> bool:
    passed = True
    for job in (stress.convert, stress.assemble):
        folder = scratch / job.__name__
        found = kill_at_random(job, stress.old_checkpoint(folder / "source"), folder, points)
        text = f"killed {found['points']} times, {found['torn']} in the middle of a file"
        text = f"{job.__name__}: {text}; {found['equal']} of {found['reruns']} byte-equal after a rerun"
        passed &= check(text, found["equal"] == found["reruns"])
    return passed


def main(share: float) -> int:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity(logging.CRITICAL)  # transformers logs every broken file
    torch.set_num_threads(1)  # the model is too small for more
    scratch = Path(tempfile.mkdtemp())
    tiny = scratch / "tiny"
    upload_to_hub.assemble(weights=TINY, out=tiny, progress=False)
    model = AutoModelForCausalLM.from_pretrained(tiny, trust_remote_code=True, dtype=torch.float32).eval()

    def scaled(full: int) -> int:
        return max(1, int(full * share))

    passed = (
        # First: later, memory that was freed would hide a leak. In fewer, caches that fill would look like one.
        report_soak(model, max(500, scaled(2000))),
        report_concurrency(model, tiny, scratch / "home", scaled(10)),
        report_kills(scratch, scaled(30)),
        report_fuzzing(tiny, scratch, scaled(10_000)),
    )
    shutil.rmtree(scratch)
    return 0 if all(passed) else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=1.0, help="of the full length (default: %(default)s)")
    sys.exit(main(parser.parse_args().share))
