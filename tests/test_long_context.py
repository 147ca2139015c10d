"""Dynamic NTK beyond the window, for every kind of input and cache (golden checkpoint, window 64)."""

import copy

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import flash_attention_mask

from benchmarks.counts import count_operators
from benchmarks.models import Shape, our_model

from support.generation import greedy_rows, pad_left
from support.golden import assert_near, forced_decode, load, new_cache, one_layer, with_fixed_base


WINDOW = 64


@pytest.fixture(scope="module")
def model(modeling):
    return load(modeling, "tiny_20b_dynamic")


@pytest.fixture(scope="module")
def ids(model):
    return torch.randint(3, model.config.vocab_size, (3, 300), generator=torch.Generator().manual_seed(0))


def test_worked_numbers(rotary, configuration):
    """The base of the 20B at 1, 2 and 4 windows, as documented in rotary_internlm.py."""
    config = configuration.InternLMConfig(hidden_size=5120, num_attention_heads=40, max_position_embeddings=4096)
    lengths = torch.tensor([[4000.0], [4096.0], [8192.0], [16384.0]])
    lowest = rotary.ntk_log_ratio(config, lengths)[:, -1].exp() * rotary.trained_inv_freq(config, lengths.device)[-1]
    bases = lowest.double() ** (-128 / 126)
    assert bases.tolist() == pytest.approx([10000, 10000, 20221.3, 40889.9], rel=1e-4)
    assert rotary.ntk_log_ratio(config, lengths)[:2].abs().max() == 0


