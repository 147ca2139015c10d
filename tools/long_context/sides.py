"""The three sides under comparison: the same weights with three rotary embeddings."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.models import sharing_weights
from tools import package
from tools.convert.llama import llama_config


# By the names that the results have: this package's two rotary types, and transformers' Llama.
SIDES = {
    "dynamic": "dynamic NTK",
    "origin": "plain rotary",
    "llama": "Llama's dynamic NTK",
}


class Measured(NamedTuple):
    """One side at one length; of one document, or the mean of several."""

    loss: float  # nats per token, decoded through the cache
    recall: dict[str, float]  # share of the values that greedy search repeats exactly, by depth: 0 is the beginning
    value_loss: float | None = None  # nats per token of the values

    @property
    def mean_recall(self) -> float:
        return sum(self.recall.values()) / len(self.recall)


def load_side(folder: Path, side: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    """The checkpoint with one side's rotary embedding."""
    ours = package.load("modeling").InternLMForCausalLM
    config = package.load("configuration").InternLMConfig.from_pretrained(folder)
    config.rotary["type"] = "origin" if side == "origin" else "dynamic"
    model = ours.from_pretrained(folder, config=config, dtype=dtype).to(device).eval()
    return as_llama(model) if side == "llama" else model


def as_llama(model: Any) -> LlamaForCausalLM:
    """transformers' Llama with its own dynamic NTK on the same tensors."""
    config = LlamaConfig(
        **llama_config(model.config.to_dict()) | {"rope_scaling": {"rope_type": "dynamic", "factor": 1.0}}
    )
    llama = sharing_weights(model, LlamaForCausalLM, config)
    llama.generation_config = model.generation_config
    return llama


def forget_lengths(model: Any) -> None:
    """Give a Llama a new rotary embedding: it keeps the base of the longest text so far for the next one."""
    if isinstance(model, LlamaForCausalLM):
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(model.lm_head.weight.device)
