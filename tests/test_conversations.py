"""Reading conversations to train on (tools/conversations.py): what is learned, and one line for what is wrong."""

import json
from pathlib import Path

import pytest

from tools.conversations import encode, parse, read

from support.paths import ROOT


TURNS = [
    {"role": "user", "content": "Who keeps the lantern?"},
    {"role": "assistant", "content": "Old Tomas does."},
    {"role": "user", "content": "谁守着灯塔？<eoa>"},
    {"role": "assistant", "content": "老托马斯。"},
]
GOOD = json.dumps({"messages": TURNS})


def test_a_file_is_read(tmp_path: Path) -> None:
    """With a byte-order mark, empty lines and a line separator inside a string; lines keep their numbers."""
    file, text = tmp_path / "my.jsonl", json.dumps({"messages": [{"role": "assistant", "content": "a\u2028b"}]})
    file.write_text(f"\ufeff{GOOD}\n\n{text.replace(chr(92) + 'u2028', chr(0x2028))}\n", encoding="utf-8")
    found = read(file)
    assert list(found) == [1, 3] and found[1]["messages"] == TURNS
    assert found[3]["messages"][0]["content"] == "a\u2028b"


BAD = {
    '{"messages": [': "this is not JSON (Expecting",
    "[]": "there are no messages",
    '{"text": "Hello!"}': "there are no messages",
    '{"messages": []}': "there are no messages",
    '{"messages": "Hello!"}': "there are no messages",
    '{"messages": ["Hello!"]}': "message 1 is 'Hello!'",
    '{"messages": [{"content": "Hello!"}]}': "message 1 is {'content': 'Hello!'}",
    '{"messages": [{"role": "user", "content": "Hello!"}]}': "no message has the role 'assistant'",
    '{"messages": [{"role": "assistant", "content": 7}]}': "the content of message 1 is 7: it must be a string",
    '{"messages": [{"role": "assistant"}]}': "the content of message 1 is None: it must be a string",
}


@pytest.mark.parametrize("line", BAD)
def test_a_bad_line_is_one_error(line: str, tmp_path: Path) -> None:
    file = tmp_path / "my.jsonl"
    file.write_text(f"{GOOD}\n{line}\n", encoding="utf-8")
    with pytest.raises(SystemExit) as stopped:
        read(file)
    message = str(stopped.value)
    assert message.startswith(f"{file}, line 2: {BAD[line]}") and "\n" not in message


def test_a_call_of_a_tool_needs_no_content() -> None:
    call = {"function": {"name": "calculator", "arguments": {"expression": "1 + 1"}}}
    row = {"messages": [{"role": "assistant", "content": None, "tool_calls": [call]}]}
    assert parse(json.dumps(row)) == row


def test_files_that_are_no_conversations(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for name, message in {"empty": "has no conversations", "binary": "codec", "absent": "No such file"}.items():
        with pytest.raises(SystemExit, match=message) as stopped:
            read(tmp_path / name)
        assert str(stopped.value).startswith(str(tmp_path / name)) and "\n" not in str(stopped.value)


@pytest.mark.parametrize("template", ["chat_template.jinja", "variants/early_chat_template.jinja"])
def test_replies_and_their_ends_are_learned(template: str, tiny_tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """In both prompt formats; an <eoa> that a user writes is text."""
    monkeypatch.setattr(tiny_tokenizer, "chat_template", (ROOT / template).read_text(encoding="utf-8"))
    (row,) = encode("my.jsonl", {1: {"messages": TURNS}}, tiny_tokenizer, 512)
    learned = [i for i, mask in zip(row["input_ids"], row["assistant_masks"], strict=True) if mask]
    assert tiny_tokenizer.decode(learned) == "Old Tomas does.<eoa>老托马斯。<eoa>"
    assert row["input_ids"].count(tiny_tokenizer.convert_tokens_to_ids("<eoa>")) == 2


def test_long_conversations_are_left_out_and_counted(tiny_tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    found = {line: {"messages": [{"role": "system", "content": ""}, *TURNS[:2] * line]} for line in (1, 2, 3)}
    length = len(encode("my.jsonl", {2: found[2]}, tiny_tokenizer, 512)[0]["input_ids"])
    assert len(encode("my.jsonl", found, tiny_tokenizer, length)) == 2
    assert capsys.readouterr().out == (f"my.jsonl: 1 of 3 conversations have more than {length} tokens: left out\n")
    with pytest.raises(SystemExit, match=r"^my.jsonl: every conversation has more than 9 tokens; see --max-length.$"):
        encode("my.jsonl", found, tiny_tokenizer, 9)


def test_what_the_template_refuses_has_its_line(tiny_tokenizer) -> None:
    found = {7: {"messages": [{"role": "narrator", "content": "Once."}, *TURNS]}}
    with pytest.raises(SystemExit, match=r"^my.jsonl, line 7: Unknown role narrator: use .*$"):
        encode("my.jsonl", found, tiny_tokenizer, 512)
