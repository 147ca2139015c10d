"""Change the code at random, one place at a time, and count what the tests notice: `make mutation`.

    python tools/mutation.py --files rotary_internlm.py tools/hub/*.py --number 20 --seed 1

A seed fixes the sample: each file gets a share by its lines, and a site in it is as likely as any other. First every
test file runs once without a mutation, with coverage, in a process of its own. Each mutation is then tested in a copy
of the tree: by the quickest tests that run its line, and if they pass by every test file that runs it; of an uploaded
module by every test file that loads it. It has survived when all tests pass. Each result is appended to
build/mutation/<seed>.jsonl, so that a rerun resumes; when a file has changed, its mutations are new ones. Exits with 1
below --at-least.
"""

import argparse
import ast
import contextlib
import difflib
import functools
import hashlib
import itertools
import json
import math
import os
import queue
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import coverage
import torch
import transformers
from tqdm import tqdm


ROOT = Path(__file__).resolve().parents[1]
MARKERS = "not slow and not evaluation and not ecosystem and not gpu"  # as `make test`
NOT_COPIED = shutil.ignore_patterns(".git", ".venv*", "build", "__pycache__", ".hypothesis", ".*_cache")
TEST_TIMEOUT, TOTAL_TIMEOUT = 300, 3600  # seconds: of one test, and of one pytest process
QUICK = 30  # seconds of tests that run the mutated line, before all tests of their files
DURATION = re.compile(r"^([\d.]+)s (?:setup|call|teardown) +(.+?) *$", re.MULTILINE)

BOUNDARY = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt}
NEGATION = {ast.Lt: ast.GtE, ast.Gt: ast.LtE, ast.Eq: ast.NotEq, ast.Is: ast.IsNot, ast.In: ast.NotIn}
NEGATION |= {new: old for old, new in NEGATION.items()}
ARITHMETIC = {ast.Add: ast.Sub, ast.Mult: ast.Div, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.Pow: ast.Mult}
ARITHMETIC |= {ast.Sub: ast.Add, ast.Div: ast.Mult, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr}
ARITHMETIC |= {ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.USub: ast.UAdd}
TYPES = {"Callable", "Literal", "dict", "list", "tuple"}
UNSWAPPED = {"getattr", "isinstance", "max", "min"}  # an error at once, or no change


class Site(NamedTuple):
    """A place that can be mutated: `node`, and the fields that each variant replaces."""

    node: Any
    line: int
    operator: str
    variants: list[dict[str, Any]]


class Mutant(NamedTuple):
    file: str  # its path in the tree
    line: int
    operator: str
    before: str
    after: str
    source: str

    @property
    def key(self) -> str:
        return hashlib.sha256(f"{self.file}\n{self.source}".encode()).hexdigest()[:16]


def mutable(root: Path) -> list[str]:
    """The files that can be mutated: those of the root and of tools/ but this one."""
    paths = [*root.glob("*.py"), *root.glob("tools/**/*.py")]
    return sorted(path.relative_to(root).as_posix() for path in paths if path.name != "mutation.py")


def without(items: list, index: int) -> list:
    return items[:index] + items[index + 1 :]


def is_message(node: ast.AST) -> bool:
    """Whether a call makes an error or writes to a log: the text is free."""
    name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
    return name.startswith(("logger.", "warnings.")) or name.endswith(("Error", "_invalid"))


