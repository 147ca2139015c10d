"""Training of the tiny model: tokenizer, model, schedule, and the files of the checkpoint."""

import json
import math
import random
import shutil
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import sentencepiece
import torch
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from tools import package

from .corpus import MIX, RECALL_FIRST, documents, prose_document
from .measure import summary


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
    """Train the SentencePiece model on `count` documents with the official settings and write it to `path`.

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
            num_threads=1,  # with more threads, the order of equal scores may vary
            minloglevel=2,
        )


def encode(tokenizer: sentencepiece.SentencePieceProcessor, parts: list[tuple[str, bool]]) -> list[tuple[int, int]]:
    """A document as (token, label) pairs between `<s>` and `</s>`; unpredictable tokens have the label IGNORED."""
    pairs = [(1, IGNORED)]
    for text, learn in parts:
        pairs += [(token, token if learn else IGNORED) for token in tokenizer.encode(text)]
    return [*pairs, (2, 2)]


class Phase(NamedTuple):
    """A phase of the training.

    `stretches` are used in turn, one per step. With stretch n, a window stands for a text of n windows: its positions
    have gaps, and the base is the one that dynamic NTK uses for that length.
    """

    until: float  # the phase ends at this share of the steps
    width: int  # tokens per window
    mix: dict  # probability of each kind of document
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

    Prose may continue in the next window, so that many windows begin in the middle of a text. Any other document is
    kept whole: if it does not fit, the window is filled up with prose and the document starts the next one.
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
    """Positions (rows, width) of tokens, ending near stretch * width, with gaps after some newlines."""
    generator = random.Random(seed)
    rows, width = tokens.shape
    steps = torch.ones(rows, width, dtype=torch.long)
    for row in range(rows if stretch > 1 else 0):
        ends = [index for index in (tokens[row] == newline).nonzero()[:, 0].tolist() if index + 1 < width]
        chosen = generator.sample(ends, min(len(ends), generator.randint(1, 8)))
        cuts = sorted(generator.randint(0, (stretch - 1) * width) for _ in chosen)
        for index, low, high in zip(chosen, [0, *cuts], cuts, strict=False):
            steps[row, index + 1] += high - low
    return steps.cumsum(-1) - 1


def ntk_base(stretch: int) -> float:
    """Dynamic NTK's base for a text of `stretch` windows (docs/long-context.md)."""
    head_dim = MODEL["hidden_size"] // MODEL["num_attention_heads"]
    return BASE * stretch ** (head_dim / (head_dim - 2))


