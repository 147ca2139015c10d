"""Loading: peak memory relative to the checkpoint's size, and the time from starting Python to the first token.

* A synthetic safetensors checkpoint of about 1 GB (in a temporary folder) is loaded in a fresh process. The increase
  of the peak resident memory is compared with the size of the checkpoint.
* Import, load and first token of checkpoints/tiny in fresh processes, alternating with Llama on the same weights.

    python benchmarks/loading.py                   # about 2 minutes
    python benchmarks/loading.py --quick
"""

import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.models import InternLMConfig, Shape, llama_config, our_model
from benchmarks.report import Report, parser, row_of, start, wanted
from benchmarks.timing import alternate, seconds
from tools.package import ROOT, add_modules
from upload_to_hub import assemble


LARGE = Shape(hidden=2048, layers=8, heads=16, intermediate=5504, vocab=32768)
QUICK = LARGE._replace(layers=2, vocab=4096)
PEAK_TARGET = 1.1  # maximum of peak memory over checkpoint size
TINY = ROOT / "checkpoints" / "tiny"

# Runs in a separate process. argv: folder; prints {"before", "peak"} in bytes.
PEAK_OF_LOADING = """
import json, sys
import torch
from transformers import AutoConfig, AutoModelForCausalLM

def status(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))

config = AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)
small = AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True, num_hidden_layers=1, vocab_size=8)
AutoModelForCausalLM.from_config(small, trust_remote_code=True)  # modules imported by a first load do not count
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # resets the peak
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, dtype="auto")
total = sum(parameter.sum() for parameter in model.parameters())  # forces all pages to be read
print(json.dumps({"before": before, "peak": status("VmHWM")}))
"""

# argv: folder. Everything that a user waits for until the first token.
FIRST_TOKEN = """
import sys
import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, dtype="auto")
model.generate(torch.tensor([[1, 300, 400, 500]]), max_new_tokens=1, do_sample=False)
"""

# The same with text as input and output.
FIRST_WORD = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, dtype="auto")
output = model.generate(**tokenizer("A beautiful flower", return_tensors="pt"), max_new_tokens=1, do_sample=False)
tokenizer.decode(output[0], skip_special_tokens=True)
"""


def run_python(code: str, folder: Path, modules: Path) -> str:
    """Standard output of `code` in a fresh process, with `modules` as the cache of remote code."""
    environment = {**os.environ, "HF_MODULES_CACHE": str(modules), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, str(folder)]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=modules)
    if ran.returncode:
        raise SystemExit(f"Loading {folder.name} failed:\n{ran.stderr}")
    return ran.stdout


def write_ours(shape: Shape, folder: Path) -> None:
    """Write a checkpoint with random weights and this package's modules."""
    our_model(shape, torch.bfloat16).save_pretrained(folder)
    add_modules(folder)


def write_llama(ours: Path, folder: Path, shape: Shape) -> None:
    """Write Llama's config and hard links to our weights."""
    folder.mkdir()
    config = llama_config(shape)
    config.architectures, config.dtype = ["LlamaForCausalLM"], "bfloat16"
    config.save_pretrained(folder)
    for weights in ours.glob("*.safetensors*"):
        os.link(weights, folder / weights.name)


def shape_of(folder: Path) -> Shape:
    config = InternLMConfig.from_pretrained(folder)
    return Shape(
        hidden=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        intermediate=config.intermediate_size,
        vocab=config.vocab_size,
        window=config.max_position_embeddings,
        bias=config.bias,
        base=config.rotary["base"],
        eps=config.rms_norm_eps,
    )


def peak_memory(report: Report, work: Path, shape: Shape) -> None:
    """Increase of the peak resident memory while loading, relative to the checkpoint's size."""
    folders = {"ours": work / "ours", "llama": work / "llama"}
    write_ours(shape, folders["ours"])
    write_llama(folders["ours"], folders["llama"], shape)
    size = sum(path.stat().st_size for path in folders["ours"].glob("*.safetensors"))
    peaks = {}
    for name, folder in folders.items():
        run_python("import transformers", folder, work)  # so that the library is in the page cache
        found = json.loads(run_python(PEAK_OF_LOADING, folder, work).splitlines()[-1])
        peaks[name] = (found["peak"] - found["before"]) / size
    verdict = "ok" if peaks["ours"] <= PEAK_TARGET else "MISSED"
    row = {"case": "peak_memory", "checkpoint_bytes": size, "peak_over_checkpoint": peaks}
    row |= {"target": f"<= {PEAK_TARGET:.2f}", "verdict": verdict}
    text = f"{'peak_memory':40s} checkpoint {size / 1e9:.2f} GB  peak / checkpoint: ours {peaks['ours']:.3f}"
    report.add(row, f"{text} <= {PEAK_TARGET:.2f} {verdict}  llama {peaks['llama']:.3f}")


def first_token(report: Report, work: Path, budget: float) -> None:
    """Alternating fresh processes: ours and Llama from ids, and ours from text."""
    ours, llama = work / "tiny-ours", work / "tiny-llama"
    assemble(weights=TINY, out=ours, progress=False)
    write_llama(ours, llama, shape_of(ours))
    sides = {
        "ours": partial(run_python, FIRST_TOKEN, ours, work),
        "llama": partial(run_python, FIRST_TOKEN, llama, work),
        "ours_text": partial(run_python, FIRST_WORD, ours, work),
    }
    timing = alternate({name: partial(seconds, side) for name, side in sides.items()}, budget, max_rounds=9)
    report.add(*row_of("first_token", timing, "llama", at_least=1.0, model="checkpoints/tiny"))
    report.add(*row_of("first_token_with_tokenizer", timing, "ours_text", model="checkpoints/tiny"))


def main() -> None:
    arguments = parser(__doc__).parse_args()
    start(arguments)
    report = Report("loading", arguments)
    with tempfile.TemporaryDirectory(prefix="loading-") as work:
        if wanted("peak_memory", arguments):
            peak_memory(report, Path(work), QUICK if arguments.quick else LARGE)
        if wanted("first_token", arguments):
            first_token(report, Path(work), budget=20 if arguments.quick else 60)
    report.finish()


if __name__ == "__main__":
    main()