@pytest.fixture
def default_dtype(request):
    """torch's default dtype, which many scripts change, is the parameter."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


@pytest.mark.parametrize("key_source", ("engine", "forward", "cache"))
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32))
@pytest.mark.parametrize("default_dtype", (torch.bfloat16, torch.float32), ids=str, indirect=True)
def test_angles_are_float32_under_any_dtype_and_autocast(rotary, model, default_dtype, dtype, key_source):
    """Half precision would distinguish only 797 of 5000 positions: every table is exact up to rounding."""
    config, length = model.config, 16000
    positions, exponents = torch.arange(length), torch.arange(0, config.head_dim, 2).double() / config.head_dim
    places = rotary.Positions(new=positions[None], slots=positions, key_length=length, key_offset=0)
    with torch.autocast("cpu", dtype=torch.bfloat16 if dtype == torch.float32 else dtype):
        cos, sin, corrections = rotary.rotary_tables(
            config, torch.zeros(1, length, 1, dtype=dtype), places, None, None, key_source
        )
    trained = 10000**-exponents
    grown = (10000 * (length / WINDOW) ** (config.head_dim / (config.head_dim - 2))) ** -exponents
    expected = [(cos, sin, grown if key_source == "forward" else trained)]
    expected += [(*tables, grown - trained) for correction in corrections for tables in correction]
    assert len(corrections) == (key_source == "cache")
    for cos, sin, inv_freq in expected:
        angles, half = positions[:, None] * inv_freq, config.head_dim // 2
        assert cos.dtype == sin.dtype == dtype
        assert_near(cos[0, 0, :, :half].double(), angles.cos(), atol=5e-3)
        assert_near(sin[0, 0, :, half:].double(), angles.sin(), atol=5e-3)


@pytest.mark.parametrize("length", (WINDOW - 1, WINDOW, WINDOW + 1))
@torch.no_grad()
def test_dynamic_ntk_starts_right_after_the_window(model, ids, length):
    """M-1 and M tokens are plain rotary, M+1 are not; with and without a cache the logits agree at each length."""
    tokens = ids[:1, :length]
    cached = model(tokens, cache=new_cache("dynamic", model)).logits
    assert_near(cached, model(tokens, use_cache=False).logits)
    assert_near(cached, model(tokens, cache=new_cache("static", model)).logits)
    plain = copy.deepcopy(model)
    plain.config.rotary = {**model.config.rotary, "type": "origin"}
    difference = (plain(tokens).logits - cached).abs().max()
    assert difference < 1e-4 if length <= WINDOW else difference > 0.1


@pytest.mark.parametrize("cache", ("dynamic", "static"))
@torch.no_grad()
def test_chunked_prefill(model, ids, cache):
    """A chunk uses the length reached at its end, as in the official code."""
    chunks, past = [], new_cache(cache, model)
    for start, end in ((0, 40), (40, 70), (70, 71), (71, 120)):
        chunks.append(model(ids[:1, start:end], cache=past).logits[0])
    plain = with_fixed_base(model, 120)
    # The first layer's keys do not depend on earlier bases: with one layer, the last chunk equals a full forward.
    one = one_layer(model)
    past = new_cache(cache, one)
    for start, end in ((0, 40), (40, 70), (70, 71), (71, 120)):
        last = one(ids[:1, start:end], cache=past).logits[0]
    assert_near(last, one_layer(plain)(ids[:1, :120]).logits[0, 71:])
    # Up to the window, chunks change nothing.
    assert_near(chunks[0], model(ids[:1, :40]).logits[0])
    for length in (10, 30, WINDOW):
        past = new_cache(cache, model)
        for start in range(0, length, 10):
            out = model(ids[:1, start : min(start + 10, length)], cache=past).logits[0]
        assert_near(out[-1], model(ids[:1, :length]).logits[0, -1])


@pytest.mark.parametrize("new", (20, 32, 33))
@torch.no_grad()
def test_few_tokens_at_once_equal_one_by_one(model, ids, new):
    """Up to 32 tokens at once use their own lengths, in padded rows too, exactly as in separate decode steps.

    More share the length at their end.
    """
    padded, mask = pad_left([ids[0, :120], ids[1, :90], ids[2, :70]], 120)
    together, apart = new_cache("dynamic", model), new_cache("dynamic", model)
    for past in (together, apart):
        model(padded[:, :80], attention_mask=mask[:, :80], cache=past)
    logits = model(padded[:, 80 : 80 + new], attention_mask=mask[:, : 80 + new], cache=together).logits
    for step in range(80, 80 + new):
        single = model(padded[:, step : step + 1], attention_mask=mask[:, : step + 1], cache=apart).logits
        seen = mask[:, step].bool()
        if new <= 32:
            assert_near(logits[seen, step - 80], single[seen, 0])
        elif step == 80:
            assert (logits[0, 0] - single[0, 0]).abs().max() > 0.02


@torch.no_grad()
def test_attentions_of_few_tokens_are_those_of_each(modeling, ids):
    """With output_attentions, beyond the window: a row of probabilities for every new token, as in single steps."""
    model = load(modeling, "tiny_20b_dynamic", attn_implementation="eager")
    together, apart = new_cache("dynamic", model), new_cache("dynamic", model)
    for past in (together, apart):
        model(ids[:2, :80], cache=past)
    found = model(ids[:2, 80:85], cache=together, output_attentions=True).attentions
    steps = [model(ids[:2, step : step + 1], cache=apart, output_attentions=True).attentions for step in range(80, 85)]
    for layer, weights in enumerate(found):
        assert weights.shape == (2, model.config.num_attention_heads, 5, 85)
        for new, step in enumerate(steps):
            assert_near(weights[:, :, new, : 81 + new], step[layer][:, :, 0])


@torch.no_grad()
def test_an_attention_function_of_the_user_is_used_for_every_step(model, ids, monkeypatch):
    """Beyond the window too, for one token and for few, with its own arguments; one that takes a mask (B, K), as flash
    attention, gets it."""

    def attention(module, query, key, value, attention_mask, scaling, own, **kwargs):
        calls.append((query.shape[2], None if attention_mask is None else tuple(attention_mask.shape), own))
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril(key.shape[2] - query.shape[2])
        if attention_mask is not None:
            mask = mask & attention_mask.bool()[:, None, None]
        output = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=scaling)
        return output.transpose(1, 2), None

    calls = []
    # What `register` of the two does, and undone after the test.
    monkeypatch.setitem(AttentionInterface._global_mapping, "the user's", attention)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "the user's", flash_attention_mask)
    # One layer, whose keys depend on no length: without a mask (B, 1, Q, K), few tokens share that of the last.
    ours, theirs, (tokens, mask) = one_layer(model), one_layer(model), pad_left([ids[0, :90], ids[1, :70]], 90)
    theirs.set_attn_implementation("the user's")
    caches = [new_cache("dynamic", ours) for _ in range(2)]
    for start, end in ((0, 60), (60, 80), (80, 81), (81, 86)):
        new = {"input_ids": tokens[:, start:end], "attention_mask": mask[:, :end], "own": end}
        found, expected = (each(**new, cache=cache).logits for each, cache in zip((theirs, ours), caches, strict=True))
        assert_near(found[:, -1], expected[:, -1])
    assert calls == [(60, (2, 60), 60), (20, (2, 80), 80), (1, (2, 81), 81), (5, (2, 86), 86)]


@torch.no_grad()
def test_flex_attention(modeling, model, ids):
    """Across the window: a prompt, a token and a few, padded rows too. Uncompiled: compiling takes a minute."""
    flex = one_layer(load(modeling, "tiny_20b_dynamic", attn_implementation="flex_attention"))
    ours, (tokens, mask) = one_layer(model), pad_left([ids[0, :90], ids[1, :70]], 90)
    caches = [new_cache("dynamic", ours) for _ in range(2)]
    with torch.compiler.set_stance("force_eager"):
        for start, end in ((0, 60), (60, 80), (80, 81), (81, 86)):
            new = {"input_ids": tokens[:, start:end], "attention_mask": mask[:, :end]}
            found, expected = (
                each(**new, cache=cache).logits for each, cache in zip((flex, ours), caches, strict=True)
            )
            assert_near(found[:, -1], expected[:, -1])


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32))
@torch.no_grad()
def test_a_step_in_float16_leaves_the_scores_to_the_attention_function(model, ids, dtype):
    """Beyond the window: it can scale before it multiplies, where a product of two elements alone can overflow."""
    here = copy.deepcopy(model).to(dtype)
    past = new_cache("dynamic", here)
    here(ids[:1, :80], cache=past)
    operators = count_operators(lambda: here(ids[:1, 80:81], cache=past))
    expected = model.config.num_hidden_layers if dtype == torch.float16 else 0
    assert operators.get("aten::scaled_dot_product_attention", 0) == expected


@torch.no_grad()
def test_fixed_base_is_the_same_function(model, ids):
    """As docs/long-context.md recommends for engines: plain rotary with base(N) equals dynamic NTK at N tokens."""
    assert_near(with_fixed_base(model, 200)(ids[:1, :200]).logits, model(ids[:1, :200]).logits)


@torch.no_grad()
def test_short_after_long_is_unchanged(model, ids):
    """A long input leaves no state behind."""
    before = model(ids[:, :30]).logits
    model(ids)
    greedy_rows(model, ids[:, :100], cache_implementation="static")
    torch.testing.assert_close(model(ids[:, :30]).logits, before, atol=0, rtol=0)


@torch.no_grad()
def test_packed_sequences_equal_each_alone(model, ids):
    """position_ids that restart at 0 pack several sequences into a row, each with its own length L."""
    lengths = (100, 30, 150)
    packed = torch.cat([ids[row, :length] for row, length in enumerate(lengths)])[None]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    logits = model(packed, position_ids=positions, use_cache=False).logits[0].split(lengths)
    for row, length in enumerate(lengths):
        assert_near(logits[row], model(ids[row : row + 1, :length]).logits[0])


@torch.no_grad()
def test_packed_sequences_may_start_anywhere(model, ids):
    """A gap in position_ids begins a sequence as a restart does: its length does not count for the one before."""
    lengths, starts = (30, 70), (0, 50)
    packed = torch.cat([ids[row, :length] for row, length in enumerate(lengths)])[None]
    positions = [torch.arange(length)[None] + start for length, start in zip(lengths, starts, strict=True)]
    found = model(packed, position_ids=torch.cat(positions, dim=1), use_cache=False).logits[0].split(lengths)
    for row, (length, position_ids) in enumerate(zip(lengths, positions, strict=True)):
        alone = model(ids[row : row + 1, :length], position_ids=position_ids, use_cache=False).logits[0]
        assert_near(found[row], alone)


@torch.no_grad()
def test_a_head_of_two_elements_has_no_dynamic_ntk():
    """Its one pair is never interpolated, whatever the length: the exponent 2i / (d - 2) is 0, not 0 / 0."""
    ids = torch.arange(40)[None]
    logits = []
    for rotary in ("dynamic", "origin"):
        model = our_model(
            Shape(hidden=8, layers=1, heads=4, intermediate=16, vocab=64, window=16), torch.float32, rotary=rotary
        )
        logits.append(model(ids).logits)
    assert logits[0].isfinite().all()
    assert_near(*logits, atol=1e-6)


@pytest.mark.parametrize("cache", ("dynamic", "static"))
@torch.no_grad()
def test_right_padded_rows_then_decode(model, ids, cache):
    """A row with padding in the middle (a right-padded prompt, then new tokens) equals the row without padding."""
    prompt, new = (90, 50), 4
    mask = torch.zeros(2, 94, dtype=torch.long)
    past = new_cache(cache, model, 94)
    tokens = torch.zeros(2, 90, dtype=torch.long)
    for row, length in enumerate(prompt):
        tokens[row, :length] = ids[row, :length]
        mask[row, :length] = 1
    mask[:, 90:] = 1
    model(tokens, attention_mask=mask[:, :90], cache=past)
    for step in range(new):
        token = torch.stack([ids[row, length + step] for row, length in enumerate(prompt)])[:, None]
        logits = model(token, attention_mask=mask[:, : 91 + step], cache=past).logits[:, -1]
    for row, length in enumerate(prompt):
        alone = forced_decode(model, ids[row : row + 1], length, length + new, new_cache("dynamic", model))
        assert_near(logits[row], alone[-1])


@torch.no_grad()
def test_position_ids_are_obeyed(model, ids):
    """Attention depends on distances only: an offset changes nothing up to the window, but L beyond it."""
    tokens = ids[:1, :30]
    offset = torch.arange(30)[None] + 20
    assert_near(model(tokens, position_ids=offset).logits, model(tokens).logits)
    past = new_cache("dynamic", model)
    model(tokens, position_ids=offset, cache=past)
    stepped = model(ids[:1, 30:31], position_ids=torch.tensor([[50]]), cache=past).logits
    assert_near(stepped[0, -1], model(ids[:1, :31]).logits[0, -1])


@torch.no_grad()
def test_inputs_embeds_and_gradient_checkpointing(model, ids):
    embeds = model.model.embed_tokens(ids[:1, :100])
    assert_near(model(inputs_embeds=embeds).logits, model(ids[:1, :100]).logits)
    trained = copy.deepcopy(model).train()
    gradients = []
    for checkpointing in (False, True):
        trained.zero_grad()
        if checkpointing:
            trained.activation_checkpointing_enable()
        with torch.enable_grad():
            trained(ids[:2, :100], labels=ids[:2, :100]).loss.backward()
        gradients.append({name: value.grad.clone() for name, value in trained.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("prompt", (20, 60, 100))
def test_static_cache_gives_the_same_tokens(model, ids, prompt):
    tokens = ids[:1, :prompt]
    expected = greedy_rows(model, tokens).tolist()
    assert greedy_rows(model, tokens, cache_implementation="static").tolist() == expected
    if prompt == 20:  # beyond the window, results with and without a cache differ (docs/long-context.md)
        assert greedy_rows(model, tokens, use_cache=False).tolist() == expected


@pytest.mark.parametrize("kind", ("offloaded", "offloaded_static"))
def test_offloaded_caches_give_the_same_tokens(model, ids, kind, no_streams):
    """The library's own caches."""
    inputs = ids[:1, : WINDOW + 20]
    expected = greedy_rows(model, inputs)
    assert torch.equal(greedy_rows(model, inputs, cache_implementation=kind), expected)


