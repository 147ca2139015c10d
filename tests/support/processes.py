"""Child processes that are killed at any moment, and what their output folders hold then and after a rerun."""

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


# Children of a fork server that has imported everything: starting one takes milliseconds. Not forks of this process,
# whose OpenMP threads would not survive the fork: the child would wait for them forever.
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    ["pytest", "upload_to_hub", "tools.convert_checkpoint", "torch._dynamo", "transformers.modeling_utils"]
)

Job = Callable[[Path, Path], int]  # writes a folder from a source; returns the exit status


def tree(folder: Path) -> dict[str, str]:
    """Name -> SHA-256 of every file of a folder."""
    files = sorted(folder.iterdir()) if folder.exists() else []
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _exit_with(job: Callable[..., Any], *arguments: Any) -> None:
    sys.exit(job(*arguments))


def in_child(job: Callable[..., Any], *arguments: Any) -> Any:
    """Start a process whose exit status is what the job returns."""
    child = _SERVER.Process(target=_exit_with, args=(job, *arguments))
    child.start()
    return child


def _quietly(job: Job, source: Path, target: Path) -> int:
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
        return job(source, target)


def _start(job: Job, source: Path, target: Path) -> Any:
    """Start the job in a child; return as soon as its output folder exists."""
    child = in_child(_quietly, job, source, target)
    while not target.exists() and child.is_alive():
        time.sleep(0.0005)
    return child


def _finish(job: Job, source: Path, target: Path) -> float:
    """Run the job to completion; return the seconds from the creation of its folder to its last write."""
    child = _start(job, source, target)
    start = time.time()
    child.join(120)
    if child.exitcode != 0:
        child.kill()
        raise AssertionError(f"{job} of {source} exited with {child.exitcode}")
    return max(path.stat().st_mtime for path in target.iterdir()) - start


class Killed(Counter):
    """The effects of the kills.

    `points`: kills that hit a running child; `torn`: kills in the middle of a file; `wrong`: files with their final
    name but not their final content; `kept`, `rewritten`: complete files that a rerun kept or wrote again; `reruns`:
    folders completed after three kills; `equal`: those with the content of an uninterrupted run.
    """


def _finished(folder: Path) -> dict[str, tuple[int, int]]:
    """Name -> inode and modification time of every file that has its final name."""
    found = {path.name: path.stat() for path in folder.iterdir() if path.suffix != ".partial"}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in found.items()}


def kill_at_random(
    job: Job, source: Path, scratch: Path, points: int, torn: int = 0, complete: int = 0, seed: int = 5
) -> Killed:
    """Kill the job at least `points` times, three times per folder, and then run it to completion.

    Continues until at least `torn` kills were in the middle of a file and `complete` complete files survived a kill.
    """
    rng, found = random.Random(seed), Killed()
    _finish(job, source, scratch / "reference")
    reference, duration = tree(scratch / "reference"), _finish(job, source, scratch / "timed")
    with tqdm(total=points, desc="kill -9") as bar:
        while found["points"] < points or found["torn"] < torn or found["kept"] + found["rewritten"] < complete:
            target, finished = scratch / f"killed{found['reruns']}", {}
            for _ in range(3):
                child = _start(job, source, target)
                child.join(rng.uniform(0, duration))
                found["points"] += child.is_alive()
                bar.update(child.is_alive())
                child.kill()
                child.join()
                found["torn"] += any(path.suffix == ".partial" for path in target.iterdir())
                held = {name: digest for name, digest in tree(target).items() if not name.endswith(".partial")}
                found["wrong"] += len(held.items() - reference.items())
                finished |= _finished(target)
            _finish(job, source, target)
            kept = len(finished.items() & _finished(target).items())
            found += Counter(kept=kept, rewritten=len(finished) - kept, reruns=1, equal=tree(target) == reference)
            shutil.rmtree(target)
    return found
