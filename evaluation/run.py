"""Reproduce the model card's benchmarks, and run any other task of lm-eval.

python evaluation/run.py --model FOLDER --tasks all          # the card's seventeen benchmarks
python evaluation/run.py --model FOLDER --tasks local        # two small tasks that need no download
python evaluation/run.py --model FOLDER --tasks boolq,arc_challenge --limit 50
python evaluation/run.py --list-tasks arc                    # names that contain a word

An interrupted run resumes with the same command. Needs requirements-evaluation.txt.
The exit code is 0 only if every requested benchmark has a score.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any


if __name__ == "__main__":
    # A single progress bar, ours with disable=False: lm-eval and datasets would draw several per task. tqdm reads this
    # when it is imported.
    os.environ.setdefault("TQDM_DISABLE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from huggingface_hub import snapshot_download

from evaluation.card import CARD, CODE_IS_OFF, LOCAL, Benchmark, other, select
from evaluation.results import Store, fingerprint, markdown, summarise, write_atomic
from tools.arguments import positive
from tools.model_folder import complete_model
from tools.package import ROOT


def shots(text: str) -> int:
    """A number of examples, which may be 0; `argparse` adds the option's name to the error."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of examples")
    return int(text)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="model folder, or a repository id on the Hub")
    add(
        "--tasks",
        default="all",
        help="all, local, or names of the card's benchmarks or lm-eval's tasks, comma-separated",
    )
    add(
        "--list-tasks",
        nargs="?",
        const="",
        metavar="WORD",
        help="list the tasks, or those that contain WORD, and exit",
    )
    add("--out", type=Path, help="folder for the results (default: build/evaluation/<model name>[-first-LIMIT])")
    add("--data", type=Path, help="folder with <task>/<split>.jsonl, used instead of the data set on the Hub")
    add(
        "--batch-size",
        type=positive,
        default=8,
        help="requests per batch (default: 8); float32 scores do not depend on it",
    )
    add(
        "--dtype", default="auto", choices=("auto", "bfloat16", "float16", "float32"), help="default: the checkpoint's"
    )
    add("--device", help="cpu, cuda, cuda:1, or auto to spread over all GPUs (default: cuda if there is one)")
    add("--max-length", type=positive, help="maximum tokens of prompt plus answer (default: the model's window)")
    add("--limit", type=positive, help="only the first LIMIT samples of each task, for a trial run")
    add(
        "--num-fewshot",
        type=shots,
        help="examples in the prompt of every task (default: as on the card, or the task's)",
    )
    add(
        "--apply-chat-template",
        action="store_true",
        help="prompts are the user's turns in a chat, few-shot examples earlier turns, as with lm-eval's option",
    )
    add(
        "--allow-code-execution",
        action="store_true",
        help=f"run HumanEval, MBPP and the like: {CODE_IS_OFF}",
    )
    options = parser.parse_args(argv)
    if options.model is None and options.list_tasks is None:
        parser.error("the following arguments are required: --model")
    if options.data and not options.data.is_dir():
        parser.error(f"--data: {str(options.data)!r} is not a folder")
    options.data = options.data and options.data.resolve()
    return options


def model_folder(model: str) -> Path:
    """The folder itself, or the repository's snapshot in the Hub's cache.

    Raises:
        SystemExit: There is no such folder or repository, or it lacks the model's code.
    """
    name = complete_model(model)
    return Path(name if Path(name).is_dir() else snapshot_download(name))


def settings_of(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """What the scores depend on. Batch size and device are not part of it and may change when a run resumes."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    versions = {name: importlib.metadata.version(name) for name in ("lm_eval", "transformers", "torch", "datasets")}
    return {
        "model": Path(options.model).resolve().name,
        "weights": fingerprint(folder),
        "dtype": dtype if options.dtype == "auto" else options.dtype,
        "limit": options.limit,
        "max_length": options.max_length,
        "num_fewshot": options.num_fewshot,
        "apply_chat_template": options.apply_chat_template,
        **versions,
    }


def measure(
    lines: list[Benchmark], store: Store, folder: Path, options: argparse.Namespace, dtype: str
) -> dict[str, dict[str, Any]]:
    """Run what is not done yet. Returns the benchmarks of this and earlier runs, see `Store.select`."""
    from evaluation import harness

    # Unreachable data and truncated prompts would log a warning each; the table reports both once.
    for name in ("lm_eval", "huggingface_hub.utils._http"):
        logging.getLogger(name).setLevel(logging.ERROR)
    manager = harness.task_manager(own_only=all((harness.TASKS / f"{line.task}.yaml").exists() for line in lines))
    tasks = {line.task: harness.members(manager, line.task) for line in lines}
    names = {task: list(parts) for task, parts in tasks.items()}
    store.select(names, {})  # now, as the run may be killed
    disabled = (
        {} if options.allow_code_execution else {line.task: f"off: {CODE_IS_OFF}" for line in lines if line.runs_code}
    )
    missing = {
        task: {name: spec for name, spec in parts.items() if not store.result(name)} for task, parts in tasks.items()
    }
    wanted = [line for line in lines if line.task not in disabled and missing[line.task]]
    loaded, problems = harness.load_tasks(wanted, missing, manager, options.num_fewshot, options.data)
    if loaded:
        try:
            lm = harness.load_model(folder, options, dtype)
        except (OSError, ValueError, RuntimeError) as error:
            raise SystemExit(f"--model {options.model!r} does not load: {error}") from error
        try:
            harness.Evaluation(
                lm, store, options.limit, options.allow_code_execution, options.apply_chat_template
            ).run(loaded, problems)
        except KeyboardInterrupt:
            print("\nInterrupted. Run the same command again to resume.", file=sys.stderr)
    return store.select(names, problems | disabled)


def main(argv: list[str] | None = None) -> int:
    """Returns 0 if every requested benchmark has a score, else 1."""
    options = arguments(argv)
    lines, rest = select(options.tasks)
    if importlib.util.find_spec("lm_eval") is None:
        raise SystemExit("lm-eval is not installed: pip install -r requirements-evaluation.txt")
    if options.allow_code_execution:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # lm-eval would fork the process with the model to bootstrap
    if options.list_tasks is not None or rest:
        from evaluation import harness

        if options.list_tasks is not None:
            print(harness.listing(options.list_tasks))
            return 0
        lines += harness.others(rest)
    folder = model_folder(options.model)
    name = Path(options.model).resolve().name + (f"-first-{options.limit}" if options.limit else "")
    store = Store(options.out or ROOT / "build" / "evaluation" / name)
    settings = settings_of(folder, options)
    store.claim(settings)
    selected = measure(lines, store, folder, options, settings["dtype"])
    ours = {line.task: line for line in (*CARD, *LOCAL) if line.task in selected}
    rows = [
        summarise(line, selected[line.task]["tasks"], store, selected[line.task]["problem"], options.num_fewshot)
        for line in (*ours.values(), *(other(task) for task in selected if task not in ours))
    ]
    table = markdown(rows, settings)
    write_atomic(store.folder / "table.json", json.dumps({"settings": settings, "rows": rows}, indent=2) + "\n")
    write_atomic(store.folder / "table.md", table)
    print(f"\n{table}\nWritten to {store.folder}: table.md, table.json, raw/")
    requested = {line.task for line in lines}
    return 0 if all(row["status"] == "done" for row in rows if row["task"] in requested) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("\nInterrupted before the first request. Run the same command again.")
