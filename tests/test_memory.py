"""Memory at long context: what a forward may allocate, as counted by torch's CPU allocator."""

import pytest
import torch
from transformers import StaticCache

from benchmarks.counts import memory_use
from benchmarks.models import Shape, our_model


LENGTH = 4096
# Sized so that the smallest forbidden tensor, a boolean mask of LENGTH x LENGTH, is larger than every allowed one.
SHAPE = Shape(hidden=64, layers=16, heads=2, intermediate=128, vocab=100_000, window=1024)
MASK = LENGTH * LENGTH
LAYER_KEYS = LENGTH * SHAPE.hidden * 4
KEY_CACHE = SHAPE.layers * LAYER_KEYS


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return our_model(SHAPE, torch.float32)


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return 3 + torch.arange(LENGTH)[None] % 1000  # without pad tokens, which generate would mask


@torch.no_grad()
def test_prefill_allocates_neither_logits_of_all_tokens_nor_a_square_mask(model, ids):
    use = memory_use(lambda: model(ids, logits_to_keep=1, use_cache=True))
    assert use.largest < MASK
    assert use.peak < 2 * KEY_CACHE + KEY_CACHE  # the cache, but no second copy of its keys


@torch.no_grad()
def test_generate_allocates_neither_logits_of_all_tokens_nor_a_square_mask(model, ids):
    use = memory_use(lambda: model.generate(ids, max_new_tokens=3, do_sample=False))
    assert use.largest < MASK


@torch.no_grad()
def test_memory_use_detects_logits_of_all_tokens_and_a_square_mask(model, ids):
    short = ids[:, :512]
    assert memory_use(lambda: model(short)).largest >= 512 * SHAPE.vocab * 4
    padded = torch.ones_like(ids)
    padded[0, 0] = 0
    assert memory_use(lambda: model(ids, attention_mask=padded, logits_to_keep=1)).largest >= MASK


@torch.no_grad()
def test_a_decode_step_beyond_the_window_copies_the_keys_of_a_few_layers_at_most(model, ids):
    cache = StaticCache(config=model.config, max_cache_len=LENGTH)
    model(ids[:, : LENGTH - 8], past_key_values=cache, logits_to_keep=1)
    use = memory_use(lambda: model(ids[:, :1], past_key_values=cache))
    assert use.peak < 6 * LAYER_KEYS < KEY_CACHE / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_holds_one_float32_copy_of_the_logits(dtype, modeling, monkeypatch):
    """Besides the logits and their gradient in the model's dtype, which a training step needs anyway.

    With a quarter of the tokens, and of the elements of a chunk, that are of interest, for the time that they take.
    """
    length = 512
    monkeypatch.setattr(modeling, "_LOSS_CHUNK_NUMEL", modeling._LOSS_CHUNK_NUMEL // 4)
    model = our_model(SHAPE._replace(layers=1), dtype).train()
    ids = torch.arange(length)[None] % 1000
    logits = length * SHAPE.vocab

    def step() -> None:
        model(ids, labels=ids, use_cache=False).loss.backward()

    step()  # allocates the parameters' gradients
    use = memory_use(step)
    assert use.peak < (2 * dtype.itemsize + 4 + 0.5) * logits


@pytest.mark.parametrize("arguments", ["labels", "shift_labels", "num_items_in_batch", "nothing to learn"])
def test_the_chunked_loss_equals_the_loss(arguments, modeling, monkeypatch):
    """Value and gradients equal those of one chunk, however the labels are passed; some of them are ignored."""
    model = our_model(SHAPE._replace(layers=1, vocab=500), torch.float32).train()
    ids = torch.arange(2 * 37).view(2, -1) % 500
    labels = torch.where(ids % 5 == 0, -100, ids) if arguments != "nothing to learn" else torch.full_like(ids, -100)
    extra = {}
    if arguments == "shift_labels":
        extra["shift_labels"] = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
    elif arguments == "num_items_in_batch":
        extra["num_items_in_batch"] = 100
    results = []
    for numel in (modeling._LOSS_CHUNK_NUMEL, 500 * 8):
        monkeypatch.setattr(modeling, "_LOSS_CHUNK_NUMEL", numel)
        model.zero_grad()
        loss = model(ids, labels=labels, use_cache=False, **extra).loss
        loss.backward()
        results.append([loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
    for whole, chunked in zip(*results, strict=True):
        torch.testing.assert_close(chunked, whole, equal_nan=True)
    assert results[0][0].isnan() == (arguments == "nothing to learn")


def test_a_custom_loss_function_gets_all_logits(modeling, monkeypatch):
    monkeypatch.setattr(modeling, "_LOSS_CHUNK_NUMEL", 500)
    model = our_model(SHAPE._replace(layers=1, vocab=500), torch.float32)
    model.loss_function = lambda logits, labels, vocab_size, **kwargs: torch.tensor(logits.shape[1])
    ids = torch.arange(20)[None]
    assert model(ids, labels=ids).loss == 20
