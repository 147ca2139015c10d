"""`make chat`: chat with InternLM in the terminal."""

import argparse
import contextlib
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from demo import ROOT, load
from transformers import logging, set_seed


HISTORY = ROOT / "build" / "chat-history"
HELP = """\
/reset          start a new conversation
/system TEXT    set the system text; without TEXT: none
/help           show this
/quit           quit; so does Ctrl-D
Enter sends the message, Alt+Enter begins a new line, and pasted text stays together. Up and Down recall earlier
messages, also of earlier runs. Ctrl-C stops an answer. A message that begins with "/" and is no command: put a space
before it."""


class Chat:
    """A conversation and the commands that change it."""

    def __init__(self, model: Any, tokenizer: Any, **settings: Any) -> None:
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.history: list[tuple[str, str]] = []
        self.system: str | None = None

    def answer(self, query: str) -> None:
        """Stream one answer to the terminal. An answer that is interrupted stays in the conversation as it is."""
        shown = ""
        stream = self.model.stream_chat(
            self.tokenizer, query, self.history, meta_instruction=self.system, **self.settings
        )
        print("Bot: ", end="", flush=True)
        try:
            for response, history in stream:
                print(response[len(shown) :], end="", flush=True)
                shown, self.history = response, history
        except KeyboardInterrupt:
            with contextlib.suppress(KeyboardInterrupt):  # a second Ctrl-C during the last token
                stream.close()
            print()
            note("stopped")
        except (RuntimeError, ValueError) as error:
            print()
            note(f"{error}\n/reset starts a new, shorter conversation.")
        else:
            print()

    def command(self, line: str) -> bool:
        """Carry out a command; False for /quit."""
        name, text = (*line.split(maxsplit=1), "")[:2]
        if name in ("/quit", "/exit"):
            return False
        if name == "/reset":
            self.history = []
            note("A new conversation begins.")
        elif name == "/system":
            self.system = text.strip()
            note(f"The system text is now: {self.system}" if self.system else "There is no system text now.")
        elif name == "/help":
            note(HELP)
        else:
            note(f"There is no command {name}. /help lists the commands; as a message, put a space before it.")
        return True


def note(text: str) -> None:
    """Print what is not the model's."""
    for line in text.splitlines():
        print(f"\033[2m* {line}\033[0m" if sys.stdout.isatty() else f"* {line}", flush=True)


def is_command(line: str) -> bool:
    """Whether a message is a command: one word of letters after the slash, as no path is."""
    word = line.split(maxsplit=1)[0] if line.startswith("/") else ""
    return word[1:].isalpha() and "\n" not in line


def reader(history: Path) -> Callable[[], str]:
    """A function that asks for a message. Without a terminal it reads a line of the standard input."""
    if not sys.stdin.isatty():
        return input
    try:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.history import FileHistory
        from prompt_toolkit.key_binding import KeyBindings
    except ImportError as error:
        raise SystemExit("examples/chat.py needs prompt_toolkit: pip install -r requirements-chat.txt") from error
    keys = KeyBindings()
    keys.add("enter")(lambda event: event.current_buffer.validate_and_handle())
    keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
    history.parent.mkdir(parents=True, exist_ok=True)
    session: Any = PromptSession(
        "You: ",
        multiline=True,
        key_bindings=keys,
        history=FileHistory(str(history)),
        prompt_continuation="",
        enable_suspend=True,
    )
    return session.prompt


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a model folder or Hub repository id (default: the tiny model)")
    parser.add_argument("--greedy", action="store_true", help="greedy decoding instead of sampling")
    parser.add_argument("--max-new-tokens", type=int, default=1024, help="default: %(default)s")
    parser.add_argument("--seed", type=int, help="random seed, for reproducible answers")
    parser.add_argument("--system", help="system text (default: the prompt format's own)")
    parser.add_argument("--history", type=Path, default=HISTORY, help="your messages (default: build/chat-history)")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    read = reader(arguments.history)
    tokenizer, model = load(arguments.model)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # from here on, Ctrl-C stops an answer
    if arguments.seed is not None:
        set_seed(arguments.seed)
    chat = Chat(model, tokenizer, do_sample=not arguments.greedy, max_new_tokens=arguments.max_new_tokens)
    chat.system = arguments.system
    note("/help lists the commands, /quit quits.")
    while True:
        try:
            line = read()
        except EOFError:
            break
        except KeyboardInterrupt:
            note("/quit or Ctrl-D quits.")
            continue
        if is_command(line):
            if not chat.command(line):
                break
        elif line.strip():
            chat.answer(line.strip())


if __name__ == "__main__":
    main()
