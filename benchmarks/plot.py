"""Plot benchmarks/results/*.json as PNG files beside them.

python benchmarks/plot.py                       # all existing results
python benchmarks/plot.py build/benchmarks      # another folder
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt


RESULTS = Path(__file__).resolve().parent / "results"
COLOURS = {"ours": "#1f5fbf", "other": "#c8641b", "floor": "#555555", "light": "#9bb8e0"}
NAMES = {
    "overhead": "tiny decode step",
    "overhead_generate": "tiny decode step, as in generate",
    "overhead_and_memory": "tiny decode step, own weights per layer",
    "compiled": "decode, torch.compile",
    "prefill": "prefill",
    "decode": "decode",
    "decode_one_thread": "decode, one thread",
    "generate": "generate, 64 tokens after a prompt",
    "train": "training step",
}

plt.rcParams.update(
    {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.grid": True,
        "grid.color": "#e6e6e6",
        "axes.axisbelow": True,
        "legend.frameon": False,
    }
)


def caption(figure: Any, result: dict) -> None:
    """Hardware, versions, commit and date, below the plot."""
    env = result["environment"]
    where = env.get("gpu") or f"{env['processor']}, {env['threads']} threads"
    if choice := env.get("mkl_cbwr"):
        where += f" with MKL_CBWR={choice}"
    text = (
        f"{where} · torch {env['torch']} · transformers {env['transformers']} · commit {env['commit']} · {env['date']}"
    )
    figure.text(0.01, 0.01, text, fontsize=7, color="#777777")


def save(figure: Any, result: dict, path: Path) -> None:
    caption(figure, result)
    figure.tight_layout(rect=(0, 0.025, 1, 1))
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)
    print(path.name)


def label(row: dict) -> str:
    """The label of a case of the CPU benchmark, without its precision."""
    parts = [NAMES[row["kind"]], row["model"], f"batch {row['batch']}", str(row["context"])]
    return " · ".join(parts) + (" · vs compiled Llama" if row["ratio_of"].startswith("llama_compiled") else "")


def plot_cpu(result: dict, path: Path) -> None:
    """Llama's time over ours for each case, a panel for each precision, on a log axis."""
    rows = [row for row in result["rows"] if "ratio" in row]
    names = list(dict.fromkeys(label(row) for row in rows))[::-1]
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    size = (4.4 + 3.4 * len(dtypes), 1.6 + 0.21 * len(names))
    figure, all_axes = plt.subplots(1, len(dtypes), figsize=size, sharex=True, sharey=True, squeeze=False)
    for axes, dtype in zip(all_axes[0], dtypes, strict=True):
        for row in (row for row in rows if row["dtype"] == dtype):
            y = names.index(label(row))
            colour = {"ok": COLOURS["ours"], "noise": "#8a8a8a"}.get(row["verdict"], COLOURS["other"])
            axes.plot(row["ratio_quartiles"], [y, y], color=colour, linewidth=2, solid_capstyle="round")
            axes.plot(row["ratio"], y, "o", color=colour, markersize=5)
            axes.plot(float(row["target"].split()[-1]), y, "|", color=COLOURS["floor"], markersize=7)
            axes.annotate(
                f"{row['ratio']:.2f}", (1.01, y), xycoords=("axes fraction", "data"), va="center", fontsize=7
            )
        axes.set_title(dtype)
        axes.axvline(1.0, color=COLOURS["floor"], linewidth=1, linestyle="--")
        axes.set_xscale("log")
        axes.set_xticks([0.9, 1, 1.25, 1.5, 2, 3, 4], ["0.9", "1", "1.25", "1.5", "2", "3", "4"])
        axes.minorticks_off()
        axes.set_xlabel("Llama's time / ours")
    all_axes[0][0].set_yticks(range(len(names)), names, fontsize=7.5)
    all_axes[0][0].set_ylim(-1, len(names))
    figure.suptitle(
        "CPU: ours against Llama on the same weights; right of 1, ours is faster. Dot and bar:\n"
        "median and interquartile range; tick: target. Blue: the median meets it; grey: a quartile; orange: neither.",
        x=0.01,
        ha="left",
        fontsize=8.5,
    )
    save(figure, result, path)


