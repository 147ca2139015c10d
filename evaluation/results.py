"""Results on disk, and the table made from them. Needs neither torch nor lm-eval.

A finished task is one file, `raw/<task>.json`, written atomically: an interrupted run leaves complete results or none,
and the next run skips the complete ones.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from evaluation.card import Benchmark


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
    """The folder of one evaluation: settings.json, raw/, cache/, table.md, table.json."""

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


def summarise(line: Benchmark, tasks: list[str], store: Store, problem: str | None = None) -> dict[str, Any]:
    """One row of the table: the unweighted mean over the benchmark's tasks in percent, or why there is none.

    Args:
        line: The benchmark.
        tasks: Names of its lm-eval tasks; more than one where `line.task` is a group.
        store: Where the results are.
        problem: Why it did not run, as "word: reason".
    """
    done = [result for result in map(store.result, tasks) if result]
    row = {
        **{key: getattr(line, key) for key in ("dimension", "card", "task", "shots", "metric", "split")},
        **{key: getattr(line, key) for key in ("official", "differs", "official_samples")},
        "benchmark": line.name,
        "samples": sum(result["samples"] for result in done),
        "cut": sum(result["cut"] for result in done),
        "ours": None,
        "difference": None,
    }
    if len(done) == len(tasks):
        ours = 100 * sum(result["metrics"][line.metric] for result in done) / len(tasks)
        difference = None if line.card is None else round(ours - line.card, 2)
        return row | {"status": "done", "reason": "", "ours": round(ours, 2), "difference": difference}
    status, _, reason = (problem or "not run yet").partition(": ")
    so_far = f"{len(done)} of {len(tasks)} tasks done" if len(tasks) > 1 else ""
    return row | {"status": status, "reason": "; ".join(filter(None, (reason, so_far)))}


def markdown(rows: list[dict[str, Any]], settings: dict[str, Any]) -> str:
    """The final table, reasons for missing scores, the settings, and how each score compares with the card's."""

    def number(value: float | None, form: str = ".2f") -> str:
        return "-" if value is None else format(value, form)

    lines = [
        "| Benchmark | Ours | Card | Difference | Shots | Metric | Samples |",
        "|---|---:|---:|---:|---:|---|---:|",
    ]
    for row in rows:
        ours = number(row["ours"]) if row["status"] == "done" else row["status"]
        lines.append(
            f"| {row['benchmark']} | {ours} | {number(row['card'])} | {number(row['difference'], '+.2f')} "
            f"| {row['shots']} | {row['metric'].split(',')[0]} | {row['samples'] or '-'} |"
        )
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
    lines += ["", "Measured with " + ", ".join(f"{key} {value}" for key, value in settings.items() if value) + "."]
    notes = [
        f"- {row['benchmark']}: {row['official']}{row['differs'] and '. Here: '}{row['differs']}."
        for row in rows
        if row["official"]
    ]
    if notes:
        lines += ["", "How the card's scores were computed, and what is done differently here:", "", *notes]
    return "\n".join(lines) + "\n"
