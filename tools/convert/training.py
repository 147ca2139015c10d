"""InternLM's own training checkpoints, as tensors in the Hub's layout.

A training run saved `model_config.pt` and one `model_tp{t}_pp{p}.pt` for each tensor-parallel rank t and pipeline
stage p. The training code of 2023 wrote into them, layer by layer (`blocks.N`, numbered from 0 in every stage):

* `mixer.Wqkv` holds query, key and value rows, in this order; every rank has its own heads of all three;
* `mixer.out_proj` and `mlp.w3` (down) are split by columns; their bias, if any, is on rank 0 only;
* `mlp.w1` (gate), `mlp.w2` (up) and `head` are split by rows;
* `embedding` is split by columns (`embed_split_hidden`) or by rows; its shape tells which;
* `norm1`, `norm2` and `norm` are the same on every rank.
"""

import re
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from tools import package
from tools.convert.files import ConversionError, check_links, read_json
from tools.convert.pickles import load_pickle, load_untrusted
from tools.convert.tensors import Tensor, dtype_name


_FILE = re.compile(r"model_tp(\d+)_pp(\d+)\.pt")
# With interleaved pipelining a stage holds several chunks of the model, and names start with the chunk's number.
_NAME = re.compile(r"(?:model\.)?(?:(?P<chunk>\d+)\.)?(?:model\.)?(?:blocks\.(?P<layer>\d+)\.)?(?P<field>[A-Za-z].*)")
# The training code's dictionary class, loaded as a plain dictionary.
_CONFIG_CLASS = "internlm.core.context.parallel_context.Config"

_EITHER = -1  # joined by rows if a share has the model's width, otherwise by columns
# Field -> (Hub name, dimension along which ranks are joined; None: all ranks hold the same, rank 0's is used).
_LAYER_FIELDS = {
    "norm1.weight": ("input_layernorm.weight", None),
    "norm2.weight": ("post_attention_layernorm.weight", None),
    "mixer.out_proj.weight": ("self_attn.o_proj.weight", 1),
    "mixer.out_proj.bias": ("self_attn.o_proj.bias", None),
    "mlp.w1.weight": ("mlp.gate_proj.weight", 0),
    "mlp.w2.weight": ("mlp.up_proj.weight", 0),
    "mlp.w3.weight": ("mlp.down_proj.weight", 1),
}
_MODEL_FIELDS = {
    "norm.weight": ("model.norm.weight", None),
    "head.weight": ("lm_head.weight", 0),
    "embedding.weight": ("model.embed_tokens.weight", _EITHER),
    "embedding.word_embeddings.weight": ("model.embed_tokens.weight", _EITHER),
}
_NOT_PARAMETERS = "mixer.rotary_emb."  # prefix of what the rotary embedding stores, which is computed instead

Share = tuple[Path, str]  # file and name of one rank's share of a tensor


def _grid(folder: Path) -> list[list[Path]]:
    """All shards, by [tensor-parallel rank][pipeline stage]."""
    found = {tuple(map(int, match.groups())) for path in folder.iterdir() if (match := _FILE.fullmatch(path.name))}
    if not found:
        raise ConversionError(f"{folder} holds no training checkpoint: it has no model_tp0_pp0.pt.")
    ranks, stages = (max(numbers) + 1 for numbers in zip(*found, strict=True))
    for rank in range(ranks):
        for stage in range(stages):
            if (rank, stage) not in found:
                raise ConversionError(
                    f"{folder} has {ranks} tensor-parallel ranks and {stages} pipeline stages, but "
                    f"model_tp{rank}_pp{stage}.pt is missing: fetch it too."
                )
    return [[folder / f"model_tp{rank}_pp{stage}.pt" for stage in range(stages)] for rank in range(ranks)]


def _parse(path: Path, name: str) -> tuple[int, int | None, str]:
    match = _NAME.fullmatch(name)
    if match is None:
        raise ConversionError(f"{path} holds {name}, which is not a name from InternLM's training code.")
    layer = match["layer"]
    return int(match["chunk"] or 0), None if layer is None else int(layer), match["field"]


