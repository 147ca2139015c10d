"""What transformers' Trainer knows about a model by its class name.

Also run by tests/matrix_check.py. Training itself is tested in tests/ecosystem/test_training.py.
"""

import pytest
import torch
from transformers import Trainer, TrainingArguments

from support.golden import load


@pytest.fixture
def trainer(tmp_path):
    """Makes a Trainer whose label smoothing is too small to change the loss."""
    from accelerate.state import AcceleratorState

    rng = torch.get_rng_state()
    arguments = TrainingArguments(str(tmp_path), label_smoothing_factor=1e-9, use_cpu=True, report_to=[])
    yield lambda model: Trainer(model, arguments)
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_rng_state(rng)


@pytest.fixture(scope="module")
def rows(modeling):
    """Token ids, and labels of which some are ignored."""
    ids = torch.randint(3, 512, (2, 20), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids.masked_fill(torch.arange(20) < 6, -100)}


@torch.no_grad()
def test_label_smoothing_shifts_labels(modeling, trainer, rows):
    """It shifted only for known class names, so a model learned to repeat each token; also in a subclass."""
    model = load(modeling, "tiny_7b_origin")
    expected = model(**rows).loss
    for kind in (type(model), type("Ours", (type(model),), {})):
        model.__class__ = kind
        torch.testing.assert_close(trainer(model).compute_loss(model, dict(rows)), expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_label_smoothing_of_token_classes(modeling, trainer, rows):
    """Their labels belong to the tokens themselves."""
    torch.manual_seed(0)  # of the new head
    model = load(modeling, "tiny_7b_origin", "InternLMForTokenClassification", num_labels=5)
    rows = rows | {"labels": torch.where(rows["labels"] < 0, -100, rows["labels"] % 5)}
    expected = model(**rows).loss
    torch.testing.assert_close(trainer(model).compute_loss(model, dict(rows)), expected, atol=1e-5, rtol=0)


def test_the_model_keeps_its_own_name(modeling, tmp_path):
    """In what users see and in what is saved."""
    model = load(modeling, "tiny_7b_origin")
    assert repr(model).startswith("InternLMForCausalLM(\n  (model): InternLMModel(\n") and "Llama" not in repr(model)
    model.save_pretrained(tmp_path)
    assert '"InternLMForCausalLM"' in (tmp_path / "config.json").read_text()
