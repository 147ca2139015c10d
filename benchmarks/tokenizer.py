"""The tokenizer against a SentencePiece-backed slow tokenizer of transformers and against sentencepiece itself.

All sides alternate in one process on the same 2 MB: the golden texts, this project's files, generated Unicode and
Python's standard library; whole texts (as in data preparation) and single lines (as in a chat). They must agree first.
Times are CPU times of the whole process, summed over all threads, so that no side wins by using more cores; only
encode/batch, one call with all texts, measures wall time, because there only ours uses all cores.
`encode` is tokenizer.encode(text), the ids only; `call` is tokenizer(text), for which ours also computes offsets.

python benchmarks/tokenizer.py            # about 2 minutes
python benchmarks/tokenizer.py --quick    # a trial run, under a minute
"""

import gc
import importlib
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any


os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import sentencepiece
import transformers


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.report import Report, parser, row_of, start, wanted
from benchmarks.timing import alternate, seconds
from tests.support.paths import GOLDEN
from tests.support.texts import mixed_corpus
from tools import package


InternLMTokenizer = package.load("tokenization").InternLMTokenizer
MODEL = str(GOLDEN / "tokenizer.model")
OURS, SLOW, RAW = "ours", "slow", "sentencepiece"


def slow_tokenizer() -> Any:
    """A tokenizer of transformers that calls sentencepiece from Python: SentencePieceBackend, before 5.0 Llama's."""
    if transformers.__version__ < "5":
        return transformers.LlamaTokenizer(MODEL, legacy=True)

    class SlowTokenizer(transformers.SentencePieceBackend):
        def convert_tokens_to_string(self, tokens: list[str]) -> str:
            return self.sp_model.decode(tokens)  # the base class leaves byte pieces as <0xE4>

    return SlowTokenizer(vocab_file=MODEL, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def functions_of(tokenizer: Any) -> dict[str, Callable[[Any], Any]]:
    """A tokenizer's functions from text to ids without special tokens, and back."""
    return {
        "encode": partial(tokenizer.encode, add_special_tokens=False),
        "call": lambda text: tokenizer(text, add_special_tokens=False)["input_ids"],
        "decode": tokenizer.decode,
    }


def sides() -> dict[str, dict[str, Callable[[Any], Any]]]:
    raw = sentencepiece.SentencePieceProcessor(model_file=MODEL)
    return {
        OURS: functions_of(InternLMTokenizer(MODEL)),
        SLOW: functions_of(slow_tokenizer()),
        RAW: {"encode": raw.encode, "call": raw.encode, "decode": raw.decode},
    }


def corpora(size: int) -> dict[str, list[str]]:
    """Texts on which all sides must agree: without control strings, NUL and U+2581."""
    texts = [
        text for text in mixed_corpus(size) if not any(c in text for c in ("<s>", "</s>", "<unk>", "\0", "\u2581"))
    ]
    lines = [line for text in texts for line in text.splitlines(keepends=True)]
    return {"whole": texts, "lines": lines[:: max(1, len(lines) // 10_000)]}


def cpu_seconds(function: Callable[[Any], Any], items: list) -> float:
    gc.collect()
    begin = time.process_time()
    for item in items:
        function(item)
    return time.process_time() - begin


def measure(report: Report, arguments: Any, size: int, budget: float) -> None:
    """Encode and decode each corpus on each side; one row per peer."""
    functions = sides()
    for corpus, texts in corpora(size).items():
        ids = [functions[RAW]["encode"](text) for text in texts]
        megabytes = sum(len(text.encode()) for text in texts) / 1e6
        for name, items in [("encode", texts), ("call", texts), ("decode", ids)]:
            case = f"{name}/{corpus}"
            if not wanted(case, arguments):
                continue
            answers = {side: [own[name](item) for item in items] for side, own in functions.items()}
            for side in (SLOW, RAW):
                if answers[side] != answers[OURS]:
                    wrong = next(
                        i for i, (a, b) in enumerate(zip(answers[side], answers[OURS], strict=True)) if a != b
                    )
                    raise SystemExit(f"{case}: {side} and ours differ on {texts[wrong][:200]!r}; not timed.")
            runs = {side: lambda f=own[name], i=items: cpu_seconds(f, i) for side, own in functions.items()}
            timing = alternate(runs, budget)
            speed = {side: round(megabytes / ms * 1e3, 2) for side, ms in timing.milliseconds.items()}
            print(f"{case:16s} {megabytes:.2f} MB, MB/s: " + ", ".join(f"{side} {v:.2f}" for side, v in speed.items()))
            facts = {"megabytes": round(megabytes, 3), "megabytes_per_second": speed}
            # On lines, the Python overhead of a transformers call exceeds sentencepiece's time for the line.
            targets = {SLOW: 5.0 if name == "decode" else 2.0, RAW: 1 / 1.5 if case == "encode/whole" else None}
            for peer, target in targets.items():
                report.add(*row_of(f"{case} against {peer}", timing, peer, at_least=target, **facts))


def measure_batch(report: Report, size: int, budget: float) -> None:
    """A data set in one call, as from `datasets.map(batched=True)`, with all threads that a side can use."""
    texts = corpora(size)["whole"]
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    raw = sentencepiece.SentencePieceProcessor(model_file=MODEL)
    calls = {
        OURS: InternLMTokenizer(MODEL),
        SLOW: slow_tokenizer(),
        RAW: partial(raw.encode, num_threads=os.cpu_count()),
    }
    runs = {name: lambda call=call: seconds(lambda: call(texts)) for name, call in calls.items()}
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    timing = alternate(runs, budget)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    facts = {"megabytes": round(megabytes, 3), "time": "wall", "cores": os.cpu_count()}
    for peer, target in {SLOW: 2.0, RAW: None}.items():
        report.add(*row_of(f"encode/batch against {peer}", timing, peer, at_least=target, **facts))


def measure_loading(report: Report, budget: float) -> None:
    """From files to a tokenizer object: both file formats of ours, and the slow peer."""
    with tempfile.TemporaryDirectory() as folder:
        InternLMTokenizer(MODEL).save_pretrained(folder)
        saved = str(Path(folder) / "tokenizer.json")
        makers = {
            OURS: lambda: InternLMTokenizer(MODEL),
            "tokenizer.json": lambda: InternLMTokenizer(tokenizer_file=saved),
            SLOW: slow_tokenizer,
        }
        runs = {name: lambda make=make: cpu_seconds(lambda _: make(), [0]) for name, make in makers.items()}
        timing = alternate(runs, budget)
    for peer in ("tokenizer.json", SLOW):
        report.add(*row_of(f"load against {peer}", timing, peer))
    load = timing.milliseconds[OURS] / 1e3
    text = f"load {load:.2f} s of CPU time, target < 1 s: {'ok' if load < 1 else 'MISSED'}"
    report.add({"case": "load", "seconds": load, "target": "< 1", "verdict": "ok" if load < 1 else "MISSED"}, text)


def main() -> None:
    arguments = parser(__doc__).parse_args()
    start(arguments)
    report = Report("tokenizer", arguments)
    report.note(sentencepiece=sentencepiece.__version__, tokenizers=importlib.import_module("tokenizers").__version__)
    size, budget = (200_000, 2) if report.quick else (2_000_000, 25)
    measure(report, arguments, size, budget)
    if wanted("encode/batch", arguments):
        measure_batch(report, size, budget)
    if wanted("load", arguments):
        measure_loading(report, budget)
    report.finish()


if __name__ == "__main__":
    main()
