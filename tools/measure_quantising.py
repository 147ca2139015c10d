"""Measure quantised models against the original on real text: cosine of the logits, same token, perplexity, size.

    make quantising                     # the real model, every method; writes the table of docs/compatibility.md
    .venvs/ecosystem/bin/python tools/measure_quantising.py --model FOLDER --only "GPTQ 4-bit" --out results.json

The libraries are in two environments, those of `make test-ecosystem` and of `make test-llamacpp`: a run measures the
methods whose library is installed. Each becomes a row of the result file when it has been measured. A row that is
there is kept, so that a run continues an earlier one.

The text is Python's documentation. All positions of all windows count: the original's logits, in float32, are kept in
memory (4 GB for the real model). Sizes are those of the tensors as saved. GPTQ is calibrated on other text, the
standard library's source. GGUF files are those of `convert_checkpoint.py gguf` without the vocabulary: llama.cpp gets
the same token ids.
"""

import argparse
import json
import logging
import math
import os
import platform
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from safetensors import safe_open
from torch.nn.functional import cosine_similarity, cross_entropy
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GPTQConfig,
    TorchAoConfig,
)


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.report import QUICK_RESULTS, RESULTS, environment
from tools.convert.files import new_file
from tools.matrix import markdown, write
from tools.model_folder import complete_model
from tools.real_model import real_model
from tools.real_text import documentation, library


TOKENS, WINDOW = 20480, 2048
CALIBRATION = 16  # windows of other text
NAME = "quantising.json"
PAGE, MARK = "docs/compatibility.md", "quantised"

ORIGINAL = "float32"
METHODS = {  # and the packages that each needs, besides those of requirements.txt
    ORIGINAL: (),
    "bitsandbytes 8-bit": ("bitsandbytes",),
    "bitsandbytes nf4": ("bitsandbytes",),
    "torchao int8": ("torchao",),
    "GPTQ 8-bit": ("gptqmodel", "optimum"),
    "GPTQ 4-bit": ("gptqmodel", "optimum"),
    "GGUF f32": ("llama-cpp-python",),  # not quantised: what llama.cpp computes of the same weights
    "GGUF q8_0": ("llama-cpp-python",),
    "GGUF q4_k_m": ("llama-cpp-python",),
}

Tensors = dict[str, tuple[str, int]]  # type and bytes of each tensor of a saved model, by name


class Model(NamedTuple):
    """A model as it is measured."""

    logits: Callable[[list[int]], torch.Tensor]  # of token ids: (Q, V) in float32
    tensors: Tensors


class Window(NamedTuple):
    """Token ids, and for each of them the next one in the text."""

    ids: list[int]
    following: list[int]


# Models


def load(name: str, folder: Path, work: Path, calibration: list[str]) -> Model:
    """The model of `folder` by one of METHODS; `work` is an empty folder for its files."""
    if name.startswith("GGUF"):
        return in_llama_cpp(folder, work / "model.gguf", name.removeprefix("GGUF "))
    return in_transformers(folder, work, None if name == ORIGINAL else settings(name, folder, calibration))


def settings(name: str, folder: Path, calibration: list[str]) -> Any:
    """The quantization_config of one of those METHODS that run in transformers."""
    if name == "bitsandbytes 8-bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    if name == "bitsandbytes nf4":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    if name == "torchao int8":
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    # Use plain Python and torch: gptqmodel would compile C++ for packing and, on a CPU, for every layer.
    os.environ["GPTQMODEL_DISABLE_PACK_EXT"] = "1"
    torch.compiler.set_stance("force_eager")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    bits = int(name.removeprefix("GPTQ ")[0])
    return GPTQConfig(bits=bits, group_size=group_size(config), dataset=calibration, tokenizer=tokenizer)


def group_size(config: Any) -> int:
    """How many weights of a row share a scale in GPTQ: 128, or the largest power of 2 below that divides all rows."""
    return math.gcd(128, config.hidden_size, config.intermediate_size)


def in_transformers(folder: Path, work: Path, quantization_config: Any) -> Model:
    """The model of `folder`, computing in float32, and saved to `work`."""
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        quantization_config=quantization_config,
        trust_remote_code=True,
        device_map="cpu",
    )
    model.save_pretrained(work)  # before its first forward: bitsandbytes repacks 4-bit weights there

    @torch.no_grad()
    def logits(ids: list[int]) -> torch.Tensor:
        return model(torch.tensor([ids]), use_cache=False).logits[0].float()

    return Model(logits, saved_tensors(work))


