"""Is this folder a sound model repository, and does it speak?

`check_files` reads the files without loading anything. `check_loading` starts a fresh process, `python
tools/hub_check.py`, that knows nothing of this package but the folder or the repository that it is given.
"""

import argparse
import ast
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.hub.errors import LocalCheckFailed


# What the uploaded modules may import (and each other, relatively); transformers asks users to install all of it.
MAY_IMPORT = {*sys.stdlib_module_names, "torch", "transformers", "tokenizers", "sentencepiece"}
PROMPT = "Coming to the beautiful nature, we found"
NEW_TOKENS = 8


def check_files(folder: Path) -> None:
    """Check a folder as it stands: names, JSON, code, card, tokenizer, and the tensors' names and shapes.

    Raises:
        LocalCheckFailed: Something is wrong; the message names the file.
        ConversionError: The weights are damaged or do not fit config.json.
    """
    from tools.convert.checkpoint import safetensors_files
    from tools.convert.files import check_shapes, read_json
    from tools.hub.assemble import MODULES, SMALL_FILES, allowed
    from tools.hub.variant import is_lfs_pointer

    names = {path.name for path in folder.iterdir()}
    if foreign := sorted(name for name in names if not allowed(name)):
        raise LocalCheckFailed(f"{folder} holds what does not belong into a repository: {', '.join(foreign)}.")
    if missing := [name for name in SMALL_FILES if name not in names]:
        raise LocalCheckFailed(f"{folder} lacks {', '.join(missing)}: assemble it again.")
    if pointers := sorted(name for name in names if is_lfs_pointer(folder / name)):
        raise LocalCheckFailed(f"{folder} holds Git LFS pointers instead of files: {', '.join(pointers)}.")
    settings = {name: read_json(folder / name) for name in names if name.endswith(".json")}
    classes = {name.removesuffix(".py"): _classes(folder / name) for name in MODULES}
    for name in ("config.json", "tokenizer_config.json"):
        for auto, reference in settings[name]["auto_map"].items():
            module, _, found = next(r for r in _as_list(reference) if r).partition(".")
            if found not in classes.get(module, ()):
                raise LocalCheckFailed(f"{folder / name}: auto_map's {auto} names {reference}, which is not there.")
    _check_card(folder / "README.md")
    tensors = [tensor for content in safetensors_files(folder).values() for tensor in content]
    check_shapes([tensor for tensor in tensors if not tensor.name.endswith("inv_freq")], settings["config.json"])


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _classes(module: Path) -> set[str]:
    """The classes of a module, whose imports are checked on the way."""
    tree = ast.parse(module.read_text(encoding="utf-8"), str(module))
    for node in ast.walk(tree):
        imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            imported = [node.module or ""]
        if foreign := [name for name in imported if name.split(".")[0] not in MAY_IMPORT]:
            raise LocalCheckFailed(f"{module}, line {node.lineno}: users may not have {foreign[0]}; do without it.")
    return {node.name for node in tree.body if isinstance(node, ast.ClassDef)}


def _check_card(path: Path) -> None:
    import yaml
    from huggingface_hub.repocard import metadata_load

    try:
        metadata = metadata_load(path) or {}
    except (yaml.YAMLError, ValueError) as error:
        raise LocalCheckFailed(f"{path}: its front matter is not YAML ({error}).") from error
    if not isinstance(metadata, dict) or not metadata.get("license"):
        raise LocalCheckFailed(f"{path}: its front matter, between two lines ---, must give a license at least.")


def check_loading(where: str, revision: str | None = None, scratch: Path | None = None) -> dict[str, Any]:
    """Load a folder or repository in a fresh process and let it speak.

    Args:
        where: Folder or repository id.
        revision: Commit of the repository.
        scratch: Where the process may keep its caches, removed afterwards; a repository is downloaded there.

    Returns:
        `tokens`, eight greedily chosen ids, and `logits`, the sum of the absolute logits before them.

    Raises:
        LocalCheckFailed: It does not load, a tensor is missing or not finite; the message is the process's own.
    """
    with tempfile.TemporaryDirectory(prefix="upload-check-", dir=scratch) as caches:
        environment = {
            **os.environ,
            "HF_HUB_CACHE": f"{caches}/hub",
            "HF_MODULES_CACHE": f"{caches}/modules",
            "TRANSFORMERS_VERBOSITY": "error",
        }
        command = [sys.executable, __file__, where, *(["--revision", revision] if revision else [])]
        child = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, encoding="utf-8")
    if child.returncode < 0:
        reason = "too little memory? --no-verify-local and --no-verify-remote check files only"
        raise LocalCheckFailed(f"Loading {where} was killed by signal {-child.returncode} ({reason}).")
    try:
        result = json.loads(child.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        raise LocalCheckFailed(f"Loading {where} ended with exit code {child.returncode} and no result.") from None
    if "error" in result:
        raise LocalCheckFailed(f"{where} does not load: {result['error']}")
    return result


def _check_finite(folder: Path) -> None:
    """Read every tensor once, one at a time."""
    from tqdm import tqdm

    from tools.convert.checkpoint import safetensors_files

    tensors = [tensor for content in safetensors_files(folder).values() for tensor in content]
    for tensor in tqdm(tensors, desc="finite", unit="tensor", leave=False):
        if not tensor.read().isfinite().all():
            raise LocalCheckFailed(f"{tensor.name} holds NaN or infinite values: fetch the weights again.")


def speak(where: str, revision: str | None = None) -> dict[str, Any]:
    """What `check_loading` does, in this process."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    if os.path.isdir(where):
        _check_finite(Path(where))
    source: dict[str, Any] = {"revision": revision, "trust_remote_code": True}
    config = AutoConfig.from_pretrained(where, **source)
    for reference in config.auto_map.values():
        get_class_from_dynamic_module(reference.split("--")[-1], where, revision=revision)
    tokenizer = AutoTokenizer.from_pretrained(where, **source)
    model, report = AutoModelForCausalLM.from_pretrained(
        where, **source, dtype="auto", device_map="auto", output_loading_info=True
    )
    if wrong := {key: sorted(map(str, names)) for key, names in report.items() if names}:
        raise LocalCheckFailed(f"the weights do not fit the model: {wrong}")
    inputs = tokenizer(PROMPT, return_tensors="pt").to(model.device)
    with torch.no_grad():
        logits = float(model(**inputs, logits_to_keep=1).logits.float().abs().sum())
    if not math.isfinite(logits):
        raise LocalCheckFailed("the logits are not finite: the weights or the environment are damaged.")
    output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
    return {"tokens": output[0, inputs["input_ids"].shape[1] :].tolist(), "logits": logits}


def main() -> int:
    parser = argparse.ArgumentParser(description="Load a model folder or repository and let it speak; prints JSON.")
    parser.add_argument("where", help="folder or repository id")
    parser.add_argument("--revision", help="commit of the repository")
    arguments = parser.parse_args()
    try:
        result = speak(arguments.where, arguments.revision)
    except Exception as error:  # whatever fails while loading is the answer
        result = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(result))
    return int("error" in result)


if __name__ == "__main__":
    sys.exit(main())
