"""What a client of a server meets: one question per row of the table in docs/serving.md, asked of both engines."""

import json
import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import httpx2
import openai
from transformers.utils import get_json_schema

from examples.tools_client import TOOLS, calculator, run

from support.paths import ROOT


PROMPT = "Coming to the beautiful nature, we found"
QUESTION = [{"role": "user", "content": "Who are you?"}]
SUM = [{"role": "user", "content": "What is 12 + 7?"}]
CALCULATOR = get_json_schema(calculator)
# As the programs of 2023 wrote it into the prompt themselves: what the chat template writes for the calculator.
WRITTEN_TOOLS = (
    f"You can use these tools:\n{json.dumps(CALCULATOR['function'])}\n"
    "To use a tool, write:\nThought: what you need to know\nAction: the name of the tool\n"
    "Action Input: its arguments as JSON\n"
    "The system replies with a line that starts with Response. When you know the answer, write:\n"
    "Thought: how you know it\nFinal Answer: the answer"
)
# All that the model can write is short, which the tiny model by itself does not keep to in JSON.
PICK = {
    "type": "object",
    "properties": {"key": {"enum": ["a", "b"]}},
    "required": ["key"],
    "additionalProperties": False,
}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
SCHEMA = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 9}}, "required": ["name"]}


class Server:
    """A server under test: an openai client, the served name, and requests with defaults."""

    def __init__(self, client: openai.OpenAI, window: int):
        self.client, self.window = client.with_options(max_retries=0), window
        self.name = next(iter(client.models.list())).id

    def chat(self, messages: Any = QUESTION, **settings: Any) -> Any:
        settings = {"model": self.name, "temperature": 0, "max_tokens": 60} | settings
        return self.client.chat.completions.create(messages=messages, **settings)

    def complete(self, prompt: Any = PROMPT, **settings: Any) -> Any:
        settings = {"model": self.name, "temperature": 0, "max_tokens": 24} | settings
        return self.client.completions.create(prompt=prompt, **settings)


ROWS: dict[str, Callable[[Server], str]] = {}


def _row(name: str):
    return lambda function: ROWS.setdefault(name, function)


def ask(server: Server) -> dict[str, str]:
    """The answer to every question, a refused request as its status code."""
    answers = {}
    for name, question in ROWS.items():
        try:
            answers[name] = question(server)
        except openai.APIStatusError as error:
            assert 400 <= error.status_code < 500, (name, error)
            answers[name] = str(error.status_code)
    return answers


def table(column: int) -> dict[str, str]:
    """Column 1 (transformers) or 2 (vLLM) of the table in docs/serving.md."""
    text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8").split("### What clients may expect\n")[1]
    rows = [row.strip("| ").split(" | ") for row in re.findall(r"^\|.*\|$", text.split("\n### ")[0], re.MULTILINE)]
    return {re.sub(r"`", "", row[0]): row[column].strip("`") for row in rows[2:]}


@_row("GET /v1/models")
def _(server: Server) -> str:
    return "the folder's name" if "/" not in server.name else "a path"


@_row("chat, completions")
def _(server: Server) -> str:
    whole = server.chat().choices[0], server.complete().choices[0]
    assert whole[0].finish_reason == "stop" and whole[1].finish_reason == "length"
    return "greedy text" if "InternLM" in whole[0].message.content and whole[1].text else "no text"


