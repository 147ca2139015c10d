"""The models under comparison, which share their weights, and the work they are timed on."""

import copy
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.cache_utils import Cache

from tools import package
from tools.real_model import real_model

from .timing import synchronize


InternLMConfig = package.load("configuration").InternLMConfig
InternLMForCausalLM = package.load("modeling").InternLMForCausalLM
GrowingCache = package.load("cache").GrowingCache
join_weights = package.load("linear").join_weights
CACHE = package.load("compat").CACHE  # the library's name for a cache, which differs by version


class Shape(NamedTuple):
    """Sizes of a model, named hidden x layers."""

    hidden: int
    layers: int
    heads: int
    intermediate: int
    vocab: int = 4096  # small: the head, which is the same on both sides, must not dominate
    window: int = 4096
    bias: bool = False
    base: int = 10_000  # of the rotary embedding
    eps: float = 1e-6  # of the norms

    def __str__(self) -> str:
        return f"{self.hidden}x{self.layers}"


SMALL = Shape(hidden=256, layers=12, heads=4, intermediate=688, window=8192)
MEDIUM = Shape(hidden=1024, layers=8, heads=8, intermediate=2752, window=8192)
# The real model of tools/real_model.py, with its weights.
REAL = Shape(hidden=576, layers=30, heads=9, intermediate=1536, vocab=49_152, window=8192, base=100_000, eps=1e-5)
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
        "rms_norm_eps": shape.eps,
    }


def our_config(shape: Shape, rotary: str = "dynamic") -> InternLMConfig:
    """Ours; `rotary` is "dynamic" (NTK beyond the window) or "origin" (plain)."""
    rotary_field = {"type": rotary, "base": shape.base}
    return InternLMConfig(**_sizes(shape), bias=shape.bias, rotary=rotary_field, attn_implementation="sdpa")


def llama_config(shape: Shape) -> LlamaConfig:
    """transformers' Llama with plain rotary."""
    rope = {"rope_type": "default", "rope_theta": shape.base}
    return LlamaConfig(**_sizes(shape), attention_bias=shape.bias, rope_parameters=rope, attn_implementation="sdpa")


def our_model(shape: Shape, dtype: torch.dtype, device: str = "cpu", rotary: str = "dynamic") -> InternLMForCausalLM:
    """Ours with random weights, created on the device; REAL is loaded."""
    if shape == REAL:
        config = our_config(shape, rotary)
        return InternLMForCausalLM.from_pretrained(real_model(), config=config, dtype=dtype).to(device).eval()
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
    # As its first generate on a GPU would; but later, a model that shares the weights would keep the old ones, too.
    join_weights(model)
    return model.eval()


def sharing_weights(source: torch.nn.Module, model_class: type, config: Any) -> torch.nn.Module:
    """A model whose parameters are the tensors of `source`: no copy, so the weights cannot differ."""
    return _on_weights(source.state_dict(), model_class, config)


def _on_weights(weights: dict[str, torch.Tensor], model_class: type, config: Any) -> torch.nn.Module:
    with torch.device("meta"):
        model = model_class(config)
    model.load_state_dict(weights, assign=True)
    if hasattr(model.model, "rotary_emb"):  # Llama's buffers are not in the state dict
        model.model.rotary_emb = type(model.model.rotary_emb)(config).to(model.lm_head.weight.device)
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


def plain_rotary(source: InternLMForCausalLM, shape: Shape) -> InternLMForCausalLM:
    """The model with plain rotary on the same weights: what it would cost without the correction beyond the window."""
    return sharing_weights(source, InternLMForCausalLM, our_config(shape, rotary="origin"))


