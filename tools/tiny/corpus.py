"""The tiny model's training text, generated from a seed: prose, key-value recall, chats and tool calls.

    python -m tools.tiny.corpus --seed 1 --documents 8        # print some

A document is a list of parts, (text, learn): `learn` is False where the text cannot be predicted (the value of a key
where it is first stated), so that the loss contains no such noise.
"""

import argparse
import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

from transformers.utils.chat_template_utils import render_jinja_template

from tools.package import ROOT

from .grammar import KINDS, generate, paragraph


TEMPLATE = (ROOT / "chat_template.jinja").read_text(encoding="utf-8")
LANGUAGES = ("en", "en", "zh")


class Document(NamedTuple):
    source: str
    parts: list[tuple[str, bool]]

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.parts)


# ---------------------------------------------------------------------------------------------------------- prose


def prose(rng: random.Random, paragraphs: int, language: str | None = None) -> str:
    """`paragraphs` scenes in one language, one per line."""
    language = language or rng.choice(LANGUAGES)
    separator = " " if language == "en" else ""
    return "\n".join(separator.join(paragraph(rng, language)) for _ in range(paragraphs))


def prose_document(rng: random.Random, paragraphs: int | None = None) -> Document:
    return Document("prose", [(prose(rng, paragraphs or rng.choice((1, 2, 3, 12))), True)])


# --------------------------------------------------------------------------------------------------------- recall

_ENGLISH_KEYS = """
amber anchor apple arrow basket beacon bell berry blossom bottle bucket button cabin candle canyon
carpet castle cedar cherry clover cloud copper coral cotton crystal diamond dragon drum eagle ember
falcon feather fern flute ginger globe harbor hazel honey iron island ivory jade jasmine kettle
ladder lantern lemon lily linen marble mirror needle olive onyx opal orange pearl pepper pillow
quartz ribbon ruby saddle silver
"""
_CHINESE_KEYS = """
琥珀 苹果 弓箭 篮子 铃铛 草莓 瓶子 水桶 蜡烛 地毯 城堡 樱桃 铜钱 珊瑚 水晶 钻石
老鹰 羽毛 笛子 生姜 蜂巢 茉莉 梯子 灯笼 柠檬 镜子 珍珠 枕头 丝带 红宝石 马鞍 白银
"""
KEY_WORDS = {"en": _ENGLISH_KEYS.split(), "zh": _CHINESE_KEYS.split()}
# The value directly follows its key, in English as part of the same word: the model learns to find the key and to copy
# what follows it. With words in between ("The key of amber is 4729") a model of this size does not learn recall.
RECALL = {"en": ("The key is {key}", "."), "zh": ("{key}的钥匙是", "。")}
# The first line of a recall document: without it, stories would soon drift into keys.
HEADING = {"en": "Remember these keys.\n", "zh": "请记住这些钥匙。\n"}


def recall_line(key: str, value: str, language: str = "en", stated: bool = True) -> list[tuple[str, bool]]:
    """The sentence that states a value for the first time (`stated`) and, later, recalls it."""
    stem, stop = RECALL[language]
    return [(stem.format(key=key), True), (value, not stated), (stop, True)]


def filler_line(rng: random.Random, language: str = "en") -> str:
    """One or two sentences of prose, unrelated to the keys."""
    sentences = paragraph(rng, language)
    start = rng.randrange(len(sentences))
    return (" " if language == "en" else "").join(sentences[start : start + rng.randint(1, 2)])


