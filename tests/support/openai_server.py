"""A real OpenAI-compatible server in a child process."""

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from support.paths import ROOT


# vLLM, its statistics aside. On a CPU it takes this many GiB for keys and values, and fills them when it starts.
VLLM_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}


def stop(process: subprocess.Popen) -> None:
    """End a process that leads its own session, and all its descendants."""
    if process.poll() is not None:
        return
    os.killpg(process.pid, signal.SIGINT)
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextlib.contextmanager
def server_of(
    command: list[str], log: Path, patience: float, environment: dict | None = None
) -> Iterator[tuple[subprocess.Popen, str]]:
    """Start the server `command` on a free local port, yield (process, URL) once it listens, and stop it at the end.

    Args:
        log: file for the server's output.

    Raises:
        RuntimeError: it does not listen within `patience` seconds. The message is its output.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [*command, "--host", "127.0.0.1", "--port", str(port)]
    with log.open("wb") as output:
        server = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        deadline = time.monotonic() + patience
        while server.poll() is None and time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.2)
        else:
            raise RuntimeError(log.read_text())
        yield server, f"http://127.0.0.1:{port}/v1"
    finally:
        stop(server)


@contextlib.contextmanager
def client_of(command: list[str], log: Path, patience: float, environment: dict | None = None) -> Iterator:
    """An openai client of a server that runs meanwhile; see server_of()."""
    import openai  # missing where only the servers themselves are used

    with (
        server_of(command, log, patience, environment) as (_, url),
        openai.OpenAI(base_url=url, api_key="none", timeout=120) as client,
    ):
        yield client
