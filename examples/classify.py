"""Train a sentence classification head on InternLM. python examples/classify.py ["a sentence" ...]"""

import argparse

import torch
from demo import complete_model
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer, logging


EXAMPLES = {
    "food": [
        "We ate bread and cheese.",
        "She cut the apples for a cake.",
        "我们吃了面包和奶酪。",
        "他喝了一碗热汤。",
        "我吃了苹果。",
    ],
    "sky": [
        "The sky is blue.",
        "White clouds drifted over us.",
        "天空像大海一样蓝。",
        "星星在夜里闪着光。",
        "太阳慢慢升起。",
    ],
}
SENTENCES = ["They shared a cake and some apples.", "The sun rose above the clouds.", "我喝了汤，吃了面包。"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sentences", nargs="*", default=SENTENCES)
    parser.add_argument("--model", help="a model folder or Hub repository id (default: the tiny model)")
    parser.add_argument("--steps", type=int, default=20, help="training steps (default: %(default)s)")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    torch.manual_seed(0)
    name, labels = complete_model(arguments.model), list(EXAMPLES)
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)
    model = AutoModelForSequenceClassification.from_pretrained(
        name,
        trust_remote_code=True,
        dtype=torch.float32,
        id2label=dict(enumerate(labels)),
        label2id={label: number for number, label in enumerate(labels)},
    )

    # The head uses the last non-padding token of each row, with left or right padding.
    texts = [text for label in labels for text in EXAMPLES[label]]
    batch = tokenizer(texts, padding=True, return_tensors="pt").to(model.device)
    batch["labels"] = torch.tensor([i for i, label in enumerate(labels) for _ in EXAMPLES[label]]).to(model.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in (bar := tqdm(range(arguments.steps), unit="step")):
        loss = model.train()(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")

    with torch.no_grad():
        scores = model.eval()(**tokenizer(arguments.sentences, padding=True, return_tensors="pt").to(model.device))
    for sentence, row in zip(arguments.sentences, scores.logits.softmax(-1), strict=True):
        print(f"{model.config.id2label[row.argmax().item()]:5} {row.max().item():4.0%}  {sentence}")


if __name__ == "__main__":
    main()
