"""InternLMConfig: every published dialect, validation before anything is allocated, and the saved form."""

import copy
import inspect
import json

import pytest

from support.paths import GOLDEN, ROOT


@pytest.fixture(scope="module")
def config_class(configuration):
    return configuration.InternLMConfig


def rotary(kind, base=10000.0, factor=1.0):
    """The normal form."""
    return {"type": kind, "base": base, "scaling_factor": factor}


DYNAMIC, ORIGIN = rotary("dynamic"), rotary("origin")
DIALECTS = (
    ({}, DYNAMIC),
    ({"rotary": {"base": 10000, "type": "origin"}}, ORIGIN),
    ({"rotary": {"base": 10000, "type": "dynamic"}}, DYNAMIC),
    ({"rotary": {"base": 5e5, "type": "dynamic", "scaling_factor": 2}}, rotary("dynamic", 5e5, 2.0)),
    ({"rope_theta": 10000.0, "rope_scaling": None}, DYNAMIC),
    ({"rope_theta": 40889.9, "rope_scaling": {"type": "default"}}, rotary("origin", 40889.9)),
    ({"rope_theta": 1e6, "rope_scaling": {"type": "dynamic", "factor": 3.0}}, rotary("dynamic", 1e6, 3.0)),
    ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, rotary("dynamic", factor=2.0)),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}, ORIGIN),
    ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 2e4, "factor": 1.5}}, rotary("dynamic", 2e4, 1.5)),
)


@pytest.mark.parametrize(("given", "expected"), DIALECTS)
def test_rotary_dialects(config_class, tmp_path, given, expected):
    """Every dialect is converted to the one normal form, which survives a round trip through config.json."""
    config = config_class(**given)
    assert config.rotary == expected
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["rotary"] == expected
    assert not {"rope_theta", "rope_scaling", "rope_parameters"} & saved.keys()
    assert config_class.from_pretrained(tmp_path).rotary == expected


def test_published_20b_config(config_class):
    """The config.json of 2023, as published on the Hub."""
    config = config_class.from_pretrained(GOLDEN / "hub_20b")
    assert (config.num_hidden_layers, config.hidden_size, config.head_dim, config.bias) == (60, 5120, 128, False)
    assert config.rotary == DYNAMIC
    assert config.pad_token_id == 2  # as published; our own config.json says 0


BAD = (
    ({"hidden_size": 0}, "hidden_size=0"),
    ({"hidden_size": 64.0}, "hidden_size=64.0"),
    ({"hidden_size": "64"}, "hidden_size='64'"),
    ({"hidden_size": True}, "hidden_size=True"),
    ({"hidden_size": 2**40}, "hidden_size=1099511627776"),
    ({"num_hidden_layers": -1}, "num_hidden_layers=-1"),
    ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
    ({"vocab_size": None}, "vocab_size=None"),
    ({"intermediate_size": [1]}, r"intermediate_size=\[1\]"),
    ({"max_position_embeddings": 0}, "max_position_embeddings=0"),
    ({"num_attention_heads": 31}, "hidden_size=4096.*multiple of 2 . num_attention_heads"),
    ({"num_attention_heads": 4096}, "hidden_size=4096"),  # a head of width 1 has no pair to rotate
    ({"num_key_value_heads": 8}, "num_key_value_heads=8.*no grouped-query attention"),
    ({"head_dim": 64}, "head_dim=64"),
    ({"hidden_act": "sillu"}, "hidden_act='sillu'"),
    ({"hidden_act": ["silu"]}, "hidden_act"),
    ({"rms_norm_eps": 0}, "rms_norm_eps=0"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan"),
    ({"initializer_range": -0.1}, "initializer_range=-0.1"),
    ({"bias": "false"}, "bias='false'"),
    ({"use_cache": 1}, "use_cache=1"),
    ({"tie_word_embeddings": "no"}, "tie_word_embeddings='no'"),
    ({"pad_token_id": 103168}, "pad_token_id=103168"),
    ({"eos_token_id": [2, -1]}, "eos_token_id=-1"),
    ({"rotary": {"type": "yarn"}}, "rotary.type='yarn'.*origin.*dynamic"),
    ({"rotary": "dynamic"}, "rotary='dynamic'.*object"),
    ({"rotary": {"type": "dynamic", "scale": 2}}, "remove scale"),
    ({"rotary": {"type": ["dynamic"]}}, "rotary.type"),
    ({"rotary": {"base": 0}}, "base=0"),
    ({"rotary": {"base": "10000"}}, "base='10000'"),
    ({"rotary": {"scaling_factor": 0.5}}, "scaling_factor=0.5"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.type='linear'"),
    ({"rotary": DYNAMIC, "rope_scaling": {"type": "dynamic"}}, "rotary and rope_scaling.*one field only"),
)


@pytest.mark.parametrize(("given", "message"), BAD)
def test_bad_fields_are_named(config_class, given, message):
    """A one-line ValueError with the field, its value, what is allowed and the fix."""
    with pytest.raises(ValueError, match=message) as caught:
        config_class(**given)
    assert "must be" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_equality(config_class):
    """transformers 5 turns configurations into dataclasses, whose __eq__ ignored our fields."""
    assert config_class() == config_class()
    assert config_class() != config_class(num_hidden_layers=3)
    assert copy.deepcopy(config_class(num_labels=3)) == config_class(num_labels=3)


def test_every_field_of_config_json_is_known_and_every_argument_is_read(config_class):
    """The shipped config.json files have no unknown field, and __init__ has no unused argument."""
    arguments = set(inspect.signature(config_class.__init__).parameters) - {"self", "kwargs"}
    of_the_library = {"architectures", "auto_map", "dtype", "model_type"}
    files = [ROOT / "config.json", *ROOT.glob("variants/*/config.json"), ROOT / "checkpoints" / "tiny" / "config.json"]
    assert len(files) > 6
    for file in files:
        assert set(json.loads(file.read_text())) - {"transformers_version"} <= arguments | of_the_library, file
    modules = [path for path in ROOT.glob("*_internlm.py") if "token" not in path.name and "piece" not in path.name]
    source = "".join(path.read_text() for path in modules)
    read_by_the_library = {
        "use_cache",
        "tie_word_embeddings",
        "initializer_range",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
    }
    for argument in arguments - read_by_the_library:
        assert source.count(f"config.{argument}") + source.count(f"self.{argument}") > 1, argument
