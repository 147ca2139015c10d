"""Ours against llama.cpp and transformers' Llama: a real model, the same weights, the same precision, two cores.

    make bench-llamacpp                            # about 10 minutes; the first run downloads the model (93 MB)
    .venvs/llamacpp/bin/python benchmarks/llamacpp.py --quick
    .venvs/llamacpp/bin/python benchmarks/llamacpp.py --model FOLDER   # with model.gguf beside the checkpoint

The model is that of tools/real_model.py. Llama is the original, with grouped keys and values, and so is llama.cpp's
copy: ours repeats them, and reads a tenth more bytes. llama.cpp's quantiser writes the GGUF file in each precision.

All times are in ms per token. A compiled model runs its prompt in eager mode, as generate does.
"""

import ctypes
import itertools
import logging
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import llama_cpp
import numpy as np
import torch
from transformers import CompileConfig, LlamaForCausalLM, StaticCache


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.counts import decode_bytes, forward_flops
from benchmarks.models import InternLMForCausalLM, check_equal
from benchmarks.report import Report, dtype_name, parser, row_of, start, wanted
from benchmarks.timing import alternate, copy_bandwidth, matrix_rate, seconds, warm_up_compiler
from tools.real_model import GGUF, real_model


PROMPT = 128  # tokens
STEPS = 32  # decode steps that are timed together
NEW, QUICK_NEW = 128, 16  # tokens of a generate call
CHECKED = 8  # decode steps whose logits are compared

TEXT = """A glacier begins as snow that does not melt in summer. Each winter adds a layer, and the weight of the new
snow presses the old into grains and then into ice, until the mass is so heavy that it starts to flow downhill. It
moves a few centimetres a day, faster in the middle than at the sides, and carries with it every stone that falls on
its surface. Where the ground is steep the ice breaks into deep cracks; where it is flat they close again. At its
lower end the glacier melts, and what it has carried stays behind as a long ridge of rubble, from which one can
tell, centuries later, how far the ice once reached and how warm the summers were when it began to retreat."""


class TorchSide:
    """A model of transformers; with `length`, compiled with a static cache of that many tokens."""

    def __init__(self, model: Any, length: int | None = None) -> None:
        self.model, self.forward, self.cache, self.static = model, model, None, None
        self.generate_options: dict[str, Any] = {}
        if length is not None:
            self.forward = torch.compile(model, fullgraph=True)
            self.static = StaticCache(config=model.config, max_cache_len=length)
            compiling = CompileConfig()
            compiling._compile_all_devices = True  # on a CPU, generate compiles only if forced to
            self.generate_options = {"cache_implementation": "static", "compile_config": compiling}

    def prompt(self, ids: list[int]) -> torch.Tensor:
        """Logits of the last token, (V,). An eager model creates its cache itself, as it does in generate."""
        if self.static is not None:
            self.static.reset()
        output = self.model(torch.tensor([ids]), cache=self.static, use_cache=True, logits_to_keep=1)
        self.cache = output.cache
        return output.logits[0, -1]

    def step(self, token: int) -> torch.Tensor:
        """Logits after one more token, (V,)."""
        return self.forward(torch.tensor([[token]]), cache=self.cache).logits[0, -1]

    def generate(self, ids: list[int], new: int) -> None:
        batch = torch.tensor([ids])
        mask = torch.ones_like(batch)
        self.model.generate(batch, attention_mask=mask, max_new_tokens=new, do_sample=False, **self.generate_options)


