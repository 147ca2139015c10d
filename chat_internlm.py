"""`chat` and `stream_chat`, with the signatures of 2023: a chat template, `generate` and transformers' streamers."""

import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import (
    BatchEncoding,
    GenerationConfig,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    TextIteratorStreamer,
)
from transformers.generation.streamers import BaseStreamer


# The turns before, oldest first: (query, response) pairs, as in 2023, or messages with "role" and "content".
History = list[tuple[str, str]] | list[dict[str, Any]]


class InternLMChatMixin:
    """Adds `chat` and `stream_chat` to a causal LM."""

    def chat(
        self,
        tokenizer: PreTrainedTokenizerBase,
        query: str,
        history: History | None = None,
        streamer: BaseStreamer | None = None,
        max_new_tokens: int = 1024,
        do_sample: bool = True,
        temperature: float = 0.8,
        top_p: float = 0.8,
        meta_instruction: str | None = None,
        **kwargs: Any,
    ) -> tuple[str, History]:
        """Answer one turn of a conversation, in the prompt format of the tokenizer's chat template.

        Args:
            tokenizer: The checkpoint's tokenizer.
            query: The user's message.
            history: The turns before, as (query, response) pairs or as messages ({"role": "user", "content": ...},
                ...), which may begin with a system message; it is not modified.
            streamer: A transformers streamer, for example TextStreamer.
            meta_instruction: The system message; None is the prompt format's own default, "" is none.
            max_new_tokens, do_sample, temperature, top_p, kwargs: For `generate`. The four override a
                `generation_config` among the kwargs, and the checkpoint's.

        Returns:
            The response, and the history with this turn appended in its own form, as a pair if there was none. The
            response ends at `<eoa>` or at a token of `generation_config.eos_token_id`, neither of which is part of it,
            unless `eos_token_id` says otherwise.

        Raises:
            ValueError: The query is not a string, or the history neither pairs nor messages of finished turns.
            torch.OutOfMemoryError: The conversation does not fit into memory; the message says what to shorten.
        """
        model: Any = self
        inputs = _chat_inputs(tokenizer, query, history, meta_instruction).to(model.device)
        settings = {"max_new_tokens": max_new_tokens, "do_sample": do_sample, "streamer": streamer, **kwargs}
        settings["tokenizer"] = tokenizer  # generate needs it for stop_strings
        if do_sample:
            settings = {"temperature": temperature, "top_p": top_p, **settings}
        configs = (kwargs.get("generation_config"), model.generation_config)
        settings.setdefault("eos_token_id", _stop_tokens(tokenizer, *filter(None, configs)))
        try:
            output = model.generate(**inputs, **settings)
        except (RuntimeError, MemoryError) as error:
            if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "allocate memory" not in str(error):
                raise
            raise torch.OutOfMemoryError(
                f"Out of memory at a prompt of {inputs['input_ids'].shape[1]} tokens with a history of "
                f"{len(history or [])}: drop its oldest turns or set a smaller max_new_tokens ({max_new_tokens} now)."
            ) from error
        tokens = getattr(output, "sequences", output)  # with return_dict_in_generate it is an output class
        response: Any = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return response, _append_turn(history, query, response)

    def stream_chat(
        self,
        tokenizer: PreTrainedTokenizerBase,
        query: str,
        history: History | None = None,
        max_new_tokens: int = 1024,
        do_sample: bool = True,
        temperature: float = 0.8,
        top_p: float = 0.8,
        **kwargs: Any,
    ) -> Iterator[tuple[str, History]]:
        """`chat`, streamed: yields (response so far, history with it); the last pair is what `chat` returns.

        Generation runs in a separate thread. Its errors are raised here, and it stops when the iterator is closed.

        Args:
            tokenizer, query, history, max_new_tokens, do_sample, temperature, top_p, kwargs: As for `chat`, except
                `streamer`.
        """
        closed = threading.Event()
        criteria = [*(kwargs.pop("stopping_criteria", None) or []), _StopWhen(closed)]
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        errors: list[BaseException] = []
        kwargs |= {"max_new_tokens": max_new_tokens, "do_sample": do_sample}
        kwargs |= {"temperature": temperature, "top_p": top_p}

        def generate() -> None:
            try:
                self.chat(tokenizer, query, history, streamer=streamer, stopping_criteria=criteria, **kwargs)
            except BaseException as error:  # passed on: the consumer must not wait for a thread that has died
                errors.append(error)
                streamer.on_finalized_text("", stream_end=True)  # not end(): it decodes what may just have failed

        thread = threading.Thread(target=generate, daemon=True)
        response = ""
        try:
            thread.start()  # inside try: Ctrl-C at this moment must stop it, too
            for text in streamer:
                if text:
                    response += text
                    yield response, _append_turn(history, query, response)
            if errors:
                raise errors[0]
            if not response:
                yield response, _append_turn(history, query, response)
        finally:
            closed.set()
            if thread.is_alive():
                thread.join()


