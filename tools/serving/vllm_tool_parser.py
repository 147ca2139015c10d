"""vLLM's parser of InternLM's tool calls: `--tool-parser-plugin THIS_FILE --tool-call-parser internlm`.

Calls are what parse_tool_calls reads. A reply in which a call is malformed is text, and so is every reply to a request
without tools. Calls are streamed when the reply is complete, the text before them as it is generated.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

from vllm.entrypoints.generate.base.protocol import (
    DeltaFunctionCall,
    DeltaMessage,
    DeltaToolCall,
    ExtractedToolCallInformation,
    FunctionCall,
    ToolCall,
)
from vllm.renderers.chat_utils import make_tool_call_id
from vllm.tool_parsers import ToolParser, ToolParserManager


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tool_calls_internlm import parse_tool_calls


# A line that begins a call, or all there is yet of one that may, with the line break before it.
_BEGUN = "|".join("Action Input"[:length] for length in range(len("Action Input"), -1, -1))
_HELD = re.compile(rf"(?:^|\n)(?:Action(?: Input)?:|(?:{_BEGUN})\Z)")


def _parse(reply: str) -> tuple[str | None, list[FunctionCall]]:
    """The text and the calls."""
    try:
        message = parse_tool_calls(reply)
    except ValueError:
        return reply, []
    calls = [call["function"] for call in message.get("tool_calls", [])]
    return message["content"] or None, [
        FunctionCall(name=call["name"], arguments=json.dumps(call["arguments"], ensure_ascii=False)) for call in calls
    ]


class InternLMToolParser(ToolParser):
    """One per request. tool_choice "required" or a name is vLLM's own: it makes the model write JSON."""

    _text = ""
    _sent = 0  # characters of it

    def extract_tool_calls(self, model_output: str, request: Any) -> ExtractedToolCallInformation:
        content, calls = _parse(model_output)
        return ExtractedToolCallInformation(
            tools_called=bool(calls), tool_calls=[ToolCall(function=call) for call in calls], content=content
        )

    def extract_tool_calls_streaming(
        self, previous_text: str, current_text: str, *others: Any, **named: Any
    ) -> DeltaMessage | None:
        # Makes vLLM call finish_streaming(). As an attribute of the class it would also make vLLM parse
        # tool_choice="required" without the text so far.
        self.engine_based_streaming = True
        held = _HELD.search(current_text, self._sent)
        self._text, start, self._sent = current_text, self._sent, held.start() if held else len(current_text)
        return DeltaMessage(content=current_text[start : self._sent]) if self._sent > start else None

    def finish_streaming(self) -> DeltaMessage | None:
        """What was held back: calls, or text."""
        content, calls = _parse(self._text[self._sent :])
        deltas = [
            DeltaToolCall(
                index=index,
                id=make_tool_call_id(),
                type="function",
                function=DeltaFunctionCall(name=call.name, arguments=call.arguments),
            )
            for index, call in enumerate(calls)
        ]
        return DeltaMessage(content=content, tool_calls=deltas) if content or deltas else None


ToolParserManager.register_module("internlm", module=InternLMToolParser)
