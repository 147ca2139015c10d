"""The growing cache: what the library's DynamicCache does, without copying the past at every token.

Also run by tests/matrix_check.py, in environments that hold torch, transformers, accelerate, jinja2 and pytest only.
"""

import copy
import io
import pickle
import random
import subprocess
import sys
import warnings

import pytest
import torch
from transformers import DynamicCache, StaticCache

from benchmarks.counts import memory_use
from tools import package

from support.golden import assert_near, cache_of, load
from support.versions import needs_dynamo


TOKENS = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(scope="module")
def causal_lm(modeling):
    return load(modeling, "tiny_20b_dynamic")  # window 64


@pytest.fixture(scope="module")
def caches(modeling):
    """cache_internlm.py, as imported by `modeling`."""
    return sys.modules[modeling.InternLMModel.__module__.replace("modeling_", "cache_")]


@pytest.fixture(scope="module")
def tokens(causal_lm):
    return torch.randint(3, causal_lm.config.vocab_size, (2, 120), generator=torch.Generator().manual_seed(0))


def states(length: int, rows: int = 2, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Keys and values of `length` tokens, (rows, 2 heads, length, 4)."""
    return [torch.randn(rows, 2, length, 4).to(dtype) for _ in range(2)]


def contents(cache) -> list[torch.Tensor]:
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def assert_same(found, expected) -> None:
    """Two caches with the same contents, bit by bit."""
    assert len(found.layers) == len(expected.layers) and found.get_seq_length() == expected.get_seq_length()
    for one, other in zip(contents(found), contents(expected), strict=True):
        assert torch.equal(one, other) and one.dtype == other.dtype


def passing(cache) -> dict:
    """The argument of `generate`, by its name in this version."""
    return {package.load("compat").CACHE: cache}


# By which name it is passed


@pytest.mark.parametrize("kind", ["ForCausalLM", "Model", "ForSequenceClassification", "ForTokenClassification"])
@torch.no_grad()
def test_the_old_name_warns_where_the_new_one_is_the_librarys(modeling, tokens, kind):
    """As the library's models do: from 5.24, at every call, also of None, in the caller's name; the cache is used."""
    model, cache = load(modeling, "tiny_20b_dynamic", f"InternLM{kind}"), DynamicCache()
    for given in (cache, None):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model(tokens[:, :5], past_key_values=given)
        new = package.load("compat").CACHE == "cache"
        assert [str(warning.message)[:36] for warning in caught] == ["`past_key_values` is deprecated and "] * new
        assert all(warning.category is FutureWarning for warning in caught)
        assert not any("internlm" in warning.filename for warning in caught)  # its deprecations are errors here
    assert cache.get_seq_length() == 5


@torch.no_grad()
def test_the_librarys_own_calls_do_not_warn(causal_lm, tokens):
    """Nor do ours, from one head to the base model."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*past_key_values")
        for settings in ({}, {"num_beams": 2}, {"cache_implementation": "static"}, {"use_cache": False}):
            causal_lm.generate(tokens[:1, :9], **TOKENS, **settings)
        causal_lm.generate(tokens[:1, :9], **TOKENS, **passing(DynamicCache()))
        cache = DynamicCache()
        causal_lm(tokens[:, :5], None, None, cache), causal_lm(tokens[:, 5:9], cache=cache)
    assert cache.get_seq_length() == 9


# What it is by default


@torch.no_grad()
def test_what_generate_and_use_cache_get(causal_lm, caches, tokens):
    """A GrowingCache, which is a DynamicCache; with beams and sampling, too."""
    assert type(cache_of(causal_lm(tokens, use_cache=True))) is caches.GrowingCache
    for settings in ({}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}):
        output = causal_lm.generate(tokens[:, :9], **{**TOKENS, **settings}, return_dict_in_generate=True)
        assert type(cache_of(output)) is caches.GrowingCache
    assert isinstance(cache_of(output), DynamicCache)
    assert cache_of(causal_lm(tokens, use_cache=False)) is None
    without = causal_lm.generate(tokens[:, :9], **TOKENS, use_cache=False, return_dict_in_generate=True)
    assert cache_of(without) is None


