"""All use of lm-eval: its tasks and their data, the model wrapper, running the tasks one by one."""

import argparse
import contextlib
import difflib
import functools
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import fields
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from lm_eval import evaluate
from lm_eval.api.model import CacheHook, CachingLM
from lm_eval.api.task import Task
from lm_eval.config.group import GroupConfig
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, LogitsProcessorList

from evaluation.card import CARD, LOCAL, Benchmark, other
from evaluation.clock import CHARACTERS_PER_NEW_TOKEN, Clock, format_time_left, work_of
from evaluation.results import Store, write_atomic


TASKS = Path(__file__).resolve().parent / "tasks"
SEED = 1234  # lm-eval's default for few-shot examples and for sampling, so that a resumed run has the same examples
BOOTSTRAP = 1000  # resamples for the standard error of a metric that is no mean; lm-eval's 100 000 can take minutes
# A group's settings that are not its tasks'.
OF_GROUPS = {field.name for field in fields(GroupConfig)} | {"include", "tag", "task_alias"}


@functools.cache
def task_manager(own_only: bool) -> TaskManager:
    """The index of tasks; without lm-eval's thousands of tasks it loads instantly."""
    return TaskManager(include_path=str(TASKS), include_defaults=not own_only)


def members(
    manager: TaskManager, member: str | dict[str, Any], changes: dict[str, Any] | None = None, group: str = ""
) -> dict[str, dict[str, Any]]:
    """The tasks in a task, a tag or a nested group, without loading their data.

    Args:
        manager: lm-eval's index of tasks.
        member: A name, or a group's entry for a member: its name and what the group changes.
        changes: The settings that the groups around it change.
        group: The name of the innermost of them.

    Returns:
        The name of each task's results (task@group where a group changes settings, else the task's) -> what lm-eval
        is to load: the task's name and the changed settings.
    """
    given = {"task": member} if isinstance(member, str) else member
    name = given.get("group") or given["task"]
    entry = manager.task_index.get(name)
    config = given if "group" in given and entry is None else entry.cfg if entry and entry.kind.name == "GROUP" else {}
    changes = {
        **{key: value for key, value in config.items() if key not in OF_GROUPS},
        **(changes or {}),
        **{key: value for key, value in given.items() if key not in OF_GROUPS},
    }
    if entry and entry.kind.name == "TAG":
        parts = sorted(entry.tags)
    elif config:
        parts, group = config["task"], name
    else:
        return {f"{name}@{group}" if changes else name: {"task": name, **changes}}
    return {key: task for part in parts for key, task in members(manager, part, changes, group).items()}


def others(names: list[str]) -> list[Benchmark]:
    """lm-eval's other tasks and groups with these names; a tag stands for each of its tasks.

    Raises:
        SystemExit: A name is unknown; the message lists similar ones.
    """
    manager = task_manager(own_only=False)
    index = manager.task_index
    if unknown := [name for name in names if name not in index]:
        known = [*index, *(name for line in CARD for name in (line.name, line.task))]
        similar = {name: difflib.get_close_matches(name, known, n=4) for name in unknown}
        hints = [f"{name!r}" + (f" (similar: {', '.join(found)})" if found else "") for name, found in similar.items()]
        raise SystemExit(f"--tasks: neither the card nor lm-eval has {', '.join(hints)}. --list-tasks WORD searches.")
    listed = [
        part for name in names for part in (sorted(index[name].tags) if index[name].kind.name == "TAG" else [name])
    ]
    return [
        other(
            name,
            runs_code=any(config_of(manager, task).get("unsafe_code") for task in members(manager, name).values()),
        )
        for name in dict.fromkeys(listed)
    ]


def config_of(manager: TaskManager, task: dict[str, Any]) -> dict[str, Any]:
    """A task's configuration, with the settings that its group changes."""
    entry = manager.task_index.get(task["task"])
    return {**(entry.cfg if entry else {}), **task}


