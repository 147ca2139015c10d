"""Tool calls in the ReAct form that the chat template writes: where a call begins and ends, and how it is parsed.

A reply is a text and then any number of calls:

    Thought: I need to calculate.
    Action: calculator
    Action Input: {"expression": "12 + 7"}

A line that begins with `Action:` or `Action Input:` belongs to a call, whatever the text before it; these words
elsewhere in a line are text. A call ends where the next one begins, or with the reply. Blank lines and spaces around
the name and the object are ignored. A string in JSON has no line breaks, so no line of an object begins a call.

parse_tool_calls reads a complete reply. RESPONSE_TEMPLATE describes the same form to transformers' own parser, which
also reads a reply while it is generated.
"""

import json
import re
from typing import Any


_MARK = re.compile(r"^(?=Action(?: Input)?:)", re.MULTILINE)

# Patterns for the package regex, which compiles response templates: ++ and *+ give nothing back, so that time is
# linear, and (?&nested) matches as the group of that name does, which is slow, so that only nested values do it.
_SPACE = r"[ \t\r\n]*+"
_HEX = r"[0-9a-fA-F]{2}"
_ESCAPE = rf"""["\\/bfnrt]|u(?:[dD][89abAB]{_HEX}\\u[dD][c-fC-F]{_HEX}|(?![dD][89a-fA-F]){_HEX}{_HEX})"""
_STRING = rf""""(?:[^"\\\x00-\x1f]|\\(?:{_ESCAPE}))*+\""""
_NUMBER = r"-?(?:0|[1-9][0-9]*+)(?:\.[0-9]++)?+(?:[eE][+-]?[0-9]++)?+"
_VALUE = rf"(?:{_STRING}|{_NUMBER}|true|false|null|(?&nested)){_SPACE}"
_PAIR = rf"{_STRING}{_SPACE}:{_SPACE}{_VALUE}"
_OBJECT = rf"\{{{_SPACE}(?:{_PAIR}(?:,{_SPACE}{_PAIR})*+)?+\}}"
_LIST = rf"\[{_SPACE}(?:{_VALUE}(?:,{_SPACE}{_VALUE})*+)?+\]"
_NESTED = rf"(?(DEFINE)(?P<nested>{_OBJECT}|{_LIST}))"
_NAME, _ARGUMENTS = r"\S++(?:[^\S\n]++\S++)*+", r"(?=\{)(?&nested)"


def _call(name: str, arguments: str) -> str:
    return rf"Action:[^\S\n]*+{name}\s*+(?<=\n)Action Input:{_SPACE}{arguments}{_SPACE}"


_STOP = r"(?:<eoa>|</s>)(?:</s>|<unk>)*+"  # and the padding of a batch's shorter replies

# Only calls that fill the rest of the reply are calls, so that a malformed one stays text, with those before it.
RESPONSE_TEMPLATE = {
    "start_anchor": "<|Bot|>:",
    "defaults": {"role": "assistant"},
    "fields": {
        "content": {"close_pattern": rf"{_STOP}\s*+\Z", "content_args": {"strip": False}},
        "tool_calls": {
            "open_pattern": rf"{_NESTED}(?:\A|\n|(?<=\n)){_call(f'(?P<name>{_NAME})', f'(?P<arguments>{_ARGUMENTS})')}"
            rf"(?=(?:(?<=\n){_call(_NAME, _ARGUMENTS)})*+(?:{_STOP})?+\s*+\Z)",
            "close_pattern": "",
            "repeats": True,
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{arguments}"}},
        },
    },
}


def parse_tool_calls(reply: str) -> dict[str, Any]:
    """Parse a reply in the ReAct form of the chat template into a message, which the template renders as that reply.

    Takes time proportional to the length of the reply.

    Args:
        reply: the generated text without control tokens: optionally a thought, then any number of calls, each a line
            `Action: name` followed by `Action Input:` and a JSON object.

    Returns:
        {"role": "assistant", "content": the text before the first call}, and if there are calls "tool_calls",
        each {"type": "function", "function": {"name": str, "arguments": dict}}.

    Raises:
        ValueError: a call without a name or arguments, with other text after them, or with arguments that are not a
            JSON object which can be written as JSON again: NaN, a key that occurs twice, thousands of brackets, ...
    """
    text, *marked = _MARK.split(reply)
    message = {"role": "assistant", "content": text.removesuffix("\n") if marked else text}
    calls = [_parse_call("".join(marked[at : at + 2])) for at in range(0, len(marked), 2)]
    return {**message, "tool_calls": calls} if calls else message


def _parse_call(call: str) -> dict[str, Any]:
    action, _, given = call.partition("\nAction Input:")
    name = action.removeprefix("Action:").strip()
    try:
        if not name or "\n" in name:
            raise ValueError("the name is not one line")
        arguments = json.loads(given, object_pairs_hook=_object)
        if not isinstance(arguments, dict):
            raise ValueError("the arguments are no object")
        json.dumps(arguments, ensure_ascii=False, allow_nan=False).encode()  # NaN, 1e999, half of a surrogate pair
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"Not a tool call: {call.strip()!r:.200} ({error}). It must be a line `Action: name` and then "
            "`Action Input:` with a JSON object; send this back as the tool's response, or generate again."
        ) from error
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def _object(items: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(items)
    if len(value) < len(items):
        raise ValueError("a key occurs twice")
    return value


__all__ = ["RESPONSE_TEMPLATE", "parse_tool_calls"]
