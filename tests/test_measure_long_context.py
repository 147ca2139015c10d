"""`make long-context`: the measurements on both models, an interrupted run, and the page."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tools import measure_long_context
from tools.long_context.page import verdict
from tools.long_context.real import SCORED, Real
from tools.long_context.sides import SIDES, Measured
from tools.long_context.tiny import Tiny
from tools.measure_long_context import Store, measure, result_of, write

from support.paths import ROOT, TINY


LENGTH = 640  # two and a half windows of the tiny model


@pytest.fixture(scope="module")
def real(tiny_dir: Path) -> Real:
    """The measurement for real models, here on the tiny one, for which it is nonsense."""
    return Real(tiny_dir, documents=1, lengths=[LENGTH])


def test_a_document_has_five_keys_at_their_depths_and_fills_its_length(real: Real):
    """Each key twice; the tokens that are scored are behind the last one; the longest question still fits."""
    document = real.document(LENGTH, 0)
    text = real.tokenizer.decode(document.ids)
    assert len(document.ids) + max(len(question) + len(key) for question, key in document.questions) == LENGTH
    keys = [real.tokenizer.decode(key).strip() for _, key in document.questions]
    assert len(set(keys)) == 5 and all(len(key) == 5 and text.count(key) == 2 for key in keys)
    places = [text.index(key) for key in keys]
    assert places == sorted(places)
    tail = real.tokenizer.decode(document.ids[-SCORED:])
    assert not any(key in tail for key in keys)
    assert real.document(LENGTH, 0) == document != real.document(LENGTH, 1)


def test_a_length_without_room_is_refused(real: Real):
    with pytest.raises(SystemExit, match="--lengths 300: too short for five pass keys and 192 tokens"):
        real.document(300, 0)


def test_loss_and_keys_are_those_of_a_pass_over_the_whole_text(real: Real):
    """Plain rotary computes the same with a cache and without: the logits of one pass give the loss and the keys."""
    model = real.load("origin")
    done: list[float] = []
    found = real.measure(model, LENGTH, 0, done.append)
    document = real.document(LENGTH, 0)
    with torch.inference_mode():
        losses = losses_of(model, document.ids)
        of_keys = [
            losses_of(model, [*document.ids, *question, *key])[-len(key) :] for question, key in document.questions
        ]
    assert found.loss == pytest.approx(losses[-SCORED:].mean().item(), abs=1e-4)
    assert found.value_loss == pytest.approx(torch.stack(of_keys).mean().item(), abs=1e-4)
    assert sum(done) == pytest.approx(real.work(LENGTH), rel=0.1)


def losses_of(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    logits = model(torch.tensor([ids]), use_cache=False).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")


def test_a_key_counts_if_greedy_search_repeats_it(real: Real, monkeypatch: pytest.MonkeyPatch):
    """A model that has been taught the answer by its head's bias: the same digit five times."""
    model = real.load("dynamic")
    document = real.document(LENGTH, 0)
    first = document.questions[2][1]
    same = [(question, [first[-1]]) for question, _ in document.questions]
    monkeypatch.setattr(Real, "document", lambda self, length, number: document._replace(questions=same))
    monkeypatch.setattr(
        model.lm_head,
        "forward",
        lambda hidden: torch.eye(model.config.vocab_size)[first[-1]].expand(*hidden.shape[:2], -1),
    )
    assert real.measure(model, LENGTH, 0, lambda work: None).mean_recall == 1


def test_beyond_the_window_the_sides_differ_and_llama_has_no_memory(real: Real):
    """The library's Llama keeps the base of a longer text for the next one; a measurement must not depend on it."""
    found = {side: real.measure(real.load(side), LENGTH, 0, lambda work: None) for side in SIDES}
    assert len({measured.loss for measured in found.values()}) == 3
    llama = real.load("llama")
    real.measure(llama, 900, 0, lambda work: None)
    assert real.measure(llama, LENGTH, 0, lambda work: None) == found["llama"]


