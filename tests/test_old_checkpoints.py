"""Folders as published in 2023 load unchanged, exactly or not at all."""

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from support.checkpoints import (
    SEVEN,
    TWENTY,
    add_modules,
    golden_state,
    official_config,
    pickled_checkpoint,
)


def old_folder(folder: Path, source: Path, state: dict | None = None, **changes) -> Path:
    """A golden checkpoint in its published form: three pickled shards, config.json, and this package's modules."""
    state = golden_state(source) if state is None else state
    pickled_checkpoint(folder, state, official_config(source, **changes), inv_freq=True)
    add_modules(folder)
    return folder


def load(folder: Path, auto=AutoModelForCausalLM, **settings):
    return auto.from_pretrained(folder, trust_remote_code=True, **settings).eval()


def logits(model, length: int = 17) -> torch.Tensor:
    ids = torch.from_numpy(np.load(SEVEN / "golden.npz")["ids256"]).reshape(1, -1)[:, :length]
    with torch.inference_mode():
        return model(input_ids=ids).logits


def original(modeling, configuration, source: Path, dtype=torch.float32, **changes):
    """The same weights, loaded without files of 2023."""
    config = configuration.InternLMConfig(**official_config(source, **changes))
    model = modeling.InternLMForCausalLM(config).to(dtype).eval()
    model.load_state_dict(golden_state(source, dtype), strict=True)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("field", ["torch_dtype", "dtype"])
