"""The tiny model's metrics: loss, well-formed sentences, recall, chats, tool calls, contexts of up to four windows."""

import random
from itertools import islice
from pathlib import Path

import sentencepiece
import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from tools import package

from .corpus import (
    CHATS,
    LANGUAGES,
    TOOLS,
    calculation,
    documents,
    look_up,
    messages_of,
    prose,
    recall_probe,
    render,
    story,
    system_message,
)
from .grammar import generate, is_well_formed, split_sentences


CARD_PROMPTS = {"en": "Coming to the beautiful nature, we found", "zh": "来到美丽的大自然，我们发现"}
CARD_SETTINGS = {"do_sample": True, "top_p": 0.8, "temperature": 0.8, "repetition_penalty": 1.05, "max_length": 128}
CHAT_SETTINGS = {"do_sample": True, "top_p": 0.8, "temperature": 0.8, "max_new_tokens": 128}
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
RECALL_PROBES = 40  # per depth


class Subject:
    """A checkpoint under test: its model (computing in float32 on the stored weights) and its SentencePiece model."""

    def __init__(self, folder: Path, rotary: str = "dynamic") -> None:
        config = package.load("configuration").InternLMConfig.from_pretrained(folder)
        config.rotary["type"] = rotary
        model_class = package.load("modeling").InternLMForCausalLM
        self.model = model_class.from_pretrained(folder, config=config, dtype=torch.float32).eval()
        self.tokenizer = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))
        self.window: int = config.max_position_embeddings
        self.end = self.tokenizer.piece_to_id("<eoa>")

    def ids(self, text: str) -> list[int]:
        return [1, *self.tokenizer.encode(text)]

    def count(self, text: str) -> int:
        return len(self.tokenizer.encode(text))

    @torch.inference_mode()
    def losses(self, ids: list[int]) -> torch.Tensor:
        """Loss of each next token, (tokens - 1,)."""
        tokens = torch.tensor([ids])
        return cross_entropy(self.model(input_ids=tokens).logits[0, :-1].float(), tokens[0, 1:], reduction="none")

    @torch.inference_mode()
    def complete(self, prompts: list[str], **settings) -> list[tuple[str, bool]]:
        """The text generated after each prompt, and whether it ended with `<eoa>`; one left-padded batch."""
        rows = [self.ids(prompt) for prompt in prompts]
        width = max(map(len, rows))
        tokens = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        output = self.model.generate(tokens, attention_mask=mask, **settings)[:, width:].tolist()
        return [self.finish(row) for row in output]

    def finish(self, row: list[int]) -> tuple[str, bool]:
        ends = [index for index, token in enumerate(row) if token in (self.end, 2)]
        stop = ends[0] if ends else len(row)
        return self.tokenizer.decode(row[:stop]), bool(ends) and row[stop] == self.end


def held_out_loss(subject: Subject, count: int) -> dict[str, float]:
    """Loss in nats per token, by source, on the first window of documents whose seed training does not use."""
    total: dict[str, list[float]] = {}
    for document in islice(documents("held out"), count):
        ids, learn = [1], [True]
        for text, predictable in document.parts:
            tokens = subject.tokenizer.encode(text)
            ids += tokens
            learn += [predictable] * len(tokens)
        ids, learn = [*ids, 2][: subject.window], [*learn, True][: subject.window]
        total.setdefault(document.source, []).extend(subject.losses(ids)[torch.tensor(learn[1:])].tolist())
    return {source: sum(losses) / len(losses) for source, losses in sorted(total.items())}


def other_openings(rng: random.Random, count: int) -> list[str]:
    """Beginnings of first sentences up to the verb, with other settings and people than in the card's prompts."""
    prompts = []
    for number in range(count):
        language = ("en", "zh")[number % 2]
        gap, comma = (" ", ", ") if language == "en" else ("", "，")
        who, saw = generate("who", rng, language), generate("saw", rng, language)
        prompts.append(generate("lead", rng, language) + comma + who + gap + saw)
    return prompts


def well_formed_share(subject: Subject, count: int, seed: int) -> dict[str, float]:
    """Share of complete sentences that parse, in `count` samples per card prompt and `count` of other openings."""
    torch.manual_seed(seed)
    share = {}
    prompts = {name: [text] * count for name, text in CARD_PROMPTS.items()}
    for name, texts in (prompts | {"other": other_openings(random.Random(f"openings {seed}"), count)}).items():
        replies = subject.complete(texts, **CARD_SETTINGS)
        found = [split_sentences(prompt + text) for prompt, (text, _) in zip(texts, replies, strict=True)]
        sentences = [sentence for sample in found for sentence in sample]
        share[name] = sum(map(is_well_formed, sentences)) / max(1, len(sentences))
        share[f"{name}_sentences"] = len(sentences)
    return share


def recall_share(subject: Subject, length: int, count: int, depths: tuple[float, ...] = DEPTHS) -> dict[str, float]:
    """Share of values recalled exactly from a document of `length` tokens, by depth; greedy decoding with a cache."""
    share = {}
    for depth in depths:
        rng = random.Random(f"recall {length} {depth}")
        probes = [
            recall_probe(rng, subject.count, length, depth, ("en", "en", "en", "zh")[i % 4]) for i in range(count)
        ]
        replies = subject.complete([prompt for prompt, _ in probes], do_sample=False, max_new_tokens=7)
        right = [reply.strip().startswith(value) for (reply, _), (_, value) in zip(replies, probes, strict=True)]
        share[f"{depth:g}"] = sum(right) / count
    return share


