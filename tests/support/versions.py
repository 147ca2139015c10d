"""Tests that an older torch cannot pass; docs/compatibility.md says what it lacks."""

import pytest
import torch


def needs_torch(version: str, lack: str) -> pytest.MarkDecorator:
    """Skip a test, or one of its parameters, below a version of torch, naming what an older one lacks."""
    found, needed = (tuple(int(part) for part in each.split(".")[:2]) for each in (torch.__version__, version))
    return pytest.mark.skipif(found < needed, reason=f"needs torch {version}: an older one {lack}")


# torch 2.6 cannot trace a decorator of transformers 5, with Llama neither.
needs_one_graph = needs_torch("2.7", "cannot trace the model in one graph")
