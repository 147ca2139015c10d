"""Every way to generate, on the tiny model: the tokens are those of plain greedy search."""

import copy
import logging
import sys
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
from support.golden import load


@pytest.fixture(scope="module")
def generator(tiny_model, tiny_tokenizer):
    return pipeline("text-generation", model=tiny_model, tokenizer=tiny_tokenizer)


@pytest.fixture(scope="module")
def long_prompt(tiny_model, tiny_tokenizer):
    """Generated token ids (1, 250), six fewer than the window."""
    ids = tiny_tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    return tiny_model.generate(ids, min_length=250, max_length=250, do_sample=False)


@pytest.mark.parametrize("batch_size", (1, 4))
def test_pipeline_with_text(generator, tiny_model, tiny_tokenizer, batch_size):
    """One prompt at a time, and a left-padded batch of four lengths."""
    expected = [greedy_text(tiny_model, tiny_tokenizer, prompt) for prompt in PROMPTS]
    outputs = generator(PROMPTS, batch_size=batch_size, **GREEDY)
    assert [output[0]["generated_text"] for output in outputs] == expected
    assert generator(PROMPTS[0], return_full_text=False, **GREEDY)[0]["generated_text"] in expected[0]


def test_pipeline_with_chat(generator, tiny_model, tiny_tokenizer):
    """Messages in, messages out: the reply equals that of chat()."""
    response, history = tiny_model.chat(tiny_tokenizer, "Hello!", do_sample=False)
    messages = [{"role": "user", "content": "Hello!"}]
    reply = generator(messages, max_new_tokens=100, do_sample=False)[0]["generated_text"]
    assert reply == [*messages, {"role": "assistant", "content": response}]
    messages = [*reply, {"role": "user", "content": "Who are you?"}]
    reply = generator(messages, max_new_tokens=100, do_sample=False)[0]["generated_text"]
    assert reply[-1]["content"] == tiny_model.chat(tiny_tokenizer, "Who are you?", history, do_sample=False)[0]


@pytest.mark.parametrize("prompt", PROMPTS[:2])
def test_streamers(tiny_model, tiny_tokenizer, capsys, prompt):
    """The whole text is streamed, in several chunks, with no Chinese character split."""
    inputs = tiny_tokenizer(prompt, return_tensors="pt")
    expected = greedy_text(tiny_model, tiny_tokenizer, prompt)
    tiny_model.generate(**inputs, **GREEDY, streamer=TextStreamer(tiny_tokenizer, skip_special_tokens=True))
    assert capsys.readouterr().out == expected + "\n"

    streamer = TextIteratorStreamer(tiny_tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60)
    thread = Thread(target=tiny_model.generate, kwargs={**inputs, **GREEDY, "streamer": streamer})
    thread.start()
    chunks = list(streamer)
    thread.join()
    assert prompt + "".join(chunks) == expected
    assert len([chunk for chunk in chunks if chunk]) > 3 and not any("\ufffd" in chunk for chunk in chunks)


@pytest.mark.parametrize("way", ("assistant", "early exit", "prompt lookup", "static", "chunked prefill"))
@pytest.mark.parametrize("beyond", (False, True))
def test_ways_to_the_same_text(tiny_model, tiny_dir, tiny_tokenizer, long_prompt, way, beyond):
    """Assisted decoding, static caches and chunked prefill are lossless, inside the window and across its end."""
    ids = long_prompt if beyond else tiny_tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    settings = {
        "assistant": {"assistant_model": weaker_model(tiny_dir) if way == "assistant" else None},
        "early exit": {"assistant_early_exit": 3},
        "prompt lookup": {"prompt_lookup_num_tokens": 4},
        "static": {"cache_implementation": "static"},
        "chunked prefill": {"prefill_chunk_size": 7},
    }[way]
    # Early exit changes the number of layers while it drafts, and does not change it back after an error.
    model = copy.deepcopy(tiny_model) if way == "early exit" else tiny_model
    expected = greedy_ids(tiny_model, ids)
    if way == "chunked prefill" and beyond:  # beyond the window, chunks of the prompt have other bases than the whole
        ids, expected = ids[:, :200], greedy_ids(tiny_model, ids[:, :200], max_new_tokens=80)
        settings["max_new_tokens"] = 80
    assert greedy_ids(model, ids, **settings) == expected


