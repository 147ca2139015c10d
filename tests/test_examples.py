"""Every example runs as it is called, on the tiny model, and shows what it says."""

import subprocess
import sys

import pytest
from conftest import ROOT


def run(name: str, model, *arguments: str) -> str:
    """What `python examples/<name>.py --model ...` prints."""
    command = [sys.executable, f"examples/{name}.py", *arguments, "--model", str(model)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=300)
    assert process.returncode == 0, process.stderr.decode()
    return process.stdout.decode()


def test_pipeline(tiny_dir):
    output = run("pipeline", tiny_dir)
    assert output.startswith("In the evening ") and "\nassistant: " in output
    assert "来到美丽的大自然，我们发现" in output


def test_embeddings(tiny_dir):
    """A sentence is itself, and nearer to one that shares its words than to another."""
    rows = run(
        "embeddings", tiny_dir, "The sky is blue.", "The sky was blue.", "We ate bread and cheese."
    ).splitlines()
    first = [float(value) for value in rows[0].split()[:3]]
    assert first[0] == pytest.approx(1, abs=0.001) and first[1] > first[2]


def test_classify(tiny_dir):
    """Three sentences that it was not taught, in two languages, each sorted rightly."""
    rows = run("classify", tiny_dir).splitlines()
    assert [row.split()[0] for row in rows] == ["food", "sky", "food"]


def test_offload(tiny_dir):
    """The text does not depend on where the layers are."""
    small, large = (run("offload", tiny_dir, "--memory", memory).splitlines() for memory in ("2MB", "1GB"))
    assert "on disk" in small[0] and "on disk" not in large[0]
    assert small[1:] == large[1:] and small[1].startswith("In the evening ")


@pytest.mark.ecosystem
def test_finetune_lora(tiny_dir):
    """The model learns the answer, and learns to stop after it."""
    # peft imports gptqmodel, if it is there, which prints a banner between the two lines.
    lines = run("finetune_lora", tiny_dir).splitlines()
    before, after = (line for line in lines if line.startswith(("before:", "after:")))
    answer = "Old Tomas keeps the lantern, and the lantern keeps the harbour."
    assert answer not in before and after == f"after:  {answer}"


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_help(path):
    process = subprocess.run([sys.executable, str(path), "--help"], cwd=ROOT, capture_output=True, text=True)
    if "No module named 'peft'" in process.stderr:  # the ecosystem tests run that one whole
        assert path.stem == "finetune_lora"
    else:
        assert process.returncode == 0 and "--model" in process.stdout, process.stderr