def splits(config: dict[str, Any]) -> list[str]:
    """The splits of the data set that a task reads, and that `--data` has to provide."""
    uses = (config.get(f"{use}_split") for use in ("training", "validation", "test", "fewshot"))
    return list(dict.fromkeys(split for split in uses if split))


def listing(word: str) -> str:
    """What `--tasks` may name: the card's benchmarks, the local tasks and lm-eval's, those that contain `word`."""
    manager = task_manager(own_only=False)
    index = {name: entry.kind.name.lower().removeprefix("py_") for name, entry in manager.task_index.items()}
    lines = []
    for title, benchmarks in (("The card's benchmarks (all)", CARD), ("Local, without a download (local)", LOCAL)):
        found = [line for line in benchmarks if word.lower() in f"{line.name} {line.task}".lower()]
        if found:
            rows = (f"  {line.task:22}{line.name:20}{line.shots} shots, {line.metric}" for line in found)
            lines += [f"{title}:", *rows, ""]
    rest = {name: kind for name, kind in index.items() if name not in {line.task for line in (*CARD, *LOCAL)}}
    if not word:
        numbers = ", ".join(
            f"{sum(each == kind for each in rest.values())} {kind}s" for kind in ("task", "group", "tag")
        )
        return "\n".join([*lines, f"lm-eval's others: {numbers}. --list-tasks WORD lists those that contain WORD."])
    found = [f"  {name} ({kind})" for name, kind in sorted(rest.items()) if word.lower() in name.lower()]
    return "\n".join([*lines, f"lm-eval's others: {len(found)}", *found])


@contextlib.contextmanager
def local_code_eval() -> Iterator[None]:
    """Within it, the working directory has code_eval/, which lm-eval's code tasks find there instead of on the Hub."""
    before = Path.cwd()
    os.chdir(TASKS.parent)
    try:
        yield
    finally:
        os.chdir(before)


