"""The card's seventeen benchmarks: the lm-eval task that measures each, and how the published score was computed.

The published scores come from OpenCompass 20230920. What is noted here about its method comes from its public
repository (the collection for base models, `base_medium`, at commits 014fb105 and 78583343, both later than the card)
and from the card itself: a share of n samples has only n + 1 possible values, so the scores of seven models determine
n (tests/test_evaluation.py checks every `official_samples` against them). `official` is what is known and `differs`
what is done differently here. In any case lm-eval words its prompts differently; our own tasks do not.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Benchmark:
    """One row of the table."""

    name: str  # as the card prints it
    dimension: str  # the card's group
    card: float | None  # InternLM-20B's published score in percent; None: not in the card
    task: str  # lm-eval's task, or a group whose tasks are averaged without weights, as in OpenCompass
    shots: int | None  # examples in the prompt; None: as many as lm-eval's task has
    metric: str | None  # the key in lm-eval's results: metric,filter; None: the first that the task lists
    split: str | None  # the split of the data set that is scored; None: as in lm-eval's task
    official: str = ""  # how the published score was computed
    differs: str = ""  # what is done differently here
    official_samples: int | None = None  # the number of samples behind the published score
    sets_shots: bool = False  # the task has no or another default: pass `shots` to lm-eval
    runs_code: bool = False  # scoring executes generated code


CARD = (
    Benchmark(
        "MMLU", "Examination", 62.05, "mmlu", 5, "acc,none", "test",
        official="5 shots from dev, likelihood of A, B, C, D, mean of 57 subjects (mmlu_ppl_ac766d)",
        sets_shots=True,
    ),
    Benchmark(
        "C-Eval (val)", "Examination", 58.8, "ceval-valid", 5, "acc,none", "val",
        official="5 shots from dev, likelihood of A, B, C, D, mean of 52 subjects (ceval_ppl_578f8d)",
        differs="lm-eval's prompt does not name the subject",
        sets_shots=True,
    ),
    Benchmark(
        "AGI-Eval", "Examination", 44.58, "agieval", 0, "acc,none", "test",
        official="0 shots, mean of 21 sets; likelihood of the letter, but two law sets and two cloze sets are "
        "generated (agieval_mixed)",
        differs="lm-eval also takes the law sets by likelihood, and stops the cloze answers after 32 tokens",
    ),
    Benchmark(
        "BoolQ", "Knowledge", 87.46, "boolq", 0, "acc,none", "validation",
        official="0 shots, likelihood of the passage, the question and Yes or No (SuperGLUE_BoolQ_ppl_314b96)",
        official_samples=3270,
    ),
    Benchmark(
        "TriviaQA", "Knowledge", 57.26, "triviaqa", 0, "exact_match,remove_whitespace", "validation",
        official="0 shots, generated, first line after 'answer is' equal to an alias, on the 8837 questions of the "
        "retrieval literature's dev set (triviaqa_gen_2121ce)",
        differs="lm-eval takes all 17944 validation questions and does not ask for 'The answer is'",
        official_samples=8837,
    ),
    Benchmark(
        "NaturalQuestions", "Knowledge", 25.15, "nq_open", 0, "exact_match,remove_whitespace", "validation",
        official="0 shots, generated, first line after 'answer is' equal to an answer (nq_gen_c788f6)",
        differs="lm-eval does not ask for 'The answer is'",
        official_samples=3610,
    ),
    Benchmark(
        "CMRC", "Understanding", 68.78, "internlm_cmrc", 0, "exact_match,none", "validation",
        official="0 shots, generated, exact match of what follows 'the answer is' (CLUE_CMRC_gen_1bd3c8)",
        differs="our own task",
        official_samples=3219,
    ),
    Benchmark(
        "CSL", "Understanding", 65.62, "internlm_csl", 0, "acc_norm,none", "validation",
        official="0 shots, perplexity of the abstract with and without its keywords; the card's numbers are shares of "
        "160, the size of FewCLUE's dev_few_all (FewCLUE_csl_ppl_841b62). One sample is 0.6 points",
        differs="our own task, likelihood per character instead of per token",
        official_samples=160,
    ),
    Benchmark(
        "RACE (middle)", "Understanding", 86.35, "internlm_race_middle", 0, "acc,none", "test",
        official="0 shots, the options are shown, likelihood of A, B, C, D (race_ppl_a138cd)",
        differs="our own task",
        official_samples=1436,
    ),
    Benchmark(
        "RACE (high)", "Understanding", 83.28, "internlm_race_high", 0, "acc,none", "test",
        official="0 shots, the options are shown, likelihood of A, B, C, D (race_ppl_a138cd)",
        differs="our own task, as lm-eval's `race` hides the options and asks 1045 of the questions",
        official_samples=3498,
    ),
    Benchmark(
        "XSum", "Understanding", 35.54, "internlm_xsum", 0, "rouge1,none", "validation",
        official="0 shots, generated, ROUGE-1 of the first line on the first 1000 documents (Xsum_gen_31397e); that "
        "the card shows ROUGE-1 is the summariser's default, nowhere stated",
        differs="our own task, as lm-eval's `xsum` needs one more package and asks differently",
    ),
    Benchmark(
        "WinoGrande", "Reasoning", 69.38, "winogrande", 0, "acc,none", "validation",
        official="0 shots, perplexity of the two whole sentences (winogrande_ppl_55a66e, judging by the level: its "
        "own comment says it reaches 62.3 where a paper reports 69.2)",
        differs="lm-eval scores only what follows the gap, which gives several points more",
        official_samples=1267,
    ),
    Benchmark(
        "BBH", "Reasoning", 52.51, "bbh", 3, "exact_match,get-answer", "test",
        official="3 shots with reasoning, generated, mean of 27 sets (bbh_gen_5b92b0)",
        differs="up to 1024 new tokens instead of 512",
    ),
    Benchmark(
        "GSM8K", "Reasoning", 52.62, "gsm8k", 4, "exact_match,flexible-extract", "test",
        official="4 fixed shots with reasoning, generated, the last number counts (gsm8k_gen_1d7fe4)",
        differs="four shots drawn from train with a fixed seed",
        official_samples=1319,
        sets_shots=True,
    ),
    Benchmark(
        "PIQA", "Reasoning", 80.25, "piqa", 0, "acc_norm,none", "validation",
        official="0 shots, perplexity of question and solution (piqa_ppl_1cf9f0)",
        differs="likelihood of the solution per character instead of everything per token",
        official_samples=1838,
    ),
    Benchmark(
        "HumanEval", "Programming", 25.61, "humaneval", 0, "pass@1,create_test", "test",
        official="0 shots, greedy, pass@1 (humaneval_gen_8e312c)",
        differs="the bare function head, without the line 'Complete the following python code'",
        official_samples=164,
        runs_code=True,
    ),
    Benchmark(
        "MBPP", "Programming", 35.6, "mbpp", 3, "pass_at_1,none", "test",
        official="3 shots, greedy, pass@1 (mbpp_gen_1e1056)",
        official_samples=500,
        runs_code=True,
    ),
)  # fmt: skip

# Two tasks whose data are part of the repository: no download, and the tiny checkpoint can solve them.
LOCAL = (
    Benchmark("Sentences (local)", "Local", None, "internlm_sentences", 0, "acc,none", "test"),
    Benchmark("Recall (local)", "Local", None, "internlm_recall", 0, "exact_match,none", "test"),
)

OTHER = "Other"


def other(task: str, runs_code: bool = False) -> Benchmark:
    """Any other task or group of lm-eval, as it is there."""
    return Benchmark(task, OTHER, None, task, None, None, None, runs_code=runs_code)


CODE_IS_OFF = "scoring runs generated Python code on this machine; --allow-code-execution enables it"


def select(names: str) -> tuple[list[Benchmark], list[str]]:
    """The benchmarks selected by `--tasks`: all (the card's), local, or a list of card or task names in any case.

    Returns:
        The benchmarks, and the names that are none of them: lm-eval's other tasks, or mistakes.

    Raises:
        SystemExit: There is no name.
    """
    known = {key.lower(): (line,) for line in (*CARD, *LOCAL) for key in (line.name, line.task)}
    known |= {"all": CARD, "local": LOCAL}
    wanted = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    if not wanted:
        raise SystemExit(f"--tasks: {names!r} has no name of a task; --list-tasks lists them")
    lines = dict.fromkeys(line for name in wanted for line in known.get(name.lower(), ()))
    return list(lines), [name for name in wanted if name.lower() not in known]