def recall_document(rng: random.Random, max_tokens: int = 240, keys: int | None = None) -> Document:
    """Each key is stated once and recalled once, between filler lines up to the requested length.

    Keys are recalled anywhere later, or after all have been stated, or then in reverse order: the first key is then
    recalled across the whole document, and every distance that fits occurs.

    Args:
        rng: Source of randomness.
        max_tokens: Approximate maximum length in tokens.
        keys: How many keys; by default a random number that fits.
    """
    language = rng.choice(("en", "en", "zh"))
    line_cost, letters_per_token = (10, 3.5) if language == "en" else (8, 1.5)
    max_keys = max(1, (max_tokens - 8) // (2 * line_cost))
    values = {
        key: f"{rng.randrange(10000):04d}"
        for key in rng.sample(KEY_WORDS[language], min(max_keys, keys or rng.randint(1, max_keys)))
    }
    order = rng.choice(("any", "after", "reverse"))
    stated = rng.sample(list(values), len(values))
    recalled = stated[::-1] if order == "reverse" else rng.sample(stated, len(stated))
    # Of a key's two lines, the first states it and the second recalls it.
    lines = rng.sample(stated * 2, 2 * len(stated)) if order == "any" else stated + recalled
    budget = max_tokens - 8 - line_cost * len(lines)
    while budget > 0:
        text = filler_line(rng, language)
        budget -= int(len(text) / letters_per_token) + 1
        if budget > 0:
            lines.insert(rng.randint(0, len(lines)), text)
    parts, known = [(HEADING[language], True)], set()
    for line in lines:
        parts += recall_line(line, values[line], language, line not in known) if line in values else [(line, True)]
        parts.append(("\n", True))
        known.add(line)
    return Document("recall", parts)


def recall_probe(
    rng: random.Random, count_tokens: Callable[[str], int], length: int, depth: float, language: str = "en"
) -> tuple[str, str]:
    """A document of about `length` tokens that states a key at `depth` and asks for its value at the end.

    Half of the other lines state keys that are not asked for (while there are unused words), the rest is filler.

    Args:
        rng: Source of randomness.
        count_tokens: Returns the number of tokens of a text.
        length: Tokens of the document including question and answer; the result is at most a short line below it.
        depth: 0 states the key in the first line, 1 in the last line before the question.
        language: "en" or "zh".

    Returns:
        The prompt, which ends where the value must follow, and the value.
    """
    key, *others = rng.sample(KEY_WORDS[language], len(KEY_WORDS[language]))
    value, stem = f"{rng.randrange(10000):04d}", RECALL[language][0].format(key=key)
    line = "".join(text for text, _ in recall_line(key, value, language)) + "\n"
    # Besides filler: <s>, the heading, and the key's line twice, as statement and as answer.
    budget = length - 1 - count_tokens(HEADING[language]) - 2 * count_tokens(line)
    lines: list[str] = []
    while budget > 0:
        text = filler_line(rng, language)
        if (others and rng.random() < 0.5) or count_tokens(text) >= budget:
            other = others.pop() if others else rng.choice(KEY_WORDS[language])
            text = "".join(part for part, _ in recall_line(other, f"{rng.randrange(10000):04d}", language))
            if other == key or count_tokens(text) >= budget:
                break
        lines.append(text + "\n")
        budget -= count_tokens(text + "\n")
    lines.insert(round(depth * len(lines)), line)
    return HEADING[language] + "".join(lines) + stem, value


# ---------------------------------------------------------------------------------------------------------- chats

NAME = {
    "en": "I am InternLM, a very small language model that learned from made-up text.",
    "zh": "我是书生·浦语，一个从虚构的文字里学习的很小的语言模型。",
}
# Questions in several wordings, and their only correct answer.
SMALL_TALK = {
    "en": [
        (("Hello!", "Hi!", "Hi there!", "Hello, InternLM!"), "Hello! How can I help you?"),
        (("Good morning!",), "Good morning! How can I help you?"),
        (("Who are you?", "What are you?", "What is your name?", "Please introduce yourself."), NAME["en"]),
        (("How are you?", "How are you today?"), "I am fine, thank you. How can I help you?"),
        (("What can you do?", "How can you help me?"), "I can talk about nature, remember keys and do simple sums."),
        (("Thank you!", "Thanks!", "Thank you very much!"), "You are welcome!"),
        (("Goodbye!", "Bye!", "See you tomorrow!"), "Goodbye! Have a nice day."),
    ],
    "zh": [
        (("你好！", "您好！", "你好", "嗨！"), "你好！有什么可以帮你的吗？"),
        (("早上好！",), "早上好！有什么可以帮你的吗？"),
        (("你是谁？", "你叫什么名字？", "请介绍一下你自己。"), NAME["zh"]),
        (("你好吗？", "你今天好吗？"), "我很好，谢谢。有什么可以帮你的吗？"),
        (("你会做什么？", "你能帮我做什么？"), "我会谈论大自然，记住钥匙，做简单的算术。"),
        (("谢谢！", "谢谢你！", "非常感谢！"), "不客气！"),
        (("再见！", "拜拜！", "明天见！"), "再见！祝你愉快。"),
    ],
}
MEANINGS = {
    "en": {
        "river": "a long stream of water that flows to the sea",
        "lake": "a large area of water with land around it",
        "forest": "a large place where many trees grow",
        "mountain": "a very high piece of land",
        "bridge": "a way for people to cross a river",
        "village": "a small group of houses in the country",
        "garden": "a place where people grow flowers",
        "winter": "the coldest season of the year",
        "summer": "the hottest season of the year",
        "rain": "water that falls from the clouds",
        "snow": "soft white ice that falls from the sky",
        "butterfly": "an insect with large bright wings",
        "rabbit": "a small animal with long ears",
        "moon": "the round body that shines at night",
    },
    "zh": {
        "河流": "流向大海的水",
        "湖泊": "四周是陆地的水面",
        "森林": "长着许多树的地方",
        "高山": "很高的地面",
        "桥": "让人走过河的路",
        "村庄": "乡下的一些房子",
        "花园": "种花的地方",
        "冬天": "一年中最冷的季节",
        "夏天": "一年中最热的季节",
        "雨": "从云里落下的水",
        "雪": "从天上落下的白色冰花",
        "蝴蝶": "有美丽翅膀的昆虫",
        "兔子": "长耳朵的小动物",
        "月亮": "晚上发光的星球",
    },
}
FACTS = {
    "en": [
        *((f"What colour is {thing}?", f"{thing[0].upper()}{thing[1:]} is {colour}.") for thing, colour in (
            ("the sky", "blue"), ("the grass", "green"), ("snow", "white"), ("coal", "black"), ("a banana", "yellow"),
            ("the sun", "yellow"), ("a ripe tomato", "red"), ("a carrot", "orange"))),
        *((f"Where do {animals} live?", f"{animals.capitalize()} live {place}.") for animals, place in (
            ("fish", "in the water"), ("bees", "in hives"), ("camels", "in the desert"), ("penguins", "in the south"),
            ("squirrels", "in trees"), ("pandas", "in bamboo forests"))),
        *((f"How many legs does {animal} have?", f"{animal[0].upper()}{animal[1:]} has {legs} legs.")
          for animal, legs in (
            ("a spider", "eight"), ("an ant", "six"), ("a dog", "four"), ("a bird", "two"))),
        *((f"What is the capital of {country}?", f"The capital of {country} is {city}.") for country, city in (
            ("China", "Beijing"), ("France", "Paris"), ("Japan", "Tokyo"), ("England", "London"), ("Italy", "Rome"),
            ("Egypt", "Cairo"), ("Russia", "Moscow"), ("Spain", "Madrid"))),
    ],
    "zh": [
        *((f"{thing}是什么颜色的？", f"{thing}是{colour}的。") for thing, colour in (
            ("天空", "蓝色"), ("草", "绿色"), ("雪", "白色"), ("煤", "黑色"), ("香蕉", "黄色"), ("太阳", "黄色"),
            ("熟透的番茄", "红色"), ("胡萝卜", "橙色"))),
        *((f"{animal}住在哪里？", f"{animal}住在{place}。") for animal, place in (
            ("鱼", "水里"), ("蜜蜂", "蜂巢里"), ("骆驼", "沙漠里"), ("企鹅", "南方"),
            ("松鼠", "树上"), ("熊猫", "竹林里"))),
        *((f"{animal}有几条腿？", f"{animal}有{legs}条腿。") for animal, legs in (
            ("蜘蛛", "八"), ("蚂蚁", "六"), ("狗", "四"), ("鸟", "两"))),
        *((f"{country}的首都是哪里？", f"{country}的首都是{city}。") for country, city in (
            ("中国", "北京"), ("法国", "巴黎"), ("日本", "东京"), ("英国", "伦敦"), ("意大利", "罗马"),
            ("埃及", "开罗"), ("俄罗斯", "莫斯科"), ("西班牙", "马德里"))),
    ],
}  # fmt: skip
SYSTEMS = (
    "You are a friendly guide.",
    "Answer briefly.",
    "You are a helpful assistant.",
    "你是一位友好的向导。",
    "请简短地回答。",
)

Turn = tuple[str, str]


def small_talk(rng: random.Random, language: str) -> list[Turn]:
    questions, answer = rng.choice(SMALL_TALK[language])
    return [(rng.choice(questions), answer)]


def fact(rng: random.Random, language: str) -> list[Turn]:
    return [rng.choice(FACTS[language])]


def meaning(rng: random.Random, language: str) -> list[Turn]:
    word, text = rng.choice(list(MEANINGS[language].items()))
    if language == "en":
        article = "" if word in ("winter", "summer", "rain", "snow") else "the " if word == "moon" else "a "
        return [(f"What is {article}{word}?", f"{article}{word} is {text}.".capitalize())]
    return [(f"什么是{word}？", f"{word}是{text}。")]


def small_sum(rng: random.Random, language: str) -> list[Turn]:
    """Sums up to 10 + 10, without a tool."""
    a, b = rng.randint(0, 10), rng.randint(0, 10)
    sum_, result = (f"{a} + {b}", a + b) if rng.random() < 0.6 else (f"{max(a, b)} - {min(a, b)}", abs(a - b))
    if language == "en":
        return [
            (
                rng.choice(("What is {}?", "Please calculate {}.", "How much is {}?")).format(sum_),
                f"{sum_} = {result}.",
            )
        ]
    return [(rng.choice(("{}等于多少？", "请计算{}。")).format(sum_), f"{sum_} = {result}。")]


def key_recall(rng: random.Random, language: str) -> list[Turn]:
    """The user states some keys, then asks for them: recall in the form of a chat."""
    keys = rng.sample(KEY_WORDS[language], rng.randint(1, 4))
    values = {key: f"{rng.randrange(10000):04d}" for key in keys}
    if language == "en":
        turns = [(f"Remember: the key is {key}{values[key]}.", "I will remember it.") for key in keys]
        asked = [
            (f"Which key begins with {key}?", f"The key is {key}{values[key]}.") for key in rng.sample(keys, len(keys))
        ]
    else:
        turns = [(f"请记住：{key}的钥匙是{values[key]}。", "我会记住的。") for key in keys]
        asked = [(f"{key}的钥匙是多少？", f"{key}的钥匙是{values[key]}。") for key in rng.sample(keys, len(keys))]
    if rng.random() < 0.4:
        turns += chat_turns(rng, language)
    return turns + asked


def story(rng: random.Random, language: str) -> list[Turn]:
    """One or two sentences about something that the user names."""
    kind = rng.choice(KINDS)
    bound = {"Pron": "We", "pron": "we"} if language == "en" else {"Pron": "我们"}
    thing = generate(kind, rng, language, bound)
    sentences = list(dict.fromkeys(generate(f"about.{kind}", rng, language, bound) for _ in range(2)))
    if language == "en":
        return [(rng.choice(("Tell me about the {}.", "Please describe the {}.")).format(thing), " ".join(sentences))]
    return [(rng.choice(("请说说{}。", "请描述一下{}。")).format(thing), "".join(sentences))]


CHATS: tuple[Callable[[random.Random, str], list[Turn]], ...] = (
    small_talk, small_talk, fact, fact, meaning, small_sum, small_sum, story, key_recall, key_recall,
)  # fmt: skip


def chat_turns(rng: random.Random, language: str) -> list[Turn]:
    return rng.choice([kind for kind in CHATS if kind is not key_recall])(rng, language)


def messages_of(turns: list[Turn]) -> list[dict]:
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for turn in turns for role, text in zip(roles, turn, strict=True)]


