"""The mutation runner (tools/mutation.py), on a project of one module and its tests."""

import ast

import pytest

from tools import mutation, package


MODULE = '''"""Two functions."""

from typing import Any

__all__ = ["area", "grown"]

def area(width: int | None, height: int | None) -> int | None:
    """A product."""
    if width is None:
        raise ValueError("no width" + " given")
    return width * height

def grown(items: list[int], limit: Any = 3) -> "list[int] | None":
    return [*items, len(items)] if len(items) < limit else items
'''
TESTS = """
import pytest
import two_internlm as two

def test_area():
    assert two.area(2, 3) == 6

def test_grown():
    assert two.grown([], 1) == [0] and two.grown([0, 1], 1) == [0, 1]
"""
IMPORT = "import two_internlm\n\ndef test_import():\n    assert two_internlm\n"


@pytest.fixture
def project(tmp_path):
    root = tmp_path / "project"
    (root / "tests").mkdir(parents=True)
    (root / "two_internlm.py").write_text(MODULE)
    (root / "tests" / "test_two.py").write_text(TESTS)
    markers = "".join(f" {name}:\n" for name in ("slow", "evaluation", "ecosystem", "gpu"))
    (root / "pytest.ini").write_text(f"[pytest]\npythonpath = .\nmarkers =\n{markers}")
    return root


def content(root):
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_mutants_change_code_and_nothing_else(project):
    """Each compiles, and annotations, docstrings, messages, imports and `__all__` are as they were."""
    made = list(mutation.mutants(project, "two_internlm.py", seed=0))
    assert {mutant.operator for mutant in made} == {
        "arithmetic", "comparison", "constant", "guard", "removed item", "removed statement",
    }  # fmt: skip
    for mutant in made:
        tree = ast.parse(mutant.source)
        assert mutation.bytecode(mutant.source) != mutation.bytecode(MODULE)
        for text in ("width: int | None, height: int | None) -> int | None", "list[int] | None", "Two functions"):
            assert text in mutant.source
        assert ast.unparse(tree.body[2]) == "__all__ = ['area', 'grown']"
        assert "'no width' + ' given'" in mutant.source or mutant.after == "pass"


@pytest.mark.parametrize(
    ("line", "expected"),
    {
        "x = a < b": {"x = a <= b", "x = a >= b"},
        "x = a and b": {"x = a or b"},
        "x = not a": {"x = not not a"},
        "x = a - 1": {"x = a + 1", "x = a - 2", "x = a - 0"},
        "x = [True, 'a']": {"x = ['a']", "x = [True]", "x = [False, 'a']", "x = [True, '']"},
        "x = {a: b}": {"x = {}"},
        "x = f(a, b, c=d)": {"x = f(b, a, c=d)", "x = f(a, b)"},
        "x = a if b else c": {"x = a if True else c", "x = a if False else c"},
        "x = [a for a in b if a]": {"x = [a for a in b]"},
        "a.b = c": {"pass"},
        "f()": {"pass"},
        "logger.warning('a')": {"pass"},
        "x = isinstance(a, int | str)": set(),
        "x: dict[str, int] = a": set(),
        "x = Callable[[int], str]": set(),
        "x = a if _VERSION >= (5, 1) else 7": set(),
        "x = tuple(transformers.__version__) < (4, 57)": set(),
        "x = 7 if _VERSION >= (5, 1) else a": {
            "x = 8 if _VERSION >= (5, 1) else a",
            "x = 6 if _VERSION >= (5, 1) else a",
        },
    }.items(),
)
def test_operators(tmp_path, line, expected):
    """Every variant of every site, also of the branch that the installed transformers takes."""
    (tmp_path / "a.py").write_text(line)
    assert {mutant.after for seed in range(30) for mutant in mutation.mutants(tmp_path, "a.py", seed)} == expected


