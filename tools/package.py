"""The uploaded modules, as this checkout has them: which they are, and how to import them.

They import each other relatively, as they do on the Hub, so they need a package around them: here it is `internlm`.
"""

import importlib
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType


ROOT = Path(__file__).resolve().parents[1]
MODULES = tuple(sorted(path.name for path in ROOT.glob("*_internlm.py")))


def load(name: str) -> ModuleType:
    """Import one of the uploaded modules: `load("modeling")` is modeling_internlm.py."""
    if "internlm" not in sys.modules:
        package = ModuleType("internlm")
        package.__path__ = [str(ROOT)]
        sys.modules["internlm"] = package
    return importlib.import_module(f"internlm.{name}_internlm")


def add_modules(folder: Path) -> None:
    """Copy the modules into a checkpoint's folder, and name its classes in config.json, for `trust_remote_code`."""
    for module in MODULES:
        shutil.copy(ROOT / module, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["auto_map"] = json.loads((ROOT / "config.json").read_text(encoding="utf-8"))["auto_map"]
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
