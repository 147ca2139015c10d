"""The programs in README and docs."""

import re
from typing import NamedTuple

import torch


class Block(NamedTuple):
    """A Python block of a page, and the output that the page shows for it, if any."""

    line: int
    code: str
    prints: str | None


def blocks(text: str) -> list[Block]:
    found = re.finditer(r"^```python\n(.*?)^```$(?:\n\n```text\n(.*?)^```$)?", text, re.MULTILINE | re.DOTALL)
    return [Block(text[: match.start()].count("\n") + 2, match[1], match[2]) for match in found]


def run_blocks(name: str, text: str, model: str, capsys) -> None:
    """Run every Python block of a page, in order; each prints the output shown there, or at least something.

    Args:
        model: replaces the names of the official models.
        capsys: the test's.
    """
    namespace: dict = {"__name__": "__main__"}
    found = blocks(text)
    assert found, f"{name} has no Python block"
    for block in found:
        torch.manual_seed(0)
        code = re.sub(r'"(?:internlm/internlm-[\w-]+|OUT)"', lambda match: repr(model), block.code)
        code = code if torch.cuda.is_available() else code.replace(".cuda()", ".cpu()")
        exec(compile(code, f"{name}, line {block.line}", "exec"), namespace)
        printed = capsys.readouterr().out
        if block.prints is not None:
            assert printed.rstrip("\n") == block.prints.rstrip("\n"), f"{name}, line {block.line}"
        elif "print(" in block.code:
            assert printed.strip(), f"{name}, line {block.line} prints nothing"
            assert not re.search(r"<eoa>|<\|\w+\|>", printed), printed  # a reply that did not stop
        if re.search("Who are you|你是谁", block.code):
            assert re.search("InternLM|书生·浦语", printed), printed
        prompt = re.search(r'tokenizer\(\[?"([^"]+)"', block.code)
        assert prompt is None or (printed.startswith(prompt[1]) and len(printed) > len(prompt[1]) + 10), printed
