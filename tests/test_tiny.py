"""checkpoints/tiny and its recipe: a seed gives the same text and pieces, and the numbers beside it are true."""

import argparse
import json
import random
import sys
from itertools import islice
from pathlib import Path

import pytest
import sentencepiece
import torch
from safetensors import safe_open

from tools import package

from support.paths import ROOT, TINY


sys.path.insert(0, str(ROOT / "tools"))

import tiny_corpus
import tiny_measure
import train_tiny
from tiny_grammar import GRAMMARS, is_well_formed, paragraph, split_sentences


LANGUAGES = pytest.mark.parametrize("language", GRAMMARS)
METRICS = json.loads((TINY / "metrics.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def subject():
    return tiny_measure.Subject(TINY)


def some_sentences(language: str, count: int = 40) -> list[str]:
    rng = random.Random(f"test {language}")
    return [sentence for _ in range(count) for sentence in paragraph(rng, language)]


@LANGUAGES
def test_recogniser_accepts_what_the_grammar_generates(language):
    for sentence in some_sentences(language):
        assert is_well_formed(sentence, language), sentence


@LANGUAGES
def test_recogniser_rejects_corrupted_sentences(language):
    """One letter less, one more, the halves swapped, two sentences at once, the other language's grammar."""
    other = next(name for name in GRAMMARS if name != language)
    sentences = some_sentences(language)
    for sentence, following in zip(sentences, sentences[1:], strict=False):
        middle = len(sentence) // 2
        corrupted = (
            sentence[:middle] + sentence[middle + 1 :] if sentence[middle : middle + 1] else sentence[1:],
            sentence[:middle] + sentence[middle] + sentence[middle:],
            sentence[middle:] + sentence[:middle],
            sentence[:-1],
            sentence + following,
        )
        for text in corrupted:
            assert not is_well_formed(text, language), text
        assert not is_well_formed(sentence, other)


def test_recogniser_rejects_wrong_words():
    for sentence in (
        "Coming to the beautiful nature, we found a clear hedgehog.",
        "The river ate grass quietly.",
        "我们发现了一条好奇的小河。",
        "这座小河在阳光下闪闪发光。",
        "",
    ):
        assert not is_well_formed(sentence), sentence


def test_split_sentences_leaves_out_the_unfinished_one():
    text = "The sun was warm. We sat\nThe air. 阳光温暖。我们"
    assert split_sentences(text) == ["The sun was warm.", "We sat", "The air.", "阳光温暖。"]


@LANGUAGES
def test_the_card_prompts_begin_sentences_of_the_grammar(language):
    prompt = tiny_measure.CARD_PROMPTS[language]
    rest = " a clear river." if language == "en" else "了一条清澈的小河。"
    assert is_well_formed(prompt + rest, language)


def test_corpus_is_the_same_for_the_same_seed():
    first, again, other = (list(islice(tiny_corpus.documents(seed), 60)) for seed in ("a", "a", "b"))
    assert first == again
    assert first != other
    assert {document.source for document in first} == {"prose", "recall", "chat", "tools"}


def test_recall_documents_answer_what_they_told():
    """Every recalled value was told before, and only the telling is left out of the loss."""
    rng = random.Random(5)
    for _ in range(50):
        told, parts = {}, tiny_corpus.recall_document(rng).parts
        for (stem, _), (value, learn) in zip(parts, parts[1:], strict=False):
            if value.strip().isdigit():
                assert learn == (stem in told)
                assert told.setdefault(stem, value) == value
        assert told


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_recall_probe_tells_the_key_once_at_its_depth(subject, depth):
    prompt, value = tiny_corpus.recall_probe(random.Random(depth), subject.count, 256, depth)
    *lines, question = prompt.split("\n")
    line = f"{question}{value}."
    assert [line for line in lines if line.startswith(question)] == [line]
    assert lines[1:].index(line) == round(depth * (len(lines) - 2))
    assert 236 <= subject.count(f"{prompt}{value}.") < 256


def test_chats_come_from_the_template_and_hold_no_control_strings():
    rng = random.Random(7)
    for _ in range(100):
        for message in tiny_corpus.messages_of(rng.choice(tiny_corpus.CHATS)(rng, "en")):
            assert not any(mark in message["content"] for mark in ("<s>", "</s>", "<eoh>", "<eoa>", "<|"))
    chat = tiny_corpus.render(tiny_corpus.messages_of([("Hello!", "Hi.")]))
    assert chat.endswith("<|User|>:Hello!\n<|Bot|>:Hi.<eoa>\n")


def test_tokenizer_is_rebuilt_byte_for_byte(tmp_path):
    train_tiny.train_tokenizer(tmp_path / "tokenizer.model", seed=1)
    assert (tmp_path / "tokenizer.model").read_bytes() == (TINY / "tokenizer.model").read_bytes()


def test_tokenizer_has_the_official_settings():
    """Field numbers are those of sentencepiece_model.proto; protobuf leaves out a field that has its default."""
    fields = package.load("sentencepiece")._fields
    model = fields((TINY / "tokenizer.model").read_bytes())
    pieces = [dict(fields(value)) for number, value in model if number == 1]
    trainer, normalizer = (dict(fields(value)) for wanted in (2, 3) for number, value in model if number == wanted)
    assert trainer[3] == 2  # model_type: BPE
    assert trainer[35] == 1  # byte_fallback
    assert [trainer.get(number) for number in (40, 41, 42)] == [0, 1, 2]  # unk, bos, eos
    assert trainer[43] == 2**64 - 1  # pad: -1, none
    assert normalizer[1] == b"identity"
    assert (normalizer[3], normalizer[4]) == (0, 0)  # add_dummy_prefix, remove_extra_whitespaces
    assert [piece[1] for piece in pieces if piece.get(3) == 4] == [b"<eoh>", b"<eoa>"]  # user-defined
    assert len(pieces) == train_tiny.MODEL["vocab_size"]


def test_tokenizer_covers_the_corpus():
    """No character of the corpus but the line end falls back to bytes."""
    pieces = sentencepiece.SentencePieceProcessor(str(TINY / "tokenizer.model"))
    for document in islice(tiny_corpus.documents("cover"), 300):
        ids = pieces.encode(document.text.replace("\n", ""))
        assert pieces.decode(ids) == document.text.replace("\n", "")
        assert not any(pieces.is_byte(token) or token == 0 for token in ids), document.text


def test_checkpoint_is_a_folder_of_weights():
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.model"}
    assert {path.name for path in TINY.iterdir()} == names | {"metrics.json", "README.md"}
    assert 2e6 < (TINY / "model.safetensors").stat().st_size < 6e6
    with safe_open(TINY / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert sum(tensor.numel() for tensor in tensors.values()) == METRICS["parameters"]
    assert METRICS["bytes"] == (TINY / "model.safetensors").stat().st_size


def test_checkpoint_has_the_sizes_that_tools_need(configuration):
    config = configuration.InternLMConfig.from_pretrained(TINY)
    for size in (config.vocab_size, config.hidden_size, config.intermediate_size):
        assert size % 128 == 0
    assert config.hidden_size // config.num_attention_heads >= 32
    assert config.rotary == {"type": "dynamic", "base": 10000.0, "scaling_factor": 1.0}
    assert (config.max_position_embeddings, config.bias, config.tie_word_embeddings) == (256, False, False)
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 1, 2)
    published = json.loads((ROOT / "config.json").read_text(encoding="utf-8"))
    assert config.auto_map == published["auto_map"]


def test_generation_stops_at_eoa(subject):
    generation = json.loads((TINY / "generation_config.json").read_text(encoding="utf-8"))
    assert generation == {"bos_token_id": 1, "eos_token_id": [2, subject.end], "pad_token_id": 0}
    (reply, ended), *_ = subject.complete([tiny_corpus.render([{"role": "user", "content": "Hello!"}], prompt=True)])
    assert (reply, ended) == ("Hello! How can I help you?", True)


def test_well_formed_share_measured_again(subject):
    share = tiny_measure.well_formed_share(subject, 14, seed=2)
    for name in ("en", "zh", "other"):
        assert share[name] >= 0.95, share
        assert share[f"{name}_sentences"] >= 40


def test_recall_measured_again(subject):
    """Greedy, so the same number of probes gives the same share."""
    count = tiny_measure.RECALL_PROBES
    share = tiny_measure.recall_share(subject, subject.window, count, depths=(0.5,))
    assert share["0.5"] > 0.9
    assert share["0.5"] == pytest.approx(METRICS["recall_in_window"]["0.5"], abs=1 / count)


def test_held_out_loss_measured_again(subject):
    """On a tenth of the documents the loss per source lies near the one in metrics.json."""
    losses = tiny_measure.held_out_loss(subject, 40)
    assert losses == pytest.approx(METRICS["held_out_loss"], rel=0.25)


def test_stretched_positions_leave_gaps_after_lines():
    """A window of 256 tokens stands for up to 1,024, and no position is one that four windows do not have."""
    newline = 7
    tokens = torch.randint(0, 12, (20, 256), generator=torch.Generator().manual_seed(1))
    assert torch.equal(train_tiny.stretched_positions(tokens, 1, newline, "a"), torch.arange(256).expand(20, -1))
    positions = train_tiny.stretched_positions(tokens, 4, newline, "a")
    gaps = positions.diff() - 1
    assert gaps.min() == 0 and positions[:, 0].max() == 0
    assert 700 < positions.max() < 1024
    assert set(tokens[:, :-1][gaps > 0].tolist()) == {newline}


def test_base_of_training_is_dynamic_ntks(subject):
    """What a stretched window is trained with is what the model uses at that length."""
    rotary = package.load("rotary")
    config = subject.model.config
    lengths = torch.tensor([[4.0 * subject.window]])
    theta = rotary.trained_inv_freq(config, "cpu") * rotary.ntk_log_ratio(config, lengths).exp()
    exponents = torch.arange(0, config.head_dim, 2) / config.head_dim
    torch.testing.assert_close(theta[0], train_tiny.ntk_base(4) ** -exponents)


def test_training_goes_on_where_it_was_interrupted(tmp_path, monkeypatch):
    """Three steps in one go, and three with a crash after the second, give the same weights."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(train_tiny, "SAVE_EVERY", 0)
    tokenizer = sentencepiece.SentencePieceProcessor(str(TINY / "tokenizer.model"))
    options = argparse.Namespace(seed=3, steps=3, rows=1, rate=1e-3)
    package = tiny_measure.load_package()

    def run(state_file: Path) -> dict[str, torch.Tensor]:
        torch.manual_seed(3)
        model = package.InternLMForCausalLM(
            package.InternLMConfig(**train_tiny.MODEL | {"num_hidden_layers": 1})
        ).train()
        train_tiny.train(model, tokenizer, state_file, options)
        return model.state_dict()

    straight = run(tmp_path / "straight.pt")
    real = train_tiny.batch

    def crash_at_third(tokenizer, seed, *rest):
        if seed.endswith(" 2"):
            raise KeyboardInterrupt
        return real(tokenizer, seed, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_tiny, "batch", crash_at_third)
        run(tmp_path / "crashed.pt")
    for name, tensor in run(tmp_path / "crashed.pt").items():
        torch.testing.assert_close(tensor, straight[name])


def test_help_runs(capsys):
    with pytest.raises(SystemExit, match="0"):
        train_tiny.main(["--help"])
    assert "--measure" in capsys.readouterr().out
