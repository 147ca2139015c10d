"""What the tests of `benchmarks/` share with the matrix check: a trial run of the GPU benchmark on a CPU."""

import json
import subprocess
import sys
from pathlib import Path

from .paths import ROOT


# On one thread: with more, tiny operators on a busy machine wait for each other.
TRIAL = ("--device", "cpu", "--shapes", "tiny", "--quick", "--threads", "1")


def run_gpu_benchmark(folder: Path) -> list[dict]:
    """The rows of a trial run in a new process, whose result file is `folder`/gpu.json."""
    file = folder / "gpu.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *TRIAL, "--out", str(file)]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    return json.loads(file.read_text(encoding="utf-8"))["rows"]
