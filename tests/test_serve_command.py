"""What `make serve` starts: the engine, its arguments, and one line where it cannot."""

import json
import subprocess
import sys

import pytest

from tools.serving import vllm_server

from support.paths import ROOT


@pytest.fixture
def chat_20b(tmp_path):
    """The configuration of the 20B, with the code."""
    for path in [*ROOT.glob("*_internlm.py"), ROOT / "config.json"]:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def test_vllm_gets_a_short_name_and_the_users_options_last(chat_20b, monkeypatch):
    monkeypatch.chdir(chat_20b)
    arguments = vllm_server.arguments(".", None, ["--host", "0.0.0.0", "--api-key", "k"])
    assert arguments[arguments.index("--served-model-name") + 1] == chat_20b.name
    assert arguments[-4:] == ["--host", "0.0.0.0", "--api-key", "k"] and "127.0.0.1" in arguments
    assert not {"--hf-overrides", "--max-model-len"} & set(arguments)
    arguments = vllm_server.arguments("internlm/internlm-chat-20b", None, [])
    assert arguments[arguments.index("--served-model-name") + 1] == "internlm/internlm-chat-20b"


@pytest.mark.parametrize("context", [1000, 4096, 16384])
def test_context(chat_20b, context):
    """Within the window only a limit; beyond it the base that docs/serving.md names for 16,384 tokens on the 20B."""
    arguments = vllm_server.arguments(str(chat_20b), context, [])
    if context <= 4096:
        assert arguments[-2:] == ["--max-model-len", str(context)] and "--hf-overrides" not in arguments
    else:
        overrides = json.loads(arguments[arguments.index("--hf-overrides") + 1])
        assert overrides.pop("max_position_embeddings") == 16384
        assert overrides["rotary"].pop("base") == pytest.approx(40889.9, abs=0.05)
        assert overrides == {"rotary": {"type": "origin", "scaling_factor": 1.0}}
    with pytest.raises(SystemExit, match="only one of the two"):
        vllm_server.arguments(str(chat_20b), context, ["--hf-overrides={}"])


def serve(*arguments: str) -> str:
    """The one line with which examples/serve.py ends."""
    command = [sys.executable, "examples/serve.py", *arguments]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert process.returncode != 0 and process.stderr.strip().count("\n") == 0, process.stderr
    return process.stderr


def test_vllm_is_missing(tiny_dir):
    assert "`make serve ENGINE=vllm` installs it" in serve("--engine", "vllm", "--model", str(tiny_dir))


def test_no_text_beyond_the_window_is_computed_wrongly(tiny_dir, monkeypatch):
    monkeypatch.setattr(vllm_server.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
    with pytest.raises(SystemExit, match="unset it, and use CONTEXT=N"):
        vllm_server.serve(str(tiny_dir), None, [])


def test_context_must_be_positive(tiny_dir):
    command = [sys.executable, "examples/serve.py", "--engine", "vllm", "--context", "0"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert process.returncode == 2 and "--context must be positive" in process.stderr


def test_a_model_that_is_not_there():
    assert "'missing/model'" in serve("--model", "missing/model")
