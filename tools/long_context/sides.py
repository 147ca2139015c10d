"""The three sides under comparison: the same weights with three rotary embeddings."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tools import package


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
    ours = model.config
    config = LlamaConfig(
        vocab_size=ours.vocab_size,
        hidden_size=ours.hidden_size,
        intermediate_size=ours.intermediate_size,
        num_hidden_layers=ours.num_hidden_layers,
        num_attention_heads=ours.num_attention_heads,
        max_position_embeddings=ours.max_position_embeddings,
        rms_norm_eps=ours.rms_norm_eps,
        attention_bias=ours.bias,
        pad_token_id=ours.pad_token_id,
        rope_parameters={"rope_type": "dynamic", "rope_theta": ours.rotary["base"], "factor": 1.0},
    )
    with torch.device("meta"):
        llama = LlamaForCausalLM(config)
    llama.load_state_dict(model.state_dict(), assign=True)
    llama.generation_config = model.generation_config
    forget_lengths(llama)
    return llama.eval()


def forget_lengths(model: Any) -> None:
    """Give a Llama a new rotary embedding: it keeps the base of the longest text so far for the next one."""
    if isinstance(model, LlamaForCausalLM):
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(model.lm_head.weight.device)