def load_task(manager: TaskManager, key: str, spec: dict[str, Any], shots: int | None, data: Path | None) -> Task:
    """One lm-eval task with its data: from `data`/<task>/<split>.jsonl, from this repository, or from the Hub.

    Args:
        manager: lm-eval's index of tasks.
        key: The name of its results, which becomes the task's.
        spec: What lm-eval is to load, see `members`.
        shots: Examples in the prompt; None: the task's own number.
        data: The folder of --data, an absolute path.

    Raises:
        OSError, ValueError, RuntimeError: The data cannot be loaded; raised by the `datasets` library.
    """
    name, config = spec["task"], config_of(manager, spec)
    if shots is not None:
        spec = spec | {"num_fewshot": shots}
    for folder in filter(None, (data, TASKS / "local")):
        files = {path.stem: str(path) for path in sorted((folder / name).glob("*.jsonl"))}
        if files:
            for split in splits(config):
                if split not in files:
                    raise FileNotFoundError(f"{folder / name} has no {split}.jsonl, which this task requires")
            spec = spec | {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
            break
    with local_code_eval() if config.get("unsafe_code") else contextlib.nullcontext():
        # A group of one is lm-eval's way to override settings of a registered task.
        (task,) = manager.load({"group": "internlm_card", "task": [spec]})["tasks"].values()
    task.set_config(key="task", value=key)
    return task


def load_tasks(
    lines: list[Benchmark],
    missing: dict[str, dict[str, dict[str, Any]]],
    manager: TaskManager,
    shots: int | None,
    data: Path | None,
) -> tuple[list[tuple[Benchmark, Task]], dict[str, str]]:
    """Load all data first, so that missing data is reported immediately and the time left can be estimated.

    Args:
        lines: The benchmarks to run.
        missing: Benchmark's task -> its lm-eval tasks that have no result yet, see `members`.
        manager: lm-eval's index of tasks.
        shots: The number set by --num-fewshot.
        data: See `load_task`.

    Returns:
        The tasks of the benchmarks whose data are complete, and benchmark's task -> problem for the others.
    """
    loaded, problems = [], {}
    # One number of shots for a task, whether it is asked for by itself or in its benchmark.
    own_shots = {
        key: line.shots
        for line in CARD
        if line.sets_shots and line.task in manager.task_index
        for key in members(manager, line.task)
    }
    with tqdm(total=sum(len(missing[line.task]) for line in lines), disable=False, leave=False) as bar:
        for line in lines:
            tasks = []
            try:
                for key, spec in missing[line.task].items():
                    bar.set_description(f"Loading data of {key}")
                    number = own_shots.get(key) if shots is None else shots
                    tasks.append((line, load_task(manager, key, spec, number, data)))
            except Exception as error:  # malformed rows raise whatever the task's template raises
                known = {ImportError: "package missing", (OSError, ValueError, RuntimeError): "data not reachable"}
                word = next((word for kind, word in known.items() if isinstance(error, kind)), "failed")
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                problems[line.task] = f"{word}: {reason}"
                tqdm.write(f"{line.name}: {problems[line.task]}", file=sys.stderr)
            else:
                loaded += tasks
            bar.update(len(missing[line.task]))
    return loaded, problems


class TokenCounter(LogitsProcessor):
    """Reports how many tokens `generate` has made for each row so far. The logits stay as they are."""

    def __init__(self, prompt: int, report: Callable[[int], None]) -> None:
        self.prompt, self.report = prompt, report

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self.report(input_ids.shape[1] - self.prompt + 1)
        return scores


class QuietLM(HFLM):
    """lm-eval's model without its own progress bars, one or two per task: there is a single bar over all tasks.

    Attributes:
        on_work: Called with the kind of request and how much of the batch has been done: at every step of a
            generation, and on a CPU, where prompts take long, after every layer of a prompt.
    """

    on_work: Callable[[str, float], None] = staticmethod(lambda kind, work: None)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kind = ""
        if self.device.type == "cpu":  # on a GPU steps of a model with hooks are not captured
            layers = self.model.base_model.layers
            for number, layer in enumerate(layers, 1):
                layer.register_forward_hook(functools.partial(self._after_layer, number / len(layers)))

    def _after_layer(self, share: float, layer: torch.nn.Module, given: Any, output: torch.Tensor) -> None:
        rows, tokens = output.shape[:2]
        if tokens > 1:
            self.on_work(self.kind, share * rows * tokens)  # a token has a character at least

    def loglikelihood(self, requests: list, disable_tqdm: bool = True) -> list:
        self.kind = "loglikelihood"
        return super().loglikelihood(requests, disable_tqdm=True)

    def generate_until(self, requests: list, disable_tqdm: bool = True) -> list:
        self.kind = "generate_until"
        return super().generate_until(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = True) -> list:
        self.kind = "loglikelihood_rolling"
        return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **kwargs: Any) -> torch.Tensor:
        def report(new: int) -> None:
            work = context.shape[1] + new * CHARACTERS_PER_NEW_TOKEN
            self.on_work(self.kind, context.shape[0] * work)

        counter = TokenCounter(context.shape[1], report)
        return super()._model_generate(
            context, max_length, stop, logits_processor=LogitsProcessorList([counter]), **kwargs
        )


def load_model(folder: Path, options: argparse.Namespace, dtype: str) -> QuietLM:
    """The model and its tokenizer, wrapped for lm-eval; batches for generation are padded on the left.

    Raises:
        ValueError: --apply-chat-template, and the tokenizer has no template. Also whatever loading raises.
    """
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=getattr(torch, dtype), device_map=device
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    if options.apply_chat_template and not tokenizer.chat_template:
        raise ValueError("its tokenizer has no chat template, which --apply-chat-template needs")
    return QuietLM(
        pretrained=model.eval(),
        tokenizer=tokenizer,
        backend="causal",
        batch_size=options.batch_size,
        max_length=options.max_length,
    )


def is_cut(lm: QuietLM, kind: str, request: tuple) -> bool:
    """Whether prompt and answer exceed the window, so that lm-eval truncates the beginning of the prompt."""
    if kind == "loglikelihood_rolling":  # scored in windows, as often as needed
        return False
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


