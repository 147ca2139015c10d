"""Tests that an older torch cannot pass; docs/compatibility.md says what it lacks."""

import pytest
import torch
import transformers


def _parts(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def needs_torch(version: str, lack: str, transformers_from: str = "0.0") -> pytest.MarkDecorator:
    """Skip below a version of torch, naming what an older one lacks, if need be from a version of transformers on."""
    older = _parts(torch.__version__) < _parts(version)
    concerned = _parts(transformers.__version__) >= _parts(transformers_from)
    return pytest.mark.skipif(older and concerned, reason=f"needs torch {version}: an older one {lack}")


# Of the model as a whole: it is behind a decorator of transformers. With a break in the graph there it works.
needs_one_graph = needs_torch("2.7", "cannot trace transformers 5 in one graph", transformers_from="5.0")
