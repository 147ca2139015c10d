"""Results on disk, and the table made from them. Needs neither torch nor lm-eval.

A finished task is one file, `raw/<task>.json`, written atomically: an interrupted run leaves complete results or none,
and the next run skips the complete ones.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from evaluation.card import OTHER, Benchmark


def write_atomic(path: Path, text: str) -> None:
    """Write a file atomically: whenever the process dies, it is either the old or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def fingerprint(folder: Path) -> str:
    """A short hash that changes with the weights, the tokenizer and the configuration in a model folder.

    Of files beyond 2 MiB it reads only both ends: hashing everything would delay each start by a minute.
    """
    digest, end = hashlib.sha256(), 1 << 20
    for path in sorted(path for path in folder.iterdir() if path.is_file() and path.suffix != ".md"):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(end))
            file.seek(max(end, size - end))
            digest.update(file.read(end))
    return digest.hexdigest()[:16]


class Store:
    """The folder of one evaluation: settings.json, selected.json, raw/, cache/, table.md, table.json."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def claim(self, settings: dict[str, Any]) -> None:
        """Record the settings, so that a table never mixes results of different settings.

        Raises:
            SystemExit: The folder has results of other settings.
        """
        path = self.folder / "settings.json"
        if path.exists():
            before = json.loads(path.read_text(encoding="utf-8"))
            changed = [
                f"{key} {before.get(key)!r}, now {value!r}"
                for key, value in settings.items()
                if before.get(key) != value
            ]
            if changed:
                raise SystemExit(
                    f"{self.folder} has results of other settings ({', '.join(changed)}): "
                    "pass another folder to --out, or delete this one"
                )
        write_atomic(path, json.dumps(settings, indent=2) + "\n")

    def select(self, tasks: dict[str, list[str]], problems: dict[str, str]) -> dict[str, dict[str, Any]]:
        """Record what was run here, so that the table also has the benchmarks of earlier runs.

        Args:
            tasks: Benchmark's task -> names of its results.
            problems: Benchmark's task -> why it has no score, as "word: reason".

        Returns:
            Benchmark's task -> {"tasks": its results, "problem": a reason or None}, of all runs.
        """
        path = self.folder / "selected.json"
        selected = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        selected |= {task: {"tasks": names, "problem": problems.get(task)} for task, names in tasks.items()}
        write_atomic(path, json.dumps(selected, indent=2) + "\n")
        return selected

    def cache(self, task: str) -> Path:
        """Where lm-eval caches the answers of an unfinished task (it appends `_rank0.db`)."""
        return self.folder / "cache" / task

    def result(self, task: str) -> dict[str, Any] | None:
        """What `finish` wrote for this task, or None."""
        path = self.folder / "raw" / f"{task}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def finish(self, task: str, result: dict[str, Any], samples: Iterable[dict[str, Any]]) -> None:
        """Write every sample's answer and score, then the result, which marks the task as done."""
        lines = "".join(json.dumps(sample, ensure_ascii=False, default=str) + "\n" for sample in samples)
        write_atomic(self.folder / "raw" / f"{task}.samples.jsonl", lines)
        write_atomic(self.folder / "raw" / f"{task}.json", json.dumps(result, indent=2, default=str) + "\n")
        self.cache(task).with_name(f"{task}_rank0.db").unlink(missing_ok=True)


