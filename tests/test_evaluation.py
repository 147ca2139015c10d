"""The evaluation: its table against the card, stored results, and lm-eval end to end on the tiny model, offline."""

import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from evaluation import results, run
from evaluation.card import CARD, CODE_IS_OFF, LOCAL, Benchmark, other, select
from evaluation.clock import Clock, format_time_left, work_of
from evaluation.tasks import scoring
from tools.package import REAL

from support.paths import GOLDEN, ROOT, TINY


TASKS = ROOT / "evaluation" / "tasks"
# `datasets` reads this when it is imported.
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
INTERNLM_20B = 3  # its column among the seven models of the card


def card_scores() -> dict[str, list[float]]:
    """README.md's English table of individual benchmarks: name -> the scores of its seven models."""
    rows = re.findall(
        r"^\|[^|\n]*\| ([^|\n]+) ((?:\| [\d.*]+ ){7})\|", (ROOT / "README.md").read_text(encoding="utf-8"), re.M
    )
    assert rows, "README.md has no table of benchmarks"
    scores: dict[str, list[float]] = {}
    for name, numbers in rows:
        scores.setdefault(name.strip(), [float(number) for number in re.findall(r"[\d.]+", numbers)])
    return scores


def local_rows(task: str) -> list[dict]:
    text = (TASKS / "local" / task / "test.jsonl").read_text(encoding="utf-8")
    return [json.loads(row) for row in text.splitlines()]


# ------------------------------------------------------------------------------------------------------- the table


def test_the_table_matches_the_card():
    """All seventeen benchmarks, in the card's order, with the card's numbers."""
    published = card_scores()
    assert [line.name for line in CARD] == list(published)
    assert {line.name: line.card for line in CARD} == {name: row[INTERNLM_20B] for name, row in published.items()}


def test_published_scores_are_shares_of_official_samples():
    """A score with two decimals is k / n for an integer k: a wrong small n hardly fits seven models at once."""
    published = card_scores()
    counted = [line for line in CARD if line.official_samples]
    assert len(counted) == 12
    for line in counted:
        for score in published[line.name]:
            share = 100 * round(score * line.official_samples / 100) / line.official_samples
            assert abs(share - score) <= 0.00501, (line.name, score, line.official_samples)


def test_the_share_test_rejects_other_sample_counts():
    """It rules out FewCLUE's public test set for CSL and lm-eval's own RACE: the noted counts are no coincidence."""
    published = card_scores()
    for name, samples in (("CSL", 2828), ("RACE (high)", 1045), ("MBPP", 974)):
        assert any(abs(100 * round(x * samples / 100) / samples - x) > 0.00501 for x in published[name]), name


def line_of(name: str) -> Benchmark:
    """The card's benchmark or local task with this name."""
    ((line,), rest) = select(name)
    assert not rest
    return line


def test_select_by_group_name_or_task():
    assert select("all") == (list(CARD), [])
    assert select("local") == (list(LOCAL), [])
    lines, rest = select("PIQA, race (middle),internlm_csl,arc_easy,piqa,Else")
    assert [line.name for line in lines] == ["PIQA", "RACE (middle)", "CSL"]
    assert rest == ["arc_easy", "Else"]
    with pytest.raises(SystemExit, match="--tasks: ' ,' has no name"):
        select(" ,")


# ------------------------------------------------------------------------------------------------ results on disk


def stored(folder: Path, **scores: float) -> results.Store:
    store = results.Store(folder)
    for task, score in scores.items():
        store.finish(task, {"metrics": {"acc,none": score}, "samples": round(100 * score), "cut": 3}, [{"doc_id": 0}])
    return store


def test_mean_over_tasks_is_unweighted_and_compared_with_the_card(tmp_path: Path):
    """Its variance is the sum of the tasks' variances by n squared: (0.03^2 + 0.04^2) / 4 = 0.025^2."""
    store = results.Store(tmp_path)
    for task, score, stderr in (("a", 0.5, 0.03), ("b", 0.74, 0.04)):
        metrics = {"acc,none": score, "acc_stderr,none": stderr}
        store.finish(task, {"metrics": metrics, "samples": round(100 * score), "cut": 0}, [])
    row = results.summarise(line_of("mmlu"), ["a", "b"], store)
    assert (row["status"], row["ours"], row["difference"], row["samples"]) == ("done", 62.0, -0.05, 124)
    assert row["stderr"] == 2.5
    assert "| MMLU | 62.00 | 2.50 | 62.05 | -0.05 | 5 | acc | 124 |" in results.markdown([row], {})


def test_without_a_standard_error_there_is_a_dash(tmp_path: Path):
    """lm-eval has none for some metrics, and for a single sample."""
    row = results.summarise(line_of("boolq"), ["boolq"], stored(tmp_path, boolq=0.5))
    assert "| BoolQ | 50.00 | - | 87.46 | -37.46 | 0 | acc | 50 |" in results.markdown([row], {})


def test_other_tasks_have_a_section_with_lm_evals_own_values(tmp_path: Path):
    """Not in percent: a perplexity is none. The shots are those that lm-eval reports, unless they were set."""
    store = results.Store(tmp_path)
    metrics = {"word_perplexity,none": 12.34567, "word_perplexity_stderr,none": 0.5}
    result = {
        "metric": "word_perplexity,none",
        "metrics": metrics,
        "shots": 3,
        "split": "test",
        "samples": 9,
        "cut": 0,
    }
    store.finish("wikitext", result, [])
    rows = [results.summarise(line, [line.task], store) for line in (line_of("boolq"), other("wikitext"))]
    table = results.markdown(rows, {})
    assert "Other tasks of lm-eval, with its own values:\n\n| Task | Score |" in table
    assert "\n| wikitext | 12.3457 | 0.5000 | 3 | word_perplexity | 9 |\n" in table
    assert "\n| BoolQ | not run yet | - | 87.46 | - | 0 | acc | - |\n" in table
    assert results.summarise(other("wikitext"), ["wikitext"], store, shots=0)["shots"] == 0