@pytest.mark.parametrize("way", ("assisted", "prompt lookup"))
def test_assisted_decoding_is_lossless_across_the_window(model, ids, way):
    """From 40 tokens to 140: guesses are verified a few at a time, each at its own length.

    The prompt ends 20 tokens before the window, because the library prefills it together with its first guesses.
    """
    assistant = one_layer(model)
    assistant.generation_config.eos_token_id = None
    settings = {"assistant_model": assistant} if way == "assisted" else {"prompt_lookup_num_tokens": 5}
    prompt = torch.cat((ids[:1, :20], ids[:1, :20]), dim=1)
    expected = greedy_rows(model, prompt, max_new_tokens=100)
    assert greedy_rows(model, prompt, max_new_tokens=100, **settings).tolist() == expected.tolist()


def test_beams_and_batches_beyond_the_window(model, ids):
    """Beam search over left-padded rows gives each row the tokens of the row without padding."""
    rows = [ids[0, :90], ids[1, :50], ids[2, :70]]
    padded, mask = pad_left(rows, 90)
    together = greedy_rows(model, padded, attention_mask=mask, num_beams=3)[:, 90:]
    for row, tokens in enumerate(rows):
        assert greedy_rows(model, tokens[None], num_beams=3)[0, len(tokens) :].tolist() == together[row].tolist()


