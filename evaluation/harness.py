"""All use of lm-eval: its tasks and their data, the model wrapper, running the tasks one by one."""

import argparse
import contextlib
import functools
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from lm_eval import evaluate
from lm_eval.api.model import CacheHook, CachingLM
from lm_eval.api.task import Task
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from evaluation.card import Benchmark
from evaluation.clock import Clock, format_time_left, work_of
from evaluation.results import Store, write_atomic


TASKS = Path(__file__).resolve().parent / "tasks"
FEWSHOT_SEED = 1234  # lm-eval's default, fixed so that a resumed run uses the same examples


@functools.cache
def task_manager(own_only: bool) -> TaskManager:
    """The index of tasks; without lm-eval's thousands of tasks it loads instantly."""
    return TaskManager(include_path=str(TASKS), include_defaults=not own_only)


def leaves(manager: TaskManager, name: str) -> list[str]:
    """The names of the tasks in a task, a tag or a nested group, without loading their data."""
    entry = manager.task_index[name]
    if entry.kind.name == "TAG":
        return sorted(entry.tags)
    if entry.kind.name == "GROUP":
        return [leaf for member in entry.cfg["task"] for leaf in leaves(manager, member)]
    return [name]


def load_task(manager: TaskManager, line: Benchmark, name: str, data: Path | None) -> Task:
    """One lm-eval task with its data: from `data`/<task>/<split>.jsonl, from this repository, or from the Hub.

    Raises:
        OSError, ValueError, RuntimeError: The data cannot be loaded; raised by the `datasets` library.
    """
    spec: dict[str, Any] = {"task": name}
    if line.sets_shots:
        spec["num_fewshot"] = line.shots
    for folder in filter(None, (data, TASKS / "local")):
        files = {path.stem: str(path) for path in sorted((folder / name).glob("*.jsonl"))}
        if files:
            config = manager.task_index[name].cfg
            for split in filter(
                None, (config.get(f"{use}_split") for use in ("training", "validation", "test", "fewshot"))
            ):
                if split not in files:
                    raise FileNotFoundError(f"{folder / name} has no {split}.jsonl, which this task requires")
            spec |= {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
            break
    # A group of one is lm-eval's way to override settings of a registered task.
    return manager.load({"group": "internlm_card", "task": [spec]})["tasks"][name]


def load_tasks(
    lines: list[Benchmark], names: dict[str, list[str]], manager: TaskManager, data: Path | None
) -> tuple[list[tuple[Benchmark, Task]], dict[str, str]]:
    """Load all data first, so that missing data is reported immediately and the time left can be estimated.

    Args:
        lines: The benchmarks to run.
        names: Benchmark's task -> its lm-eval tasks that have no result yet.
        manager: lm-eval's index of tasks.
        data: See `load_task`.

    Returns:
        The tasks of the benchmarks whose data are complete, and benchmark's task -> problem for the others.
    """
    loaded, problems = [], {}
    with tqdm(total=sum(len(names[line.task]) for line in lines), disable=False, leave=False) as bar:
        for line in lines:
            tasks = []
            try:
                for name in names[line.task]:
                    bar.set_description(f"Loading data of {name}")
                    tasks.append((line, load_task(manager, line, name, data)))
            except Exception as error:  # malformed rows raise whatever the task's template raises
                known = {ImportError: "package missing", (OSError, ValueError, RuntimeError): "data not reachable"}
                word = next((word for kind, word in known.items() if isinstance(error, kind)), "failed")
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                problems[line.task] = f"{word}: {reason}"
                tqdm.write(f"{line.name}: {problems[line.task]}", file=sys.stderr)
            else:
                loaded += tasks
            bar.update(len(names[line.task]))
    return loaded, problems


class QuietLM(HFLM):
    """lm-eval's model without its own progress bars, one or two per task: there is a single bar over all tasks."""

    def loglikelihood(self, requests: list, disable_tqdm: bool = True) -> list:
        return super().loglikelihood(requests, disable_tqdm=True)

    def generate_until(self, requests: list, disable_tqdm: bool = True) -> list:
        return super().generate_until(requests, disable_tqdm=True)


def load_model(folder: Path, options: argparse.Namespace, dtype: str) -> QuietLM:
    """The model and its tokenizer, wrapped for lm-eval; batches for generation are padded on the left."""
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=getattr(torch, dtype), device_map=device
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    return QuietLM(
        pretrained=model.eval(),
        tokenizer=tokenizer,
        backend="causal",
        batch_size=options.batch_size,
        max_length=options.max_length,
    )


def is_cut(lm: QuietLM, kind: str, request: tuple) -> bool:
    """Whether prompt and answer exceed the window, so that lm-eval truncates the beginning of the prompt."""
    text = request[0] if kind == "generate_until" else "".join(request)
    room = lm.max_length - (request[1].get("max_gen_toks", lm.max_gen_toks) if kind == "generate_until" else -1)
    # A text has at most as many tokens as bytes, plus <s>, so most prompts pass without being tokenized.
    return len(text.encode()) >= room and len(lm.tok_encode(text)) > room


class NotifyingHook(CacheHook):
    """lm-eval's hook, which stores each answer as soon as it is there, with a callback."""

    def __init__(self, caching: CachingLM, on_answer: Callable[[str, tuple], None]) -> None:
        super().__init__(caching)
        self.on_answer = on_answer

    def add_partial(self, attr: str, req: tuple, res: Any) -> None:
        super().add_partial(attr, req, res)
        self.on_answer(attr, req)


class Evaluation:
    """Runs tasks one after the other on one model, with one progress bar and one clock for all."""

    def __init__(self, lm: QuietLM, store: Store, limit: int | None, run_code: bool = False) -> None:
        self.lm, self.store, self.limit, self.run_code = lm, store, limit, run_code
        self.clock = Clock()

    def run(self, tasks: list[tuple[Benchmark, Task]], problems: dict[str, str]) -> None:
        """Evaluate and store every task; a failure is noted in `problems` and does not stop the others.

        Raises:
            SystemExit: Out of GPU memory; every further task would fail the same way.
        """
        for _, task in tasks:
            self.plan(task)
        bar_format = "{desc}{percentage:3.0f}%|{bar}| {elapsed} elapsed{postfix}"
        with tqdm(total=self.clock.work_left(), disable=False, bar_format=bar_format, mininterval=0.5) as self.bar:
            for number, (line, task) in enumerate(tasks, 1):
                self.bar.set_description(f"{number}/{len(tasks)} {line.name} {task.task_name}")
                try:
                    self.measure(line, task)
                except torch.OutOfMemoryError as error:
                    advice = "restart with a smaller one; finished tasks are kept"
                    raise SystemExit(
                        f"{line.name}: out of memory at --batch-size {self.lm.batch_size}: {advice}"
                    ) from error
                except Exception as error:  # one failure must not cost the other benchmarks
                    problems[line.task] = f"failed: {task.task_name}: {type(error).__name__}: {error}".splitlines()[0]
                    write_atomic(self.store.folder / "errors" / f"{task.task_name}.txt", traceback.format_exc())
                    tqdm.write(f"{line.name}: {problems[line.task]}", file=sys.stderr)
                self.clock.finished(task.task_name)
                self.show()

    def plan(self, task: Task) -> None:
        """Estimate the work of a task from its first few requests."""
        samples = min(self.limit or sys.maxsize, len(task.eval_docs))
        probe = min(4, samples)
        task.set_fewshot_seed(FEWSHOT_SEED)
        with contextlib.suppress(Exception):  # malformed rows: `measure` fails too and reports it
            task.build_all_requests(limit=probe, rank=0, world_size=1)
        for request in task.instances or ():
            kind = request.request_type
            self.clock.plan(task.task_name, kind, work_of(kind, request.args) * samples / probe)

    def measure(self, line: Benchmark, task: Task) -> None:
        """Run one task: request the answers that are not cached yet, score all, and store the result."""
        started, name = time.perf_counter(), task.task_name
        task.set_fewshot_seed(FEWSHOT_SEED)
        with self.cached(name) as (lm, asked):
            output = evaluate(
                lm, {"tasks": {name: task}}, limit=self.limit, bootstrap_iters=0, confirm_run_unsafe_code=self.run_code
            )
        metrics = {key: value for key, value in output["results"][name].items() if isinstance(value, float)}
        if line.metric not in metrics:
            raise KeyError(f"no metric {line.metric!r} among {sorted(metrics)}")
        samples = output["samples"][name]
        kept = ("doc_id", "target", "resps", "filtered_resps", "filter", *samples[0]["metrics"])
        result = {
            "task": name,
            "metrics": metrics,
            "samples": output["n-samples"][name]["effective"],
            "shots": output["n-shot"][name],
            "requests": len(task.instances),
            "cut": sum(is_cut(self.lm, request.request_type, request.args) for request in task.instances),
            "answered_before": len(task.instances) - len(asked),
            "seconds": round(time.perf_counter() - started, 2),
            "batch_size": self.lm.batch_size,
        }
        self.store.finish(name, result, ({key: sample[key] for key in kept} for sample in samples))

    @contextlib.contextmanager
    def cached(self, name: str) -> Iterator[tuple[CachingLM, list[tuple]]]:
        """The model with a file that caches all its answers to this task, and the list of requests it had to run."""
        caching = CachingLM(self.lm, f"{self.store.cache(name)}_rank0.db")
        asked: list[tuple] = []
        last = time.perf_counter()

        def on_answer(kind: str, request: tuple) -> None:
            nonlocal last
            now = time.perf_counter()
            asked.append(request)
            self.clock.answered(name, kind, work_of(kind, request), now - last)
            self.show()
            last = now

        self.lm.set_cache_hook(NotifyingHook(caching, on_answer))
        try:
            yield caching, asked
        finally:
            caching.dbdict.close()

    def show(self) -> None:
        self.bar.set_postfix_str(format_time_left(self.clock.seconds_left()), refresh=False)
        self.bar.update(self.bar.total - self.clock.work_left() - self.bar.n)