def first_metric(task: Task, metrics: dict[str, float]) -> str | None:
    """The key of the first metric that the task lists, or else reports (a function reports under names of its own)."""
    keys = [key for key in metrics if "_stderr," not in key]
    listed = [key for name in task.aggregation() for key in keys if key.partition(",")[0] == name]
    return next(iter(listed or keys), None)


class Evaluation:
    """Runs tasks one after the other on one model, with one progress bar and one clock for all."""

    def __init__(
        self, lm: QuietLM, store: Store, limit: int | None, run_code: bool = False, chat_template: bool = False
    ) -> None:
        self.lm, self.store, self.limit, self.run_code = lm, store, limit, run_code
        # Like lm-eval's --apply_chat_template: the few-shot examples are turns of the conversation, too.
        self.prompting = {"apply_chat_template": chat_template, "fewshot_as_multiturn": chat_template}
        self.clock = Clock()

    def run(self, tasks: list[tuple[Benchmark, Task]], problems: dict[str, str]) -> None:
        """Evaluate and store every task; a failure is noted in `problems` and does not stop the others.

        Raises:
            SystemExit: Out of GPU memory; every further task would fail the same way.
        """
        for _, task in tasks:
            self.plan(task)
        bar_format = "{desc}{percentage:5.1f}%|{bar}| {elapsed} elapsed{postfix}"
        often: dict[str, Any] = {"mininterval": 0.5, "miniters": 1}  # or it would wait for steps as large as the last
        with tqdm(total=self.clock.work_left(), disable=False, bar_format=bar_format, **often) as self.bar:
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
        task.set_fewshot_seed(SEED)
        with contextlib.suppress(Exception):  # malformed rows: `measure` fails too and reports it
            template = self.lm.apply_chat_template
            task.build_all_requests(limit=probe, rank=0, world_size=1, chat_template=template, **self.prompting)
            for request in task.instances:
                kind = request.request_type
                work = work_of(kind, request.args) * request.repeats
                self.clock.plan(task.task_name, kind, work * samples / probe)

    def measure(self, line: Benchmark, task: Task) -> None:
        """Run one task: request the answers that are not cached yet, score all, and store the result."""
        started, name = time.perf_counter(), task.task_name
        task.set_fewshot_seed(SEED)
        torch.manual_seed(SEED)
        with self.cached(name) as (lm, asked):
            output = evaluate(
                lm,
                {"tasks": {name: task}},
                limit=self.limit,
                bootstrap_iters=BOOTSTRAP,
                confirm_run_unsafe_code=self.run_code,
                **self.prompting,
            )
        values = output["results"][name]
        metrics = {key: float(value) for key, value in values.items() if "," in key and isinstance(value, Real)}
        metric = line.metric or first_metric(task, metrics)
        if metric not in metrics:
            raise KeyError(f"no metric {metric!r} among {sorted(metrics)}")
        requests = sum(request.repeats for request in task.instances)
        samples = output["samples"][name]
        kept = ("doc_id", "target", "resps", "filtered_resps", "filter", *samples[0]["metrics"])
        result = {
            "task": name,
            "metric": metric,
            "metrics": metrics,
            "split": task.get_config("test_split") or task.get_config("validation_split"),
            "samples": output["n-samples"][name]["effective"],
            "shots": output["n-shot"][name] or 0,
            "requests": requests,
            "cut": sum(is_cut(self.lm, request.request_type, request.args) for request in task.instances),
            "answered_before": requests - len(asked),
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

        def on_work(kind: str, work: float) -> None:
            self.clock.running(kind, work, time.perf_counter() - last)
            self.show()

        self.lm.set_cache_hook(NotifyingHook(caching, on_answer))
        self.lm.on_work = on_work
        try:
            yield caching, asked
        finally:
            caching.dbdict.close()

    def show(self) -> None:
        self.bar.set_postfix_str(format_time_left(self.clock.seconds_left()), refresh=False)
        # Never back: a batch's answers come one by one, and the first of them ends what was counted of its tokens.
        self.bar.update(max(0, self.bar.total - self.clock.work_left() - self.bar.n))