def is_type(node: ast.AST) -> bool:
    """`list | tuple`, `Callable[[int], str]`, `cast("Any", x)`."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return all(is_type(side) or isinstance(side, ast.Name | ast.Attribute) for side in (node.left, node.right))
    if isinstance(node, ast.Call):
        return ast.unparse(node.func) == "cast"
    return isinstance(node, ast.Subscript) and ast.unparse(node.value) in TYPES


def decided(test: ast.expr, versions: dict[str, Any]) -> bool | None:
    """The value of a condition on versions alone, else None."""
    names = {node.id for node in ast.walk(test) if isinstance(node, ast.Name)}
    return bool(eval(ast.unparse(test), {}, versions)) if names and names <= versions.keys() else None


def walk(node: ast.AST, versions: dict[str, Any]) -> Iterator[ast.AST]:
    """Every node whose mutation a test of this environment could notice.

    No imports, annotations and types, docstrings, messages and `__all__`; no branch for other versions of transformers
    or torch, and no comparison with a version: `make matrix` tests these.
    """
    if isinstance(node, ast.Import | ast.ImportFrom) or is_message(node) or is_type(node):
        return
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return
    if isinstance(node, ast.Assign):
        name, value = ast.unparse(node.targets[0]), decided(node.value, versions)
        if name in ("__all__", *versions):
            return
        if value is not None:
            versions[name] = value
            return
    branch = decided(node.test, versions) if isinstance(node, ast.If | ast.IfExp) else None
    if branch is not None:
        live = node.body if branch else node.orelse
        for child in live if isinstance(live, list) else [live]:
            yield from walk(child, versions)
        return
    left = ast.unparse(node.left) if isinstance(node, ast.Compare) else ""
    if left in versions or "__version__" in left:
        return
    yield node
    if isinstance(node, ast.JoinedStr | ast.Raise):
        return
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns") or (field == "func" and isinstance(value, ast.Name)):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from walk(child, versions)


def constants(value: Any) -> list[Any]:
    """What a constant is replaced by."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int | float):
        return [value + 1, value - 1]
    return [type(value)() if value else None] if isinstance(value, str | bytes) else []


def is_removable(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.Assign | ast.AugAssign | ast.AnnAssign):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        return isinstance(targets[0], ast.Attribute | ast.Subscript) and statement.value is not None
    if isinstance(statement, ast.Expr):
        return not isinstance(statement.value, ast.Constant)
    return isinstance(statement, ast.Raise | ast.Delete | ast.Break | ast.Continue)


def operators(node: Any) -> Iterator[tuple[int, str, list[dict[str, Any]]]]:
    """(line, operator, variants) of each mutation of this node's fields."""
    kind = type(node)
    if kind is ast.Compare:
        for i, old in enumerate(node.ops):
            new = [table[type(old)]() for table in (BOUNDARY, NEGATION) if type(old) in table]
            yield node.lineno, "comparison", [{"ops": [*node.ops[:i], op, *node.ops[i + 1 :]]} for op in new]
    elif kind is ast.BoolOp:
        yield node.lineno, "and/or", [{"op": ast.Or() if isinstance(node.op, ast.And) else ast.And()}]
    elif kind is ast.UnaryOp and isinstance(node.op, ast.Not):
        yield node.lineno, "not", [{"operand": ast.UnaryOp(ast.Not(), node.operand)}]
    elif kind in (ast.BinOp, ast.AugAssign, ast.UnaryOp) and type(node.op) in ARITHMETIC:
        yield node.lineno, "arithmetic", [{"op": ARITHMETIC[type(node.op)]()}]
    elif kind is ast.Constant:
        yield node.lineno, "constant", [{"value": value} for value in constants(node.value)]
    elif kind is ast.JoinedStr:
        yield node.lineno, "constant", [{"values": []}]
    elif kind is ast.Return and node.value is not None and ast.unparse(node.value) != "None":
        yield node.lineno, "removed statement", [{"value": ast.Constant(None)}]
    elif kind is ast.Call:
        for i, keyword in enumerate(node.keywords):
            yield keyword.lineno, "removed argument", [{"keywords": without(node.keywords, i)}]
        fixed = ast.unparse(node.func) in UNSWAPPED or any(isinstance(item, ast.Starred) for item in node.args)
        for i in range(0 if fixed else len(node.args) - 1):
            swapped = [*node.args[:i], node.args[i + 1], node.args[i], *node.args[i + 2 :]]
            yield node.args[i].lineno, "swapped arguments", [{"args": swapped}]
    elif kind in (ast.Tuple, ast.List, ast.Set) and isinstance(getattr(node, "ctx", ast.Load()), ast.Load):
        for i, item in enumerate(node.elts):
            yield item.lineno, "removed item", [{"elts": without(node.elts, i)}]
    elif kind is ast.Dict:
        for i, value in enumerate(node.values):
            yield value.lineno, "removed item", [{"keys": without(node.keys, i), "values": without(node.values, i)}]
    elif kind is ast.comprehension:
        for i, test in enumerate(node.ifs):
            yield test.lineno, "guard", [{"ifs": without(node.ifs, i)}]
    if kind in (ast.If, ast.IfExp):
        yield node.lineno, "guard", [{"test": ast.Constant(True)}, {"test": ast.Constant(False)}]
    for i, decorator in enumerate(getattr(node, "decorator_list", [])):
        yield decorator.lineno, "removed decorator", [{"decorator_list": without(node.decorator_list, i)}]
    for field in ("body", "orelse", "finalbody"):
        body = getattr(node, field, None)
        for i, statement in enumerate(body if isinstance(body, list) else []):
            if is_removable(statement):
                yield statement.lineno, "removed statement", [{field: [*body[:i], ast.Pass(), *body[i + 1 :]]}]


