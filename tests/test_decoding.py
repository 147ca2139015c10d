"""Captured decode steps give the tokens of the plain loop, and step aside where they cannot hold.

On a CPU a step is called instead of replayed: buffers, masks, lengths and conditions are the same code. The tests
marked `gpu` replay.
"""

import copy
import gc
import sys
import threading
import weakref
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, DynamicCache, LogitsProcessor, LogitsProcessorList
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from support.devices import DEVICES
from support.golden import cache_of


PAD = {"pad_token_id": 0, "eos_token_id": None}


@pytest.fixture(scope="module", params=DEVICES)
def device(request):
    return request.param


@pytest.fixture(scope="module")
def shared(tiny_model, device):
    return copy.deepcopy(tiny_model).to(device)


@pytest.fixture
def model(shared):
    """For tests that change it."""
    return copy.deepcopy(shared)


def sibling(model, name):
    """A module of the model's own code, which transformers has loaded from its folder."""
    return sys.modules[f"{type(model).__module__.rpartition('.')[0]}.{name}_internlm"]


@pytest.fixture(autouse=True)
def steps(monkeypatch, shared):
    """Counts the steps that were run without the plain forward, and how many were captured."""
    decoding = sibling(shared, "decoding")
    monkeypatch.setattr(decoding, "_DEVICE_TYPES", {"cuda", "cpu"})
    counted = {"run": 0, "captured": 0}
    write, capture = decoding.DecodeStep.write, decoding.DecodeStep.capture

    def counting_write(self, *arguments):
        counted["run"] += 1
        return write(self, *arguments)

    def counting_capture(self):
        counted["captured"] += 1
        return capture(self)

    monkeypatch.setattr(decoding.DecodeStep, "write", counting_write)
    monkeypatch.setattr(decoding.DecodeStep, "capture", counting_capture)
    return counted


