"""A model on a CUDA device: the official logits, and the CPU's tokens (`make test-gpu`).

`make test` runs the same tests with the CPU as the device, so that they are known to run where no GPU is.
"""

import copy
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from support.devices import DEVICES, NO_GPU
from support.generation import PROMPTS, greedy_ids, greedy_rows, pad_left
from support.golden import CHECKPOINTS, assert_near, forced_decode, load, new_cache
from support.paths import GOLDEN


ATTENTION = pytest.mark.parametrize("attention", ("eager", "sdpa"))


@pytest.fixture(scope="module", params=DEVICES)
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
    with pytest.raises(ValueError, match=r"^input_ids are on cpu and the model is on cuda:0: move them with inputs"):
        model(ids)
    assert greedy_ids(model, ids) == greedy_ids(tiny_model, ids)  # the library's generate moves them
    expected = tiny_model(ids).logits
    for name, given in (("attention_mask", torch.ones_like(ids)), ("position_ids", torch.arange(11)[None])):
        assert_near(model(ids.cuda(), **{name: given}).logits.cpu(), expected)


@pytest.mark.gpu
@NO_GPU
@torch.no_grad()
def test_official_logits_with_flex_attention_and_a_compiled_static_cache(modeling):
    """The other ways to decode: flex_attention, and generate's compiled forward, whose graph holds the kernels."""
    name = CHECKPOINTS[0]
    golden = np.load(GOLDEN / name / "golden.npz")
    ids = torch.tensor(golden["ids256"])[None].cuda()
    model = load(modeling, name, attn_implementation="flex_attention").cuda()
    for length in (64, 256):
        logits = model(ids[:, :length]).logits[0].cpu()
        assert_near(logits[golden[f"full_{length}_pos"]], golden[f"full_{length}_logits"])
    model = load(modeling, name).cuda()
    cache = new_cache("static", model)
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True, dynamic=False)
    model(ids[:, :56], cache=cache)
    logits = [compiled(ids[:, i : i + 1], cache=cache).logits[:, -1].clone() for i in range(56, 80)]
    found = torch.cat(logits).cpu()
    steps = golden["decode_p56_to80_steps"] - 57
    wanted = torch.tensor(golden["decode_p56_to80_logits"])
    assert_near(found[steps[steps >= 0]], wanted[torch.from_numpy(steps >= 0)].numpy())


@pytest.mark.gpu
@NO_GPU
def test_training_with_autocast_and_gradient_checkpointing(tiny_model):
    """Ten steps in bfloat16 autocast: the loss falls as it does in float32, and everything is finite."""
    losses = {}
    ids = torch.randint(5, 2000, (2, 96), generator=torch.Generator().manual_seed(0)).cuda()
    for autocast in (False, True):
        model = copy.deepcopy(tiny_model).cuda().train()
        if autocast:
            model.gradient_checkpointing_enable()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses[autocast] = []
        for _ in range(10):
            with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
                loss = model(ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[autocast].append(loss.item())
    assert np.isfinite(losses[True]).all() and losses[True][-1] < 0.8 * losses[True][0]
    assert np.allclose(losses[True], losses[False], rtol=0.05)


@pytest.mark.gpu
@NO_GPU
@torch.no_grad()
def test_weights_are_joined_without_changing_what_is_saved(tiny_model, tmp_path):
    """After generate, one product reads q, k and v; moved, copied or replaced weights are noticed."""
    model = copy.deepcopy(tiny_model).cuda()
    linear = sys.modules[f"{type(model).__module__.rpartition('.')[0]}.linear_internlm"]
    ids = torch.arange(5, 16)[None].cuda()
    expected = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
    greedy_ids(model, ids)
    attention = model.model.layers[0].self_attn
    layers = attention.q_proj, attention.k_proj, attention.v_proj
    assert linear._joined[attention.q_proj].holds(layers)
    assert len({p.untyped_storage().data_ptr() for p in model.parameters()}) == len(storages)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == expected.keys() and all(torch.equal(saved[name], expected[name]) for name in saved)
    states = torch.randn(2, 1, model.config.hidden_size, device="cuda")
    for change in ("none", "in place", "replaced", "moved"):
        if change == "in place":
            attention.k_proj.weight.mul_(2)
        elif change == "replaced":
            attention.v_proj.weight.data = attention.v_proj.weight.data * 3
        elif change == "moved":
            model.cpu().cuda()
        assert linear._joined[attention.q_proj].holds(layers) == (change in ("none", "in place"))
        found = linear.call_together(linear.call, layers, states)
        for one, layer in zip(found, layers, strict=True):
            assert_near(one.cpu(), layer(states).cpu())