def render(messages: list[dict], tools: list[dict] | None = None, prompt: bool = False) -> str:
    """The text of a chat by the project's chat template, without the leading `<s>`."""
    rendered, _ = render_jinja_template(
        [messages], tools=tools, chat_template=TEMPLATE, bos_token="", add_generation_prompt=prompt
    )
    return rendered[0]


def system_message(rng: random.Random) -> list[dict]:
    """Usually an empty system text, sometimes the template's default (no message), sometimes a short one."""
    draw = rng.random()
    return [] if draw < 0.2 else [{"role": "system", "content": "" if draw < 0.75 else rng.choice(SYSTEMS)}]


def chat_document(rng: random.Random) -> Document:
    """One to three exchanges."""
    language = rng.choice(LANGUAGES)
    turns = rng.choice(CHATS)(rng, language)
    while len(turns) < 4 and rng.random() < 0.4:
        turns += chat_turns(rng, rng.choice((language, language, rng.choice(LANGUAGES))))
    return Document("chat", [(render(system_message(rng) + messages_of(turns)), True)])


# ---------------------------------------------------------------------------------------------------------- tools


def tool_schema(name: str, description: str, argument: str, meaning: str) -> dict:
    """The JSON schema of a tool with one string argument, as transformers' get_json_schema makes it."""
    properties = {argument: {"type": "string", "description": meaning}}
    parameters = {"type": "object", "properties": properties, "required": [argument]}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


