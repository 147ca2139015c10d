"""Tests that an older torch cannot pass; docs/compatibility.md says what it lacks."""

import pytest
import torch
import transformers


def needs_torch(version: str, lack: str, with_transformers: str = "0.0") -> pytest.MarkDecorator:
    """Skip a test, or one of its parameters, below a version of torch, naming what an older one lacks.

    `with_transformers` is the oldest transformers that needs it.
    """
    unmet = _release(torch.__version__) < _release(version)
    needed = _release(transformers.__version__) >= _release(with_transformers)
    return pytest.mark.skipif(unmet and needed, reason=f"needs torch {version}: an older one {lack}")


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


# With Llama neither.
needs_dynamo = needs_torch("2.7", "cannot trace a decorator of transformers 5", with_transformers="5.0")
