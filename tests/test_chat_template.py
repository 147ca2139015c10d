"""The two prompt formats against the official prompts, and arbitrary user text in messages."""

import itertools
import json
import re
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AddedToken, AutoTokenizer

from support.golden import jsonl
from support.paths import GOLDEN, ROOT
from support.texts import train_sentencepiece


TEMPLATES = {"later": ROOT / "chat_template.jinja", "early": ROOT / "variants" / "early_chat_template.jinja"}
FORMAT = {"v0hub": "early", "v1": "early", "v2": "later"}  # which implementation of golden/chat.jsonl has which format
CONTROL = ["<s>", "</s>", "<unk>", "<eoh>", "<eoa>", "<TOKENS_UNUSED_2>", "<TOKENS_UNUSED_140>"]
FUZZ = settings(deadline=None, derandomize=True, max_examples=250, suppress_health_check=list(HealthCheck))
HARD_FUZZ = settings(FUZZ, max_examples=10_000)

nasty = st.lists(
    st.one_of(
        st.sampled_from(
            [*CONTROL, "<", ">", "<eo", "a>", "</", "s>", "\ufdd0", "\ufdd1", "\u2581", " ", "\n", "<|Bot|>:"]
        ),
        st.text(max_size=3),
    ),
    max_size=8,
).map("".join)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("hub") / "internlm-chat-20b"
    out.mkdir()
    for name in (
        "control_tokens_internlm.py",
        "sentencepiece_internlm.py",
        "tool_calls_internlm.py",
        "tokenization_internlm.py",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
    ):
        shutil.copyfile(ROOT / name, out / name)
    shutil.copyfile(GOLDEN / "tokenizer.model", out / "tokenizer.model")
    return out


@pytest.fixture(scope="module")
def tok(folder):
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=True)


@pytest.fixture(scope="module")
def templates():
    return {name: path.read_text(encoding="utf-8") for name, path in TEMPLATES.items()}


def conversation(case: dict) -> list[dict]:
    """The messages of one line of golden/chat.jsonl."""
    out = [] if case["meta"] is None else [{"role": "system", "content": case["meta"]}]
    for query, answer in case["history"]:
        out += [{"role": "user", "content": query}, {"role": "assistant", "content": answer}]
    return [*out, {"role": "user", "content": case["query"]}]


def turns(*contents: str) -> list[dict]:
    """A conversation of these texts, alternating user and assistant."""
    roles = itertools.cycle(["user", "assistant"])
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]


def prompt_ids(tok, messages, **kwargs) -> list[int]:
    return tok.apply_chat_template(messages, return_dict=True, **kwargs)["input_ids"]


def golden_cases() -> list[dict]:
    return [case for case in jsonl("chat.jsonl") if case["impl"] in FORMAT]


@pytest.mark.parametrize("case", golden_cases(), ids=lambda case: f"{case['impl']}-{case['query'][:12]!a}")
def test_golden_prompts(tok, templates, case):
    """Text and ids equal the official prompts, with one `<s>`; unlike there, control strings of a user stay text."""
    template, messages = templates[FORMAT[case["impl"]]], conversation(case)
    text = tok.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=True)
    assert text == "<s>" + case["prompt"]
    ids = prompt_ids(tok, messages, chat_template=template, add_generation_prompt=True)
    assert ids.count(1) == 1 and ids[0] == 1 and tok.decode(ids) == text
    if any(control in case["query"] for control in CONTROL):  # the official code obeyed the user
        assert [i for i in case["ids"] if i in (1, 2, 103028)] == [1, 103028, 2]
        assert [i for i in ids if i in (1, 2, 103028)] == [1]
    else:
        assert ids == case["ids"]


def test_both_formats_are_in_the_golden_file():
    cases = golden_cases()
    assert {(FORMAT[case["impl"]], bool(case["history"])) for case in cases} == set(
        itertools.product(["early", "later"], [False, True])
    )
    assert {case["meta"] == "" for case in cases if case["meta"] is not None} == {True, False}


