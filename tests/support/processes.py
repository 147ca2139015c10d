"""Children that may be killed at any moment, and what their folders hold then and after another run."""

import contextlib
import hashlib
import multiprocessing
import os
import random
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm


# Children of a server that has everything imported: a killed run costs milliseconds. Not forks of this process, whose
# OpenMP threads would not survive the fork: the child waits for them for ever.
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["pytest", "reliability", "torch._dynamo", "transformers.modeling_utils"])

Work = Callable[[Path, Path], int]  # makes a folder from a source; returns the exit status


def tree(folder: Path) -> dict[str, str]:
    """Name -> digest of every file of a folder."""
    files = sorted(folder.iterdir()) if folder.exists() else []
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _leave_with(work: Callable[..., Any], *arguments: Any) -> None:
    sys.exit(work(*arguments))


def in_child(work: Callable[..., Any], *arguments: Any) -> Any:
    """Start a process whose exit status is what the work returns."""
    child = _SERVER.Process(target=_leave_with, args=(work, *arguments))
    child.start()
    return child


def _quietly(work: Work, source: Path, target: Path) -> int:
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        return work(source, target)


def _start(work: Work, source: Path, target: Path) -> Any:
    """Start the work in a child; returns at the moment when its folder is there."""
    child = in_child(_quietly, work, source, target)
    while not target.exists() and child.is_alive():
        time.sleep(0.0005)
    return child


def _finish(work: Work, source: Path, target: Path) -> float:
    """Run the work to its end; returns the seconds from its folder to its last file."""
    child = _start(work, source, target)
    start = time.time()
    child.join(120)
    if child.exitcode != 0:
        child.kill()
        raise AssertionError(f"{work} of {source} ended with {child.exitcode}")
    return max(path.stat().st_mtime for path in target.iterdir()) - start


class Killed(Counter):
    """What came of the kills.

    `points`: kills that met a running child; `torn`: those in the middle of a file; `wrong`: files that had their name
    before their content; `kept` and `rewritten`: finished files that the next run left alone, and others; `reruns`:
    folders that came to their end after three kills; `equal`: those of them with the content of an undisturbed run.
    """


def _finished(folder: Path) -> dict[str, tuple[int, int]]:
    """Which file it is, by name, of every file that has its final name."""
    found = {path.name: path.stat() for path in folder.iterdir() if path.suffix != ".partial"}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in found.items()}


def kill_at_random(
    work: Work, source: Path, scratch: Path, points: int, torn: int = 0, complete: int = 0, seed: int = 5
) -> Killed:
    """Kill the work `points` times, three times on the way to each folder, and let it come to its end after that.

    It goes on until at least `torn` of the kills were in the middle of a file, and had left `complete` files behind.
    """
    rng, found = random.Random(seed), Killed()
    _finish(work, source, scratch / "whole")
    whole, duration = tree(scratch / "whole"), _finish(work, source, scratch / "timed")
    with tqdm(total=points, desc="kill -9") as bar:
        while found["points"] < points or found["torn"] < torn or found["kept"] + found["rewritten"] < complete:
            target, finished = scratch / f"killed{found['reruns']}", {}
            for _ in range(3):
                child = _start(work, source, target)
                child.join(rng.uniform(0, duration))
                found["points"] += child.is_alive()
                bar.update(child.is_alive())
                child.kill()
                child.join()
                found["torn"] += any(path.suffix == ".partial" for path in target.iterdir())
                held = {name: digest for name, digest in tree(target).items() if not name.endswith(".partial")}
                found["wrong"] += len(held.items() - whole.items())
                finished |= _finished(target)
            _finish(work, source, target)
            kept = len(finished.items() & _finished(target).items())
            found += Counter(kept=kept, rewritten=len(finished) - kept, reruns=1, equal=tree(target) == whole)
            shutil.rmtree(target)
    return found
