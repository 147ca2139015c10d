"""The server of `make serve` with the real openai client: the replies are transformers' greedy ones."""

import subprocess
import sys

import openai
import pytest
import torch

from support import expectations
from support.openai_server import client_of
from support.pages import run_blocks
from support.paths import ROOT


pytestmark = pytest.mark.ecosystem

PROMPTS = ("Coming to the beautiful nature, we found", "来到美丽的大自然，我们发现")
MODEL = "internlm-tiny"
GREEDY = {"max_tokens": 24, "temperature": 0}


@pytest.fixture(scope="module")
def client(tiny_dir, tmp_path_factory):
    """A client of a server that runs for this module."""
    command = [sys.executable, "examples/serve.py", "--model", str(tiny_dir), "--dtype", "float32", "--device", "cpu"]
    with client_of(command, tmp_path_factory.mktemp("serve") / "log.txt", patience=120) as client:
        yield client


def greedy(model, tokenizer, prompt: str, new: int = 24) -> str:
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=new, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_completions(client, tiny_dir, tiny_model, tiny_tokenizer, prompt):
    """Whole, and streamed in several chunks with no Chinese character split."""
    expected = greedy(tiny_model, tiny_tokenizer, prompt)
    answer = client.completions.create(model=MODEL, prompt=prompt, **GREEDY)
    assert answer.choices[0].text == expected and answer.usage.completion_tokens == 24
    stream = client.completions.create(model=MODEL, prompt=prompt, stream=True, **GREEDY)
    chunks = [chunk.choices[0].text for chunk in stream if chunk.choices]
    assert "".join(chunks) == expected and len(chunks) > 3 and not any("\ufffd" in chunk for chunk in chunks)


def test_models(client):
    """Clients can ask for the name that they must use: the folder's."""
    assert [model.id for model in client.models.list()] == [MODEL]


def test_what_clients_may_expect(client):
    """Every row of the table in docs/serving.md."""
    assert expectations.ask(expectations.Server(client, window=256)) == expectations.table(1)


@pytest.mark.parametrize("page", ["docs/agents.md", "docs/zh/agents.md"])
def test_the_programs_of_the_page_on_agents(client, page, capsys, monkeypatch):
    """OpenAI's client, an agent and a chain of LangChain's, and the example, print what the page shows."""
    monkeypatch.setenv("OPENAI_BASE_URL", str(client.base_url))
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    text = (ROOT / page).read_text(encoding="utf-8")
    run_blocks(page, text, MODEL, capsys)
    command = [sys.executable, "examples/tools_client.py", "--server", str(client.base_url), "What is 12 + 7?"]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True).stdout
    assert f"```text\n{output}```" in text


def test_refusals_say_why(client):
    """One line, in the API's form, which clients show."""
    question = [{"role": "user", "content": "Hi"}]
    calls = [{"id": "1", "type": "function", "function": {"name": "a", "arguments": "{"}}]
    for settings, message in (
        ({"n": 2}, "This engine does not support n; `make serve ENGINE=vllm` does."),
        ({"messages": []}, "messages must be a list with at least one message."),
        ({"temperature": -1}, "ValueError: `temperature` (=-1.0) has to be a strictly positive float"),
        ({"messages": [{"role": "assistant", "tool_calls": calls}, *question]}, "JSONDecodeError: Expecting"),
        ({"extra_body": {"min_p": 0.5}}, "Unexpected fields in the request: {'min_p'}"),
        ({"model": "internlm/internlm-7b"}, "Server is pinned to 'internlm-tiny'"),
    ):
        with pytest.raises(openai.APIStatusError) as error:
            client.chat.completions.create(**{"model": MODEL, "messages": question} | settings)
        assert message in str(error.value) and "\n" not in str(error.value)


def test_chat(client, tiny_dir, tiny_model, tiny_tokenizer):
    """Two turns, whole and streamed: the replies of chat(), which end at <eoa>."""
    first, history = tiny_model.chat(tiny_tokenizer, "Hello!", do_sample=False)
    second, _ = tiny_model.chat(tiny_tokenizer, "Who are you?", history, do_sample=False)
    messages = [{"role": "user", "content": "Hello!"}]
    reply = client.chat.completions.create(model=MODEL, messages=messages, temperature=0, max_tokens=100)
    assert reply.choices[0].message.content == first and reply.choices[0].finish_reason == "stop"
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "Who are you?"}]
    settings = {"model": MODEL, "messages": messages, "temperature": 0, "max_tokens": 100}
    assert client.chat.completions.create(**settings).choices[0].message.content == second
    chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**settings, stream=True) if chunk.choices]
    assert "".join(chunk.delta.content or "" for chunk in chunks) == second
    assert len(chunks) > 3 and chunks[-1].finish_reason == "stop"


def test_beyond_the_window(client, tiny_dir, tiny_model, tiny_tokenizer):
    """The server uses transformers' cache, so dynamic NTK is exact: 200 tokens beyond the window of 256."""
    ids = tiny_tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    ids = tiny_model.generate(ids, min_length=300, max_length=300, do_sample=False)
    prompt = tiny_tokenizer.decode(ids[0], skip_special_tokens=True)
    assert torch.equal(tiny_tokenizer(prompt, return_tensors="pt")["input_ids"], ids)
    answer = client.completions.create(model=MODEL, prompt=prompt, max_tokens=156, temperature=0)
    assert answer.choices[0].text == greedy(tiny_model, tiny_tokenizer, prompt, 156)
    assert answer.usage.total_tokens == 456


def test_text_parts_are_joined_as_by_the_template(client, tiny_model, tiny_tokenizer):
    parts = [{"type": "text", "text": text} for text in ("Who are", " you?")]
    messages = [{"role": "user", "content": parts}]
    reply = client.chat.completions.create(model=MODEL, messages=messages, temperature=0, max_tokens=100)
    assert reply.choices[0].message.content == tiny_model.chat(tiny_tokenizer, "Who are you?", do_sample=False)[0]
    assert reply.usage.prompt_tokens == len(
        tiny_tokenizer.apply_chat_template(
            [{"role": "user", "content": "Who are you?"}], add_generation_prompt=True, return_dict=False
        )
    )


def test_a_thought_stays_with_its_call(client, tiny_tokenizer):
    """The prompt of the step after a call is the template's, with the text before the call."""
    said = {"role": "assistant", "content": "Thought: I need the calculator."}
    call = {"name": "calculator", "arguments": {"expression": "12 + 7"}}
    sent = {"name": "calculator", "arguments": '{"expression": "12 + 7"}'}
    question, tools = {"role": "user", "content": "What is 12 + 7?"}, [expectations.CALCULATOR]
    said_to_api = said | {"tool_calls": [{"type": "function", "id": "1", "function": sent}]}
    said_to_template = said | {"tool_calls": [{"type": "function", "function": call}]}
    result = {"role": "tool", "tool_call_id": "1", "content": "19"}
    messages = [question, said_to_api, result]
    reply = client.chat.completions.create(model=MODEL, messages=messages, tools=tools, max_tokens=1)
    expected = tiny_tokenizer.apply_chat_template(
        [question, said_to_template, result], tools=tools, add_generation_prompt=True, return_dict=False
    )
    assert reply.usage.prompt_tokens == len(expected)
