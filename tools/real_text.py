"""Real English text that is on every machine: Python's documentation, and the source code of its standard library.

Both differ a little between versions of Python, so what is measured on them names the version.
"""

import importlib.util
import random
from pathlib import Path
from pydoc_data.topics import topics


LIBRARY = ("argparse", "asyncio.events", "collections", "dataclasses", "datetime", "decimal", "difflib", "doctest")
LIBRARY += ("inspect", "ipaddress", "logging", "optparse", "pathlib", "statistics", "subprocess", "tarfile", "typing")


def documentation(seed: int | None = None) -> str:
    """The topics of `help()`, 465 kB: in alphabetical order, or shuffled by a seed."""
    names = sorted(topics)
    if seed is not None:
        random.Random(seed).shuffle(names)
    return "\n\n".join(topics[name].strip() for name in names)


def library(seed: int | None = None) -> str:
    """Modules of the standard library as they are, 1.3 MB: in the order of LIBRARY, or shuffled by a seed."""
    names = list(LIBRARY)
    if seed is not None:
        random.Random(seed).shuffle(names)
    return "\n\n".join(Path(importlib.util.find_spec(name).origin).read_text(encoding="utf-8") for name in names)
