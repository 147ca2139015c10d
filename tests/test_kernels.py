"""The Triton kernels against the same expressions in float64: on a CUDA device, and on a CPU in Triton's interpreter.

The interpreter is chosen when Triton is imported, so it runs in a process of its own: this file as a program.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where it runs as a program

from tools import package


LIMITS = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
DTYPES = tuple(LIMITS)
# Rows, heads, keys, head_dim: sizes of heads and numbers of keys that are no power of 2 and no multiple of a block.
SHAPES = ((1, 2, 70, 64), (2, 3, 33, 16), (2, 1, 1, 10), (1, 2, 130, 96))
LARGE = ((3, 5, 1111, 128), (1, 40, 4200, 128))
MASKS = ("all", "left padding", "holes")


def modules(device):
    kernels, rotary = package.load("kernels"), package.load("rotary")
    kernels._DEVICE_TYPES.add(device)
    with torch.no_grad():
        kernels.usable(torch.ones(1, device=device))
    return kernels, rotary, package.load("positions")


def exact(rotary, queries, keys, values, seen, delta, scale):
    """Attention of one token to keys that are rotated by position * delta, all in float64."""
    queries, keys, values = queries.double(), keys.double(), values.double()
    ranks = seen.long().cumsum(-1)
    if delta is not None:
        keys = rotary.rotate(keys, *rotary.cos_sin(ranks - 1, delta.double()[:, None], torch.float64))
        queries = rotary.rotate(queries, *rotary.cos_sin(ranks[:, -1:] - 1, delta.double()[:, None], torch.float64))
    scores = (queries @ keys.transpose(2, 3) * scale).masked_fill(~seen[:, None, None], -torch.inf)
    return (scores.softmax(-1) @ values).transpose(1, 2)


def difference(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


@torch.no_grad()
def check_read(device, dtype, shape, mask, corrected, scale=1.0):
    """Left-padded rows, rows with holes, rows of different lengths, unused room at the end, any strides."""
    kernels, rotary, positions = modules(device)
    rows, heads, length, head_dim = shape
    torch.manual_seed(0)
    queries, keys, values = (
        torch.randn(rows, tokens, heads, head_dim, device=device).mul(scale).to(dtype).transpose(1, 2)
        for tokens in (1, length + 5, length + 5)
    )
    seen = torch.ones(rows, length + 5, dtype=torch.bool, device=device)
    seen[:, length:] = False
    if mask != "all" and length > 8:
        seen[0, :5] = False
    if mask == "holes" and length > 8:
        seen[-1, 7] = seen[0, length // 2] = False
    delta = -0.02 * torch.rand(rows, head_dim // 2, device=device) if corrected else None
    tables = None
    if delta is not None:
        angles = torch.arange(length + 5, device=device)[None, :, None] * delta[:, None]
        tables = angles.cos(), angles.sin()
    expected = exact(rotary, queries, keys, values, seen, delta, head_dim**-0.5)
    scratch = kernels.new_scratch(rows, heads, head_dim, queries.device)
    scratch.parts.fill_(torch.nan)
    arguments = queries, keys, values, positions.seen_keys_of(seen), tables, scratch, head_dim**-0.5
    found = kernels.read(*arguments)
    assert not scratch.done.any()  # ready for the next layer
    if mask == "holes":
        assert torch.equal(kernels.read(*arguments), found)
    assert found.dtype == dtype and found.shape == (rows, 1, heads, head_dim)
    assert difference(found, expected) < LIMITS[dtype], (dtype, shape, mask, corrected)


@torch.no_grad()
def check_rotation(device, dtype):
    """Queries and keys with different strides and heads that are no multiple of a block; and one tensor alone."""
    kernels, rotary, _ = modules(device)
    torch.manual_seed(0)
    queries = torch.randn(2, 5, 3 * 12, device=device).to(dtype).view(2, 5, 3, 12).transpose(1, 2)
    keys = torch.randn(2, 5, 2 * 36, device=device).to(dtype)[..., 36:].view(2, 5, 3, 12).transpose(1, 2)
    before = queries.clone(), keys.clone()
    positions = torch.tensor([[0, 1, 2, 3, 4], [3, 4, 5, 6, 7]], device=device)
    tables = rotary.cos_sin(positions, torch.rand(6, device=device), dtype)
    more = rotary.cos_sin(positions[:1], torch.rand(6, device=device), dtype)  # one row for all

    def exactly(states, *rotations):
        states = states.double()
        for cos, sin in rotations:
            states = rotary.rotate(states, cos.double(), sin.double())
        return states

    once = exactly(queries, tables), exactly(keys, tables)
    twice = exactly(queries, tables, more), exactly(keys, tables, more)
    found = [*kernels.rotate_together((queries, keys), *tables), *kernels.rotate_together((queries,), *tables)]
    found += kernels.rotate_twice(queries, keys, tables, more)
    for states, wanted in zip(found, (*once, once[0], twice[0], once[1], twice[1]), strict=True):
        assert states.dtype == dtype and states.shape == wanted.shape
        assert states.untyped_storage().nbytes() == states.nbytes  # a cache that keeps keys keeps nothing else
        assert difference(states, wanted) < LIMITS[dtype]
    # Whoever has kept them, as a hook does, still has what the projections returned.
    assert torch.equal(queries, before[0]) and torch.equal(keys, before[1])


@torch.no_grad()
def check_silu_mul(device, dtype):
    """As two operations, whose first result is rounded; a number of elements that is no multiple of a block."""
    kernels, *_ = modules(device)
    gate, up = (8 * torch.randn(2, 3, 1111, device=device)).to(dtype), torch.randn(2, 3, 1111, device=device).to(dtype)
    gate[0, 0, :4] = torch.tensor([0.0, -60000.0, 60000.0, -100.0])
    expected = torch.nn.functional.silu(gate.double()).to(dtype).double() * up.double()
    found = kernels.silu_mul(gate, up)
    assert found.dtype == dtype and difference(found, expected) < LIMITS[dtype]


@torch.no_grad()
def check_model(device):
    """Logits with the kernels and without, of a left-padded prompt and of steps, within the window and beyond it.

    Hooks see what layers return, and activations that have hooks are called.
    """
    kernels, configuration, modeling = modules(device)[0], package.load("configuration"), package.load("modeling")
    config = configuration.InternLMConfig(
        vocab_size=64, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, rotary={"base": 10000, "type": "dynamic"}, attn_implementation="sdpa",
    )  # fmt: skip
    torch.manual_seed(0)
    model = modeling.InternLMForCausalLM(config).to(device).eval()
    ids, mask = torch.randint(3, 64, (2, 26), device=device), torch.ones((2, 26), device=device)
    mask[0, :3] = 0
    layers = model.model.layers[0].self_attn.q_proj, model.model.layers[1].mlp.act_fn

    def run(hooked):
        logits, outputs, length, cache = [], [], 0, None
        keep = [layer.register_forward_hook(lambda *given: outputs.append(given[2])) for layer in layers if hooked]
        for end in (8, 9, 10, 24, 25, 26):
            result = model(ids[:, length:end], attention_mask=mask[:, :end], cache=cache)
            cache, length = result[modeling.CACHE], end
            logits.append(result.logits[:, -1])
        for hook in keep:
            hook.remove()
        return torch.stack(logits), outputs

    used = []
    with pytest.MonkeyPatch.context() as patch:
        for name, module in (("silu_mul", modeling), ("read", package.load("rotary"))):
            call = getattr(module, name)
            patch.setattr(module, name, lambda *given, name=name, call=call: used.append(name) or call(*given))
        found, _ = run(hooked=False)
        assert [used.count(name) for name in ("silu_mul", "read")] == [2 * 2, 4 * 2]  # 2 prompts and 4 steps, 2 layers
        hooked, outputs = run(hooked=True)
        assert [used.count(name) for name in ("silu_mul", "read")] == [2 * 2 + 2, 2 * 4 * 2]
        patch.setattr(kernels, "_DEVICE_TYPES", set())
        expected, plain = run(hooked=True)
    assert len(used) == 6 + 16 and len(outputs) == len(plain) == 2 * 6
    for one, other in zip((found, hooked, *outputs), (expected, expected, *plain), strict=True):
        assert difference(one, other.double()) < 1e-5


def run_all(device, shapes):
    for dtype in DTYPES:
        check_rotation(device, dtype)
        check_silu_mul(device, dtype)
        check_read(device, dtype, shapes[-1], "holes", True)
    for shape in shapes:
        for mask in MASKS:
            for corrected in (True, False):
                check_read(device, torch.float32, shape, mask, corrected)
    # Products of float16 that overflow, although the scores do not.
    check_read(device, torch.float16, shapes[0], "all", True, scale=300.0)
    check_model(device)


class Compiled:
    """A kernel that is compiled for an H100 or H200 where it would be launched, as Triton's compiler can without one.

    The interpreter takes any Python; the compiler knows types.
    """

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return self.compile

    def compile(self, *given, num_warps=4, **constants):
        from triton import compile as compiled
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        kinds = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int32: "*i32"}
        names = [name for name in self.kernel.arg_names if name not in constants]
        signature = dict.fromkeys(constants, "constexpr")
        for name, value in zip(names, given, strict=True):
            scalar = "fp32" if isinstance(value, float) else "i32"
            signature[name] = kinds[value.dtype] if isinstance(value, torch.Tensor) else scalar
        source = ASTSource(self.kernel, {name: signature[name] for name in self.kernel.arg_names}, constants)
        assert compiled(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps}).asm["ptx"]


def compile_all():
    kernels, positions = package.load("kernels"), package.load("positions")
    for name in ("_read", "_rotate", "_silu_mul"):
        setattr(kernels, name, Compiled(getattr(kernels, name)))
    kernels._cores[None] = 132
    for dtype in DTYPES:
        states = torch.ones(2, 3, 5, 128, dtype=dtype)
        tables, float_tables = (states[:1, :1],) * 2, (torch.ones(1, 5, 64),) * 2
        seen = positions.seen_keys_of(torch.ones(2, 5, dtype=torch.bool))
        scratch = kernels.new_scratch(2, 3, 128, states.device)
        for corrections in (None, float_tables):
            kernels.read(states[:, :, :1], states, states, seen, corrections, scratch, 0.1)
        kernels.rotate_together((states, states), *tables)
        kernels.rotate_twice(states, states, tables, tables)
        kernels.silu_mul(states, states)


@pytest.mark.parametrize("how", ("interpreted", "compiled"))
def test_without_a_gpu(how):
    """All shapes, masks and dtypes; no skip: Triton is one of the requirements of the tests where it exists."""
    environment = {**os.environ, "TRITON_INTERPRET": str(int(how == "interpreted"))}
    command = [sys.executable, __file__, how]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == [how]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu():
    run_all("cuda", SHAPES + LARGE)


@pytest.fixture
def fake_triton(monkeypatch):
    """The module as if Triton had launched a kernel on the CPU."""
    kernels = package.load("kernels")
    monkeypatch.setattr(kernels, "triton", object())
    monkeypatch.setattr(kernels, "_DEVICE_TYPES", {"cpu"})
    monkeypatch.setattr(kernels, "_count_cores", lambda device: 8)
    monkeypatch.setattr(kernels, "_cores", {})
    return kernels


def test_usable_says_no_without_triton_and_where_gradients_are_needed(fake_triton, monkeypatch):
    """So that everything runs without Triton; with it, only where no gradient is, on plain tensors."""
    assert not fake_triton.usable(torch.ones(1))
    with torch.no_grad():
        assert fake_triton.usable(torch.ones(1))
        assert not fake_triton.usable(torch.ones(1).as_subclass(torch.nn.Buffer))
        with FakeTensorMode() as mode:
            assert not fake_triton.usable(mode.from_tensor(torch.ones(1)))
        monkeypatch.setattr(fake_triton, "_DEVICE_TYPES", {"cuda"})
        assert not fake_triton.usable(torch.ones(1))
        monkeypatch.setattr(fake_triton, "_DEVICE_TYPES", {"cpu"})
        monkeypatch.setattr(fake_triton, "triton", None)
        assert not fake_triton.usable(torch.ones(1))


class Answers(torch.nn.Module):
    def __init__(self, usable):
        super().__init__()
        self.usable = usable

    def forward(self, states):
        return states * 0 + 10 * self.usable(states) + self.usable(states, compiled=True)


@torch.no_grad()
def test_a_compiler_gets_the_read_and_an_export_nothing(fake_triton):
    """Whether or not kernels have run before: a compiled program must not be compiled again for that."""
    answers, states = Answers(fake_triton.usable), torch.ones(1)
    assert torch.compile(answers, backend="eager", fullgraph=True)(states) == 1
    assert not fake_triton._cores
    for strict in (False, True):
        assert torch.export.export(answers, (states,), strict=strict).module()(states) == 0
    assert answers(states) == 11


@pytest.mark.parametrize("attention", ("sdpa", "a user's sdpa", "eager"))
@torch.no_grad()
def test_the_read_replaces_only_the_librarys_sdpa(fake_triton, monkeypatch, attention):
    rotary, config = package.load("rotary"), package.load("configuration").InternLMConfig()
    config._attn_implementation = "eager" if attention == "eager" else "sdpa"
    if attention == "a user's sdpa":
        functions = rotary.ALL_ATTENTION_FUNCTIONS
        monkeypatch.setattr(type(functions), "get_interface", lambda *given: lambda *states, **settings: None)
    token, prompt = torch.ones(1, 1, 8), torch.ones(1, 2, 8)
    assert rotary._one_kernel_reads(config, token, None) == (attention == "sdpa")
    assert not rotary._one_kernel_reads(config, prompt, None)


def test_kernels_that_cannot_be_launched_are_reported_once_and_not_used(monkeypatch, caplog):
    """No C compiler, for example: one warning that says what to do, and the plain expressions."""
    kernels, *_ = modules("cpu")

    def fail(*arguments):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(kernels, "rotate_together", fail)
    monkeypatch.setattr(kernels, "triton", object())
    monkeypatch.setattr(kernels, "_cores", {})
    warned = []
    monkeypatch.setattr(kernels.logger, "warning_once", warned.append)
    try:
        with torch.no_grad():
            assert [kernels.usable(torch.ones(1)) for _ in range(2)] == [False, False]
    finally:
        kernels._DEVICE_TYPES.discard("cpu")
    assert len(warned) == 1 and "Failed to find C compiler" in warned[0] and "gcc" in warned[0]


if __name__ == "__main__":
    torch.version.cuda = "13.0"  # as in a build for CUDA: the module then imports Triton
    if sys.argv[1] == "compiled":
        compile_all()
    else:
        run_all("cpu", SHAPES)
    print(sys.argv[1])