@torch.no_grad()
def test_a_cache_that_is_passed_or_named_is_used_as_it_is(causal_lm, tokens):
    """The same object comes back, and cache_implementation means what the library says."""
    for passed in (
        DynamicCache(),
        DynamicCache(config=causal_lm.config),
        StaticCache(causal_lm.config, max_cache_len=99),
    ):
        assert cache_of(causal_lm(tokens[:, :9], cache=passed)) is passed
        passed.reset()
    passed = DynamicCache(config=causal_lm.config)
    output = causal_lm.generate(tokens[:, :9], **TOKENS, **passing(passed), return_dict_in_generate=True)
    assert cache_of(output) is passed and type(passed) is DynamicCache
    settings = {"cache_implementation": "static", "disable_compile": True, "return_dict_in_generate": True}
    assert type(cache_of(causal_lm.generate(tokens[:, :9], **TOKENS, **settings))) is StaticCache


def test_an_offloaded_cache_stays_the_librarys(causal_lm, caches, no_streams):
    """Its layers move between devices, which buffers with room would not follow."""
    cache = caches.GrowingCache(config=causal_lm.config, offloading=True)
    assert not any(isinstance(layer, caches.GrowingLayer) for layer in cache.layers)


@pytest.mark.parametrize("attention", ("eager", "sdpa"))
@torch.no_grad()
def test_same_tokens_as_with_the_librarys_cache(modeling, tokens, attention):
    """Across the window's end: greedy, with left padding, and beams that are reordered."""
    causal_lm = load(modeling, "tiny_20b_dynamic", attn_implementation=attention)
    mask = torch.ones(2, 55, dtype=torch.long)
    mask[1, :7] = 0
    for settings in ({}, {"num_beams": 3}):
        found = causal_lm.generate(tokens[:, :55], attention_mask=mask, **TOKENS, **settings)
        library = passing(DynamicCache(config=causal_lm.config))
        assert (
            found.tolist()
            == causal_lm.generate(tokens[:, :55], attention_mask=mask, **TOKENS, **settings, **library).tolist()
        )


@torch.no_grad()
def test_layers_removed_from_a_model(modeling, caches, tokens):
    """Layers pruned in memory: those that are left are cached."""
    causal_lm = load(modeling, "tiny_20b_dynamic")
    causal_lm.model.layers = causal_lm.model.layers[:1]
    causal_lm.config.num_hidden_layers = 1
    cache = cache_of(causal_lm(tokens[:, :30]))
    step = causal_lm(tokens[:, 30:31], cache=cache).logits
    assert_near(step, causal_lm(tokens[:, :31], use_cache=False).logits[:, -1:])
    assert type(cache) is caches.GrowingCache and len(cache.layers) == 1


# What the library's cache does


OPERATIONS = {
    "token": lambda cache, seed: update(cache, 1, seed),
    "chunk": lambda cache, seed: update(cache, 2 + seed % 150, seed),
    "crop": lambda cache, seed: cache.crop(-min(1 + seed % 5, cache.get_seq_length() - 1)),
    "reorder": lambda cache, seed: cache.reorder_cache(choice(cache, seed)),
    "select": lambda cache, seed: cache.batch_select_indices(choice(cache, seed)),
    "repeat": lambda cache, _: cache.batch_repeat_interleave(2) if len(cache.layers[0].keys) < 4 else None,
    "assign": lambda cache, _: assign(cache),
}


def update(cache, length: int, seed: int) -> None:
    torch.manual_seed(seed)
    rows = len(cache.layers[0].keys) if cache.get_seq_length() else 2
    for layer in range(2):
        keys, values = states(length, rows)
        returned = cache.update(keys, values, layer)
        assert torch.equal(returned[0][:, :, -length:], keys) and torch.equal(returned[1][:, :, -length:], values)


def choice(cache, seed: int) -> torch.Tensor:
    """Rows to keep, some of them twice; fewer or more than there are."""
    rows = len(cache.layers[0].keys)
    return torch.randint(rows, (1 + seed % 4,), generator=torch.Generator().manual_seed(seed))


def assign(cache) -> None:
    """What code outside of transformers does: it replaces the tensors of a layer."""
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, 1:] * 2, layer.values[:, :, 1:] * 2


@pytest.mark.parametrize("seed", range(8))
@torch.no_grad()
def test_any_sequence_of_operations_is_the_librarys(caches, seed):
    """150 of them, in random order, on both caches."""
    draw = random.Random(seed)
    found, expected = caches.GrowingCache(max_length=draw.choice((None, 5, 600))), DynamicCache()
    for step in range(150):
        names = list(OPERATIONS) if expected.get_seq_length() > 3 else ["token", "chunk"]
        name = draw.choice(names if expected.get_seq_length() < 900 else ["crop", "select", "reorder", "assign"])
        for cache in (found, expected):
            OPERATIONS[name](cache, step)
        assert_same(found, expected)


