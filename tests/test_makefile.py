"""What a user gives to a target of the Makefile reaches its program as it is."""

import subprocess
import sys
from pathlib import Path

import pytest

from support.paths import ROOT


PROMPT = "It costs $5, `date`, $(HOME), \"q\" 'it' #%\n\\ 它 "
GIVEN = {
    "demo": ({"MODEL": "a b", "PROMPT": PROMPT}, ["--model", "a b", "--prompt", PROMPT]),
    "chat": (
        {"MODEL": "$HOME/`id`", "ARGS": "--greedy --seed 1"},
        ["--model", "$HOME/`id`", "--greedy", "--seed", "1"],
    ),
    "web": ({"MODEL": "a b", "PORT": "7"}, ["--model", "a b", "--port", "7"]),
    "serve": (
        {"MODEL": "a'b", "CONTEXT": "9", "ARGS": "--compile"},
        ["--model", "a'b", "--context", "9", "--compile"],
    ),
    "long-context": (
        {"MODEL": "a b", "ARGS": "--documents 1 --lengths 512 1024"},
        ["--model", "a b", "--documents", "1", "--lengths", "512", "1024"],
    ),
    "mutation": ({"FILES": "c*_internlm.py x.py", "N": "3", "SEED": "4"}, None),
}


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no make")
@pytest.mark.parametrize("in_environment", [False, True], ids=["argument", "environment"])
@pytest.mark.parametrize("target", GIVEN)
def test_variables_are_passed_as_they_are(target: str, in_environment: bool, tmp_path: Path) -> None:
    """With the real make and shell; in the place of Python, a program that writes its arguments down."""
    given, expected = GIVEN[target]
    if expected is None:  # names of files are a pattern for the shell
        files = sorted(path.name for path in ROOT.glob("c*_internlm.py"))
        expected = ["--files", *files, "x.py", "--number", "3", "--seed", "4"]
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nprintf "%s\\0" "$@" > {tmp_path}/arguments\n')
    python.chmod(0o755)
    for environment in ("running", "chatting", "web", "serving", "installed"):
        (tmp_path / environment).touch()
    command = ["make", "-C", str(ROOT), target, f"VENV={tmp_path}"]
    settings = [f"{name}={value}" for name, value in given.items()]
    subprocess.run(
        [*(["env", *settings] if in_environment else []), *command, *([] if in_environment else settings)], check=True
    )
    assert (tmp_path / "arguments").read_text().split("\0")[1:-1] == expected