def plot_long_context(result: dict, path: Path) -> None:
    """Decode time against context beyond the window: dynamic NTK, plain rotary, floor."""
    kinds = [kind for kind in ("eager", "compiled") if any(row.get("kind") == kind for row in result["rows"])]
    figure, all_axes = plt.subplots(1, len(kinds), figsize=(4.6 * len(kinds), 3.8), sharey=True, squeeze=False)
    for axes, kind in zip(all_axes[0], kinds, strict=True):
        first = result["rows"][0]["model"]
        case = (kind, first, "float32", 1)
        rows = [r for r in result["rows"] if (r["kind"], r["model"], r["dtype"], r["batch"]) == case]
        rows.sort(key=lambda row: row["context"])
        contexts = [row["context"] for row in rows]
        axes.plot(
            contexts, [row["ms"]["dynamic"] for row in rows], "o-", color=COLOURS["ours"], label="dynamic NTK (exact)"
        )
        axes.plot(contexts, [row["ms"]["plain"] for row in rows], "s-", color=COLOURS["other"], label="plain rotary")
        axes.plot(
            contexts,
            [row["floor_ms"] for row in rows],
            "--",
            color=COLOURS["floor"],
            label="floor: bytes / copy bandwidth",
        )
        for row in rows:
            axes.annotate(
                f"{row['ratio']:.2f}x",
                (row["context"], row["ms"]["dynamic"]),
                (-5, 6),  # above the line, which rises to the right
                textcoords="offset points",
                ha="right",
            )
        axes.axvline(result["window"], color="#aaaaaa", linewidth=1, linestyle=":", label="trained window")
        axes.set_xscale("log", base=2)
        axes.set_xticks(contexts, contexts)
        axes.margins(x=0.18, y=0.15)
        axes.set_title(f"{kind}, {first}, window {result['window']}")
        axes.set_xlabel("context (tokens)")
    all_axes[0][0].set_ylim(bottom=0)
    all_axes[0][0].set_ylabel("ms per decoded token")
    all_axes[0][0].legend(loc="upper left")
    save(figure, result, path)


GPU_LINES = [  # kind of row, side, line, colour, label
    ("generate", "llama", "o-", COLOURS["other"], "Llama, generate"),
    ("eager", "ours", "s--", COLOURS["light"], "ours, eager forward"),
    ("generate", "ours", "s-", COLOURS["ours"], "ours, generate"),
    ("compiled", "ours", "^:", COLOURS["ours"], "ours, torch.compile"),
]
GPU_BARS = [  # kind of row, side, label
    ("step_kernels", "llama", "Llama, eager"),
    ("step_kernels", "ours", "ours, eager"),
    ("generate_kernels", "ours", "ours, generate"),
]


def plot_gpu(result: dict, path: Path) -> None:
    """For each model at batch 1: decode time against context with the floor, and where the time of a step goes."""
    rows = [row for row in result["rows"] if row["batch"] == 1 and "ms" in row]  # a failed case has none
    lines_of = {kind for kind, *_ in GPU_LINES}
    models = [  # a line needs two contexts
        model
        for model in dict.fromkeys(row["model"] for row in rows)
        if len({row["context"] for row in rows if row["model"] == model and row["kind"] in lines_of}) > 1
    ]
    if not models:
        print(f"{path.name}: skipped, no model was measured at two contexts")
        return
    figure, all_axes = plt.subplots(len(models), 2, figsize=(11, 3.9 * len(models)), squeeze=False)
    for (lines, bars), model in zip(all_axes, models, strict=True):
        of_model = [row for row in rows if row["model"] == model]
        _decode_lines(lines, [row for row in of_model if row["kind"] in lines_of])
        lines.set_title(f"{model}, bfloat16, batch 1: decode")
        _device_bars(bars, of_model)
    save(figure, result, path)


def _decode_lines(axes: Any, rows: list[dict]) -> None:
    for kind, side, style, colour, label in GPU_LINES:
        points = sorted((row["context"], row["ms"][side]) for row in rows if row["kind"] == kind)
        if points:
            axes.plot(*zip(*points, strict=True), style, color=colour, label=label, markersize=5)
    floors = sorted({(row["context"], row["floor_ms"]) for row in rows})
    axes.plot(*zip(*floors, strict=True), "-", color=COLOURS["floor"], linewidth=1, label="floor: bytes / bandwidth")
    axes.set_xscale("log", base=2)
    axes.set_xticks([context for context, _ in floors], [f"{context:,}" for context, _ in floors])
    axes.minorticks_off()
    axes.margins(x=0.08)
    axes.set_ylim(0, 1.45 * axes.dataLim.ymax)  # room for the legend above the lines
    axes.legend(fontsize=7.5, ncols=2, loc="upper left")
    axes.set_xlabel("context (tokens)")
    axes.set_ylabel("ms per token")


def _device_bars(axes: Any, rows: list[dict]) -> None:
    """The time of a token in two parts: the device works, and the rest, in which it waits for Python and launches."""
    bars = [
        (f"{label}, {row['context']:,}", row["ms"][side], row["device_ms"][side], row["count"][side], row["counted"])
        for context in sorted({row["context"] for row in rows}, reverse=True)
        for kind, side, label in reversed(GPU_BARS)
        for row in rows
        if row["kind"] == kind and row["context"] == context
    ]
    if not bars:
        axes.set_axis_off()
        return
    names, whole, work, counts, counted = zip(*bars, strict=True)
    rest = [max(0.0, ms - device) for ms, device in zip(whole, work, strict=True)]
    axes.barh(names, work, color=COLOURS["ours"], height=0.62, label="the device works")
    axes.barh(names, rest, left=work, color="#d0d0d0", height=0.62, label="it waits: Python and launching")
    for name, ms, device, count, unit in zip(names, whole, work, counts, counted, strict=True):
        axes.text(max(ms, device), name, f"  {ms:.1f} ms, {count:,} {unit}", va="center", fontsize=7.5)
    axes.set_title(f"{rows[0]['model']}: where the time of a token goes")
    axes.set_xlim(0, 1.5 * max(*whole, *work))  # room for the text
    axes.set_ylim(-0.6, len(bars) + 0.5)  # and for the legend
    axes.grid(axis="y", visible=False)
    axes.legend(fontsize=7.5, loc="upper right", ncols=2)
    axes.set_xlabel("ms per token")


