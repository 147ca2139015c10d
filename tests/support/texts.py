"""The corpus on which the tokenizer is compared with sentencepiece, and small SentencePiece models."""

import json
import random
from pathlib import Path

import sentencepiece

from .golden import jsonl
from .paths import ROOT


BLOCKS = [  # code points: Latin, Greek to Hebrew, Indic, symbols, CJK, Hangul, private use, emoji, all planes
    (32, 127), (0xA0, 0x2FF), (0x370, 0x5FF), (0x900, 0x1FFF), (0x2000, 0x2BFF), (0x3000, 0x30FF), (0x4E00, 0x9FFF),
    (0xAC00, 0xD7A3), (0xE000, 0xFFFF), (0x1F300, 0x1FAFF), (0x10000, 0x10FFFF),
]  # fmt: skip


def generated_unicode(rng: random.Random) -> str:
    """Up to 400 characters of one block, with spaces, line breaks and repetitions as in written text."""
    low, high = rng.choice(BLOCKS)
    characters = [chr(rng.randint(low, high)) for _ in range(rng.randint(1, 400))]
    return "".join(rng.choice([character, character, " ", "\n"]) for character in characters)


def mixed_corpus(size: int, seed: int = 0) -> list[str]:
    """About `size` bytes: golden texts, files of this project, generated Unicode, Python's standard library."""
    rng = random.Random(seed)
    out = [case["text"] for case in jsonl("tokenizer.jsonl")]
    for pattern in ("*.md", "*.py", "*.jinja", "tests/*.py", "tools/*.py", "docs/*.md"):
        out += [path.read_text(encoding="utf-8") for path in sorted(ROOT.glob(pattern))]
    out += [generated_unicode(rng) for _ in range(size // 4000)]
    left = size - sum(len(text.encode()) for text in out)
    library = sorted(Path(json.__file__).parents[1].glob("*.py"))
    rng.shuffle(library)
    for path in library:
        text = path.read_text(encoding="utf-8", errors="replace")
        if len(text.encode()) <= left:
            left -= len(text.encode())
            out.append(text)
    return out


def train_sentencepiece(corpus: Path, prefix: Path, **changed) -> Path:
    """Train a SentencePiece model of 500 pieces with the official settings, except those in `changed`."""
    official = {
        "model_type": "bpe",
        "vocab_size": 500,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "user_defined_symbols": ["<eoh>", "<eoa>"],
        "character_coverage": 0.98,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(input=str(corpus), model_prefix=str(prefix), **official | changed)
    return prefix.with_suffix(".model")