def learning_rate(step: int, steps: int) -> float:
    """Fraction of the peak learning rate: linear warmup over 3 % of the steps, then cosine decay to 1 %."""
    warmup = max(1, round(0.03 * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def new_model(**changes: Any) -> torch.nn.Module:
    """A model with the sizes of MODEL, or with some of them changed, in training mode."""
    config = package.load("configuration").InternLMConfig(**MODEL | changes)
    return package.load("modeling").InternLMForCausalLM(config).train()


def make_optimizers(model: torch.nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for embedding, head and norms."""
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


def train(
    model: torch.nn.Module,
    tokenizer: sentencepiece.SentencePieceProcessor,
    state_file: Path,
    *,
    seed: int,
    steps: int,
    rows: int,
    rate: float,
) -> None:
    """Train `model` in place; resumes from `state_file` if it exists.

    Args:
        state_file: Where the state of the run is saved, every SAVE_EVERY seconds and at the end.
        seed: Seed of the batches and of the gaps in their positions.
        steps: Training steps in total.
        rows: Windows of WINDOW tokens per step.
        rate: Peak learning rate.
    """

    def loss_of(tokens: torch.Tensor, labels: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        mask = torch.ones_like(tokens)  # without a mask, a gap in the positions would start another packed sequence
        logits = model(tokens, attention_mask=mask, position_ids=positions, use_cache=False).logits
        return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)

    compiled = torch.compile(loss_of, dynamic=False)  # one graph per width and base
    newline = tokenizer.encode("\n")[-1]
    optimizers = make_optimizers(model, rate)
    start = 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        start = state["step"]
    saved_at, smooth = time.monotonic(), None
    bar = tqdm(range(start, steps), initial=start, total=steps, desc="training", unit="step")
    for step in bar:
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * learning_rate(step, steps)
        phase = next(phase for phase in PHASES if step < phase.until * steps)
        pairs = batch(tokenizer, f"train {seed} {step}", rows, phase)
        tokens, labels = pairs[..., 0].contiguous(), pairs[..., 1].contiguous()
        stretch = phase.stretches[step % len(phase.stretches)]
        model.config.rotary["base"] = ntk_base(stretch)
        loss = compiled(tokens, labels, stretched_positions(tokens, stretch, newline, f"{seed} {step}"))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        smooth = loss.item() if smooth is None else 0.95 * smooth + 0.05 * loss.item()
        bar.set_postfix(loss=f"{smooth:.3f}", refresh=False)
        if time.monotonic() - saved_at > SAVE_EVERY or step + 1 == steps:
            saved = [optimizer.state_dict() for optimizer in optimizers]
            torch.save({"step": step + 1, "model": model.state_dict(), "optimizers": saved}, state_file)
            saved_at = time.monotonic()


def write_checkpoint(model: torch.nn.Module, tokenizer_file: Path, out: Path) -> None:
    """Write the files of a folder of weights: two JSON files, model.safetensors (bfloat16) and tokenizer.model."""
    tokenizer = sentencepiece.SentencePieceProcessor(str(tokenizer_file))
    published = json.loads((package.ROOT / "config.json").read_text(encoding="utf-8"))
    generation = {"bos_token_id": 1, "eos_token_id": [2, tokenizer.piece_to_id("<eoa>")], "pad_token_id": 0}
    for name, content in (("config.json", published | MODEL), ("generation_config.json", generation)):
        (out / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    weights = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(tokenizer_file, out / "tokenizer.model")


def train_checkpoint(out: Path, work: Path, *, seed: int, steps: int, rows: int, rate: float) -> None:
    """Train tokenizer and model and write the checkpoint to `out`; an interrupted run resumes from `work`."""
    work.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer_file = work / "tokenizer.model"
    if not tokenizer_file.exists():
        train_tokenizer(tokenizer_file, seed)
    torch.manual_seed(seed)
    model = new_model()
    tokenizer = sentencepiece.SentencePieceProcessor(str(tokenizer_file))
    state_file = work / f"seed{seed}-steps{steps}-rows{rows}-rate{rate}.pt"
    train(model, tokenizer, state_file, seed=seed, steps=steps, rows=rows, rate=rate)
    write_checkpoint(model, tokenizer_file, out)
    state_file.unlink()


README = """# A very small InternLM

{parameters:,} parameters, {layers} layers, a trained window of {window} tokens, a vocabulary of {vocabulary}: a real
model of the InternLM v1 architecture (dynamic NTK, no biases, untied head) that loads, chats and runs in tests within
seconds. It was trained only on text that this project generates from a seed, so it knows very little: nature scenes in
English and Chinese, small talk, a few facts, sums up to 10 + 10, recalling keys from its context, and calling a
calculator or a dictionary.

Training used windows of up to {window} tokens. In the last 40 % of the steps, half of the windows had gaps in their
positions and the base that dynamic NTK uses for a text of 2 to 4 windows, so that distances of up to 4 windows
occurred. Before that, after 60 % of the steps, the loss at 4 windows was 1.14 times the loss at one, and 47 % of the
keys were recalled (plain rotary: 1.58 times, none). The rows for 2 to 4 windows therefore show that the code computes
what the model learned, not how well a model without such training extrapolates.

`python tools/train_tiny.py` trains it again, `python tools/train_tiny.py --measure` repeats the measurements. Weights
are stored in bfloat16; the metrics are measured on these weights, computing in float32.

{table}

Sentences are sampled with the model card's settings (top_p 0.8, temperature 0.8, repetition_penalty 1.05, max_length
128) and count as well-formed if they parse in the grammar of tools/tiny/grammar.py. Chats use the defaults of
`chat()`; recall and tool calls are decoded greedily and count only if every character is correct. Held-out documents
come from another seed of the same generator; small talk and facts are few, so their questions also occur in the
training text. Beyond one window, the loss covers all tokens in one pass, and recall uses prefill and cached decoding.
"""


def write_metrics(metrics: dict, out: Path) -> None:
    """Write metrics.json and the README.md that presents it."""
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    sizes = {"layers": MODEL["num_hidden_layers"], "window": WINDOW, "vocabulary": MODEL["vocab_size"]}
    readme = README.format(parameters=metrics["parameters"], table=summary(metrics), **sizes)
    (out / "README.md").write_text(readme, encoding="utf-8")