@torch.no_grad()
def test_a_cache_can_be_continued_and_cropped(model, ids):
    """A conversation continues on its cache, and a cropped cache equals one that never held the rest."""
    past = DynamicCache(config=model.config)
    first = greedy_rows(model, ids[:1, :50], cache=past)
    longer = torch.cat((first, ids[1:2, :40]), dim=1)
    continued = greedy_rows(model, longer, cache=past)
    again = DynamicCache(config=model.config)
    greedy_rows(model, ids[:1, :50], cache=again)
    assert greedy_rows(model, longer, cache=again).tolist() == continued.tolist()

    past = DynamicCache(config=model.config)
    model(ids[:1, :100], cache=past)
    reference = copy.deepcopy(past)
    expected = model(ids[:1, 100:101], cache=reference).logits
    model(ids[1:2, :20], cache=past)
    past.crop(-20)
    assert_near(model(ids[:1, 100:101], cache=past).logits, expected, atol=1e-5)


class Pages:
    """What flash attention gets from generate_batch: new keys as they are, for it knows where the others are."""

    def update(self, keys, values, *args, **kwargs):
        return keys, values


@pytest.mark.parametrize("engine", ({"use_cache": False, "attention_instances": {}}, {"cache": Pages()}))
def test_engine_managed_caches_use_the_trained_base(model, ids, engine):
    """An engine-managed cache cannot be corrected: flattened rows are plain rotary."""
    plain = copy.deepcopy(model)
    plain.config.rotary = {**model.config.rotary, "type": "origin"}
    tokens = ids[:1, :100]
    with torch.no_grad():
        assert_near(model(tokens, **engine).logits, plain(tokens).logits)


