"""Measure a model beyond its window: loss through the cache, and recall by depth, with three rotary embeddings.

    python tools/measure_long_context.py                          # checkpoints/tiny, a few minutes
    python tools/measure_long_context.py --model build/smollm2    # on real text, more than an hour on two cores
    python tools/measure_long_context.py --documents 4 --probes 8 --out build/long-context

It writes long-context-results.json, .md and .png, in which the results of other models remain. The same weights run
with dynamic NTK (this package), with plain rotary (this package, rotary type "origin"), and as transformers' Llama
with its own dynamic NTK. All of them decode with a cache, as `generate` does. An interrupted run resumes with the same
command.
"""

import argparse
import json
import platform
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.arguments import positive
from tools.convert.files import json_bytes, new_file
from tools.long_context import tiny
from tools.long_context.page import Result, draw, page
from tools.long_context.real import Real
from tools.long_context.sides import SIDES, Measured
from tools.long_context.tiny import Tiny
from tools.model_folder import TINY, complete_model
from tools.package import REAL, ROOT


NAMES = {TINY: tiny.TITLE, REAL: "SmolLM2-135M-Instruct"}  # in the order of the page, the tiny model last


class Store:
    """The measurements so far of one run, in a file that an interrupted run continues from.

    Args:
        path: The file, which is deleted once the run is complete.
        settings: Measurements with other settings are dropped.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path, self.settings = path, settings
        self.cells: dict[str, Measured] = {}
        if path.exists():
            stored = json.loads(path.read_text(encoding="utf-8"))
            if stored["settings"] == settings:
                self.cells = {name: Measured(**cell) for name, cell in stored["cells"].items()}

    def add(self, name: str, measured: Measured) -> None:
        self.cells[name] = measured
        self.path.parent.mkdir(parents=True, exist_ok=True)
        cells = {name: cell._asdict() for name, cell in self.cells.items()}
        with new_file(self.path) as file:
            file.write(json_bytes({"settings": self.settings, "cells": cells}, sort_keys=False))


def measure(subject: Tiny | Real, store: Store) -> dict[str, Measured]:
    """Measure all sides at all lengths, document by document. Returns the measurements by side, length and number."""
    wanted = {
        f"{side} {length} {number}": (side, length, number)
        for number in range(subject.passes)
        for length in subject.lengths
        for side in SIDES
    }
    loaded: tuple[str, Any] = ("", None)
    bar_format = "{desc}{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
    total = sum(subject.work(length) for _, length, _ in wanted.values())
    with tqdm(total=total, bar_format=bar_format, miniters=1) as bar:  # steps are chunks of a prefill or single tokens
        for name, (side, length, number) in wanted.items():
            end = bar.n + subject.work(length)
            if name not in store.cells:
                bar.set_postfix_str(f"{SIDES[side]}, {length:,} tokens")
                if loaded[0] != side:
                    loaded = ("", None)  # before the next one needs the memory
                    loaded = (side, subject.load(side))
                store.add(name, subject.measure(loaded[1], length, number, bar.update))
            else:
                bar.initial += subject.work(length)  # not part of the speed
            bar.update(end - bar.n)
    return {name: store.cells[name] for name in wanted}


def result_of(stored: dict[str, Any]) -> Result:
    """What the page shows of a stored result: the means over its documents."""
    cells: dict[tuple[str, int], list[Measured]] = {}
    for name, cell in stored["cells"].items():
        side, length, _ = name.split()
        cells.setdefault((side, int(length)), []).append(Measured(**cell))
    found: dict[str, dict[int, Measured]] = {side: {} for side in SIDES}
    for (side, length), some in cells.items():
        values = [cell.value_loss for cell in some if cell.value_loss is not None]
        found[side][length] = Measured(
            sum(cell.loss for cell in some) / len(some),
            {depth: sum(cell.recall[depth] for cell in some) / len(some) for depth in some[0].recall},
            sum(values) / len(values) if values else None,
        )
    documents = {length: len(cells["dynamic", length]) for length in found["dynamic"]}
    return Result(stored["name"], stored["window"], stored["settings"], found, documents)


def write(out: Path, results: list[dict[str, Any]]) -> str:
    """Write the three files. Returns the page."""
    ordered = sorted(results, key=lambda stored: stored["name"] == tiny.TITLE)
    picture = out / "long-context-results.png"
    shown = [result_of(stored) for stored in ordered]
    draw(shown, picture)
    text = page(shown, picture.name)
    with new_file(picture.with_suffix(".json")) as file:
        file.write(json_bytes({"models": ordered}, sort_keys=False))
    picture.with_suffix(".md").write_text(text, encoding="utf-8")
    return text


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    made = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="\n".join(__doc__.splitlines()[2:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("--model", type=Path, default=TINY, help="a model folder (default: checkpoints/tiny)")
    add("--documents", type=positive, help="long documents per length (default: 16 for checkpoints/tiny, otherwise 2)")
    add(
        "--probes",
        type=positive,
        default=20,
        help="checkpoints/tiny: recall probes per depth and length (default: 20)",
    )
    add("--lengths", type=positive, nargs="+", help="other models: tokens (default: 1, 2 and 3 windows)")
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="other models (default: float32)",
    )
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="other models (default: %(default)s)")
    add("--out", type=Path, default=ROOT / "docs", help="folder for the results (default: docs)")
    return made.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    options = arguments(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder = options.model.resolve()
    if folder == TINY:
        subject = Tiny(folder, options.documents or 16, options.probes)
    else:
        complete_model(str(options.model))
        dtype = getattr(torch, options.dtype)
        subject = Real(folder, options.documents or 2, options.lengths, dtype, options.device)
    versions = {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "Python": platform.python_version(),
    }
    name, settings = NAMES.get(folder, folder.name), {**subject.settings, **versions}
    store = Store(options.out / f".long-context-{folder.name}.json", settings)
    cells = measure(subject, store)
    results = options.out / "long-context-results.json"
    others = json.loads(results.read_text(encoding="utf-8"))["models"] if results.exists() else []
    made = {"name": name, "window": subject.window, "settings": settings}
    made["cells"] = {name: cell._asdict() for name, cell in cells.items()}
    options.out.mkdir(parents=True, exist_ok=True)
    print(write(options.out, [*(other for other in others if other["name"] != name), made]))
    store.path.unlink()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nInterrupted. The same command resumes.")