def test_a_group_of_different_metrics_has_no_mean(tmp_path: Path):
    store = results.Store(tmp_path)
    for task, metric in (("cola", "mcc,none"), ("sst2", "acc,none")):
        result = {
            "metric": metric,
            "metrics": {metric: 0.5},
            "shots": 0,
            "split": "validation",
            "samples": 1,
            "cut": 0,
        }
        store.finish(task, result, [])
    row = results.summarise(other("glue"), ["cola", "sst2"], store)
    assert (row["status"], row["ours"], row["metric"]) == ("no common metric", None, None)
    assert "acc,none, mcc,none" in row["reason"]


def test_the_record_of_what_was_run_grows(tmp_path: Path):
    store = results.Store(tmp_path)
    store.select({"mmlu": ["a", "b"], "piqa": ["piqa"]}, {"piqa": "failed: why"})
    selected = results.Store(tmp_path).select({"piqa": ["piqa"], "arc_easy": ["arc_easy"]}, {})
    assert selected == {
        "mmlu": {"tasks": ["a", "b"], "problem": None},
        "piqa": {"tasks": ["piqa"], "problem": None},
        "arc_easy": {"tasks": ["arc_easy"], "problem": None},
    }


def test_settings_show_a_zero(tmp_path: Path):
    settings = {"num_fewshot": 0, "apply_chat_template": False, "limit": None}
    assert "Measured with num_fewshot 0." in results.markdown([], settings)
    assert "apply_chat_template True" in results.markdown([], settings | {"apply_chat_template": True})


def test_an_incomplete_group_has_no_score(tmp_path: Path):
    row = results.summarise(line_of("mmlu"), ["a", "b"], stored(tmp_path, a=0.5))
    assert (row["ours"], row["difference"]) == (None, None)
    assert (row["status"], row["reason"]) == ("not run yet", "1 of 2 tasks done")


def test_missing_data_is_reported_and_never_scored_as_zero(tmp_path: Path):
    row = results.summarise(line_of("boolq"), ["boolq"], stored(tmp_path), "data not reachable: no route")
    table = results.markdown([row], {"limit": None})
    assert "| BoolQ | data not reachable | - | 87.46 | - | 0 | acc | - |" in table
    assert "- BoolQ: data not reachable: no route" in table


def test_a_limited_run_says_so(tmp_path: Path):
    assert "first 7 samples of each task: a trial run" in results.markdown([], {"limit": 7})


def test_truncated_prompts_are_counted(tmp_path: Path):
    row = results.summarise(line_of("mmlu"), ["a", "b"], stored(tmp_path, a=0.5, b=0.74))
    assert "truncated at the beginning (see --max-length):\n\n- MMLU: 6\n" in results.markdown([row], {})
    assert "truncated at the beginning" not in results.markdown([row | {"cut": 0}], {})


def test_results_of_other_settings_are_not_mixed(tmp_path: Path):
    store = results.Store(tmp_path)
    store.claim({"dtype": "float32", "limit": None})
    store.claim({"dtype": "float32", "limit": None})
    with pytest.raises(SystemExit, match="dtype 'float32', now 'bfloat16'.*pass another folder to --out"):
        store.claim({"dtype": "bfloat16", "limit": None})
    with pytest.raises(SystemExit, match="num_fewshot None, now 0"):
        store.claim({"dtype": "float32", "limit": None, "num_fewshot": 0})


def test_dying_while_writing_leaves_no_partial_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store = stored(tmp_path, a=0.5)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", die)
    for task in ("a", "b"):
        with pytest.raises(KeyboardInterrupt):
            store.finish(task, {"metrics": {"acc,none": 0.1}, "samples": 1}, [])
    assert store.result("a")["metrics"] == {"acc,none": 0.5}
    assert store.result("b") is None


def test_fingerprint_changes_with_the_weights(tmp_path: Path):
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(bytes(5 << 20))
    before = results.fingerprint(tmp_path)
    (tmp_path / "README.md").write_text("a card")
    assert results.fingerprint(tmp_path) == before
    weights.write_bytes(bytes((5 << 20) - 1) + b"\1")
    assert results.fingerprint(tmp_path) != before


# ------------------------------------------------------------------------------------------------- the time left


def test_time_left_uses_the_speed_of_each_kind():
    clock = Clock()
    clock.plan("a", "loglikelihood", 1000)
    clock.plan("b", "generate_until", 500)
    assert clock.seconds_left() is None
    clock.answered("a", "loglikelihood", 100, 1.0)
    assert clock.seconds_left() == pytest.approx(9 + 5)  # generation not measured yet: assumed equally slow
    clock.answered("b", "generate_until", 100, 10.0)
    assert clock.seconds_left() == pytest.approx(9 + 40)
    clock.finished("a")
    assert clock.seconds_left() == pytest.approx(40)
    assert clock.work_left() == 400


def test_a_running_batch_counts_before_its_first_answer():
    """Generation answers only when its whole batch is done, after a minute or more."""
    clock = Clock()
    clock.plan("a", "generate_until", 1000)
    clock.plan("b", "loglikelihood", 500)
    clock.running("generate_until", 100, 2.0)
    assert clock.work_left() == 1400
    assert clock.seconds_left() == pytest.approx((900 + 500) * 2 / 100)
    clock.running("generate_until", 200, 4.0)  # the same batch, further on
    assert clock.work_left() == 1300
    clock.answered("a", "generate_until", 500, 5.0)  # it stopped early
    assert clock.work_left() == 1000
    assert clock.seconds_left() == pytest.approx((500 + 500) * 5 / 500)


def test_work_includes_the_maximum_generation():
    assert work_of("loglikelihood", ("abc", "de")) == 5
    assert work_of("generate_until", ("abc", {"max_gen_toks": 2})) == 3 + 2 * 100


