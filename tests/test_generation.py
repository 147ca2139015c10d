"""What users do with a causal LM every day, on the tiny model: each way gives the text of plain greedy search."""

import logging
import os
import shutil
import subprocess
import sys
import warnings
from threading import Thread

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    CompileConfig,
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)
from transformers.integrations.executorch import TorchExportableModuleForDecoderOnlyLM


PROMPTS = ["Coming to the beautiful nature, we found", "来到美丽的大自然，我们发现", "In the evening", "The"]
GREEDY = {"max_new_tokens": 24, "do_sample": False}
WINDOW = 256  # of checkpoints/tiny
# Loads the folder argv[1] and prints the greedy continuation of argv[2] and the path of the code that ran.
FRESH_PROCESS = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, dtype=torch.float32)
output = model.generate(**tokenizer(sys.argv[2], return_tensors="pt"), max_new_tokens=24, do_sample=False)
sys.stdout.buffer.write(tokenizer.decode(output[0], skip_special_tokens=True).encode())
"""


@pytest.fixture(scope="module")
def generator(tiny_model, tiny_tokenizer):
    return pipeline("text-generation", model=tiny_model, tokenizer=tiny_tokenizer)


@pytest.fixture(scope="module")
def long_prompt(tiny_model, tiny_tokenizer):
    """Token ids (1, 250) that the model wrote itself: six short of the window."""
    ids = tiny_tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    return tiny_model.generate(ids, min_length=250, max_length=250, do_sample=False)


def greedy_ids(model, ids: torch.Tensor, **settings) -> list[int]:
    """The new tokens of one prompt (1, L)."""
    output = model.generate(ids, attention_mask=torch.ones_like(ids), **{**GREEDY, **settings})
    return output[0, ids.shape[1] :].tolist()


def greedy_text(model, tokenizer, prompt: str) -> str:
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    return prompt + tokenizer.decode(greedy_ids(model, ids), skip_special_tokens=True)


@pytest.mark.parametrize("batch_size", (1, 4))
def test_pipeline_with_text(generator, tiny_model, tiny_tokenizer, batch_size):
    """One prompt, and a left-padded batch of four lengths."""
    expected = [greedy_text(tiny_model, tiny_tokenizer, prompt) for prompt in PROMPTS]
    outputs = generator(PROMPTS, batch_size=batch_size, **GREEDY)
    assert [output[0]["generated_text"] for output in outputs] == expected
    assert generator(PROMPTS[0], return_full_text=False, **GREEDY)[0]["generated_text"] in expected[0]


def test_pipeline_with_chat(generator, tiny_model, tiny_tokenizer):
    """Messages in, messages out: the reply is chat()'s."""
    response, history = tiny_model.chat(tiny_tokenizer, "Hello!", do_sample=False)
    messages = [{"role": "user", "content": "Hello!"}]
    reply = generator(messages, max_new_tokens=100, do_sample=False)[0]["generated_text"]
    assert reply == [*messages, {"role": "assistant", "content": response}]
    messages = [*reply, {"role": "user", "content": "Who are you?"}]
    reply = generator(messages, max_new_tokens=100, do_sample=False)[0]["generated_text"]
    assert reply[-1]["content"] == tiny_model.chat(tiny_tokenizer, "Who are you?", history, do_sample=False)[0]


@pytest.mark.parametrize("prompt", PROMPTS[:2])
def test_streamers(tiny_model, tiny_tokenizer, capsys, prompt):
    """What is streamed is the whole text, in several pieces, no Chinese character cut in two."""
    inputs = tiny_tokenizer(prompt, return_tensors="pt")
    expected = greedy_text(tiny_model, tiny_tokenizer, prompt)
    tiny_model.generate(**inputs, **GREEDY, streamer=TextStreamer(tiny_tokenizer, skip_special_tokens=True))
    assert capsys.readouterr().out == expected + "\n"

    streamer = TextIteratorStreamer(tiny_tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60)
    thread = Thread(target=tiny_model.generate, kwargs={**inputs, **GREEDY, "streamer": streamer})
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert prompt + "".join(pieces) == expected
    assert len([piece for piece in pieces if piece]) > 3 and not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("way", ("assistant", "early exit", "prompt lookup", "static", "sliced prefill"))
