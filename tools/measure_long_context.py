"""Measure checkpoints/tiny at 1 to 4 times its window: loss on long documents and key-value recall.

    python tools/measure_long_context.py            # a few minutes; writes docs/long-context-results.md and its plot
    python tools/measure_long_context.py --documents 4 --probes 8 --out build/long-context

The same weights run with dynamic NTK (this package), with plain rotary (this package, rotary type "origin"), and as
transformers' Llama with its own dynamic NTK. All of them decode with a cache, as `generate` does.
"""

import argparse
import random
import sys
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import torch
import transformers
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
matplotlib.use("Agg")
import matplotlib.pyplot as plt

from tools.package import ROOT
from tools.tiny.corpus import prose
from tools.tiny.measure import Subject, recall_share


WINDOWS = (1, 2, 3, 4)
DEPTHS = tuple(tenth / 10 for tenth in range(0, 11, 2))  # where in the document the key is stated: 0 is its beginning
SIDES = {
    "dynamic": "dynamic NTK",
    "origin": "plain rotary",
    "llama": "Llama's dynamic NTK",
}
COLOURS = {"dynamic": "#1f5fbf", "origin": "#8a8a8a", "llama": "#c8641b"}
LOSS_TARGET, RECALL_TARGET = 1.15, 0.80  # with dynamic NTK at 4x: loss relative to 1x, and recall


class Measured(NamedTuple):
    """One side at one length."""

    loss: float  # nats per token, over the last half window
    recall: dict[str, float]  # share of values recalled exactly, by depth

    @property
    def mean_recall(self) -> float:
        return sum(self.recall.values()) / len(self.recall)


def subject_of(folder: Path, side: str) -> Subject:
    """The checkpoint with one side's rotary; "llama" is transformers' class on the same weights."""
    if side != "llama":
        return Subject(folder, side)
    subject = Subject(folder)
    ours = subject.model.config
    config = LlamaConfig(
        vocab_size=ours.vocab_size,
        hidden_size=ours.hidden_size,
        intermediate_size=ours.intermediate_size,
        num_hidden_layers=ours.num_hidden_layers,
        num_attention_heads=ours.num_attention_heads,
        max_position_embeddings=ours.max_position_embeddings,
        rms_norm_eps=ours.rms_norm_eps,
        attention_bias=ours.bias,
        pad_token_id=ours.pad_token_id,
        rope_parameters={"rope_type": "dynamic", "rope_theta": ours.rotary["base"], "factor": 1.0},
    )
    llama = LlamaForCausalLM(config).eval()
    llama.load_state_dict(subject.model.state_dict())
    llama.generation_config = subject.model.generation_config
    subject.model = llama
    return subject


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


@torch.inference_mode()
def cached_loss(subject: Subject, length: int, count: int) -> float:
    """Loss over the last half window, decoded token by token after a prefill of the preceding text."""
    ids = long_documents(subject, length, count)
    start = length - subject.window // 2
    cache = DynamicCache(config=subject.model.config)
    logits = subject.model(ids[:, :start], cache=cache, logits_to_keep=1).logits[:, -1]
    losses = []
    for position in range(start, length):
        losses.append(cross_entropy(logits.float(), ids[:, position]).item())
        logits = subject.model(ids[:, position : position + 1], cache=cache).logits[:, -1]
    return sum(losses) / len(losses)


def measure(folder: Path, documents: int, probes: int) -> tuple[int, dict[str, dict[int, Measured]]]:
    """Measure all sides at all lengths. Returns the checkpoint's window, and side -> windows -> measured."""
    found: dict[str, dict[int, Measured]] = {side: {} for side in SIDES}
    bar = tqdm(total=len(SIDES) * len(WINDOWS), unit="length")
    for side in SIDES:
        subject = subject_of(folder, side)
        for windows in WINDOWS:
            bar.set_postfix_str(f"{SIDES[side]}, {windows}x")
            length = windows * subject.window
            loss = cached_loss(subject, length, documents)
            found[side][windows] = Measured(loss, recall_share(subject, length - 6, probes, DEPTHS))
            bar.update()
    bar.close()
    return subject.window, found


