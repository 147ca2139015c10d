"""Small checkpoints in the formats of 2023, made from the golden ones: sharded pickles, training checkpoints."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tools.package import MODULES, ROOT

from .paths import GOLDEN


SEVEN = GOLDEN / "tiny_7b_origin"
TWENTY = GOLDEN / "tiny_20b_dynamic"


def golden_state(source: Path, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """The weights of a golden checkpoint, by official name."""
    state = load_file(source / "model.safetensors")
    return {name: value if dtype is None else value.to(dtype) for name, value in state.items()}


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")


def official_config(source: Path, **changes: Any) -> dict[str, Any]:
    """A golden config.json with changes; a field that is changed to `...` is removed."""
    config = {**json.loads((source / "config.json").read_text()), **changes}
    return {key: value for key, value in config.items() if value is not ...}


def add_modules(folder: Path) -> None:
    """Copy the uploaded modules into a checkpoint's folder."""
    for module in MODULES:
        shutil.copy(ROOT / module, folder)


def pickled_checkpoint(
    folder: Path, state: dict[str, torch.Tensor], config: dict[str, Any], shards: int = 3, inv_freq: bool = False
) -> Path:
    """A folder as it was published in 2023: config.json, an index, and `shards` pickles.

    With `inv_freq`, every layer also stores its inv_freq in half precision, as in some 7B checkpoints.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = dict(state)
    if inv_freq:
        width = config["hidden_size"] // config["num_attention_heads"]
        stored = 10000.0 ** -(torch.arange(0, width, 2).float() / width)
        for layer in range(config["num_hidden_layers"]):
            state[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = stored.half()
    write_json(folder / "config.json", config)
    names = sorted(state)
    step = -(-len(names) // shards)
    weight_map = {}
    for number in range(shards):
        file = f"pytorch_model-{number + 1:05}-of-{shards:05}.bin"
        part = {name: state[name] for name in names[number * step : (number + 1) * step]}
        torch.save(part, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    total = sum(value.nbytes for value in state.values())
    write_json(folder / "pytorch_model.bin.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    return folder


def _training_names(state: dict[str, torch.Tensor], layers: range) -> dict[str, torch.Tensor]:
    """Some layers of a model as the training code names and fuses them, numbered from 0."""
    names = {
        "input_layernorm.weight": "norm1.weight",
        "post_attention_layernorm.weight": "norm2.weight",
        "self_attn.o_proj.weight": "mixer.out_proj.weight",
        "self_attn.o_proj.bias": "mixer.out_proj.bias",
        "mlp.gate_proj.weight": "mlp.w1.weight",
        "mlp.up_proj.weight": "mlp.w2.weight",
        "mlp.down_proj.weight": "mlp.w3.weight",
    }
    stage = {}
    for local, layer in enumerate(layers):
        old, new = f"model.layers.{layer}.", f"blocks.{local}."
        stage.update({new + field: state[old + name] for name, field in names.items() if old + name in state})
        for kind in ("weight", "bias"):
            parts = [f"{old}self_attn.{letter}_proj.{kind}" for letter in "qkv"]
            if parts[0] in state:
                stage[f"{new}mixer.Wqkv.{kind}"] = torch.stack([state[part] for part in parts])  # (3, E, ...)
        stage[f"{new}mixer.rotary_emb.inv_freq"] = torch.rand(8)
    return stage


def _rank_share(name: str, value: torch.Tensor, rank: int, ranks: int, split_hidden: bool) -> torch.Tensor | None:
    """One tensor-parallel rank's share of a tensor; None where it has none."""
    if "Wqkv" in name:
        return value.chunk(ranks, 1)[rank].flatten(0, 1)
    if name.endswith("out_proj.bias"):
        return value if rank == 0 else None
    if "norm" in name or "inv_freq" in name:
        return value
    by_columns = "out_proj" in name or "w3" in name or ("embedding" in name and split_hidden)
    return value.chunk(ranks, 1 if by_columns else 0)[rank]


def training_checkpoint(
    folder: Path,
    state: dict[str, torch.Tensor],
    layers: int,
    ranks: int = 1,
    stages: int = 1,
    chunks: int = 1,
    split_hidden: bool = True,
    settings: dict[str, Any] | None = None,
) -> Path:
    """A training run's folder: `model_tp{t}_pp{p}.pt` of a model split `ranks` by `stages` by `chunks` ways."""
    folder.mkdir(parents=True, exist_ok=True)
    embedding = "embedding.weight" if split_hidden else "embedding.word_embeddings.weight"
    bounds = [layers * index // (stages * chunks) for index in range(stages * chunks + 1)]
    files: dict[tuple[int, int], dict[str, torch.Tensor]] = {}
    for chunk in range(chunks):
        for stage in range(stages):
            index = chunk * stages + stage
            part = _training_names(state, range(bounds[index], bounds[index + 1]))
            if index == 0:
                part[embedding] = state["model.embed_tokens.weight"]
            if index == stages * chunks - 1:
                part |= {"norm.weight": state["model.norm.weight"], "head.weight": state["lm_head.weight"]}
            prefix = "model." if chunks == 1 else f"{chunk}.model."
            for rank in range(ranks):
                held = files.setdefault((rank, stage), {})
                for name, value in part.items():
                    share = _rank_share(name, value, rank, ranks, split_hidden)
                    if share is not None:
                        held[prefix + name] = share.clone()
    for (rank, stage), held in files.items():
        torch.save(held, folder / f"model_tp{rank}_pp{stage}.pt")
    defaults = {"num_layers": layers, "hidden_size": state["model.norm.weight"].shape[0], "num_attention_heads": 4}
    torch.save(
        {**defaults, "layer_norm_epsilon": 1e-6, "dtype": torch.bfloat16, **(settings or {})},
        folder / "model_config.pt",
    )
    return folder