def sites(tree: ast.Module) -> list[Site]:
    releases = {"_VERSION": transformers.__version__, "_TORCH_VERSION": torch.__version__}
    versions = {name: tuple(int(part) for part in text.split(".")[:2]) for name, text in releases.items()}
    found = [Site(node, *rest) for node in walk(tree, versions) for rest in operators(node)]
    return [site for site in found if site.variants]


def unparsed(tree: ast.Module) -> str:
    """The source, one line for each statement, without comments; ASCII, as root modules are."""
    return ast.unparse(tree).encode("ascii", "backslashreplace").decode()


def bytecode(source: str) -> Any:
    """Code objects are equal if they do the same at the same lines, so all of it is on one."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        for name in ("lineno", "end_lineno", "col_offset", "end_col_offset"):
            if hasattr(node, name):
                setattr(node, name, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        return compile(tree, "", "exec")


def mutants(root: Path, file: str, seed: int) -> Iterator[Mutant]:
    """All mutants of a file in the seed's order, one variant of each site; none that is not a change or no Python."""
    tree = ast.parse((root / file).read_text(encoding="utf-8"))
    original = unparsed(tree)
    code, draw = bytecode(original), random.Random(f"{seed} {file}")
    found = sites(tree)
    for site in draw.sample(found, len(found)):
        variant = draw.choice(site.variants)
        kept = {field: getattr(site.node, field) for field in variant}
        for field, value in variant.items():
            setattr(site.node, field, value)
        source = unparsed(tree)
        for field, value in kept.items():
            setattr(site.node, field, value)
        try:
            if bytecode(source) == code:
                continue
        except (SyntaxError, ValueError):
            continue
        difference = list(difflib.ndiff(original.splitlines(), source.splitlines()))
        before, after = (" ".join(line[2:].strip() for line in difference if line[0] == sign) for sign in "-+")
        yield Mutant(file, site.line, site.operator, before, after, source)


def sample(root: Path, files: list[str], number: int, seed: int) -> list[Mutant]:
    """`number` mutants, shared among the files by their lines (largest remainders)."""
    lines = [len((root / file).read_text(encoding="utf-8").splitlines()) for file in files]
    shares = [number * count / sum(lines) for count in lines]
    counts = [math.floor(share) for share in shares]
    for i in sorted(range(len(files)), key=lambda i: counts[i] - shares[i])[: number - sum(counts)]:
        counts[i] += 1
    chosen = [itertools.islice(mutants(root, file, seed), count) for file, count in zip(files, counts, strict=True)]
    return list(itertools.chain.from_iterable(chosen))


