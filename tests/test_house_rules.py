"""The rules of CONTRIBUTING.md that can be counted: line budgets, a row per test file, a target for every marker."""

import ast
import io
import re
import tokenize

import pytest

from tools.package import MODULES

from support.paths import ROOT


# Code lines: neither blank, comment nor docstring. The rule in CONTRIBUTING.md has the same words and numbers.
BUDGETS = {
    "modeling_internlm.py": 400,
    "tokenization_internlm.py": 350,
    "configuration_internlm.py": 170,
    "decoding_internlm.py": 210,
    "kernels_internlm.py": 260,
    "rotary_internlm.py": 200,
    "every other root module": 150,
    "every function of a root module": 45,
    "a Triton kernel": 95,
}
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
NOT_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def code_lines(source: str) -> set[int]:
    """The numbers of the lines that hold code; a string over several lines holds code on each of them."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NOT_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, *FUNCTIONS)) and ast.get_docstring(node) is not None:
            lines.difference_update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return lines


def test_code_lines_are_counted():
    source = (
        '"""Two\nlines."""\n\n# a comment\nclass A:\n    """One."""\n\n    x = """a\n    b"""  # two lines of code\n'
    )
    assert code_lines(source) == {5, 8, 9}


@pytest.mark.parametrize("name", MODULES)
def test_modules_stay_within_their_budget(name):
    count = len(code_lines((ROOT / name).read_text(encoding="utf-8")))
    budget = BUDGETS.get(name, BUDGETS["every other root module"])
    assert count <= budget, f"{name} has {count} lines of code, {count - budget} more than its budget"


@pytest.mark.parametrize("name", MODULES)
def test_functions_stay_within_their_budget(name):
    """The signature counts, decorators do not."""
    source = (ROOT / name).read_text(encoding="utf-8")
    lines = code_lines(source)
    counts = {
        node.name: len(lines & set(range(node.lineno, node.end_lineno + 1)))
        for node in ast.walk(ast.parse(source))
        if isinstance(node, FUNCTIONS)
    }
    kernels = {node.name for node in ast.walk(ast.parse(source)) if isinstance(node, FUNCTIONS) and is_kernel(node)}
    for function, count in counts.items():
        kind = "a Triton kernel" if function in kernels else "every function of a root module"
        assert count <= BUDGETS[kind], f"{function} has {count} lines of code"


def is_kernel(node):
    return [ast.unparse(decorator) for decorator in node.decorator_list] == ["triton.jit"]


def test_contributing_publishes_these_budgets():
    rule = re.search(r"^\d+\. Code lines.*?(?=\n\d+\. |\n\n)", CONTRIBUTING, re.MULTILINE | re.DOTALL)
    assert rule, "CONTRIBUTING.md has no rule that begins with `Code lines`"
    found = re.findall(
        r"`?([a-z_]+\.py|every [a-z ]+?|a Triton kernel)`? (?:at most )?(\d+)", " ".join(rule[0].split())
    )
    assert {name: int(count) for name, count in found} == BUDGETS


def test_contributing_has_a_row_for_every_test_file():
    """A new test file needs a behaviour that it tests, and a row where a contributor finds it."""
    files = {str(path.relative_to(ROOT)) for path in ROOT.glob("tests/**/test_*.py")}
    assert files == set(re.findall(r"`(tests/[\w/]*test_\w+\.py)`", CONTRIBUTING))


def test_every_marker_is_selected_by_a_target_and_has_tests():
    """A test that no target selects runs nowhere."""
    markers = set(re.findall(r'^    "(\w+): ', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE))
    selected = re.findall(r'pytest .*-m "?(?!not )(\w+)', (ROOT / "Makefile").read_text(encoding="utf-8"))
    tests = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("tests/**/test_*.py"))
    assert markers == set(selected) == markers & set(re.findall(r"pytest\.mark\.(\w+)", tests))


# What CONTRIBUTING's rule on names replaces: not the field's word -> the field's word.
HOME_MADE = {
    r"\btheta\b": "inv_freq, or rope_theta for the base",
    r"\b[Tt]urned (by|once|back|keys|quer)": "rotated",
    r"further turn": "correction",
    r"handed (down|over)|[Tt]old (its|their) (places|positions)": "passed",
    r"[Ff]ewest|MOST_": "min, max",
    r"so many (numbers|tokens|logits|elements)": "at most N",
    r"goes on where|it goes on\b": "resumes",
    r"mistake in (this|the) tool": "bug",
    r"no numbers": "NaN",
    r"\breads on\b(?! disk)": "continues",
}


def test_no_page_or_module_uses_home_made_terms():
    """In comments, messages, names and prose alike; the 2023 files and this one are left out."""
    folders = ("", "benchmarks", "docs", "evaluation", "examples", "tests", "tests/*", "tools", "tools/*", "variants")
    files = [
        path for folder in folders for kind in ("py", "md") for path in ROOT.glob(f"{folder}/*.{kind}".lstrip("/"))
    ]
    assert len(files) > 100
    found = [
        f"{path.relative_to(ROOT)}: {match.group()!r} -> {better}"
        for path in files
        if path.name != "test_house_rules.py"
        for term, better in HOME_MADE.items()
        for match in re.finditer(term, path.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)