def saved_tensors(folder: Path) -> Tensors:
    """The tensors of a folder's safetensors files."""
    tensors = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                tensors[name] = str(tensor.dtype).removeprefix("torch."), tensor.nbytes
    return tensors


def in_llama_cpp(folder: Path, file: Path, kind: str) -> Model:
    """The model of `folder` in llama.cpp, written to `file` in a type of `convert_checkpoint.py gguf`.

    Keys and values are in float32, as in the original.
    """
    import gguf
    from llama_cpp import GGML_TYPE_F32, Llama

    from tools.convert.gguf import GgufCopy, Vocabulary
    from tools.convert.llama import plan_llama

    copy = plan_llama(folder, tokenizer=False)
    count, window = copy.config["vocab_size"], copy.config["max_position_embeddings"]
    types = [gguf.TokenType.UNKNOWN] + [gguf.TokenType.NORMAL] * (count - 1)
    ids_only = Vocabulary([f"[{index}]" for index in range(count)], [0.0] * count, types, None, None, None)
    GgufCopy(file, kind, copy, ids_only, {}).write(progress=False)
    threads = torch.get_num_threads()
    options = {"n_threads": threads, "n_threads_batch": threads, "type_k": GGML_TYPE_F32, "type_v": GGML_TYPE_F32}
    llama = Llama(str(file), n_ctx=min(WINDOW, window), logits_all=True, verbose=False, **options)

    def logits(ids: list[int]) -> torch.Tensor:
        llama.reset()
        llama.eval(ids)
        return torch.from_numpy(llama.scores[: len(ids)])

    tensors = gguf.GGUFReader(file).tensors
    return Model(logits, {tensor.name: (tensor.tensor_type.name, int(tensor.n_bytes)) for tensor in tensors})


# Measures


def windows_of(ids: list[int], tokens: int, length: int) -> list[Window]:
    """The first `tokens` of a text in windows of `length`.

    Raises:
        SystemExit: The text is too short, or `tokens` is not a multiple of `length`.
    """
    if tokens < 1 or tokens % length:
        raise SystemExit(f"--tokens {tokens} must be a multiple of the model's window, here {length} tokens.")
    if len(ids) <= tokens:
        raise SystemExit(f"--tokens {tokens} must be less than the text's {len(ids)} tokens.")
    starts = range(0, tokens, length)
    return [Window(ids[start : start + length], ids[start + 1 : start + length + 1]) for start in starts]