class LlamaCppSide:
    """llama.cpp with its defaults, except in float32, where keys and values are not shortened to float16."""

    def __init__(self, file: Path, dtype: torch.dtype, length: int) -> None:
        kind = llama_cpp.GGML_TYPE_F32 if dtype == torch.float32 else llama_cpp.GGML_TYPE_F16
        threads = torch.get_num_threads()
        options = {"n_threads": threads, "n_threads_batch": threads, "type_k": kind, "type_v": kind}
        self.llama = llama_cpp.Llama(str(file), n_ctx=length, verbose=False, **options)

    def prompt(self, ids: list[int]) -> torch.Tensor:
        self.llama.reset()
        return self._logits(ids)

    def step(self, token: int) -> torch.Tensor:
        return self._logits([token])

    def _logits(self, ids: list[int]) -> torch.Tensor:
        self.llama.eval(ids)
        logits = llama_cpp.llama_get_logits_ith(self.llama.ctx, -1)
        return torch.from_numpy(np.ctypeslib.as_array(logits, (self.llama.n_vocab(),)))

    def generate(self, ids: list[int], new: int) -> None:
        self.llama.reset()  # it would reuse the prompt of the call before
        for _ in itertools.islice(self.llama.generate(ids, temp=0.0), new):
            pass


Side = TorchSide | LlamaCppSide


def load_sides(folder: Path, gguf: Path, dtype: torch.dtype) -> dict[str, Side]:
    """All sides in one precision."""
    ours = InternLMForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    llama = LlamaForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=dtype).eval()
    for model in (ours, llama):
        model.generation_config.eos_token_id = None  # llama.cpp's generate never stops either
    return {
        "ours": TorchSide(ours),
        "ours_compiled": TorchSide(ours, PROMPT + STEPS),
        "llama": TorchSide(llama),
        "llama_cpp": LlamaCppSide(gguf, dtype, PROMPT + NEW),
    }


def write_gguf(source: Path, folder: Path, dtype: torch.dtype) -> Path:
    """The GGUF file in another precision, written by llama.cpp; dequantised weights are exactly transformers'."""
    target = folder / f"{dtype_name(dtype)}.gguf"
    settings = llama_cpp.llama_model_quantize_default_params()
    f32 = dtype == torch.float32
    settings.ftype = llama_cpp.LLAMA_FTYPE_ALL_F32 if f32 else llama_cpp.LLAMA_FTYPE_MOSTLY_BF16
    settings.allow_requantize = True
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(settings)):
        raise SystemExit(f"llama.cpp could not write {source} in {dtype_name(dtype)}; is it a complete GGUF file?")
    return target


# What is timed: seconds per token


def prompt_seconds(side: Side, ids: list[int]) -> float:
    return seconds(partial(side.prompt, ids)) / len(ids)


def decode_seconds(side: Side, ids: list[int]) -> float:
    """Greedy decoding after the prompt, which is not timed."""
    token = int(side.prompt(ids).argmax())
    begin = time.perf_counter()
    for _ in range(STEPS):
        token = int(side.step(token).argmax())
    return (time.perf_counter() - begin) / STEPS


def generate_seconds(side: Side, ids: list[int], new: int) -> float:
    """A generate call with its prompt, per new token."""
    return seconds(partial(side.generate, ids, new)) / new


def logits_along(side: Side, ids: list[int]) -> torch.Tensor:
    """Logits after the prompt and after each of the last CHECKED tokens, (1 + CHECKED, V)."""
    rows = [side.prompt(ids[:-CHECKED]).clone()]
    rows += [side.step(token).clone() for token in ids[-CHECKED:]]
    return torch.stack(rows).float()


class Case(NamedTuple):
    kind: str
    first: str  # ours, eager or compiled
    others: tuple[str, ...]
    context: int
    at_least: dict[torch.dtype, float]  # targets of llama.cpp's time over ours


