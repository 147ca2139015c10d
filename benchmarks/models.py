"""The models under comparison, which share their weights, and the work they are timed on."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from tools import package

from .timing import synchronize


InternLMConfig = package.load("configuration").InternLMConfig
InternLMForCausalLM = package.load("modeling").InternLMForCausalLM


class Shape(NamedTuple):
    """Sizes of a model, named hidden x layers."""

    hidden: int
    layers: int
    heads: int
    intermediate: int
    vocab: int = 4096  # small: the head, which is the same on both sides, must not dominate
    window: int = 4096
    bias: bool = False

    def __str__(self) -> str:
        return f"{self.hidden}x{self.layers}"


SMALL = Shape(hidden=256, layers=12, heads=4, intermediate=688)
MEDIUM = Shape(hidden=1024, layers=8, heads=8, intermediate=2752)
OVERHEAD = Shape(hidden=128, layers=12, heads=2, intermediate=352, vocab=512)  # a larger head would not be overhead


# Models


def _sizes(shape: Shape) -> dict[str, int]:
    """The fields that both configurations have."""
    return {
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "max_position_embeddings": shape.window,
    }


def our_config(shape: Shape, rotary: str = "dynamic") -> InternLMConfig:
    """Ours; `rotary` is "dynamic" (NTK beyond the window) or "origin" (plain)."""
    rotary_field = {"type": rotary, "base": 10000}
    return InternLMConfig(**_sizes(shape), bias=shape.bias, rotary=rotary_field, attn_implementation="sdpa")


def llama_config(shape: Shape) -> LlamaConfig:
    """transformers' Llama with plain rotary."""
    return LlamaConfig(**_sizes(shape), attention_bias=shape.bias, rms_norm_eps=1e-6, attn_implementation="sdpa")


def our_model(shape: Shape, dtype: torch.dtype, device: str = "cpu", rotary: str = "dynamic") -> InternLMForCausalLM:
    """Ours with random weights, created on the device."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = InternLMForCausalLM(our_config(shape, rotary))
    finally:
        torch.set_default_dtype(before)
    if shape.bias:  # biases are initialised to 0, which would hide bugs
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                torch.nn.init.normal_(parameter, std=0.02)
    return model.eval()


def sharing_weights(source: torch.nn.Module, model_class: type, config: Any) -> torch.nn.Module:
    """A model whose parameters are the tensors of `source`: no copy, so the weights cannot differ."""
    with torch.device("meta"):
        model = model_class(config)
    model.load_state_dict(source.state_dict(), assign=True)
    if hasattr(model.model, "rotary_emb"):  # Llama's buffers are not in the state dict
        model.model.rotary_emb = type(model.model.rotary_emb)(config).to(source.device)
    return model.eval()


def share_layers(model: torch.nn.Module) -> None:
    """Let all layers share the weights of the first, so that they fit into a core's cache."""
    first = model.model.layers[0]
    for layer in model.model.layers[1:]:
        for name, parameter in first.named_parameters():
            module, _, leaf = name.rpartition(".")
            setattr(layer.get_submodule(module), leaf, parameter)


def twins(shape: Shape, dtype: torch.dtype, device: str = "cpu") -> tuple[InternLMForCausalLM, LlamaForCausalLM]:
    """Ours and transformers' Llama on the same weights."""
    ours = our_model(shape, dtype, device)
    return ours, sharing_weights(ours, LlamaForCausalLM, llama_config(shape))


def check_equal(first: torch.Tensor, second: torch.Tensor, what: str) -> None:
    """Stop the benchmark unless both sides agree: the ratio of two different functions is meaningless."""
    tolerance = 1e-3 if first.dtype == torch.float32 else 0.1
    scale = second.float().abs().max().clamp(min=1.0)
    difference = ((first.float() - second.float()).abs().max() / scale).item()
    if not difference < tolerance:
        raise SystemExit(f"{what}: the two sides differ by {difference:.2e} (allowed {tolerance}); not timed.")


# Workloads


def new_tokens(model: torch.nn.Module, batch: int, length: int) -> torch.Tensor:
    """Random token ids, (batch, length), the same in every call."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, model.config.vocab_size, (batch, length), generator=generator).to(model.device)


class Context:
    """A cache with which several sides decode alternately, up to `length` tokens; then it is reset, untimed.

    It is filled with random keys and values instead of a prefill, which would take minutes on a CPU. The sides share
    it, so that the largest context has to fit into GPU memory only once.

    Args:
        model: Determines sizes, dtype and device of the cache.
        batch: Rows.
        length: Tokens per row at the end of decoding; after a reset the cache has `room` tokens less.
        static: A static cache of `length` tokens instead of a growing one.
    """

    def __init__(self, model: torch.nn.Module, batch: int, length: int, static: bool = False) -> None:
        self.model, self.batch, self.length, self.static = model, batch, length, static
        self.room = max(16, length // 16)
        self.ids = new_tokens(model, batch, 1)
        self.cache = None
        self.rewind()

    def rewind(self) -> None:
        """Reset the cache to its start, with the same content every time."""
        config, device = self.model.config, self.model.device
        self.position = self.length - self.room
        if not self.static:
            self.cache = DynamicCache(config=config)
        elif self.cache is None:
            self.cache = StaticCache(config=config, max_cache_len=self.length)
        else:
            self.cache.reset()
        generator = torch.Generator(device).manual_seed(2)
        head_dim = config.hidden_size // config.num_attention_heads
        shape = (self.batch, config.num_attention_heads, self.position, head_dim)
        noise = torch.randn(shape, generator=generator, device=device, dtype=self.model.dtype)
        positions = {"cache_position": torch.arange(self.position, device=device)}  # used up to transformers 5.3
        for layer in range(config.num_hidden_layers):
            self.cache.update(noise, noise, layer, positions)

    def arguments_of_generate(self) -> dict[str, torch.Tensor]:
        """What `generate` passes to a decode step besides the new tokens."""
        keys = self.length if self.static else self.position + 1
        mask = torch.ones(self.batch, keys, dtype=torch.long, device=self.model.device)
        mask[:, self.position + 1 :] = 0
        positions = torch.full((self.batch, 1), self.position, device=self.model.device)
        return {"attention_mask": mask, "position_ids": positions}


class Decoding:
    """One side's decode steps in a context.

    Args:
        forward: A model, or its compiled forward.
        as_generate: Pass attention mask and position ids at each step, as `generate` does.
    """

    def __init__(self, forward: Callable, context: Context, as_generate: bool = False) -> None:
        self.forward, self.context, self.as_generate = forward, context, as_generate

    def step(self) -> torch.Tensor:
        """One new token; logits (batch, 1, vocabulary)."""
        context = self.context
        if context.position == context.length:
            context.rewind()
        extra = context.arguments_of_generate() if self.as_generate else {}
        context.position += 1
        return self.forward(input_ids=context.ids, cache=context.cache, **extra).logits

    def first_step(self) -> torch.Tensor:
        """The first step after a reset, the same for every side."""
        self.context.rewind()
        return self.step().clone()

    def sample(self, steps: int) -> float:
        """Seconds per step over `steps` steps, at most `room` of the context."""
        if self.context.position + steps > self.context.length:
            self.context.rewind()
        synchronize(self.context.model.device)
        start = time.perf_counter()
        for _ in range(steps):
            self.step()
        synchronize(self.context.model.device)
        return (time.perf_counter() - start) / steps


def train_step(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Forward, loss and backward; the optimizer is the same code on both sides. Returns the loss."""
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    model.zero_grad(set_to_none=True)
    return loss.detach()
