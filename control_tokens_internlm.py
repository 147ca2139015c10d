"""Control tokens in chats: which of them the template writes; the same text from a user stays text.

Why no text of a user becomes a control token, whatever the template does with it: the template is rendered a second
time with each control token that stands in its source, or in a special-token variable, between two marks. Nobody
outside this process knows the marks, so what they enclose in that rendering was written by the template. Every other
occurrence of a control token is hidden from the encoder. Messages, tools, documents and other variables are not even
looked at: it does not matter what they are made of, or how the template joins, cuts or converts them.

Why the text is the library's: its own rendering is what is encoded, and the second one counts only if it is the same
text without the marks. Where it is not, because the template compares a text with a control token, as in
`content.split('</think>')`, that one is left without marks.
"""

import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence, ValuesView
from dataclasses import dataclass, fields, is_dataclass
from functools import lru_cache, partial
from itertools import accumulate, count
from typing import Any

from tokenizers import AddedToken, Tokenizer, normalizers
from transformers.utils.chat_template_utils import get_json_schema


# Digits between private-use characters: upper, trim, tojson and the like do not change them.
_OPEN, _CLOSE = (f"\U000f0000{secrets.randbelow(10**20):020}\U000f0001" for _ in range(2))
_ROLE_HEADERS = ("<|User|>", "<|Bot|>", "<|System|>")

Spans = dict[int, int]  # start -> end of each token, in characters


@dataclass
class ChatGuard:
    """Tells the template's control tokens from a user's, in the rendered texts of one call of apply_chat_template.

    Args:
        template: the source of the chat template.
        variables: its special-token variables, which are trusted as its source is.
        render: renders the conversations with another source and other special-token variables, to one text each.
    """

    template: str
    variables: dict[str, Any]
    render: Callable[[str, dict[str, Any]], list[str]]

    def refuse_role_headers(self, texts: list[str]) -> None:
        """Raise a ValueError if a text contains a role header that the template did not write."""
        for text, written in zip(texts, self._find_written(texts, _ROLE_HEADERS), strict=True):
            for start, header in _find_others(text, _ROLE_HEADERS, written).items():
                raise ValueError(
                    f"{header!r} at character {start} of the rendered conversation starts a turn that is not the "
                    "template's: remove it."
                )

    def hide_others(self, texts: list[str], controls: tuple[str, ...], added: str) -> tuple[list[str], dict[str, str]]:
        """Replace the first character of each control token in the texts that the template did not write.

        Args:
            controls: the control tokens.
            added: the text of all added tokens, whose characters are not used as replacements.

        Returns:
            The texts, as long as before, and the replacements: character -> one that occurs in none of the texts.

        Raises:
            ValueError: template and message write a token together, the template renders differently every time, or
                the texts leave no character to replace by.
        """
        written = self._find_written(texts, controls)
        others = [_find_others(text, controls, spans) for text, spans in zip(texts, written, strict=True)]
        firsts = sorted({token[0] for found in others for token in found.values()})
        begun = self._find_written(texts, tuple(first for first in firsts if not first.isalnum()))
        for text, spans, found, own in zip(texts, written, others, begun, strict=True):
            mixed = [found[start] for start in found if start in own]
            longest = {start: _pattern(controls).match(text, start) for start in spans}
            mixed += [match[0] for start, match in longest.items() if match and match.end() > spans[start]]
            if mixed:
                raise ValueError(
                    f"The chat template writes only the beginning of the control token {mixed[0]!r}, and a message "
                    "the rest: write the token in full in the template, or change the message."
                )
        used = set(added).union(*texts) if firsts else set()
        free = (chr(code) for code in range(0xFDD0, 0x110000) if chr(code) not in used)
        marks = dict(zip(firsts, free, strict=False))
        if len(marks) < len(firsts):
            raise ValueError(
                f"The messages contain control tokens that begin with {firsts!r}, and every character from U+FDD0 to "
                "U+10FFFF, so that none is left to hide those tokens from the encoder: shorten the messages."
            )
        return [_replace(text, found, marks) for text, found in zip(texts, others, strict=True)], marks

    def _find_written(self, texts: list[str], strings: tuple[str, ...]) -> list[Spans]:
        """The spans of those of the `strings` in each text that the template wrote."""
        total = self._mark(strings, set())[2]
        if not total:
            return [{} for _ in texts]
        spans, plain, open_ranges = None, set(range(total)), [range(total)]
        while open_ranges:  # usually once; else find by bisection which marks change what the template computes
            numbers = open_ranges.pop()
            found = self._find_marked(texts, strings, plain.difference(numbers))
            if found is not None:
                spans = found
                plain.difference_update(numbers)
            elif len(numbers) > 1:
                middle = len(numbers) // 2
                open_ranges += [numbers[middle:], numbers[:middle]]
        if plain:
            spans = self._find_marked(texts, strings, plain)
        if spans is None:
            raise ValueError(
                "The chat template renders the same conversation differently every time, so that its control tokens "
                "cannot be told from those in messages: it must not use the time of day, random choices or objects "
                "that change when they are read."
            )
        return spans

    def _find_marked(self, texts: list[str], strings: tuple[str, ...], plain: set[int]) -> list[Spans] | None:
        """The spans between the marks, or None if the marks change the texts."""
        template, variables, _ = self._mark(strings, plain)
        try:
            rendered = self.render(template, variables)
        except Exception:  # a mark in a name or an operator; what raises without marks was raised before
            return None
        between_marks = re.compile(f"{_OPEN}({_pattern(strings).pattern}){_CLOSE}")
        rows = [between_marks.split(marked) for marked in rendered]
        if ["".join(row) for row in rows] != texts:
            return None
        positions = [list(accumulate(map(len, row))) for row in rows]
        return [dict(zip(ends[0::2], ends[1::2], strict=False)) for ends in positions]

    def _mark(self, strings: tuple[str, ...], plain: set[int]) -> tuple[str, dict[str, Any], int]:
        """Template and variables with marks around the strings, except those numbered in `plain`; their number."""
        numbers = count()

        def enclose(found: re.Match) -> str:
            return found[0] if next(numbers) in plain else f"{_OPEN}{found[0]}{_CLOSE}"

        change = partial(_pattern(strings).sub, enclose)
        variables = {name: map_strings(value, change) for name, value in self.variables.items()}
        return change(self.template), variables, next(numbers)


