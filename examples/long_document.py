"""Ask about a long text. python examples/long_document.py FILE "What is it about?"

The text is read in chunks, which bounds the memory, and beyond the trained window with dynamic NTK.
"""

import argparse
import bisect
from pathlib import Path

import torch
from demo import load
from tqdm import tqdm
from transformers import DynamicCache, TextStreamer, logging


def read(path: Path) -> str:
    """The text of the file.

    Raises:
        SystemExit: It cannot be read, or is not text.
    """
    try:
        return path.read_text(encoding="utf-8").rstrip()
    except OSError as error:
        raise SystemExit(f"{str(path)!r} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SystemExit(f"{str(path)!r} is not text in UTF-8: convert it first (for a PDF: pdftotext).") from error


def prompt(tokenizer, text: str, question: str) -> torch.Tensor:
    """Token ids [1, tokens] of the text and the question: one turn of a chat, or plain text for a base model."""
    content = f"{text}\n\n{question}"
    if not tokenizer.chat_template:
        return tokenizer(f"{content}\n", return_tensors="pt")["input_ids"]
    messages = [{"role": "user", "content": content}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)[
        "input_ids"
    ]


def last_line(tokenizer, text: str, question: str, tokens: int) -> int:
    """The number of the last line, from 1, up to which text and question are at most this many tokens; 0 for none."""
    lines = text.splitlines(keepends=True)
    return bisect.bisect_right(
        range(1, len(lines) + 1),
        tokens,
        key=lambda number: prompt(tokenizer, "".join(lines[:number]).rstrip(), question).shape[1],
    )


@torch.no_grad()
def answer(model, tokenizer, ids: torch.Tensor, chunk: int, **settings) -> str:
    """Read the prompt in chunks with a progress bar, and stream the answer."""
    cache = DynamicCache(config=model.config)
    read_first = ids[:, :-1]  # generate reads the last token itself
    with tqdm(total=read_first.shape[1], unit="token", desc="reading") as bar:
        for part in read_first.split(chunk, dim=1):
            model(part, cache=cache, logits_to_keep=1)
            bar.update(part.shape[1])
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    output = model.generate(ids, cache=cache, streamer=streamer, **settings)
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="a text in UTF-8")
    parser.add_argument("question")
    parser.add_argument("--model", help="a model folder or Hub repository id (default: the tiny model)")
    parser.add_argument("--context", type=int, default=16_384, help="the most tokens to read (default: %(default)s)")
    parser.add_argument("--chunk", type=int, default=1024, help="tokens read at a time (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="default: %(default)s")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    text = read(arguments.file)
    tokenizer, model = load(arguments.model)
    ids = prompt(tokenizer, text, arguments.question).to(model.device)
    tokens, window = ids.shape[1], model.config.max_position_embeddings
    if tokens > arguments.context:
        fits = last_line(tokenizer, text, arguments.question, arguments.context)
        raise SystemExit(
            f"{str(arguments.file)!r} and the question are {tokens:,} tokens, more than --context "
            f"{arguments.context:,}. Cut it after line {fits}, or ask about its parts."
        )
    print(f"{tokens:,} tokens with the question; the trained window is {window:,}.")
    if tokens > window:
        fits = last_line(tokenizer, text, arguments.question, window)
        print(f"The text fits into it up to line {fits}; beyond it, dynamic NTK extrapolates.")
    answer(model, tokenizer, ids, arguments.chunk, max_new_tokens=arguments.max_new_tokens, do_sample=False)


if __name__ == "__main__":
    main()
