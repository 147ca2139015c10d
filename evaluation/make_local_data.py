"""Make the data of the two local tasks from the grammar and the key words of the tiny model's world.

python evaluation/make_local_data.py        # the same two files every time
"""

import functools
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path


HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tools"))

import tiny_corpus  # noqa: E402
from sentencepiece import SentencePieceProcessor  # noqa: E402
from tiny_grammar import is_well_formed, paragraph  # noqa: E402


TOKENIZER = HERE.parent / "tests" / "golden" / "tokenizer.model"
SAMPLES = 64
# Not a seed of the training data: the tiny model has seen the grammar, not these documents.
SEED = "evaluation"


def exchanged(rng: random.Random, sentence: str, language: str) -> str:
    """`sentence` with two of its words (Chinese: characters) in each other's place, the end mark where it was."""
    parts = sentence[:-1].split(" ") if language == "en" else list(sentence[:-1])
    first, second = rng.sample(range(len(parts)), 2)
    parts[first], parts[second] = parts[second], parts[first]
    return (" " if language == "en" else "").join(parts) + sentence[-1]


@functools.cache
def tokenizer() -> SentencePieceProcessor:
    return SentencePieceProcessor(model_file=str(TOKENIZER))


def sentence_sample(rng: random.Random, language: str) -> dict:
    """One sentence of the grammar among three that are not, all of as many tokens: length must not give it away."""
    broken: set[str] = set()
    while len(broken) < 3:
        whole, broken = rng.choice(paragraph(rng, language)), set()
        tokens = len(tokenizer().encode(whole))
        for candidate in (exchanged(rng, whole, language) for _ in range(100)):
            if len(tokenizer().encode(candidate)) == tokens and not is_well_formed(candidate, language):
                broken.add(candidate)
    label = rng.randrange(4)
    choices = rng.sample(sorted(broken), 3)
    choices.insert(label, whole)
    return {"language": language, "choices": choices, "label": label}


def recall_sample(rng: random.Random, language: str) -> dict:
    """Two to eight keys are told, and the text ends where the value of one of them has to come."""
    told = rng.sample(tiny_corpus.KEY_WORDS[language], rng.randint(2, 8))
    values = {key: f"{rng.randrange(10000):04d}" for key in told}
    lines = ["".join(text for text, _ in tiny_corpus.recall_line(key, values[key], language)) for key in told]
    asked = rng.choice(told)
    stem = tiny_corpus.recall_line(asked, "", language)[0][0]
    return {"language": language, "prompt": "\n".join([*lines, stem]), "value": values[asked]}


def write(name: str, sample: Callable[[random.Random, str], dict]) -> None:
    rng = random.Random(f"{SEED} {name}")
    folder = HERE / "tasks" / "local" / name
    folder.mkdir(parents=True, exist_ok=True)
    rows = [sample(rng, language) for _ in range(SAMPLES // 2) for language in ("en", "zh")]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "test.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write("internlm_sentences", sentence_sample)
    write("internlm_recall", recall_sample)