def test_early_format_system_text(tok, templates):
    """System text precedes the text of the next user turn, on its own lines."""
    messages = [{"role": "system", "content": "Be brief."}, *turns("hi", "ho", "more")]
    text = tok.apply_chat_template(messages, chat_template=templates["early"], tokenize=False)
    assert text == "<s><|User|>:Be brief.\nhi<eoh>\n<|Bot|>:ho<eoa>\n<|User|>:more<eoh>\n"


@pytest.mark.parametrize(
    ("messages", "tools", "message"),
    [
        (turns("hi"), [{"name": "f"}], "knows no tools"),
        (
            [{"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {}}]}],
            None,
            "knows no tools",
        ),
        ([{"role": "tool", "content": "1"}], None, "Unknown role tool"),
        ([{"role": "system", "content": "alone"}], None, "needs a user message after it"),
    ],
)
def test_early_format_refuses_what_it_cannot_express(tok, templates, messages, tools, message):
    with pytest.raises(Exception, match=message):
        tok.apply_chat_template(messages, tools=tools, chat_template=templates["early"], tokenize=False)


# --- text from a user is never a control token ----------------------------------------------------------------------


def expected_ids(tok, contents: list[str], **kwargs) -> list[int]:
    """The prompt's ids, computed independently: from the template rendered with placeholders for the contents.

    The rendered text is split at its control tokens; the text between them is encoded as plain text.
    """
    placeholders = [f"\ue000{i}\ue001" for i in range(len(contents))]
    text = tok.apply_chat_template(turns(*placeholders), tokenize=False, **kwargs)
    ids = []
    for index, part in enumerate(re.split(f"({'|'.join(CONTROL)})", text)):
        if index % 2:
            ids.append(tok.convert_tokens_to_ids(part))
        else:
            part = re.sub("\ue000(\\d+)\ue001", lambda match: contents[int(match[1])], part)
            ids += tok(part, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return ids


def check_conversation(tok, templates, contents: list[str]) -> None:
    for template in templates.values():
        for prompt in (False, True):
            kwargs = {"chat_template": template, "add_generation_prompt": prompt}
            ids = prompt_ids(tok, turns(*contents), **kwargs)
            assert ids == expected_ids(tok, contents, **kwargs)
            harmless = prompt_ids(tok, turns(*("x" for _ in contents)), **kwargs)
            special = set(tok.all_special_ids)
            assert [i for i in ids if i in special] == [i for i in harmless if i in special]


@FUZZ
@given(contents=st.lists(nasty, min_size=1, max_size=4))
def test_no_content_becomes_a_control_token(tok, templates, contents):
    """For any contents, all control ids come from the template, and the rest is encoded as plain text in one pass."""
    check_conversation(tok, templates, contents)


@pytest.mark.slow
@HARD_FUZZ
@given(contents=st.lists(nasty, min_size=1, max_size=4))
def test_no_content_becomes_a_control_token_long(tok, templates, contents):
    check_conversation(tok, templates, contents)


@pytest.mark.parametrize("control", CONTROL)
def test_each_control_string_in_each_input(tok, control):
    """Message text, text parts, tools as schema and function, tool calls, template variables, a batch."""
    special = set(tok.all_special_ids)

    def weather(city: str) -> str:
        """Say the weather.

        Args:
            city: where
        """
        return city

    weather.__doc__ = weather.__doc__.replace("where", f"where {control} is")
    template = "{{ bos_token }}{{ extra }}{{ tools | tojson }}{{ documents | tojson }}{{ messages | tojson }}<eoa>"
    call = {"name": control, "arguments": {control: [control]}}
    messages = [
        {"role": "user", "content": f"a {control}{control}"},
        {"role": "assistant", "content": control, "tool_calls": [{"type": "function", "function": call}]},
        {"role": "tool", "content": control},
        {"role": "user", "content": [{"type": "text", "text": control[:2]}, {"type": "text", "text": control[2:]}]},
    ]
    schema = {"type": "function", "function": {"name": "f", "description": control, "parameters": {}}}
    kwargs = {"tools": [weather, schema], "documents": [{"title": control, "text": control}], "extra": control}
    ids = prompt_ids(tok, messages, chat_template=template, **kwargs)
    assert [i for i in ids if i in special] == [1, 103028]
    text = tok.apply_chat_template(messages, chat_template=template, tokenize=False, **kwargs)
    assert tok.decode(ids) == text and text.count(control) >= 9
    own = prompt_ids(tok, messages, tools=kwargs["tools"], add_generation_prompt=True)  # the later format
    assert [i for i in own if i in special] == [1, 103028]
    batch = prompt_ids(tok, [messages, turns("hi"), messages], chat_template=template, **kwargs)
    assert batch[0] == batch[2] == ids


def test_messages_are_not_changed(tok):
    messages = turns("<eoa>", "</s>")
    before = json.dumps(messages)
    prompt_ids(tok, messages)
    assert json.dumps(messages) == before


def test_control_string_split_across_parts(tok):
    """A control string that is complete in no part, only in the text that the template joins."""
    parts = [{"type": "text", "text": text} for text in ("<eo", "a", ">", "<", "/s>")]
    ids = prompt_ids(tok, [{"role": "user", "content": parts}])
    assert set(ids) & set(tok.all_special_ids) == {1}
    assert "<eoa></s>" in tok.decode(ids)


def in_parts(*texts: str) -> list[dict]:
    return [{"type": "text", "text": text} for text in texts]


@FUZZ
@given(texts=st.lists(nasty, max_size=4))
def test_content_in_parts_is_their_text(tok, templates, texts):
    """In every role, any parts have the ids of their joined text, which the tests above check."""
    for template in templates.values():
        in_one, parted = turns(*["".join(texts)] * 2), turns(*[in_parts(*texts)] * 2)
        ids = prompt_ids(tok, parted, chat_template=template)
        assert ids == prompt_ids(tok, in_one, chat_template=template)


PICTURE = {"type": "image_url", "image_url": {"url": "file:///lake.png"}}
WITHOUT_TEXT = (
    *([PICTURE], [*in_parts("Look: "), PICTURE], [{"type": "image"}], [{"type": "text", "content": "hi"}]),
    *(["hi"], [{"text": None}], [{"text": 5}], [5], {"type": "text", "text": "hi"}, None, 5, True, ...),
)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("content", WITHOUT_TEXT, ids=str)
def test_content_without_text_is_refused(tok, templates, name, content):
    """Rendered as nothing, the model would be asked about a picture that it never saw. (`...`: no content at all.)"""
    message = {} if content is ... else {"content": content}
    for tokenize in (True, False):
        for role, other in (("user", turns("hi")), ("system", turns("hi")), ("assistant", [])):
            messages = [{"role": role, **message}, *other]
            with pytest.raises(Exception, match=r'text.*: write .*{"type": "text", "text": ...}\.$') as caught:
                tok.apply_chat_template(messages, chat_template=templates[name], tokenize=tokenize)
            assert "\n" not in str(caught.value)


def test_a_tool_call_needs_no_text(tok):
    """Servers send tool calls with content that is null or missing."""
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    rendered = [
        tok.apply_chat_template([{"role": "assistant", **content, "tool_calls": [call]}], tokenize=False)
        for content in ({"content": ""}, {"content": None}, {})
    ]
    assert rendered[0] == rendered[1] == rendered[2] and '<|Bot|>:Action: f\nAction Input: {"x": 1}' in rendered[0]


def test_control_tokens_of_the_user(folder):
    """Added tokens are protected as well: special, overlapping and normalised ones."""
    tok = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    special = [AddedToken("[CTL]", special=True, normalized=True), AddedToken("L]x", special=True), "\ufdd0"]
    tok.add_tokens(special, special_tokens=True)
    tok.add_tokens(["plain added"])
    added = [tok.convert_tokens_to_ids(str(token)) for token in special]
    assert added == [103168, 103169, 103170]
    content = "[CTL]x [CTL] L]x \ufdd0 plain added"
    assert set(added) <= set(tok(content)["input_ids"])
    ids = prompt_ids(tok, turns(content))
    assert not set(added) & set(ids) and 103171 in ids and content in tok.decode(ids)
    written = prompt_ids(tok, turns(content), chat_template="[CTL]{{ messages[0].content }}L]x")
    assert [i for i in written if i in added] == [103168, 103169]


def test_trusted_template_variables(tok):
    """A bos_token passed by the caller is a control token."""
    template = "{{ bos_token }}{{ messages[0].content }}"
    ids = prompt_ids(tok, turns("<s><unk>"), chat_template=template, bos_token="</s>")
    assert [i for i in ids if i in tok.all_special_ids] == [2]


def test_sanitize_argument_is_accepted(tok):
    """transformers 5.23 has an argument for this protection; here it is always on, in every version."""
    messages = turns("a<eoa>b")
    for value in (True, False):
        assert prompt_ids(tok, messages, sanitize_control_tokens=value) == prompt_ids(tok, messages)


# --- what else apply_chat_template does, with and without control strings ------------------------------------------


@pytest.mark.parametrize("content", ["plain text 你好", "a<eoa>b </s>\U0001f9ff <unk>"])
def test_output_forms(tok, content):
    """Tensors, padding, truncation, masks, plain lists: as for any text."""
    messages, longer = turns(content), turns(content, "answer", content)
    ids = prompt_ids(tok, messages)
    assert tok.apply_chat_template(messages, return_dict=False) == ids
    assert prompt_ids(tok, messages, return_tensors="pt").tolist() == [ids]
    assert prompt_ids(tok, messages, truncation=True, max_length=5) == ids[:5]
    batch = tok.apply_chat_template([messages, longer], return_dict=True, return_tensors="pt", padding=True)
    assert batch["input_ids"][0, -len(ids) :].tolist() == ids
    assert batch["attention_mask"][0].tolist() == [0] * (batch["input_ids"].shape[1] - len(ids)) + [1] * len(ids)
    text = tok.apply_chat_template(messages, tokenize=False)
    out = tok.apply_chat_template(messages, return_dict=True, tokenizer_kwargs={"return_offsets_mapping": True})
    assert "".join(text[a:b] for a, b in dict.fromkeys(out["offset_mapping"])) == text


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("content", ["plain", "<eoa>你\U0001f9ff</s><eoh>"])
def test_assistant_mask(tok, templates, name, content):
    """The mask covers exactly what the model has to learn: replies and their <eoa>."""
    messages = turns(content, content + " one", content, content + " two")
    out = tok.apply_chat_template(
        messages, chat_template=templates[name], return_dict=True, return_assistant_tokens_mask=True
    )
    marked = [i for i, mask in zip(out["input_ids"], out["assistant_masks"], strict=True) if mask]
    assert tok.decode(marked) == f"{content} one<eoa>{content} two<eoa>"
    assert marked.count(103028) == 2


@pytest.mark.parametrize("content", ["plain", "<eoa>x</s>"])
def test_continue_final_message(tok, content):
    ids = prompt_ids(tok, turns("q", content), continue_final_message=True)
    assert tok.decode(ids).endswith(f"<|Bot|>:{content}") and set(ids) & set(tok.all_special_ids) == {1}


def test_positional_arguments(tok):
    messages = turns("hi <eoa>")
    template = "{{ messages[0].content }}{{ '!' if add_generation_prompt }}"
    assert tok.apply_chat_template(messages, None, None, template, True, False, False) == "hi <eoa>!"
    out = tok.apply_chat_template(messages, None, None, template, True)
    assert tok.decode(out["input_ids"] if hasattr(out, "keys") else out) == "hi <eoa>!"


def test_other_model(tmp_path):
    """A model with only <eoh> and <eoa>, at other ids, is protected in the same way."""
    train_sentencepiece(Path(__file__), tmp_path / "tokenizer")
    for name in (
        "control_tokens_internlm.py",
        "sentencepiece_internlm.py",
        "tool_calls_internlm.py",
        "tokenization_internlm.py",
        "tokenizer_config.json",
        "chat_template.jinja",
    ):
        shutil.copyfile(ROOT / name, tmp_path / name)
    tok = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True)
    eoa = tok.convert_tokens_to_ids("<eoa>")
    ids = prompt_ids(tok, turns("a<eoa><TOKENS_UNUSED_2>", "b<eoh></s>"))
    assert eoa < 10 and [i for i in ids if i in tok.all_special_ids] == [1, eoa]
    assert "a<eoa><TOKENS_UNUSED_2>" in tok.decode(ids)