@pytest.mark.parametrize("beyond", (False, True))
def test_ways_to_the_same_text(tiny_model, tiny_dir, tiny_tokenizer, long_prompt, way, beyond):
    """Assisted decoding and its like are lossless, inside the window and across its end."""
    ids = long_prompt if beyond else tiny_tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    settings = {
        "assistant": {"assistant_model": weaker(tiny_dir) if way == "assistant" else None},
        "early exit": {"assistant_early_exit": 3},
        "prompt lookup": {"prompt_lookup_num_tokens": 4},
        "static": {"cache_implementation": "static"},
        "sliced prefill": {"prefill_chunk_size": 7},
    }[way]
    expected = greedy_ids(tiny_model, ids)
    if way == "sliced prefill" and beyond:  # each slice has the length reached with it: the prompt is another function
        ids, expected = ids[:, :200], greedy_ids(tiny_model, ids[:, :200], max_new_tokens=80)
        settings["max_new_tokens"] = 80
    assert greedy_ids(tiny_model, ids, **settings) == expected


def weaker(folder):
    """The tiny model without its last layer: right often, but not always."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    config.num_hidden_layers -= 1
    return AutoModelForCausalLM.from_pretrained(folder, config=config, trust_remote_code=True, dtype=torch.float32)


@pytest.mark.parametrize("attention", ("eager", "sdpa"))
def test_generate_batch(tiny_dir, tiny_tokenizer, attention, caplog):
    """Continuous batching of six prompts of different lengths, and a word about what it cannot do."""
    model = AutoModelForCausalLM.from_pretrained(
        tiny_dir, trust_remote_code=True, dtype=torch.float32, attn_implementation=attention
    )
    logging.Logger.warning_once.cache_clear()  # another test may have had the warning already
    prompts = [tiny_tokenizer(text)["input_ids"] for text in (*PROMPTS, "x", "Hello! " * 20)]
    expected = [greedy_ids(model, torch.tensor([ids])) for ids in prompts]
    outputs = model.generate_batch(
        prompts,
        generation_config=GenerationConfig(**GREEDY, eos_token_id=model.generation_config.eos_token_id),
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=64),
        progress_bar=False,
    )
    assert [output.generated_tokens for output in outputs.values()] == expected
    assert "max_position_embeddings=256 tokens come out wrong" in caplog.text


@pytest.mark.parametrize("name", ("past_key_values", "cache"))
@torch.no_grad()
def test_cache_by_either_name(tiny_model, tiny_tokenizer, name):
    """transformers 5.24 renamed the argument; calls by the old name go on, and warn of nothing."""
    ids, cache = tiny_tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"], DynamicCache(config=tiny_model.config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits = [tiny_model(part, **{name: cache}).logits for part in ids.split(3, dim=1)]
    torch.testing.assert_close(torch.cat(logits, dim=1), tiny_model(ids).logits, atol=1e-4, rtol=1e-4)
    assert cache.get_seq_length() == ids.shape[1]
    assert tiny_model(ids, **{name: None}).cache.get_seq_length() == ids.shape[1]


def test_beam_search_needs_no_code_of_ours(tiny_model, tiny_tokenizer):
    """Four beams over a left-padded batch, the same with a cache as without."""
    inputs = tiny_tokenizer(PROMPTS[:2], padding=True, return_tensors="pt")
    outputs = [tiny_model.generate(**inputs, **GREEDY, num_beams=4, use_cache=cache) for cache in (True, False)]
    assert outputs[0].tolist() == outputs[1].tolist()


def test_compiled_static_cache(tiny_dir, tiny_tokenizer):
    """generate() compiles the decoding step by itself on a GPU; made to on a CPU, it captures one whole graph."""
    model = AutoModelForCausalLM.from_pretrained(tiny_dir, trust_remote_code=True, dtype=torch.float32)
    ids = tiny_tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    config = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    config._compile_all_devices = True
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    compiled = greedy_ids(model, ids, cache_implementation="static", compile_config=config)
    counters = torch._dynamo.utils.counters["stats"]
    assert compiled == greedy_ids(model, ids)
    assert counters["unique_graphs"] == 1 and not torch._dynamo.utils.counters["graph_break"]


@torch.no_grad()
def test_embeddings(tiny_dir, tiny_tokenizer):
    """AutoModel is the model without a head; a padded row has the hidden states of the row alone."""
    model = AutoModel.from_pretrained(tiny_dir, trust_remote_code=True, dtype=torch.float32)
    batch = tiny_tokenizer(PROMPTS, padding=True, return_tensors="pt")
    states = model(**batch).last_hidden_state
    assert states.shape == (*batch["input_ids"].shape, model.config.hidden_size)
    for prompt, row in zip(PROMPTS, states, strict=True):
        alone = model(**tiny_tokenizer(prompt, return_tensors="pt")).last_hidden_state[0]
        torch.testing.assert_close(row[-len(alone) :], alone, atol=1e-4, rtol=1e-4)


def test_auto_model_cannot_chat(tiny_dir, tiny_tokenizer):
    model = AutoModel.from_pretrained(tiny_dir, trust_remote_code=True)
    for method in (model.chat, model.stream_chat):
        with pytest.raises(AttributeError, match="AutoModelForCausalLM"):
            method(tiny_tokenizer, "Hello!")


def test_sequence_classification(tiny_dir, tiny_tokenizer):
    """A new head on the tiny model: rows do not depend on padding, on either side, and the loss trains it."""
    model = AutoModelForSequenceClassification.from_pretrained(
        tiny_dir, trust_remote_code=True, num_labels=3, dtype=torch.float32
    )
    alone = torch.cat([model(**tiny_tokenizer(prompt, return_tensors="pt")).logits for prompt in PROMPTS])
    assert alone.shape == (4, 3)
    for side in ("left", "right"):
        batch = tiny_tokenizer(PROMPTS, padding=True, padding_side=side, return_tensors="pt")
        torch.testing.assert_close(model(**batch).logits, alone, atol=1e-4, rtol=1e-4)
    optimizer, labels = torch.optim.AdamW(model.parameters(), lr=3e-3), torch.tensor([0, 1, 2, 0])
    losses = []
    for _ in range(8):
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_offload_to_cpu_and_disk(tiny_dir, tiny_model, tiny_tokenizer, tmp_path):
    """Layers that wait on a disk give the same text."""
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    device_map |= {f"model.layers.{i}": "cpu" if i < 2 else "disk" for i in range(4)}
    model = AutoModelForCausalLM.from_pretrained(
        tiny_dir, trust_remote_code=True, dtype=torch.float32, device_map=device_map, offload_folder=tmp_path
    )
    assert model.model.layers[3].mlp.up_proj.weight.device.type == "meta"
    assert model.hf_device_map["model.layers.3"] == "disk"
    for prompt in PROMPTS[:2]:
        assert greedy_text(model, tiny_tokenizer, prompt) == greedy_text(tiny_model, tiny_tokenizer, prompt)


def test_saved_copy_in_a_fresh_process(tiny_dir, tmp_path):
    """save_pretrained takes the code along; the copy speaks without the original folder or its code cache."""
    source, copy = tmp_path / "source", tmp_path / "a.b-c 模型 7B"
    shutil.copytree(tiny_dir, source)
    model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=True)
    expected = greedy_text(model, tokenizer, PROMPTS[1])
    model.save_pretrained(copy)
    tokenizer.save_pretrained(copy)
    original = AutoConfig.from_pretrained(source, trust_remote_code=True).auto_map
    shutil.rmtree(source)

    for kind in ("configuration", "modeling", "tokenization"):
        code = (copy / f"{kind}_internlm.py").read_text()
        assert code == (tiny_dir / f"{kind}_internlm.py").read_text()
    saved = AutoConfig.from_pretrained(copy, trust_remote_code=True).auto_map
    assert saved["AutoModelForCausalLM"].endswith("modeling_internlm.InternLMForCausalLM")
    assert saved.keys() <= original.keys()
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", FRESH_PROCESS, str(copy), PROMPTS[1]]
    process = subprocess.run(command, capture_output=True, env=environment)
    assert process.returncode == 0, process.stderr.decode()
    assert process.stdout.decode() == expected


@pytest.mark.parametrize("length", (5, WINDOW, WINDOW + 44))
@torch.no_grad()
def test_export(tiny_model, length):
    """torch.export takes the forward of a prompt, at any length, with no graph break."""
    ids = torch.randint(5, 2000, (1, length), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "use_cache": False}
    program = torch.export.export(tiny_model, (), inputs, strict=False)
    other = torch.flip(ids, (1,))
    exported = program.module()(input_ids=other, use_cache=False).logits
    torch.testing.assert_close(exported, tiny_model(other, use_cache=False).logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_export_with_cache(tiny_dir, tiny_tokenizer):
    """The export that ExecuTorch starts from, a decoding step on a static cache, says what generate() says."""
    model = AutoModelForCausalLM.from_pretrained(tiny_dir, trust_remote_code=True, dtype=torch.float32)
    model.generation_config.use_cache, model.generation_config.cache_implementation = True, "static"
    model.generation_config.cache_config = {"batch_size": 1, "max_cache_len": 300, "device": "cpu"}
    ids = tiny_tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    expected = greedy_ids(model, ids, cache_implementation="dynamic")
    exportable = TorchExportableModuleForDecoderOnlyLM(model, batch_size=1, max_cache_len=300, device="cpu")
    program = exportable.export(input_ids=ids[:, :1], cache_position=torch.tensor([0]))
    step = program.module()
    tokens = ids[0].tolist()
    for place in range(len(tokens) + len(expected) - 1):
        logits = step(input_ids=torch.tensor([[tokens[place]]]), cache_position=torch.tensor([place]))
        if place + 1 >= len(tokens):
            tokens.append(logits[0, -1].argmax().item())
    assert tokens[ids.shape[1] :] == expected
