"""The growing cache: the library's DynamicCache, except that it appends in place.

The library's concatenates every key and value at every token. This one writes new ones into buffers with spare room,
and hands out views of them. It is what `generate`, chat and `use_cache=True` get by default; a cache that is passed is
used as it is.

Shapes: B batch, H heads, D head_dim.
"""

import copy
from functools import partial
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from .configuration_internlm import InternLMConfig


# A buffer that is full grows to what it must hold and an eighth, at least this many tokens.
_MIN_ROOM = 256


class GrowingLayer(DynamicLayer):
    """The library's DynamicLayer, except that `keys` and `values`, (B, H, tokens, D), are views of larger buffers.

    Attributes:
        max_length: Tokens that generation announced. The buffers stop there; more tokens than that still fit.
        buffers: Keys and values with their spare room, (B, H, capacity, D), at the same address until they grow; None
            before the second update, for the first one's tensors are kept as they are.
    """

    def __init__(self, max_length: int | None = None) -> None:
        super().__init__()
        self.max_length = max_length
        self.pinned = False  # whether somebody relies on the buffers' addresses

    # Whoever assigns them, as batch_select_indices does, takes them out of the buffers.
    @property
    def keys(self) -> Any:
        return self._keys

    @keys.setter
    def keys(self, keys: Any) -> None:
        self._keys, self._key_buffer = keys, None

    @property
    def values(self) -> Any:
        return self._values

    @values.setter
    def values(self, values: Any) -> None:
        self._values, self._value_buffer = values, None

    @property
    def buffers(self) -> Any:
        return None if self._key_buffer is None else (self._key_buffer, self._value_buffer)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor | None = None) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states.new_empty(0), key_states.new_empty(0)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values, (B, H, new tokens, D), and return all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._keys, self._key_buffer = _append(self._keys, self._key_buffer, key_states, self.max_length)
        self._values, self._value_buffer = _append(self._values, self._value_buffer, value_states, self.max_length)
        return self._keys, self._values

    def reserve(self, length: int) -> None:
        """Grow the buffers to at least `length` tokens. From then on they stay where they are until they hold more."""
        self.pinned = True
        if self._key_buffer is None or self._key_buffer.shape[2] < length:
            self._keys, self._key_buffer = _grow(self._keys, length)
            self._values, self._value_buffer = _grow(self._values, length)

    def advance(self, tokens: int) -> None:
        """Count new tokens that were written into the buffers from outside, as a captured step does."""
        length = self.get_seq_length() + tokens
        self._keys = self._key_buffer.narrow(2, 0, length)
        self._values = self._value_buffer.narrow(2, 0, length)

    def reset(self) -> None:
        """Empty the layer. (Until 5.17 the library's reset fills it with zeros, and it keeps its length.)"""
        self.keys = self.values = None
        self.is_initialized = False

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """The library's. What is left stays in the buffers, and the next tokens overwrite what was removed."""
        buffers = self._key_buffer, self._value_buffer
        super().crop(*args, **kwargs)
        self._key_buffer, self._value_buffer = buffers

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """The library's, except that the reordered keys and values have spare room again."""
        if self.get_seq_length() > 0:
            self._keys, self._key_buffer = _reorder(self._keys, self._key_buffer, beam_idx, self.pinned)
            self._values, self._value_buffer = _reorder(self._values, self._value_buffer, beam_idx, self.pinned)

    def __getstate__(self) -> dict[str, Any]:
        # What a copy or a file gets: two layers must not append into one buffer, and spare room is not worth storing.
        state = {**self.__dict__, "_key_buffer": None, "_value_buffer": None, "pinned": False}
        if self.is_initialized:
            state |= {"_keys": self._keys.clone(), "_values": self._values.clone()}
        return state

    def __deepcopy__(self, memo: dict) -> "GrowingLayer":
        return copy.copy(self)  # __getstate__ has cloned what must be


