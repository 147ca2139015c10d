"""vLLM's server under load: clients that ask, that hang up in the middle and that send rubbish, all at once.

The prompts are like the tiny model's training text, and every answer is greedy: it is compared with the answer to the
same request when nothing else was asked.
"""

import asyncio
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
import numpy as np
import psutil
import torch
from tqdm import tqdm

from tools.tiny.corpus import prose


DROPPED, RUBBISH = 0.2, 0.1  # shares of the requests
# Nobody retries: a server that says nothing for this many seconds has failed.
PATIENCE = httpx2.Timeout(60)
# Seconds from SIGTERM to the exit of the last process: 30 for waiting requests (tools/serving/vllm_server.py), and 10.
STOPPED = 40


def command_of(folder: Path) -> list[str]:
    """`make serve ENGINE=vllm` with the weights in float32, so that the greedy tokens are transformers'."""
    options = ["--model", str(folder), "--dtype", "float32", "--enforce-eager"]
    return [sys.executable, "examples/serve.py", "--engine", "vllm", *options]


class Request(NamedTuple):
    """A greedy completion; `ids` are those of the prompt, which is sent as ids or as text."""

    prompt: list[int] | str
    ids: list[int]
    new: int

    def body(self, model: str) -> dict[str, Any]:
        settings = {"max_tokens": self.new, "temperature": 0, "return_token_ids": True}  # the last is vLLM's own
        return {"model": model, "prompt": self.prompt} | settings


class Answer(NamedTuple):
    text: str
    ids: list[int]
    reason: str


