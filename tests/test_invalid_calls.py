"""Unusual and wrong calls: each works as a user would expect, or raises a one-line error that names the fix."""

import copy
import logging
import math

import pytest
import torch
import transformers
from torch._subclasses import FakeTensorMode
from transformers import DynamicCache, StaticCache

from support.versions import needs_torch


ATTENTION = pytest.mark.parametrize("attention", ["sdpa", "eager"])


@pytest.fixture
def model(tiny_model):
    return copy.deepcopy(tiny_model)  # tests change its attention implementation


@pytest.fixture(scope="module")
def ids(tiny_tokenizer) -> torch.Tensor:
    text = "Coming to the beautiful nature, we found a clear river near the old bridge."
    return tiny_tokenizer(text, return_tensors="pt").input_ids[:, :11]


def logits(model, ids, **inputs) -> torch.Tensor:
    with torch.inference_mode():
        return model(ids, **inputs).logits


def greedy(model, ids, new=5, **inputs) -> list[list[int]]:
    return model.generate(ids, do_sample=False, max_new_tokens=new, **inputs)[:, -new:].tolist()


def test_an_empty_prompt_is_refused(model, tiny_tokenizer):
    nothing = tiny_tokenizer("", add_special_tokens=False, return_tensors="pt").input_ids.long()
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=r"The prompt has no tokens.*tokenizer.bos_token_id\.$"):
            call(nothing)


def test_an_empty_text_is_a_prompt(model, tiny_tokenizer):
    """`<s>` alone is a prompt, and an empty message is one too."""
    assert len(greedy(model, tiny_tokenizer("", return_tensors="pt").input_ids)[0]) == 5
    assert model.chat(tiny_tokenizer, "", max_new_tokens=3, do_sample=False)[0]


@ATTENTION
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_an_all_padding_row_is_finite_and_does_not_affect_others(attention, dtype, model, ids):
    model = copy.deepcopy(model).to(dtype)
    model.set_attn_implementation(attention)
    two, mask = torch.cat([torch.zeros_like(ids), ids]), torch.zeros(2, ids.shape[1], dtype=torch.long)
    mask[1] = 1
    found = logits(model, two, attention_mask=mask)
    assert found.isfinite().all()
    atol = {torch.float32: 1e-4, torch.bfloat16: 0.25, torch.float16: 0.03}[dtype]
    torch.testing.assert_close(found[1], logits(model, ids)[0], atol=atol, rtol=0)
    if dtype == torch.float32:
        assert greedy(model, two, attention_mask=mask)[1] == greedy(model, ids)[0]
    assert logits(model, ids, attention_mask=torch.zeros_like(ids)).isfinite().all()


@pytest.mark.parametrize("columns", [-2, -1, 1, 2])
def test_a_mask_of_the_wrong_length_is_refused(columns, model, ids):
    length = ids.shape[1]
    mask = torch.ones(1, length + columns, dtype=torch.long)
    with pytest.raises(ValueError, match=f"attention_mask has {length + columns} columns for {length} tokens"):
        logits(model, ids, attention_mask=mask)
    mask[0, 0] = 0  # generate ignores a mask of ones longer than the prompt
    with pytest.raises(ValueError, match=r"attention_mask.*column.* for every token"):
        greedy(model, ids, attention_mask=mask)


@pytest.mark.parametrize("shape", [(11,), (1, 1, 11), (2, 11)], ids=str)
def test_a_mask_of_the_wrong_shape_is_refused(shape, model, ids):
    assert ids.shape[1] == 11
    with pytest.raises(ValueError, match=r"attention_mask has shape.*for 1 rows: it must have shape \(rows, all"):
        logits(model, ids, attention_mask=torch.ones(shape, dtype=torch.long))


@ATTENTION
def test_one_row_of_positions_or_mask_serves_a_whole_batch(attention, model, ids):
    """As most code passes positions, and a prepared mask of 4 dimensions."""
    model.set_attn_implementation(attention)
    rows, length = torch.cat((ids, ids.flip(1))), ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    causal[3:, 0] = False  # otherwise a mask that is dropped would not be noticed
    for name, one_row in (("position_ids", torch.arange(length)[None] * 2), ("attention_mask", causal[None, None])):
        together = logits(model, rows, **{name: one_row})
        for row in range(2):
            torch.testing.assert_close(
                together[row : row + 1], logits(model, rows[row : row + 1], **{name: one_row}), atol=1e-4, rtol=0
            )
        assert not torch.allclose(together, logits(model, rows), atol=0.1)


