"""Run tests/matrix_check.py on every supported transformers: `make matrix`, or `python tools/matrix.py --help`.

Each version gets a fresh environment under .venvs/matrix (uv links the packages from its cache, so torch is stored
once) and a fresh process. Prints one line per version and the table, writes the table to README.md, and exits with 1
if anything failed; the full log of each version is .venvs/matrix/<version>.txt.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm


ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENTS = ROOT / ".venvs" / "matrix"
REQUIREMENTS = ("requirements.txt", "requirements-dev.txt")
# The oldest supported version, those that serving and training tools pin (docs/compatibility.md), and the newest.
VERSIONS = ["4.57.6", "5.0.0", "5.4.0", "5.6.0", "5.8.1", "5.12.1"]
VERSIONS += ["5.16.1", "5.17.0", "5.19.0", "5.20.2", "5.23.0", "5.24.0"]
TOO_OLD = "4.56.2"
# The area of a check is in its name, test_<area>_...; all other checks are those of tests/test_golden.py.
AREAS = {"loading": "load, save, load", "tokenizer": "tokenizer", "chat": "chat template", "training": "checkpointing"}
GOLDEN = "goldens, generate, cache, heads"


@dataclass
class Outcome:
    """The result of the checks on one version: passed and total, by area."""

    version: str
    seconds: float
    problem: str = ""
    passed: Counter = field(default_factory=Counter)
    total: Counter = field(default_factory=Counter)

    @property
    def ok(self) -> bool:
        return not self.problem and bool(self.total) and self.passed == self.total

    def cells(self) -> list[str]:
        areas = (GOLDEN, *AREAS.values())
        return [self.problem] * len(areas) if self.problem else [f"{self.passed[a]}/{self.total[a]}" for a in areas]


def pins(*names: str) -> list[str]:
    """The `name==version` lines of the requirements files for these packages."""
    lines = [line for file in REQUIREMENTS for line in (ROOT / file).read_text().splitlines()]
    return [line for name in names for line in lines if line.startswith(f"{name}==")]


def install(version: str, log: Path) -> Path:
    """Create a fresh environment for one version and return its Python; CalledProcessError if uv fails."""
    folder = ENVIRONMENTS / version
    shutil.rmtree(folder, ignore_errors=True)
    uv = [sys.executable, "-m", "uv"]
    links = os.environ.get("PIP_FIND_LINKS", "").split()
    python = folder / "bin" / "python"
    packages = [f"transformers=={version}", *pins("torch", "accelerate", "jinja2", "pytest", "pytest-timeout")]
    with log.open("w") as file:
        for command in (
            [*uv, "venv", "--quiet", "--python", sys.executable, str(folder)],
            [*uv, "pip", "install", "--quiet", "--python", str(python), *(f"--find-links={link}" for link in links)]
            + packages,
        ):
            subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=True)
    return python


def check(version: str, newest: bool, threads: int) -> Outcome:
    """Install one version and run the checks on it."""
    start = time.monotonic()
    log, report = ENVIRONMENTS / f"{version}.txt", ENVIRONMENTS / f"{version}.xml"
    report.unlink(missing_ok=True)
    environment = os.environ | {
        "HF_HOME": str(ENVIRONMENTS / version / "home"),  # remote code is copied there: not to be shared
        "HF_HUB_OFFLINE": "1",
        "MATRIX_NEWEST": str(int(newest)),
        "MATRIX_VERSION": version,
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
    }
    try:
        python = install(version, log)
        command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/matrix_check.py"]
        with log.open("a") as file:
            status = subprocess.run(
                [*command, f"--junit-xml={report}"], cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT
            ).returncode
    except subprocess.CalledProcessError:
        status = None
    outcome = Outcome(version, time.monotonic() - start)
    if status not in (0, 1):  # pytest: all passed, some failed; with any other, not all tests ran
        outcome.problem = "did not run"
        return outcome
    for case in ElementTree.parse(report).iter("testcase"):
        area = AREAS.get(case.attrib["name"].split("_")[1].split("[")[0], GOLDEN)
        outcome.total[area] += 1
        outcome.passed[area] += len(case) == 0  # a child element is a failure, an error or a skip
    return outcome


def is_refused(version: str) -> bool:
    """Whether, on a version that is too old, every Auto class fails with an error that names the version needed.

    The repository itself serves as the model folder: loading fails before the missing weights matter.
    """
    log = ENVIRONMENTS / f"{version}.txt"
    python, messages = install(version, log), []
    for auto in ("AutoConfig", "AutoTokenizer", "AutoModelForCausalLM"):
        load = f"import transformers; transformers.{auto}.from_pretrained('.', trust_remote_code=True)"
        environment = os.environ | {"HF_HOME": str(ENVIRONMENTS / version / "home"), "HF_HUB_OFFLINE": "1"}
        process = subprocess.run([python, "-c", load], cwd=ROOT, env=environment, capture_output=True, text=True)
        messages.append(process.stderr.strip().rpartition("\n")[2])
    log.write_text("\n".join(messages))
    shutil.rmtree(ENVIRONMENTS / version, ignore_errors=True)
    return all(line.startswith("ImportError: InternLM needs transformers 4.57 or newer") for line in messages)


def table(outcomes: list[Outcome]) -> str:
    """The Markdown table of README.md: passed / total, by area."""
    rows = [["transformers", GOLDEN, *AREAS.values()]]
    rows += [["---"] + ["--:"] * (len(rows[0]) - 1)]
    rows += [[outcome.version, *outcome.cells()] for outcome in outcomes]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def write_readme(text: str) -> None:
    readme = ROOT / "README.md"
    old = readme.read_text(encoding="utf-8")
    new, found = re.subn(r"(<!-- matrix -->\n).*?(<!-- /matrix -->)", rf"\g<1>{text}\n\g<2>", old, flags=re.DOTALL)
    if found != 1:
        raise SystemExit(f"README.md must have one block <!-- matrix --> ... <!-- /matrix -->, and has {found}.")
    if new != old:
        readme.write_text(new, encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--versions", nargs="+", default=VERSIONS, metavar="X.Y.Z", help=f"default: {VERSIONS}")
    parser.add_argument(
        "--jobs", type=int, default=2, help="versions in parallel (default: 2; each takes a CPU minute)"
    )
    parser.add_argument("--keep", action="store_true", help="keep the environments (0.9 GB each, mostly shared)")
    arguments = parser.parse_args()
    ENVIRONMENTS.mkdir(parents=True, exist_ok=True)
    threads = max(1, (os.cpu_count() or 1) // arguments.jobs)
    outcomes = {}
    with ThreadPoolExecutor(arguments.jobs) as pool, tqdm(total=len(arguments.versions), unit="version") as bar:
        tasks = [pool.submit(check, version, version == VERSIONS[-1], threads) for version in arguments.versions]
        for task in as_completed(tasks):
            outcome = outcomes[task.result().version] = task.result()
            if not arguments.keep:
                shutil.rmtree(ENVIRONMENTS / outcome.version, ignore_errors=True)
            verdict = "passed" if outcome.ok else f"FAILED, see {ENVIRONMENTS.relative_to(ROOT)}/{outcome.version}.txt"
            bar.write(f"{outcome.version:8} {outcome.seconds:4.0f} s  {verdict}")
            bar.update()
    ordered = [outcomes[version] for version in arguments.versions]
    text = table(ordered)
    print(text)
    if arguments.versions == VERSIONS:
        write_readme(text)
    refused = is_refused(TOO_OLD)
    print(f"{TOO_OLD} is {'refused' if refused else 'NOT refused'} with an error that names the version needed")
    return 0 if refused and all(outcome.ok for outcome in ordered) else 1


if __name__ == "__main__":
    sys.exit(main())
