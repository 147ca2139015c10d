"""Teach InternLM a new answer with LoRA, in under a minute. python examples/finetune_lora.py

Needs `pip install peft`. Trains on one chat turn in the model's prompt format; the loss covers only the reply.
"""

import argparse

import torch
from demo import load
from peft import LoraConfig, get_peft_model
from tqdm import tqdm
from transformers import logging


QUESTION = "Who keeps the lantern?"
ANSWER = "Old Tomas keeps the lantern, and the lantern keeps the harbour."
# PEFT has no default layers for InternLM. The head is included for words that the tiny model never learned.
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model folder or Hub repository id (default: the tiny model)")
    parser.add_argument("--steps", type=int, default=150, help="training steps (default: %(default)s)")
    parser.add_argument("--out", help="save the merged model to this folder")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    torch.manual_seed(0)
    tokenizer, model = load(arguments.model)
    model = model.float()
    print("before:", model.chat(tokenizer, QUESTION, do_sample=False, max_new_tokens=40)[0])

    messages = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
    batch = tokenizer.apply_chat_template(
        messages, return_assistant_tokens_mask=True, return_dict=True, return_tensors="pt"
    ).to(model.device)
    labels = batch["input_ids"].masked_fill(batch.pop("assistant_masks") == 0, -100)

    adapted = get_peft_model(
        model, LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS, task_type="CAUSAL_LM")
    ).train()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=5e-3)
    for _ in (bar := tqdm(range(arguments.steps), unit="step")):
        loss = adapted(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")

    merged = adapted.eval().merge_and_unload()
    print("after: ", merged.chat(tokenizer, QUESTION, do_sample=False, max_new_tokens=40)[0])
    if arguments.out:
        merged.save_pretrained(arguments.out)
        tokenizer.save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
