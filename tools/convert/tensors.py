"""Tensors that are named and described before they are read, and the checks of their names, shapes and values."""

import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

from tools import package
from tools.convert.files import ConversionError


_STORED_INV_FREQ = re.compile(r"rotary_emb\.inv_freq$")


class Tensor(NamedTuple):
    """One tensor of a checkpoint. `read` returns its values; until then nothing is in memory."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        count = self.dtype.itemsize
        for size in self.shape:
            count *= size
        return count


def total_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype as config.json names it, for example bfloat16."""
    return str(dtype).removeprefix("torch.")


def parameters(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The tensors without stored inv_freq.

    Some 7B checkpoints hold the rotary embedding's inv_freq, rounded to half precision. It is no parameter: this
    package's model computes it, and engines refuse a file that holds it.
    """
    return [tensor for tensor in tensors if not _STORED_INV_FREQ.search(tensor.name)]


def expected_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of the checkpoint that a config.json describes, Hub (= Llama) names."""
    try:
        vocab, hidden, middle = (config[key] for key in ("vocab_size", "hidden_size", "intermediate_size"))
        layers = config["num_hidden_layers"]
    except KeyError as error:
        raise ConversionError(f"config.json lacks {error.args[0]!r}; use the one in variants/.") from error
    if not all(type(size) is int and 0 < size <= 2**24 for size in (vocab, hidden, middle, layers)):
        raise ConversionError("config.json: the sizes must be positive integers; use the one in variants/.")
    if layers > (limit := package.load("configuration")._MAX_LAYERS):
        raise ConversionError(f"config.json: num_hidden_layers {layers} is more than {limit}, which no model has.")
    has_bias = config.get("bias", config.get("attention_bias", True))
    shapes = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for projection in "qkvo":
            shapes[f"{prefix}self_attn.{projection}_proj.weight"] = (hidden, hidden)
            if has_bias:
                shapes[f"{prefix}self_attn.{projection}_proj.bias"] = (hidden,)
        shapes[f"{prefix}mlp.gate_proj.weight"] = (middle, hidden)
        shapes[f"{prefix}mlp.up_proj.weight"] = (middle, hidden)
        shapes[f"{prefix}mlp.down_proj.weight"] = (hidden, middle)
        shapes[f"{prefix}input_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def abbreviated(names: set[str]) -> str:
    """The first three of a set of names, and how many more there are."""
    shown = ", ".join(sorted(names)[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def check_shapes(tensors: list[Tensor], config: dict[str, Any]) -> None:
    """Compare names and shapes with a config.json.

    Raises:
        ConversionError: A name is missing or unknown, or a shape differs; the message names it and the fix.
    """
    expected = expected_shapes(config)
    found = {tensor.name: tensor.shape for tensor in tensors}
    missing, unknown = expected.keys() - found.keys(), found.keys() - expected.keys()
    if config.get("tie_word_embeddings"):
        missing.discard("lm_head.weight")
    for names, held, fix in ((missing, "no attention biases", "false"), (unknown, "attention biases", "true")):
        if names and all(name.endswith("_proj.bias") for name in names):
            raise ConversionError(
                f"The weights hold {held} ({abbreviated(names)}), but config.json says otherwise: set "
                f'"bias": {fix} in it.'
            )
    if missing:
        raise ConversionError(
            f"The weights lack {abbreviated(missing)}, which config.json requires: a shard is missing."
        )
    if unknown:
        raise ConversionError(f"The weights hold {abbreviated(unknown)}, which config.json does not describe.")
    for name, shape in found.items():
        if shape != expected[name]:
            raise ConversionError(
                f"{name} has shape {shape}, but config.json requires {expected[name]}: use the config.json that "
                "belongs to these weights."
            )


def read_checked(tensor: Tensor) -> torch.Tensor:
    """The values of a tensor.

    Raises:
        ConversionError: They are not those that were planned, or not finite.
    """
    values = tensor.read()
    if tuple(values.shape) != tensor.shape or values.dtype != tensor.dtype:
        raise ConversionError(f"{tensor.name} changed while it was being converted; leave the source alone.")
    check_finite(tensor.name, values)
    return values


def check_finite(name: str, values: torch.Tensor) -> None:
    """Refuse a tensor with NaN or infinite values.

    Raises:
        ConversionError: It has some.
    """
    low, high = torch.aminmax(values)
    if not (low.isfinite() and high.isfinite()):
        raise ConversionError(f"{name} holds NaN or infinite values: the source is damaged; fetch it again.")
