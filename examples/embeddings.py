"""Sentence embeddings from InternLM's hidden states: python examples/embeddings.py ["one sentence" "another" ...]"""

import argparse

import torch
from demo import complete_model
from transformers import AutoModel, AutoTokenizer, logging


SENTENCES = ["The sky is blue.", "The sky was as blue as the sea.", "天空很蓝。", "We ate bread and cheese."]


@torch.no_grad()
def embed(model, tokenizer, sentences: list[str]) -> torch.Tensor:
    """Unit vectors (sentences, hidden size): the mean of each sentence's last hidden states, without padding."""
    batch = tokenizer(sentences, padding=True, return_tensors="pt").to(model.device)
    states = model(**batch, use_cache=False).last_hidden_state.float()
    mask = batch["attention_mask"][..., None]
    return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sentences", nargs="*", default=SENTENCES)
    parser.add_argument("--model", help="a model folder or Hub repository id (default: the tiny model)")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    name = complete_model(arguments.model)
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)
    # AutoModel loads the decoder without the language modeling head, which embeddings do not need.
    model = AutoModel.from_pretrained(name, trust_remote_code=True, dtype="auto", device_map="auto").eval()
    vectors = embed(model, tokenizer, arguments.sentences)
    for sentence, row in zip(arguments.sentences, vectors @ vectors.T, strict=True):
        print(" ".join(f"{value:6.3f}" for value in row.tolist()), sentence)


if __name__ == "__main__":
    main()
