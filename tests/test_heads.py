"""The Auto classes other than AutoModelForCausalLM, on the tiny model."""

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from support.generation import PROMPTS


@torch.no_grad()
def test_embeddings(tiny_dir, tiny_tokenizer):
    """AutoModel is the base model; a padded row has the hidden states of the row without padding."""
    model = AutoModel.from_pretrained(tiny_dir, trust_remote_code=True, dtype=torch.float32)
    batch = tiny_tokenizer(PROMPTS, padding=True, return_tensors="pt")
    states = model(**batch).last_hidden_state
    assert states.shape == (*batch["input_ids"].shape, model.config.hidden_size)
    for prompt, row in zip(PROMPTS, states, strict=True):
        alone = model(**tiny_tokenizer(prompt, return_tensors="pt")).last_hidden_state[0]
        torch.testing.assert_close(row[-len(alone) :], alone, atol=1e-4, rtol=1e-4)


def test_auto_model_cannot_chat(tiny_dir, tiny_tokenizer):
    """The error names the Auto class that can."""
    model = AutoModel.from_pretrained(tiny_dir, trust_remote_code=True)
    for method in (model.chat, model.stream_chat):
        with pytest.raises(AttributeError, match="AutoModelForCausalLM"):
            method(tiny_tokenizer, "Hello!")


def test_sequence_classification(tiny_dir, tiny_tokenizer):
    """A new head on the tiny model: rows do not depend on padding on either side, and training reduces the loss."""
    model = AutoModelForSequenceClassification.from_pretrained(
        tiny_dir, trust_remote_code=True, num_labels=3, dtype=torch.float32
    )
    alone = torch.cat([model(**tiny_tokenizer(prompt, return_tensors="pt")).logits for prompt in PROMPTS])
    assert alone.shape == (4, 3) and model.num_labels == 3
    for side in ("left", "right"):
        batch = tiny_tokenizer(PROMPTS, padding=True, padding_side=side, return_tensors="pt")
        torch.testing.assert_close(model(**batch).logits, alone, atol=1e-4, rtol=1e-4)
    optimizer, labels = torch.optim.AdamW(model.parameters(), lr=3e-3), torch.tensor([0, 1, 2, 0])
    losses = []
    for _ in range(8):
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize("dropout", (None, 0.0, 0.9))
def test_token_classification_obeys_classifier_dropout(tiny_dir, tiny_tokenizer, dropout):
    """In training only; published config.json files have no such field, which means none."""
    config = AutoConfig.from_pretrained(tiny_dir, trust_remote_code=True, num_labels=3)
    if dropout is not None:
        config.classifier_dropout = dropout
    model = AutoModelForTokenClassification.from_pretrained(
        tiny_dir, config=config, trust_remote_code=True, dtype=torch.float32
    )
    inputs = tiny_tokenizer(PROMPTS[0], return_tensors="pt")
    plain = model(**inputs).logits
    assert plain.shape == (*inputs["input_ids"].shape, 3) and model.num_labels == 3
    assert torch.equal(model.train()(**inputs).logits, plain) == (not dropout)
