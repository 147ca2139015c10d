"""vLLM's Transformers backend runs the assembled folder: same tokens as transformers, up to the trained window.

vLLM manages the keys itself, so dynamic NTK does not apply (docs/long-context.md): inputs longer than the trained
window are refused, and a fixed base, set without changing the folder, allows a longer one.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tools.serving import vllm_server
from tools.serving.vllm_tool_parser import InternLMToolParser

from support import expectations
from support.openai_server import VLLM_ENVIRONMENT, client_of, stop
from support.replies import MALFORMED, NO_JSON, WELL_FORMED


pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]

PROMPTS = ("Coming to the beautiful nature, we found", "来到美丽的大自然，我们发现")
WINDOW, CONTEXT = 256, 1024
ENVIRONMENT = os.environ | VLLM_ENVIRONMENT
# Reads prompts from argv[2]; prints the error for a larger max_model_len, and a result for each prompt, as JSON.
OFFLINE = """
import json, sys
from vllm import LLM, SamplingParams

def attempt(call):
    try:
        return call()
    except Exception as error:
        return str(error)

if __name__ == "__main__":
    settings = {"trust_remote_code": True, "model_impl": "transformers", "dtype": "float32"}
    refused = attempt(lambda: LLM(sys.argv[1], max_model_len=1024, **settings))
    llm = LLM(sys.argv[1], **settings)
    greedy = SamplingParams(temperature=0, max_tokens=24)
    prompts = [{"prompt_token_ids": ids} for ids in json.loads(sys.argv[2])]
    answers = [attempt(lambda: llm.generate([ids], greedy)[0].outputs[0].token_ids) for ids in prompts]
    print("RESULT", json.dumps([str(refused), *map(lambda a: a if isinstance(a, str) else list(a), answers)]))
"""


def greedy(model, ids: list[int], new: int = 24) -> list[int]:
    output = model.generate(torch.tensor([ids]), max_new_tokens=new, do_sample=False)
    return output[0, len(ids) :].tolist()


@pytest.fixture(scope="module")
def long_text(tiny_model, tiny_tokenizer):
    """Generated token ids (300)."""
    ids = tiny_tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    return tiny_model.generate(ids, min_length=300, max_length=300, do_sample=False)[0].tolist()


def test_offline(tiny_dir, tiny_model, tiny_tokenizer, long_text, tmp_path):
    """Same tokens inside the window, where generation ends; longer prompts and a larger max_model_len are refused."""
    prompts = [*(tiny_tokenizer(prompt)["input_ids"] for prompt in PROMPTS), long_text[:246], long_text]
    command = [sys.executable, "-c", OFFLINE, str(tiny_dir), json.dumps(prompts)]
    with (tmp_path / "log.txt").open("w+b") as log:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, env=ENVIRONMENT, start_new_session=True
        )
        try:
            output = process.communicate(timeout=300)[0].decode()
        finally:
            stop(process)
        log.seek(0)
        assert process.returncode == 0, log.read().decode()
    results = [line for line in output.splitlines() if line.startswith("RESULT ")]
    refused, first, second, edge, beyond = json.loads(results[0].removeprefix("RESULT "))
    assert "max_model_len" in refused and str(WINDOW) in refused
    assert [first, second] == [greedy(tiny_model, ids) for ids in prompts[:2]]
    assert edge == greedy(tiny_model, prompts[2], WINDOW - 246)
    assert isinstance(beyond, str) and str(WINDOW) in beyond


@pytest.fixture(scope="module")
def fixed(tiny_dir):
    """The tiny model's configuration with the base fixed for CONTEXT tokens, as in docs/long-context.md."""
    config = AutoConfig.from_pretrained(tiny_dir, trust_remote_code=True)
    for name, value in vllm_server.fixed_context(config, CONTEXT).items():
        setattr(config, name, value)
    return config


