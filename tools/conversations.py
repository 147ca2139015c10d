"""Conversations to train on: a file with one JSON object a line, as token ids with the assistant's marked."""

import json
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from tqdm import tqdm


Conversation = dict[str, Any]  # "messages", and "tools" if the file has them


def read(path: Path) -> dict[int, Conversation]:
    """The conversations of a file by line number, from 1. Empty lines are skipped.

    Raises:
        SystemExit: The file cannot be read, is empty, or has a bad line. The message is one line.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # not splitlines: JSON may contain U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise SystemExit(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
    found = {}
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                found[number] = parse(line)
            except ValueError as error:
                raise SystemExit(f"{path}, line {number}: {error}") from error
    if not found:
        raise SystemExit(f"{path} has no conversations: write one a line, as docs/finetuning.md shows.")
    return found


def parse(line: str) -> Conversation:
    """The conversation of one line. ValueError says what is wrong with it."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"this is not JSON ({error}).") from error
    messages = row.get("messages") if isinstance(row, dict) else None
    if not messages or not isinstance(messages, list):
        raise ValueError('there are no messages: write {"messages": [{"role": "user", "content": "..."}, ...]}.')
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f'message {number} is {message!r}: write {{"role": ..., "content": ...}}.')
        content = message.get("content")
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            raise ValueError(f"the content of message {number} is {content!r}: it must be a string.")
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("no message has the role 'assistant': there is nothing to learn.")
    return row


def encode(path: Path | str, conversations: dict[int, Conversation], tokenizer: Any, max_length: int) -> list[dict]:
    """Rows of `input_ids` and `assistant_masks`, 1 where the loss counts. Too long conversations are left out.

    Raises:
        SystemExit: The chat template refuses a conversation, or all are too long.
    """
    rows = []
    for number, conversation in tqdm(conversations.items(), desc="tokens", unit="", disable=len(conversations) < 1000):
        try:
            row = tokenizer.apply_chat_template(
                conversation["messages"],
                tools=conversation.get("tools"),
                return_assistant_tokens_mask=True,
                return_dict=True,
            )
        except (TemplateError, ValueError, TypeError) as error:
            raise SystemExit(f"{path}, line {number}: {' '.join(str(error).split())}") from error
        if len(row["input_ids"]) <= max_length:
            rows.append({key: row[key] for key in ("input_ids", "assistant_masks")})
    if not rows:
        raise SystemExit(f"{path}: every conversation has more than {max_length} tokens; see --max-length.")
    if dropped := len(conversations) - len(rows):
        print(f"{path}: {dropped} of {len(conversations)} conversations have more than {max_length} tokens: left out")
    return rows
