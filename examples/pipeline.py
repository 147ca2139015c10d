"""The transformers pipeline with InternLM: a text, a batch and a chat. python examples/pipeline.py"""

import argparse

from demo import load
from transformers import logging, pipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a model folder or Hub repository id (default: the tiny model)")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    tokenizer, model = load(arguments.model)
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer)

    settings = {"max_new_tokens": 30, "do_sample": False}
    print(generate("In the evening", **settings)[0]["generated_text"], end="\n\n")

    # The tokenizer pads on the left, so prompts of different lengths can share a batch.
    for output in generate(["The sky", "来到美丽的大自然，我们发现"], batch_size=2, **settings):
        print(output[0]["generated_text"], end="\n\n")

    messages = [{"role": "user", "content": "Hello!"}]
    messages = generate(messages, **settings)[0]["generated_text"]
    for message in messages:
        print(f"{message['role']}: {message['content']}")


if __name__ == "__main__":
    main()
