"""Continuous batching: `generate_batch`, `init_continuous_batching`, `transformers serve --continuous-batching`.

The library packs the tokens of many requests into one row, over a cache of pages that only its attention functions
and, from 5.24, the model can read. What cannot be exact beyond the window is refused, request by request.
"""

from typing import Any

from transformers import GenerationConfig

from .compat_internlm import PAGES_ARE_EXACT
from .configuration_internlm import InternLMConfig


class InternLMBatchingMixin:
    """Refuses requests that would come out wrong."""

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """The library's, except that requests beyond the window are refused where they would not be exact.

        Raises (as the manager's `add_request` does):
            ValueError: A request may become longer than the window, and the model does not get its keys.
        """
        base: Any = super()
        manager = base.init_continuous_batching(*args, **kwargs)
        model: Any = self  # its attention functions may have been replaced just now
        if PAGES_ARE_EXACT and model.config._attn_implementation in ("sdpa", "eager", "paged|eager"):
            return manager
        hints = kwargs.get("workload_hints")  # generate_batch, which would not let an error of add_request through
        if hints is not None:
            check_request(model.config, hints.max_prompt_length or 0, hints.max_generated_length or None)
        if "add_request" in manager.__dict__:  # a persistent manager, which has been here before
            return manager
        add_request = manager.add_request

        def add_checked(
            input_ids: Any, request_id: str | None = None, max_new_tokens: int | None = None, **settings: Any
        ) -> Any:
            limit = manager.generation_config.max_new_tokens if max_new_tokens is None else max_new_tokens
            check_request(model.config, len(input_ids), limit)
            return add_request(input_ids, request_id, max_new_tokens, **settings)

        manager.add_request = add_checked
        return manager

    def generate_batch(
        self, inputs: list[list[int]], generation_config: GenerationConfig | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """The library's, except that requests beyond the window are refused where they would not be exact.

        Raises:
            ValueError: A request may become longer than the window, and the model does not get its keys.
        """
        model: Any = self
        base: Any = super()
        if not PAGES_ARE_EXACT:
            limit = kwargs.get("max_new_tokens")
            limit = (generation_config or model.generation_config).max_new_tokens if limit is None else limit
            check_request(model.config, max(map(len, inputs), default=0), limit)
        return base.generate_batch(inputs, generation_config, *args, **kwargs)


def check_request(config: InternLMConfig, prompt_length: int, max_new_tokens: int | None) -> None:
    """Refuse a request of continuous batching that would need dynamic NTK; None is no limit of new tokens."""
    window = config.max_position_embeddings
    if config.rotary["type"] != "dynamic" or (max_new_tokens is not None and prompt_length + max_new_tokens <= window):
        return
    raise ValueError(
        f"A request of {prompt_length} tokens and max_new_tokens={max_new_tokens} can exceed "
        f"max_position_embeddings={window}, where dynamic NTK begins, which continuous batching computes with "
        'transformers 5.24 or newer and attn_implementation="sdpa" or "eager" only '
        "(ContinuousBatchingConfig(auto_switch_to_flash=False)). Set a smaller max_new_tokens, use generate, or fix "
        'the base: config.rotary = {"type": "origin", "base": ...}, see docs/long-context.md.'
    )


__all__ = ["InternLMBatchingMixin"]