def run_pytest(tree: Path, arguments: list[str]) -> tuple[int | None, str]:
    """Run tests in a copy of the tree, with caches of its own: (exit status, None after too long; output)."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", MARKERS]
    with tempfile.TemporaryDirectory(dir=tree.parent, ignore_cleanup_errors=True) as scratch:
        own = {"HF_HOME": f"{scratch}/home", "TMPDIR": f"{scratch}/tmp", "PYTHONDONTWRITEBYTECODE": "1"}
        inherited = {name: value for name, value in os.environ.items() if name != "HF_MODULES_CACHE"}  # is in HF_HOME
        Path(own["TMPDIR"]).mkdir()
        log = Path(scratch) / "log"
        with log.open("w") as file:
            process = subprocess.Popen(
                [*command, f"--timeout={TEST_TIMEOUT}", *arguments],
                cwd=tree,
                env=inherited | own,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                status = process.wait(TOTAL_TIMEOUT)
            except subprocess.TimeoutExpired:
                status = None
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # and the processes that a test started
        return status, log.read_text(encoding="utf-8", errors="replace")


def failures(output: str) -> list[str]:
    return re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", output, re.MULTILINE)


def measure(tree: Path, item: tuple[str, Path]) -> None:
    """Run a test file without a mutation, and store which test runs which lines (.coverage) and the output (.txt).

    Raises:
        SystemExit: The file cannot be run.
    """
    test_file, stem = item
    settings, data = stem.with_suffix(".ini"), stem.with_suffix(".coverage")
    include = ", ".join(f"*/{file}" for file in mutable(tree))
    settings.write_text(f"[run]\ninclude = {include}\npatch = subprocess\ndata_file = {data}\n")
    options = [f"--cov-config={settings}", "--cov", "--cov-context=test", "--cov-report=", "--durations=0", "-vv"]
    status, output = run_pytest(tree, [*options, test_file])
    if status not in (0, 1, 5):  # all passed, some failed, all are for other environments
        raise SystemExit(
            f"pytest {test_file} ends with {status}, without a mutation: repair it first.\n{output[-2000:]}"
        )
    stem.with_suffix(".txt").write_text(output, encoding="utf-8")


def failing(measured: dict[str, Path]) -> list[str]:
    """Tests that fail without a mutation. They notice nothing."""
    return [name for stem in measured.values() for name in failures(stem.with_suffix(".txt").read_text("utf-8"))]


def reaching(measured: dict[str, Path], file: str, line: int) -> tuple[list[str], list[str]]:
    """Tests that run this line, the quickest first, up to QUICK seconds; and the test files that can notice it.

    The latter are those that run the line, even if only at import or in a process that serves several tests. Where
    none does, as when a test kills the process, they are all that load the file. For uploaded modules they always are,
    after those that run the line: coverage does not see what torch.compile runs.
    """
    tests: dict[str, float] = {}
    running, loading = {}, {}
    for name, stem in measured.items():
        data = coverage.CoverageData(str(stem.with_suffix(".coverage")))
        data.read()
        loaded = [path for path in data.measured_files() if path.endswith(f"/{file}")]
        contexts = {context for path in loaded for context in data.contexts_by_lineno(path).get(line, ())}
        seconds: Counter = Counter()
        for time, test in DURATION.findall(stem.with_suffix(".txt").read_text(encoding="utf-8")):
            seconds[test] += float(time)
        if loaded:
            (running if contexts else loading)[name] = sum(seconds.values())
        tests |= {test: seconds[test] for test in (context.rpartition("|")[0] for context in contexts) if test}
    ordered = sorted(tests, key=tests.__getitem__)
    total = itertools.accumulate(tests[test] for test in ordered)
    quick = [test for test, seconds in zip(ordered, total, strict=True) if seconds <= QUICK]
    files = sorted(running, key=running.__getitem__)
    if not files or file.endswith("_internlm.py"):
        files += sorted(loading, key=loading.__getitem__)
    return quick, files


def test(measured: dict[str, Path], tree: Path, mutant: Mutant) -> dict[str, str]:
    """Run the tests on a mutant: the result, and the first test that failed."""
    module = tree / mutant.file
    original = module.read_text(encoding="utf-8")
    pairs = itertools.zip_longest(original.splitlines(), mutant.source.splitlines())
    line = next(number for number, (old, new) in enumerate(pairs, 1) if old != new)
    quick, files = reaching(measured, mutant.file, line)
    unreliable = failing(measured)
    for tests in filter(None, (quick, files)):
        while True:
            module.write_text(mutant.source, encoding="utf-8")
            status, output = run_pytest(tree, ["-x", *(f"--deselect={name}" for name in unreliable), *tests])
            module.write_text(original, encoding="utf-8")
            if status in (0, 5):  # all passed, none is left
                break
            by = next(iter(failures(output)), "")
            if "::" not in by or run_pytest(tree, [by])[0] == 0:
                timeout = status is None or "from pytest-timeout" in output
                return {"result": "timeout" if timeout else "noticed", "by": by or output[-500:]}
            unreliable.append(by)  # it fails without the mutation, too, now and then
    return {"result": "survived", "by": ""}


def copies(root: Path, folder: Path, count: int) -> queue.Queue:
    """Copies of the tree, with the files as `unparsed` writes them, for the mutants are written so."""
    trees: queue.Queue = queue.Queue()
    for number in range(count):
        tree = folder / str(number)
        shutil.copytree(root, tree, ignore=NOT_COPIED)
        for path in (tree / file for file in mutable(tree)):
            path.write_text(unparsed(ast.parse(path.read_text(encoding="utf-8"))), encoding="utf-8")
        trees.put(tree)
    return trees


def each(function: Callable, items: list, trees: queue.Queue, unit: str) -> Iterator[tuple[Any, Any]]:
    """(item, function(tree, item)) as they come; as many at a time as there are trees."""

    def call(item: Any) -> tuple[Any, Any]:
        tree = trees.get()
        try:
            return item, function(tree, item)
        finally:
            trees.put(tree)

    with ThreadPoolExecutor(trees.qsize()) as pool:
        tasks = [pool.submit(call, item) for item in items]
        try:
            for task in tqdm(as_completed(tasks), total=len(tasks), unit=unit, disable=not tasks):
                yield task.result()
        finally:
            pool.shutdown(cancel_futures=True)


def measurements(root: Path, folder: Path) -> dict[str, Path]:
    """Where the measurement of each test file is stored: under another name when it or what it runs has changed."""
    tests = [path for path in sorted(root.glob("tests/test_*.py")) if path.name != "test_mutation.py"]
    folders = ("", "benchmarks/", "examples/", "tests/support/", "tools/", "tools/*/")
    sources = [path for folder in folders for path in sorted(root.glob(f"{folder}*.py")) if path.name != "mutation.py"]
    sources += root.glob("tests/conftest.py")
    common = "".join(hashlib.sha256(path.read_bytes()).hexdigest() for path in sources)
    digests = {path: hashlib.sha256(common.encode() + path.read_bytes()).hexdigest()[:12] for path in tests}
    return {f"tests/{path.name}": folder / f"{path.stem}-{digest}" for path, digest in digests.items()}


def run(root: Path, sampled: list[Mutant], results: Path, jobs: int = 2, again: bool = False) -> list[dict[str, Any]]:
    """The records of these mutants, tested in `jobs` copies of `root` and stored in `results` as they come.

    Args:
        again: Test those that survived once more, for the tests have changed.

    Raises:
        SystemExit: A test file cannot be run without a mutation.
    """
    measured = measurements(root, results.parent / "measured")
    (results.parent / "measured").mkdir(parents=True, exist_ok=True)
    lines = results.read_text(encoding="utf-8").splitlines() if results.exists() else []
    known = {record["key"]: record for record in map(json.loads, lines)}
    old = {key for key, record in known.items() if not (again and record["result"] == "survived")}
    todo = [mutant for mutant in sampled if mutant.key not in old]
    unmeasured = [item for item in measured.items() if todo and not item[1].with_suffix(".txt").exists()]
    with tempfile.TemporaryDirectory(prefix="mutation-", ignore_cleanup_errors=True) as folder:
        trees = copies(root, Path(folder), jobs)
        for _ in each(measure, unmeasured, trees, "test file"):
            pass
        for mutant, result in each(functools.partial(test, measured), todo, trees, "mutant"):
            record = {"key": mutant.key, **mutant._asdict(), **result}
            del record["source"]
            known[mutant.key] = record
            with results.open("a", encoding="utf-8") as file:
                print(json.dumps(record), file=file)
    if todo and (bad := failing(measured)):
        print(f"Not counted, for they fail without a mutation: {', '.join(bad)}")
    return [known[mutant.key] for mutant in sampled]


def wilson(noticed: int, total: int) -> tuple[float, float]:
    """The 95 % interval of a share."""
    z, share = 1.96, noticed / total
    middle, half = share + z * z / (2 * total), z * math.sqrt(share * (1 - share) / total + (z / (2 * total)) ** 2)
    return (middle - half) / (1 + z * z / total), (middle + half) / (1 + z * z / total)


def report(records: list[dict[str, Any]]) -> str:
    """Counts by file and by operator, the survivors, and the share that was noticed."""
    rows = []
    for field in ("file", "operator"):
        counts = Counter((record[field], record["result"]) for record in records)
        rows += ["", f"| {field} | noticed | timeout | survived |", "|---|--:|--:|--:|"]
        for name in sorted({record[field] for record in records}):
            rows.append(
                f"| {name} | " + " | ".join(str(counts[name, r]) for r in ("noticed", "timeout", "survived")) + " |"
            )
    survivors = [record for record in records if record["result"] == "survived"]
    for record in sorted(survivors, key=lambda record: (record["file"], record["line"])):
        rows += ["", f"survived: {record['file']}:{record['line']} {record['operator']}"]
        rows += [f"    - {record['before']}", f"    + {record['after']}"]
    noticed = len(records) - len(survivors)
    low, high = wilson(noticed, len(records))
    rows += [
        "",
        f"{noticed} of {len(records)} noticed: {noticed / len(records):.0%} (95 % interval {low:.0%} to {high:.0%})",
    ]
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", nargs="+", metavar="FILE", help="in the root or tools/ (default: *_internlm.py)")
    parser.add_argument("--number", type=int, default=40, help="how many mutations (default: 40)")
    parser.add_argument("--seed", type=int, default=1, help="which ones (default: 1)")
    parser.add_argument("--jobs", type=int, default=2, help="in parallel (default: 2)")
    parser.add_argument("--again", action="store_true", help="test the survivors of an earlier run once more")
    parser.add_argument("--at-least", type=float, default=90, metavar="PERCENT", help="noticed, else exit with 1")
    parser.add_argument("--list", action="store_true", help="print the mutations and run nothing")
    arguments = parser.parse_args()
    files = arguments.files or sorted(path.name for path in ROOT.glob("*_internlm.py"))
    if unknown := [file for file in files if file not in mutable(ROOT)]:
        parser.error(f"{unknown[0]!r} cannot be mutated: give paths such as rotary_internlm.py or tools/hub/push.py.")
    sampled = sample(ROOT, files, arguments.number, arguments.seed)
    if arguments.list:
        for m in sampled:
            print(f"{m.file}:{m.line} {m.operator}\n    - {m.before}\n    + {m.after}")
        return 0
    records = run(ROOT, sampled, ROOT / f"build/mutation/{arguments.seed}.jsonl", arguments.jobs, arguments.again)
    print(report(records))
    return int(100 * sum(record["result"] != "survived" for record in records) < arguments.at_least * len(records))


if __name__ == "__main__":
    sys.exit(main())