@_row("stream, with usage")
def _(server: Server) -> str:
    chunks = list(server.chat(stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == server.chat().choices[0].message.content and len(chunks) > 5
    usage = chunks[-1].usage
    return "same text, usage last" if usage and usage.completion_tokens > 5 else "no usage"


@_row('stop=["model"]')
def _(server: Server) -> str:
    text = server.chat(stop=["model"]).choices[0].message.content
    return "ends with it" if text.endswith("model") else "ends before it" if "very small" in text else text


@_row("temperature=1, seed=1 twice")
def _(server: Server) -> str:
    texts = [server.complete(temperature=1, seed=seed).choices[0].text for seed in (1, 1, 2, 3)]
    assert len(set(texts[1:])) > 1, "it does not sample"
    return "same text" if texts[0] == texts[1] else "other text"


@_row("no temperature")
def _(server: Server) -> str:
    texts = {server.complete(temperature=openai.omit).choices[0].text for _ in range(4)}
    return "greedy text" if texts == {server.complete().choices[0].text} else "samples"


@_row("n=2, temperature=1")
def _(server: Server) -> str:
    return f"{len(server.chat(n=2, temperature=1).choices)} choices"


@_row("logprobs=True")
def _(server: Server) -> str:
    choice = server.chat(logprobs=True).choices[0]
    return "one per token" if choice.logprobs and len(choice.logprobs.content) > 5 else "ignored"


@_row("echo=True")
def _(server: Server) -> str:
    return "prompt and text" if server.complete(echo=True).choices[0].text.startswith(PROMPT) else "ignored"


@_row("tools")
def _(server: Server) -> str:
    """The whole loop, and the same call streamed."""
    messages = run(server.client, server.name, SUM[0]["content"])
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "assistant"], messages
    assert "19" in messages[-1]["content"]
    chunks = [chunk.choices[0] for chunk in server.chat(SUM, tools=[CALCULATOR], stream=True) if chunk.choices]
    calls = [call for chunk in chunks for call in chunk.delta.tool_calls or ()]
    text = "".join(chunk.delta.content or "" for chunk in chunks)
    assert text == "Thought: I need the calculator." and chunks[-1].finish_reason == "tool_calls"
    assert json.loads(calls[0].function.arguments) == {"expression": "12 + 7"} and len(calls) == 1
    assert set(TOOLS) == {"calculator", "dictionary"}
    return "tool_calls"


@_row('tool_choice="none"')
def _(server: Server) -> str:
    message = server.chat(SUM, tools=[CALCULATOR], tool_choice="none").choices[0].message
    return "text" if message.content and not message.tool_calls else "tool_calls"


@_row("tools in the prompt's text")
def _(server: Server) -> str:
    messages = [{"role": "system", "content": WRITTEN_TOOLS}, *SUM]
    message = server.chat(messages).choices[0].message
    chunks = server.chat(messages, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == message.content
    return "text" if "\nAction: calculator\n" in (message.content or "") else f"not {message.content}"


@_row('tool_choice="required", or a name')
def _(server: Server) -> str:
    tool = {"type": "function", "function": {"name": "pick", "description": "Pick.", "parameters": PICK}}
    for choice in ("required", {"type": "function", "function": {"name": "pick"}}):
        settings = {"tools": [tool], "tool_choice": choice, "parallel_tool_calls": False, "max_tokens": 100}
        call = server.chat(SUM, **settings).choices[0].message.tool_calls[0].function
        assert call.name == "pick" and json.loads(call.arguments)["key"] in ("a", "b")
        chunks = [chunk.choices[0] for chunk in server.chat(SUM, stream=True, **settings) if chunk.choices]
        calls = [call.function for chunk in chunks for call in chunk.delta.tool_calls or ()]
        streamed = "".join(part.arguments or "" for part in calls)
        assert calls[0].name == "pick" and json.loads(streamed) == json.loads(call.arguments)
    return "tool_calls"


@_row("response_format")
def _(server: Server) -> str:
    schema = {"name": "answer", "schema": SCHEMA}
    reply = server.chat(response_format={"type": "json_schema", "json_schema": schema}, max_tokens=100).choices[0]
    return "JSON by the schema" if set(json.loads(reply.message.content)) == {"name"} else "ignored"


@_row("an image")
def _(server: Server) -> str:
    content = [{"type": "text", "text": "What is this?"}, IMAGE]
    return server.chat([{"role": "user", "content": content}]).choices[0].message.content


@_row("<eoa> in a user's text")
def _(server: Server) -> str:
    """As plain text it is several tokens; the control token is one."""
    sizes = [server.chat([{"role": "user", "content": text}]).usage.prompt_tokens for text in ("x", "x<eoa>")]
    return "text" if sizes[1] - sizes[0] > 1 else "control token"


@_row("messages=[]")
def _(server: Server) -> str:
    return server.chat([]).choices[0].message.content


@_row("an unknown role")
def _(server: Server) -> str:
    return server.chat([{"role": "judge", "content": "x"}]).choices[0].message.content


@_row("another model's name")
def _(server: Server) -> str:
    return server.chat(model="internlm/internlm-7b").choices[0].message.content


@_row("broken JSON")
def _(server: Server) -> str:
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {server.client.api_key}"}
    url = f"{server.client.base_url}chat/completions"
    return str(httpx2.post(url, content='{"model": "intern', headers=headers, timeout=60).status_code)


@_row("a wrong type, max_tokens=-1")
def _(server: Server) -> str:
    statuses = set()
    for settings in ({"temperature": "hot"}, {"stop": 5}, {"max_tokens": -1}, {"messages": "hi"}):
        try:
            server.chat(**settings)
            statuses.add("accepted")
        except openai.APIStatusError as error:
            statuses.add(error.status_code)
    assert len(statuses) == 1, statuses
    return str(*statuses)


@_row("a prompt beyond the window")
def _(server: Server) -> str:
    text = " ".join(["We went to the river."] * (server.window // 4))
    return "answered" if server.complete(text).choices[0].text else "no text"


@_row("another request meanwhile")
def _(server: Server) -> str:
    """Whether a short request ends before half of a long one that began before it."""
    stream = iter(server.complete(max_tokens=200, stream=True))
    next(stream)
    done = threading.Event()

    def short() -> None:
        server.complete(max_tokens=1)
        done.set()

    thread = threading.Thread(target=short)
    thread.start()
    waiting = sum(not done.is_set() for _ in stream)  # chunks of one token each
    thread.join()
    return "computed together" if waiting < 100 else "waits"


@_row("a client that goes away")
def _(server: Server) -> str:
    """Whether the next request must wait for the rest of one that nobody reads any more."""

    def seconds(**settings: int) -> float:
        start = time.perf_counter()
        server.complete(**settings)
        return time.perf_counter() - start

    alone = min(seconds(max_tokens=200) for _ in range(2))
    url, headers = f"{server.client.base_url}completions", {"Authorization": f"Bearer {server.client.api_key}"}
    body = {"model": server.name, "prompt": PROMPT, "temperature": 0, "max_tokens": 200}
    waited = {}
    for streamed in (True, False):
        settings = {"json": body | {"stream": streamed}, "headers": headers, "timeout": alone / 8}
        with suppress(httpx2.TimeoutException), httpx2.stream("POST", url, **settings) as answer:
            next(answer.iter_lines())
        waited[streamed] = seconds(max_tokens=1) > alone / 2
    assert not waited[True], "a stream continues after its client has left"
    return "stops if it streams" if waited[False] else "stops"


@_row("a wrong key, with --api-key")
def _(server: Server) -> str:
    wrong = server.client.with_options(api_key="wrong")
    return "not checked" if wrong.completions.create(model=server.name, prompt="x", max_tokens=1).choices else ""
