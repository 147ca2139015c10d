"""Decode steps without Python: on a CUDA device, `generate` captures one and replays it.

In an eager step of the 20B the GPU works for a quarter of the time and otherwise waits for Python to launch the next
kernel. After the prompt, the forward of one token is captured as a CUDA graph over the buffers of the growing cache,
which takes about as long as two eager steps, and then replayed. What changes from step to step (the tokens, their
positions, which keys are masked, where in the buffers the new keys go) is in tensors with fixed addresses. When the
buffers grow, it is captured anew.

Where that cannot hold, the step is the plain one: see `Decoding.logits` and `_parts`. `disable_compile=True`, in a
call of `generate` or in the generation_config, turns it off.

Shapes: B batch, H heads, K keys that fit into the buffers, D head_dim, V vocab_size.
"""

import threading
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.modules import module as nn_module
from transformers.cache_utils import Cache, DynamicLayer
from transformers.utils import logging

from .cache_internlm import GrowingLayer, room_for
from .compat_internlm import CACHE
from .linear_internlm import join_weights


logger = logging.get_logger(__name__)

# Devices with graphs. (The tests add the CPU, where a step is called instead of replayed.)
_DEVICE_TYPES = {"cuda"}
_PLAIN_LAYERS = (nn.Linear, nn.Embedding, nn.ModuleList)
# What `generate` may pass to the forward besides what a step takes, and does not change it.
_NEUTRAL = {"assistant_tokenizer", "cache_position", "return_dict", "tokenizer", "use_cache"}

# Captures share a stream, whose cuBLAS workspace they then share, too; so they come one after another.
_lock = threading.Lock()
_streams: dict[torch.device, Any] = {}
# By model: which kinds of steps have run, so that nothing is left to be initialised when one is captured.
_warm: WeakKeyDictionary[nn.Module, set] = WeakKeyDictionary()


class Decoding:
    """How a cache that `generate` made for `model` is decoded with."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.step: DecodeStep | None = None
        self.given_up = False

    def logits(
        self,
        cache: Any,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        others: dict[str, Any],
    ) -> torch.Tensor | None:
        """Logits of one new token per row, (B, 1, V), with its keys and values appended to the cache.

        Returns:
            None where it has to be a plain step: other than one token per row, or arguments that a captured step does
            not take; gradients, autocast, tracing; a model that is not plain (`_parts`), or has changed since the
            capture; no memory left to capture.
        """
        if self.given_up or input_ids is None or input_ids.shape[1:] != (1,) or _is_special_context(input_ids):
            return None
        if any(value is not None and value is not False for name, value in others.items() if name not in _NEUTRAL):
            return None
        length = cache.get_seq_length()
        if attention_mask is not None and attention_mask.shape != (len(input_ids), length + 1):
            return None
        if position_ids is not None and position_ids.shape != input_ids.shape:
            return None
        arguments = input_ids, attention_mask, position_ids, length
        if self.step is not None and self.step.holds(cache, len(input_ids), length + 1):
            self.step.write(*arguments)
        else:
            self.step = None  # before its successor needs the memory
            self.step = self._capture(cache, *arguments)
        if self.step is None:
            return None
        logits = self.step.replay().clone()
        # Checked while the device works. A plain step then overwrites the new keys and values.
        if self.step.parts != _parts(self.model, input_ids.device):
            self.step = None
            return None
        for layer in cache.layers:
            layer.advance(1)
        return logits

    def _capture(self, cache: Any, input_ids: torch.Tensor, *arguments: Any) -> "DecodeStep | None":
        if not _can_append(cache, input_ids) or _parts(self.model, input_ids.device) is None:
            return None
        try:
            with _lock:
                join_weights(self.model)
                for layer in cache.layers:
                    layer.reserve(room_for(layer.get_seq_length() + 1, layer.max_length))
                step = DecodeStep(self.model, cache, len(input_ids))
                step.write(input_ids, *arguments)
                step.capture()
                return step
        except RuntimeError as error:  # out of memory, or something that cannot be captured
            logger.info(f"The decode step is not captured, and tokens take longer: {error}")
            self.given_up = True
            return None


class DecodeStep:
    """The forward of one token per row over the buffers of a cache.

    Attributes:
        parts: What it depends on, see `_parts`.
        replay: Runs it with what was written last: logits, (B, 1, V), which the next replay overwrites.
    """

    def __init__(self, model: Any, cache: Any, rows: int) -> None:
        self.model, self.buffers = model, [layer.buffers for layer in cache.layers]
        keys = self.buffers[0][0]
        self.device, capacity = keys.device, keys.shape[2]
        self.ids = torch.zeros((rows, 1), dtype=torch.long, device=self.device)
        self.positions = torch.zeros_like(self.ids)
        self.mask = torch.zeros((rows, capacity), dtype=torch.bool, device=self.device)
        self.slot = torch.zeros(1, dtype=torch.long, device=self.device)
        layers: list[Any] = [_FixedLayer(keys, values, self.slot) for keys, values in self.buffers]
        self.cache = Cache(layers=layers)
        self.parts = _parts(model, self.device)
        # A weight that is replaced must not be freed before the next call has noticed it.
        self.weights = [parameter.detach() for parameter in model.parameters()]
        self.replay: Callable[[], torch.Tensor] = self._run
        self.kind = (self.device, rows, capacity > model.config.max_position_embeddings)

    def holds(self, cache: Any, rows: int, length: int) -> bool:
        """Whether it can append token `length` of `rows` rows to this cache."""
        if self.mask.shape[0] != rows or self.mask.shape[1] < length:
            return False
        if self.mask.is_inference() != torch.is_inference_mode_enabled():
            return False
        return all(
            layer.buffers is not None and layer.buffers[0] is keys and layer.buffers[1] is values
            for layer, (keys, values) in zip(cache.layers, self.buffers, strict=True)
        )

    def write(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        length: int,
    ) -> None:
        """Write a step's arguments where the captured one reads them; `length` is the number of tokens before it."""
        self.ids.copy_(input_ids)
        self.slot.fill_(length)
        self.mask.zero_()
        seen = self.mask[:, : length + 1]
        if attention_mask is None:
            seen.fill_(True)
        else:
            seen.copy_(attention_mask)
        if position_ids is not None:
            self.positions.copy_(position_ids)
        elif attention_mask is None:
            self.positions.fill_(length)
        else:
            self.positions.copy_(seen.sum(-1, keepdim=True) - 1)

    def _run(self) -> torch.Tensor:
        caches: dict[str, Any] = {CACHE: self.cache}
        return self.model(
            input_ids=self.ids,
            attention_mask=self.mask[:, None, None],
            position_ids=self.positions,
            cache_position=self.slot,
            return_dict=True,
            **caches,
        ).logits

    def capture(self) -> None:
        """Capture it, on a device with graphs; elsewhere a replay is a call."""
        if self.device.type != "cuda":
            return
        with torch.cuda.device(self.device):
            current, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
            if self.device not in _streams:
                _streams[self.device] = torch.cuda.Stream()
            stream = _streams[self.device]
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                warm = _warm.setdefault(self.model, set())
                if self.kind not in warm:
                    self._run()
                    warm.add(self.kind)
                # Not torch.cuda.graph, which waits for the device and empties the allocator's cache.
                graph.capture_begin(capture_error_mode="thread_local")
                try:
                    output = self._run()
                finally:
                    graph.capture_end()
            current.wait_stream(stream)

        def replay() -> torch.Tensor:
            graph.replay()
            return output

        self.replay = replay


