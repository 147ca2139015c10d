"""Prompts and greedy generation, the reference for every other way to generate."""

import torch


PROMPTS = ["Coming to the beautiful nature, we found", "来到美丽的大自然，我们发现", "In the evening", "The"]
GREEDY = {"max_new_tokens": 24, "do_sample": False}


def greedy_ids(model, ids: torch.Tensor, **settings) -> list[int]:
    """The new tokens of one prompt (1, L)."""
    output = model.generate(ids, attention_mask=torch.ones_like(ids), **{**GREEDY, **settings})
    return output[0, ids.shape[1] :].tolist()


def greedy_text(model, tokenizer, prompt: str) -> str:
    """The prompt with its greedy continuation."""
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    return prompt + tokenizer.decode(greedy_ids(model, ids), skip_special_tokens=True)


def greedy_rows(model, ids: torch.Tensor, **settings) -> torch.Tensor:
    """Prompts and new tokens of a batch (B, L), 20 for each row: nothing ends a row early."""
    settings = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, **settings}
    settings.setdefault("attention_mask", torch.ones_like(ids))
    return model.generate(ids, **settings)


def pad_left(rows, length: int, pad: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of token ids -> (ids, mask), each (B, length)."""
    ids = torch.stack([torch.cat((row.new_full((length - len(row),), pad), row)) for row in rows])
    mask = torch.stack([(torch.arange(length) >= length - len(row)).long() for row in rows])
    return ids, mask