def _shares(grid: list[list[Path]], open_file: Callable) -> dict[tuple[int | None, str], list[Share]]:
    """(layer of the whole model, field) -> each rank's share, ranks in order."""
    # Chunks come before stages: chunk 0 of all stages, then chunk 1 of all stages.
    chunks: dict[tuple[int, int], dict[tuple[int | None, str], list[Share]]] = defaultdict(lambda: defaultdict(list))
    for files in grid:
        for stage, path in enumerate(files):
            for name in open_file(path):
                chunk, layer, field = _parse(path, name)
                if not field.startswith(_NOT_PARAMETERS):
                    chunks[chunk, stage][layer, field].append((path, name))
    shares: dict[tuple[int | None, str], list[Share]] = {}
    offset = 0
    for chunk, stage in sorted(chunks):
        layers = sorted({layer for layer, _ in chunks[chunk, stage] if layer is not None})
        first = layers[0] if layers else 0
        if first not in (0, offset) or layers != list(range(first, first + len(layers))):
            raise ConversionError(f"Pipeline stage {stage} holds only the layers {layers}; fetch it again.")
        for (layer, field), parts in chunks[chunk, stage].items():
            key = (None if layer is None else layer - first + offset, field)
            # The embedding may be in the last stage too, where a run tied it.
            shares.setdefault(key, parts)
        offset += len(layers)
    return shares


def _named(key: tuple[int | None, str], share: Share) -> list[tuple[str, int | None, int | None]]:
    """What a field becomes: (Hub name, dimension along which to join, which third of fused rows or None)."""
    layer, field = key
    prefix = f"model.layers.{layer}."
    if layer is not None and field in ("mixer.Wqkv.weight", "mixer.Wqkv.bias"):
        kind = field.removeprefix("mixer.Wqkv.")
        return [(f"{prefix}self_attn.{letter}_proj.{kind}", 0, third) for third, letter in enumerate("qkv")]
    if layer is not None and field in _LAYER_FIELDS:
        name, dim = _LAYER_FIELDS[field]
        return [(prefix + name, dim, None)]
    if layer is None and field in _MODEL_FIELDS:
        return [(*_MODEL_FIELDS[field], None)]
    raise ConversionError(f"{share[0]} holds {share[1]}, which no InternLM v1 model has.")


def _join(
    open_file: Callable, parts: list[Share], dim: int | None, third: int | None, dtype: torch.dtype | None
) -> torch.Tensor:
    values = [open_file(path)[name] for path, name in (parts[:1] if dim is None else parts)]
    if third is not None:
        values = [value.unflatten(0, (3, -1))[third] for value in values]
    whole = torch.cat(values, dim or 0) if len(values) > 1 else values[0]
    return whole if dtype is None else whole.to(dtype)


def _joined(
    name: str, open_file: Callable, parts: list[Share], dim: int | None, third: int | None, dtype: torch.dtype | None
) -> Tensor:
    """The tensor that the shares make up, unread: its shape follows from theirs."""
    shares = [open_file(path)[share] for path, share in (parts[:1] if dim is None else parts)]
    shape = list(shares[0].shape)
    for other in shares[1:]:
        if [*other.shape[:dim], *other.shape[dim + 1 :]] != [*shape[:dim], *shape[dim + 1 :]]:
            raise ConversionError(
                f"{parts[0][1]} has shapes {tuple(shares[0].shape)} and {tuple(other.shape)} on two tensor-parallel "
                "ranks, which cannot be joined: the shards are not from one run."
            )
        shape[dim] += other.shape[dim]
    if third is not None:
        if any(share.shape[0] % 3 for share in shares):
            raise ConversionError(
                f"{parts[0][1]} has {shares[0].shape[0]} rows, not three equal parts for q, k and v."
            )
        shape[0] //= 3
    read = partial(_join, open_file, parts, dim, third, dtype)
    return Tensor(name, tuple(shape), dtype or shares[0].dtype, read)