@torch.no_grad()
def test_reset_empties_it(caches):
    """Tokens after it are the first; what was handed out before keeps its contents."""
    cache = caches.GrowingCache()
    update(cache, 5, 0), update(cache, 1, 1)
    before = cache.layers[0].keys
    kept = before.clone()
    cache.reset()
    assert cache.get_seq_length() == 0
    update(cache, 3, 2), update(cache, 1, 3)
    assert cache.get_seq_length() == 4 and torch.equal(before, kept)


def test_other_rows_and_dtypes_are_the_librarys_business(caches):
    """A wrong number of rows is an error instead of being broadcast; a wider dtype is promoted, not rounded."""
    with torch.no_grad():
        for wrong in (
            states(1, rows=1),
            [state[:, :1] for state in states(1)],
            [state[..., :3] for state in states(1)],
        ):
            cache = caches.GrowingCache()
            cache.update(*states(5), 0)
            cache.update(*states(1), 0)
            with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
                cache.update(*wrong, 0)
        for cache in (caches.GrowingCache(), DynamicCache()):
            cache.update(*states(5, dtype=torch.bfloat16), 0)
            cache.update(*states(1, dtype=torch.bfloat16), 0)
            assert cache.update(*states(1), 0)[0].dtype == torch.float32


# Copies


@pytest.mark.parametrize("way", ("deepcopy", "layers copied", "pickle", "torch.save", "rebuilt"))
@torch.no_grad()
def test_continuations_of_one_prefix_are_separate(causal_lm, caches, tokens, way):
    """Each sees its own tokens, whatever the order of the steps; the prefix is not changed."""
    prefix = cache_of(causal_lm(tokens[:1, :50]))
    causal_lm(tokens[:1, 50:52], cache=prefix)  # into a buffer with room
    before = [tensor.clone() for tensor in contents(prefix)]
    copies = [copied(prefix, way) for _ in range(2)]
    branches = [tokens[:1, 60:75], tokens[:1, 80:95]]
    logits = [[], []]
    for step in range(15):
        for cache, branch, rows in zip(copies, branches, logits, strict=True):
            rows.append(causal_lm(branch[:, step : step + 1], cache=cache).logits)
    for branch, rows in zip(branches, logits, strict=True):
        own = DynamicCache(config=causal_lm.config)
        causal_lm(tokens[:1, :50], cache=own), causal_lm(tokens[:1, 50:52], cache=own)
        expected = [causal_lm(token, cache=own).logits for token in branch.split(1, dim=1)]
        assert torch.equal(torch.cat(rows), torch.cat(expected))
    assert all(torch.equal(one, other) for one, other in zip(contents(prefix), before, strict=True))
    assert isinstance(prefix.layers[0], caches.GrowingLayer)