@lru_cache
def _pattern(strings: tuple[str, ...]) -> re.Pattern:
    """Matches any of the strings, the longest where several begin, as the encoder does."""
    return re.compile("|".join(map(re.escape, sorted(strings, key=len, reverse=True))) or "(?!)")


def _find_others(text: str, strings: tuple[str, ...], spans: Spans) -> dict[int, str]:
    """Start and string of each occurrence in the text, overlapping ones included, except in the spans."""
    others, position = {}, 0
    while found := _pattern(strings).search(text, position):
        start = found.start()
        if start not in spans:
            others[start] = found[0]
        position = spans[start] if start in spans else start + 1
    return others


def _replace(text: str, starts: dict[int, str], marks: dict[str, str]) -> str:
    characters = list(text)
    for start in starts:
        characters[start] = marks[characters[start]]
    return "".join(characters)


def build_hiding_backend(backend: Tokenizer, marks: dict[str, str], tokens: tuple[str, ...]) -> Tokenizer:
    """A backend that replaces the marks by their original characters, but only after finding the control tokens."""
    hiding = Tokenizer(backend.model)  # the same model, not a copy
    restore = [normalizers.Replace(mark, character) for character, mark in marks.items()]
    hiding.normalizer = normalizers.Sequence([*restore, backend.normalizer])
    for _, token in sorted(backend.get_added_tokens_decoder().items()):  # in the order of their ids
        state: Any = token.__getstate__()
        hiding.add_tokens([AddedToken(**state | {"normalized": token.normalized and token.content not in tokens})])
    hiding.decoder = backend.decoder
    return hiding


def read_iterators(value: Any) -> Any:
    """Replace iterators in conversations, tools or variables by lists: a template is rendered more than once."""
    if isinstance(value, Iterator | ValuesView):
        value = list(value)
    if type(value) in (list, tuple):
        return type(value)(map(read_iterators, value))
    return {key: read_iterators(item) for key, item in value.items()} if type(value) is dict else value


def break_role_headers(conversation: Any, tools: Any, documents: Any) -> tuple[Any, Any, Any]:
    """Copy the inputs with `<|User|>` written as `<| User |>` in every string that can be found in them."""
    tools = [get_json_schema(tool) if callable(tool) else tool for tool in tools] if tools else tools
    inputs = (_join_parts(map_strings(conversation, str)), tools, documents)
    return tuple(map_strings(inputs, lambda text: re.sub(r"<\|(User|Bot|System)\|>", r"<| \1 |>", text)))


def map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """Copy messages, tools or template variables, applying `change` to every string in them, keys included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {map_strings(key, change): map_strings(item, change) for key, item in value.items()}
    if isinstance(value, Sequence):
        return value if isinstance(value, bytes | bytearray) else [map_strings(item, change) for item in value]
    if hasattr(value, "messages"):  # transformers' Chat
        return map_strings(value.messages, change)
    if callable(getattr(value, "model_dump", None)):  # pydantic
        return map_strings(value.model_dump(), change)
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: map_strings(getattr(value, field.name), change) for field in fields(value)}
    return value


def _join_parts(value: Any) -> Any:
    """Merge the text parts of each content: a role header could otherwise be split between two of them."""
    if isinstance(value, list):
        texts: list[Any] = [part.get("text") if isinstance(part, dict) else None for part in value]
        if texts and all(isinstance(text, str) for text in texts):
            return [{"type": "text", "text": "".join(texts)}]
        return [_join_parts(item) for item in value]
    return {key: _join_parts(item) for key, item in value.items()} if isinstance(value, dict) else value
