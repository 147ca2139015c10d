"""A real model at multiples of its window, on real text: Python's documentation and standard library.

A document holds five pass keys at five depths, a test that Mohtashami and Jaggi describe with one key (Landmark
Attention, 2023). It is read once, its last tokens one by one through the cache, which gives the loss; then each key is
asked for. Keys that share a document cost one prefill instead of five. Documents of the same number end with the same
tokens, whatever their length: their losses differ by what stands before.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer

from tools import package
from tools.real_text import documentation, library

from .sides import Measured, forget_lengths, load_side


DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
SCORED = 192  # tokens at the end of the text that are read one by one
STEP = 40  # how long one token alone takes, in tokens of a prefill: for the progress bar
PLACES = ("library", "harbour", "museum", "airport", "bakery", "station", "castle", "market", "school", "theatre")
INTRODUCTION = (
    "There are five pass keys hidden inside a lot of irrelevant text. Find them and memorize them. I will quiz you "
    "about them.\n\n"
)
HERE = "<here>"  # marks where the user's text is in a rendered chat


class Document(NamedTuple):
    """A text with pass keys, in ids, and the questions about them."""

    ids: list[int]
    questions: list[tuple[list[int], list[int]]]  # by depth: the question up to "is", and the key after it


class Real:
    """What is measured on a real model.

    Args:
        folder: A complete model folder.
        documents: Texts per length: prose, code, and so on alternately.
        lengths: Tokens of a text with its longest question; None is 1, 2 and 3 windows.
    """

    def __init__(
        self,
        folder: Path,
        documents: int,
        lengths: list[int] | None = None,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> None:
        self.folder, self.dtype, self.device = folder, dtype, device
        self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        self.config = package.load("configuration").InternLMConfig.from_pretrained(folder)
        self.window = self.config.max_position_embeddings
        self.lengths = lengths or [windows * self.window for windows in (1, 2, 3)]
        self.passes = documents
        self.settings = {"lengths": self.lengths, "dtype": str(dtype).removeprefix("torch.")}

    def load(self, side: str) -> Any:
        return load_side(self.folder, side, self.dtype, self.device)

    def work(self, length: int) -> float:
        """How long a measurement takes, relative to others: a prefill, and a pass for each token after it."""
        return self._work(length - SCORED, length) + SCORED * self._work(1, length)

    def _work(self, new: int, length: int) -> float:
        """Of a forward: in units of 4 * hidden_size per layer, in which attention over L keys is L for each query."""
        keys = length - (new - 1) / 2
        tokens = STEP if new == 1 else new
        return tokens * (2 * self.config.hidden_size + 1.5 * self.config.intermediate_size + keys)

    @torch.inference_mode()
    def measure(self, model: Any, length: int, number: int, progress: Callable[[float], None]) -> Measured:
        forget_lengths(model)
        document = self.document(length, number)
        ids = torch.tensor([document.ids], device=self.device)
        start = ids.shape[1] - SCORED
        cache = package.load("cache").GrowingCache(config=self.config, max_length=length)
        with self.reporting(model, length, progress):
            logits = model(ids[:, :start], cache=cache, logits_to_keep=1).logits[0, -1]
            losses = []
            for token in ids[0, start:]:
                losses.append(cross_entropy(logits.float(), token).item())
                logits = model(token.view(1, 1), cache=cache).logits[0, -1]
        right, value_losses = {}, []
        for depth, (question, key) in zip(DEPTHS, document.questions, strict=True):
            found = model(torch.tensor([question + key[:-1]], device=self.device), cache=cache).logits[0, -len(key) :]
            expected = torch.tensor(key, device=self.device)
            right[f"{depth:g}"] = float((found.argmax(-1) == expected).all())
            value_losses.append(cross_entropy(found.float(), expected).item())
            cache.crop(-(len(question) + len(key) - 1))
        return Measured(sum(losses) / SCORED, right, sum(value_losses) / len(value_losses))

    @contextmanager
    def reporting(self, model: Any, length: int, progress: Callable[[float], None]) -> Iterator[None]:
        """Report the work of each layer's call while the measurement runs, since one prefill may take minutes."""
        layers = model.model.layers

        def report(_: Any, arguments: tuple[torch.Tensor, ...]) -> None:
            progress(self._work(arguments[0].shape[1], length) / len(layers))

        hooks = [layer.register_forward_pre_hook(report) for layer in layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def document(self, length: int, number: int) -> Document:
        """The text of this number, which with its longest question has at most `length` tokens."""
        rng = random.Random(f"pass keys {length} {number}")
        keys = {place: str(rng.randrange(10_000, 100_000)) for place in rng.sample(PLACES, len(DEPTHS))}
        before, after = self.chat()
        head = self.tokenizer(before + INTRODUCTION, add_special_tokens=not before)["input_ids"]
        stated = [
            self.encode(
                f"\n\nThe pass key of the {place} is {key}. Remember it: {key} is the pass key of the {place}.\n\n"
            )
            for place, key in keys.items()
        ]
        questions = []
        for place, key in keys.items():
            question = f"\n\nWhat is the pass key of the {place}?{after}The pass key of the {place} is"
            asked, whole = self.encode(question), self.encode(f"{question} {key}")
            same = next(i for i, token in enumerate(whole) if asked[i : i + 1] != [token])
            questions.append((whole[:same], whole[same:]))
        room = length - len(head) - sum(map(len, stated)) - max(len(asked) + len(key) for asked, key in questions)
        if room < SCORED:
            raise SystemExit(f"--lengths {length}: too short for five pass keys and {SCORED} tokens of text.")
        text = (documentation, library)[number % 2](seed=number)
        body = self.encode(text)[: max(self.lengths)][-room:]
        if len(body) < room:
            raise SystemExit(f"--lengths {length}: the text has only {len(body):,} tokens.")
        ids, last = head, 0
        for depth, statement in zip(DEPTHS, stated, strict=True):
            place = round(depth * (room - SCORED))
            ids = [*ids, *body[last:place], *statement]
            last = place
        return Document([*ids, *body[last:]], questions)

    def chat(self) -> tuple[str, str]:
        """What the chat template puts before the user's text and after it, up to the reply; nothing without one."""
        if not self.tokenizer.chat_template:
            return "", "\n"
        messages = [{"role": "user", "content": HERE}]
        text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        before, _, after = text.partition(HERE)
        return before, after

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]