@pytest.fixture(scope="module")
def client(tiny_dir, tmp_path_factory):
    """A client of `make serve ENGINE=vllm`, with a key, by two processes that share every matrix (tensor parallel)."""
    command = [sys.executable, "examples/serve.py", "--engine", "vllm", "--model", str(tiny_dir), "--api-key", "none"]
    command += ["--context", str(CONTEXT), "--dtype", "float32", "--enforce-eager", "--tensor-parallel-size", "2"]
    # Where JSON may contain spaces, the tiny model writes them for ever.
    command += ["--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}']
    environment = ENVIRONMENT | {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    with client_of(command, tmp_path_factory.mktemp("vllm") / "log.txt", 240, environment) as client:
        yield client


def test_what_clients_may_expect(client):
    """Every row of the table in docs/serving.md."""
    assert expectations.ask(expectations.Server(client, window=CONTEXT)) == expectations.table(2)


def test_online(client, tiny_dir, fixed, tiny_tokenizer, long_text):
    """The OpenAI API with a fixed base: completions inside and beyond the window, whole and streamed, and chat."""
    model = AutoModelForCausalLM.from_pretrained(tiny_dir, config=fixed, trust_remote_code=True, dtype=torch.float32)
    settings = {"model": "internlm-tiny", "temperature": 0, "max_tokens": 24}
    for ids in (tiny_tokenizer(PROMPTS[1])["input_ids"], long_text):
        expected = tiny_tokenizer.decode(greedy(model, ids), skip_special_tokens=True)
        assert client.completions.create(prompt=ids, **settings).choices[0].text == expected
        stream = client.completions.create(prompt=ids, stream=True, **settings)
        chunks = [chunk.choices[0].text for chunk in stream if chunk.choices]
        assert "".join(chunks) == expected and len(chunks) > 3
    messages = [{"role": "user", "content": "Who are you?"}]
    reply = client.chat.completions.create(messages=messages, **settings | {"max_tokens": 100}).choices[0]
    assert reply.message.content == model.chat(tiny_tokenizer, "Who are you?", do_sample=False)[0]
    assert reply.finish_reason == "stop"


# The tool parser, as vLLM calls it.


def parsed(reply: str, size: int | None = None) -> tuple[str, list[tuple[str, dict]]]:
    """Text and calls of a reply, at once or streamed in pieces of that size."""
    parser = InternLMToolParser(None)
    if size is None:
        found = parser.extract_tool_calls(reply, None)
        assert found.tools_called == bool(found.tool_calls) and found.content != ""
        return found.content or "", [
            (call.function.name, json.loads(call.function.arguments)) for call in found.tool_calls
        ]
    deltas = []
    for end in range(size, len(reply) + size, size):
        deltas.append(parser.extract_tool_calls_streaming(reply[: end - size], reply[:end], reply[end - size : end]))
    deltas = [delta for delta in [*deltas, parser.finish_streaming()] if delta is not None]
    calls = [call for delta in deltas for call in delta.tool_calls]
    assert [call.index for call in calls] == list(range(len(calls))) and len({call.id for call in calls}) == len(calls)
    text = "".join(delta.content or "" for delta in deltas)
    return text, [(call.function.name, json.loads(call.function.arguments)) for call in calls]


@pytest.mark.parametrize("size", [None, 1, 3, 1000])
def test_tool_parser(size):
    """What parse_tool_calls reads, and a malformed call as text, with all of the reply."""
    for reply, (text, calls) in WELL_FORMED.items():
        assert parsed(reply, size) == (text, calls), reply
    for call in [
        *MALFORMED,
        *(f"Action: a\nAction Input: {given}" for given in NO_JSON.values() if len(given) < 9999),
    ]:
        reply = f"Thought: hm\nAct now.\n{call}"
        assert parsed(reply, size) == (reply, []), reply


def test_text_is_streamed_as_it_comes():
    """Nothing but the start of a line that may begin a call is held back."""
    parser, seen = InternLMToolParser(None), ""
    for piece in ("Tho", "ught: x", "\n", "Act", "ive", "\nAction", ": a", "\nAction Input: {}"):
        seen += piece
        delta = parser.extract_tool_calls_streaming("", seen, piece)
        expected = {"\n": None, "Act": None, "ive": "\nActive", "\nAction": None, ": a": None}.get(piece, piece)
        assert (delta and delta.content) == (None if piece.endswith("{}") else expected), piece
    assert parser.finish_streaming().tool_calls[0].function.name == "a"


def test_arguments_are_readable():
    found = InternLMToolParser(None).extract_tool_calls('Action: a\nAction Input: {"x": "河流"}', None)
    assert found.tool_calls[0].function.arguments == '{"x": "河流"}'
