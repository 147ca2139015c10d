"""Tool use over the API: a calculator and a dictionary, called by the model that `make serve` serves.

make serve                                              # in another terminal; ENGINE=vllm works alike
python examples/tools_client.py "What is 12 + 7?"
"""

import argparse
import ast
import json
import operator
from typing import Any

from transformers.utils import get_json_schema


OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}
WORDS = {"river": "a long stream of water that flows to the sea", "河流": "流向大海的水"}


def calculator(expression: str) -> str:
    """Calculate.

    Args:
        expression: the sum
    """

    def value(node):
        if isinstance(node, ast.BinOp):
            return OPERATORS[type(node.op)](value(node.left), value(node.right))
        return {ast.Constant: lambda: node.value, ast.UnaryOp: lambda: -value(node.operand)}[type(node)]()

    return str(value(ast.parse(expression, mode="eval").body))


def dictionary(word: str) -> str:
    """Look up a word.

    Args:
        word: the word
    """
    return WORDS.get(word, "a word that is not in this dictionary")


TOOLS = {tool.__name__: tool for tool in (calculator, dictionary)}


def call_tool(name: str, arguments: dict) -> str:
    """The tool's result, or the error, as text for the model."""
    try:
        return TOOLS[name](**arguments)
    except (KeyError, TypeError, SyntaxError) as error:
        return f"Error: {error!r}"


def final_answer(reply: str) -> str:
    """The text after `Final Answer:`, or the whole reply."""
    return reply.rpartition("Final Answer:")[2].strip()


def run(client: Any, model: str, question: str, rounds: int = 4) -> list[dict]:
    """Ask, run the model's tool calls, and return the whole conversation, ending with the final answer."""
    messages = [{"role": "user", "content": question}]
    tools = [get_json_schema(tool) for tool in TOOLS.values()]
    for _ in range(rounds):
        completion = client.chat.completions.create(
            model=model, messages=messages, tools=tools, temperature=0, max_tokens=200
        )
        message = completion.choices[0].message
        messages.append(message.model_dump(exclude_none=True))  # with the thought, which the model needs
        if not message.tool_calls:
            break
        for call in message.tool_calls:
            result = call_tool(call.function.name, json.loads(call.function.arguments))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    return messages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", nargs="?", default="What is 12 + 7?")
    parser.add_argument("--server", default="http://localhost:8000/v1", help="its address (default: %(default)s)")
    parser.add_argument("--api-key", default="none", help="if the server was started with one")
    parser.add_argument("--model", help="name of the model (default: the first that the server lists)")
    arguments = parser.parse_args()
    try:
        from openai import APIConnectionError, APIError, OpenAI
    except ImportError:
        raise SystemExit("openai is missing: pip install openai") from None
    try:
        with OpenAI(base_url=arguments.server, api_key=arguments.api_key) as client:
            model = arguments.model or next(iter(client.models.list())).id
            messages = run(client, model, arguments.question)
    except APIConnectionError as error:
        raise SystemExit(f"{arguments.server} does not answer: start `make serve`, or give --server.") from error
    except APIError as error:
        raise SystemExit(f"{arguments.server}: {error}") from error
    for message in messages:
        print(f"{message['role']}: {message.get('content', '')}")
        for call in message.get("tool_calls", []):
            print(f"  -> {call['function']['name']} {call['function']['arguments']}")
    print(f"\n{final_answer(messages[-1]['content'])}")


if __name__ == "__main__":
    main()
