"""ONNX by transformers' exporter: onnxruntime gives the greedy tokens of transformers."""

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, StaticCache
from transformers.exporters.base import ExportedModel
from transformers.exporters.configs import OnnxConfig
from transformers.exporters.exporter_onnx import OnnxExporter


pytestmark = pytest.mark.ecosystem

PROMPTS = ("Coming to the beautiful nature, we found", "来到美丽的大自然，我们发现")
WINDOW = 256  # of checkpoints/tiny
CAPACITY = 320  # of the static cache


def export(model, folder, ids: torch.Tensor, dynamic: bool, generation: GenerationConfig | None = None):
    """Export prefill and decode step, save both, and open them in onnxruntime."""
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    config = OnnxConfig(dynamic=dynamic)
    OnnxExporter().export_for_generation(model, inputs, config, generation_config=generation).save_pretrained(folder)
    return ExportedModel.from_pretrained(folder, trust_remote_code=True, device="cpu").runners


def expected(model, ids: torch.Tensor, new: int) -> list[int]:
    return model.generate(ids, max_new_tokens=new, do_sample=False)[0, ids.shape[1] :].tolist()


@torch.no_grad()
def test_growing_cache(tiny_model, tiny_tokenizer, tmp_path):
    """Any batch and any length: prompts of four lengths, two of them across and beyond the window, two rows each."""
    sample = tiny_tokenizer([PROMPTS[0]] * 2, return_tensors="pt")["input_ids"]
    runners = export(tiny_model, tmp_path, sample, dynamic=True)
    long = tiny_tokenizer("In the evening we walk home. " * 100, return_tensors="pt")["input_ids"]
    short = [tiny_tokenizer(prompt, return_tensors="pt")["input_ids"] for prompt in PROMPTS]
    for ids in (*short, long[:, : WINDOW - 6], long[:, : WINDOW + 40]):
        new, cache, tokens = ids.expand(2, -1), DynamicCache(config=tiny_model.config), []
        positions = torch.arange(ids.shape[1]).expand(2, -1)
        while len(tokens) < 24:
            runner = runners["decode" if tokens else "prefill"]
            outputs = runner(input_ids=new, position_ids=positions, cache=cache)
            new, cache = outputs.logits[:, -1:].argmax(-1), outputs.cache
            positions = positions[:, -1:] + 1
            assert new[0] == new[1]
            tokens.append(new[0].item())
        assert tokens == expected(tiny_model, ids, 24)


@torch.no_grad()
def test_static_cache(tiny_model, tiny_tokenizer, tmp_path):
    """A cache longer than the window: the dynamic NTK correction is part of the graph, and exact beyond the window."""
    ids = tiny_tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    settings = GenerationConfig(cache_implementation="static", max_cache_len=CAPACITY, max_length=CAPACITY)
    step = export(tiny_model, tmp_path, ids, dynamic=False, generation=settings)["decode"]
    cache = StaticCache(config=tiny_model.config, max_cache_len=CAPACITY)
    cache.early_initialization(1, 4, 32, torch.float32, torch.device("cpu"))
    tokens = ids[0].tolist()
    for position in range(CAPACITY - 1):  # the decode step also processes the prompt, token by token
        mask = (torch.arange(CAPACITY) <= position)[None, None, None]
        new, position_ids = torch.tensor([[tokens[position]]]), torch.tensor([[position]])
        outputs = step(input_ids=new, attention_mask=mask, position_ids=position_ids, cache=cache)
        cache = outputs.cache
        if position + 1 == len(tokens):
            tokens.append(outputs.logits[0, -1].argmax().item())
    free = {"eos_token_id": None, "max_length": CAPACITY, "do_sample": False}
    assert tokens == tiny_model.generate(ids, **free)[0].tolist()
