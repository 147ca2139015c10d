"""The golden checkpoints and outputs of the official code, and the helpers that compare a model with them.

Imported by tests/matrix_check.py, whose environments hold torch, transformers, accelerate, jinja2 and pytest only.
"""

import copy
import json

import torch
from transformers import DynamicCache, StaticCache

from .paths import GOLDEN


# The official code differs from itself by 1.5e-4 between runs, sdpa from eager by 1e-4; real errors start at 0.17.
ATOL = 1e-3
CHECKPOINTS = ("tiny_7b_origin", "tiny_20b_dynamic")


def jsonl(name: str) -> list[dict]:
    """The rows of a golden file. Not splitlines(): some texts contain other line separators."""
    return [json.loads(line) for line in (GOLDEN / name).read_text(encoding="utf-8").split("\n") if line]


def load(modeling, name, kind="InternLMForCausalLM", dtype=torch.float32, **kwargs):
    """A golden checkpoint, in evaluation mode."""
    return getattr(modeling, kind).from_pretrained(GOLDEN / name, dtype=dtype, **kwargs).eval()


def new_cache(kind, model, length=160):
    return DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=length)


def cache_of(output):
    """The cache of a model's or generate's output, by its name in this version."""
    return getattr(output, "cache", None) or getattr(output, "past_key_values", None)


@torch.no_grad()
def forced_decode(model, ids, prompt, end, cache):
    """Logits (end - prompt + 1, V) of a prefill of `prompt` tokens, then of one decode step per token of `ids`."""
    logits = [model(ids[:, :prompt], cache=cache).logits[:, -1]]
    logits += [model(ids[:, step : step + 1], cache=cache).logits[:, -1] for step in range(prompt, end)]
    return torch.cat(logits)


def assert_near(actual, expected, atol=ATOL):
    torch.testing.assert_close(actual, torch.as_tensor(expected), atol=atol, rtol=0)


def with_fixed_base(model, length):
    """The same weights with the fixed base that dynamic NTK has at `length`."""
    plain, head_dim = copy.deepcopy(model), model.config.head_dim
    ratio = length / model.config.max_position_embeddings
    base = model.config.rotary["base"] * ratio ** (head_dim / (head_dim - 2))
    plain.config.rotary = {"type": "origin", "base": base, "scaling_factor": 1.0}
    return plain


def one_layer(model):
    """Only the first layer, whose keys do not depend on earlier bases, with final norm and head."""
    one = copy.deepcopy(model)
    one.model.layers = one.model.layers[:1]
    one.config.num_hidden_layers = 1
    return one