def copied(cache, way: str):
    """A copy of a cache, which no continuation of another one may change."""
    if way == "deepcopy":
        return copy.deepcopy(cache)
    if way == "layers copied":
        made = type(cache)()
        made.layers = [copy.copy(layer) for layer in cache.layers]
        return made
    if way == "pickle":
        return pickle.loads(pickle.dumps(cache))
    if way == "rebuilt":  # as torch's gathering of replicas does
        return type(cache)([(layer.keys, layer.values) for layer in cache.layers])
    file = io.BytesIO()
    torch.save(cache, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


@torch.no_grad()
def test_a_file_holds_no_spare_room_and_loads_without_this_package(caches, tmp_path):
    """A buffer's room is memory that nobody has written; a process without the model's code reads the file."""
    cache = caches.GrowingCache(max_length=100_000)
    update(cache, 50, 0), update(cache, 1, 1)
    data = pickle.dumps(cache)
    assert len(data) < 2 * sum(tensor.nbytes for tensor in contents(cache))
    (tmp_path / "cache.pickle").write_bytes(data)
    program = f"import pickle; print(pickle.load(open({str(tmp_path / 'cache.pickle')!r}, 'rb')).get_seq_length())"
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "51"
    assert all(one.untyped_storage().nbytes() == one.nbytes for one in contents(copy.deepcopy(cache)))


@pytest.mark.parametrize(
    ("used", "with_config", "sliding_window"), (((), True, None), ((0, 2), False, None), ((0, 1, 2), True, 16))
)
def test_a_file_keeps_every_layer(causal_lm, caches, used, with_config, sliding_window):
    """As of a pickled library cache: unused layers stay where they are, and a sliding window slides on."""
    config = copy.deepcopy(causal_lm.config)
    config.sliding_window = sliding_window
    settings = {"config": config} if with_config else {}
    pair = [caches.GrowingCache(**settings), DynamicCache(**settings)]
    for layer in used:
        for new in (states(20), states(1)):
            assert all(cache.update(*new, layer) for cache in pair)
    found, expected = (pickle.loads(pickle.dumps(cache)) for cache in pair)
    assert [type(layer) for layer in found.layers] == [type(layer) for layer in expected.layers]
    for layer in range(3):
        new = states(2)
        for one, other in zip(found.update(*new, layer), expected.update(*new, layer), strict=True):
            assert torch.equal(one, other)


# Gradients, inference mode, torch.compile


def test_gradients_flow_through_it(causal_lm, tokens):
    """Two chunks and a token with gradients, as with the library's cache: the same gradients of the embeddings."""
    gradients = []
    for cache in (None, DynamicCache(config=causal_lm.config)):
        embeds = causal_lm.get_input_embeddings()(tokens[:, :30]).detach().requires_grad_()
        for part in (embeds[:, :20], embeds[:, 20:29], embeds[:, 29:]):
            output = causal_lm(inputs_embeds=part, cache=cache, use_cache=True)
            cache = cache_of(output)
        gradients += torch.autograd.grad(output.logits.float().logsumexp(-1).sum(), embeds)
    assert torch.equal(*gradients) and gradients[0].abs().sum() > 0


def test_a_step_with_gradients_only_in_the_queries(modeling, tokens):
    """Keys need no gradient, but attention's backward pass needs them as they were."""
    causal_lm = load(modeling, "tiny_20b_dynamic").requires_grad_(False)
    causal_lm.model.layers[-1].self_attn.q_proj.weight.requires_grad_(True)
    with torch.no_grad():
        cache = cache_of(causal_lm(tokens[:, :20]))
        causal_lm(tokens[:, 20:21], cache=cache)
    loss = sum(causal_lm(tokens[:, step : step + 1], cache=cache).logits.sum() for step in (21, 22))
    loss.backward()  # an error if a step had written into the buffer
    assert causal_lm.model.layers[-1].self_attn.q_proj.weight.grad.abs().sum() > 0


def test_filled_in_inference_mode_and_continued_outside(causal_lm, tokens):
    """Tensors made there may not be written to elsewhere."""
    with torch.inference_mode():
        cache = cache_of(causal_lm(tokens[:, :20]))
        causal_lm(tokens[:, 20:21], cache=cache)
    with torch.no_grad():
        found = [causal_lm(tokens[:, step : step + 1], cache=cache).logits for step in (21, 22)]
        assert_near(torch.cat(found, dim=1), causal_lm(tokens[:, :23]).logits[:, -2:])


@needs_dynamo
@torch.no_grad()
def test_a_compiled_step_appends_to_it(causal_lm, tokens):
    """torch.compile sees the library's operations; eager steps before and after it append in place."""
    torch.compiler.reset()
    compiled = torch.compile(causal_lm, fullgraph=True, backend="eager")
    cache = cache_of(causal_lm(tokens[:, :20]))
    for step in range(20, 28):
        forward = compiled if 22 <= step < 25 else causal_lm
        logits = forward(tokens[:, step : step + 1], cache=cache).logits
        assert_near(logits, causal_lm(tokens[:, : step + 1]).logits[:, -1:])


# In place


@torch.no_grad()
def test_tokens_are_appended_in_place(caches):
    """Buffers move only when they are full, then with an eighth of room or 256 tokens; nothing is concatenated."""
    layer, moves = caches.GrowingLayer(), 0
    layer.update(*states(100), None)
    assert layer.buffers is None  # a prompt's keys are kept as they are, until the first token after it
    for _ in range(3000):
        address = layer.keys.data_ptr()
        keys, values = layer.update(*states(1), None)
        moves += keys.data_ptr() != address
        length, (capacity, other) = keys.shape[2], [buffer.shape[2] for buffer in layer.buffers]
        assert capacity == other and capacity <= max(length + length // 8, length + 256)
        assert keys.data_ptr() == layer.buffers[0].data_ptr() and values.data_ptr() == layer.buffers[1].data_ptr()
    assert moves == 12


@torch.no_grad()
def test_memory(modeling, caches):
    """A step allocates no copy of a layer's keys, as the library's does; in all at most 1.13 times as many bytes."""
    causal_lm = load(modeling, "tiny_7b_origin")  # plain rotary: beyond the window dynamic NTK has tables for all keys
    ids = torch.randint(3, 100, (1, 2100), generator=torch.Generator().manual_seed(0))
    largest, held = {}, {}
    for kind in (DynamicCache, caches.GrowingCache):
        cache = kind(config=causal_lm.config)
        causal_lm(ids, cache=cache), causal_lm(ids[:, :1], cache=cache)
        layer = cache.layers[0].keys.nbytes
        largest[kind] = memory_use(lambda cache=cache: causal_lm(ids[:, :1], cache=cache)).largest
        held[kind] = sum(tensor.untyped_storage().nbytes() for tensor in contents(cache))
    assert largest[DynamicCache] >= layer > 2 * largest[caches.GrowingCache]
    assert held[DynamicCache] < held[caches.GrowingCache] <= 1.13 * held[DynamicCache]


@torch.no_grad()
def test_buffers_end_where_generation_will(causal_lm, caches, tokens):
    """At the announced length exactly; more tokens than announced fit all the same."""
    settings = {**TOKENS, "max_new_tokens": 40, "return_dict_in_generate": True}
    cache = cache_of(causal_lm.generate(tokens[:, :9], **settings))
    assert [buffer.shape[2] for buffer in cache.layers[0].buffers] == [9 + 40 - 1] * 2
    output = causal_lm.generate(tokens[:, :60], **passing(cache), **settings)
    assert cache_of(output) is cache and cache.get_seq_length() == 99
    layer = caches.GrowingLayer(max_length=3000)
    layer.update(*states(100), None), layer.update(*states(1), None)
    assert layer.buffers[0].shape[2] == 101 + 256  # room is added as it is needed, not for all that may come


@torch.no_grad()
def test_after_a_crop_the_next_tokens_take_the_removed_ones_places(caches):
    """Assisted decoding crops after every round: that must not cost a copy."""
    cache = caches.GrowingCache()
    update(cache, 100, 0), update(cache, 5, 1)
    address = cache.layers[0].keys.data_ptr()
    cache.crop(-3)
    update(cache, 5, 2)
    assert cache.layers[0].keys.data_ptr() == address and cache.get_seq_length() == 107


@torch.no_grad()
def test_reordered_beams_keep_their_room(caches):
    """One copy a step instead of two: the next token finds room behind the reordered keys."""
    cache = caches.GrowingCache(max_length=200)
    update(cache, 100, 0), update(cache, 1, 1)
    cache.reorder_cache(torch.tensor([1, 1]))
    address = cache.layers[0].keys.data_ptr()
    update(cache, 1, 2)
    assert cache.layers[0].keys.data_ptr() == address and cache.layers[0].buffers[0].shape == (2, 2, 200, 4)


@torch.no_grad()
def test_spare_room_is_zero(caches):
    """Memory that nobody has written may hold NaN, which a mask does not hide: 0 times NaN is NaN."""
    torch.full((2, 2, 2000, 4), torch.nan)  # freed at once, for the buffers to find
    cache = caches.GrowingCache()
    for length in (1000, 1, 300):
        update(cache, length, length)
    for _ in range(2):
        for layer in cache.layers:
            assert all((buffer[:, :, cache.get_seq_length() :] == 0).all() for buffer in layer.buffers)
        cache.reorder_cache(torch.tensor([1, 0, 1]))


@torch.no_grad()
def test_a_captured_step_can_write_into_the_buffers(causal_lm, caches, tokens):
    """Fixed addresses and a length that is a tensor: a static cache over the reserved buffers, then `advance`."""
    cache, plain = (cache_of(causal_lm(tokens[:, :50])) for _ in range(2))
    for layer in cache.layers:
        layer.reserve(64)
    addresses = [buffer.data_ptr() for layer in cache.layers for buffer in layer.buffers]
    captured = StaticCache(causal_lm.config, max_cache_len=64)
    for step in range(50, 64):
        if step == 50:
            causal_lm(tokens[:, :50], cache=captured)  # initialises its layers, and its length
            for static, layer in zip(captured.layers, cache.layers, strict=True):
                static.keys, static.values = layer.buffers
        found = causal_lm(tokens[:, step : step + 1], cache=captured).logits
        for layer in cache.layers:
            layer.advance(1)
        assert_near(found, causal_lm(tokens[:, step : step + 1], cache=plain).logits)
    for one, other in zip(contents(cache), contents(plain), strict=True):
        assert_near(one, other)
    for layer in cache.layers:
        layer.reserve(64)  # there already
    assert addresses == [buffer.data_ptr() for layer in cache.layers for buffer in layer.buffers]
    update_after = causal_lm(tokens[:, 64:65], cache=cache).logits
    assert_near(update_after, causal_lm(tokens[:, 64:65], cache=plain).logits)