def plot_loading(result: dict, path: Path) -> None:
    """Peak memory relative to the checkpoint's size, and seconds to the first token."""
    rows = {row["case"]: row for row in result["rows"]}
    panels: list[tuple[str, str, dict[str, float], float | None]] = []
    if row := rows.get("peak_memory"):
        title = f"peak memory of loading {row['checkpoint_bytes'] / 1e9:.1f} GB"
        panels.append((title, "peak memory / checkpoint", row["peak_over_checkpoint"], 1.1))
    if row := rows.get("first_token"):
        seconds = {side: ms / 1e3 for side, ms in row["ms"].items()}
        with_text = rows["first_token_with_tokenizer"]["ms"]["ours_text"] / 1e3
        values = seconds | {"ours, with\ntokenizer": with_text}
        panels.append(("checkpoints/tiny, from import to token", "seconds to the first token", values, None))
    figure, all_axes = plt.subplots(1, len(panels), figsize=(max(6.8, 4.4 * len(panels)), 3.2), squeeze=False)
    for axes, (title, unit, values, limit) in zip(all_axes[0], panels, strict=True):
        colours = [COLOURS["other"] if name == "llama" else COLOURS["ours"] for name in values]
        bars = axes.bar(list(values), list(values.values()), color=colours, width=0.55)
        axes.bar_label(bars, fmt="%.2f", padding=2)
        axes.grid(axis="x", visible=False)
        axes.margins(y=0.2)
        if limit:
            axes.axhline(limit, color=COLOURS["floor"], linestyle="--", linewidth=1)
            place = {"transform": axes.get_yaxis_transform(), "ha": "center", "va": "bottom", "fontsize": 8}
            axes.text(0.5, limit, f"target: at most {limit}", **place)
        axes.set_ylabel(unit)
        axes.set_title(title)
    save(figure, result, path)


def plot_llamacpp(result: dict, path: Path) -> None:
    """Time per token of every side, a panel for each precision: a decode step, and generate with its prompt."""
    dtypes = list(dict.fromkeys(row["dtype"] for row in result["rows"]))
    sides = {
        "llama_cpp": "llama.cpp",
        "ours_compiled": "ours,\ncompiled",
        "ours": "ours,\neager",
        "llama": "Llama,\neager",
    }
    works = (("decode", "compiled"), ("generate", "generate_compiled"))
    figure, all_axes = plt.subplots(1, len(dtypes), figsize=(4.8 * len(dtypes), 3.8), squeeze=False)
    for axes, dtype in zip(all_axes[0], dtypes, strict=True):
        for shift, kinds in zip((-0.2, 0.2), works, strict=True):
            rows = [row for row in result["rows"] if row["dtype"] == dtype and row["kind"] in kinds]
            ms = {side: took for row in reversed(rows) for side, took in row["ms"].items()}
            names = [name for name in sides if name in ms]
            colours = [COLOURS["other"] if name.startswith("llama") else COLOURS["ours"] for name in names]
            places = [list(sides).index(name) + shift for name in names]
            bars = axes.bar(places, [ms[name] for name in names], 0.38, color=colours, alpha=0.5 if shift > 0 else 1)
            axes.bar_label(bars, fmt="%.1f", padding=2, fontsize=8)
            if shift < 0:
                axes.axhline(rows[0]["floor_ms"], color=COLOURS["floor"], linestyle="--", linewidth=1)
        axes.set_xticks(range(len(sides)), list(sides.values()))
        axes.grid(axis="x", visible=False)
        axes.margins(y=0.12)
        axes.set_title(f"{result['rows'][0]['model']}, {dtype}")
    all_axes[0][0].set_ylabel("ms per token")
    legend = "dark: a decode step; light: generate, prompt included; dashed: floor of ours, bytes / copy bandwidth"
    figure.suptitle(legend, x=0.01, ha="left", fontsize=9)
    save(figure, result, path)


PLOTS: dict[str, Callable[[dict, Path], None]] = {
    "cpu": plot_cpu,
    "long_context": plot_long_context,
    "gpu": plot_gpu,
    "loading": plot_loading,
    "llamacpp": plot_llamacpp,
}


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument(
        "folder", nargs="?", type=Path, default=RESULTS, help="folder of the results (default: %(default)s)"
    )
    folder = made.parse_args().folder
    for file in sorted(folder.glob("*.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        plot = PLOTS.get(result.get("benchmark"))
        if plot and result["rows"]:
            plot(result, file.with_suffix(".png"))


if __name__ == "__main__":
    main()