def verdict(found: dict[str, dict[int, Measured]]) -> str:
    """One line: whether dynamic NTK meets its targets."""
    first, last = found["dynamic"][WINDOWS[0]], found["dynamic"][WINDOWS[-1]]
    growth = last.loss / first.loss
    parts = [
        f"loss at {WINDOWS[-1]}x is {growth:.2f} times the loss at 1x (target: at most {LOSS_TARGET:.2f}, "
        f"{'met' if growth <= LOSS_TARGET else 'not met'})",
        f"mean recall at {WINDOWS[-1]}x is {last.mean_recall:.0%} (target: above {RECALL_TARGET:.0%}, "
        f"{'met' if last.mean_recall > RECALL_TARGET else 'not met'})",
    ]
    return "With dynamic NTK, " + "; ".join(parts) + "."


def report(window: int, found: dict[str, dict[int, Measured]], arguments: Any, picture: str) -> str:
    """The results page."""
    depths = list(found["dynamic"][1].recall)
    lines = [
        "# Long context, measured on checkpoints/tiny",
        "",
        f"Window {window} tokens; {arguments.documents} documents and {arguments.probes} recall probes per depth and "
        "length; the same weights in all three cases; everything decoded with a cache. "
        f"transformers {transformers.__version__}, float32. Generated by `python tools/measure_long_context.py`.",
        "",
        verdict(found),
        "",
        f"![loss and recall against length]({picture})",
        "",
        "Loss is in nats per token over the last half window of held-out prose, decoded token by token after a "
        "prefill of the preceding text. Recall is the share of four-digit values that are repeated exactly when a key "
        "is asked for at the end of a document; the depth is where the key was stated (0 % is the document's "
        "beginning).",
        "",
        "| length | rotary | loss | loss / loss at 1x | recall, mean | "
        + " | ".join(f"{float(d):.0%}" for d in depths),
        "|--:|---|--:|--:|--:|" + "--:|" * len(depths),
    ]
    lines[-2] += " |"
    for windows in WINDOWS:
        for side, label in SIDES.items():
            here, first = found[side][windows], found[side][1]
            cells = [f"{windows}x ({windows * window})", label, f"{here.loss:.3f}", f"{here.loss / first.loss:.2f}"]
            cells += [f"{here.mean_recall:.0%}", *(f"{here.recall[depth]:.0%}" for depth in depths)]
            lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "Llama's own dynamic NTK caches each key rotated with the base at the time it was computed, so the cache "
        "mixes bases ([long-context.md](long-context.md) explains what is done here instead). This hardly affects the "
        "few tokens of a recalled value after a prefill, but it does affect half a window of decoding.",
    ]
    return "\n".join(lines) + "\n"


def draw(window: int, found: dict[str, dict[int, Measured]], path: Path) -> None:
    """Loss and mean recall against length."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6))
    lengths = [windows * window for windows in WINDOWS]
    for side, label in SIDES.items():
        values = [found[side][windows] for windows in WINDOWS]
        style = {"color": COLOURS[side], "label": label, "marker": "o", "ls": "--" if side == "llama" else "-"}
        left.plot(lengths, [value.loss for value in values], **style)
        right.plot(lengths, [100 * value.mean_recall for value in values], **style)
    left.set_ylabel("loss, nats per token")
    right.set_ylabel("recall, % (mean over depths)")
    right.set_ylim(-3, 103)
    left.set_ylim(bottom=0)
    for axes in (left, right):
        axes.axvline(window, color="#aaaaaa", linestyle=":", linewidth=1)
        axes.set_xticks(lengths, [f"{length}\n{windows}x" for windows, length in zip(WINDOWS, lengths, strict=True)])
        axes.set_xlabel("tokens, and multiples of the trained window")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e6e6e6")
        axes.set_axisbelow(True)
    left.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    made = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="\n".join(__doc__.splitlines()[2:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument(
        "--checkpoint", type=Path, default=ROOT / "checkpoints" / "tiny", help="default: checkpoints/tiny"
    )
    made.add_argument("--documents", type=int, default=16, help="long documents per length (default 16)")
    made.add_argument("--probes", type=int, default=20, help="recall probes per depth and length (default 20)")
    made.add_argument(
        "--out", type=Path, default=ROOT / "docs", help="folder for the page and the plot (default docs)"
    )
    arguments = made.parse_args()
    transformers.logging.set_verbosity_error()
    window, found = measure(arguments.checkpoint, arguments.documents, arguments.probes)
    arguments.out.mkdir(parents=True, exist_ok=True)
    picture = arguments.out / "long-context-results.png"
    draw(window, found, picture)
    page = report(window, found, arguments, picture.name)
    picture.with_suffix(".md").write_text(page, encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