class _FixedLayer(DynamicLayer):
    """A layer's buffers, (B, H, K, D), of which every key is read; new ones are written at `slot`, (1,)."""

    keys: Any
    values: Any

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, slot: torch.Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.slot = keys, values, slot
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.keys.index_copy_(2, self.slot, key_states)
        self.values.index_copy_(2, self.slot, value_states)
        return self.keys, self.values

    def get_mask_sizes(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        return self.keys.shape[2], 0


def _is_special_context(input_ids: torch.Tensor) -> bool:
    kind = input_ids.device.type
    return (
        kind not in _DEVICE_TYPES
        or torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
        or torch.is_autocast_enabled(kind)
        or (kind == "cuda" and torch.cuda.is_current_stream_capturing())
    )


def _can_append(cache: Any, input_ids: torch.Tensor) -> bool:
    """Whether every layer is a growing one that holds these rows' keys and values, on this device."""
    return len(cache.layers) > 0 and all(
        type(layer) is GrowingLayer
        and layer.is_initialized
        and layer.keys.shape[0] == len(input_ids)
        and layer.keys.device == input_ids.device
        and layer.keys.is_inference() == torch.is_inference_mode_enabled()
        for layer in cache.layers
    )


def _parts(model: Any, device: torch.device) -> list[Any] | None:
    """What a captured step depends on: modules, addresses of weights, the attention function.

    Returns:
        None where a captured step would not do what the model does: with hooks (whose Python would not run), a
        replaced forward, layers of another library (adapters, quantised layers), weights that are no plain tensors on
        `device` (sharded, quantised, offloaded), or where the configuration asks for attentions or hidden states.
    """
    config = model.config
    if config._attn_implementation not in ("sdpa", "eager") or config.output_hidden_states or config.output_attentions:
        return None
    if nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks:
        return None
    parts: list[Any] = [config._attn_implementation]
    for module in model.modules():
        kind, state = type(module), module.__dict__
        if state["_forward_hooks"] or state["_forward_pre_hooks"] or "forward" in state:
            return None
        parameters = state["_parameters"]
        ours = kind.__module__.startswith(__name__.rpartition(".")[0])
        if not ours and kind not in _PLAIN_LAYERS and (parameters or state["_modules"] or state["_buffers"]):
            return None
        parts.append(module)
        for parameter in parameters.values():
            if parameter is None:
                continue
            if type(parameter) is not nn.Parameter or parameter.device != device:
                return None
            parts.append(parameter.data_ptr())
    return parts


__all__ = ["Decoding"]
