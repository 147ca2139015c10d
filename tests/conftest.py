"""Fixtures for all tests. `tiny_dir` is a model folder exactly as it would be uploaded to the Hub."""

import contextlib
import os
import signal
import sys
import threading
import types
from pathlib import Path
from typing import Any


# No test accesses the network: models are loaded from folders, or from a Hub that the test runs on the loopback.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# A shell starts background jobs with SIGINT ignored, which the tests' child processes would inherit.
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for tools, benchmarks, examples and upload_to_hub

import pytest
import torch

from tools import package

from support.isolation import changes, model_state, process_state
from support.paths import TINY


# Tests that need the packages of a separate environment, and the marker that selects them there.
OWN_ENVIRONMENTS = {"ecosystem": "ecosystem", "test_web.py": "web"}
OWN_ENVIRONMENTS |= {"test_vllm.py": "vllm", "test_vllm_load.py": "vllm", "test_llamacpp.py": "llamacpp"}


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Import these tests only with their marker: other environments lack their packages."""
    marker = OWN_ENVIRONMENTS.get(collection_path.name)
    return True if marker and config.getoption("markexpr") != marker else None


# The models that several tests share, by fixture.
SHARED: dict[pytest.FixtureDef, torch.nn.Module] = {}


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef) -> Any:
    value = yield
    if fixturedef.scope != "function" and isinstance(value, torch.nn.Module):
        SHARED[fixturedef] = value
    return value


def pytest_fixture_post_finalizer(fixturedef: pytest.FixtureDef) -> None:
    SHARED.pop(fixturedef, None)


@pytest.fixture(autouse=True)
def nothing_is_left_behind(request: pytest.FixtureRequest):
    """Tests pass in any order: each begins with the same random numbers, and leaves everything as it was.

    The libraries of other environments change settings of the process themselves, so nothing is checked there.
    """

    def state() -> dict[str, object]:
        models = [(fixture.argname, model_state(model)) for fixture, model in SHARED.items()]
        return process_state() | {f"{name}: {key}": value for name, one in models for key, value in one.items()}

    torch.manual_seed(0)
    before = state()
    yield
    elsewhere = any(request.node.get_closest_marker(name) for name in ("evaluation", *OWN_ENVIRONMENTS.values()))
    left = [] if elsewhere else changes(before, state())
    assert not left, "\n".join(["This test leaves behind:", *left])


@pytest.fixture(scope="session")
def modeling() -> types.ModuleType:
    """modeling_internlm.py, imported from this checkout instead of a model folder."""
    return package.load("modeling")


@pytest.fixture(scope="session")
def rotary() -> types.ModuleType:
    """rotary_internlm.py, imported without going through a model folder."""
    return package.load("rotary")


@pytest.fixture(scope="session")
def positions() -> types.ModuleType:
    """positions_internlm.py, imported without going through a model folder."""
    return package.load("positions")


@pytest.fixture(scope="session")
def configuration() -> types.ModuleType:
    """configuration_internlm.py, imported from this checkout instead of a model folder."""
    return package.load("configuration")


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """checkpoints/tiny assembled into a complete model folder. Read-only: tests that write make a copy."""
    from upload_to_hub import assemble

    out = tmp_path_factory.mktemp("hub") / "internlm-tiny"
    assemble(weights=TINY, out=out)
    return out


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_dir: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_dir, trust_remote_code=True)


@pytest.fixture(scope="session")
def tiny_model(tiny_dir: Path):
    """The tiny model in float32, in evaluation mode. Tests must not change it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_dir, trust_remote_code=True, dtype=torch.float32).eval()


@pytest.fixture
def no_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the GPU streams of an offloaded cache: a CUDA build of torch makes none without a driver."""

    class NoStream(contextlib.nullcontext):
        def wait_stream(self, other: Any) -> None:
            pass

    monkeypatch.setattr(torch, "Stream", NoStream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: NoStream())
    monkeypatch.setattr(torch.cuda, "Stream", NoStream)  # this and the next with torch 2.6
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
