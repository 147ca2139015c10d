"""docs/long-context-results.md and its plot, from the stored results of one or two models."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt

from . import tiny
from .real import SCORED
from .sides import SIDES, Measured


COLOURS = {"dynamic": "#1f5fbf", "origin": "#8a8a8a", "llama": "#c8641b"}


class Result(NamedTuple):
    """Everything that was measured on a model."""

    name: str
    window: int
    settings: dict[str, Any]
    found: dict[str, dict[int, Measured]]  # side -> tokens -> the mean over documents
    documents: dict[int, int]  # tokens -> how many documents were measured

    @property
    def lengths(self) -> list[int]:
        return list(self.documents)

    def in_windows(self, length: int) -> str:
        return f"{length / self.window:g}x"


def verdict(result: Result) -> str:
    """One line: whether dynamic NTK meets the tiny model's targets."""
    first, last = (result.found["dynamic"][result.lengths[i]] for i in (0, -1))
    growth, longest = last.loss / first.loss, result.in_windows(result.lengths[-1])
    met = {True: "met", False: "not met"}
    return (
        f"With dynamic NTK, loss at {longest} is {growth:.2f} times the loss at 1x (target: at most "
        f"{tiny.LOSS_TARGET:.2f}, {met[growth <= tiny.LOSS_TARGET]}); mean recall at {longest} is "
        f"{last.mean_recall:.0%} (target: above {tiny.RECALL_TARGET:.0%}, "
        f"{met[last.mean_recall > tiny.RECALL_TARGET]})."
    )


def table(result: Result) -> list[str]:
    """One row for each length and side."""
    first = result.found["dynamic"][result.lengths[0]]
    with_values = first.value_loss is not None
    heads = [
        "length",
        "rotary",
        "loss",
        "loss / loss at 1x",
        "recall, mean",
        *(f"{float(d):.0%}" for d in first.recall),
    ]
    heads += ["loss of the values"] if with_values else []
    lines = ["| " + " | ".join(heads) + " |", "|--:|---|" + "--:|" * (len(heads) - 2)]
    for length in result.lengths:
        for side, label in SIDES.items():
            here, base = result.found[side][length], result.found[side][result.lengths[0]]
            cells = [f"{result.in_windows(length)} ({length:,})", label]
            cells += [f"{here.loss:.3f}", f"{here.loss / base.loss:.2f}", f"{here.mean_recall:.0%}"]
            cells += [f"{share:.0%}" for share in here.recall.values()]
            cells += [f"{here.value_loss:.2f}"] if with_values else []
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def real_section(result: Result) -> list[str]:
    counts = ", ".join(f"{count} at {length:,} tokens" for length, count in result.documents.items())
    return [
        f"## {result.name}",
        "",
        f"Window {result.window:,} tokens; it was trained for nothing longer. The text is Python's documentation and "
        "the source of its standard library, with five pass keys in each document. "
        f"Documents: {counts}. {measured_with(result)}",
        "",
        f"Loss is in nats per token over the last {SCORED} tokens of the text, the same at each length, read one by "
        "one through the cache after a prefill of what stands before. Recall is the share of five-digit pass keys "
        "that greedy search repeats when they are asked for after the text, by the depth at which a key was stated; "
        "the loss of the values is that of the key's digits, in nats per digit, where guessing gives 2.3.",
        "",
        *table(result),
    ]


def tiny_section(result: Result) -> list[str]:
    documents, probes = result.settings["documents"], result.settings["probes"]
    return [
        f"## {result.name}",
        "",
        f"Window {result.window} tokens; {documents} documents and {probes} recall probes per depth and length. This "
        "model was trained for it: some of its windows had gaps in their positions, and the base of a text of 2 to 4 "
        f"windows. {measured_with(result)}",
        "",
        verdict(result),
        "",
        "Loss is in nats per token over the last half window of held-out prose, decoded token by token after a "
        "prefill of the preceding text. Recall is the share of four-digit values repeated exactly when a key is asked "
        "for at the end of a document; the depth is where the key was stated (0 % is the document's beginning).",
        "",
        *table(result),
    ]


def measured_with(result: Result) -> str:
    versions = [f"{name} {result.settings[name]}" for name in ("transformers", "torch", "Python")]
    return f"Measured with {', '.join(versions)}, {result.settings['dtype']}."


def page(results: list[Result], picture: str) -> str:
    """The results page; the tiny model comes last."""
    lines = [
        "# Long context, measured",
        "",
        "The same weights with three rotary embeddings: this package's dynamic NTK, which is the official one; plain "
        "rotary; and the dynamic NTK of transformers' Llama. Everything is decoded with a cache, as `generate` does. "
        "Generated by `make long-context` (the tiny model) and `make long-context MODEL=build/smollm2`. What it "
        "means: [long-context.md](long-context.md#how-well-it-works).",
        "",
        f"![loss and recall against length, one row for each model]({picture})",
    ]
    for result in results:
        lines += ["", *(tiny_section if result.name == tiny.TITLE else real_section)(result)]
    lines += [
        "",
        "Llama's own dynamic NTK caches each key rotated with the base at the time it was computed, so the cache "
        "mixes bases ([long-context.md](long-context.md) explains what is done here instead). This hardly affects the "
        "few tokens of a recalled value after a prefill, but it does affect many tokens of decoding.",
    ]
    return "\n".join(lines) + "\n"


def draw(results: list[Result], path: Path) -> None:
    """Loss, and mean recall or the loss of the values, against length: one row per model."""
    figure, rows = plt.subplots(len(results), 2, figsize=(9, 3.5 * len(results)), squeeze=False)
    for result, (left, right) in zip(results, rows, strict=True):
        with_values = result.found["dynamic"][result.lengths[0]].value_loss is not None
        for side, label in SIDES.items():
            values = [result.found[side][length] for length in result.lengths]
            style = {"color": COLOURS[side], "label": label, "marker": "o", "ls": "--" if side == "llama" else "-"}
            left.plot(result.lengths, [value.loss for value in values], **style)
            shown = [value.value_loss if with_values else 100 * value.mean_recall for value in values]
            right.plot(result.lengths, shown, **style)
        left.set_ylabel("loss, nats per token")
        left.set_ylim(bottom=0)
        left.set_title(result.name, loc="left", fontsize=10)
        if with_values:
            right.set_ylabel("loss of the pass keys, nats per digit")
            right.set_ylim(bottom=0)
            right.axhline(math.log(10), color="#aaaaaa", linestyle=":", linewidth=1)
            right.annotate("guessing", (result.lengths[0], math.log(10)), (0, 3), textcoords="offset points")
        else:
            right.set_ylabel("recall, % (mean over depths)")
            right.set_ylim(-3, 103)
        for axes in (left, right):
            axes.axvline(result.window, color="#aaaaaa", linestyle=":", linewidth=1)
            axes.set_xticks(result.lengths, [f"{length:,}\n{result.in_windows(length)}" for length in result.lengths])
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(color="#e6e6e6")
            axes.set_axisbelow(True)
    for axes in rows[-1]:
        axes.set_xlabel("tokens, and multiples of the trained window")
    rows[0][0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