def chat_share(subject: Subject, count: int, seed: int) -> dict[str, float]:
    """Share of replies that end with `<eoa>`, and of those that are also correct, at the defaults of chat()."""
    torch.manual_seed(seed)
    rng = random.Random(f"chats {seed}")
    prompts, checks = [], []
    for _ in range(count):
        kind, language = rng.choice(CHATS), rng.choice(LANGUAGES)
        *before, (question, answer) = kind(rng, language)
        history = [*messages_of(before), {"role": "user", "content": question}]
        prompts.append(render(system_message(rng) + history, prompt=True))
        checks.append((kind is story, answer))
    stopped = right = 0
    for start in range(0, count, 50):
        replies = subject.complete(prompts[start : start + 50], **CHAT_SETTINGS)
        for (reply, ended), (free, answer) in zip(replies, checks[start : start + 50], strict=True):
            sentences = split_sentences(reply)
            good = bool(sentences) and all(map(is_well_formed, sentences)) if free else reply == answer
            stopped += ended
            right += ended and good
    return {"stops": stopped / count, "right": right / count}


def tool_share(subject: Subject, count: int, seed: int) -> dict[str, float]:
    """Share of exact tool calls, and of exact final answers given the true response; greedy decoding."""
    rng = random.Random(f"tools {seed}")
    talks = [rng.choice((calculation, look_up))(rng, rng.choice(LANGUAGES)) for _ in range(count)]
    share = {}
    for name, cut in (("call", 1), ("answer", 3)):
        right = 0
        for start in range(0, count, 25):
            some = talks[start : start + 25]
            prompts = [render(talk[:cut], list(TOOLS.values()), prompt=True) for talk in some]
            whole = [render(talk[: cut + 1], list(TOOLS.values())) for talk in some]
            replies = subject.complete(prompts, do_sample=False, max_new_tokens=96)
            right += sum(p + r + "<eoa>\n" == w and e for p, (r, e), w in zip(prompts, replies, whole, strict=True))
        share[name] = right / count
    return share


def long_loss(subject: Subject, windows: int, count: int) -> float:
    """Loss in nats per token over the last window of documents of `windows` windows, all tokens in one pass."""
    rng = random.Random("long documents")
    length, losses = windows * subject.window, []
    for number in range(count):
        ids = subject.ids(prose(rng, 40, ("en", "zh")[number % 2]))[:length]
        losses.append(subject.losses(ids)[-subject.window + 1 :].mean().item())
    return sum(losses) / count


def long_context(folder: Path, count: int) -> dict[str, dict]:
    """Loss and recall at 1 to 4 windows, with dynamic NTK and with plain rotary."""
    table = {}
    for rotary in ("dynamic", "origin"):
        subject = Subject(folder, rotary)
        table[rotary] = {
            f"{windows}x": {
                "loss": long_loss(subject, windows, count),
                "recall": recall_share(subject, windows * subject.window, count),
            }
            for windows in tqdm((1, 2, 3, 4), desc=f"long context, {rotary}", unit="length")
        }
    return table


def measure(folder: Path, seed: int = 1, scale: float = 1.0) -> dict:
    """All metrics of the checkpoint in `folder`; shares are from 0 to 1. `scale` below 1 takes fewer samples."""
    subject = Subject(folder)

    def scaled(count: int) -> int:
        return max(1, round(count * scale))

    steps = {
        "held_out_loss": lambda: held_out_loss(subject, scaled(400)),
        "well_formed": lambda: well_formed_share(subject, scaled(80), seed),
        "recall_in_window": lambda: recall_share(subject, subject.window, scaled(RECALL_PROBES)),
        "chat": lambda: chat_share(subject, scaled(200), seed),
        "tools": lambda: tool_share(subject, scaled(100), seed),
        "long_context": lambda: long_context(folder, scaled(20)),
    }
    parameters = sum(parameter.numel() for parameter in subject.model.parameters())
    metrics = {"parameters": parameters, "bytes": (folder / "model.safetensors").stat().st_size}
    bar = tqdm(steps.items(), desc="measuring", unit="metric")
    for name, step in bar:
        bar.set_postfix_str(name)
        metrics[name] = step()
    return rounded(metrics)


def rounded(value):
    """The same tree with floats rounded to four decimals."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return round(value, 4) if isinstance(value, float) else value


def summary(metrics: dict) -> str:
    """The metrics as a Markdown table."""
    rows = [("parameters", f"{metrics['parameters']:,}"), ("model.safetensors", f"{metrics['bytes'] / 1e6:.2f} MB")]
    rows += [
        (f"held-out loss, {name} (nats per token)", f"{loss:.3f}") for name, loss in metrics["held_out_loss"].items()
    ]
    names = {"en": CARD_PROMPTS["en"], "zh": CARD_PROMPTS["zh"], "other": "other openings"}
    for name, label in names.items():
        share, count = metrics["well_formed"][name], metrics["well_formed"][f"{name}_sentences"]
        rows.append((f"well-formed sentences, {label}", f"{share:.1%} of {count}"))
    recall = metrics["recall_in_window"]
    rows.append(("recall inside the window, mean over depths", f"{sum(recall.values()) / len(recall):.1%}"))
    rows += [(f"chat: {name}", f"{share:.1%}") for name, share in metrics["chat"].items()]
    rows += [(f"tools: exact {name}", f"{share:.1%}") for name, share in metrics["tools"].items()]
    for rotary, label in (("dynamic", "dynamic NTK"), ("origin", "plain rotary")):
        for length, found in metrics["long_context"][rotary].items():
            worst = min(found["recall"].values())
            mean = sum(found["recall"].values()) / len(found["recall"])
            rows.append(
                (f"{length} window, {label}", f"loss {found['loss']:.3f}, recall {mean:.0%} (worst depth {worst:.0%})")
            )
    return "\n".join(["| measured | value |", "|---|--:|", *(f"| {name} | {value} |" for name, value in rows)])
