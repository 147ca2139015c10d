"""InternLMConfig: every published dialect, validation before anything is allocated, and the saved form."""

import copy
import inspect
import json
import pickle

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

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
    ({"rotary": {"type": "dynamic"}, "rope_theta": 5e5}, rotary("dynamic", 5e5)),
    ({"rotary": {"type": "origin", "base": 5e5}, "rope_theta": 500000}, rotary("origin", 5e5)),  # they agree
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
    ({"rotary": DYNAMIC, "rope_theta": 5e5}, r"rotary: base=\[10000.0, 500000.0\].*the same under all of its names"),
    ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 2e4}}, r"rope_parameters: base=\[20000.0, 10000.0\]"),
    ({"rotary": {"base": 1e4, "rope_theta": 2e4}}, r"rotary: base=\[10000.0, 20000.0\]"),
    ({"rotary": {"factor": 2, "scaling_factor": 3}}, r"rotary: scaling_factor=\[3, 2\]"),
    ({"rope_scaling": {"type": "dynamic", "rope_type": "default"}}, r"rope_scaling.type=\['dynamic', 'default'\]"),
    ({"rotary": {"base": True}}, "base=True"),
    ({"rotary": {"base": 1e13}}, "base=10000000000000.0"),
    ({"rotary": {"scaling_factor": True}}, "scaling_factor=True"),
    ({"rotary": {"scaling_factor": 1e7}}, "scaling_factor=10000000.0.*from 1 to 1e.06"),
    ({"rms_norm_eps": True}, "rms_norm_eps=True"),
    ({"rms_norm_eps": 1.5}, "rms_norm_eps=1.5.*from 0 to 1, and not 0"),
)


@pytest.mark.parametrize(("given", "message"), BAD)
def test_bad_fields_are_named(config_class, given, message):
    """A one-line ValueError with the field, its value, what is allowed and the fix."""
    with pytest.raises(ValueError, match=message) as caught:
        config_class(**given)
    assert "must be" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_largest_values_are_allowed(config_class):
    """The bound itself is: the last token id, and the sizes that the messages name."""
    config = config_class(num_hidden_layers=1024, intermediate_size=2**24, rms_norm_eps=1, eos_token_id=103167)
    assert (config.num_hidden_layers, config.intermediate_size, config.eos_token_id) == (1024, 2**24, 103167)
    assert config_class(rotary=rotary("dynamic", 1e12, 1e6)).rotary == rotary("dynamic", 1e12, 1e6)


# Settings that arrive after the constructor; before them, the configuration has SAVED.
SAVED = rotary("dynamic", 2e4, 2.0)
LATE = (
    ({"rotary": {"type": "dynamic", "base": 10000}}, DYNAMIC),
    ({"rotary": {"type": "origin"}}, ORIGIN),  # the whole setting, as in config.json
    ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, rotary("dynamic", 2e4, 4.0)),
    ({"rope_scaling": {"rope_type": "default", "rope_theta": 5e5}}, rotary("origin", 5e5)),
    ({"rope_theta": 5e5}, rotary("dynamic", 5e5, 2.0)),
    ({"rope_theta": 5e5, "rope_scaling": {"type": "dynamic", "factor": 4}}, rotary("dynamic", 5e5, 4.0)),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, rotary("origin", 1e6)),
    ({"rope_parameters": {"rope_type": "dynamic"}}, rotary("dynamic", 2e4)),
    ({"rotary": None, "rope_theta": None, "rope_scaling": None, "rope_parameters": None}, SAVED),  # nothing is said
)
WAYS = {
    "from_pretrained": lambda kind, folder, given: kind.from_pretrained(folder, **given),
    "unused keywords": lambda kind, folder, given: kind.from_pretrained(folder, **given, return_unused_kwargs=True)[0],
    "from_dict": lambda kind, folder, given: kind.from_dict(json.loads((folder / "config.json").read_text()), **given),
    "update": lambda kind, folder, given: updated(kind.from_pretrained(folder), given),
    "of a shallow copy": lambda kind, folder, given: updated(copy.copy(kind.from_pretrained(folder)), given),
}


def updated(config, given: dict):
    config.update(given)
    return config


@pytest.fixture
def saved(config_class, tmp_path):
    config_class(rotary=SAVED).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("given", "expected"), LATE)