def test_format_time_left():
    assert [format_time_left(seconds) for seconds in (None, 40, 720, 12000)] == [
        "time left unknown",
        "about 40 s left",
        "about 12 min left",
        "about 3 h 20 min left",
    ]


# ----------------------------------------------------------------------------------------------------- scoring


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("答案是光荣和ω-force。", 1.0),
        ("光荣和ω-force\n问：", 1.0),
        ("我想答案是：光荣和ω-force, 是的", 1.0),
        ("答案是光荣", 0.0),
        ("", 0.0),
    ],
)
def test_cmrc_scores_the_text_after_the_answer_is(answer: str, right: float):
    doc = {"answers": {"text": ["光荣和ω-force", "日本光荣和ω-force"]}}
    assert scoring.cmrc(doc, [answer]) == {"exact_match": right}


def test_csl_compares_with_and_without_keywords():
    without, with_them = scoring.csl_choices({"abst": "一篇文章", "keyword": ["甲", "乙"]})
    assert (without, with_them) == ("摘要：一篇文章", "摘要：一篇文章\n关键词：甲，乙")


def test_recall_takes_the_first_number():
    assert scoring.recall({"value": "0473"}, [" 0473.\nThe key of"]) == {"exact_match": 1.0}
    assert scoring.recall({"value": "0473"}, [" 473."]) == {"exact_match": 0.0}
    assert scoring.recall({"value": "0473"}, [" nothing"]) == {"exact_match": 0.0}


# -------------------------------------------------------------------------------------------------- local data


def test_local_sentences_have_one_well_formed_choice_and_equal_lengths():
    """The grammar confirms the label; a model that only counts tokens scores 25 percent."""
    from sentencepiece import SentencePieceProcessor

    from tools.tiny.grammar import is_well_formed

    tokenizer = SentencePieceProcessor(model_file=str(GOLDEN / "tokenizer.model"))
    rows = local_rows("internlm_sentences")
    assert len(rows) == 64
    for row in rows:
        well_formed = [index for index, choice in enumerate(row["choices"]) if is_well_formed(choice, row["language"])]
        assert well_formed == [row["label"]]
        assert len(set(row["choices"])) == 4
        assert len({len(tokenizer.encode(choice)) for choice in row["choices"]}) == 1


def test_local_recall_states_the_value_once():
    rows = local_rows("internlm_recall")
    assert len(rows) == 64
    for row in rows:
        *stated, asked = row["prompt"].split("\n")
        assert 2 <= len(stated) <= 8
        assert [line for line in stated if line.startswith(asked)] == [line for line in stated if row["value"] in line]


# --------------------------------------------------------------------------------------------------- the command


def test_help_lists_every_option_quickly():
    output = subprocess.run(
        [sys.executable, ROOT / "evaluation" / "run.py", "--help"],
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
    ).stdout
    options = ("--model", "--tasks", "--list-tasks", "--batch-size", "--dtype", "--device", "--limit", "--num-fewshot")
    for option in (*options, "--apply-chat-template", "--allow-code-execution"):
        assert option in output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--limit", "0"], "--limit: '0' is not a positive integer"),
        (["--batch-size", "-8"], "--batch-size: '-8' is not a positive integer"),
        (["--data", "nowhere"], "--data: 'nowhere' is not a folder"),
        (["--num-fewshot", "-1"], "--num-fewshot: '-1' is not a number of examples"),
        ([], "the following arguments are required: --model"),
    ],
)
def test_errors_name_the_invalid_option(options: list[str], message: str, capsys):
    with pytest.raises(SystemExit) as stopped:
        run.arguments([*(["--model", "anything"] if options else []), *options])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_weights_without_code_are_refused_with_the_command_that_helps(tmp_path: Path):
    weights = shutil.copytree(TINY, tmp_path / "weights")
    with pytest.raises(SystemExit, match="lacks this project's code: .* upload_to_hub.py --weights .* --local-dir"):
        run.model_folder(str(weights))


def test_the_tiny_checkpoint_is_completed():
    """It's what everybody tries first."""
    assert (run.model_folder(str(TINY)) / "modeling_internlm.py").is_file()


def test_without_lm_eval_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install -r requirements-evaluation.txt"):
        run.main(["--model", "anything"])


def test_a_trial_run_has_a_separate_folder(tiny_dir: Path, monkeypatch: pytest.MonkeyPatch):
    """Otherwise the full run after it would be refused because of its other settings."""
    folders = []
    monkeypatch.setattr(run, "Store", lambda folder: folders.append(folder) or sys.exit())
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: True)
    for options in ([], ["--limit", "20"]):
        with pytest.raises(SystemExit):
            run.main(["--model", str(tiny_dir / "."), *options])
    assert [folder.name for folder in folders] == [tiny_dir.name, f"{tiny_dir.name}-first-20"]


def test_requirements_are_pinned():
    lines = (ROOT / "requirements-evaluation.txt").read_text().splitlines()
    assert all("==" in line for line in lines if line and not line.startswith("#"))


# -------------------------------------------------------------------------------------------- with lm-eval, offline


@pytest.fixture(scope="module")
def offline():
    """Neither lm-eval nor datasets may access the network; one thread, as the cores are shared with other tests."""
    from datasets import config

    assert config.HF_HUB_OFFLINE
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def measured(folder: Path, model: Path, *options: str) -> tuple[int, dict[str, dict]]:
    """Run the command in this process; returns its exit code and the rows of its table by lm-eval task."""
    code = run.main(["--model", str(model), "--out", str(folder), "--dtype", "float32", "--device", "cpu", *options])
    table = json.loads((folder / "table.json").read_text(encoding="utf-8"))
    return code, {row["task"]: row for row in table["rows"]}


def answers(folder: Path, task: str) -> list[dict]:
    text = (folder / "raw" / f"{task}.samples.jsonl").read_text(encoding="utf-8")
    return [json.loads(row) for row in text.splitlines()]