def requests_of(tokenizer: Any, count: int, seed: int = 21) -> list[Request]:
    """Prompts of 1 to 200 tokens in English and Chinese, every other one as text; 1 to 40 new tokens."""
    rng, found = random.Random(seed), []
    for number in range(count):
        ids = tokenizer(prose(rng, 12, ("en", "zh")[number // 2 % 2]))["input_ids"]
        ids = ids[: 1 + number * 199 // max(1, count - 1)]  # the first is <s> alone, the last has 200 tokens
        text = tokenizer.decode(ids, skip_special_tokens=True)
        # A cut inside a character is no text that encodes to the same ids, nor is the empty text.
        as_text = number % 2 and text and tokenizer(text)["input_ids"] == ids
        found.append(Request(text if as_text else ids, ids, rng.randint(1, 40)))
    return found


def rubbish(model: str) -> dict[str, bytes]:
    """Name -> the body of a completion request that has to be refused."""
    good = {"model": model, "prompt": "x", "max_tokens": 4, "temperature": 0}
    wrong = {
        "prompt is an object": {"prompt": {"a": 1}},
        "prompt is empty": {"prompt": []},
        "prompt is too long": {"prompt": [1] + [300] * 400},
        "text is too long": {"prompt": "word " * 2000},
        "ids outside the vocabulary": {"prompt": [1, 10**7]},
        "ids below zero": {"prompt": [1, -5]},
        "half a surrogate pair": {"prompt": "\ud800"},
        "max_tokens is a word": {"max_tokens": "many"},
        "max_tokens is negative": {"max_tokens": -1},
        "max_tokens is too large": {"max_tokens": 10**9},
        "temperature is negative": {"temperature": -3},
        "temperature is NaN": {"temperature": float("nan")},
        "too many logprobs": {"logprobs": 10**6},
        "too many answers": {"n": 10**5},
        "unknown model": {"model": "gpt-4"},
        "regular expression is broken": {"structured_outputs": {"regex": "("}},
    }
    found = {name: json.dumps(good | fields).encode() for name, fields in wrong.items()}
    return found | {
        "nothing": b"",
        "bytes": bytes(range(256)),
        "JSON ends early": b'{"model": "internlm", "prompt": ',
        "JSON is a list": b"[]",
        "JSON is 100,000 deep": b"[" * 100_000,
    }


async def whole(http: httpx2.AsyncClient, body: dict[str, Any]) -> Answer:
    response = await http.post("completions", json=body)
    response.raise_for_status()
    choice = response.json()["choices"][0]
    return Answer(choice["text"], choice["token_ids"], choice["finish_reason"])


async def streamed(
    http: httpx2.AsyncClient, body: dict[str, Any], chunks: int | None = None, begun: asyncio.Event | None = None
) -> Answer | None:
    """Returns None if the connection was dropped: after `chunks` chunks, unless the answer had ended.

    Raises:
        EOFError: the stream ended without the line that ends it.
        RuntimeError: the server says in the stream why it cannot continue.
    """
    parts: list[dict[str, Any]] = []
    async with http.stream("POST", "completions", json=body | {"stream": True}) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                text, ids = "".join(part["text"] for part in parts), sum((part["token_ids"] for part in parts), [])
                return Answer(text, ids, parts[-1]["finish_reason"])
            if line:
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    raise RuntimeError(event["error"]["message"])
                parts += event["choices"]
                if begun:
                    begun.set()
                if len(parts) == chunks and parts[-1]["finish_reason"] is None:
                    return None
    raise EOFError(f"the stream ended after {len(parts)} chunks")


async def _raw(url: str, data: bytes) -> bytes:
    """What the server answers to `data` and the end of the connection."""
    location = httpx2.URL(url)
    reader, writer = await asyncio.open_connection(location.host, location.port)
    try:
        writer.write(data)
        writer.write_eof()
        return await reader.read()
    except ConnectionError:
        return b""
    finally:
        writer.close()


@dataclass
class Outcome:
    """What clients saw."""

    equal: int = 0
    different: list[tuple[int, Answer]] = field(default_factory=list)  # number of the request, answer
    dropped: Counter = field(default_factory=Counter)  # "streamed" or "whole"; answers that came first count as such
    refused: Counter = field(default_factory=Counter)  # name of the rubbish
    failures: Counter = field(default_factory=Counter)  # whatever should not have been
    tokens: int = 0
    seconds: float = 0.0
    # (seconds, requests so far, bytes of the processes that hold requests, bytes of those that compute)
    memory: list[tuple[float, int, int, int]] = field(default_factory=list)

    @property
    def total(self) -> int:
        counters = self.dropped.total() + self.refused.total() + self.failures.total()
        return self.equal + len(self.different) + counters

    def growth(self, warm: float, workers: bool) -> tuple[float, float]:
        """The memory's growth after `warm` seconds, (MB per minute, bytes per request): slopes of fitted lines."""
        rows = np.array([row for row in self.memory if row[0] >= warm], dtype=float)
        per_second, per_request = (np.polyfit(rows[:, axis], rows[:, 3 if workers else 2], 1)[0] for axis in (0, 1))
        return float(per_second * 60 / 1e6), float(per_request)


class Clients:
    """Clients of one server, with the answers to expect."""

    def __init__(self, url: str, model: str, requests: list[Request]) -> None:
        self.url, self.model, self.requests = url, model, requests
        self.expected: list[Answer] = []
        self.rubbish = rubbish(model)

    def _http(self, connections: int = 1) -> httpx2.AsyncClient:
        limits = httpx2.Limits(max_connections=connections)
        return httpx2.AsyncClient(base_url=self.url, timeout=PATIENCE, limits=limits)

    def ask_alone(self) -> None:
        """Expect what the server answers to one request at a time."""

        async def ask() -> list[Answer]:
            async with self._http() as http:
                return [await whole(http, request.body(self.model)) for request in self.requests]

        self.expected = asyncio.run(ask())

    def load(self, clients: int, seconds: float, server: psutil.Process | None = None) -> Outcome:
        """`clients` connections that always ask something, for `seconds`; `server`: whose memory is measured."""
        return asyncio.run(self._load(clients, seconds, server))

    async def _load(self, clients: int, seconds: float, server: psutil.Process | None) -> Outcome:
        outcome, start = Outcome(), time.monotonic()
        async with self._http(clients) as http:
            tasks = [self._client(http, random.Random(n), start + seconds, outcome) for n in range(clients)]
            watch = asyncio.create_task(_watch(server, outcome, start, seconds))
            await asyncio.gather(*tasks)
            outcome.seconds = time.monotonic() - start
            await watch
        return outcome

    async def _client(self, http: httpx2.AsyncClient, rng: random.Random, deadline: float, outcome: Outcome) -> None:
        waits = [0.5]  # seconds for whole answers
        while time.monotonic() < deadline:
            kind = rng.random()
            try:
                if kind < RUBBISH:
                    await self._send_rubbish(http, rng, outcome)
                else:
                    await self._ask(http, rng, kind < RUBBISH + DROPPED, waits, outcome)
            except Exception as error:  # any: what went wrong is what this counts
                outcome.failures[repr(error)] += 1

    async def _ask(
        self, http: httpx2.AsyncClient, rng: random.Random, drop: bool, waits: list[float], outcome: Outcome
    ) -> None:
        """Half of the answers are streamed. To drop is to close the connection after some chunks, or a random time."""
        number = rng.randrange(len(self.requests))
        request, stream, start = self.requests[number], rng.random() < 0.5, time.monotonic()
        body = request.body(self.model)
        if stream:
            answer = await streamed(http, body, rng.randint(1, request.new) if drop else None)
        else:
            patience = rng.uniform(0, statistics.median(waits[-20:])) if drop else None
            try:
                answer = await asyncio.wait_for(whole(http, body), patience)
            except asyncio.TimeoutError:
                answer = None
            else:
                waits.append(time.monotonic() - start)
        if answer is None:
            outcome.dropped["streamed" if stream else "whole"] += 1
        elif answer == self.expected[number]:
            outcome.equal += 1
        else:
            outcome.different.append((number, answer))
        outcome.tokens += len(answer.ids) if answer else 0

    async def _send_rubbish(self, http: httpx2.AsyncClient, rng: random.Random, outcome: Outcome) -> None:
        name = rng.choice([*self.rubbish, "not HTTP", "half a body"])
        if name == "not HTTP":
            answer = await _raw(self.url, b"\0\1\2 internlm\r\n\r\n")
            passed = answer.startswith(b"HTTP/1.1 400 ")
        elif name == "half a body":
            body = json.dumps(rng.choice(self.requests).body(self.model)).encode()
            head = ("POST /v1/completions HTTP/1.1", "Host: x", "Content-Type: application/json")
            head = "\r\n".join((*head, f"Content-Length: {len(body)}", "", ""))
            answer = await _raw(self.url, head.encode() + body[: len(body) // 2])
            passed = not re.match(rb"HTTP/1.1 [25]", answer)  # the client is gone, so there need be no answer
        else:
            headers = {"Content-Type": "application/json"}
            response = await http.post("completions", content=self.rubbish[name], headers=headers)
            answer, passed = f"{response.status_code} {response.text[:200]}", 400 <= response.status_code < 500
        if passed:
            outcome.refused[name] += 1
        else:
            outcome.failures[f"{name}: {answer!r}"] += 1

    def left(self) -> dict[str, float]:
        """What the engine still holds, once it had time to clean up: requests, and the share of keys and values."""
        metric = r"^vllm:(num_requests_running|num_requests_waiting|kv_cache_usage_perc)\{.*\} (\S+)$"
        found: dict[str, float] = {}
        for _ in range(20):
            time.sleep(0.5)
            page = httpx2.get(httpx2.URL(self.url).join("/metrics"), timeout=PATIENCE).text
            found = {name: float(value) for name, value in re.findall(metric, page, re.MULTILINE)}
            if not any(found.values()):
                break
        return found

    def terminate(self, server: subprocess.Popen, waiting: int) -> "Ending":
        """SIGTERM while `waiting` requests, half of them streamed, are in the middle of their answers."""
        return asyncio.run(self._terminate(server, waiting))

    async def _terminate(self, server: subprocess.Popen, waiting: int) -> "Ending":
        body = Request([1, 300, 400], [], 250).body(self.model) | {"ignore_eos": True}
        begun = [asyncio.Event() for _ in range(waiting // 2)]
        async with self._http(waiting) as http:
            alone = await whole(http, body)
            asked = [asyncio.create_task(streamed(http, body, begun=event)) for event in begun]
            asked += [asyncio.create_task(whole(http, body)) for _ in range(waiting - len(begun))]
            await asyncio.wait_for(asyncio.gather(*(event.wait() for event in begun)), 60)
            processes, start = session_of(server.pid), time.monotonic()
            server.send_signal(signal.SIGTERM)  # to the one process that a service manager knows
            answers = await asyncio.gather(*asked, return_exceptions=True)
        await asyncio.to_thread(psutil.wait_procs, processes, 60)
        seconds = time.monotonic() - start
        seen = Counter("as alone" if answer == alone else repr(answer)[:200] for answer in answers)
        return Ending(seconds, server.poll(), [process.name() for process in session_of(server.pid)], seen)


class Ending(NamedTuple):
    """`seconds` until the last process had exited; `left`: processes after a minute; `seen` by the waiting clients."""

    seconds: float
    code: int | None
    left: list[str]
    seen: Counter


def session_of(leader: int) -> list[psutil.Process]:
    """The processes of a session that have not exited."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


async def _watch(server: psutil.Process | None, outcome: Outcome, start: float, seconds: float) -> None:
    """Measure the memory of the server's processes every second."""
    with tqdm(total=round(seconds), desc="load", unit="s", disable=None) as bar:
        while (passed := time.monotonic() - start) < seconds:
            if server:
                outcome.memory.append((passed, outcome.total, *_resident(server)))
            await asyncio.sleep(1)
            bar.update(1)


def _resident(server: psutil.Process) -> tuple[int, int]:
    """The resident bytes of vLLM's server and engine, which hold the requests, and of its workers, which compute."""
    sizes = {False: 0, True: 0}
    for process in (server, *server.children(recursive=True)):
        sizes[process.name().startswith("VLLM::Worker")] += process.memory_info().rss
    return sizes[False], sizes[True]


def greedy(model: Any, request: Request) -> list[int]:
    """transformers' new tokens."""
    output = model.generate(torch.tensor([request.ids]), max_new_tokens=request.new, do_sample=False)
    return output[0, len(request.ids) :].tolist()


def distance(model: Any, request: Request, one: list[int], other: list[int]) -> str:
    """The first token in which two answers differ, and transformers' logits of both."""
    shared = len(os.path.commonprefix([one, other]))
    if shared == min(len(one), len(other)):
        return f"one has {len(one)} tokens, the other {len(other)}, equal as far as they go"
    with torch.no_grad():
        logits = model(torch.tensor([request.ids + one[:shared]])).logits[0, -1]
    values = [f"{token} has the logit {logits[token]:.6f}" for token in (one[shared], other[shared])]
    return f"token {shared}: {', '.join(values)}"