def test_late_rotary_settings_are_converted(config_class, saved, way, given, expected):
    """Keywords of from_pretrained raised KeyError or TypeError; assignments were ignored, and could not be loaded."""
    config = WAYS[way](config_class, saved, given)
    assert config.rotary == expected
    assert not any(hasattr(config, name) for name in ("rope_theta", "rope_scaling", "rope_parameters"))
    config.save_pretrained(saved)
    assert config_class.from_pretrained(saved).rotary == expected


BAD_ROTARY = [(given, message) for given, message in BAD if list(given) in (["rotary"], ["rope_scaling"])]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("given", "message"), BAD_ROTARY)
def test_bad_late_rotary_settings_are_named(config_class, saved, way, given, message):
    """As in the constructor."""
    with pytest.raises(ValueError, match=message):
        WAYS[way](config_class, saved, given)


def test_a_late_setting_leaves_other_configurations_alone(config_class):
    config = config_class(rotary=SAVED)
    shallow, shared = copy.copy(config), config_class()
    shared.rotary = config.rotary
    shallow.rope_theta, shared.rotary["base"] = 5e5, 6e5
    assert [one.rotary["base"] for one in (config, shallow, shared)] == [2e4, 5e5, 6e5]


def test_rotary_changed_in_place(config_class):
    """A value is checked, and a name of another dialect refused: it would be ignored. Copies check theirs, too."""
    original = config_class(rotary=SAVED)
    for config in (original, copy.deepcopy(original), pickle.loads(pickle.dumps(original))):
        config.rotary["base"] = 500000
        config.rotary.update(type="origin")
        assert config.rotary == config.to_dict()["rotary"] == rotary("origin", 5e5, 2.0)
        for name, value in {"factor": 4.0, "rope_theta": 1e4, "base": -1, "type": "yarn", "scale": 2}.items():
            with pytest.raises(ValueError, match=f"InternLMConfig: rotary.*{value}.* is not allowed: it must be"):
                config.rotary[name] = value
        assert config.rotary == rotary("origin", 5e5, 2.0)
    assert type(original.to_dict()["rotary"]) is dict  # for tools that store only plain types


def test_other_late_fields_are_checked_before_a_model_is_built(config_class, modeling, tmp_path):
    """An assignment alone may be one of several that belong together; head_dim is no field of its own."""
    sizes = {"vocab_size": 16, "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    config_class(**sizes, intermediate_size=8).save_pretrained(tmp_path)
    for given, message in (
        ({"bias": "no"}, "bias='no' is not allowed: it must be true or false"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ({"hidden_size": 12, "num_attention_heads": 4}, "hidden_size=12.*multiple of 2 . num_attention_heads"),
        ({"num_attention_heads": 1}, "num_key_value_heads=2"),
        ({"head_dim": 2}, r"head_dim=2.*hidden_size / num_attention_heads \(4\)"),
    ):
        for kind in (modeling.InternLMModel, modeling.InternLMForSequenceClassification):
            with pytest.raises(ValueError, match=message), torch.device("meta"):
                kind(config_class.from_pretrained(tmp_path, **given))
    assert config_class.from_pretrained(tmp_path, head_dim=4).head_dim == 4


def test_equality(config_class):
    """transformers 5 turns configurations into dataclasses, whose __eq__ ignored our fields."""
    assert config_class() == config_class()
    assert config_class() != config_class(num_hidden_layers=3)
    assert not any(config_class() == other for other in (None, 3, {}, config_class().to_dict()))
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


def test_the_parallel_plans_and_tied_weights_are_llamas(config_class, modeling):
    """Tensor, pipeline and sharded data parallel, for the layers and the head."""
    assert modeling.InternLMForCausalLM._tied_weights_keys == LlamaForCausalLM._tied_weights_keys
    for name in ("base_model_tp_plan", "base_model_pp_plan"):
        assert getattr(config_class, name) == getattr(LlamaConfig, name)
    for name in ("_tp_plan", "_pp_plan", "_fsdp_plan"):
        if hasattr(LlamaForCausalLM, name):  # older versions have no _fsdp_plan
            assert getattr(modeling.InternLMForCausalLM, name) == getattr(LlamaForCausalLM, name)