@pytest.fixture(scope="module")
def local_run(offline: None, tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The two local tasks on the tiny model with batches of eight."""
    folder = tmp_path_factory.mktemp("local")
    code, rows = measured(folder, tiny_dir, "--tasks", "local", "--batch-size", "8")
    assert code == 0 and all(row["status"] == "done" for row in rows.values())
    return folder


@pytest.mark.evaluation
def test_every_benchmark_matches_its_task_in_lm_eval():
    """The table against lm-eval's task files, without data: names, numbers of subjects, metrics, splits, shots."""
    from evaluation import harness

    manager = harness.task_manager(own_only=False)
    sizes = {"mmlu": 57, "ceval-valid": 52, "agieval": 21, "bbh": 27}
    for line in (*CARD, *LOCAL):
        tasks = harness.members(manager, line.task)
        assert len(tasks) == sizes.get(line.task, 1), line.task
        for name, task in tasks.items():
            assert task == {"task": name}
            config = manager.task_index[name].cfg
            metric, of_filter = line.metric.split(",")
            if line.task != "humaneval":  # its metric is a function that reports pass@1
                assert metric in [str(entry["metric"]).split(".")[-1] for entry in config["metric_list"]], name
            filters = [entry["name"] for entry in config.get("filter_list") or [{"name": "none"}]]
            assert of_filter in filters, name
            assert line.split == (config.get("test_split") or config.get("validation_split")), name
            examples = (config.get("fewshot_config") or {}).get("samples")
            default = config.get("num_fewshot") or (len(examples) if isinstance(examples, list) else 0)
            assert line.sets_shots or line.shots == default, name
            assert line.runs_code == bool(config.get("unsafe_code")), name


@pytest.mark.evaluation
def test_the_tiny_model_solves_the_local_tasks(local_run: Path):
    """Chance level is 25 percent for the sentences and one in ten thousand for the keys."""
    rows = {row["task"]: row for row in json.loads((local_run / "table.json").read_text(encoding="utf-8"))["rows"]}
    assert rows["internlm_sentences"]["ours"] >= 90
    assert rows["internlm_recall"]["ours"] >= 5  # the English keys are in a form that it was not trained on
    assert {row["samples"] for row in rows.values()} == {64}
    assert not list((local_run / "cache").iterdir())


@pytest.mark.evaluation
def test_scores_do_not_depend_on_the_batch_size(local_run: Path, tiny_dir: Path, tmp_path: Path):
    """Prompts of different lengths, left-padded and decoded with the cache, get the same answers one by one."""
    measured(tmp_path, tiny_dir, "--tasks", "local", "--batch-size", "1")
    one, eight = answers(tmp_path, "internlm_recall"), answers(local_run, "internlm_recall")
    assert len({len(row["prompt"]) for row in local_rows("internlm_recall")}) > 8
    assert [row["resps"] for row in one] == [row["resps"] for row in eight]
    assert [row["exact_match"] for row in one] == [row["exact_match"] for row in eight]
    one, eight = answers(tmp_path, "internlm_sentences"), answers(local_run, "internlm_sentences")
    assert [row["acc"] for row in one] == [row["acc"] for row in eight]


@pytest.mark.evaluation
def test_likelihoods_are_the_models(local_run: Path, tiny_model, tiny_tokenizer):
    """lm-eval's score is the sum of the model's log-probabilities after <s>, with nothing truncated or added."""
    for row, sample in zip(
        local_rows("internlm_sentences")[:6], answers(local_run, "internlm_sentences"), strict=False
    ):
        for choice, scored in zip(row["choices"], sample["filtered_resps"], strict=True):
            ids = tiny_tokenizer(choice, return_tensors="pt").input_ids
            with torch.no_grad():
                logs = tiny_model(ids).logits[0, :-1].log_softmax(-1)
            expected = logs.gather(1, ids[0, 1:, None]).sum().item()
            assert math.isclose(float(scored[0]), expected, abs_tol=2e-3), choice


@pytest.mark.evaluation
def test_a_killed_run_resumes_within_the_task(local_run: Path, tiny_dir: Path, tmp_path: Path):
    """SIGKILL during the second task: the first is not run again, the second only runs the missing requests."""
    command = [sys.executable, str(ROOT / "evaluation" / "run.py"), "--model", str(tiny_dir), "--out", str(tmp_path)]
    command += ["--tasks", "local", "--batch-size", "1", "--dtype", "float32", "--device", "cpu"]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    cache = tmp_path / "cache" / "internlm_recall_rank0.db"
    deadline = time.monotonic() + 120
    while not (cache.exists() and cache_entries(cache) >= 5):
        assert process.poll() is None and time.monotonic() < deadline, "it finished before it could be killed"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / "raw" / "internlm_sentences.json").exists()
    assert not (tmp_path / "raw" / "internlm_recall.json").exists()
    first = (tmp_path / "raw" / "internlm_sentences.json").stat().st_mtime_ns

    code, _ = measured(tmp_path, tiny_dir, "--tasks", "local", "--batch-size", "8")
    result = json.loads((tmp_path / "raw" / "internlm_recall.json").read_text(encoding="utf-8"))
    assert code == 0
    assert 5 <= result["answered_before"] < result["requests"] == 64
    assert (tmp_path / "raw" / "internlm_sentences.json").stat().st_mtime_ns == first
    assert answers(tmp_path, "internlm_recall") == answers(local_run, "internlm_recall")