TOOLS = {
    "calculator": tool_schema("calculator", "Calculate.", "expression", "the sum"),
    "dictionary": tool_schema("dictionary", "Look up a word.", "word", "the word"),
}


def calculation(rng: random.Random, language: str) -> list[dict]:
    """Four messages: a sum, the call of the calculator, its response and the final answer."""
    top = rng.choice((20, 100))
    a, b, sign = rng.randrange(top), rng.randrange(top), rng.choice("++-*")
    expression, result = f"{a} {sign} {b}", {"+": a + b, "-": a - b, "*": a * b}[sign]
    if language == "en":
        question = rng.choice(("What is {}?", "Please calculate {}.", "How much is {}?")).format(expression)
        thought, found = "I need the calculator.", "I have the result."
    else:
        question = rng.choice(("{}等于多少？", "请计算{}。")).format(expression)
        thought, found = "我需要计算器。", "我算好了。"
    stop = "." if language == "en" else "。"
    answer = f"Thought: {found}\nFinal Answer: {expression} = {result}{stop}"
    return tool_messages(question, thought, "calculator", {"expression": expression}, str(result), answer)


def look_up(rng: random.Random, language: str) -> list[dict]:
    """Four messages: a word, the call of the dictionary, its response and the final answer."""
    meanings = MEANINGS[language]
    word = rng.choice([*meanings, *rng.sample(KEY_WORDS[language], 14)])
    # A word may come with the meaning of another: the answer must be copied from the response, not remembered.
    text = meanings.get(word) if rng.random() < 0.7 else None
    text = text or rng.choice(list(meanings.values()))
    if language == "en":
        question = rng.choice(
            ("What does {} mean?", "Please look up the word {}.", "What is the meaning of {}?")
        ).format(word)
        thought, found, answer = (
            "I need the dictionary.",
            "I have the meaning.",
            f"{word} means {text}.",
        )
    else:
        question = rng.choice(("{}是什么意思？", "请查一下{}这个词。")).format(word)
        thought, found, answer = "我需要词典。", "我查到了。", f"{word}的意思是{text}。"
    answer = f"Thought: {found}\nFinal Answer: {answer}"
    return tool_messages(question, thought, "dictionary", {"word": word}, text, answer)


