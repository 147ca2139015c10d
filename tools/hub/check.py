"""The checks of an assembled folder: `check_files` reads it without loading anything, `check_loading` loads it.

`check_loading` runs load_and_generate.py in a fresh process, which knows nothing of this package but the folder or the
repository that is passed to it.
"""

import ast
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tools.convert.checkpoint import safetensors_tensors
from tools.convert.files import is_lfs_pointer, read_json
from tools.convert.tensors import check_shapes, parameters
from tools.hub.assemble import SMALL_FILES, allowed
from tools.hub.errors import LocalCheckFailed, NetworkLost
from tools.package import MODULES


# What the uploaded modules may import (and each other, relatively); transformers tells users to install all of it.
MAY_IMPORT = {*sys.stdlib_module_names, "torch", "transformers", "tokenizers", "sentencepiece"}


def check_files(folder: Path) -> None:
    """Check a folder's file names, JSON, code, card and tokenizer, and the tensors' names and shapes.

    Raises:
        LocalCheckFailed: Something is wrong; the message names the file.
        ConversionError: The weights are damaged or do not match config.json.
    """
    names = {path.name for path in folder.iterdir()}
    if foreign := sorted(name for name in names if not allowed(name)):
        raise LocalCheckFailed(f"{folder} holds files that do not belong in a repository: {', '.join(foreign)}.")
    if missing := [name for name in SMALL_FILES if name not in names]:
        raise LocalCheckFailed(f"{folder} lacks {', '.join(missing)}: assemble it again.")
    if pointers := sorted(name for name in names if is_lfs_pointer(folder / name)):
        raise LocalCheckFailed(f"{folder} holds Git LFS pointers instead of files: {', '.join(pointers)}.")
    settings = {name: read_json(folder / name) for name in names if name.endswith(".json")}
    classes = {name.removesuffix(".py"): _classes(folder / name, names) for name in MODULES}
    for name in ("config.json", "tokenizer_config.json"):
        for auto, reference in settings[name]["auto_map"].items():
            module, _, found = next(r for r in _as_list(reference) if r).partition(".")
            if found not in classes.get(module, ()):
                raise LocalCheckFailed(f"{folder / name}: auto_map's {auto} names {reference}, which does not exist.")
    _check_card(folder / "README.md")
    check_shapes(parameters(safetensors_tensors(folder)), settings["config.json"])


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _classes(module: Path, names: set[str]) -> set[str]:
    """The classes of a module, after a check of its imports; `names` are the files beside it."""
    tree = ast.parse(module.read_text(encoding="utf-8"), str(module))
    for line, imported in _imports(tree):
        package, _, submodule = imported.partition(".")
        if not package and f"{submodule}.py" not in names:
            raise LocalCheckFailed(
                f"{module}, line {line}: imports {imported}, but the folder lacks {submodule}.py; add it."
            )
        if package and package not in MAY_IMPORT:
            raise LocalCheckFailed(f"{module}, line {line}: users may not have {imported}; do without it.")
    return {node.name for node in tree.body if isinstance(node, ast.ClassDef)}


def _imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """The line and name of every module that must be there; relative names start with a dot."""
    optional = {id(node) for block in ast.walk(tree) if _survives_import_error(block) for node in ast.walk(block)}
    for node in ast.walk(tree):
        if id(node) in optional and not (isinstance(node, ast.ImportFrom) and node.level):
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.lineno, "." * node.level + node.module
        elif isinstance(node, ast.ImportFrom):  # from . import x
            yield from ((node.lineno, "." * node.level + alias.name) for alias in node.names)


def _survives_import_error(node: ast.AST) -> bool:
    """Whether it is a `try` block that catches ImportError; transformers does not demand what is imported there."""
    if not isinstance(node, ast.Try):
        return False
    return any(isinstance(one.type, ast.Name) and one.type.id == "ImportError" for one in node.handlers)


def _check_card(path: Path) -> None:
    import yaml
    from huggingface_hub.repocard import metadata_load

    try:
        metadata = metadata_load(path) or {}
    except (yaml.YAMLError, ValueError) as error:
        raise LocalCheckFailed(f"{path}: its front matter is not YAML ({error}).") from error
    if not isinstance(metadata, dict) or not metadata.get("license"):
        raise LocalCheckFailed(f"{path}: its front matter, between two lines ---, must give at least a license.")


def check_loading(where: str, revision: str | None = None, scratch: Path | None = None) -> dict[str, Any]:
    """Load a folder or repository in a fresh process and generate from it.

    Args:
        where: Folder or repository id.
        revision: Commit of the repository.
        scratch: Folder for the process's caches, which are removed afterwards; a repository is downloaded there.

    Returns:
        `tokens`, the ids of eight greedily generated tokens, and `logits`, the sum of the first one's absolute logits.

    Raises:
        LocalCheckFailed: It does not load, or a tensor is missing or not finite; the message is the process's own.
        NetworkLost: The connection broke during the download, or the Hub answered with an error three times.
    """
    with tempfile.TemporaryDirectory(prefix="upload-check-", dir=scratch) as caches:
        environment = {
            **os.environ,
            "HF_HUB_CACHE": f"{caches}/hub",
            "HF_MODULES_CACHE": f"{caches}/modules",
            "TRANSFORMERS_VERBOSITY": "error",
        }
        script = Path(__file__).with_name("load_and_generate.py")
        command = [sys.executable, str(script), where, *(["--revision", revision] if revision else [])]
        child = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, encoding="utf-8")
    if child.returncode < 0:
        reason = "out of memory? --no-verify-local and --no-verify-remote check files only"
        raise LocalCheckFailed(f"Loading {where} was killed by signal {-child.returncode} ({reason}).")
    try:
        result = json.loads(child.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        raise LocalCheckFailed(f"Loading {where} ended with exit code {child.returncode} and no result.") from None
    if result.get("network"):
        raise NetworkLost(f"{where} is on the Hub, but could not be checked. {result['error']}")
    if "error" in result:
        raise LocalCheckFailed(f"{where} does not load: {result['error']}")
    return result
