"""Functions that the YAML files of this folder refer to: choices, and the score of a sample."""

import re


def _bare(text: str) -> str:
    """`text` up to its first newline, full stop or comma, without punctuation and articles, as in OpenCompass."""
    first = re.split(r"[\n.,]", text, maxsplit=1)[0]
    words = re.sub(r"\b(a|an|the)\b", "", re.sub(r"[^\w\s]", "", first), flags=re.IGNORECASE)
    return " ".join(words.split())


def cmrc(doc: dict, results: list[str]) -> dict[str, float]:
    """Whether the answer (the text after "the answer is", if present) equals one of the reference answers."""
    _, found, after = results[0].partition("答案是")
    answer = _bare((after if found else results[0]).strip())
    return {"exact_match": float(answer in {_bare(given) for given in doc["answers"]["text"]})}


def csl_choices(doc: dict) -> list[str]:
    """The abstract alone (0: the keywords do not belong to it) and with the keywords (1: they do)."""
    alone = f"摘要：{doc['abst']}"
    return [alone, f"{alone}\n关键词：{'，'.join(doc['keyword'])}"]


def first_1000(docs):
    """The first 1000 documents, as for the published score."""
    return docs.select(range(min(1000, len(docs))))


def rouge1(doc: dict, results: list[str]) -> dict[str, float]:
    """ROUGE-1 F-measure of the first line of the summary against the reference."""
    from rouge_score.rouge_scorer import RougeScorer

    summary = results[0].strip().split("\n")[0].strip()
    return {"rouge1": RougeScorer(["rouge1"]).score(doc["summary"], summary)["rouge1"].fmeasure}


def recall(doc: dict, results: list[str]) -> dict[str, float]:
    """Whether the first number in the answer is the value stated in the prompt."""
    number = re.search(r"\d+", results[0])
    return {"exact_match": float(number is not None and number[0] == doc["value"])}