def prompt(device, rows=1, length=20):
    """Rows of random tokens, of which all but the last are left-padded, and their mask."""
    ids = torch.randint(5, 2000, (rows, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    for row in range(rows - 1):
        mask[row, : 3 + 4 * row] = 0
    return ids.to(device), mask.to(device)


def both(model, ids, mask, **settings):
    """Tokens with captured steps and of the plain loop."""
    found = []
    for plain in (False, True):
        torch.manual_seed(1)
        found.append(model.generate(ids, attention_mask=mask, disable_compile=plain, **{**PAD, **settings}))
    return found


@pytest.mark.parametrize(
    ("rows", "settings"),
    [
        (1, {}),
        (3, {}),
        (1, {"do_sample": True, "temperature": 1.5}),
        (3, {"do_sample": True, "top_k": 0}),
        (2, {"num_beams": 3}),
        (1, {"num_return_sequences": 3, "do_sample": True}),
        (2, {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2}),
    ],
    ids=("one row", "padded rows", "sampling", "sampling rows", "beams", "returned sequences", "processors"),
)
def test_the_plain_loops_tokens(shared, device, steps, rows, settings):
    """Every token but the prompt's is a captured step."""
    found, expected = both(shared, *prompt(device, rows), max_new_tokens=40, **settings)
    assert torch.equal(found, expected)
    assert steps["run"] == 39 and steps["captured"] == 1


@pytest.mark.parametrize("attention", ("sdpa", "eager"))
@pytest.mark.parametrize("rows", (1, 3))
def test_across_the_window_and_growing_buffers(model, device, steps, attention, rows):
    """Buffers end at the announced length; without one they grow, and are captured anew. Across the window, too."""
    window = model.config.max_position_embeddings
    model.set_attn_implementation(attention)
    ids, mask = prompt(device, rows, window - 10)
    found, expected = both(model, ids, mask, max_new_tokens=60)
    assert torch.equal(found, expected) and steps == {"run": 59, "captured": 1}
    found, expected = both(model, *prompt(device, rows), max_new_tokens=300)
    assert torch.equal(found, expected) and steps == {"run": 59 + 299, "captured": 1 + 2}


def test_masks_with_holes(shared, device):
    """Tokens masked in the middle of a row: positions count the others, as in the plain loop."""
    ids, mask = prompt(device, 2, 140)
    mask[:, 60:67] = 0
    assert torch.equal(*both(shared, ids, mask, max_new_tokens=20))


def test_logits_are_those_of_the_plain_loop(shared, device):
    """Across the window, step by step; and those that generate returns are not overwritten by later steps."""
    ids, mask = prompt(device, 2, shared.config.max_position_embeddings - 6)
    settings = {"max_new_tokens": 12, "output_logits": True, "return_dict_in_generate": True, "output_scores": True}
    found, expected = both(shared, ids, mask, **settings)
    for ours, plain in zip(found.logits, expected.logits, strict=True):
        assert (ours - plain).abs().max() < 2e-4
    assert torch.equal(found.sequences, expected.sequences)
    assert not torch.equal(found.logits[-1], found.logits[-2])


def test_a_returned_cache_is_complete_and_frees_the_step(shared, device, tmp_path):
    """It continues in a plain forward, can be copied and pickled, and does not outlive its last user."""
    ids, mask = prompt(device)
    output = shared.generate(ids, attention_mask=mask, max_new_tokens=9, return_dict_in_generate=True, **PAD)
    cache = cache_of(output)
    assert cache.get_seq_length() == output.sequences.shape[1] - 1
    expected = shared(output.sequences).logits[:, -1]
    copied = copy.deepcopy(cache)
    assert getattr(copied, "decoding", None) is None
    torch.save(cache, tmp_path / "cache.pt")
    restored = torch.load(tmp_path / "cache.pt", weights_only=False)
    assert type(restored) is DynamicCache
    for one in (restored, copied, cache):
        with torch.no_grad():
            logits = shared(output.sequences[:, -1:], cache=one).logits[:, -1]
        assert (logits - expected).abs().max() < 2e-4
    gone = weakref.ref(cache)
    del output, cache, one, logits
    gc.collect()
    assert gone() is None


def test_a_cache_that_the_user_passes_is_used_as_it_is(shared, device, steps):
    """The library's, and one that an earlier generate returned."""
    ids, mask = prompt(device)
    expected = shared.generate(ids, attention_mask=mask, max_new_tokens=8, disable_compile=True, **PAD)
    name = sibling(shared, "compat").CACHE
    found = shared.generate(ids, attention_mask=mask, max_new_tokens=8, **{name: DynamicCache()}, **PAD)
    assert torch.equal(found, expected) and steps["run"] == 0
    first = shared.generate(ids, attention_mask=mask, max_new_tokens=4, return_dict_in_generate=True, **PAD)
    assert steps["run"] == 3
    second = shared.generate(first.sequences, max_new_tokens=4, **{name: cache_of(first)}, **PAD)
    assert torch.equal(second, expected) and steps["run"] == 3


def test_repeated_and_interleaved_calls(shared, device, steps):
    """Each call has a cache and a step of its own."""
    ids, mask = prompt(device)
    expected = shared.generate(ids, attention_mask=mask, max_new_tokens=30, disable_compile=True, **PAD)
    for _ in range(3):
        assert torch.equal(shared.generate(ids, attention_mask=mask, max_new_tokens=30, **PAD), expected)
    assert steps == {"run": 3 * 29, "captured": 3}


def test_several_models_in_several_threads(model, shared, device):
    """Two models, four threads, at the same time."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    work = [(one, *prompt(device, rows)) for one in (model, shared) for rows in (1, 2)]
    settings = {"max_new_tokens": 40, **PAD}
    expected = [one.generate(ids, attention_mask=mask, disable_compile=True, **settings) for one, ids, mask in work]
    found: list[Any] = [None] * len(work)

    def run(index):
        one, ids, mask = work[index]
        for _ in range(3):
            found[index] = one.generate(ids, attention_mask=mask, **settings)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, plain in zip(found, expected, strict=True):
        assert torch.equal(one, plain)


def test_chat_and_an_early_end_of_stream_chat(shared, tiny_tokenizer, device, steps):
    """Replies are the plain ones; a stream that is closed early leaves nothing in the way of the next."""
    expected = shared.chat(tiny_tokenizer, "Who are you?", do_sample=False, disable_compile=True)
    assert steps["run"] == 0
    stream = shared.stream_chat(tiny_tokenizer, "Who are you?", do_sample=False)
    next(stream)
    stream.close()
    *_, streamed = shared.stream_chat(tiny_tokenizer, "Who are you?", do_sample=False)
    assert streamed == expected == shared.chat(tiny_tokenizer, "Who are you?", do_sample=False)
    assert steps["run"] > 0


# Where it steps aside


def assert_plain(model, device, steps, **settings):
    """Captured steps are not used, and the tokens are those of the plain loop."""
    found, expected = both(model, *prompt(device), max_new_tokens=8, **settings)
    assert torch.equal(getattr(found, "sequences", found), getattr(expected, "sequences", expected))
    assert steps["run"] == 0


@pytest.mark.parametrize("name", ("output_attentions", "output_hidden_states"))
def test_attentions_and_hidden_states_are_returned(model, device, steps, name):
    model.set_attn_implementation("eager")
    settings = {name: True, "return_dict_in_generate": True}
    found, expected = both(model, *prompt(device), max_new_tokens=8, **settings)
    assert steps["run"] == 0 and torch.equal(found.sequences, expected.sequences)
    returned = found.attentions if name == "output_attentions" else found.hidden_states
    assert len(returned) == 8 and returned[-1][0] is not None


def test_hooks_run(model, device, steps):
    """Of a layer, and the global ones of torch."""
    seen = []
    handle = model.model.layers[0].mlp.register_forward_hook(lambda *arguments: seen.append(1))
    assert_plain(model, device, steps)
    assert len(seen) == 16
    handle.remove()
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *arguments: None)
    try:
        assert_plain(model, device, steps)
    finally:
        handle.remove()


def test_a_replaced_forward_is_called(model, device, steps):
    """As accelerate's hooks for offloaded weights do it."""
    calls, layer = [], model.model.layers[1]
    original = layer.forward

    def forward(*arguments, **settings):
        calls.append(1)
        return original(*arguments, **settings)

    layer.forward = forward
    assert_plain(model, device, steps)
    assert len(calls) == 16


class Adapter(torch.nn.Module):
    """A layer of another library."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, states):
        return self.base(states) * 1.5


def test_layers_of_other_libraries(model, device, steps):
    attention = model.model.layers[0].self_attn
    attention.v_proj = Adapter(attention.v_proj)
    assert_plain(model, device, steps)


def test_weights_that_are_no_plain_tensors(model, device, steps):
    """Tensor subclasses, as of torchao and of sharded weights."""

    class Subclass(torch.Tensor):
        pass

    projection = model.model.layers[0].self_attn.o_proj
    weight = projection.weight.data.as_subclass(Subclass)
    projection.weight = torch.nn.Parameter(weight, requires_grad=False)
    assert type(projection.weight) is not torch.nn.Parameter
    assert_plain(model, device, steps)


def test_other_attention_functions(model, device, steps):
    """A registered one may do anything."""
    AttentionInterface.register("mine", sdpa_attention_forward)
    try:
        model.config._attn_implementation = "mine"
        assert_plain(model, device, steps)
    finally:
        AttentionInterface._global_mapping.pop("mine")


def test_assisted_decoding(shared, device, steps):
    """More than one new token is a plain step; single ones between may be captured."""
    ids = torch.tensor([[7, 8, 9, 10] * 6], device=device)
    found, expected = both(shared, ids, torch.ones_like(ids), max_new_tokens=20, prompt_lookup_num_tokens=3)
    assert torch.equal(found, expected)


class Swap(LogitsProcessor):
    """Replaces a module at its third call."""

    def __init__(self, model, replacement):
        self.model, self.replacement, self.calls = model, replacement, 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        if self.calls == 3:
            self.model.model.layers[0].mlp = self.replacement
        return scores


@pytest.mark.parametrize("how", ("module", "weight"))
def test_a_model_that_changes_between_two_steps(model, device, steps, how):
    """A logits processor replaces a module, or a weight: the steps after it use the new one."""
    original = model.model.layers[0].mlp
    other = copy.deepcopy(original)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(-3)
    found = []
    for plain in (False, True):
        model.model.layers[0].mlp = copy.deepcopy(original)
        swap = Swap(model, other)
        if how == "weight":

            def replace(input_ids, scores, swap=swap):
                swap.calls += 1
                if swap.calls == 3:
                    model.model.layers[0].mlp.up_proj.weight.data = other.up_proj.weight.data
                return scores

            processors = LogitsProcessorList([replace])
        else:
            processors = LogitsProcessorList([swap])
        ids, mask = prompt(device)
        settings = {"attention_mask": mask, "max_new_tokens": 20, "logits_processor": processors}
        settings |= {"output_logits": True, "return_dict_in_generate": True, "disable_compile": plain}
        found.append(model.generate(ids, **settings, **PAD))
    assert steps["captured"] == 2  # before and after
    assert torch.equal(found[0].sequences, found[1].sequences)
    for ours, plain in zip(found[0].logits, found[1].logits, strict=True):
        assert (ours - plain).abs().max() < 2e-4


def test_gradients_and_autocast(shared, device, steps):
    """A forward over generate's cache with gradients, or under autocast, is the plain one."""
    ids, mask = prompt(device)
    output = shared.generate(ids, attention_mask=mask, max_new_tokens=4, return_dict_in_generate=True, **PAD)
    ran = steps["run"]
    logits = shared(output.sequences[:, -1:], cache=cache_of(output)).logits
    assert logits.requires_grad
    output = shared.generate(ids, attention_mask=mask, max_new_tokens=4, return_dict_in_generate=True, **PAD)
    with torch.no_grad(), torch.autocast(device, dtype=torch.bfloat16):
        shared(output.sequences[:, -1:], cache=cache_of(output))
    assert steps["run"] == 2 * ran


def test_out_of_memory_at_capture(shared, device, steps, monkeypatch):
    """Generation continues with the same cache, in plain steps."""
    ids, mask = prompt(device)
    expected = shared.generate(ids, attention_mask=mask, max_new_tokens=8, disable_compile=True, **PAD)
    layer = sibling(shared, "cache").GrowingLayer

    def fail(self, length):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(layer, "reserve", fail)
    assert torch.equal(shared.generate(ids, attention_mask=mask, max_new_tokens=8, **PAD), expected)
    assert steps["run"] == 0


def test_out_of_memory_while_capturing(shared, device, steps, monkeypatch):
    """The same when the step itself fails: nothing is lost."""
    ids, mask = prompt(device)
    expected = shared.generate(ids, attention_mask=mask, max_new_tokens=8, disable_compile=True, **PAD)

    def fail(self):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(sibling(shared, "decoding").DecodeStep, "capture", fail)
    assert torch.equal(shared.generate(ids, attention_mask=mask, max_new_tokens=8, **PAD), expected)


def test_inference_mode(shared, device, steps):
    """Inside it everything is an inference tensor, the buffers and the step's own, too."""
    ids, mask = prompt(device)
    expected = shared.generate(ids, attention_mask=mask, max_new_tokens=30, disable_compile=True, **PAD)
    with torch.inference_mode():
        found = shared.generate(ids, attention_mask=mask, max_new_tokens=30, **PAD)
    assert torch.equal(found, expected) and steps["run"] == 29