@pytest.mark.evaluation
def test_an_interrupted_run_reports_it_and_repeats_no_request(
    local_run: Path, tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    """Ctrl-C during the sixth request: five answers are kept, the table is printed, the next run requests 59."""
    from evaluation import harness

    generate, calls = harness.QuietLM._model_generate, iter(range(6))

    def until_the_sixth(self, *args, **kwargs):
        if next(calls) == 5:
            raise KeyboardInterrupt
        return generate(self, *args, **kwargs)

    command = ("--tasks", "internlm_recall", "--batch-size", "1")
    with monkeypatch.context() as patch:
        patch.setattr(harness.QuietLM, "_model_generate", until_the_sixth)
        code, rows = measured(tmp_path, tiny_dir, *command)
    assert (code, rows["internlm_recall"]["status"], rows["internlm_recall"]["ours"]) == (1, "not run yet", None)
    assert "Interrupted. Run the same command again to resume." in capsys.readouterr().err

    assert measured(tmp_path, tiny_dir, *command)[0] == 0
    result = json.loads((tmp_path / "raw" / "internlm_recall.json").read_text(encoding="utf-8"))
    assert (result["answered_before"], result["requests"]) == (5, 64)
    assert answers(tmp_path, "internlm_recall") == answers(local_run, "internlm_recall")


def cache_entries(path: Path) -> int:
    """How many answers lm-eval has cached so far."""
    import sqlite3

    try:
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as database:
            return database.execute("select count(*) from unnamed").fetchone()[0]
    except sqlite3.OperationalError:  # the table does not exist yet
        return 0


ARTICLE = "A gentle wind blew through the trees. We found a clear river and a green forest."
ROWS = {
    "internlm_cmrc": {
        "context": "来到美丽的大自然，我们发现山后有一条清澈的小河。",
        "question": "山后有什么？",
        "answers": {"text": ["小河", "一条清澈的小河"], "answer_start": [20, 15]},
    },
    "internlm_csl": {"abst": "白云在天上慢慢地走。", "keyword": ["白云", "天空"], "label": "1"},
    "internlm_race_middle": {
        "article": ARTICLE,
        "question": "What did we find?",
        "options": ["A river", "A car", "A key", "A dog"],
        "answer": "A",
    },
    "internlm_xsum": {"document": ARTICLE, "summary": "A river and a forest were found."},
    "boolq": {"passage": ARTICLE, "question": "did we find a river", "label": 1},
    "piqa": {"goal": "cross a river", "sol1": "walk over the bridge", "sol2": "eat the bridge", "label": 0},
}


@pytest.mark.evaluation
def test_the_cards_tasks_run_on_rows_in_the_form_of_their_data_sets(offline: None, tiny_dir: Path, tmp_path: Path):
    """One row each, in the form of the data set on the Hub, passed with --data: prompt, choices and metric fit."""
    for task, row in ROWS.items():
        (tmp_path / "data" / task).mkdir(parents=True)
        for split in {line_of(task).split} | ({"train"} if task in ("boolq", "piqa") else set()):
            (tmp_path / "data" / task / f"{split}.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    race = tmp_path / "data" / "internlm_race_middle"
    (tmp_path / "data" / "internlm_race_high").symlink_to(race, target_is_directory=True)
    tasks = [*ROWS, "internlm_race_high"]
    code, rows = measured(tmp_path / "out", tiny_dir, "--tasks", ",".join(tasks), "--data", str(tmp_path / "data"))
    assert code == 0
    assert {task: (row["status"], row["samples"]) for task, row in rows.items()} == dict.fromkeys(tasks, ("done", 1))
    assert all(row["difference"] == pytest.approx(row["ours"] - row["card"], abs=0.01) for row in rows.values())

    (tmp_path / "data" / "boolq" / "train.jsonl").unlink()
    _, rows = measured(tmp_path / "again", tiny_dir, "--tasks", "boolq", "--data", str(tmp_path / "data"))
    assert rows["boolq"]["status"] == "data not reachable" and "no train.jsonl" in rows["boolq"]["reason"]


@pytest.mark.evaluation
def test_malformed_rows_do_not_stop_other_tasks(offline: None, tiny_dir: Path, tmp_path: Path):
    """BoolQ's rows lack the passage, which fails while the work is estimated; PIQA is measured nevertheless."""
    rows = {"boolq": {"question": "did we find a river", "label": 1}, "piqa": ROWS["piqa"]}
    for task, row in rows.items():
        (tmp_path / task).mkdir()
        for split in ("train", "validation"):
            (tmp_path / task / f"{split}.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    code, lines = measured(tmp_path / "out", tiny_dir, "--tasks", "boolq,piqa", "--data", str(tmp_path))
    assert code == 1
    assert (lines["boolq"]["status"], lines["boolq"]["ours"]) == ("failed", None)
    assert "'passage' is undefined" in lines["boolq"]["reason"]
    assert (lines["piqa"]["status"], lines["piqa"]["samples"]) == ("done", 1)


@pytest.mark.evaluation
def test_prompts_beyond_the_window_are_counted(local_run: Path, tiny_dir: Path, tiny_tokenizer, tmp_path: Path):
    """A prompt that leaves no space for the 12 tokens of its answer is truncated, but never silently."""
    cut = [json.loads((local_run / "raw" / f"{line.task}.json").read_text())["cut"] for line in LOCAL]
    assert cut == [0, 0]
    lengths = sorted(len(tiny_tokenizer(row["prompt"]).input_ids) for row in local_rows("internlm_recall"))
    window = lengths[40] + 12
    _, rows = measured(tmp_path, tiny_dir, "--tasks", "internlm_recall", "--max-length", str(window))
    assert rows["internlm_recall"]["cut"] == sum(length > lengths[40] for length in lengths) > 0
    assert "(see --max-length)" in (tmp_path / "table.md").read_text(encoding="utf-8")


@pytest.fixture
def code_eval(offline: None, monkeypatch: pytest.MonkeyPatch):
    """The metric as lm-eval's tasks load it: by name, from the working directory."""
    import evaluate

    monkeypatch.chdir(ROOT / "evaluation")
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    return evaluate.load("code_eval")


ADD = "def add(a, b):\n    return a + b\n"


@pytest.mark.evaluation
@pytest.mark.parametrize(
    ("program", "result"),
    [
        (ADD, "passed"),
        (ADD.replace("+", "*"), "failed"),
        ("def add(a, b) return", "failed"),
        ("import sys\nsys.exit(0)", "failed"),
        ("import os\nos._exit(0)", "failed"),
        ("while True: pass", "timed out"),
        ("10 ** 10 ** 10", "timed out"),  # one long computation in C, where no handler of a signal runs
        ("while True:\n    try:\n        while True: pass\n    except BaseException: pass", "timed out"),
        ("while True: print('x' * 9999)", "timed out"),
        (f"import sys\nfor _ in range(99): print('x' * 9999, file=sys.stderr)\n{ADD}", "passed"),
        (f"everything = bytearray(5 << 30)\n{ADD}", "failed"),
        (f"import threading, time\nthreading.Thread(target=time.sleep, args=[200]).start()\n{ADD}", "passed"),
        (f"import os\nos.remove('file')\n{ADD}", "failed"),
        (f"open('file', 'w').write('x')\n{ADD}", "passed"),
        (f"input()\n{ADD}", "failed"),
    ],
)
def test_a_program_passes_only_if_it_and_its_tests_end(code_eval, tmp_path: Path, program: str, result: str):
    """Whatever it does instead ends within its time, and leaves no file in the working directory."""
    files = set(Path.cwd().iterdir())
    tests = "assert add(2, 3) == 5\nassert add(2, 2) == 4\nassert add(0, 1) == 1"
    started = time.monotonic()
    scores, results = code_eval.compute(predictions=[[program]], references=[tests], k=[1], timeout=1.0)
    assert time.monotonic() - started < 40
    assert results[0][0][1]["result"] == result
    assert scores == {"pass@1": float(result == "passed")}
    assert set(Path.cwd().iterdir()) == files


@pytest.mark.evaluation
def test_every_test_counts(code_eval):
    tests = ["assert add(2, 2) == 4\nassert add(2, 3) == 5", "assert add(2, 2) == 4"]
    times = ADD.replace("+", "*")
    scores, results = code_eval.compute(predictions=[[times, ADD]] * 2, references=tests, k=[1])
    assert [[each["passed"] for _, each in results[problem]] for problem in (0, 1)] == [[False, True], [True, True]]
    assert scores == {"pass@1": 0.75}


@pytest.mark.evaluation
def test_pass_at_k_is_the_published_definition(code_eval):
    """The share of all choices of k among n programs with at least one that passes; left out where n < k."""
    right, wrong = ADD, "pass"
    problems = [[wrong, wrong, right, wrong, right], [wrong] * 4, [right, wrong, wrong, wrong]]
    scores, _ = code_eval.compute(predictions=problems, references=["assert add(1, 2) == 3"] * 3, k=[1, 2, 4, 5])
    assert set(scores) == {"pass@1", "pass@2", "pass@4"}
    for k in (1, 2, 4):
        chosen = [list(itertools.combinations([program is right for program in each], k)) for each in problems]
        expected = sum(sum(map(any, each)) / len(each) for each in chosen) / len(chosen)
        assert scores[f"pass@{k}"] == pytest.approx(expected)


@pytest.mark.evaluation
def test_nothing_is_run_unless_it_is_allowed(code_eval, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL")
    with pytest.raises(ValueError, match="HF_ALLOW_CODE_EVAL=1 allows it"):
        code_eval.compute(predictions=[[ADD]], references=["pass"], k=[1])


@pytest.fixture(scope="module")
def humaneval(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for --data with HumanEval's 164 problems."""
    folder = tmp_path_factory.mktemp("data")
    subprocess.run([sys.executable, ROOT / "evaluation" / "make_humaneval_data.py", folder], check=True)
    return folder


@pytest.mark.evaluation
def test_the_written_solutions_of_humaneval_pass(code_eval, humaneval: Path):
    """And a function without a body does not; every eighth of the 164 problems, as each takes two processes."""
    rows = [json.loads(row) for row in (humaneval / "humaneval" / "test.jsonl").read_text().splitlines()]
    assert len(rows) == 164
    programs = [[row["prompt"] + row["canonical_solution"], row["prompt"] + "    pass\n"] for row in rows[::8]]
    tests = [f"{row['test']}\ncheck({row['entry_point']})" for row in rows[::8]]
    _, results = code_eval.compute(predictions=programs, references=tests, k=[1], timeout=20.0)
    assert [[each["passed"] for _, each in verdicts] for verdicts in results.values()] == [[True, False]] * 21


@pytest.mark.evaluation
def test_generated_code_is_run_and_scored_if_allowed(tiny_dir: Path, tmp_path: Path):
    """A HumanEval row whose string literal swallows whatever the tiny model generates: the first check passes."""
    row = {"task_id": "0", "entry_point": "one", "prompt": 'def one():\n    return 1\n"""'}
    checks = [f'"""\ndef check(one):\n    assert one() == {expected}\n' for expected in (1, 2)]
    lines = "".join(json.dumps(row | {"test": check}) + "\n" for check in checks)
    (tmp_path / "data" / "humaneval").mkdir(parents=True)
    (tmp_path / "data" / "humaneval" / "test.jsonl").write_text(lines, encoding="utf-8")
    command = [sys.executable, str(ROOT / "evaluation" / "run.py"), "--model", str(tiny_dir), "--out", "out"]
    command += ["--tasks", "humaneval", "--data", "data", "--max-length", "1100", "--dtype", "float32"]
    ran = subprocess.run(
        [*command, "--device", "cpu", "--allow-code-execution"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=290,
    )
    assert ran.returncode == 0, ran.stderr
    assert "| HumanEval | 50.00 | 50.00 | 25.61 | +24.39 | 0 | pass@1 | 2 |" in ran.stdout
    assert "HumanEval humaneval:" in ran.stderr
    for other_bar in ("Checking cached requests", "Generating test split", "Loading weights"):
        assert other_bar not in ran.stderr


@pytest.mark.evaluation
def test_the_documented_splits_are_those_that_tasks_read():
    """docs/evaluation.md says which files `--data` needs, as load_task requires them."""
    from evaluation import harness

    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    documented = {
        task: set(splits.split(", "))
        for tasks, splits in re.findall(r"^\| ((?:`\w[\w-]*`(?:, )?)+)[^|]*\| ([a-z, ]+) \|$", page, re.M)
        for task in re.findall(r"`(.+?)`", tasks)
    }
    manager = harness.task_manager(own_only=False)
    read = {
        line.task: {
            split
            for task in harness.members(manager, line.task).values()
            for split in harness.splits(harness.config_of(manager, task))
        }
        for line in CARD
    }
    assert documented == read


@pytest.mark.evaluation
def test_groups_and_tags_are_resolved_with_what_groups_change():
    """A result under other settings is another result: a group's 25 shots are not the task's none."""
    from evaluation import harness

    manager = harness.task_manager(own_only=False)
    assert harness.members(manager, "ai2_arc") == {name: {"task": name} for name in ("arc_challenge", "arc_easy")}
    openllm = harness.members(manager, "openllm")
    assert openllm["arc_challenge@openllm"] == {"task": "arc_challenge", "fewshot_split": "train", "num_fewshot": 25}
    nested = harness.members(manager, "mmlu_continuation")  # four groups that are defined within it, each with a tag
    assert len(nested) == 57 and "mmlu_anatomy_continuation" in nested
    assert [line.task for line in harness.others(["ai2_arc", "arc_easy", "openllm"])] == [
        "arc_challenge",
        "arc_easy",
        "openllm",
    ]
    assert [line.runs_code for line in harness.others(["humaneval_instruct", "arc_easy"])] == [True, False]


@pytest.mark.evaluation
def test_unknown_names_are_refused_with_similar_ones():
    with pytest.raises(SystemExit, match=r"has 'arc_esay' \(similar: .*arc_easy.*\), 'qqqqq'\. --list-tasks WORD"):
        run.main(["--model", "anything", "--tasks", "piqa,arc_esay,qqqqq"])


@pytest.mark.evaluation
def test_tasks_are_listed(capsys):
    """The card's seventeen and the two local ones, and how many lm-eval has; or the names with a word."""
    assert run.main(["--list-tasks"]) == 0
    shown = capsys.readouterr().out
    for line in (*CARD, *LOCAL):
        assert re.search(rf"^  {re.escape(line.task)} +{re.escape(line.name)} +{line.shots} shots", shown, re.M)
    assert re.search(r"lm-eval's others: \d{4,} tasks, \d+ groups, \d+ tags\.", shown)
    assert run.main(["--list-tasks", "ARC"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert {"  arc_easy (task)", "  ai2_arc (tag)"} <= set(listed)
    assert all("arc" in line.lower() for line in listed[1:]) and not any("MMLU" in line for line in listed)


def choice(number: int) -> dict:
    """A row in the form of ARC."""
    choices = {"text": ["A river", "A car", "A key", "A dog"], "label": ["A", "B", "C", "D"]}
    return {"id": str(number), "question": f"What did we find on day {number}?", "choices": choices, "answerKey": "A"}


@pytest.fixture(scope="module")
def arc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for --data: two rows for PIQA, and for the two tasks of the tag ai2_arc.

    The training rows are others, as lm-eval takes no example that equals the row it is for.
    """
    folder = tmp_path_factory.mktemp("arc")
    for task, row in (("piqa", ROWS["piqa"]), ("arc_easy", choice(0)), ("arc_challenge", choice(0))):
        (folder / task).mkdir()
        for split in ("train", "validation", "test"):
            rows = [row] * 2
            if split == "train":
                rows = (
                    [choice(7), choice(8)] if task != "piqa" else [row | {"goal": f"on day {day}"} for day in (7, 8)]
                )
            text = "".join(json.dumps(each) + "\n" for each in rows)
            (folder / task / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return folder


@pytest.mark.evaluation
def test_a_later_run_keeps_the_rows_of_earlier_ones(offline: None, arc: Path, tiny_dir: Path, tmp_path: Path):
    """In the card's order, then lm-eval's other tasks; the exit code is about what was asked for this time."""
    data = ("--data", str(arc))
    code, rows = measured(tmp_path, tiny_dir, "--tasks", "ai2_arc", *data)
    assert code == 0 and list(rows) == ["arc_challenge", "arc_easy"]
    assert {(row["metric"], row["shots"], row["samples"]) for row in rows.values()} == {("acc,none", 0, 2)}
    code, rows = measured(tmp_path, tiny_dir, "--tasks", "humaneval", *data)
    assert code == 1 and list(rows) == ["humaneval", "arc_challenge", "arc_easy"]
    code, rows = measured(tmp_path, tiny_dir, "--tasks", "piqa", *data)
    assert code == 0 and list(rows) == ["piqa", "humaneval", "arc_challenge", "arc_easy"]
    assert [row["status"] for row in rows.values()] == ["done", "off", "done", "done"]
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    for row in ("| PIQA | ", "| HumanEval | off |", "| arc_challenge | ", f"- HumanEval: off: {CODE_IS_OFF}"):
        assert f"\n{row}" in table


@pytest.mark.evaluation
def test_shots_and_chat_template_change_the_prompt(
    offline: None, arc: Path, tiny_dir: Path, tiny_tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Every task gets the number of shots, as turns of a chat if asked; the model sees the template's own tokens."""
    from evaluation import harness

    seen = []
    encode = harness.QuietLM._encode_pair

    def watched(self, context: str, continuation: str):
        ids, more = encode(self, context, continuation)
        seen.append((context, [*ids, *more]))
        return ids, more

    monkeypatch.setattr(harness.QuietLM, "_encode_pair", watched)
    command = ("--tasks", "arc_easy,piqa", "--data", str(arc), "--num-fewshot", "1")
    code, rows = measured(tmp_path / "plain", tiny_dir, *command)
    assert code == 0 and {row["shots"] for row in rows.values()} == {1}
    assert any(
        re.fullmatch(r"Question: .* day [78]\?\nAnswer: A river\n\nQuestion: .* day 0\?\nAnswer:", s) for s, _ in seen
    )
    seen.clear()
    code, rows = measured(tmp_path / "chat", tiny_dir, *command, "--apply-chat-template")
    assert code == 0 and {row["shots"] for row in rows.values()} == {1}
    context, ids = next((context, ids) for context, ids in seen if "day 0" in context)
    shot = re.search(r"day ([78])", context)
    assert shot
    turns = [
        f"Question: What did we find on day {shot[1]}?\nAnswer:",
        "A river",
        "Question: What did we find on day 0?\nAnswer:",
    ]
    chat = [{"role": role, "content": text} for role, text in zip(("user", "assistant", "user"), turns, strict=True)]
    expected = tiny_tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert ids[: len(expected)] == expected
    with pytest.raises(SystemExit, match="apply_chat_template False, now True"):
        measured(tmp_path / "plain", tiny_dir, *command, "--apply-chat-template")


@pytest.mark.evaluation
def test_without_a_chat_template_there_is_no_chat(offline: None, arc: Path, tiny_dir: Path, tmp_path: Path):
    model = shutil.copytree(tiny_dir, tmp_path / "model")
    (model / "chat_template.jinja").unlink()
    with pytest.raises(SystemExit, match="has no chat template, which --apply-chat-template needs"):
        measured(tmp_path / "out", model, "--tasks", "piqa", "--data", str(arc), "--apply-chat-template")


@pytest.mark.evaluation
@pytest.mark.parametrize(("task", "steps"), (("internlm_recall", 4 + 8), ("internlm_sentences", 4)))
def test_the_bar_moves_within_a_batch(
    offline: None, tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str, steps: int
):
    """All requests are one batch, whose answers come together at its end.

    The bar counts its layers and tokens before that: 4 layers, and 12 tokens, unless every answer ends before.
    """
    from evaluation import harness

    shown, answered = [], []
    show, add = harness.Evaluation.show, harness.NotifyingHook.add_partial

    def watched_show(self) -> None:
        show(self)
        shown.append((len(answered), self.bar.n, self.bar.total))

    def watched_add(self, *args) -> None:
        answered.append(args)
        add(self, *args)

    monkeypatch.setattr(harness.Evaluation, "show", watched_show)
    monkeypatch.setattr(harness.NotifyingHook, "add_partial", watched_add)
    measured(tmp_path, tiny_dir, "--tasks", task, "--batch-size", "256")
    before = [done for answers_so_far, done, _ in shown if answers_so_far == 0]
    assert len(before) >= steps and before == sorted(set(before))
    numbers = [done for _, done, _ in shown]
    assert numbers == sorted(numbers) and numbers[-1] == pytest.approx(shown[-1][2])


@pytest.mark.evaluation
@pytest.mark.real
def test_the_real_model_gets_lm_evals_own_samples_and_scores_as_a_llama(
    humaneval: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """HumanEval's first 4 problems, 64 tokens each, beside the original Llama in lm-eval itself, offline."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer, LlamaForCausalLM

    from evaluation import harness

    load = harness.load_task

    def shortened(*args):
        task = load(*args)
        task.set_config(key="generation_kwargs", value={"max_gen_toks": 64}, update=True)
        return task

    with monkeypatch.context() as patch:
        patch.setattr(harness, "load_task", shortened)
        patch.setenv("HF_ALLOW_CODE_EVAL", "1")
        command = ("--tasks", "humaneval", "--data", str(humaneval), "--limit", "4", "--allow-code-execution")
        code, rows = measured(tmp_path / "out", REAL, *command)
    assert code == 0
    samples = answers(tmp_path / "out", "humaneval")

    # As docs/evaluation.md describes it: a folder where lm-eval finds the metric and the data by their names.
    (tmp_path / "openai").mkdir()
    (tmp_path / "openai" / "openai_humaneval").symlink_to(humaneval / "humaneval", target_is_directory=True)
    (tmp_path / "code_eval").symlink_to(ROOT / "evaluation" / "code_eval", target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    llama = LlamaForCausalLM.from_pretrained(REAL, gguf_file="model.gguf", dtype=torch.float32)
    theirs = simple_evaluate(
        HFLM(pretrained=llama, tokenizer=AutoTokenizer.from_pretrained(REAL, trust_remote_code=True), batch_size=8),
        tasks=["humaneval"],
        limit=4,
        gen_kwargs={"max_gen_toks": 64},
        task_manager=harness.task_manager(own_only=False),
        confirm_run_unsafe_code=True,
    )
    assert [sample["resps"] for sample in samples] == [sample["resps"] for sample in theirs["samples"]["humaneval"]]
    # Two of the four prompts are answered with text, two end at once: the model is trained for chats.
    assert sum(len(sample["resps"][0][0]) > 100 for sample in samples) == 2
    score, stderr = (theirs["results"]["humaneval"][f"pass@1{key},create_test"] for key in ("", "_stderr"))
    assert (rows["humaneval"]["ours"], rows["humaneval"]["stderr"]) == (round(100 * score, 2), round(100 * stderr, 2))


@pytest.mark.evaluation
def test_unreachable_data_and_disabled_code_are_not_scored(offline: None, tiny_dir: Path, tmp_path: Path, capsys):
    code, rows = measured(tmp_path, tiny_dir, "--tasks", "internlm_cmrc,bbh,humaneval,mbpp")
    assert code == 1
    assert {task: row["status"] for task, row in rows.items()} == {
        "internlm_cmrc": "data not reachable",
        "bbh": "data not reachable",
        "humaneval": "off",
        "mbpp": "off",
    }
    assert all(row["ours"] is None and row["difference"] is None for row in rows.values())
    shown = capsys.readouterr()
    assert shown.out.count(CODE_IS_OFF) == 2
    assert "Couldn't reach 'hfl/cmrc2018'" in shown.out
    assert shown.err.count("BBH: data not reachable") == 1  # not once for each of its 27 sets
