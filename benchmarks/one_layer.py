"""Attention of one new token in one layer, beyond the trained window: ours, with its correction, and plain."""

from collections.abc import Callable
from functools import partial

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tools import package

from .models import InternLMForCausalLM, capture, check_equal
from .timing import seconds


Positions = package.load("positions").Positions
rotary = package.load("rotary")

SETS = 8  # of keys and values: more than a GPU's L2 cache holds, so that each is read from memory
REPEATS = 10  # of a graph within one sample, so that its launch does not count


class OneLayer:
    """The first layer's attention of the last of `length` tokens, on random queries, keys and values.

    On a GPU the calls on all sets are captured as one graph, for a Python call takes longer than its kernels.

    Args:
        model: Determines the layer, its dtype and its device.
        length: Tokens of context, the new one included, beyond the window.
    """

    def __init__(self, model: InternLMForCausalLM, length: int) -> None:
        self.config, self.length, self.device = model.config, length, model.device
        self.attention = model.model.layers[0].self_attn
        self.on_gpu = self.device.type == "cuda"
        generator = torch.Generator(self.device).manual_seed(3)
        heads, head_dim = self.config.num_attention_heads, self.config.head_dim
        new = partial(torch.randn, generator=generator, device=self.device, dtype=model.dtype)
        self.query = new(1, heads, 1, head_dim)
        shape = (1, heads, length, head_dim)
        self.sets = [(new(shape), new(shape)) for _ in range(SETS if self.on_gpu else 1)]
        self.correction = self._correction(new(1, 1, self.config.hidden_size))

    def _correction(self, embedded: torch.Tensor) -> list:
        """As InternLMModel.forward makes it, once for all layers."""
        last = torch.tensor([self.length - 1], device=self.device)
        positions = Positions(new=last[None], slots=last, key_length=self.length, key_offset=0)
        *_, corrections = rotary.rotary_tables(self.config, embedded, positions, None, None, "cache")
        return corrections

    def ours(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """As InternLMAttention.forward calls it: (1, 1, H, D)."""
        states, scaling = (self.query, keys, values, None), self.attention.scaling
        interface = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return rotary.corrected_attention(interface, self.attention, *states, self.correction, scaling=scaling)[0]

    def plain(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return scaled_dot_product_attention(self.query, keys, values).transpose(1, 2)

    def exact(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Ours from its definition, in float64: all rotated once more, by position * (inv_freq(L) - inv_freq(M))."""
        head_dim, rotation = self.config.head_dim, self.config.rotary
        pairs = torch.arange(0, head_dim, 2, device=self.device, dtype=torch.float64)
        factor, window = rotation["scaling_factor"], self.config.max_position_embeddings
        ratio = factor * self.length / window - (factor - 1)
        change = rotation["base"] ** (-pairs / head_dim) * (ratio ** (-pairs / (head_dim - 2)) - 1)
        angles = torch.arange(self.length, device=self.device)[:, None] * change

        def rotate(states: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
            first, second = states.double().chunk(2, dim=-1)
            product = torch.polar(torch.ones_like(angles), angles) * torch.complex(first, second)
            return torch.cat((product.real, product.imag), dim=-1)

        query, keys = rotate(self.query, angles[-1:]), rotate(keys, angles)
        return scaled_dot_product_attention(query, keys, values.double()).transpose(1, 2)

    def check(self, what: str) -> float:
        """By how much ours differs from the definition; SidesDiffer if that is more than rounding errors."""
        first = self.sets[0]
        return check_equal(self.ours(*first), self.exact(*first).to(self.query.dtype), what, layers=1)

    def sampler(self, attend: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Callable[[], float]:
        """A function that returns the seconds of one call of `ours` or `plain`."""

        def all_sets() -> None:
            for keys, values in self.sets:
                attend(keys, values)

        call, repeats = (capture(all_sets)[0].replay, REPEATS) if self.on_gpu else (all_sets, 1)

        def sample() -> float:
            return seconds(lambda: [call() for _ in range(repeats)], self.device) / repeats / len(self.sets)

        return sample
