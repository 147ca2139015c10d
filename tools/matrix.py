"""Run tests/matrix_check.py on every supported transformers: `make matrix`, or `python tools/matrix.py --help`.

Each version gets a fresh environment under .venvs/matrix (uv links the packages from its cache, so torch is stored
once) and a fresh process. Prints one line per version and the table, writes the table to README.md, and exits with 1
if anything failed; the full log of each version is .venvs/matrix/<version>.txt.

With `--torch` the same for versions of torch, each with the oldest and the newest transformers and, with the newest,
all of `make test`; that table is written to docs/compatibility.md.
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
# Of torch: the oldest that the newest transformers takes, and the newest.
TORCH_VERSIONS = ["2.6.0", "2.15.0"]
# The packages of tests/matrix_check.py.
CHECK_PACKAGES = ("torch", "transformers", "accelerate", "jinja2", "pytest", "pytest-timeout")
# The area of a check is in its name, test_<area>_...; all other checks are those of tests/test_golden.py.
AREAS = {"loading": "load, save, load", "tokenizer": "tokenizer", "chat": "chat template", "training": "checkpointing"}
GOLDEN = "goldens, generate, cache, heads"


@dataclass(frozen=True)
class Versions:
    """What an environment holds; without `torch`, the one of requirements.txt."""

    transformers: str
    torch: str = ""

    def __str__(self) -> str:
        return f"torch-{self.torch}-transformers-{self.transformers}" if self.torch else self.transformers

    @property
    def newest(self) -> bool:
        return self.transformers == VERSIONS[-1]

    @property
    def all_tests(self) -> bool:
        return self.newest and bool(self.torch)

    def packages(self) -> list[str]:
        lines = [line for file in REQUIREMENTS for line in (ROOT / file).read_text().splitlines()]
        pins = dict(line.split("==", 1) for line in lines if "==" in line)
        pins |= {"transformers": self.transformers} | ({"torch": self.torch} if self.torch else {})
        return [f"{name}=={pins[name]}" for name in (pins if self.all_tests else CHECK_PACKAGES)]


@dataclass
class Outcome:
    """How many checks, by area, and how many tests of `make test` passed, were skipped and failed on some versions."""

    versions: Versions
    seconds: float = 0.0
    problem: str = ""
    checks: dict[str, Counter] = field(default_factory=lambda: {area: Counter() for area in (GOLDEN, *AREAS.values())})
    tests: Counter = field(default_factory=Counter)

    @property
    def ok(self) -> bool:
        happened = sum(self.checks.values(), self.tests)
        fine = {"passed", "skipped"} if self.versions.torch else {"passed"}  # what an older torch lacks is skipped
        return not self.problem and bool(happened) and fine >= set(happened)

    def cells(self) -> list[str]:
        return [self.problem or f"{area['passed']}/{area.total()}" for area in self.checks.values()]

    def torch_cells(self) -> list[str]:
        both = sum(self.checks.values(), Counter()), self.tests
        return [
            self.problem or ", ".join(f"{number:,} {what}" for what, number in sorted(counts.items())) or "–"
            for counts in both
        ]


class DidNotRun(Exception):
    """uv, pytest or make failed before every test had run; the log says why."""


def install(versions: Versions, log: Path) -> Path:
    """Create a fresh environment for these versions and return its folder."""
    folder = ENVIRONMENTS / str(versions)
    shutil.rmtree(folder, ignore_errors=True)
    uv = [sys.executable, "-m", "uv"]
    links = [f"--find-links={link}" for link in os.environ.get("PIP_FIND_LINKS", "").split()]
    python = str(folder / "bin" / "python")
    with log.open("w") as file:
        for command in (
            [*uv, "venv", "--quiet", "--seed", "--python", sys.executable, str(folder)],  # with pip: a test calls it
            [*uv, "pip", "install", "--quiet", "--python", python, *links, *versions.packages()],
        ):
            if subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode:
                raise DidNotRun
    return folder


def run_tests(command: list[str], log: Path, **environment: str) -> list[tuple[str, str]]:
    """Run pytest, by whichever command: the name of every test, and whether it passed, failed or was skipped."""
    report = log.with_suffix(".xml")
    report.unlink(missing_ok=True)
    environment["PYTEST_ADDOPTS"] = f"-p no:cacheprovider --junit-xml={report.relative_to(ROOT)}"
    with log.open("a") as file:
        status = subprocess.run(
            command, cwd=ROOT, env=os.environ | environment, stdout=file, stderr=subprocess.STDOUT
        ).returncode
    tests = []
    for case in ElementTree.parse(report).iter("testcase") if report.exists() else ():
        children = {child.tag for child in case}
        what = "failed" if children & {"failure", "error"} else "skipped" if "skipped" in children else "passed"
        tests.append((case.attrib["name"], what))
    if not tests or (status and all(what != "failed" for _, what in tests)):
        raise DidNotRun
    return tests


def check(versions: Versions, threads: int) -> Outcome:
    """Install these versions and run the checks on them."""
    start, log = time.monotonic(), ENVIRONMENTS / f"{versions}.txt"
    outcome = Outcome(versions)
    try:
        folder = install(versions, log)
        environment = {
            "HF_HOME": str(folder / "home"),  # remote code is copied there: not to be shared
            "HF_HUB_OFFLINE": "1",
            "MATRIX_VERSION": versions.transformers,
            "OMP_NUM_THREADS": str(threads),
            "TOKENIZERS_PARALLELISM": "false",
        }
        pytest = [str(folder / "bin" / "python"), "-m", "pytest", "-q", "tests/matrix_check.py"]
        for name, what in run_tests(pytest, log, MATRIX_NEWEST=str(int(versions.newest)), **environment):
            area = next((AREAS[area] for area in AREAS if name.startswith(f"test_{area}_")), GOLDEN)
            outcome.checks[area][what] += 1
        if versions.all_tests:
            (folder / "installed").touch()
            tests = run_tests(["make", "test", f"VENV={folder.relative_to(ROOT)}"], log, **environment)
            outcome.tests = Counter(what for _, what in tests)
    except DidNotRun:
        outcome.problem = "did not run"
    outcome.seconds = time.monotonic() - start
    return outcome


def is_refused(version: str) -> bool:
    """Whether, on a version that is too old, every Auto class fails with an error that names the version needed.

    The repository itself serves as the model folder: loading fails before the missing weights matter.
    """
    log = ENVIRONMENTS / f"{version}.txt"
    folder, messages = install(Versions(version), log), []
    for auto in ("AutoConfig", "AutoTokenizer", "AutoModelForCausalLM"):
        load = f"import transformers; transformers.{auto}.from_pretrained('.', trust_remote_code=True)"
        command = [str(folder / "bin" / "python"), "-c", load]
        environment = os.environ | {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"}
        process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        messages.append(process.stderr.strip().rpartition("\n")[2])
    log.write_text("\n".join(messages))
    shutil.rmtree(folder, ignore_errors=True)
    return all(line.startswith("ImportError: InternLM needs transformers 4.57 or newer") for line in messages)


def table(outcomes: list[Outcome]) -> str:
    """The Markdown table of README.md: passed / total, by area."""
    head = ["transformers", GOLDEN, *AREAS.values()]
    return markdown([head, *([outcome.versions.transformers, *outcome.cells()] for outcome in outcomes)], 1)


def torch_table(outcomes: list[Outcome]) -> str:
    """The Markdown table of docs/compatibility.md."""
    rows = [[outcome.versions.torch, outcome.versions.transformers, *outcome.torch_cells()] for outcome in outcomes]
    return markdown([["torch", "transformers", "checks of `make matrix`", "`make test`"], *rows], 2)


def markdown(rows: list[list[str]], left: int) -> str:
    """A table of these rows, the first `left` columns aligned to the left."""
    rows = [rows[0], ["---"] * left + ["--:"] * (len(rows[0]) - left), *rows[1:]]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def write(page: str, mark: str, text: str) -> None:
    """Replace the block `mark` of a page."""
    path = ROOT / page
    old = path.read_text(encoding="utf-8")
    block = rf"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)"
    new, found = re.subn(block, rf"\g<1>{text}\n\g<2>", old, flags=re.DOTALL)
    if found != 1:
        raise SystemExit(f"{page} must have one block <!-- {mark} --> ... <!-- /{mark} -->, and has {found}.")
    if new != old:
        path.write_text(new, encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--versions",
        nargs="+",
        metavar="X.Y.Z",
        help=f"of transformers (default: {VERSIONS}, and with --torch the oldest and the newest of them)",
    )
    parser.add_argument(
        "--torch",
        nargs="*",
        default=[""],
        metavar="X.Y.Z",
        help="run the checks on these versions of torch, and with the newest transformers `make test`, too (by "
        f"default: {TORCH_VERSIONS}). Each is a CUDA build from the package index: 3 GB to download, 6 GB on disk, "
        "which stay in uv's cache (until `uv cache clean`), and 15 minutes",
    )
    parser.add_argument(
        "--jobs", type=int, default=2, help="versions in parallel (default: 2; each takes a CPU minute)"
    )
    parser.add_argument("--keep", action="store_true", help="keep the environments (0.9 GB each, mostly shared)")
    arguments = parser.parse_args()
    torch_versions = arguments.torch or TORCH_VERSIONS
    of_torch = torch_versions != [""]
    default = [VERSIONS[0], VERSIONS[-1]] if of_torch else VERSIONS
    versions = arguments.versions or default
    ENVIRONMENTS.mkdir(parents=True, exist_ok=True)
    threads = max(1, (os.cpu_count() or 1) // arguments.jobs)
    wanted = [Versions(version, torch) for torch in torch_versions for version in versions]
    outcomes = {}
    with ThreadPoolExecutor(arguments.jobs) as pool, tqdm(total=len(wanted), unit="version") as bar:
        for task in as_completed([pool.submit(check, each, threads) for each in wanted]):
            outcome = task.result()
            outcomes[outcome.versions] = outcome
            if not arguments.keep:
                shutil.rmtree(ENVIRONMENTS / str(outcome.versions), ignore_errors=True)
            log = f"{ENVIRONMENTS.relative_to(ROOT)}/{outcome.versions}.txt"
            verdict = "passed" if outcome.ok else f"FAILED, see {log}"
            bar.write(f"{outcome.versions!s:8} {outcome.seconds:4.0f} s  {verdict}")
            bar.update()
    ordered = [outcomes[each] for each in wanted]
    passed = all(outcome.ok for outcome in ordered)
    text = torch_table(ordered) if of_torch else table(ordered)
    print(text)
    if of_torch:
        if torch_versions == TORCH_VERSIONS and versions == default:
            write("docs/compatibility.md", "torch", text)
        return 0 if passed else 1
    if versions == VERSIONS:
        write("README.md", "matrix", text)
    refused = is_refused(TOO_OLD)
    print(f"{TOO_OLD} is {'refused' if refused else 'NOT refused'} with an error that names the version needed")
    return 0 if refused and passed else 1


if __name__ == "__main__":
    sys.exit(main())
