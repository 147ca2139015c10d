"""Two processes (torchrun, gloo) against one: the same logits, greedy tokens and gradients, across the window."""

import os
import socket
import subprocess
import sys

import pytest

from support.paths import ROOT
from support.versions import needs_dynamo, needs_torch


TENSOR = needs_torch("2.7", "has no distribute_tensor(src_data_rank=...), which transformers calls")
FSDP = needs_torch("2.8", "is refused by transformers, for it cannot save and load shards")


@pytest.mark.parametrize(
    ("way", "gradients"),
    (
        pytest.param("tensor", (39, 39), marks=TENSOR),
        pytest.param("pipeline", (19, 20), marks=needs_dynamo),
        pytest.param("fsdp", (39, 39), marks=FSDP),
    ),
)
def test_two_processes(tiny_dir, way, gradients):
    """The example's --check, on prompts that end 6 tokens before the window; all 39 parameters are compared."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]
    command += ["--master-port", port, "examples/distributed.py", "--way", way, "--check", "--model", str(tiny_dir)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=240)
    output = process.stdout.decode()
    assert process.returncode == 0, process.stderr.decode()
    for rank, count in enumerate(gradients):
        assert f"{way}, process {rank}: same tokens as one process" in output
        assert f" {count} gradients within " in output
