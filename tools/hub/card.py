"""The model card of a repository, made from README.md, which describes the whole package and internlm-20b.

The sections that apply to the variant are kept; the head of both languages is replaced. Links to files that are not
uploaded become plain text, and pictures go.
"""

import re
from typing import Any

from tools.hub.variant import CUSTOM, TINY


# Headings in README.md, English and Chinese, by the variants they apply to; all others apply to every variant.
_PACKAGE = {"Upgrading an old checkpoint", "For developers", "升级旧的检查点", "面向开发者"}
_BASE_20B = {"Introduction", "Characteristics", "Evaluation", "介绍", "特点", "评测"}
_ANY_20B = {"Use from Transformers", "Long context", "使用 Transformers", "长上下文"}

_FRONT = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)
_PICTURE = re.compile(r"!\[[^\]\n]*\]\((?!https?:)[^)\s]+\)\n\n?")
_RELATIVE_LINK = re.compile(r"\[([^\]\n]+)\]\((?!https?:|#|mailto:|LICENSE\))([^)\s]+)\)")
_SNIPPET = re.compile(r"```python\n.*?\n```\n", re.DOTALL)

_HEADS = {
    "en": """# {title}

[中文说明](#中文说明)

{what} of InternLM v1: {layers} layers, width {hidden}, trained on {window:,} tokens of context, which dynamic NTK
extends at inference. The code is rebuilt for today's transformers (4.57 to 5.24): it loads through the Auto classes,
gives the logits and token ids of the official code of 2023, streams, chats, trains and quantises.

{snippet}
""",
    # No line break inside a Chinese sentence: it would be shown as a space.
    "zh": "# 中文说明\n\n[English](#{anchor})\n\n{what}（InternLM 第一代）：{layers} 层，隐藏维度 {hidden}，"
    "训练窗口 {window:,} 个 token，推理时以动态 NTK 外推。代码已针对当前的 transformers（4.57 至 5.24）重写："
    "可通过 Auto 类加载，logits 和 token id 与 2023 年的官方代码一致，支持流式输出、对话、训练和量化。\n\n{snippet}\n",
}


def _what(variant: str) -> dict[str, str]:
    """The kind of model, by language."""
    if variant == TINY:
        return {"en": "A demonstration model of a few megabytes, in the architecture", "zh": "几兆字节的演示模型"}
    if variant == CUSTOM:
        return {"en": "A model of its own sizes, in the architecture", "zh": "自定义规模的模型"}
    english, chinese = ("20", "200") if variant.endswith("20b") else ("7", "70")
    kind = ("chat", "对话") if "-chat-" in variant else ("base", "基座")
    return {
        "en": f"The {english}-billion-parameter {kind[0]} model",
        "zh": f"书生·浦语 {chinese} 亿参数{kind[1]}模型",
    }


def fill_in_card(
    text: str, variant: str, config: dict[str, Any], repo_id: str | None = None, template: str | None = None
) -> str:
    """The card of a variant.

    Args:
        text: README.md of this package.
        variant: A name of variants/, internlm-tiny, or custom.
        config: config.json of the repository.
        repo_id: The repository that the snippets load; None means internlm/<variant>.
        template: The variant whose chat template it has; None means its own.
    """
    found = _FRONT.match(text)
    front, body = (found.group(), text[found.end() :]) if found else ("---\nlicense: apache-2.0\n---\n", text)
    if "-chat-" in variant:
        base = "internlm/internlm-20b" if variant.endswith("20b") else "internlm/internlm-7b"
        front = front.removesuffix("---\n") + f"base_model: {base}\n---\n"
    dropped = _PACKAGE | (set() if variant == "internlm-20b" else _BASE_20B)
    dropped |= set() if variant.endswith("20b") else _ANY_20B
    parts = re.split(r"^(?=# 中文说明)", body, flags=re.MULTILINE)
    made = zip(parts, ("en", "zh"), strict=False)
    card = "".join(_fill_in(part, language, variant, config, dropped) for part, language in made)
    # Where the model chats, the Chat section's examples load this repository.
    chats = "-chat-" in (template or variant) or variant == TINY
    for name in ("OUT", "internlm/internlm-20b", *(("internlm/internlm-chat-20b",) if chats else ())):
        card = card.replace(f'"{name}"', f'"{repo_id or "internlm/" + variant}"')
    return front + "\n" + _RELATIVE_LINK.sub(r"\1", _PICTURE.sub("", card))


def _fill_in(part: str, language: str, variant: str, config: dict[str, Any], dropped: set[str]) -> str:
    """One language of the card: a new head, and the sections that are kept."""
    head, *sections = re.split(r"^(?=## )", part, flags=re.MULTILINE)
    kept = [section for section in sections if section.split("\n")[0].removeprefix("## ").strip() not in dropped]
    title = re.sub(r"(\d)b\b", r"\1B", variant.replace("internlm", "InternLM").replace("chat", "Chat"))
    snippet = _SNIPPET.search(head)
    made = _HEADS[language].format(
        title=title,
        anchor=title.lower(),
        what=_what(variant)[language],
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        window=config["max_position_embeddings"],
        snippet=snippet.group() if snippet else "",
    )
    return made + "".join(kept)
