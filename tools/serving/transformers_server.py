"""`make serve`: `transformers serve` for this model, with tool calls, a short name, and a reason for each refusal."""

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import HTTPException
from fastapi.responses import JSONResponse
from jinja2 import TemplateError
from transformers import AutoConfig
from transformers.cli.serving import chat_completion, completion, model_manager
from transformers.cli.serving.utils import BaseHandler
from transformers.cli.transformers import app
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.utils import logging


logger = logging.get_logger(__name__)

# What the library accepts and ignores, with the values that change nothing.
IGNORED: dict[str, Callable[[Any], bool]] = {
    "n": lambda value: value == 1,
    "best_of": lambda value: value == 1,
    "logprobs": lambda value: value is False,
    "top_logprobs": lambda value: value == 0,
    "echo": lambda value: value is False,
    "presence_penalty": lambda value: value == 0,
    "response_format": lambda value: value == {"type": "text"},
    "tool_choice": lambda value: value in ("auto", "none"),
    "parallel_tool_calls": lambda value: value is True,
    "functions": lambda value: not value,
    "modalities": lambda value: value == ["text"],
}


def serve(name: str, options: list[str]) -> None:
    """Run `transformers serve` for a complete model until it is stopped.

    Args:
        name: A folder or repository (tools.model_folder.complete_model). A folder is served by its own name, without
            the path.
        options: Those of `transformers serve`.
    """
    config = AutoConfig.from_pretrained(name, trust_remote_code=True)
    # The library looks up the model's class by name in transformers, which does not contain remote code. It must be
    # set in the module object that it uses: `import transformers` here may give another one (5.24).
    model_class = get_class_from_dynamic_module(config.auto_map["AutoModelForCausalLM"], name)
    setattr(model_manager.transformers, model_class.__name__, model_class)
    chat_completion.ChatCompletionHandler = Chat
    completion.CompletionHandler = Completion
    folder = Path(name).resolve()
    if folder.is_dir():
        os.chdir(folder.parent)
        name = folder.name
    app(["serve", name, "--trust-remote-code", *options])


class _Handler(BaseHandler):
    """Refuses what the library would ignore, and answers a bad request with 400 and one line, not with a bare 500."""

    def _validate_request(self, body: dict[str, Any]) -> None:
        super()._validate_request(body)
        for field, harmless in IGNORED.items():
            if body.get(field) is not None and not harmless(body[field]):
                raise HTTPException(400, f"This engine does not support {field}; `make serve ENGINE=vllm` does.")

    def _build_generation_config(self, body: dict[str, Any], *others: Any, **named: Any) -> Any:
        """The library sets the temperature, but samples only if the model's generation_config.json says so."""
        settings = super()._build_generation_config(body, *others, **named)
        if body.get("temperature"):
            settings.do_sample = True
        return settings

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        try:
            return await super().handle_request(body, request_id)  # pyright: ignore[reportAttributeAccessIssue]
        except HTTPException as error:
            return _refusal(error.status_code, str(error.detail))
        except (TemplateError, ValueError, TypeError, LookupError, AttributeError) as error:
            logger.exception("A request failed.")
            return _refusal(400, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")


def _refusal(status: int, message: str) -> JSONResponse:
    """An error in the API's form, whose message clients show."""
    return JSONResponse({"error": {"message": message, "type": "invalid_request_error", "code": status}}, status)


class Completion(_Handler, completion.CompletionHandler):
    """/v1/completions."""


class Chat(_Handler, chat_completion.ChatCompletionHandler):
    """/v1/chat/completions. Replies to requests with tools are parsed, and no others."""

    _parsing: Any = None  # a copy of the one model's tokenizer, with the response template

    def _validate_request(self, body: dict[str, Any]) -> None:
        super()._validate_request(body)
        if not isinstance(body.get("messages"), list) or not body["messages"]:
            raise HTTPException(400, "messages must be a list with at least one message.")
        if body.get("tool_choice") == "none":
            body.pop("tools", None)

    @staticmethod
    def get_processor_inputs_from_messages(messages: list[dict[str, Any]], modality: Any) -> list[dict[str, Any]]:
        """The messages as the chat template takes them, which refuses parts that are not text.

        The library leaves out such parts, and the text of a message with tool calls, which here is the thought.
        """
        parsed = []
        for message in messages:
            calls = copy.deepcopy(message.get("tool_calls"))
            for call in calls or ():
                arguments = call["function"]["arguments"]
                call["function"]["arguments"] = json.loads(arguments) if isinstance(arguments, str) else arguments
            parsed.append({**message, "tool_calls": calls} if calls else message)
        return parsed

    def _streaming(self, request_id: str, model: Any, processor: Any, *others: Any, tools: Any = None, **named: Any):
        processor = self._that_parses(processor) if tools else processor
        return super()._streaming(request_id, model, processor, *others, tools=tools, **named)

    async def _non_streaming(
        self, request_id: str, model: Any, processor: Any, *others: Any, tools: Any = None, **named: Any
    ):
        processor = self._that_parses(processor) if tools else processor
        return await super()._non_streaming(request_id, model, processor, *others, tools=tools, **named)

    def _that_parses(self, tokenizer: Any) -> Any:
        if self._parsing is None:
            self._parsing = copy.copy(tokenizer)
            self._parsing.response_template = getattr(tokenizer, "tool_response_template", None)  # None: another's
        return self._parsing
