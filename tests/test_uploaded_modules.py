"""What the uploaded modules may do on a user's machine, checked in their source and at run time."""

import ast
import json
import os
import subprocess
import sys

import pytest
from transformers.dynamic_module_utils import get_imports

from tools import package
from tools.package import MODULES

from support.paths import ROOT


THIRD_PARTY = {"torch", "transformers", "tokenizers", "sentencepiece"}
# The parts of the standard library that they use: nothing that runs programs, accesses the network or loads code.
STANDARD = {
    "collections",
    "contextlib",
    "copy",
    "dataclasses",
    "functools",
    "inspect",
    "itertools",
    "json",
    "os",
    "re",
    "secrets",
    "shutil",
    "struct",
    "threading",
}
STANDARD |= {"time", "typing", "weakref"}
# All that is used of os and shutil: to read an index of weights, and to save a tokenizer.
ALLOWED = {
    "os.PathLike",
    "os.listdir",
    "os.path",
    "os.path.isdir",
    "os.path.isfile",
    "os.path.join",
    "os.path.realpath",
}
ALLOWED |= {"shutil.copyfile"}
FORBIDDEN_NAMES = {"eval", "exec", "compile", "__import__", "globals", "vars", "input", "breakpoint"}
# Attributes of any object: environment, programs, pickles, downloads, files, and ways around the names above.
FORBIDDEN_ATTRIBUTES = {"environ", "environb", "getenv", "putenv", "system", "popen", "load", "save", "hub"}
FORBIDDEN_ATTRIBUTES |= {"write_text", "write_bytes", "tofile", "__globals__", "__builtins__", "__subclasses__"}
KERNELS = "kernels_internlm.py"  # the one module that may import Triton, whose tl.load reads a tensor


def tree(name):
    return ast.parse((ROOT / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", MODULES)
def test_imports(name):
    """Safe modules of the standard library, THIRD_PARTY, and each other by relative imports."""
    for node in ast.walk(tree(name)):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
            assert not any(alias.asname for alias in node.names)  # test_calls searches for their names
        elif isinstance(node, ast.ImportFrom) and node.level == 1:
            assert f"{node.module}.py" in MODULES
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module]
            assert node.module not in ("os", "shutil")
            assert not FORBIDDEN_ATTRIBUTES & {alias.name for alias in node.names}
        for module in modules:
            allowed = THIRD_PARTY | STANDARD | ({"triton"} if name == KERNELS else set())
            assert module.partition(".")[0] in allowed, module


@pytest.mark.parametrize("name", MODULES)
def test_transformers_demands_no_other_package(name):
    """It refuses remote code whose imports are not installed, except in `try` blocks: Triton is not everywhere."""
    assert not {"triton"} & set(get_imports(ROOT / name))


@pytest.mark.parametrize("name", MODULES)
def test_calls(name):
    """No code from strings, no environment, no files except reading the model's and one copy (save_pretrained)."""
    nodes = list(ast.walk(tree(name)))
    inner = {id(node.value) for node in nodes if isinstance(node, ast.Attribute)}
    called = {id(node.func) for node in nodes if isinstance(node, ast.Call)}
    for node in nodes:
        if isinstance(node, ast.Name):
            assert node.id not in FORBIDDEN_NAMES, node.id
            assert node.id != "open" or id(node) in called  # never under an alias
        if isinstance(node, ast.Attribute):
            kernel = name == KERNELS and ast.unparse(node) == "tl.load"
            assert kernel or node.attr not in FORBIDDEN_ATTRIBUTES, ast.unparse(node)
        if isinstance(node, ast.Name | ast.Attribute) and id(node) not in inner:
            used = ast.unparse(node)
            assert used.partition(".")[0] not in ("os", "shutil") or used in ALLOWED, used
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "open":
            assert [argument.value for argument in node.args[1:]] == ["rb"], ast.unparse(node)


@pytest.mark.parametrize("name", MODULES)
def test_ascii_only(name):
    """When transformers copies modules on Windows, it reads them in the system's code page."""
    assert (ROOT / name).read_bytes().isascii()


@pytest.mark.parametrize("name", MODULES)
def test_nothing_happens_at_import(name):
    """Only imports, definitions, constants and the version block at module level."""
    harmless = (ast.Import, ast.ImportFrom, ast.ClassDef, ast.FunctionDef, ast.Assign, ast.AnnAssign, ast.If, ast.Expr)
    for node in tree(name).body:
        assert isinstance(node, harmless), ast.unparse(node)
        if isinstance(node, ast.Expr):
            assert isinstance(node.value, ast.Constant), ast.unparse(node)


@pytest.mark.parametrize("name", ("configuration", "tokenization"))
def test_an_old_transformers_is_refused(monkeypatch, name):
    """One sentence with both versions at import, in the first two modules that the Auto classes load."""
    monkeypatch.delitem(sys.modules, f"internlm.{name}_internlm", raising=False)
    monkeypatch.setattr("transformers.__version__", "4.56.2")
    with pytest.raises(ImportError, match=r"needs transformers 4\.57 or newer, and this is 4\.56\.2: pip install"):
        package.load(name)


WATCHED = """
import json, os, sys, tempfile
import transformers, torch  # their own imports are not audited
home, folder = os.path.realpath(sys.argv[1]), sys.argv[2]
events = []
def audit(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn"):
        events.append([event, repr(arguments)[:200]])
    elif event in ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate"):
        if not os.path.realpath(os.fsdecode(arguments[0])).startswith(home):
            events.append([event, repr(arguments)[:200]])
    elif event == "open" and isinstance(arguments[0], (str, bytes)) and isinstance(arguments[2], int):
        path = os.path.realpath(os.fsdecode(arguments[0]))
        if arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and not path.startswith((home, "/dev/")):
            events.append([event, path])
sys.addaudithook(audit)
tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
ids = tokenizer("Coming to the beautiful nature, we found", return_tensors="pt")
model.generate(**ids, max_new_tokens=5)
model.chat(tokenizer, "Who are you?", max_new_tokens=5)
print(json.dumps(events))
"""


def test_loading_and_generating_opens_no_connection_and_writes_only_caches(tiny_dir, tmp_path):
    """Under an audit hook: no connection, no process, no file opened for writing outside HF_HOME."""
    environment = {**os.environ, "HF_HOME": str(tmp_path), "TMPDIR": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop("HF_HUB_OFFLINE")  # a local folder needs no network even when online
    environment.pop("TORCHINDUCTOR_CACHE_DIR", None)  # torch sets it in the process that runs the tests
    command = [sys.executable, "-c", WATCHED, str(tmp_path), str(tiny_dir)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    assert json.loads(result.stdout.strip().splitlines()[-1]) == []