def quantize(*models: torch.nn.Module) -> float:
    """Replace linear layers, but not the head, by bitsandbytes' of 4 bits (nf4), which the models share.

    Returns:
        How many bytes less each of them reads: a weight takes half a byte, and a block of 64 a scale in float32.
    """
    from bitsandbytes.nn import Linear4bit, Params4bit

    made: dict[int, Linear4bit] = {}
    saved = 0.0
    for model in models:
        linears = [name for name, module in model.model.named_modules() if type(module) is torch.nn.Linear]
        for name in linears:
            linear, address = model.model.get_submodule(name), model.model.get_submodule(name).weight.data_ptr()
            if address not in made:
                weight, bias, kind = linear.weight, linear.bias, {"quant_type": "nf4"}
                sizes = linear.in_features, linear.out_features, bias is not None
                made[address] = Linear4bit(*sizes, compute_dtype=weight.dtype, device="meta", **kind)
                made[address].weight = Params4bit(weight.data, requires_grad=False, **kind).to(weight.device)
                made[address].bias = bias
                saved += weight.numel() * (weight.dtype.itemsize - 0.5 - 4 / 64)
            model.model.set_submodule(name, made[address])
    return saved


def shallow_twins(*models: torch.nn.Module, layers: int = 2) -> list[torch.nn.Module]:
    """Float32 copies of models with their first layers only; tensors that the models share are copied once.

    What the copies compute differs by rounding errors of float32 alone, whatever the depth and dtype of the models.
    """
    made: dict[int, torch.Tensor] = {}
    copies = []
    for model in models:
        weights = {}
        for name, tensor in model.state_dict().items():
            if not name.startswith("model.layers.") or int(name.split(".")[2]) < layers:
                address = tensor.data_ptr()
                made[address] = weights[name] = made[address] if address in made else tensor.float()
        config = copy.deepcopy(model.config)
        config.num_hidden_layers = layers
        copies.append(_on_weights(weights, type(model), config))
    return copies


class SidesDiffer(Exception):
    """Two sides compute different results: the ratio of their times would be meaningless."""


def check_equal(first: torch.Tensor, second: torch.Tensor, what: str, layers: int = 12) -> float:
    """Raise SidesDiffer unless both sides agree; otherwise return by how much they differ.

    In float32 the largest difference counts, relative to the largest value. In half precision it is the norm of the
    difference over the norm, which averages over the vocabulary, and the bound is 4 * eps * sqrt(layers): every layer
    rounds what it adds to the residual stream, and independent errors add up like a random walk. Ours and Llama were
    measured at 0.2 to 1.0 eps * sqrt(layers), 256 to 5,120 wide and 2 to 60 layers deep. (For 60 layers in bfloat16
    the bound is 0.24, which only a gross error exceeds. `shallow_twins` is for the fine ones.)

    Args:
        layers: Layers of the models.
    """
    exact, dtype = second.float(), first.dtype
    difference = first.float() - exact
    if dtype == torch.float32:
        value = (difference.abs().max() / exact.abs().max().clamp(min=1.0)).item()
        allowed = 1e-3
    else:
        value = (difference.norm() / exact.norm()).item()
        allowed = 4 * torch.finfo(dtype).eps * layers**0.5
    if not value <= allowed:
        raise SidesDiffer(f"{what}: the two sides differ by {value:.2e} (allowed {allowed:.1e}); not timed.")
    return value


# Workloads


