"""torch.export of a prompt's forward, with and without a cache, and of a decode step with a static cache."""

import functools

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.integrations.executorch import (
    TorchExportableModuleForDecoderOnlyLM,
    register_dynamic_cache_export_support,
)

from support.generation import PROMPTS, greedy_ids
from support.versions import needs_dynamo


WINDOW = 256  # of checkpoints/tiny


@pytest.mark.parametrize("length", (5, WINDOW, WINDOW + 44))
@torch.no_grad()
def test_export(tiny_model, length):
    """torch.export exports the forward of a prompt inside, at and beyond the window, without a graph break."""
    ids = torch.randint(5, 2000, (1, length), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "use_cache": False}
    program = torch.export.export(tiny_model, (), inputs, strict=False)
    other = torch.flip(ids, (1,))
    exported = program.module()(input_ids=other, use_cache=False).logits
    torch.testing.assert_close(exported, tiny_model(other, use_cache=False).logits, atol=1e-4, rtol=1e-4)


STRICT = pytest.param("strict", marks=needs_dynamo)


@pytest.mark.parametrize("way", ("with a cache", "without a cache", STRICT, "trace"))
@torch.no_grad()
def test_a_program_of_any_length(tiny_model, way):
    """Exported or traced at 30 tokens, a program is exact beyond the window of 256, too, where dynamic NTK begins."""
    use_cache = way == "with a cache"
    ids = torch.randint(5, 2000, (1, WINDOW + 100), generator=torch.Generator().manual_seed(0))
    if way == "trace":
        program = torch.jit.trace(Logits(tiny_model), (ids[:, :30],), check_trace=False)
    else:
        exported = torch.export.export(
            Logits(tiny_model),
            (ids[:, :30],),
            {"use_cache": use_cache},
            dynamic_shapes={"ids": {1: torch.export.Dim.DYNAMIC}, "use_cache": None},
            strict=way == "strict",
        )
        program = functools.partial(exported.module(), use_cache=use_cache)
    for length in (20, WINDOW, WINDOW + 1, WINDOW + 100):
        expected = tiny_model(ids[:, :length], use_cache=use_cache).logits
        torch.testing.assert_close(program(ids[:, :length]), expected, atol=1e-3, rtol=0)


class Logits(torch.nn.Module):
    """torch.jit.trace takes tensors only."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, use_cache=False):
        return self.model(ids, use_cache=use_cache).logits


@needs_dynamo
@torch.no_grad()
def test_export_with_cache(tiny_dir, tiny_tokenizer):
    """The export for ExecuTorch, a decode step with a static cache, gives the tokens of generate()."""
    model = AutoModelForCausalLM.from_pretrained(tiny_dir, trust_remote_code=True, dtype=torch.float32)
    model.generation_config.use_cache, model.generation_config.cache_implementation = True, "static"
    model.generation_config.cache_config = {"batch_size": 1, "max_cache_len": 300, "device": "cpu"}
    ids = tiny_tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    expected = greedy_ids(model, ids, cache_implementation="dynamic")
    exportable = TorchExportableModuleForDecoderOnlyLM(model, batch_size=1, max_cache_len=300, device="cpu")
    program = exportable.export(input_ids=ids[:, :1], cache_position=torch.tensor([0]))
    step = program.module()
    tokens = ids[0].tolist()
    for position in range(len(tokens) + len(expected) - 1):
        logits = step(input_ids=torch.tensor([[tokens[position]]]), cache_position=torch.tensor([position]))
        if position + 1 >= len(tokens):
            tokens.append(logits[0, -1].argmax().item())
    assert tokens[ids.shape[1] :] == expected


@torch.no_grad()
def test_an_export_that_returns_a_cache(tiny_model):
    """With transformers' support for it: the cache that a program makes is of the library's class, which is known."""
    register_dynamic_cache_export_support()
    ids = torch.randint(5, 2000, (1, 9), generator=torch.Generator().manual_seed(0))
    step = torch.export.export(tiny_model, (), {"input_ids": ids}, strict=False).module()
    cache = step(input_ids=ids).cache
    assert type(cache) is DynamicCache
    torch.testing.assert_close(cache.layers[1].keys, tiny_model(ids).cache.layers[1].keys, atol=1e-5, rtol=1e-5)