class Bench:
    """All cases in one precision."""

    def __init__(self, report: Report, model: str, dtype: torch.dtype, sides: dict[str, Side], quick: bool) -> None:
        self.report, self.model, self.dtype, self.sides = report, model, dtype, sides
        self.budget, self.new = (0.2, QUICK_NEW) if quick else (15.0, NEW)
        self.ids = sides["llama_cpp"].llama.tokenize(TEXT.encode())[:PROMPT]
        self.rate, self.bandwidth = matrix_rate(dtype), copy_bandwidth()

    def cases(self) -> list[Case]:
        eager, f32 = ("ours", ("llama_cpp", "llama")), torch.float32
        compiled = ("ours_compiled", ("llama_cpp",))
        return [
            Case("prompt", *eager, PROMPT, {}),
            Case("decode", *eager, PROMPT + STEPS, {f32: 0.5}),
            Case("compiled", *compiled, PROMPT + STEPS, {f32: 1.0, torch.bfloat16: 1.0}),
            Case("generate", *eager, PROMPT + self.new, {}),
            Case("generate_compiled", *compiled, PROMPT + self.new, {}),
        ]

    def check(self) -> None:
        """Stop unless all sides compute the same logits."""
        logits = {name: logits_along(side, self.ids) for name, side in self.sides.items()}
        for name in ("ours_compiled", "llama", "llama_cpp"):
            check_equal(logits["ours"].to(self.dtype), logits[name], f"{self.model}, {self.dtype}, ours and {name}")

    def work(self, kind: str) -> Callable[[Side, list[int]], float]:
        """The function that times one side."""
        if kind.startswith("generate"):
            return partial(generate_seconds, new=self.new)
        return prompt_seconds if kind == "prompt" else decode_seconds

    def floor(self, case: Case) -> float:
        """Seconds per token of ours: FLOP of the prompt over the matrix rate, bytes of a step over the bandwidth."""
        model = self.sides["ours"].model
        prompt = forward_flops(model, 1, PROMPT, logits=1) / self.rate
        if case.kind == "prompt":
            return prompt / PROMPT
        step = decode_bytes(model, 1, case.context) / self.bandwidth
        return step + prompt / self.new if case.kind.startswith("generate") else step

    def run(self, case: Case, name: str) -> None:
        work = self.work(case.kind)
        timing = alternate(
            {side: partial(work, self.sides[side], self.ids) for side in (case.first, *case.others)}, self.budget
        )
        models = {"ours": self.sides["ours"].model, "llama": self.sides["llama"].model}
        for other in case.others:
            times = {side: timing.milliseconds[side] for side in (case.first, other)}
            row, text = row_of(
                name,
                timing,
                other,
                at_least=case.at_least.get(self.dtype) if other == "llama_cpp" else None,
                floor=self.floor(case),
                kind=case.kind,
                model=self.model,
                dtype=dtype_name(self.dtype),
                batch=1,
                context=case.context,
                threads=torch.get_num_threads(),
                tokens_per_second={side: 1e3 / ms for side, ms in times.items()},
                bytes_per_step={side: decode_bytes(model, 1, case.context) for side, model in models.items()},
            )
            self.report.add(row, text)


def main() -> None:
    made = parser(__doc__)
    made.add_argument(
        "--model", type=Path, metavar="FOLDER", help=f"a checkpoint of ours with a {GGUF} of its weights"
    )
    arguments = made.parse_args()
    arguments.quick |= arguments.model is not None  # results are those of the real model
    start(arguments)
    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
    folder = arguments.model or real_model()
    report = Report("llamacpp", arguments)
    report.note(llama_cpp_python=llama_cpp.__version__)
    warm_up_compiler()
    for dtype in (torch.float32, torch.bfloat16):
        with tempfile.TemporaryDirectory(prefix="llamacpp-") as work, torch.no_grad():
            sides = load_sides(folder, write_gguf(folder / GGUF, Path(work), dtype), dtype)
            bench = Bench(report, folder.name, dtype, sides, arguments.quick)
            bench.check()
            for case in bench.cases():
                name = f"{case.kind}/{folder.name}/{dtype_name(dtype)}/b1/{case.context}"
                if wanted(name, arguments):
                    bench.run(case, name)
    report.finish()


if __name__ == "__main__":
    main()