def refuse_chat(self: object, *args: Any, **kwargs: Any) -> None:
    """`chat` of the base model: in 2023 `AutoModel` meant the causal LM, and scripts still expect it."""
    raise AttributeError(
        "InternLMModel has no language-modeling head and cannot chat or generate: load the checkpoint with "
        "AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True) instead of AutoModel."
    )


class _StopWhen(StoppingCriteria):
    """Ends generation at the next token once `event` is set."""

    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> Any:
        return torch.full((input_ids.shape[0],), self.event.is_set(), device=input_ids.device)


def _chat_inputs(
    tokenizer: PreTrainedTokenizerBase, query: str, history: History | None, meta_instruction: str | None
) -> BatchEncoding:
    if not isinstance(query, str):
        raise ValueError(
            f"query={query!r:.60} is not a string: pass the user's new message as the query and earlier ones as the "
            "history. For other conversations use apply_chat_template and generate."
        )
    messages = _history_messages(history)
    if messages and messages[-1]["role"] == "user":
        raise ValueError(f"The history ends with a question, {messages[-1]!r:.60}: take it out, and pass it as query.")
    if meta_instruction is not None:
        if messages and messages[0]["role"] == "system":
            raise ValueError(
                f"meta_instruction={meta_instruction!r:.60} and a history that begins with a system message: leave "
                "one of the two out."
            )
        messages.insert(0, {"role": "system", "content": meta_instruction})
    messages.append({"role": "user", "content": query})
    encoded: Any = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    return encoded


def _history_messages(history: Any) -> list[Any]:
    """The history as a new list of messages; ValueError if it is neither pairs nor messages."""
    turns = [] if history is None else history
    if isinstance(turns, list | tuple):
        if all(isinstance(turn, Mapping) and "role" in turn for turn in turns):
            return [*turns]
        if all(
            isinstance(turn, list | tuple) and len(turn) == 2 and all(isinstance(text, str) for text in turn)
            for turn in turns
        ):
            return [message for query, response in turns for message in _turn_messages(query, response)]
    raise ValueError(
        f"history={history!r:.60} is neither a list of (query, response) pairs of strings nor of messages: write "
        '[("Hi", "Hello!")] or [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}].'
    )


def _turn_messages(query: str, response: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": query}, {"role": "assistant", "content": response}]


def _append_turn(history: Any, query: str, response: str) -> Any:
    """A copy of the history with one more turn, in the form of the turns before; a pair if there are none."""
    in_messages = bool(history) and isinstance(history[0], Mapping)
    return [*(history or []), *(_turn_messages(query, response) if in_messages else [(query, response)])]


def _stop_tokens(tokenizer: PreTrainedTokenizerBase, *generation_configs: GenerationConfig) -> list[int]:
    """What ends a reply: the eos tokens of the first config that has some, and `<eoa>`, which published ones lack."""
    eos: Any = next((config.eos_token_id for config in generation_configs if config.eos_token_id is not None), None)
    eoa: Any = tokenizer.convert_tokens_to_ids("<eoa>")
    unk: Any = tokenizer.unk_token_id
    return sorted({*(eos if isinstance(eos, list | tuple) else [eos]), eoa} - {None, unk})
