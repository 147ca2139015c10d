"""Triton kernels for CUDA: attention of one new token in a single pass over the cache, the rotation, and SwiGLU.

The plain expressions in rotary_internlm.py are their reference, and what runs wherever `usable` says no. Triton comes
with torch's CUDA builds; it needs a C compiler when a kernel is launched for the first time.

Shapes: B batch, H heads, K keys including the new one, Q new tokens, D head_dim.
"""

# The annotations of kernels are what `import triton.language` gave, if anything did.
# pyright: reportInvalidTypeForm=false

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from transformers.utils import logging

from .compat_internlm import is_compiling
from .positions_internlm import SeenKeys


triton: Any = None
tl: Any = None
if torch.version.cuda is not None:
    try:
        import triton
        import triton.language

        tl = triton.language
    except ImportError:
        pass

logger = logging.get_logger(__name__)

# Devices that the kernels run on. (The tests add the CPU, for Triton's interpreter.)
_DEVICE_TYPES = {"cuda"}
_BLOCK = 16  # keys that a program of the read takes at a time
_READ_WARPS = 4
_PROGRAMS_PER_CORE = 4  # of the read, on each multiprocessor
_HEADS_AT_A_TIME = 16  # of the rotation
_SILU_BLOCK = 1024  # elements
_TYPICAL_CORES = 132  # of an H100 and an H200
# By device index: how many multiprocessors there are, 0 where kernels cannot be launched.
_cores: dict[int | None, int] = {}


def usable(tensor: torch.Tensor, compiled: bool = False) -> bool:
    """Whether the kernels run on this tensor's device. The first call for a device launches one.

    Args:
        compiled: Whether torch.compile shall call the kernel, too. It makes its own of rotations and products, but
            needs several for the read.
    """
    if triton is None or tensor.device.type not in _DEVICE_TYPES or torch.is_grad_enabled():
        return False
    # A subclass may be sharded, fake, ...
    if type(tensor) is not torch.Tensor or torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
        return False
    if torch.compiler.is_compiling():  # it needs the same things of Triton
        return compiled and is_compiling()
    index = tensor.device.index
    if index not in _cores:
        _cores[index] = _count_cores(tensor.device)
    return _cores[index] > 0


def warn_if_missing(tensor: torch.Tensor) -> None:
    """Say once what it costs that Triton is missing where CUDA is used."""
    if triton is None and torch.version.cuda is not None and tensor.is_cuda and not torch.compiler.is_compiling():
        logger.warning_once(
            "Triton is not installed, so rotations and reads of the cache are several operations each: prompts take "
            "longer, and tokens beyond the trained window several times as long. pip install triton (Windows: "
            "triton-windows)."
        )


def _count_cores(device: torch.device) -> int:
    states = torch.ones(1, 1, 1, 2, device=device)
    try:
        rotate_together([states], torch.ones_like(states), torch.zeros_like(states))
    except Exception as error:  # no C compiler, a GPU that Triton does not know, a cache folder that is read-only, ...
        logger.warning_once(
            f"Triton cannot launch kernels here ({error}): prompts take longer, and tokens beyond the trained window "
            "several times as long. It needs a C compiler, for example gcc, and a writable TRITON_CACHE_DIR."
        )
        return 0
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


# The read

