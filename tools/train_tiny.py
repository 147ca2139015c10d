"""Train checkpoints/tiny from a seed: corpus, SentencePiece model, weights, and the measurements beside them.

    python tools/train_tiny.py                 # about an hour on one core; stop it and run it again: it goes on
    python tools/train_tiny.py --measure       # measure the checkpoint that is there

The state of an unfinished run lies in build/tiny and is saved every two minutes.
"""

import argparse
import json
import math
import random
import shutil
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import sentencepiece
import torch
from safetensors.torch import save_file
from tiny_corpus import MIX, RECALL_FIRST, documents, prose_document
from tiny_measure import load_package, measure, summary
from torch.nn.functional import cross_entropy
from tqdm import tqdm


ROOT = Path(__file__).resolve().parents[1]
WINDOW = 256
BASE = 10000
IGNORED = -100
SAVE_EVERY = 120  # seconds

MODEL = {
    "vocab_size": 2048,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": WINDOW,
    "rms_norm_eps": 1e-6,
    "bias": False,
    "rotary": {"base": BASE, "type": "dynamic"},
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}


def train_tokenizer(path: Path, seed: int, vocab_size: int = MODEL["vocab_size"], count: int = 6000) -> None:
    """Train the SentencePiece model on `count` documents, with the official settings, and write it to `path`.

    The same seed gives the same bytes.
    """
    lines = (line for document in islice(documents(f"tokenizer {seed}"), count) for line in document.text.split("\n"))
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line.replace("<eoa>", "") for line in lines if line),
            model_writer=file,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=1.0,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            user_defined_symbols=["<eoh>", "<eoa>"],
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=1,  # more threads may order equal scores differently
            minloglevel=2,
        )


def encode(tokenizer: sentencepiece.SentencePieceProcessor, parts: list[tuple[str, bool]]) -> list[tuple[int, int]]:
    """A document as (token, label) pairs between `<s>` and `</s>`; the label of what cannot be known is IGNORED."""
    pairs = [(1, IGNORED)]
    for text, learn in parts:
        pairs += [(token, token if learn else IGNORED) for token in tokenizer.encode(text)]
    return [*pairs, (2, 2)]


class Phase(NamedTuple):
    """A part of the training: up to which share of the steps, windows of how many tokens, which documents.

    `stretches` are taken in turns, a step each: so many windows long is the text that a window of the step stands for,
    with gaps in its positions and the base that dynamic NTK has for that length.
    """

    until: float
    width: int
    mix: dict
    stretches: tuple[int, ...] = (1,)