def test_either_ids_or_embeddings(model, ids):
    """Both would leave open which are meant, and neither is no input."""
    embeds = model.get_input_embeddings()(ids)
    for inputs in ({}, {"input_ids": ids, "inputs_embeds": embeds}):
        for call in (model, model.model):
            with pytest.raises(ValueError, match=r"^Pass exactly one of input_ids and inputs_embeds\.$"):
                call(**inputs)


@pytest.mark.parametrize("shape", [(11,), (1, 1), (1, 10), (1, 12), (2, 11)], ids=str)
def test_positions_of_the_wrong_shape_are_refused(shape, model, ids):
    """A single position for eleven tokens would be broadcast to all of them."""
    with pytest.raises(ValueError, match=r"position_ids has shape.*for 1 rows of 11 new tokens: it must be \(1, 11\)"):
        logits(model, ids, position_ids=torch.zeros(shape, dtype=torch.long))


def test_positions_out_of_order_and_repeated_are_obeyed(model, ids):
    """Rotary attention depends on position differences: shifts change nothing; other changes do, and stay finite."""
    plain, count = logits(model, ids), torch.arange(ids.shape[1])[None]
    torch.testing.assert_close(logits(model, ids, position_ids=count + 50), plain, atol=1e-4, rtol=0)
    for odd in (count.flip(1), torch.zeros_like(count), count // 2, -count, count * 1000):
        found = logits(model, ids, position_ids=odd)
        assert found.isfinite().all() and not torch.allclose(found, plain, atol=0.1)


@pytest.mark.parametrize("wrong", [2048, -1, -100, 2**40])
def test_ids_out_of_range_are_refused(wrong, model, ids):
    ids = ids.clone()
    ids[0, 3] = wrong
    for call in (logits, greedy):
        with pytest.raises(IndexError, match=r"outside the vocabulary \(0 to 2047\): encode the text with this"):
            call(model, ids)


def test_ids_without_a_batch_dimension_are_refused(model, ids):
    for inputs in ({"input_ids": ids[0]}, {"inputs_embeds": torch.zeros(11, 128)}):
        with pytest.raises(ValueError, match=r"input_ids must have shape \(batch, tokens\), .*input_ids\[None\]"):
            model(**inputs)


def padded(ids: torch.Tensor, sides: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    rows = [torch.nn.functional.pad(ids, side) for side in sides]
    masks = [torch.nn.functional.pad(torch.ones_like(ids), side) for side in sides]
    return torch.cat(rows), torch.cat(masks)


@ATTENTION
@pytest.mark.parametrize("repeat", [1, 30], ids=["inside", "beyond the window"])
def test_mixed_padding_sides(repeat, attention, model, ids):
    """Each row's logits are those of the row without padding, wherever the padding is."""
    model.set_attn_implementation(attention)
    ids = ids.repeat(1, repeat)
    rows, mask = padded(ids, [(0, 4), (4, 0), (2, 2)])
    found, alone = logits(model, rows, attention_mask=mask, use_cache=True), logits(model, ids, use_cache=True)[0]
    for row in range(3):
        torch.testing.assert_close(found[row, mask[row].bool()], alone, atol=2e-3, rtol=0)


def test_generate_warns_of_right_padding(model, ids, caplog, monkeypatch):
    """The library warns, because generated tokens would follow padding instead of text. Other rows are unaffected."""
    model.set_attn_implementation("sdpa")
    rows, mask = padded(ids, [(0, 4), (4, 0)])
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    assert greedy(model, rows, attention_mask=mask)[1] == greedy(model, ids)[0]
    assert "right-padding was detected" in caplog.text


def test_no_new_tokens_are_refused(model, ids, tiny_tokenizer):
    """The error is transformers' own, also from chat and from stream_chat's thread."""
    for call in (
        lambda: greedy(model, ids, new=0),
        lambda: model.chat(tiny_tokenizer, "Hello", max_new_tokens=0),
        lambda: list(model.stream_chat(tiny_tokenizer, "Hello", max_new_tokens=0)),
    ):
        with pytest.raises(ValueError, match="`max_new_tokens` must be greater than 0, but is 0"):
            call()


def other_model(model, **changes):
    config = type(model.config)(**model.config.to_dict() | changes)
    return type(model)(config).eval()


def filled(model, ids, cache=None) -> DynamicCache | StaticCache:
    cache = DynamicCache() if cache is None else cache
    logits(model, ids, past_key_values=cache)
    return cache


WRONG_CACHES = {
    "fewer layers": (lambda m, ids: filled(other_model(m, num_hidden_layers=2), ids), "has 2 layers.* this model 4"),
    "other heads": (
        lambda m, ids: filled(other_model(m, num_attention_heads=2, num_key_value_heads=2), ids),
        "belongs to another model, has another batch size",
    ),
    "more rows": (lambda m, ids: filled(m, ids.repeat(2, 1)), "belongs to another model, has another batch size"),
    "static, more rows": (
        lambda m, ids: filled(m, ids.repeat(2, 1), StaticCache(config=m.config, max_cache_len=32)),
        "belongs to another model, has another batch size",
    ),
    "static, full": (
        lambda m, ids: filled(m, ids, StaticCache(config=m.config, max_cache_len=11)),
        "a static cache that is full",
    ),
    "a dict": (lambda m, ids: {"keys": torch.zeros(1, 4, 3, 32)}, "The cache is a dict: pass"),
    "a tensor": (lambda m, ids: torch.zeros(1, 4, 3, 32), "The cache is a Tensor: pass"),
    "a tuple": (lambda m, ids: ((torch.zeros(1, 4, 3, 32),) * 2,) * 4, "The cache is a tuple: pass"),
}


@pytest.mark.parametrize("name", WRONG_CACHES)
def test_a_cache_that_does_not_fit_is_refused(name, model, ids):
    make, message = WRONG_CACHES[name]
    cache = make(model, ids)
    with pytest.raises(ValueError, match=message) as caught:
        logits(model, ids[:, :1], past_key_values=cache)
    assert "\n" not in str(caught.value)


def test_out_of_memory_in_a_cache_stays_out_of_memory(model, ids):
    """It is not a cache that does not fit: frameworks catch torch's own class and try a smaller batch."""

    class Full(DynamicCache):
        def update(self, *args, **kwargs):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    with pytest.raises(torch.OutOfMemoryError, match="^CUDA out of memory"):
        logits(model, ids, past_key_values=Full())


def test_a_cache_longer_than_the_prompt_is_refused(model, ids):
    with pytest.raises(ValueError, match="no tokens, or none beyond those in the cache"):
        greedy(model, ids[:, :3], past_key_values=filled(model, ids))


def test_other_dtypes(model, ids):
    """Masks and positions of any dtype, 32-bit ids work; half-precision embeddings are promoted, float64 refused."""
    plain, count = logits(model, ids), torch.arange(ids.shape[1])[None]
    for inputs in (
        {"attention_mask": torch.ones(1, 11)},
        {"attention_mask": torch.ones(1, 11, dtype=torch.bool)},
        {"position_ids": count.float()},
        {"position_ids": count.int()},
    ):
        assert torch.equal(logits(model, ids, **inputs), plain)
    assert torch.equal(logits(model, ids.int()), plain)
    embeds = model.get_input_embeddings()(ids).detach()
    torch.testing.assert_close(logits(model, None, inputs_embeds=embeds.bfloat16()), plain, atol=0.2, rtol=0)
    with pytest.raises(RuntimeError, match="dtype"):
        logits(model, None, inputs_embeds=embeds.double())
    with pytest.raises(RuntimeError, match="Long, Int; but got torch.FloatTensor"):
        logits(model, ids.float())


def test_inputs_that_are_not_contiguous(model, ids):
    plain, embeds = logits(model, ids), model.get_input_embeddings()(ids).detach()
    strided = torch.stack([ids, ids], dim=-1)[..., 0]
    assert not strided.is_contiguous() and torch.equal(logits(model, strided), plain)
    transposed = embeds.transpose(1, 2).contiguous().transpose(1, 2)
    assert not transposed.is_contiguous()
    torch.testing.assert_close(logits(model, None, inputs_embeds=transposed), plain, atol=1e-4, rtol=0)


@needs_torch("2.7", "does not compare the devices of fake ids and an embedding")
def test_ids_on_another_device_are_refused(model, ids):
    """Fake tensors follow the rules of a GPU without one."""
    with (
        FakeTensorMode(allow_non_fake_inputs=True) as mode,
        pytest.raises(ValueError, match=r"^input_ids are on cuda:0 and the model is on cpu: move them with inputs.to"),
    ):
        model(mode.from_tensor(ids).to("cuda:0"))


@ATTENTION
def test_masks_and_positions_on_another_device_are_moved(attention, model, ids):
    model.set_attn_implementation(attention)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        here = mode.from_tensor(ids)
        for name, given in (("attention_mask", torch.ones_like(here)), ("position_ids", torch.arange(11)[None])):
            if name == "position_ids" or transformers.__version__ > "5":  # 4.57 reads the values of a mask
                found = model(here, **{name: given.to("cuda:0")}).logits
                assert found.shape == (1, 11, 2048) and found.device.type == "cpu"


def test_embeddings_on_another_device(model, ids):
    """On `meta`, the only other device here, torch's error names the devices."""
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        logits(model, None, inputs_embeds=model.get_input_embeddings()(ids).detach().to("meta"))


# Half precision near its maximum


def official_norm(states: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """The official RMSNorm: variance and normalisation in float32, result in the dtype of the weight."""
    variance = states.to(torch.float32).pow(2).mean(-1, keepdim=True)
    return weight * (states * torch.rsqrt(variance + eps)).to(weight.dtype)


def official_attention(query, key, value, mask) -> torch.Tensor:
    """The official attention: product, division, mask and clamp in the model's dtype, softmax in float32."""
    scores = torch.matmul(query, key.transpose(2, 3)) / math.sqrt(query.shape[-1])
    scores = torch.max(scores + mask, torch.tensor(torch.finfo(scores.dtype).min))
    weights = torch.nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return torch.matmul(weights, value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_norm_in_float32_rounds_nothing_to_half_precision(dtype, modeling):
    """Quantised models keep the norms in float32: mean square, product and result are float32's, as the official."""
    norm = modeling.InternLMRMSNorm(128, 1e-6)
    generator = torch.Generator().manual_seed(0)
    torch.nn.init.normal_(norm.weight, generator=generator)
    states = torch.randn(4, 128, generator=generator).to(dtype)
    with torch.no_grad():
        found = norm(states)
    torch.testing.assert_close(found, official_norm(states, norm.weight, 1e-6).detach(), atol=1e-5, rtol=0)


def test_the_norm_is_finite_at_the_half_precision_maximum(modeling):
    norm = modeling.InternLMRMSNorm(128, 1e-6).half()
    states = (torch.rand(4, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1) * 65504
    states[0], states[1, ::2], states[2] = 65504, -65504, 0
    states = states.half()
    with torch.no_grad():
        found = norm(states)
    assert found.isfinite().all() and torch.equal(found, official_norm(states, norm.weight, 1e-6).detach())


@pytest.mark.parametrize("sign", [-1, 1], ids=["products to -inf", "products to inf"])
@pytest.mark.parametrize("hidden", [0, 2], ids=["causal", "left padding"])
def test_attention_is_finite_at_the_half_precision_maximum(hidden, sign, modeling, model):
    """When products overflow, the official clamp makes -inf finite, but +inf becomes NaN; ours clamps both."""
    rng = torch.Generator().manual_seed(1)
    query = (torch.rand(1, 2, 6, 32, generator=rng) * 60000).half()
    key, value = sign * query.clone(), torch.randn(1, 2, 6, 32, generator=rng).half()
    low = torch.finfo(torch.float16).min
    mask = torch.full((6, 6), low, dtype=torch.float16).triu(1)
    mask[:, :hidden] = low
    found, _ = modeling.eager_attention_forward(
        model.model.layers[0].self_attn, query, key, value, mask[None, None], scaling=32**-0.5
    )
    assert found.isfinite().all()
    official = official_attention(query, key, value, mask[None, None]).transpose(1, 2)
    finite = official.isfinite()
    assert finite.all() == (sign < 0)
    torch.testing.assert_close(found[finite], official[finite], atol=0, rtol=0)


@ATTENTION
def test_overflowing_scores_do_not_cause_nan_logits(attention, modeling, model, ids):
    """The whole model in float16, with queries and keys so large that every product overflows."""
    model = copy.deepcopy(model).half()
    model.set_attn_implementation(attention)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(400)
            layer.self_attn.k_proj.weight.copy_(-layer.self_attn.q_proj.weight)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    assert logits(model, ids, attention_mask=mask).isfinite().all()


def test_the_message_gives_the_shape_of_ids_without_a_batch_dimension(model, ids):
    """Found by mutation: without the last dimension of embeddings, which ids do not have."""
    for inputs in ({"input_ids": ids[0]}, {"inputs_embeds": torch.zeros(11, 128)}):
        with pytest.raises(ValueError, match=r"and has \(11,\): pass input_ids\[None\]"):
            model(**inputs)
