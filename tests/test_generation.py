"""What users do with a causal LM every day, on the tiny model: each way gives the text of plain greedy search."""

import logging
import warnings
from threading import Thread

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)

from support.generation import GREEDY, PROMPTS, greedy_ids, greedy_text


@pytest.fixture(scope="module")
def generator(tiny_model, tiny_tokenizer):
    return pipeline("text-generation", model=tiny_model, tokenizer=tiny_tokenizer)


@pytest.fixture(scope="module")
def long_prompt(tiny_model, tiny_tokenizer):
    """Token ids (1, 250) that the model wrote itself: six short of the window."""
    ids = tiny_tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    return tiny_model.generate(ids, min_length=250, max_length=250, do_sample=False)


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