def summarise(
    line: Benchmark, tasks: list[str], store: Store, problem: str | None = None, shots: int | None = None
) -> dict[str, Any]:
    """One row of the table: the unweighted mean over the benchmark's tasks, or why there is none.

    It and its standard error are in percent; those of a task that is not the card's are lm-eval's own values.

    Args:
        line: The benchmark.
        tasks: Names of its results; more than one where `line.task` is a group.
        store: Where the results are.
        problem: Why it did not run, as "word: reason".
        shots: The number set by --num-fewshot.
    """
    done = [result for result in map(store.result, tasks) if result]
    own_shots = {result["shots"] for result in done} if line.shots is None else {line.shots}
    metrics = {result["metric"] for result in done} if line.metric is None else {line.metric}
    row = {
        **{
            key: getattr(line, key) for key in ("dimension", "card", "task", "official", "differs", "official_samples")
        },
        "benchmark": line.name,
        "shots": shots if shots is not None else own_shots.pop() if len(own_shots) == 1 else None,
        "metric": metrics.pop() if len(metrics) == 1 else None,
        "split": line.split or (done[0]["split"] if done else None),
        "samples": sum(result["samples"] for result in done),
        "cut": sum(result["cut"] for result in done),
        "ours": None,
        "stderr": None,
        "difference": None,
    }
    if len(done) == len(tasks) and row["metric"]:
        scale, decimals = (1, 4) if line.dimension == OTHER else (100, 2)
        ours = scale * sum(result["metrics"][row["metric"]] for result in done) / len(tasks)
        errors = [result["metrics"].get(row["metric"].replace(",", "_stderr,")) for result in done]
        # The tasks' errors are independent: the variance of their mean is the sum of their variances by n squared.
        stderr = None if None in errors else round(scale * math.hypot(*errors) / len(tasks), decimals)
        difference = None if line.card is None else round(ours - line.card, 2)
        scores = {"ours": round(ours, decimals), "stderr": stderr, "difference": difference}
        return row | {"status": "done", "reason": "", **scores}
    if len(done) == len(tasks):
        problem = f"no common metric: its tasks have {', '.join(sorted(metrics))}; their scores are in raw/"
    status, _, reason = (problem or "not run yet").partition(": ")
    so_far = f"{len(done)} of {len(tasks)} tasks done" if len(done) < len(tasks) > 1 else ""
    return row | {"status": status, "reason": "; ".join(filter(None, (reason, so_far)))}


def table(head: str, right: str, rows: list[list[str]]) -> list[str]:
    """The lines of a table in Markdown; `right` names the columns of numbers."""
    columns = head.split(" | ")
    marks = ("---:" if column in right.split(" | ") else "---" for column in columns)
    return [f"| {head} |", f"|{'|'.join(marks)}|", *(f"| {' | '.join(row)} |" for row in rows)]


def markdown(rows: list[dict[str, Any]], settings: dict[str, Any]) -> str:
    """The final table, reasons for missing scores, the settings, and how each score compares with the card's."""

    def number(value: float | None, form: str = ".2f") -> str:
        return "-" if value is None else format(value, form)

    def cells(row: dict[str, Any], form: str, card: list[str]) -> list[str]:
        ours = number(row["ours"], form) if row["status"] == "done" else row["status"]
        metric = (row["metric"] or "-").partition(",")[0]
        shots, samples = number(row["shots"], "d"), number(row["samples"] or None, "d")
        return [row["benchmark"], ours, number(row["stderr"], form), *card, shots, metric, samples]

    right = "Ours | Score | Stderr | Card | Difference | Shots | Samples"
    others = [cells(row, ".4f", []) for row in rows if row["dimension"] == OTHER]
    listed = [
        cells(row, ".2f", [number(row["card"]), number(row["difference"], "+.2f")])
        for row in rows
        if row["dimension"] != OTHER
    ]
    lines = []
    if listed or not others:
        lines += table("Benchmark | Ours | Stderr | Card | Difference | Shots | Metric | Samples", right, listed)
    if others:
        lines += ["", "Other tasks of lm-eval, with its own values:", ""] if lines else []
        lines += table("Task | Score | Stderr | Shots | Metric | Samples", right, others)
    if settings.get("limit"):
        lines += [
            "",
            f"Limited to the first {settings['limit']} samples of each task: a trial run, not a measurement.",
        ]
    if reasons := [f"- {row['benchmark']}: {row['status']}: {row['reason']}" for row in rows if row["reason"]]:
        lines += ["", "Without a score:", "", *reasons]
    if cut := [f"- {row['benchmark']}: {row['cut']}" for row in rows if row["cut"]]:
        lines += [
            "",
            "Prompts that exceeded the window and were truncated at the beginning (see --max-length):",
            "",
            *cut,
        ]
    chosen = [f"{key} {value}" for key, value in settings.items() if value is not None and value is not False]
    lines += ["", "Measured with " + ", ".join(chosen) + "."]
    notes = [
        f"- {row['benchmark']}: {row['official']}{row['differs'] and '. Here: '}{row['differs']}."
        for row in rows
        if row["official"]
    ]
    if notes:
        lines += ["", "How the card's scores were computed, and what is done differently here:", "", *notes]
    return "\n".join(lines) + "\n"
