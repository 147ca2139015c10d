"""The uploaded modules, as this checkout has them: which they are, and how to import them.

They import each other relatively, as they do on the Hub, so they need a package around them: here it is `internlm`.
"""

import filecmp
import importlib
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType


ROOT = Path(__file__).resolve().parents[1]
REAL = ROOT / "build" / "smollm2"  # tools/real_model.py makes it
MODULES = tuple(sorted(path.name for path in ROOT.glob("*_internlm.py")))


def load(name: str) -> ModuleType:
    """Import one of the uploaded modules: `load("modeling")` is modeling_internlm.py."""
    if "internlm" not in sys.modules:
        package = ModuleType("internlm")
        package.__path__ = [str(ROOT)]
        sys.modules["internlm"] = package
    return importlib.import_module(f"internlm.{name}_internlm")


def add_modules(folder: Path) -> None:
    """Copy the modules into a checkpoint's folder, and name its classes in config.json, for `trust_remote_code`.

    What is the same already is left alone, since another process may be reading it.
    """
    for module in MODULES:
        if not (folder / module).exists() or not filecmp.cmp(ROOT / module, folder / module, shallow=False):
            shutil.copy(ROOT / module, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    auto_map = json.loads((ROOT / "config.json").read_text(encoding="utf-8"))["auto_map"]
    if config.get("auto_map") != auto_map:
        text = json.dumps({**config, "auto_map": auto_map}, indent=2) + "\n"
        (folder / "config.json").write_text(text, encoding="utf-8")
