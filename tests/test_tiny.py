"""checkpoints/tiny and its recipe: corpus and tokenizer are reproducible, and the published metrics hold."""

import json
import random
from itertools import islice
from pathlib import Path

import pytest
import sentencepiece
import torch
from safetensors import safe_open

from tools import package, train_tiny
from tools.tiny import corpus, measure, train
from tools.tiny.grammar import GRAMMARS, is_well_formed, paragraph, split_sentences

from support.paths import ROOT, TINY
from support.versions import needs_torch


LANGUAGES = pytest.mark.parametrize("language", GRAMMARS)
METRICS = json.loads((TINY / "metrics.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def subject():
    return measure.Subject(TINY)


def some_sentences(language: str, count: int = 40) -> list[str]:
    rng = random.Random(f"test {language}")
    return [sentence for _ in range(count) for sentence in paragraph(rng, language)]


@LANGUAGES
def test_recogniser_accepts_generated_sentences(language):
    for sentence in some_sentences(language):
        assert is_well_formed(sentence, language), sentence


@LANGUAGES
def test_recogniser_rejects_corrupted_sentences(language):
    """A character missing or doubled, halves swapped, no final punctuation, two sentences, the other grammar."""
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


def test_split_sentences_drops_an_unfinished_sentence():
    text = "The sun was warm. We sat\nThe air. 阳光温暖。我们"
    assert split_sentences(text) == ["The sun was warm.", "We sat", "The air.", "阳光温暖。"]


@LANGUAGES
def test_card_prompts_start_sentences_of_the_grammar(language):
    prompt = measure.CARD_PROMPTS[language]
    rest = " a clear river." if language == "en" else "了一条清澈的小河。"
    assert is_well_formed(prompt + rest, language)


def test_corpus_is_determined_by_the_seed():
    first, again, other = (list(islice(corpus.documents(seed), 60)) for seed in ("a", "a", "b"))
    assert first == again
    assert first != other
    assert {document.source for document in first} == {"prose", "recall", "chat", "tools"}


def test_recall_documents_recall_what_they_stated():
    """Every recalled value was stated before, and only the first statement is excluded from the loss."""
    rng = random.Random(5)
    for _ in range(50):
        stated, parts = {}, corpus.recall_document(rng).parts
        for (stem, _), (value, learn) in zip(parts, parts[1:], strict=False):
            if value.strip().isdigit():
                assert learn == (stem in stated)
                assert stated.setdefault(stem, value) == value
        assert stated


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_recall_probe_states_the_key_once_at_its_depth(subject, depth):
    prompt, value = corpus.recall_probe(random.Random(depth), subject.count, 256, depth)
    *lines, question = prompt.split("\n")
    line = f"{question}{value}."
    assert [line for line in lines if line.startswith(question)] == [line]
    assert lines[1:].index(line) == round(depth * (len(lines) - 2))
    assert 236 <= subject.count(f"{prompt}{value}.") < 256


def test_chats_use_the_template_and_contain_no_control_strings():
    rng = random.Random(7)
    for _ in range(100):
        for message in corpus.messages_of(rng.choice(corpus.CHATS)(rng, "en")):
            assert not any(mark in message["content"] for mark in ("<s>", "</s>", "<eoh>", "<eoa>", "<|"))
    chat = corpus.render(corpus.messages_of([("Hello!", "Hi.")]))
    assert chat.endswith("<|User|>:Hello!\n<|Bot|>:Hi.<eoa>\n")


def test_tokenizer_training_is_reproducible_byte_for_byte(tmp_path):
    train.train_tokenizer(tmp_path / "tokenizer.model", seed=1)
    assert (tmp_path / "tokenizer.model").read_bytes() == (TINY / "tokenizer.model").read_bytes()


def test_tokenizer_has_the_official_settings():
    """Field numbers are those of sentencepiece_model.proto; protobuf omits fields with their default value."""
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
    assert len(pieces) == train.MODEL["vocab_size"]


def test_tokenizer_covers_the_corpus():
    """No character of the corpus except the newline falls back to bytes."""
    pieces = sentencepiece.SentencePieceProcessor(str(TINY / "tokenizer.model"))
    for document in islice(corpus.documents("cover"), 300):
        ids = pieces.encode(document.text.replace("\n", ""))
        assert pieces.decode(ids) == document.text.replace("\n", "")
        assert not any(pieces.is_byte(token) or token == 0 for token in ids), document.text


def test_checkpoint_has_the_files_of_a_folder_of_weights():
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.model"}
    assert {path.name for path in TINY.iterdir()} == names | {"metrics.json", "README.md"}
    assert 2e6 < (TINY / "model.safetensors").stat().st_size < 6e6
    with safe_open(TINY / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert sum(tensor.numel() for tensor in tensors.values()) == METRICS["parameters"]
    assert METRICS["bytes"] == (TINY / "model.safetensors").stat().st_size


def test_checkpoint_has_the_sizes_that_quantisers_and_kernels_need(configuration):
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
    (reply, ended), *_ = subject.complete([corpus.render([{"role": "user", "content": "Hello!"}], prompt=True)])
    assert (reply, ended) == ("Hello! How can I help you?", True)


def test_well_formed_share_is_reproduced(subject):
    share = measure.well_formed_share(subject, 14, seed=2)
    for name in ("en", "zh", "other"):
        assert share[name] >= 0.95, share
        assert share[f"{name}_sentences"] >= 40


def test_recall_is_reproduced(subject):
    """Decoding is greedy, so the same probes give the same share."""
    count = measure.RECALL_PROBES
    share = measure.recall_share(subject, subject.window, count, depths=(0.5,))
    assert share["0.5"] > 0.9
    assert share["0.5"] == pytest.approx(METRICS["recall_in_window"]["0.5"], abs=1 / count)


def test_held_out_loss_is_reproduced(subject):
    """On a tenth of the documents, the loss by source is close to the one in metrics.json."""
    losses = measure.held_out_loss(subject, 40)
    assert losses == pytest.approx(METRICS["held_out_loss"], rel=0.25)


def test_stretched_positions_have_gaps_after_newlines():
    """A window of 256 tokens stands for a text of up to 1,024 tokens, and no position exceeds four windows."""
    newline = 7
    tokens = torch.randint(0, 12, (20, 256), generator=torch.Generator().manual_seed(1))
    assert torch.equal(train.stretched_positions(tokens, 1, newline, "a"), torch.arange(256).expand(20, -1))
    positions = train.stretched_positions(tokens, 4, newline, "a")
    gaps = positions.diff() - 1
    assert gaps.min() == 0 and positions[:, 0].max() == 0
    assert 700 < positions.max() < 1024
    assert set(tokens[:, :-1][gaps > 0].tolist()) == {newline}


def test_training_uses_the_base_of_dynamic_ntk(subject, rotary):
    """A stretched window is trained with the base that the model uses at that length."""
    config = subject.model.config
    lengths = torch.tensor([[4.0 * subject.window]])
    inv_freq = rotary.trained_inv_freq(config, "cpu") * rotary.ntk_log_ratio(config, lengths).exp()
    exponents = torch.arange(0, config.head_dim, 2) / config.head_dim
    torch.testing.assert_close(inv_freq[0], train.ntk_base(4) ** -exponents)


@needs_torch("2.9", "has no torch.optim.Muon")
def test_interrupted_training_resumes_with_the_same_result(tmp_path, monkeypatch):
    """Three steps, with and without an interruption after the second, give the same weights."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(train, "SAVE_EVERY", 0)
    tokenizer = sentencepiece.SentencePieceProcessor(str(TINY / "tokenizer.model"))

    def run(state_file: Path) -> dict[str, torch.Tensor]:
        torch.manual_seed(3)
        model = train.new_model(num_hidden_layers=1)
        train.train(model, tokenizer, state_file, seed=3, steps=3, rows=1, rate=1e-3)
        return model.state_dict()

    uninterrupted = run(tmp_path / "uninterrupted.pt")
    real = train.batch

    def interrupted_at_third(tokenizer, seed, *rest):
        if seed.endswith(" 2"):
            raise KeyboardInterrupt
        return real(tokenizer, seed, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "batch", interrupted_at_third)
        run(tmp_path / "interrupted.pt")
    for name, tensor in run(tmp_path / "interrupted.pt").items():
        torch.testing.assert_close(tensor, uninterrupted[name])


def test_help_runs(capsys):
    with pytest.raises(SystemExit, match="0"):
        train_tiny.main(["--help"])
    assert "--measure" in capsys.readouterr().out