if triton is not None:

    @triton.jit
    def _read(
        queries, keys, values, cos, sin, rows, distances, parts, done, outputs,
        query_row, query_head, key_row, key_head, key_token, value_row, value_head, value_token,
        table_row, rows_row, distances_row, scale,
        HALF: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr, SLOTS: tl.constexpr,
        CORRECTED: tl.constexpr,
    ):  # fmt: skip
        """A part of a row's keys for one head; the last part to end joins all of them.

        Of a part, the weighted sum of values, the sum of weights and the maximum are written. Each of the BLOCK lanes
        along the keys has its own running ones, so that the loop has no reduction but the one over the head.
        """
        head, split, row = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2).to(tl.int64)
        begin = tl.load(rows + row * rows_row)
        end = tl.load(rows + row * rows_row + 1)
        holes = tl.load(rows + row * rows_row + 2)
        size = tl.cdiv(tl.cdiv(end - begin, SPLITS), BLOCK) * BLOCK
        first = begin + split * size
        last = tl.minimum(first + size, end)
        lanes, pairs = tl.arange(0, BLOCK), tl.arange(0, WIDTH)
        real = pairs < HALF
        at_query = queries + row * query_row + head * query_head + pairs
        # Inductor passes a float as float64.
        q1 = (tl.load(at_query, mask=real, other=0).to(tl.float32) * scale).to(tl.float32)
        q2 = (tl.load(at_query + HALF, mask=real, other=0).to(tl.float32) * scale).to(tl.float32)
        at_key = keys + row * key_row + head * key_head + pairs[None, :]
        at_value = values + row * value_row + head * value_head + pairs[None, :]
        cos += row * table_row + pairs
        sin += row * table_row + pairs
        distances += row * distances_row
        maximum = tl.full([BLOCK], -1e30, tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        sum1 = tl.zeros([BLOCK, WIDTH], tl.float32)
        sum2 = tl.zeros([BLOCK, WIDTH], tl.float32)
        if CORRECTED:  # of a key relative to the first of its block
            within = lanes[:, None] * HALF
            cos_within = tl.load(cos[None, :] + within, mask=real[None, :], other=0)
            sin_within = tl.load(sin[None, :] + within, mask=real[None, :], other=0)
        for start in range(first, last, BLOCK):
            token = start + lanes
            seen = token < last
            there = seen[:, None] & real[None, :]
            offset = token[:, None].to(tl.int64)
            k1 = tl.load(at_key + offset * key_token, mask=there, other=0).to(tl.float32)
            k2 = tl.load(at_key + offset * key_token + HALF, mask=there, other=0).to(tl.float32)
            v1 = tl.load(at_value + offset * value_token, mask=there, other=0).to(tl.float32)
            v2 = tl.load(at_value + offset * value_token + HALF, mask=there, other=0).to(tl.float32)
            if CORRECTED:
                # To rotate keys forward is to rotate the query back, and only distances matter: the query is rotated
                # by its distance to the block's first key, and back by each key's distance to that.
                far = (end - 1 - start) * HALF
                c = tl.load(cos + far, mask=real, other=0)
                s = tl.load(sin + far, mask=real, other=0)
                a, b = q1 * c - q2 * s, q2 * c + q1 * s
                c_key, s_key = cos_within, sin_within
                if holes != 0:  # each key's distance is its own
                    distance = tl.load(distances + token, mask=seen, other=-1)
                    seen = distance >= 0
                    far_key = tl.maximum(distance, 0)[:, None] * HALF
                    c_key = tl.load(cos[None, :] + far_key, mask=real[None, :], other=0)
                    s_key = -tl.load(sin[None, :] + far_key, mask=real[None, :], other=0)
                    a, b = q1, q2
                a, b = a[None, :], b[None, :]
                scores = tl.sum(k1 * (a * c_key + b * s_key) + k2 * (b * c_key - a * s_key), 1)
            else:
                if holes != 0:
                    seen = tl.load(distances + token, mask=seen, other=-1) >= 0
                scores = tl.sum(k1 * q1[None, :] + k2 * q2[None, :], 1)
            scores = tl.where(seen, scores, -1e30)
            larger = tl.maximum(maximum, scores)
            weights = tl.where(seen, tl.exp2(scores - larger), 0.0)
            kept = tl.exp2(maximum - larger)
            total = total * kept + weights
            sum1 = sum1 * kept[:, None] + weights[:, None] * v1
            sum2 = sum2 * kept[:, None] + weights[:, None] * v2
            maximum = larger
        largest = tl.max(maximum, 0)
        kept = tl.exp2(maximum - largest)
        row_head = row * tl.num_programs(0) + head
        at_part = parts + (row_head * SPLITS + split) * (2 * HALF + 2)
        tl.store(at_part + pairs, tl.sum(sum1 * kept[:, None], 0), mask=real)
        tl.store(at_part + HALF + pairs, tl.sum(sum2 * kept[:, None], 0), mask=real)
        tl.store(at_part + 2 * HALF, tl.sum(total * kept, 0))
        tl.store(at_part + 2 * HALF + 1, largest)
        tl.debug_barrier()  # all threads have written before one says so
        if tl.atomic_add(done + row_head, 1, sem="acq_rel") == SPLITS - 1:
            splits = tl.arange(0, SLOTS)
            at_parts = parts + (row_head * SPLITS + splits) * (2 * HALF + 2)
            ended = splits < SPLITS
            there = ended[:, None] & real[None, :]
            maxima = tl.load(at_parts + 2 * HALF + 1, mask=ended, other=-1e30)
            shares = tl.exp2(maxima - tl.max(maxima, 0))
            shares /= tl.sum(tl.load(at_parts + 2 * HALF, mask=ended, other=0) * shares, 0)
            output1 = tl.load(at_parts[:, None] + pairs[None, :], mask=there, other=0) * shares[:, None]
            output2 = tl.load(at_parts[:, None] + HALF + pairs[None, :], mask=there, other=0) * shares[:, None]
            at_output = outputs + row_head * 2 * HALF + pairs
            tl.store(at_output, tl.sum(output1, 0).to(outputs.dtype.element_ty), mask=real)
            tl.store(at_output + HALF, tl.sum(output2, 0).to(outputs.dtype.element_ty), mask=real)
            tl.store(done + row_head, 0)  # for the next layer

    @triton.jit
    def _rotate(
        first, second, first_output, second_output, copy, cos, sin, cos_more, sin_more,
        first_row, first_head, first_token,
        second_row, second_head, second_token, table_row, table_token, more_row, more_token, tokens, heads,
        HALF: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr, TWICE: tl.constexpr,
    ):  # fmt: skip
        """Some heads of one token of the first or the second tensor; with TWICE see `rotate_twice`."""
        index, is_second = tl.program_id(0).to(tl.int64), tl.program_id(2) == 1
        row, token = index // tokens, index % tokens
        head, pairs = tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, WIDTH)
        real = pairs < HALF
        there = (head < heads)[:, None] & real[None, :]
        # The angles of the first half are negative (rotary_internlm.cos_sin); the second half's tables are enough.
        table = row * table_row + token * table_token + HALF + pairs
        c = tl.load(cos + table, mask=real, other=0).to(tl.float32)[None, :]
        s = tl.load(sin + table, mask=real, other=0).to(tl.float32)[None, :]
        to = (index * heads + head[:, None]) * 2 * HALF + pairs[None, :]
        if is_second:
            at = second + row * second_row + token * second_token + head[:, None] * second_head + pairs[None, :]
            at_output = second_output + to
        else:
            at = first + row * first_row + token * first_token + head[:, None] * first_head + pairs[None, :]
            at_output = first_output + to
        x1 = tl.load(at, mask=there, other=0).to(tl.float32)
        x2 = tl.load(at + HALF, mask=there, other=0).to(tl.float32)
        y1, y2 = x1 * c - x2 * s, x2 * c + x1 * s
        kind = first_output.dtype.element_ty
        if TWICE:
            table = row * more_row + token * more_token + HALF + pairs
            c = tl.load(cos_more + table, mask=real, other=0).to(tl.float32)[None, :]
            s = tl.load(sin_more + table, mask=real, other=0).to(tl.float32)[None, :]
            z1, z2 = y1 * c - y2 * s, y2 * c + y1 * s
            if is_second:
                tl.store(copy + to, z1.to(kind), mask=there)
                tl.store(copy + to + HALF, z2.to(kind), mask=there)
            else:
                y1, y2 = z1, z2
        tl.store(at_output, y1.to(kind), mask=there)
        tl.store(at_output + HALF, y2.to(kind), mask=there)

    @triton.jit
    def _silu_mul(gate, up, outputs, numel, BLOCK: tl.constexpr):
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        there = at < numel
        x = tl.load(gate + at, mask=there, other=0).to(tl.float32)
        y = tl.load(up + at, mask=there, other=0).to(tl.float32)
        kind = outputs.dtype.element_ty
        silu = (x / (1 + tl.exp(-x))).to(kind).to(tl.float32)  # rounded, as by two operations
        tl.store(outputs + at, (silu * y).to(kind), mask=there)