def calibration_of(tokenizer: Any, length: int) -> list[str]:
    """CALIBRATION texts of about `length` tokens, from all over the standard library."""
    ids = tokenizer(library())["input_ids"]
    starts = [number * len(ids) // CALIBRATION for number in range(CALIBRATION)]
    return [tokenizer.decode(ids[start : start + length]) for start in starts]


def compare(logits: torch.Tensor, original: torch.Tensor, following: list[int]) -> torch.Tensor:
    """Sums over a window's positions: cosine similarity, same most likely token, loss in nats.

    Args:
        logits: (Q, V) in float32.
        original: The original model's, (Q, V).
        following: The next token of each position.

    Returns:
        (3,) in float64.
    """
    cosine = cosine_similarity(logits, original, dim=-1)
    same = logits.argmax(-1) == original.argmax(-1)
    loss = cross_entropy(logits, torch.tensor(following), reduction="none")
    return torch.stack([each.double().sum() for each in (cosine, same, loss)])


def measures(logits: Iterable[torch.Tensor], originals: list[torch.Tensor], windows: list[Window]) -> dict[str, float]:
    """Means over all positions of all windows; perplexity is exp of the mean loss."""
    sums = sum(
        compare(found, original, window.following)
        for found, original, window in zip(logits, originals, windows, strict=True)
    )
    cosine, same, loss = (sums / sum(len(window.ids) for window in windows)).tolist()
    return {"cosine": cosine, "same_token": same, "perplexity": math.exp(loss)}


def sizes(tensors: Tensors) -> dict[str, Any]:
    """Bytes of all tensors, of those of the decoder layers, and of the latter by type."""
    types: Counter[str] = Counter()
    for name, (kind, size) in tensors.items():
        if ".layers." in name or name.startswith("blk."):  # transformers' and llama.cpp's names
            types[kind] += size
    return {"bytes": sum(size for _, size in tensors.values()), "layer_bytes": types.total(), "layer_types": types}


# Results


class Results:
    """The result file: rows by method, all of the same model, text and windows.

    Raises:
        SystemExit: The file has results of another setting.
    """

    def __init__(self, path: Path, setting: dict[str, Any]) -> None:
        self.path, self.setting, self.rows = path, setting, {}
        if path.exists():
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["setting"] != setting:
                raise SystemExit(
                    f"{path} has results of {content['setting']}, and these would be of {setting}: give another file "
                    "with --out, or remove it to measure everything again."
                )
            self.rows = {row["case"]: row for row in content["rows"]}

    def add(self, name: str, numbers: dict[str, Any]) -> None:
        """Add a method's row, with the versions it was measured with, and write the file."""
        versions = {package: version(package) for package in METHODS[name]}
        self.rows[name] = {"case": name, **numbers, "versions": versions, "environment": environment()}
        rows = [self.rows[each] for each in METHODS if each in self.rows]
        content = {"benchmark": "quantising", "setting": self.setting, "rows": rows}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(self.path) as file:  # a run that is killed loses no row
            file.write((json.dumps(content, indent=1) + "\n").encode())


def table(rows: list[dict[str, Any]]) -> str:
    """The Markdown table of docs/compatibility.md, whose first row is the original's; "–" is not measured."""
    lines = [["", "version", "cosine", "same token", "perplexity", "all weights", "decoder layers"]]
    found = {row["case"]: row for row in rows}
    for name in METHODS:
        if name not in found:
            lines.append([name, *"––––––"])
            continue
        row = found[name]
        versions = ", ".join(f"{package} {number}" for package, number in row["versions"].items())
        numbers = [f"{row['cosine']:.4f}", f"{row['same_token']:.1%}", f"{row['perplexity']:.2f}"]
        smaller = [f"{row[part] / 1e6:,.0f} MB, {rows[0][part] / row[part]:.1f}x" for part in ("bytes", "layer_bytes")]
        lines.append([name, versions, *numbers, *smaller])
    return markdown(lines, 2)


def installed(name: str) -> bool:
    """Whether a method's packages are there."""
    try:
        return all(version(package) for package in METHODS[name])
    except PackageNotFoundError:
        return False


def measure(names: list[str], folder: Path, length: int, results: Results) -> None:
    """Measure methods on the model of `folder`, and add their rows."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    windows = windows_of(tokenizer(documentation())["input_ids"], results.setting["tokens"], length)
    calibration = calibration_of(tokenizer, length)
    originals: list[torch.Tensor] = []
    for name in dict.fromkeys((ORIGINAL, *names)):
        with tempfile.TemporaryDirectory(prefix="quantising-") as work:
            model = load(name, folder, Path(work), calibration)
            logits = (model.logits(window.ids) for window in tqdm(windows, desc=name, unit="window"))
            if name == ORIGINAL:
                originals = logits = list(logits)
            if name in names:
                results.add(name, measures(logits, originals, windows) | sizes(model.tensors))


def main() -> None:
    description, _, epilog = (__doc__ or "").partition("\n")
    made = argparse.ArgumentParser(
        description=description, epilog=epilog.strip("\n"), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--model", help="a model's folder or repository (default: build/smollm2, made if missing)")
    made.add_argument("--only", nargs="+", choices=METHODS, default=METHODS, help="methods (default: all)")
    made.add_argument("--tokens", type=int, default=TOKENS, help=f"length of the text (default: {TOKENS})")
    made.add_argument(
        "--out", type=Path, help=f"result file (default: benchmarks/results/{NAME}, or build/ with --model)"
    )
    arguments = made.parse_args()
    transformers.logging.disable_progress_bar()
    logging.disable(logging.WARNING)  # the libraries' lines for every layer would hide the progress

    folder = Path(complete_model(arguments.model)) if arguments.model else real_model()
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    length = min(WINDOW, config.max_position_embeddings)
    python = f"of Python {platform.python_version()}"
    setting = {"model": folder.name, "text": f"documentation {python}", "tokens": arguments.tokens, "window": length}
    setting["calibration"] = f"{CALIBRATION} windows of the standard library {python}"
    path = arguments.out or (QUICK_RESULTS if arguments.model else RESULTS) / NAME
    results = Results(path, setting)
    missing = [name for name in METHODS if name in (ORIGINAL, *arguments.only) and name not in results.rows]
    if todo := [name for name in missing if installed(name)]:
        measure(todo, folder, length, results)
    text = table([results.rows[name] for name in METHODS if name in results.rows])
    print(text)
    for name in missing:
        if name not in results.rows:
            print(f"{name} is missing: this environment lacks {' or '.join(METHODS[name])}")
    if path == RESULTS / NAME:
        write(PAGE, MARK, text)


if __name__ == "__main__":
    main()
