"""The experiments of reliability.py (`make reliability`) at a size for every day."""

import psutil
import pytest
import reliability
import torch

from support.processes import kill_at_random


@pytest.fixture(autouse=True)
def one_thread():
    """The model is too small for more: on a busy machine they wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("kind", ["config", "tokenizer", "saved_tokenizer"])
def test_fuzzed_files(kind, tiny_dir, tmp_path):
    """500 broken files each: loaded, or refused by an exception of the list, in bounded time and memory."""
    before = psutil.Process().memory_info().rss
    outcomes = getattr(reliability, f"fuzz_{kind}")(tiny_dir, tmp_path / "fuzz", 500)
    assert outcomes.total() >= 500 and min(outcomes["loaded"], outcomes["ValueError"]) > 5
    assert psutil.Process().memory_info().rss - before < 500e6


def test_eight_threads_on_one_model(tiny_model):
    """Prompts of 1 to 400 tokens in a window of 256: each thread's tokens are those of the same prompt alone."""
    equal, asked = reliability.generate_in_threads(tiny_model, rounds=1)
    assert equal == asked == 8


def test_eight_processes_fill_one_empty_module_cache(tiny_dir, tmp_path):
    said = reliability.load_in_processes(tiny_dir, tmp_path / "home")
    assert len(said) == 8 and set(said) == {said[0]} and said[0].startswith("[[1, "), said


def test_kill_9_during_assembly(tmp_path):
    """test_convert.py kills conversions; here it is what upload_to_hub.py --local-dir makes."""
    source = reliability.old_checkpoint(tmp_path / "source")
    found = kill_at_random(reliability.assemble, source, tmp_path, points=9)
    assert found["points"] >= 9 and found["equal"] == found["reruns"] > 2, found


def test_answers_stay_the_same(tiny_model):
    """The memory's slope says nothing over so few: `make reliability` measures it."""
    equal, _, _ = reliability.soak(tiny_model, 60, different=10)
    assert equal == 60
