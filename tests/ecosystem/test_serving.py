"""The server of `make serve` with the real openai client: the replies are transformers' greedy ones."""

import sys

import openai
import pytest
import torch

from support.openai_server import client_of


pytestmark = pytest.mark.ecosystem

PROMPTS = ("Coming to the beautiful nature, we found", "来到美丽的大自然，我们发现")
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
    answer = client.completions.create(model=str(tiny_dir), prompt=prompt, **GREEDY)
    assert answer.choices[0].text == expected and answer.usage.completion_tokens == 24
    stream = client.completions.create(model=str(tiny_dir), prompt=prompt, stream=True, **GREEDY)
    chunks = [chunk.choices[0].text for chunk in stream if chunk.choices]
    assert "".join(chunks) == expected and len(chunks) > 3 and not any("\ufffd" in chunk for chunk in chunks)


def test_models(client, tiny_dir):
    """Clients can ask for the name that they must use."""
    assert str(tiny_dir) in [model.id for model in client.models.list()]


def test_chat(client, tiny_dir, tiny_model, tiny_tokenizer):
    """Two turns, whole and streamed: the replies of chat(), which end at <eoa>."""
    first, history = tiny_model.chat(tiny_tokenizer, "Hello!", do_sample=False)
    second, _ = tiny_model.chat(tiny_tokenizer, "Who are you?", history, do_sample=False)
    messages = [{"role": "user", "content": "Hello!"}]
    reply = client.chat.completions.create(model=str(tiny_dir), messages=messages, temperature=0, max_tokens=100)
    assert reply.choices[0].message.content == first and reply.choices[0].finish_reason == "stop"
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "Who are you?"}]
    settings = {"model": str(tiny_dir), "messages": messages, "temperature": 0, "max_tokens": 100}
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
    answer = client.completions.create(model=str(tiny_dir), prompt=prompt, max_tokens=156, temperature=0)
    assert answer.choices[0].text == greedy(tiny_model, tiny_tokenizer, prompt, 156)
    assert answer.usage.total_tokens == 456


def test_another_model_is_refused(client):
    """The server was started for one model, which the error names."""
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model="internlm/internlm-7b", prompt="x", **GREEDY)
    assert "pinned to" in error.value.response.text
