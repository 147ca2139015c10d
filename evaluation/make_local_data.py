"""Generate the data of the two local tasks from the grammar and the keys of the tiny model's corpus.

python evaluation/make_local_data.py        # always writes the same two files
"""

import argparse
import functools
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

from sentencepiece import SentencePieceProcessor


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.support.paths import GOLDEN, ROOT
from tools.tiny.corpus import KEY_WORDS, recall_line
from tools.tiny.grammar import is_well_formed, paragraph


SAMPLES = 64
# Training does not use this seed: the tiny model knows the grammar, but not these documents.
SEED = "evaluation"


def swapped(rng: random.Random, sentence: str, language: str) -> str:
    """`sentence` with two of its words (Chinese: characters) swapped; the final punctuation stays."""
    parts = sentence[:-1].split(" ") if language == "en" else list(sentence[:-1])
    first, second = rng.sample(range(len(parts)), 2)
    parts[first], parts[second] = parts[second], parts[first]
    return (" " if language == "en" else "").join(parts) + sentence[-1]


@functools.cache
def tokenizer() -> SentencePieceProcessor:
    return SentencePieceProcessor(model_file=str(GOLDEN / "tokenizer.model"))


def sentence_sample(rng: random.Random, language: str) -> dict:
    """A well-formed sentence among three that are not, all with equally many tokens, so that length is no clue."""
    broken: set[str] = set()
    while len(broken) < 3:
        whole, broken = rng.choice(paragraph(rng, language)), set()
        tokens = len(tokenizer().encode(whole))
        for candidate in (swapped(rng, whole, language) for _ in range(100)):
            if len(tokenizer().encode(candidate)) == tokens and not is_well_formed(candidate, language):
                broken.add(candidate)
    label = rng.randrange(4)
    choices = rng.sample(sorted(broken), 3)
    choices.insert(label, whole)
    return {"language": language, "choices": choices, "label": label}


def recall_sample(rng: random.Random, language: str) -> dict:
    """Two to eight keys are stated, and the prompt ends where the value of one of them must follow."""
    keys = rng.sample(KEY_WORDS[language], rng.randint(2, 8))
    values = {key: f"{rng.randrange(10000):04d}" for key in keys}
    lines = ["".join(text for text, _ in recall_line(key, values[key], language)) for key in keys]
    asked = rng.choice(keys)
    stem = recall_line(asked, "", language)[0][0]
    return {"language": language, "prompt": "\n".join([*lines, stem]), "value": values[asked]}


def write(name: str, sample: Callable[[random.Random, str], dict]) -> None:
    rng = random.Random(f"{SEED} {name}")
    folder = ROOT / "evaluation" / "tasks" / "local" / name
    folder.mkdir(parents=True, exist_ok=True)
    rows = [sample(rng, language) for _ in range(SAMPLES // 2) for language in ("en", "zh")]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "test.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    write("internlm_sentences", sentence_sample)
    write("internlm_recall", recall_sample)
