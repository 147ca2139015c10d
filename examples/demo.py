"""`make demo`: streams an English and a Chinese text and a chat reply that stops by itself."""

import argparse
import signal
import sys
import time
from pathlib import Path
from typing import Any


signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the program without a traceback, from here on

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer, logging, set_seed  # noqa: E402


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools.model_folder import base_model, complete_model  # noqa: E402


PROMPTS = ("Coming to the beautiful nature, we found", "来到美丽的大自然，我们发现")
QUESTION = "Who are you?"
# The sampling settings of the official model card.
SETTINGS = {"max_length": 128, "do_sample": True, "top_p": 0.8, "temperature": 0.8, "repetition_penalty": 1.05}


def load(name: str | None) -> tuple[Any, Any]:
    """Tokenizer and model of a folder or Hub repository (None: the tiny model), in its saved dtype; or of an adapter.

    Raises:
        SystemExit: There is no such model.
    """
    if name is None:  # the tiny model needs no progress bar
        logging.disable_progress_bar()
    base = base_model(name)
    adapter, name = name if base else None, base or complete_model(name)
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True, dtype="auto", device_map="auto")
    if adapter:
        model.load_adapter(adapter)
    return tokenizer, model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", help="a model folder or Hub repository id (default: the tiny model of this project)"
    )
    parser.add_argument("--prompt", help="your prompt, instead of the two texts and the chat")
    parser.add_argument("--seed", type=int, default=1, help="random seed (default: %(default)s)")
    arguments = parser.parse_args()
    logging.set_verbosity_error()

    tokenizer, model = load(arguments.model)
    tokens, seconds = 0, 0.0
    for prompt in [arguments.prompt] if arguments.prompt else PROMPTS:
        set_seed(arguments.seed)
        inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
        settings = {**SETTINGS, "max_length": max(SETTINGS["max_length"], inputs["input_ids"].shape[1] + 100)}
        start = time.perf_counter()
        output = model.generate(**inputs, **settings, streamer=TextStreamer(tokenizer, skip_special_tokens=True))
        seconds += time.perf_counter() - start
        tokens += output.shape[1] - inputs["input_ids"].shape[1]
        print()

    if not arguments.prompt and tokenizer.chat_template:
        set_seed(arguments.seed)
        print(f"<|User|>: {QUESTION}\n<|Bot|>: ", end="")
        model.chat(tokenizer, QUESTION, streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True))
        print()
    device = torch.cuda.get_device_name() if model.device.type == "cuda" else str(model.device)
    print(f"{tokens / seconds:.1f} tokens per second on {device} ({str(model.dtype).removeprefix('torch.')})")


if __name__ == "__main__":
    main()
