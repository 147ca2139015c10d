"""`make serve ENGINE=vllm`: vLLM's OpenAI-compatible server with the settings of this model."""

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from tools.convert.llama import fixed_base


TOOL_PARSER = Path(__file__).with_name("vllm_tool_parser.py")


def serve(name: str, context: int | None, options: list[str]) -> None:
    """Become vLLM's server for a complete model.

    Args:
        name: A folder or repository (tools.model_folder.complete_model).
        context: Tokens, prompt and reply together; beyond the trained window the rotary base is fixed for all lengths.
            None: the trained window.
        options: vLLM's; they win over those given here.

    Raises:
        SystemExit: vLLM is not installed, or options contradict each other. The message is one line.
    """
    if importlib.util.find_spec("vllm") is None:
        raise SystemExit("vllm is missing: `make serve ENGINE=vllm` installs it, in an environment of its own.")
    if os.environ.get("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "0").lower() in ("1", "true"):
        raise SystemExit(
            "With VLLM_ALLOW_LONG_MAX_MODEL_LEN vLLM would compute texts beyond the trained window wrongly: unset it, "
            "and use CONTEXT=N."
        )
    # On a CPU: GiB of keys and values. vLLM's default is nearly all of the memory, which it takes minutes to fill.
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *arguments(name, context, options)]
    os.execv(command[0], command)


def arguments(name: str, context: int | None, options: list[str]) -> list[str]:
    """The arguments of vLLM's server; see serve()."""
    given = [
        *("--model", name, "--served-model-name", Path(name).resolve().name if Path(name).is_dir() else name),
        *("--trust-remote-code", "--model-impl", "transformers", "--host", "127.0.0.1"),
        # After SIGTERM, requests have these seconds to be answered. vLLM's default, none, kills the engine, and then
        # neither says so to the clients nor exits before they close their connections.
        *("--shutdown-timeout", "30"),
        *("--enable-auto-tool-choice", "--tool-call-parser", "internlm", "--tool-parser-plugin", str(TOOL_PARSER)),
    ]
    if context is not None:
        if any(option.startswith("--hf-overrides") for option in options):
            raise SystemExit("CONTEXT sets vLLM's --hf-overrides: give only one of the two.")
        config = AutoConfig.from_pretrained(name, trust_remote_code=True)
        if context <= config.max_position_embeddings:
            given += ["--max-model-len", str(context)]
        else:
            given += ["--hf-overrides", json.dumps(fixed_context(config, context))]
    return given + options


def fixed_context(config: Any, context: int) -> dict[str, Any]:
    """What to override in the configuration to serve `context` tokens with one rotary base at every length."""
    rotary = {"type": "origin", "base": fixed_base(config, context), "scaling_factor": 1.0}
    return {"rotary": rotary, "max_position_embeddings": context}
