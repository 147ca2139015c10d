"""`make chat`: chat with InternLM in the terminal.

/reset starts a new conversation, /system TEXT sets the system text (without TEXT: none), /quit or Ctrl-D quits.
Ctrl-C stops the answer, not the program.
"""

import argparse
import contextlib

from demo import load, tiny_model
from transformers import logging, set_seed


with contextlib.suppress(ImportError):  # line editing and history for input(), where available
    import readline  # noqa: F401


def answer(model, tokenizer, query: str, history: list, system: str | None, **settings) -> list:
    """Stream one answer to the terminal; returns the history including it, even if incomplete."""
    shown = ""
    stream = model.stream_chat(tokenizer, query, history, meta_instruction=system, **settings)
    try:
        for response, turns in stream:
            print(response[len(shown) :], end="", flush=True)
            shown, history = response, turns
    except KeyboardInterrupt:
        print(" [stopped]", end="")
        with contextlib.suppress(KeyboardInterrupt):  # a second Ctrl-C during the last token
            stream.close()
    except (RuntimeError, ValueError) as error:
        print(f"[{error}]\n/reset starts a shorter conversation.", end="")
    print()
    return history


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", help="a model folder or Hub repository id (default: the tiny model of this project)"
    )
    parser.add_argument("--greedy", action="store_true", help="greedy decoding instead of sampling")
    parser.add_argument("--max-new-tokens", type=int, default=1024, help="default: %(default)s")
    parser.add_argument("--seed", type=int, help="random seed, for reproducible answers")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer, model = load(arguments.model or tiny_model())
    settings = {"do_sample": not arguments.greedy, "max_new_tokens": arguments.max_new_tokens}
    if arguments.seed is not None:
        set_seed(arguments.seed)

    print(__doc__.split("\n\n", 1)[1].strip())
    history, system = [], None
    while True:
        try:
            query = input("\n<|User|>: ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\ntype /quit to quit")
            continue
        if query in ("/quit", "/exit"):
            return
        if query == "/reset":
            history = []
        elif query.startswith("/system"):
            system = query.removeprefix("/system").strip()
        elif query.startswith("/"):
            print("commands: /reset, /system TEXT, /quit")
        elif query:
            print("<|Bot|>: ", end="", flush=True)
            history = answer(model, tokenizer, query, history, system, **settings)


if __name__ == "__main__":
    main()