class Scratch(NamedTuple):
    """What the programs of `read` share; each call leaves it ready for the next one.

    Attributes:
        parts: Results of the parts, of any shape.
        done: How many parts of a row's head have ended, (B H,), int32; 0 between calls.
    """

    parts: torch.Tensor
    done: torch.Tensor


def new_scratch(rows: int, heads: int, head_dim: int, device: torch.device) -> Scratch:
    count = max(rows * heads, _programs(device))
    parts = torch.empty(count * (head_dim + 2), device=device, dtype=torch.float32)
    return Scratch(parts, torch.zeros(rows * heads, device=device, dtype=torch.int32))


def read(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    seen: SeenKeys,
    tables: tuple[torch.Tensor, torch.Tensor] | None,
    scratch: Scratch,
    scaling: float,
) -> torch.Tensor:
    """Attention of one new token, (B, H, 1, D), to its keys and values, (B, H, K, D): (B, 1, H, D).

    Keys and values are read once, in parts that are joined at the end (Dao et al., "Flash-Decoding for long-context
    inference", 2023); products, softmax and sums are float32. Only the keys that a row sees are read.

    Args:
        tables: Cosines and sines of the correction by distance, (B or 1, K, D / 2), float32; None for no correction.
        scaling: What the scores are multiplied by.
    """
    rows, heads, _, head_dim = queries.shape
    half, parts = head_dim // 2, scratch.parts
    # So many that all multiprocessors have work.
    splits = max(1, min(64, parts.numel() // ((head_dim + 2) * rows * heads)))
    outputs = queries.new_empty((rows, 1, heads, head_dim))
    cos, sin = (parts, parts) if tables is None else tables
    _read[(heads, splits, rows)](
        queries, keys, values, cos, sin, *seen, *scratch, outputs,
        queries.stride(0), queries.stride(1), *keys.stride()[:3], *values.stride()[:3],
        _row_stride(cos), _row_stride(seen.rows), _row_stride(seen.distances), scaling * 1.4426950408889634,  # log2(e)
        HALF=half, WIDTH=_power_of_2(half), BLOCK=_BLOCK, SPLITS=splits, SLOTS=_power_of_2(splits),
        CORRECTED=tables is not None, num_warps=_READ_WARPS,
    )  # fmt: skip
    return outputs


def rotate_together(states: Sequence[torch.Tensor], cos: torch.Tensor, sin: torch.Tensor) -> Sequence[torch.Tensor]:
    """`rotary_internlm.rotate` of one or two tensors, (B, H, Q, D), in float32.

    Args:
        cos, sin: Of `rotary_internlm.cos_sin`, (B or 1, 1, Q, D).
    """
    return _launch_rotation(states, (cos, sin), (cos, sin), twice=False)


def rotate_twice(
    queries: torch.Tensor,
    keys: torch.Tensor,
    tables: tuple[torch.Tensor, torch.Tensor],
    more: tuple[torch.Tensor, torch.Tensor],
) -> Sequence[torch.Tensor]:
    """Queries rotated by both pairs of tables, keys rotated by the first, and keys rotated by both."""
    return _launch_rotation((queries, keys), tables, more, twice=True)


def _launch_rotation(
    states: Sequence[torch.Tensor], tables: Sequence[torch.Tensor], more: Sequence[torch.Tensor], twice: bool
) -> Sequence[torch.Tensor]:
    first, second = states[0], states[-1]
    rows, heads, tokens, head_dim = first.shape
    half = head_dim // 2
    # Each has memory of its own: a cache keeps the keys, and would keep the queries beside them.
    outputs = [first.new_empty((rows, tokens, heads, head_dim)) for _ in range(len(states) + twice)]
    _rotate[(rows * tokens, -(-heads // _HEADS_AT_A_TIME), len(states))](
        first, second, outputs[0], outputs[len(states) - 1], outputs[-1], *tables, *more,
        *first.stride()[:3], *second.stride()[:3],
        _row_stride(tables[0]), tables[0].stride(2), _row_stride(more[0]), more[0].stride(2), tokens, heads,
        HALF=half, WIDTH=_power_of_2(half), HEADS=_HEADS_AT_A_TIME, TWICE=twice,
    )  # fmt: skip
    return [output.transpose(1, 2) for output in outputs]


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of two contiguous tensors, in one pass."""
    outputs = torch.empty_like(gate)
    _silu_mul[(-(-gate.numel() // _SILU_BLOCK),)](gate, up, outputs, gate.numel(), BLOCK=_SILU_BLOCK)
    return outputs


def _row_stride(tensor: torch.Tensor) -> int:
    return 0 if tensor.shape[0] == 1 else tensor.stride(0)


def _power_of_2(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _programs(device: torch.device) -> int:
    """How many programs of the read there are at least, so that all multiprocessors have work."""
    # A compiled program must not depend on whether the kernels have run before.
    cores = _TYPICAL_CORES if torch.compiler.is_compiling() else _cores[device.index]
    return cores * _PROGRAMS_PER_CORE


__all__ = ["new_scratch", "read", "rotate_together", "rotate_twice", "silu_mul", "usable", "warn_if_missing"]
