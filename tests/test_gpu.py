"""A model on a CUDA device: the official logits, and the CPU's tokens (`make test-gpu`).

`make test` runs the same tests with the CPU as the device, so that they are known to run where no GPU is.
"""

import copy

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from support.generation import PROMPTS, greedy_ids, greedy_rows, pad_left
from support.golden import CHECKPOINTS, assert_near, forced_decode, load, new_cache
from support.paths import GOLDEN


NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
ATTENTION = pytest.mark.parametrize("attention", ("eager", "sdpa"))


@pytest.fixture(scope="module", params=("cpu", pytest.param("cuda", marks=(pytest.mark.gpu, NO_GPU))))
def device(request):
    return request.param


@pytest.fixture(scope="module")
def model(tiny_model, device):
    return copy.deepcopy(tiny_model).to(device)


@pytest.fixture(scope="module")
def window(tiny_model):
    return tiny_model.config.max_position_embeddings


@ATTENTION
@pytest.mark.parametrize("name", CHECKPOINTS)
@torch.no_grad()
def test_official_logits(modeling, device, name, attention):
    """Prompts at, below and beyond the window, and decode steps across it, with a growing and a static cache."""
    golden = np.load(GOLDEN / name / "golden.npz")
    model, ids = load(modeling, name, attn_implementation=attention).to(device), torch.tensor(golden["ids256"])[None]
    ids = ids.to(device)
    for length in (17, 64, 65, 256):
        logits = model(ids[:, :length]).logits[0].cpu()
        assert_near(logits[golden[f"full_{length}_pos"]], golden[f"full_{length}_logits"])
    for cache in ("dynamic", "static"):
        logits = forced_decode(model, ids, 56, 80, new_cache(cache, model)).cpu()
        assert_near(logits[golden["decode_p56_to80_steps"] - 56], golden["decode_p56_to80_logits"])


@pytest.mark.parametrize("cache", (None, "static"))
def test_generate_gives_the_cpus_tokens(tiny_model, tiny_tokenizer, device, model, window, cache):
    """Single prompts, and a left-padded batch across the window."""
    settings = {"cache_implementation": cache, "disable_compile": True}
    for prompt in PROMPTS:
        ids = tiny_tokenizer(prompt, return_tensors="pt")["input_ids"]
        assert greedy_ids(model, ids.to(device), **settings) == greedy_ids(tiny_model, ids)
    ids = torch.randint(5, 2000, (2, window - 5), generator=torch.Generator().manual_seed(0))
    ids, mask = pad_left([ids[0], ids[1, :100]], window - 5)
    found = greedy_rows(model, ids.to(device), attention_mask=mask.to(device), **settings)
    assert found.tolist() == greedy_rows(tiny_model, ids, attention_mask=mask).tolist()


def test_chat_gives_the_cpus_replies(tiny_model, tiny_tokenizer, model):
    """chat and stream_chat, whose thread uses the device, too; the second turn with the first as its history."""
    history = []
    for query in ("Who are you?", "你好"):
        expected = tiny_model.chat(tiny_tokenizer, query, history, do_sample=False)
        assert model.chat(tiny_tokenizer, query, history, do_sample=False) == expected
        *_, streamed = model.stream_chat(tiny_tokenizer, query, history, do_sample=False)
        assert streamed == expected
        history = expected[1]


@ATTENTION
@pytest.mark.parametrize("scale", (1, 400), ids=("as trained", "products that overflow"))
@torch.no_grad()
def test_float16_is_finite_within_and_beyond_the_window(modeling, device, attention, scale):
    """A prompt and steps up to 2 windows; a product of two elements may overflow although the score does not."""
    model = load(modeling, "tiny_20b_dynamic", dtype=torch.float16, attn_implementation=attention).to(device)
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.mul_(scale)
        layer.self_attn.k_proj.weight.copy_(layer.self_attn.k_proj.weight * scale)
    ids = torch.randint(3, 500, (1, 128), generator=torch.Generator().manual_seed(0)).to(device)
    for cache in ("dynamic", "static"):
        logits = forced_decode(model, ids, 60, 128, new_cache(cache, model))
        assert logits.dtype == torch.float16 and logits.isfinite().all()
    if scale == 1:
        exact = load(modeling, "tiny_20b_dynamic")
        expected = forced_decode(exact, ids.cpu(), 60, 128, new_cache("dynamic", exact))
        assert (logits.cpu().float() - expected).abs().mean() < 0.05


def test_device_map_auto_uses_the_device(tiny_dir, tiny_model, tiny_tokenizer, device):
    """On a machine with a GPU, every layer is on it."""
    if device == "cpu" and torch.cuda.is_available():
        pytest.skip("device_map='auto' takes the GPU")
    model = AutoModelForCausalLM.from_pretrained(
        tiny_dir, trust_remote_code=True, dtype=torch.float32, device_map="auto"
    )
    assert {parameter.device.type for parameter in model.parameters()} == {device}
    ids = tiny_tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    assert greedy_ids(model, ids.to(device)) == greedy_ids(tiny_model, ids)
    assert model.chat(tiny_tokenizer, "Hello!", do_sample=False) == tiny_model.chat(
        tiny_tokenizer, "Hello!", do_sample=False
    )


@pytest.mark.gpu
@NO_GPU
@ATTENTION
@torch.no_grad()
def test_ids_on_the_cpu_are_refused_and_masks_are_moved(tiny_model, attention):
    """As docs/reliability.md says; test_invalid_calls.py tests it with torch's fake tensors."""
    model, ids = copy.deepcopy(tiny_model).cuda(), torch.arange(5, 16)[None]
    model.set_attn_implementation(attention)
    for call in (model, model.generate):
        with pytest.raises(
            ValueError, match=r"^input_ids are on cpu and the model is on cuda:0: move them with inputs"
        ):
            call(ids)
    expected = tiny_model(ids).logits
    for name, given in (("attention_mask", torch.ones_like(ids)), ("position_ids", torch.arange(11)[None])):
        assert_near(model(ids.cuda(), **{name: given}).logits.cpu(), expected)