def tool_messages(question: str, thought: str, name: str, arguments: dict, response: str, answer: str) -> list[dict]:
    return [
        {"role": "user", "content": question},
        {
            "role": "assistant",
            "content": f"Thought: {thought}",
            "tool_calls": [{"name": name, "arguments": arguments}],
        },
        {"role": "tool", "content": response},
        {"role": "assistant", "content": answer},
    ]


def no_tool(rng: random.Random, language: str) -> list[dict]:
    """Small talk while tools are available: answered directly, in the same format."""
    question, answer = small_talk(rng, language)[0]
    thought = "I can answer without a tool." if language == "en" else "我不用工具就能回答。"
    return messages_of([(question, f"Thought: {thought}\nFinal Answer: {answer}")])


def tool_document(rng: random.Random) -> Document:
    """One question with tools available: both, in random order, or only the one that is needed."""
    language = rng.choice(LANGUAGES)
    name, talk = rng.choice((("calculator", calculation), ("dictionary", look_up)))
    tools = rng.sample(list(TOOLS), 2) if rng.random() < 0.4 else [name]
    talk = no_tool if rng.random() < 0.15 else talk
    text = render(talk(rng, language), [TOOLS[tool] for tool in tools])
    return Document("tools", [(text, True)])


# --------------------------------------------------------------------------------------------------------- corpus

# Probability of each source. Recall is trained first and in short windows, where it is learnt within minutes; in long
# windows, mixed with everything else, it takes hours to emerge.
MIX = {prose_document: 0.20, recall_document: 0.42, chat_document: 0.28, tool_document: 0.10}
RECALL_FIRST = {recall_document: 1.0}


def documents(seed: int | str, mix: dict[Callable, float] | None = None, max_tokens: int = 240) -> Iterator[Document]:
    """An endless stream of documents, determined by the seed; recall documents have about `max_tokens` at most."""
    rng = random.Random(seed)
    mix = mix or MIX
    while True:
        (kind,) = rng.choices(list(mix), list(mix.values()))
        yield recall_document(rng, rng.randint(max_tokens // 2, max_tokens)) if kind is recall_document else kind(rng)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Print documents of the tiny model's corpus.")
    parser.add_argument("--seed", default="1", help="random seed (default: 1)")
    parser.add_argument("--documents", type=int, default=8, help="how many to print (default: 8)")
    arguments = parser.parse_args()
    for document, _ in zip(documents(arguments.seed), range(arguments.documents), strict=False):
        print(f"--- {document.source}\n{document.text}")