class GrowingCache(DynamicCache):
    """The library's DynamicCache, except that its layers append in place; of its offloaded one nothing changes.

    Args:
        max_length: Tokens that generation will reach at most, if known: the last buffers are exactly as long.

    The other arguments are the library's.

    Attributes:
        decoding: How it is decoded with (decoding_internlm.py), where `generate` made it; copies have none.
    """

    decoding: Any = None

    def __init__(self, *args: Any, max_length: int | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.offloading:
            return
        if self.layer_class_to_replicate is DynamicLayer:
            self.layer_class_to_replicate = partial(GrowingLayer, max_length)
        layers: Any = self.layers
        for index, layer in enumerate(layers):
            if type(layer) is DynamicLayer:  # and not one with a sliding window
                layers[index] = GrowingLayer(max_length)
                if layer.is_initialized:
                    layers[index].update(layer.keys, layer.values)

    def __deepcopy__(self, memo: dict) -> "GrowingCache":
        copied = memo[id(self)] = object.__new__(type(self))
        copied.__dict__.update(copy.deepcopy({**self.__dict__, "decoding": None}, memo))
        return copied

    def __reduce__(self) -> tuple:
        # Pickled as a library cache, which another process can load without this module.
        kind = DynamicLayer if isinstance(self.layer_class_to_replicate, partial) else self.layer_class_to_replicate
        layers = [_library_layer(layer) for layer in self.layers]
        state = {**self.__dict__, "layers": layers, "layer_class_to_replicate": kind}
        state.pop("decoding", None)
        return DynamicCache, (), state


def default_cache(config: InternLMConfig, max_length: int | None = None) -> DynamicCache:
    """What `use_cache=True` and `generate` get: a GrowingCache, but the library's own while torch.compile traces.

    Compilers and exports know the library's class.
    """
    if torch.compiler.is_compiling():
        return DynamicCache(config=config)
    return GrowingCache(config=config, max_length=max_length)


def room_for(length: int, max_length: int | None) -> int:
    """How long buffers become that must hold `length` tokens."""
    capacity = length + max(length // 8, _MIN_ROOM)
    return capacity if max_length is None or length > max_length else min(capacity, max_length)


def _library_layer(layer: Any) -> Any:
    if type(layer) is not GrowingLayer:
        return layer
    plain = DynamicLayer()
    if layer.is_initialized:
        plain.update(layer.keys, layer.values)  # copies them, without their spare room
    return plain


# Keys or values, (B, H, tokens, D), and the buffer that they are a view of, if any.
Grown = tuple[torch.Tensor, torch.Tensor | None]


def _append(tensor: torch.Tensor, buffer: torch.Tensor | None, new: torch.Tensor, max_length: int | None) -> Grown:
    """`tensor` with `new` appended: in place where that cannot be noticed, otherwise by concatenation."""
    if tensor.numel() == 0:
        return new, None
    # A gradient needs the past as it was. (And this is called for every layer and token: each attribute counts.)
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or type(new) is not torch.Tensor:
        return torch.cat((tensor, new), dim=2), None
    length, added = tensor.shape[2], new.shape[2]
    end = length + added
    if buffer is None or buffer.shape[2] < end or (buffer.is_inference() and not torch.is_inference_mode_enabled()):
        _, buffer = _grow(tensor, room_for(end, max_length))
    place = buffer.narrow(2, length, added)
    if place.shape != new.shape or place.dtype != new.dtype or place.device != new.device:
        return torch.cat((tensor, new), dim=2), None  # its promotion of dtypes, or its error
    place.copy_(new)
    return buffer.narrow(2, 0, end), buffer


def _grow(tensor: torch.Tensor, capacity: int) -> Grown:
    buffer = _with_room(tensor, tensor.shape[0], capacity)
    return buffer.narrow(2, 0, tensor.shape[2]).copy_(tensor), buffer


def _reorder(tensor: torch.Tensor, buffer: torch.Tensor | None, beam_idx: torch.Tensor, pinned: bool) -> Grown:
    """Rows `beam_idx` of `tensor`, with as much room as `buffer` has; copied once, as without a buffer, or twice."""
    beam_idx = beam_idx.to(tensor.device)
    if buffer is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return tensor.index_select(0, beam_idx), None
    if pinned and beam_idx.shape[0] == tensor.shape[0]:
        return tensor.copy_(tensor.index_select(0, beam_idx)), buffer
    reordered = _with_room(tensor, beam_idx.shape[0], buffer.shape[2])
    return torch.index_select(tensor, 0, beam_idx, out=reordered.narrow(2, 0, tensor.shape[2])), reordered


def _with_room(tensor: torch.Tensor, rows: int, capacity: int) -> torch.Tensor:
    """A buffer for `capacity` tokens of `tensor`'s kind; what is behind its tokens is 0."""
    heads, length, head_dim = tensor.shape[1:]
    buffer = tensor.new_empty((rows, heads, capacity, head_dim))
    # A captured step reads all of it: masked keys and values get the weight 0, but 0 times NaN is NaN.
    buffer.narrow(2, length, capacity - length).zero_()
    return buffer