@pytest.mark.parametrize("rows", (1, 7, 50, 60))
def test_chunked_scores_equal_those_of_rotated_keys(rotary, monkeypatch, rows):
    """Rotating keys in chunks of `rows` keys leaves scores and gradients unchanged."""
    batch, heads, key_length, head_dim = 2, 3, 50, 8
    monkeypatch.setattr(rotary, "_CHUNK_NUMEL", rows * batch * heads * head_dim)
    generator = torch.Generator().manual_seed(0)
    queries, keys = (torch.randn(batch, heads, n, head_dim, generator=generator) for n in (1, key_length))
    positions = torch.arange(key_length)[None].expand(batch, -1)
    inv_freq = torch.rand(batch, 1, head_dim // 2, generator=generator)
    tables = rotary.cos_sin(positions, inv_freq, torch.float32)
    queries.requires_grad_(), keys.requires_grad_()
    found = rotary.corrected_scores(queries, keys, *tables)
    expected = queries @ rotary.rotate(keys, *tables).mT
    assert_near(found, expected, atol=1e-5)
    weights = torch.randn(expected.shape, generator=generator)
    gradients = [torch.autograd.grad((scores * weights).sum(), (queries, keys)) for scores in (found, expected)]
    for one, other in zip(*gradients, strict=True):
        assert_near(one, other, atol=1e-5)


@pytest.mark.parametrize("length", (2, 8))
@torch.no_grad()
def test_decode_far_beyond_the_window(model, ids, length):
    """At 2 and 8 windows, one layer: a decode step with a cache equals a forward without one at the same length."""
    one, tokens = one_layer(model), torch.cat((ids, ids), dim=1)[:1, : length * WINDOW + 3]
    logits = forced_decode(one, tokens, length * WINDOW, length * WINDOW + 3, new_cache("dynamic", one))
    assert_near(logits[-1], one(tokens).logits[0, -1])


@torch.no_grad()
def test_a_far_too_long_text_warns_once(model, ids, caplog):
    """One warning beyond 8 windows, with length and window; none before."""
    model.model._warned_of_length = False
    tokens, past = torch.cat((ids, ids, ids), dim=1)[:1], new_cache("dynamic", model)
    with caplog.at_level("WARNING"):
        model(tokens[:, : 8 * WINDOW], cache=past)
        assert not caplog.records
        for position in range(8 * WINDOW, 8 * WINDOW + 3):
            assert model(tokens[:, position : position + 1], cache=past).logits.isfinite().all()
    assert [
        record.getMessage() for record in caplog.records if "513 tokens are more than 8 times" in record.getMessage()
    ]
    assert len(caplog.records) == 1
