"""checkpoints/tiny at 1 to 4 windows: long documents of its grammar, and its key-value recall."""

import random
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import DynamicCache

from tools.tiny.corpus import prose
from tools.tiny.measure import Subject, recall_share

from .sides import Measured, as_llama, forget_lengths


TITLE = "checkpoints/tiny"
DEPTHS = tuple(tenth / 10 for tenth in range(0, 11, 2))
LOSS_TARGET, RECALL_TARGET = 1.15, 0.80  # with dynamic NTK at 4x: loss relative to 1x, and recall


class Tiny:
    """What is measured on the tiny model.

    Args:
        folder: The checkpoint.
        documents: Long documents per length, of which half is Chinese.
        probes: Recall probes per depth and length.
    """

    def __init__(self, folder: Path, documents: int, probes: int) -> None:
        self.folder, self.documents, self.probes = folder, documents, probes
        self.window = Subject(folder).window
        self.lengths = [windows * self.window for windows in (1, 2, 3, 4)]
        self.passes = 1  # one measurement has all documents
        self.settings = {"documents": documents, "probes": probes, "dtype": "float32"}

    def load(self, side: str) -> Subject:
        subject = Subject(self.folder, "origin" if side == "origin" else "dynamic")
        if side == "llama":
            subject.model = as_llama(subject.model)
        return subject

    def work(self, length: int) -> float:
        """How long a measurement takes, relative to others."""
        return length

    def measure(self, subject: Subject, length: int, number: int, progress: Callable[[float], None]) -> Measured:
        forget_lengths(subject.model)
        loss = self.cached_loss(subject, length)
        recall = recall_share(subject, length - 6, self.probes, DEPTHS)
        progress(self.work(length))
        return Measured(loss, recall)

    @torch.inference_mode()
    def cached_loss(self, subject: Subject, length: int) -> float:
        """Loss over the last half window, decoded token by token after a prefill of the preceding text."""
        ids = long_documents(subject, length, self.documents)
        start = length - subject.window // 2
        cache = DynamicCache(config=subject.model.config)
        logits = subject.model(ids[:, :start], cache=cache, logits_to_keep=1).logits[:, -1]
        losses = []
        for position in range(start, length):
            losses.append(cross_entropy(logits.float(), ids[:, position]).item())
            logits = subject.model(ids[:, position : position + 1], cache=cache).logits[:, -1]
        return sum(losses) / len(losses)


def long_documents(subject: Subject, length: int, count: int) -> torch.Tensor:
    """Prose from a seed that training does not use, truncated to `length` tokens: (count, length) ids."""
    rng, rows = random.Random(f"long documents {length}"), []
    for number in range(count):
        ids: list[int] = []
        paragraphs = 8
        while len(ids) < length:
            ids, paragraphs = subject.ids(prose(rng, paragraphs, ("en", "zh")[number % 2])), 2 * paragraphs
        rows.append(ids[:length])
    return torch.tensor(rows)
