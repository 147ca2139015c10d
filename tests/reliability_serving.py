"""What many clients do to `make serve ENGINE=vllm`: they ask, hang up in the middle and send rubbish, all at once.

    python tests/reliability_serving.py               # 64 clients, 5 minutes: `make reliability-serving`
    python tests/reliability_serving.py --seconds 30  # too short to measure memory

Prints the figures that docs/reliability.md states; exits with 1 if a check failed. tests/engines/test_vllm_load.py
runs the same experiment (tests/support/load.py) at a smaller size.
"""

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil
import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import upload_to_hub

from support import load
from support.openai_server import VLLM_ENVIRONMENT, server_of
from support.paths import TINY
from support.report import check


WARM = 60  # seconds, in which most caches fill
# Bytes per request. The server and the engine hold the texts and ids of requests, several kB each. A worker holds keys
# and values, 4096 bytes for each token of this model; its allocator still takes a little more for about eight minutes.
LIMITS = {"server and engine": 1024, "worker": 4096}


def report_alone(clients: load.Clients, model: Any) -> bool:
    clients.ask_alone()
    pairs = list(zip(clients.requests, clients.expected, strict=True))
    apart = [(request, answer.ids, load.greedy(model, request)) for request, answer in pairs]
    apart = [(request, ours, theirs) for request, ours, theirs in apart if ours != theirs]
    for request, ours, theirs in apart[:5]:
        print(f"     {load.distance(model, request, ours, theirs)}")
    text = f"{len(pairs) - len(apart)} of {len(pairs)} answers have the tokens of transformers' generate"
    return check(f"one client: {text}", not apart)


def report_answers(clients: load.Clients, outcome: load.Outcome, model: Any) -> bool:
    answers = outcome.equal + len(outcome.different)
    text = f"{outcome.total} requests in {outcome.seconds:.0f} s, {outcome.tokens / outcome.seconds:.0f} tokens/s"
    passed = check(f"load: {text}; {outcome.equal} of {answers} answers as alone", answers == outcome.equal > 0)
    for number, answer in outcome.different[:5]:
        found = load.distance(model, clients.requests[number], clients.expected[number].ids, answer.ids)
        print(f"     request {number}: {found}")
    refused, unexpected = outcome.refused.total(), outcome.failures.total()
    text = f"{refused} requests of {len(outcome.refused)} kinds refused, {unexpected} unexpected answers"
    passed &= check(f"rubbish: {text}", refused > 0 and unexpected == 0)
    for failure, count in outcome.failures.most_common(5):
        print(f"     {count} times {failure}")
    left = clients.left()
    text = f"{outcome.dropped.total()} {dict(outcome.dropped)}; left in the engine: {left}"
    return passed & check(f"dropped: {text}", outcome.dropped.total() > 0 and not any(left.values()))


def report_memory(outcome: load.Outcome) -> bool:
    if outcome.seconds < 4 * WARM:  # the first minutes would weigh too much
        print(f"     memory: not measured in less than {4 * WARM} s")
        return True
    passed = True
    for column, (name, limit) in enumerate(LIMITS.items(), start=2):
        minute, request = outcome.growth(WARM, workers=name == "worker")
        text = (
            f"{minute:+.2f} MB per minute, {request:+.0f} bytes per request, {outcome.memory[-1][column] / 1e6:.0f} MB"
        )
        passed &= check(f"memory of {name}: {text}", request < limit)
    return passed


def report_end(ending: load.Ending) -> bool:
    text = f"exit code {ending.code} after {ending.seconds:.1f} s, processes left: {ending.left}"
    text += f", {ending.seen.total()} waiting clients: {dict(ending.seen)}"
    passed = ending.code == 0 and not ending.left and ending.seconds < load.STOPPED
    return check(f"SIGTERM: {text}", passed and set(ending.seen) == {"as alone"})


def main(seconds: float, clients: int) -> int:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # the tiny model loads at once
    torch.set_num_threads(1)  # the server has the others
    scratch = Path(tempfile.mkdtemp())
    tiny, log = scratch / "internlm-tiny", scratch / "log.txt"
    upload_to_hub.assemble(weights=TINY, out=tiny, progress=False)
    tokenizer = AutoTokenizer.from_pretrained(tiny, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(tiny, trust_remote_code=True, dtype=torch.float32).eval()
    with server_of(load.command_of(tiny), log, 300, os.environ | VLLM_ENVIRONMENT) as (server, url):
        pool = load.Clients(url, tiny.name, load.requests_of(tokenizer, 100))
        passed = [report_alone(pool, model)]
        outcome = pool.load(clients, seconds, psutil.Process(server.pid))
        passed += [report_answers(pool, outcome, model), report_memory(outcome)]
        tracebacks = log.read_text(encoding="utf-8", errors="replace").count("Traceback")
        passed += [check(f"log: {tracebacks} tracebacks", tracebacks == 0)]  # before the end: vLLM may log one then
        passed += [report_end(pool.terminate(server, clients))]
    shutil.rmtree(scratch)
    return 0 if all(passed) else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300, help="of load (default: %(default)s)")
    parser.add_argument("--clients", type=int, default=64, help="at once (default: %(default)s)")
    arguments = parser.parse_args()
    sys.exit(main(arguments.seconds, arguments.clients))
