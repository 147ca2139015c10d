"""Tool use with InternLM: a calculator and a dictionary, in the ReAct format of its chat template.

python examples/tools.py "What is 12 + 7?"

tools_client.py does the same over the API.
"""

import argparse

from demo import load
from tools_client import TOOLS, call_tool, final_answer
from transformers import logging


def run(model, tokenizer, question: str, rounds: int = 4) -> list[dict]:
    """Ask, run the model's tool calls, and return the whole conversation, ending with the final answer."""
    messages = [{"role": "user", "content": question}]
    stops = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<eoa>")]
    for _ in range(rounds):
        inputs = tokenizer.apply_chat_template(
            messages, tools=list(TOOLS.values()), add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(model.device)
        output = model.generate(**inputs, max_new_tokens=200, do_sample=False, eos_token_id=stops)
        reply = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        try:
            messages.append(tokenizer.parse_tool_calls(reply))
        except ValueError as error:  # the model gets the error and may correct itself
            messages += [{"role": "assistant", "content": reply}, {"role": "tool", "content": f"Error: {error}"}]
            continue
        if "tool_calls" not in messages[-1]:
            break
        for call in messages[-1]["tool_calls"]:
            result = call_tool(call["function"]["name"], call["function"]["arguments"])
            messages.append({"role": "tool", "content": result})
    return messages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", nargs="?", default="What is 12 + 7?")
    parser.add_argument(
        "--model", help="a model folder or Hub repository id (default: the tiny model of this project)"
    )
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer, model = load(arguments.model)
    messages = run(model, tokenizer, arguments.question)
    for message in messages:
        calls = [call["function"] for call in message.get("tool_calls", [])]
        print(f"{message['role']}: {message['content']}", *(f"  -> {call}" for call in calls), sep="\n")
    print(f"\n{final_answer(messages[-1]['content'])}")


if __name__ == "__main__":
    main()
