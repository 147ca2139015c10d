"""Every variant's small files: the published facts, and the full-size model they describe, on the meta device."""

import json
from pathlib import Path

import pytest
import torch

from tools.convert.tensors import expected_shapes

from support.paths import ROOT


VARIANTS = ROOT / "variants"

# name: layers, hidden, heads, intermediate, bias, window, prompt format (None: a base model)
FACTS = {
    "internlm-20b": (60, 5120, 40, 13824, False, 4096, None),
    "internlm-chat-20b": (60, 5120, 40, 13824, False, 4096, "later"),
    "internlm-7b": (32, 4096, 32, 11008, True, 2048, None),
    "internlm-chat-7b": (32, 4096, 32, 11008, True, 2048, "early"),
    "internlm-chat-7b-8k": (32, 4096, 32, 11008, True, 8192, "early"),
    "internlm-chat-7b-v1_1": (32, 4096, 32, 11008, True, 2048, "later"),
}


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def full_size(modeling, configuration, name: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a variant's parameters; building it on the meta device allocates nothing."""
    config = configuration.InternLMConfig(**read(VARIANTS / name / "config.json"))
    with torch.device("meta"):
        model = modeling.InternLMForCausalLM(config)
    assert not list(model.named_buffers())
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


def test_every_folder_is_a_known_variant():
    assert {path.name for path in VARIANTS.iterdir() if path.is_dir()} == set(FACTS)


@pytest.mark.parametrize("name", FACTS)
def test_config_holds_the_published_facts(name):
    layers, hidden, heads, middle, bias, window, _ = FACTS[name]
    expected = read(ROOT / "config.json") | {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "intermediate_size": middle,
        "bias": bias,
        "max_position_embeddings": window,
    }
    assert read(VARIANTS / name / "config.json") == expected
    assert expected["vocab_size"] == 103168 and expected["rms_norm_eps"] == 1e-6
    assert (expected["bos_token_id"], expected["eos_token_id"], expected["pad_token_id"]) == (1, 2, 0)
    assert expected["rotary"] == {"type": "dynamic", "base": 10000.0, "scaling_factor": 1.0}
    assert expected["tie_word_embeddings"] is False and hidden // heads == 128


def test_the_root_config_is_the_20bs():
    assert read(ROOT / "config.json") == read(VARIANTS / "internlm-20b" / "config.json")


@pytest.mark.parametrize("name", FACTS)
def test_stop_tokens_and_prompt_format(name):
    """Chat models stop at <eoa> too; the early format's template is named, not copied."""
    prompt_format = FACTS[name][-1]
    files = {path.name for path in (VARIANTS / name).iterdir()}
    expected = {"config.json"}
    if prompt_format:
        expected.add("generation_config.json")
        generation = read(VARIANTS / name / "generation_config.json")
        assert generation == read(ROOT / "generation_config.json") | {"eos_token_id": [2, 103028]}
    if prompt_format == "early":
        expected.add("variant.json")
        assert read(VARIANTS / name / "variant.json") == {"chat_template": "variants/early_chat_template.jinja"}
        assert "<eoh>" in (VARIANTS / "early_chat_template.jinja").read_text(encoding="utf-8")
    assert files == expected


@pytest.mark.parametrize("name", FACTS)
def test_full_size_model_has_the_published_parameters(name, modeling, configuration):
    layers, hidden, _, middle, bias, _, _ = FACTS[name]
    found = full_size(modeling, configuration, name)
    linear = {"q": (hidden, hidden), "k": (hidden, hidden), "v": (hidden, hidden), "o": (hidden, hidden)}
    expected = {
        "model.embed_tokens.weight": (103168, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (103168, hidden),
    }
    for layer in (f"model.layers.{number}." for number in range(layers)):
        expected |= {f"{layer}self_attn.{key}_proj.weight": shape for key, shape in linear.items()}
        expected |= {f"{layer}self_attn.{key}_proj.bias": (hidden,) for key in linear if bias}
        expected |= {f"{layer}{norm}.weight": (hidden,) for norm in ("input_layernorm", "post_attention_layernorm")}
        expected |= {f"{layer}mlp.{key}_proj.weight": (middle, hidden) for key in ("gate", "up")}
        expected[f"{layer}mlp.down_proj.weight"] = (hidden, middle)
    assert found == expected
    # The shapes with which the conversion tools compare checkpoints.
    assert expected_shapes(read(VARIANTS / name / "config.json")) == expected


def test_20b_equals_the_published_index(modeling, configuration):
    index = read(ROOT / "tests" / "golden" / "hub_20b" / "pytorch_model.bin.index.json")
    found = full_size(modeling, configuration, "internlm-20b")
    assert set(found) == set(index["weight_map"]) and len(found) == 543
    parameters = sum(torch.Size(shape).numel() for shape in found.values())
    assert 2 * parameters == index["metadata"]["total_size"] == 40_177_428_480


def test_published_20b_config_means_the_same(configuration):
    """The config.json of 2023 (dialect rope_theta, pad 2) gives our sizes and rotary setting."""
    published = read(ROOT / "tests" / "golden" / "hub_20b" / "config.json")
    theirs, ours = (configuration.InternLMConfig(**fields) for fields in (published, read(ROOT / "config.json")))
    assert theirs.rotary == ours.rotary
    assert {k for k, v in theirs.to_dict().items() if ours.to_dict().get(k, v) != v} <= {
        "pad_token_id",
        "auto_map",
        "transformers_version",
        "dtype",
        "torch_dtype",
    }


def test_the_readme_table_agrees():
    rows = {}
    for line in (VARIANTS / "README.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] in FACTS:
            rows[cells[0]] = cells[1:]
    for name, (layers, hidden, heads, middle, bias, window, prompt_format) in FACTS.items():
        sizes = [str(value) for value in (layers, hidden, heads, middle)]
        assert rows[name] == [*sizes, "yes" if bias else "no", str(window), prompt_format or "(base model)"]