def new_tokens(model: torch.nn.Module, batch: int, length: int) -> torch.Tensor:
    """Random token ids, (batch, length), the same in every call."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, model.config.vocab_size, (batch, length), generator=generator).to(model.device)


def generate(model: torch.nn.Module, ids: torch.Tensor, tokens: int, **settings: Any) -> torch.Tensor:
    """`generate` as a user calls it: greedily, `tokens` new ones, with the model's default cache. Returns these."""
    model.generation_config.eos_token_id = None  # random weights may emit it anywhere
    settings = {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": 0, **settings}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[:, ids.shape[1] :]


def new_cache(model: torch.nn.Module, kind: str, length: int) -> Cache:
    """An empty cache for `length` tokens: "library", "growing", "static", or the "default" of the model's generate."""
    if kind == "default":
        kind = "growing" if isinstance(model, InternLMForCausalLM) else "library"
    if kind == "static":
        return StaticCache(config=model.config, max_cache_len=length)
    if kind == "growing":
        return GrowingCache(config=model.config, max_length=length)
    return DynamicCache(config=model.config)


class Context:
    """A cache with which sides decode alternately, up to `length` tokens; then it is reset, untimed.

    It is filled with random keys and values instead of a prefill, which would take minutes on a CPU: at the first
    step, and again after `drop`. Sides with the same kind of cache share a context. Where the contexts of two kinds do
    not fit into memory together, each side drops the other's before it is timed.

    Args:
        model: Determines sizes, dtype and device of the cache, and its class by default.
        batch: Rows.
        length: Tokens per row at the end of decoding; after a reset the cache has `room` tokens less.
        cache: Kind of cache, see `new_cache`.
    """

    def __init__(self, model: torch.nn.Module, batch: int, length: int, cache: str = "default") -> None:
        self.model, self.batch, self.length, self.kind = model, batch, length, cache
        self.room = max(17, length // 16)  # for the step that `sample` does not time, and 16 more
        self.ids = new_tokens(model, batch, 1)
        self.drop()

    def drop(self) -> None:
        """Release the cache. The next step starts with a new one."""
        self.cache, self.position = None, self.length

    def rewind(self) -> None:
        """Reset the cache to its start, with the same content every time."""
        if self.kind == "static" and self.cache is not None:
            self.cache.reset()  # a compiled or captured step needs it at the same address
        else:
            self.drop()  # before the new one needs the memory
            self.cache = new_cache(self.model, self.kind, self.length)
        self.position = self.length - self.room
        config, device = self.model.config, self.model.device
        generator = torch.Generator(device).manual_seed(2)
        head_dim = config.hidden_size // config.num_attention_heads
        shape = (self.batch, config.num_attention_heads, self.position, head_dim)
        noise = torch.randn(shape, generator=generator, device=device, dtype=self.model.dtype)
        positions = {"cache_position": torch.arange(self.position, device=device)}  # used up to transformers 5.3
        for layer in range(config.num_hidden_layers):
            self.cache.update(noise, noise, layer, positions)

    def arguments_of_generate(self) -> dict[str, torch.Tensor]:
        """What `generate` passes to a decode step besides the new tokens."""
        keys = self.length if self.kind == "static" else self.position + 1
        mask = torch.ones(self.batch, keys, dtype=torch.long, device=self.model.device)
        mask[:, self.position + 1 :] = 0
        positions = torch.full((self.batch, 1), self.position, device=self.model.device)
        return {"attention_mask": mask, "position_ids": positions}


class Decoding:
    """One side's decode steps in a context.

    Args:
        forward: A model, or its compiled or captured forward.
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
        return self.forward(input_ids=context.ids, **{CACHE: context.cache}, **extra).logits

    def first_step(self) -> torch.Tensor:
        """The first step after a reset, the same for every side."""
        self.context.rewind()
        return self.step().clone()

    def sample(self, steps: int) -> float:
        """Seconds per step over `steps` steps, at most 16.

        The first step after a reset is not timed: a growing cache then copies the prompt's keys and values once.
        """
        if self.context.position + steps > self.context.length:
            self.first_step()
        synchronize(self.context.model.device)
        start = time.perf_counter()
        for _ in range(steps):
            self.step()
        synchronize(self.context.model.device)
        return (time.perf_counter() - start) / steps


def capture(call: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A CUDA graph of `call`, which runs three times before, and the result that each replay writes."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


class Captured:
    """A forward over a static cache that is captured as a CUDA graph, without a compiler; every call replays it.

    On a CPU, which has nothing to capture, every call is the model's forward.

    Args:
        model: The model.
        context: A context with a static cache, just reset; the graph keeps its addresses.
    """

    def __init__(self, model: torch.nn.Module, context: Context) -> None:
        self.model, self.graph = model, None
        if model.device.type == "cuda":
            self.graph, self.output = capture(partial(model, input_ids=context.ids, **{CACHE: context.cache}))

    def __call__(self, **arguments: Any) -> Any:
        if self.graph is None:
            return self.model(**arguments)
        self.graph.replay()
        return self.output


def train_step(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Forward, loss and backward; the optimizer is the same code on both sides. Returns the loss."""
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    model.zero_grad(set_to_none=True)
    return loss.detach()