def test_an_interrupted_run_resumes(tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What is measured is not measured again, and other settings begin anew."""
    subject, path = Real(tiny_dir, documents=2, lengths=[LENGTH]), tmp_path / "build" / "cells.json"
    measured: list[tuple[int, int]] = []

    def one(self: Real, model: object, length: int, number: int, progress: object) -> Measured:
        measured.append((length, number))
        if len(measured) == 3:
            raise KeyboardInterrupt
        return Measured(float(len(measured)), {"0": 1.0}, 0.5)

    monkeypatch.setattr(Real, "measure", one)
    with pytest.raises(KeyboardInterrupt):
        measure(subject, Store(path, {"dtype": "float32"}))
    cells = measure(subject, Store(path, {"dtype": "float32"}))
    assert len(measured) == 3 + 4 and list(cells) == [
        f"{side} {LENGTH} {number}" for number in (0, 1) for side in SIDES
    ]
    assert cells[f"dynamic {LENGTH} 0"].loss == 1.0
    assert Store(path, {"dtype": "bfloat16"}).cells == {}


def test_the_command_measures_the_tiny_model_and_keeps_the_other(tmp_path: Path):
    """The smallest run: three files, a row for each side at each length, and the other model's table as it was."""
    published = json.loads((ROOT / "docs" / "long-context-results.json").read_text(encoding="utf-8"))["models"]
    other = [model for model in published if model["name"] != "checkpoints/tiny"]
    before = [row for row in write(tmp_path, other).splitlines() if row.startswith("| ")]
    command = [sys.executable, ROOT / "tools" / "measure_long_context.py", "--documents", "1", "--probes", "1"]
    done = subprocess.run([*command, "--out", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [row for row in done.stdout.splitlines() if row.startswith("| ")]
    assert len(rows) == len(before) + 1 + 4 * 3 and rows[: len(before)] == before
    assert (tmp_path / "long-context-results.md").read_text(encoding="utf-8").strip() == done.stdout.strip()
    assert (tmp_path / "long-context-results.png").stat().st_size > 20_000


def test_the_published_page_is_that_of_the_published_results(tmp_path: Path):
    results = json.loads((ROOT / "docs" / "long-context-results.json").read_text(encoding="utf-8"))["models"]
    assert [result["name"] for result in results] == ["SmolLM2-135M-Instruct", "checkpoints/tiny"]
    page = write(tmp_path, results)
    assert page == (ROOT / "docs" / "long-context-results.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", ["docs/long-context.md", "docs/zh/long-context.md"])
def test_the_docs_quote_the_results(page: str):
    """The table of losses, and the losses of the keys' digits in the text."""
    stored = json.loads((ROOT / "docs" / "long-context-results.json").read_text(encoding="utf-8"))["models"][0]
    real, text = result_of(stored), (ROOT / page).read_text(encoding="utf-8")
    rows = re.findall(r"^\| [^|]*\|((?: \d\.\d{3} \|)+)$", text, re.MULTILINE)
    quoted = [re.findall(r"[\d.]+", row) for row in rows]
    assert quoted == [[f"{real.found[side][length].loss:.3f}" for length in real.lengths] for side in SIDES]
    for side in SIDES:
        assert f"{real.found[side][16384].value_loss:.2f}" in text
    assert f"{real.found['dynamic'][16384].loss / real.found['dynamic'][8192].loss:.2f}" in text


def test_results_are_means_over_documents():
    cells = {
        f"{side} 256 {number}": {"loss": 1.0 + number, "recall": {"0": float(number), "1": 1.0}, "value_loss": number}
        for side in SIDES
        for number in (0, 1)
    }
    result = result_of({"name": "a", "window": 256, "settings": {}, "cells": cells})
    assert result.found["llama"][256] == Measured(1.5, {"0": 0.5, "1": 1.0}, 0.5)
    assert result.documents == {256: 2}


def test_the_verdict_follows_the_targets():
    def result(loss: float, recall: float):
        cells = {f"dynamic {n} 0": {"loss": 1.0 if n == 256 else loss, "recall": {"0": recall}} for n in (256, 1024)}
        return result_of({"name": "a", "window": 256, "settings": {}, "cells": cells})

    assert "at most 1.15, met); mean recall at 4x is 81% (target: above 80%, met)" in verdict(result(1.15, 0.81))
    assert "at most 1.15, not met); mean recall at 4x is 80% (target: above 80%, not met)" in verdict(
        result(1.16, 0.8)
    )


def test_the_tiny_model_is_the_default():
    options = measure_long_context.arguments([])
    assert options.model == TINY and Tiny(TINY, 1, 1).lengths == [256, 512, 768, 1024]