def weaker_model(folder):
    """The tiny model without its last layer: an assistant whose guesses are often, but not always, right."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    config.num_hidden_layers -= 1
    return AutoModelForCausalLM.from_pretrained(folder, config=config, trust_remote_code=True, dtype=torch.float32)


def test_engines_may_bring_their_own_attention(modeling):
    """What vLLM, SGLang and TGI ask of a model in transformers' format before they load it, and flash attention's."""
    for kind in modeling.__all__:
        assert getattr(modeling, kind).is_backend_compatible()


@pytest.mark.parametrize("attention", ("eager", "sdpa"))
def test_generate_batch(modeling, attention):
    """Continuous batching of prompts within, across and far beyond the window of 64: the tokens of each alone."""
    model = load(modeling, "tiny_20b_dynamic", attn_implementation=attention)
    ids = torch.randint(3, model.config.vocab_size, (200,), generator=torch.Generator().manual_seed(0))
    prompts = [ids[:length].tolist() for length in (200, 5, 60, 130)] + [ids[20:40].tolist()]
    expected = [greedy_ids(model, torch.tensor([prompt]), eos_token_id=None) for prompt in prompts]
    outputs = model.generate_batch(
        prompts,
        generation_config=GenerationConfig(**GREEDY, eos_token_id=-1),
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=512),
        progress_bar=False,
    )
    assert [output.generated_tokens for output in outputs.values()] == expected


def test_what_continuous_batching_cannot_compute_is_refused(tiny_dir, tiny_tokenizer, monkeypatch):
    """Where attention alone reads the pages, a request that may pass the window of 256 is refused, others run.

    On a CPU transformers 5.24 is always exact, so its cases are switched off here; tests/matrix_check.py has older
    versions, which are never exact.
    """
    model = AutoModelForCausalLM.from_pretrained(tiny_dir, trust_remote_code=True, dtype=torch.float32)
    batching = sys.modules[type(model).init_continuous_batching.__module__]
    ids = tiny_tokenizer(PROMPTS[0])["input_ids"]
    expected = greedy_ids(model, torch.tensor([ids]))
    monkeypatch.setattr(batching, "PAGES_ARE_EXACT", False)
    settings = {
        "generation_config": GenerationConfig(**GREEDY, eos_token_id=model.generation_config.eos_token_id),
        "continuous_batching_config": ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=640),
    }
    (output,) = model.generate_batch([ids], **settings).values()
    assert output.generated_tokens == expected
    for length, limit in ((300, 5), (250, 7)):
        with pytest.raises(ValueError, match=f"A request of {length} tokens and max_new_tokens={limit} can exceed"):
            model.generate_batch([ids, [5] * length], max_new_tokens=limit, **settings)
    with model.continuous_batching_context_manager(**settings) as manager:
        with pytest.raises(ValueError, match="A request of 240 tokens and max_new_tokens=24 can exceed"):
            manager.add_request([5] * 240)
        assert manager.add_request([5] * 232, max_new_tokens=24)
    model.config.rotary = {**model.config.rotary, "type": "origin"}
    assert len(model.generate_batch([[5] * 300], max_new_tokens=2, **settings)) == 1


@pytest.mark.parametrize("name", ("past_key_values", "cache"))
@torch.no_grad()
def test_cache_by_either_name(tiny_model, tiny_tokenizer, name):
    """transformers 5.24 renamed the argument; the old name still works, with the library's warning (test_cache.py)."""
    ids, cache = tiny_tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"], DynamicCache(config=tiny_model.config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`past_key_values` is deprecated", FutureWarning)
        logits = [tiny_model(part, **{name: cache}).logits for part in ids.split(3, dim=1)]
        torch.testing.assert_close(torch.cat(logits, dim=1), tiny_model(ids).logits, atol=1e-4, rtol=1e-4)
        assert cache.get_seq_length() == ids.shape[1]
        assert tiny_model(ids, **{name: None}).cache.get_seq_length() == ids.shape[1]


@pytest.mark.parametrize("checkpointing", (False, True))
def test_a_model_in_training_fills_a_cache_unless_gradient_checkpointing(modeling, caplog, checkpointing):
    """With it every layer runs twice, and would append twice: the cache that is passed stays empty, with a warning."""
    causal_lm, cache = load(modeling, "tiny_20b_dynamic").train(), DynamicCache()
    if checkpointing:
        causal_lm.activation_checkpointing_enable()
    logging.Logger.warning_once.cache_clear()  # another test may have triggered the warning
    causal_lm(torch.arange(9)[None], cache=cache)
    assert cache.get_seq_length() == (0 if checkpointing else 9)
    assert ("the cache that was passed is not used" in caplog.text) == checkpointing


def test_beam_search_is_the_same_with_and_without_a_cache(tiny_model, tiny_tokenizer):
    """Four beams over a left-padded batch."""
    inputs = tiny_tokenizer(PROMPTS[:2], padding=True, return_tensors="pt")
    outputs = [tiny_model.generate(**inputs, **GREEDY, num_beams=4, use_cache=cache) for cache in (True, False)]
    assert outputs[0].tolist() == outputs[1].tolist()