@pytest.mark.parametrize("file", mutation.mutable(package.ROOT))
def test_without_a_mutation_a_file_stays_the_same(file):
    """The copies hold it as `unparsed` writes it: other text, the same code, still ASCII."""
    source = (package.ROOT / file).read_text(encoding="utf-8")
    written = mutation.unparsed(ast.parse(source))
    assert written.isascii() and mutation.bytecode(written) == mutation.bytecode(source)


def test_a_seed_fixes_a_sample_and_a_longer_one_goes_on(project):
    five = mutation.sample(project, ["two_internlm.py"], 5, seed=3)
    assert len(five) == 5
    assert mutation.sample(project, ["two_internlm.py"], 9, seed=3)[:5] == five
    assert mutation.sample(project, ["two_internlm.py"], 5, seed=4) != five


def test_a_mutation_is_noticed_or_survives(project, tmp_path, monkeypatch):
    """The tests never call `area` without a width. The tree stays as it was; a rerun takes the stored results."""
    before, results = content(project), tmp_path / "build" / "results.jsonl"
    made = {mutant.after: mutant for mutant in mutation.mutants(project, "two_internlm.py", seed=0)}
    chosen = [made["return width / height"], made["pass"], made["if True:"]]
    records = mutation.run(project, chosen, results)
    assert [record["result"] for record in records] == ["noticed", "survived", "noticed"]
    assert records[0]["by"] == "tests/test_two.py::test_area"
    assert content(project) == before

    tested = []

    def noted(measured, tree, mutant):
        tested.append(mutant)
        return {"result": "survived", "by": ""}

    monkeypatch.setattr(mutation, "test", noted)
    assert mutation.run(project, chosen, results) == records
    assert tested == []
    mutation.run(project, chosen, results, again=True)
    assert tested == chosen[1:2]


def test_what_coverage_cannot_see_is_noticed(project, tmp_path):
    """As what only torch.compile runs. Here a test reads the line and does not run it."""
    (project / "tests" / "test_two.py").write_text(
        "import inspect\nimport two_internlm as two\n\n"
        "def test_source():\n    assert 'raise' in inspect.getsource(two)\n"
    )
    made = [mutant for mutant in mutation.mutants(project, "two_internlm.py", seed=0) if mutant.after == "pass"]
    (record,) = mutation.run(project, made, tmp_path / "results.jsonl")
    assert (record["result"], record["by"]) == ("noticed", "tests/test_two.py::test_source")


def test_the_tests_that_run_a_line_are_measured(project, tmp_path):
    """All files follow, first those that run it, if only at import. Only a test file that has changed is run again."""
    (project / "tests" / "test_one.py").write_text(
        "import two_internlm\n\ndef test_name():\n    assert two_internlm\n"
    )
    chosen = mutation.sample(project, ["two_internlm.py"], 1, seed=0)
    mutation.run(project, chosen, tmp_path / "results.jsonl")
    measured = mutation.measurements(project, tmp_path / "measured")
    assert list(measured) == ["tests/test_one.py", "tests/test_two.py"]
    lines = mutation.unparsed(ast.parse(MODULE)).splitlines()

    def reaching(text):
        return mutation.reaching(measured, "two_internlm.py", 1 + next(i for i, x in enumerate(lines) if text in x))

    one, two = measured
    assert reaching("return width") == ([f"{two}::test_area"], [two, one])
    for text in ("def area", "raise"):
        quick, files = reaching(text)
        assert (quick, set(files)) == ([], {one, two})
    (project / "tests" / "test_one.py").write_text("import two_internlm\n")
    changed = mutation.measurements(project, tmp_path / "measured")
    assert [name for name in measured if measured[name] != changed[name]] == ["tests/test_one.py"]