@pytest.mark.parametrize("source", [SEVEN, TWENTY], ids=lambda path: path.name)
def test_loads_in_the_dtype_of_its_config(source, field, dtype, tmp_path, modeling, configuration):
    """Pickled shards with stored inv_freq give, bit for bit, the logits of the same weights loaded directly."""
    stated = {"torch_dtype": ..., field: str(dtype).removeprefix("torch.")}
    folder = old_folder(tmp_path / "old", source, golden_state(source, dtype), **stated)
    model = load(folder, dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert torch.equal(logits(model), logits(original(modeling, configuration, source, dtype)))


@pytest.mark.parametrize("pad", [0, 2, None])
def test_any_published_pad_token_is_kept(pad, tmp_path, modeling, configuration):
    """Pad 2 (= eos) since October 2023, 0 before: the logits and the embedding row are the checkpoint's."""
    model = load(old_folder(tmp_path / "old", TWENTY, pad_token_id=pad))
    assert torch.equal(logits(model), logits(original(modeling, configuration, TWENTY)))
    assert model.config.pad_token_id == pad and model.get_input_embeddings().padding_idx is None


DIALECTS = {
    "nothing": {"rotary": ...},
    "rotary": {"rotary": {"base": 10000, "type": "dynamic"}},
    "rotary with factor": {"rotary": {"base": 10000, "type": "dynamic", "scaling_factor": 1.0}},
    "rope_theta": {"rotary": ..., "rope_theta": 10000.0, "rope_scaling": None},
    "rope_scaling type": {"rotary": ..., "rope_theta": 10000.0, "rope_scaling": {"type": "dynamic", "factor": 1.0}},
    "rope_scaling rope_type": {"rotary": ..., "rope_scaling": {"rope_type": "dynamic", "factor": 1.0}},
    "rope_parameters": {"rotary": ..., "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 1.0}},
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_gives_the_official_logits_beyond_the_window(dialect, tmp_path):
    """128 tokens are twice the window of 64: a misread rotary setting is off by more than 0.17."""
    model = load(old_folder(tmp_path / "old", TWENTY, **DIALECTS[dialect]))
    golden = np.load(TWENTY / "golden.npz")
    found = logits(model, 128)[0, golden["full_128_pos"]]
    torch.testing.assert_close(found, torch.from_numpy(golden["full_128_logits"]).view_as(found), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    "changes",
    [
        {"rotary": {"base": 10000, "type": "origin"}},
        {"rotary": ..., "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    ],
    ids=["rotary", "rope_parameters"],
)
def test_plain_rotary_dialects_give_the_official_logits(changes, tmp_path):
    model = load(old_folder(tmp_path / "old", SEVEN, **changes))
    golden = np.load(SEVEN / "golden.npz")
    found = logits(model, 128)[0, golden["full_128_pos"]]
    torch.testing.assert_close(found, torch.from_numpy(golden["full_128_logits"]).view_as(found), atol=1e-3, rtol=0)


def test_stored_inv_freq_is_ignored_silently(tmp_path, capfd, caplog):
    def output() -> str:
        return "".join(capfd.readouterr()) + caplog.text

    load(old_folder(tmp_path / "old", SEVEN))
    assert "inv_freq" not in (printed := output()) and "UNEXPECTED" not in printed and "not used" not in printed
    # The same capture shows tensors that are really unexpected.
    surplus = golden_state(SEVEN) | {"model.layers.0.stranger": torch.zeros(2)}
    load(old_folder(tmp_path / "surplus", SEVEN, surplus))
    assert "stranger" in output()


def test_the_published_auto_map_still_chats(tmp_path):
    """In 2023 AutoModel was the causal LM too, and scripts call AutoModel.from_pretrained(...).chat(...)."""
    model = load(old_folder(tmp_path / "old", TWENTY), AutoModel)
    assert type(model).__name__ == "InternLMForCausalLM" and callable(model.chat)


def test_a_fresh_process_loads_a_folder_with_an_awkward_name(tmp_path):
    """As users load it: a new interpreter, offline, and a path with a dot, a space and Chinese characters."""
    folder = old_folder(tmp_path / "书生 internlm-20b.v1", TWENTY)
    script = (
        "import sys, torch, numpy\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()\n"
        "golden = numpy.load(sys.argv[2])\n"
        "ids = torch.from_numpy(golden['ids256']).reshape(1, -1)[:, :96]\n"
        "found = model(input_ids=ids).logits[0, golden['full_96_pos']].detach()\n"
        "print((found - torch.from_numpy(golden['full_96_logits']).view_as(found)).abs().max().item())\n"
    )
    command = [sys.executable, "-W", "error::FutureWarning", "-c", script, str(folder), str(TWENTY / "golden.npz")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1e-3


def without_biases() -> dict[str, torch.Tensor]:
    return {name: value for name, value in golden_state(SEVEN).items() if not name.endswith(".bias")}


@pytest.mark.parametrize("settings", [{}, {"device_map": "cpu"}, {"dtype": torch.bfloat16}], ids=str)
@pytest.mark.parametrize("head", ["InternLMForCausalLM", "InternLMModel", "InternLMForSequenceClassification"])
@pytest.mark.parametrize("biased", [True, False], ids=["config without", "weights without"])
def test_biases_that_contradict_the_config_are_refused(biased, head, settings, tmp_path, modeling):
    """In both directions, and through every class, the error names the field and the value that fixes it."""
    folder = tmp_path / "old"
    state = golden_state(SEVEN) if biased else without_biases()
    pickled_checkpoint(folder, state, official_config(SEVEN, bias=not biased))
    with pytest.raises(ValueError, match=f'config.bias is {not biased}: set "bias": {str(biased).lower()} in'):
        getattr(modeling, head).from_pretrained(folder, **settings)


@pytest.mark.ecosystem
@pytest.mark.parametrize("method", ["bitsandbytes 8", "bitsandbytes 4", "quanto", "torchao"])
def test_biases_that_contradict_the_config_are_refused_when_quantising(method, tmp_path, modeling):
    """Quantisers keep their own list of missing tensors; torchao's omits biases (transformers 5.23)."""
    import transformers

    if method == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        settings = transformers.TorchAoConfig(Int8WeightOnlyConfig())
    elif method == "quanto":
        settings = transformers.QuantoConfig(weights="int8")
    else:
        settings = transformers.BitsAndBytesConfig(load_in_8bit="8" in method, load_in_4bit="4" in method)
    for biased in (True, False):
        state = golden_state(SEVEN) if biased else without_biases()
        folder = pickled_checkpoint(tmp_path / str(biased), state, official_config(SEVEN, bias=not biased))
        with pytest.raises(ValueError, match=f'set "bias": {str(biased).lower()} in'):
            modeling.InternLMForCausalLM.from_pretrained(folder, quantization_config=settings, device_map="cpu")


def test_tensors_offloaded_to_disk_are_not_reported_missing(tmp_path, modeling):
    """Tensors on disk have no storage either."""
    folder = pickled_checkpoint(tmp_path / "old", golden_state(SEVEN), official_config(SEVEN))
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    device_map |= {f"model.layers.{layer}": "disk" if layer % 2 else "cpu" for layer in range(4)}
    load = modeling.InternLMForCausalLM.from_pretrained
    model = load(folder, device_map=device_map, offload_folder=tmp_path / "offload").eval()
    assert model.model.layers[1].self_attn.q_proj.bias.is_meta
    torch.testing.assert_close(logits(model), logits(load(folder).eval()), atol=1e-5, rtol=0)


def test_the_fix_in_the_error_message_works(tmp_path, modeling):
    state = without_biases()
    folder = pickled_checkpoint(tmp_path / "old", state, official_config(SEVEN, bias=False))
    loaded = modeling.InternLMForCausalLM.from_pretrained(folder).state_dict()
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[name], state[name]) for name in state)


@pytest.mark.parametrize(
    "name", ["model.layers.2.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.bias", "lm_head.weight"]
)
def test_a_missing_parameter_is_refused_by_name(name, tmp_path, modeling):
    state = golden_state(SEVEN)
    del state[name]
    folder = pickled_checkpoint(tmp_path / "old", state, official_config(SEVEN))
    with pytest.raises(ValueError, match=f"lacks 1 parameter.*{name}"):
        modeling.InternLMForCausalLM.from_pretrained(folder)


def test_a_wrong_shape_is_refused(tmp_path, modeling):
    """The library's own error: it never loads a tensor of another shape unless asked to."""
    state = golden_state(SEVEN) | {"model.layers.1.mlp.up_proj.weight": torch.zeros(175, 64)}
    folder = pickled_checkpoint(tmp_path / "old", state, official_config(SEVEN))
    with pytest.raises(RuntimeError, match="size"):
        modeling.InternLMForCausalLM.from_pretrained(folder)


def test_from_pretrained_otherwise_behaves_as_usual(tmp_path, modeling):
    """The check changes nothing else: loading info, a passed state_dict, new heads, and an empty state_dict."""
    folder = pickled_checkpoint(tmp_path / "old", golden_state(SEVEN), official_config(SEVEN))
    model, info = modeling.InternLMForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and isinstance(model, modeling.InternLMForCausalLM)
    config = model.config
    given = modeling.InternLMForCausalLM.from_pretrained(None, config=config, state_dict=golden_state(SEVEN))
    assert torch.equal(given.lm_head.weight, model.lm_head.weight)
    with pytest.raises(ValueError, match='set "bias": false'):
        modeling.InternLMForCausalLM.from_pretrained(None, config=config, state_dict=without_biases())
    for head in (
        "InternLMForSequenceClassification",
        "InternLMForTokenClassification",
        "InternLMForQuestionAnswering",
    ):
        headed = getattr(modeling, head).from_pretrained(folder)
        assert torch.equal(headed.model.norm.weight, model.model.norm.weight)
    assert isinstance(modeling.InternLMModel.from_pretrained(folder), modeling.InternLMModel)
    random = modeling.InternLMForCausalLM.from_pretrained(None, config=config, state_dict={})
    assert all(parameter.isfinite().all() for parameter in random.parameters())


def test_tied_weights_need_no_head_in_the_file(tmp_path, modeling):
    state = golden_state(TWENTY)
    del state["lm_head.weight"]
    folder = pickled_checkpoint(tmp_path / "old", state, official_config(TWENTY, tie_word_embeddings=True))
    model = modeling.InternLMForCausalLM.from_pretrained(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize(
    "damage",
    ["truncated", "missing", "pointer", "code"],
)
def test_a_damaged_shard_never_loads(damage, tmp_path, modeling):
    """The library reads pickles; a damaged one raises, and code in it never runs."""
    folder = pickled_checkpoint(tmp_path / "old", golden_state(SEVEN), official_config(SEVEN))
    shard, marker = folder / "pytorch_model-00002-of-00003.bin", tmp_path / "it-ran"
    if damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:-1000])
    elif damage == "missing":
        shard.unlink()
    elif damage == "pointer":
        shard.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    else:
        torch.save(torch.load(shard) | {"lm_head.weight": _Code(marker)}, shard)
    with pytest.raises((OSError, RuntimeError, ValueError, pickle.UnpicklingError)):
        modeling.InternLMForCausalLM.from_pretrained(folder)
    assert not marker.exists()


class _Code:
    """Unpickling it would create a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")