def training_tensors(folder: Path, dtype: torch.dtype | None = None) -> list[Tensor]:
    """The tensors of a training checkpoint by Hub name, unread; the shards of one stage are mapped at a time.

    Args:
        folder: Holds `model_tp{t}_pp{p}.pt` for any number of ranks and stages.
        dtype: Convert to this dtype; None keeps the checkpoint's.

    Raises:
        ConversionError: A shard is missing, damaged or hostile, or the shards do not match each other.
    """
    check_links(folder)
    grid = _grid(folder)
    open_file = lru_cache(maxsize=len(grid))(load_pickle)  # the ranks of a stage are needed together
    shares = _shares(grid, open_file)
    norm = shares.get((None, "norm.weight"))
    if norm is None:
        raise ConversionError(f"{folder} has no norm.weight: the last pipeline stage is missing.")
    width = open_file(norm[0][0])[norm[0][1]].shape[0]
    tensors = []
    for key, parts in shares.items():
        # Row-parallel layers have their bias on rank 0 only.
        if len(parts) != len(grid) and (key[1] != "mixer.out_proj.bias" or parts[0][0] not in grid[0]):
            raise ConversionError(
                f"{parts[0][1]} is in {len(parts)} of {len(grid)} tensor-parallel shards: they are not from one run."
            )
        for name, dim, third in _named(key, parts[0]):
            if dim == _EITHER:
                dim = 0 if open_file(parts[0][0])[parts[0][1]].shape[-1] == width else 1
            tensors.append(_joined(name, open_file, parts, dim, third, dtype))
    return tensors


def _run_settings(folder: Path) -> dict[str, Any]:
    path = folder / "model_config.pt"
    # The training code's dictionary class is loaded as a plain one; none of that code is needed or run.
    with torch.serialization.safe_globals([(OrderedDict, _CONFIG_CLASS)]):
        settings = load_untrusted(path)
    if not isinstance(settings, dict):
        raise ConversionError(f"{path} does not hold the settings of a training run.")
    return dict(settings)


def training_config(folder: Path, tensors: list[Tensor], window: int) -> dict[str, Any]:
    """The config.json of a training checkpoint: sizes from the tensors, heads and epsilon from model_config.pt.

    Args:
        window: Tokens per sequence of the training data; the checkpoint does not hold it.

    Raises:
        ConversionError: model_config.pt is missing, damaged, or contradicts the tensors.
    """
    settings = _run_settings(folder)
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    names = ("model.layers.0.mlp.gate_proj.weight", "lm_head.weight")
    if lacking := [name for name in names if name not in shapes]:
        raise ConversionError(f"{folder} has no tensor for {lacking[0]}: a shard is missing.")
    (middle, hidden), (vocab, _) = (shapes[name] for name in names)
    sizes = {
        "hidden_size": hidden,
        "num_hidden_layers": sum(name.endswith("input_layernorm.weight") for name in shapes),
        "vocab_size": vocab,
    }
    for field, value in sizes.items():
        given = settings.get("num_layers" if field == "num_hidden_layers" else field, value)
        if given not in (value, -1):
            raise ConversionError(
                f"model_config.pt says {field} is {given}, the shards say {value}: one of them is not from this run."
            )
    heads = settings.get("num_attention_heads")
    if not isinstance(heads, int):
        raise ConversionError("model_config.pt does not give num_attention_heads: pass a config.json with --config.")
    rotary = {"type": "dynamic", "base": float(settings.get("rope_base", 10000)), "scaling_factor": 1.0}
    return (
        read_json(package.ROOT / "config.json")
        | sizes
        | {
            "intermediate_size": middle,
            "num_attention_heads": heads,
            "bias": any(name.endswith("_proj.bias") for name in shapes),
            "rms_norm_eps": settings.get("layer_norm_epsilon", 1e-6),
            "max_position_embeddings": window,
            "rotary": rotary,
            "dtype": dtype_name(tensors[0].dtype),
        }
    )