PHASES = (
    Phase(0.10, WINDOW // 4, RECALL_FIRST),
    Phase(0.20, WINDOW // 2, RECALL_FIRST),
    Phase(0.60, WINDOW, MIX),
    Phase(1.00, WINDOW, MIX, stretches=(1, 2, 1, 3, 1, 4)),
)


def windows(
    tokenizer: sentencepiece.SentencePieceProcessor, seed: str, phase: Phase
) -> Iterator[list[tuple[int, int]]]:
    """An endless stream of windows of `phase.width` (token, label) pairs.

    Prose runs across the border of two windows, so that many windows begin in the middle of a text; any other document
    stays whole, and the room before it is filled up with prose.
    """
    rng = random.Random(f"{seed} fill")
    window: list[tuple[int, int]] = []
    for document in documents(seed, phase.mix, phase.width - 12):
        pairs = encode(tokenizer, document.parts)
        if document.source != "prose" and len(window) + len(pairs) > phase.width:
            while len(window) < phase.width:
                window += encode(tokenizer, prose_document(rng).parts)
            yield window[: phase.width]
            window = []
        window += pairs
        while len(window) >= phase.width:
            yield window[: phase.width]
            window = window[phase.width :]


def batch(tokenizer: sentencepiece.SentencePieceProcessor, seed: str, rows: int, phase: Phase) -> torch.Tensor:
    """Tokens and labels of rows * WINDOW tokens, (rows * WINDOW / width, width, 2)."""
    return torch.tensor(list(islice(windows(tokenizer, seed, phase), rows * WINDOW // phase.width)))


def stretched_positions(tokens: torch.Tensor, stretch: int, newline: int, seed: str) -> torch.Tensor:
    """Positions of (rows, width) tokens that end near stretch * width, with gaps after some lines: (rows, width)."""
    generator = random.Random(seed)
    rows, width = tokens.shape
    steps = torch.ones(rows, width, dtype=torch.long)
    for row in range(rows if stretch > 1 else 0):
        ends = [place for place in (tokens[row] == newline).nonzero()[:, 0].tolist() if place + 1 < width]
        places = generator.sample(ends, min(len(ends), generator.randint(1, 8)))
        cuts = sorted(generator.randint(0, (stretch - 1) * width) for _ in places)
        for place, low, high in zip(places, [0, *cuts], cuts, strict=False):
            steps[row, place + 1] += high - low
    return steps.cumsum(-1) - 1


def ntk_base(stretch: int) -> float:
    """The base of dynamic NTK for a text of `stretch` windows (docs/long-context.md)."""
    head_dim = MODEL["hidden_size"] // MODEL["num_attention_heads"]
    return BASE * stretch ** (head_dim / (head_dim - 2))


def learning_rate(step: int, steps: int) -> float:
    """Share of the peak rate: linear warm-up over 3 % of the steps, then half a cosine down to 1 %."""
    warm = max(1, round(0.03 * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def make_optimizers(model: torch.nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embedding, head and norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    adam = torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    muon = torch.optim.Muon(matrices, lr=rate, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    optimizers = [adam, muon]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = rate
    return optimizers


def train(model: torch.nn.Module, tokenizer: sentencepiece.SentencePieceProcessor, state_file: Path, options) -> None:
    """Train `model` in place, from the last saved state if there is one."""

    def loss_of(tokens: torch.Tensor, labels: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        everything = torch.ones_like(tokens)  # without a mask, a gap in the positions would begin another sequence
        logits = model(tokens, attention_mask=everything, position_ids=positions, use_cache=False).logits
        return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)

    compiled = torch.compile(loss_of, dynamic=False)  # one graph for each width and base
    newline = tokenizer.encode("\n")[-1]
    optimizers = make_optimizers(model, options.rate)
    start = 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        start = state["step"]
    saved_at, smooth = time.monotonic(), None
    bar = tqdm(range(start, options.steps), initial=start, total=options.steps, desc="training", unit="step")
    for step in bar:
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * learning_rate(step, options.steps)
        phase = next(phase for phase in PHASES if step < phase.until * options.steps)
        pairs = batch(tokenizer, f"train {options.seed} {step}", options.rows, phase)
        tokens, labels = pairs[..., 0].contiguous(), pairs[..., 1].contiguous()
        stretch = phase.stretches[step % len(phase.stretches)]
        model.config.rotary["base"] = ntk_base(stretch)
        loss = compiled(tokens, labels, stretched_positions(tokens, stretch, newline, f"{options.seed} {step}"))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        smooth = loss.item() if smooth is None else 0.95 * smooth + 0.05 * loss.item()
        bar.set_postfix(loss=f"{smooth:.3f}", refresh=False)
        if time.monotonic() - saved_at > SAVE_EVERY or step + 1 == options.steps:
            saved = [optimizer.state_dict() for optimizer in optimizers]
            torch.save({"step": step + 1, "model": model.state_dict(), "optimizers": saved}, state_file)
            saved_at = time.monotonic()


def write_checkpoint(model: torch.nn.Module, tokenizer_file: Path, out: Path) -> None:
    """Write what a folder of weights has: two JSON files, model.safetensors (bfloat16), tokenizer.model."""
    tokenizer = sentencepiece.SentencePieceProcessor(str(tokenizer_file))
    published = json.loads((ROOT / "config.json").read_text(encoding="utf-8"))
    generation = {"bos_token_id": 1, "eos_token_id": [2, tokenizer.piece_to_id("<eoa>")], "pad_token_id": 0}
    for name, content in (("config.json", published | MODEL), ("generation_config.json", generation)):
        (out / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    weights = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(tokenizer_file, out / "tokenizer.model")


README = """# A very small InternLM

{parameters:,} parameters, {layers} layers, a trained window of {window} tokens, {pieces} pieces: a real model of
the InternLM v1 architecture (dynamic NTK, no biases, untied head) that can be loaded, tested and talked to in seconds.
It learned only from text that this project makes from a seed, so it knows very little: scenes of nature in English
and Chinese, small talk, a few facts, sums up to 10 + 10, keys that it is told, calling a calculator or dictionary.

Training read {window} tokens at a time. In its last 40 %, half of these windows had gaps in their positions and the
base that dynamic NTK has for a text of 2 to 4 windows, so that distances of up to 4 windows occurred. Before, at 60 %,
the loss at 4 windows was 1.14 times that at one, and 47 % of the keys were recalled there (plain rotary: 1.58 times,
none). So the lines on 2 to 4 windows show that the code computes what the model learned; how well a model extrapolates
that was not trained so, they do not show.

`python tools/train_tiny.py` rebuilds it, and `python tools/train_tiny.py --measure` measures it. Weights are stored
in bfloat16; what follows was measured after that rounding, computing in float32.

{table}

Sentences are sampled at the model card's settings (top_p 0.8, temperature 0.8, repetition_penalty 1.05, max_length
128) and count as well-formed when they parse in the grammar of tools/tiny_grammar.py. Chats run at the defaults of
`chat()`; recall and tool calls are greedy and count when every character is right. Held-out documents come from
another seed of the same generator; small talk and facts are few, so their questions are also in the training text.
Beyond one window, the loss is of all tokens in one pass, and recall is prefill and cached decoding.
"""


def write_metrics(metrics: dict, out: Path) -> None:
    """Write metrics.json and the README.md that shows it."""
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    sizes = {"layers": MODEL["num_hidden_layers"], "window": WINDOW, "pieces": MODEL["vocab_size"]}
    readme = README.format(parameters=metrics["parameters"], table=summary(metrics), **sizes)
    (out / "README.md").write_text(readme, encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "checkpoints" / "tiny", help="where the checkpoint is written"
    )
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "tiny", help="where an unfinished run is kept")
    parser.add_argument("--seed", type=int, default=1, help="seed of corpus, weights and measurements (default: 1)")
    parser.add_argument("--steps", type=int, default=4600, help="training steps (default: 4600)")
    parser.add_argument("--rows", type=int, default=16, help=f"windows of {WINDOW} tokens in a step (default: 16)")
    parser.add_argument("--rate", type=float, default=4e-3, help="peak learning rate (default: 0.004)")
    parser.add_argument("--threads", type=int, default=2, help="processor threads (default: 2)")
    parser.add_argument("--measure", action="store_true", help="do not train: measure the checkpoint in --out")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if not options.measure:
        options.work.mkdir(parents=True, exist_ok=True)
        options.out.mkdir(parents=True, exist_ok=True)
        tokenizer_file = options.work / "tokenizer.model"
        if not tokenizer_file.exists():
            train_tokenizer(tokenizer_file, options.seed)
        torch.manual_seed(options.seed)
        package = load_package()
        model = package.InternLMForCausalLM(package.InternLMConfig(**MODEL)).train()
        tokenizer = sentencepiece.SentencePieceProcessor(str(tokenizer_file))
        state_file = options.work / f"seed{options.seed}-steps{options.steps}-rows{options.rows}-rate{options.rate}.pt"
        train(model, tokenizer, state_file, options)
        write_checkpoint(model, tokenizer_file, options.out)
        state_file.unlink()
    metrics = measure(options.out, options.seed)
    write_metrics(metrics, options.out)
    print(summary(metrics))


if __name__ == "__main__":
    sys.exit(main())