def test_only_test_files_that_run_a_line_of_a_tool_are_run(project, tmp_path):
    """In another process. Not those that run a file of the same name in another folder, or other lines of this one."""
    for test, folder, argument in (("one", "one", ""), ("quiet", "one", "quiet"), ("two", "two", "")):
        path = project / "tools" / folder / "number.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            "import sys\nif sys.argv[1:] == ['loud']:\n    print('!')\nif not sys.argv[1]:\n    print(2 * 3)\n"
        )
        command = f"[sys.executable, {str(path.relative_to(project))!r}, {argument!r}]"
        (project / "tests" / f"test_{test}.py").write_text(
            "import subprocess, sys\n\ndef test_number():\n"
            f"    assert subprocess.check_output({command}) == {b'' if argument else b'6' + bytes([10])!r}\n"
        )
    file = "tools/one/number.py"
    made = next(mutant for mutant in mutation.mutants(project, file, 0) if mutant.operator == "arithmetic")
    (record,) = mutation.run(project, [made], tmp_path / "results.jsonl")
    assert (record["file"], record["by"]) == (file, "tests/test_one.py::test_number")
    measured = mutation.measurements(project, tmp_path / "measured")
    assert mutation.reaching(measured, file, 5) == ([], ["tests/test_one.py"])
    quick, files = mutation.reaching(measured, file, 3)  # nobody runs it
    assert (quick, sorted(files)) == ([], ["tests/test_one.py", "tests/test_quiet.py"])


def test_an_endless_loop_is_a_timeout(project, tmp_path, monkeypatch):
    module = project / "two_internlm.py"
    module.write_text("def area(a, b):\n    while b > 1:\n        b -= 1\n        a += 2\n    return a + 0\n")
    (project / "tests" / "test_two.py").write_text(TESTS.partition("def test_grown")[0])
    monkeypatch.setattr(mutation, "TEST_TIMEOUT", 1)
    endless = [mutant for mutant in mutation.mutants(project, module.name, seed=0) if mutant.after == "b += 1"]
    assert [record["result"] for record in mutation.run(project, endless, tmp_path / "results.jsonl")] == ["timeout"]


def test_a_test_that_fails_without_a_mutation_notices_nothing(project, tmp_path, capsys):
    (project / "tests" / "test_two.py").write_text(TESTS.replace("== 6", "== 7"))
    made = [mutant for mutant in mutation.mutants(project, "two_internlm.py", 0) if mutant.operator == "arithmetic"]
    assert [record["result"] for record in mutation.run(project, made, tmp_path / "results.jsonl")] == ["survived"]
    assert "Not counted, for they fail without a mutation: tests/test_two.py::test_area" in capsys.readouterr().out


def test_a_test_that_fails_now_and_then_notices_nothing(project, tmp_path):
    """Here it passes only while it is measured. A test that notices must pass once more without the mutation."""
    unreliable = TESTS.replace("two.area(2, 3) == 6", "two.area(2, 3) and 'coverage' in sys.modules")
    (project / "tests" / "test_two.py").write_text(f"import sys\n{unreliable}")
    made = [mutant for mutant in mutation.mutants(project, "two_internlm.py", 0) if mutant.operator == "arithmetic"]
    assert [record["result"] for record in mutation.run(project, made, tmp_path / "results.jsonl")] == ["survived"]


def test_a_test_file_that_cannot_be_run_is_an_error(project, tmp_path):
    (project / "tests" / "test_two.py").write_text("import two_internlm, absent")
    chosen = mutation.sample(project, ["two_internlm.py"], 1, seed=0)
    with pytest.raises(SystemExit, match=r"pytest tests/test_two\.py ends with 2, without a mutation"):
        mutation.run(project, chosen, tmp_path / "results.jsonl")


def test_report():
    """Counts, survivors, and Wilson's interval: 9 of 10 is 60 % to 98 %."""
    record = {"file": "a.py", "line": 3, "operator": "guard", "before": "if x:", "after": "if True:"}
    records = [{**record, "result": result} for result in ["noticed"] * 8 + ["timeout", "survived"]]
    text = mutation.report(records)
    assert "| a.py | 8 | 1 | 1 |" in text and "| guard | 8 | 1 | 1 |" in text
    assert "survived: a.py:3 guard\n    - if x:\n    + if True:" in text
    assert text.endswith("9 of 10 noticed: 90% (95 % interval 60% to 98%)")
