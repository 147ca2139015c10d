"""The experiments of `make reliability` at a smaller size."""

import psutil
import pytest
import torch

from support import fuzzing, stress
from support.processes import kill_at_random


@pytest.fixture(autouse=True)
def one_thread():
    """The model is too small for more: on a busy machine, threads would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("kind", ["config", "tokenizer", "saved_tokenizer"])
def test_fuzzed_files(kind, tiny_dir, tmp_path):
    """500 broken files each load or raise one of the listed exceptions, in bounded time and memory."""
    before = psutil.Process().memory_info().rss
    outcomes = getattr(fuzzing, f"fuzz_{kind}")(tiny_dir, tmp_path / "fuzz", 500)
    assert outcomes.total() >= 500 and min(outcomes["loaded"], outcomes["ValueError"]) > 5
    assert psutil.Process().memory_info().rss - before < 500e6


def test_eight_threads_on_one_model(tiny_model):
    """Prompts of 1 to 400 tokens in a window of 256: each thread gets the tokens of a single-threaded run."""
    equal, total = stress.generate_in_threads(tiny_model, rounds=1)
    assert equal == total == 8


def test_eight_processes_fill_one_empty_module_cache(tiny_dir, tmp_path):
    outputs = stress.load_in_processes(tiny_dir, tmp_path / "home")
    assert len(outputs) == 8 and set(outputs) == {outputs[0]} and outputs[0].startswith("[[1, "), outputs


def test_kill_9_during_assembly(tmp_path):
    """For upload_to_hub.py --local-dir; test_convert.py kills conversions."""
    source = stress.old_checkpoint(tmp_path / "source")
    found = kill_at_random(stress.assemble, source, tmp_path, points=9, torn=2)
    assert found["points"] >= 9 and found["torn"] >= 2 and found["equal"] == found["reruns"] > 2, found


def test_outputs_stay_the_same(tiny_model):
    """Too few generations to measure memory growth: `make reliability` does."""
    equal, _, _ = stress.soak(tiny_model, 60, different=10)
    assert equal == 60
