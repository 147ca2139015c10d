"""chat() and stream_chat(): the official signatures, on top of the chat template, generate and streamers."""

import inspect
import logging
import re
import shutil
import subprocess
import sys
import threading
import time

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    StoppingCriteriaList,
    TextIteratorStreamer,
    pipeline,
)

from support.paths import GOLDEN, ROOT


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer):
    return tiny_tokenizer


def test_without_a_template_the_error_says_where_to_get_one(model, tiny_dir, tmp_path):
    """As with a folder of 2023 whose code alone was replaced. As a file it works, once it is there."""
    folder = shutil.copytree(tiny_dir, tmp_path / "old", ignore=shutil.ignore_patterns("chat_template.jinja"))
    old = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    messages = [{"role": "user", "content": "Who are you?"}]
    for call in (
        lambda: model.chat(old, "Who are you?"),
        lambda: next(model.stream_chat(old, "Who are you?")),
        lambda: old.apply_chat_template(messages, tokenize=False),
        lambda: pipeline("text-generation", model=model, tokenizer=old)(messages),
    ):
        with pytest.raises(ValueError, match="no chat template: put chat_template.jinja .* upload_to_hub.py"):
            call()
    shutil.copy(ROOT / "chat_template.jinja", folder)
    new = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert model.chat(new, "Who are you?", do_sample=False)[0].startswith("I am InternLM")


class Forced(LogitsProcessor):
    """Forces generation to output exactly these tokens."""

    def __init__(self, prompt_length: int, tokens: list[int]) -> None:
        self.prompt_length, self.tokens = prompt_length, tokens

    def __call__(self, input_ids, scores):
        at = input_ids.shape[1] - self.prompt_length
        forced = torch.full_like(scores, float("-inf"))
        forced[:, self.tokens[min(at, len(self.tokens) - 1)]] = 0
        return forced


def forcing(tokenizer, text, query="hi", **settings):
    """Arguments for chat() that force the reply to be `text`, whose last token is repeated."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": query}], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    return {"logits_processor": LogitsProcessorList([Forced(len(prompt), tokens)]), "do_sample": False, **settings}


def test_reply_ends_at_eoa_whatever_the_generation_config(model, tokenizer, monkeypatch):
    """Published generation configs list only </s>; without <eoa>, the model would generate the user's next turn."""
    monkeypatch.setattr(model.generation_config, "eos_token_id", 2)
    forced = forcing(tokenizer, "good morning<eoa>\n<|User|>:and then")
    response, history = model.chat(tokenizer, "hi", **forced)
    assert response == "good morning"
    assert history == [("hi", "good morning")]


def test_caller_may_choose_other_stop_tokens(model, tokenizer):
    end = tokenizer.convert_tokens_to_ids("<eoh>")
    response, _ = model.chat(tokenizer, "hi", eos_token_id=end, **forcing(tokenizer, "one<eoa>two<eoh>three"))
    assert response == "onetwo"


def test_a_generation_config_cannot_disable_eoa(model, tokenizer):
    """`<eoa>` always ends a reply, as do the config's stop tokens and strings; chat's arguments take precedence."""
    eoh = tokenizer.convert_tokens_to_ids("<eoh>")
    arguments = {**forcing(tokenizer, "one<eoh>two<eoa>three"), "max_new_tokens": 20}
    for settings, reply in (
        ({}, "onetwo"),
        ({"eos_token_id": 2, "max_new_tokens": 1, "do_sample": True}, "onetwo"),
        ({"eos_token_id": eoh}, "one"),
        ({"eos_token_id": [2, eoh]}, "one"),
        ({"stop_strings": ["ne"]}, "one"),
        ({"stop_strings": "never", "return_dict_in_generate": True, "output_scores": True}, "onetwo"),
    ):
        config = GenerationConfig(**settings)
        *_, (streamed, _) = model.stream_chat(tokenizer, "hi", generation_config=config, **arguments)
        response, _ = model.chat(tokenizer, "hi", generation_config=config, **arguments)
        assert streamed == response == reply, settings


def test_the_template_renders_the_prompt(model, tokenizer, monkeypatch):
    """History with the default system text, a custom one, or none; with exactly one <s>."""
    seen = []
    monkeypatch.setattr(model, "generate", lambda **kwargs: seen.append(kwargs["input_ids"]) or kwargs["input_ids"])
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    for system in (None, "", "Be brief."):
        model.chat(tokenizer, "c", [("a", "b")], meta_instruction=system)
        messages = turns if system is None else [{"role": "system", "content": system}, *turns]
        expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert seen[-1][0].tolist() == expected
        assert expected.count(tokenizer.bos_token_id) == 1
    text = [tokenizer.decode(ids[0]) for ids in seen]
    assert text[0].startswith("<s><|System|>:You are an AI assistant whose name is InternLM")
    assert text[1].startswith("<s><|User|>:a\n<|Bot|>:b<eoa>\n<|User|>:c\n<|Bot|>:")
    assert text[2].startswith("<s><|System|>:Be brief.\n<|User|>:a")


def test_greedy_replies_get_no_sampling_settings(model, tokenizer, caplog, monkeypatch):
    """generate warns of a temperature or top_p that greedy search ignores: without such an argument none is passed."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    logging.Logger.warning_once.cache_clear()  # another test may have triggered the warning
    model.chat(tokenizer, "hi", do_sample=False, max_new_tokens=2)
    assert not caplog.records
    model.generate(**tokenizer("hi", return_tensors="pt"), do_sample=False, temperature=0.5, max_new_tokens=2)
    assert "temperature" in caplog.text


def test_sampling_settings_reach_generate(model, tokenizer, monkeypatch):
    """By name or by position, of chat and stream_chat."""
    seen = []

    def generate(input_ids, streamer, **settings):
        seen.append([settings[name] for name in ("max_new_tokens", "do_sample", "temperature", "top_p")])
        if streamer:
            streamer.end()
        return input_ids

    monkeypatch.setattr(model, "generate", generate)
    model.chat(tokenizer, "hi")
    model.chat(tokenizer, "hi", None, None, 7, True, 0.6, 0.7)
    list(model.stream_chat(tokenizer, "hi"))
    list(model.stream_chat(tokenizer, "hi", None, 7, True, 0.6, 0.7))
    list(model.stream_chat(tokenizer, "hi", max_new_tokens=7, temperature=0.6, top_p=0.7))
    default, given = [1024, True, 0.8, 0.8], [7, True, 0.6, 0.7]
    assert seen == [default, given, default, given, given]


def test_callers_stopping_criteria_end_a_reply(model, tokenizer):
    """chat's, and stream_chat's beside its own."""

    def stop_after_three(input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= prompt_length + 3)

    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=True)
    prompt_length = len(prompt["input_ids"])
    words = tokenizer("one two three four five six", add_special_tokens=False)["input_ids"]
    settings = forcing(tokenizer, "one two three four five six<eoa>", max_new_tokens=50)
    settings["stopping_criteria"] = StoppingCriteriaList([stop_after_three])
    response, _ = model.chat(tokenizer, "hi", **settings)
    *_, (streamed, _) = model.stream_chat(tokenizer, "hi", **settings)
    assert streamed == response == tokenizer.decode(words[:3])
    *_, (streamed, _) = model.stream_chat(tokenizer, "hi", **settings | {"stopping_criteria": None})
    assert streamed == tokenizer.decode(words)


def test_a_tokenizer_without_eoa(model):
    """Its id would be that of <unk>, which ends no reply."""
    vocabulary = ["<unk>", "<s>", "</s>", "hello", "world", "odd"]
    words = Tokenizer(WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    template = "{% for message in messages %}{{ message.content }} {% endfor %}"
    other = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>", chat_template=template
    )
    forced = LogitsProcessorList([Forced(1, other.convert_tokens_to_ids(["hello", "strange", "world", "</s>"]))])
    response, _ = model.chat(other, "odd", logits_processor=forced, do_sample=False, max_new_tokens=9)
    assert response == "hello world"


def test_history_is_not_changed(model, tokenizer):
    history = [("a", "b")]
    _, longer = model.chat(tokenizer, "hi", history, max_new_tokens=4)
    *_, (_, streamed) = model.stream_chat(tokenizer, "hi", history, max_new_tokens=4)
    assert history == [("a", "b")]
    assert len(longer) == len(streamed) == 2


SYSTEM = {"role": "system", "content": "Be brief."}
ASKED = {"role": "user", "content": "a"}
ANSWERED = {"role": "assistant", "content": "b"}


@pytest.mark.parametrize("system", ([], [SYSTEM]), ids=("no system", "system"))
def test_a_history_of_messages(model, tokenizer, system):
    """The form of OpenAI's and later models' chat: the prompt is that of the pairs, and messages come back."""
    meta = SYSTEM["content"] if system else None
    settings = {"do_sample": False, "max_new_tokens": 8}
    response, pairs = model.chat(tokenizer, "hi", [("a", "b")], meta_instruction=meta, **settings)
    assert pairs == [("a", "b"), ("hi", response)]
    history = [*system, ASKED, ANSWERED]
    expected = [*history, {"role": "user", "content": "hi"}, {"role": "assistant", "content": response}]
    assert model.chat(tokenizer, "hi", history, **settings) == (response, expected)
    assert list(model.stream_chat(tokenizer, "hi", tuple(history), **settings))[-1] == (response, expected)
    assert history == [*system, ASKED, ANSWERED]
    assert model.chat(tokenizer, "hi", expected, **settings)[1][:-2] == expected


def test_a_history_may_hold_tool_calls(model, tokenizer, monkeypatch):
    """Messages are passed to the template as they are."""
    seen = []
    monkeypatch.setattr(model, "generate", lambda **kwargs: seen.append(kwargs["input_ids"]) or kwargs["input_ids"])
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    parts = {"role": "assistant", "content": [{"type": "text", "text": "done"}]}
    messages = [ASKED, {**ANSWERED, "tool_calls": [call]}, {"role": "tool", "content": "42"}, parts]
    model.chat(tokenizer, "hi", messages, meta_instruction="")
    turns = (
        '<|User|>:a\n<|Bot|>:b\nAction: f\nAction Input: {"x": 1}<eoa>\n<|System|>:Response: 42\n<|Bot|>:done<eoa>\n'
    )
    assert tokenizer.decode(seen[0][0]) == f"<s>{turns}<|User|>:hi\n<|Bot|>:"


NOT_PAIRS = r"is neither a list of \(query, response\) pairs of strings nor of messages: write \[\("
WRONG = {  # query, history, meta_instruction, message
    "string": ("hi", "ab", None, f"^history='ab' {NOT_PAIRS}"),
    "empty string": ("hi", "", None, NOT_PAIRS),
    "strings": ("hi", ["ab", "cd"], None, NOT_PAIRS),
    "triples": ("hi", [("a", "b", "c")], None, NOT_PAIRS),
    "one nested": ("hi", [[("a", "b")]], None, NOT_PAIRS),
    "two nested": ("hi", [[("a", "b"), ("c", "d")]], None, NOT_PAIRS),
    "no answer": ("hi", [("a", None)], None, NOT_PAIRS),
    "numbers": ("hi", [(1, 2)], None, NOT_PAIRS),
    "one message": ("hi", ASKED, None, NOT_PAIRS),
    "no role": ("hi", [{"query": "a", "response": "b"}], None, NOT_PAIRS),
    "both": ("hi", [("a", "b"), ASKED, ANSWERED], None, NOT_PAIRS),
    "both, messages first": ("hi", [ASKED, ANSWERED, ("a", "b")], None, NOT_PAIRS),
    "generator": ("hi", (pair for pair in [("a", "b")]), None, NOT_PAIRS),
    "query inside": ("hi", [ASKED, ANSWERED, {"role": "user", "content": "hi"}], None, "ends with a question.*'hi'"),
    "two systems": ("hi", [SYSTEM, ASKED, ANSWERED], "x", "meta_instruction='x' and a history that begins with a sys"),
    "system twice": ("hi", [SYSTEM], "", "meta_instruction='' and a history that begins with a system message"),
    "no query": (None, [ASKED, ANSWERED], None, "^query=None is not a string: pass the user's new message"),
    "messages as query": ([ASKED], None, None, r"^query=\[\{'role': 'user'.* is not a string"),
    "parts as query": ([{"type": "text", "text": "hi"}], None, None, "is not a string"),
    "bytes": (b"hi", None, None, "^query=b'hi' is not a string"),
}


@pytest.mark.parametrize("query, history, meta, message", WRONG.values(), ids=WRONG)
def test_wrong_histories_and_queries_are_refused(model, tokenizer, query, history, meta, message):
    """Messages were once sent as a user's "role" and a bot's "content"."""
    for answer in (model.chat, lambda *given, **settings: list(model.stream_chat(*given, **settings))):
        with pytest.raises(ValueError, match=message) as caught:
            answer(tokenizer, query, history, meta_instruction=meta, max_new_tokens=1)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("reply", ("<eoa>", "<eoh><eoa>", "</s>"))
def test_an_empty_reply_is_streamed_once(model, tokenizer, reply):
    """After `for response, history in stream_chat(...)` there is a history."""
    expected = model.chat(tokenizer, "hi", **forcing(tokenizer, reply))
    assert expected == ("", [("hi", "")])
    assert list(model.stream_chat(tokenizer, "hi", **forcing(tokenizer, reply))) == [expected]


@pytest.mark.parametrize("query", ("Who are you?", "你好"))
def test_the_stream_ends_with_the_reply_of_chat_at_the_same_seed(model, tokenizer, query):
    torch.manual_seed(5)
    expected = model.chat(tokenizer, query, max_new_tokens=60)
    torch.manual_seed(5)
    pairs = list(model.stream_chat(tokenizer, query, max_new_tokens=60))
    assert pairs[-1] == expected
    torch.manual_seed(5)
    assert model.chat(tokenizer, query, max_new_tokens=60) == expected
    for (earlier, _), (later, history) in zip(pairs, pairs[1:], strict=False):
        assert later.startswith(earlier) and later != earlier
        assert history == [(query, later)]


TEXTS = (
    "plain words, and a line\nbreak",
    "书生·浦语，龘靐齉 𠀀𠮷",
    "emoji \U0001f469‍\U0001f469‍\U0001f467 \U0001f1e8\U0001f1f3 \U0001f44d\U0001f3fd end",
    "combining é ñ ก็ हिन्दी",
    "def f(x):\n    return {'a': x != 1}  # ok\n\n\tpass",
    "  spaces   kept  ",
)


@pytest.mark.parametrize("text", TEXTS)
def test_stream_is_lossless(model, tokenizer, text):
    """Characters of several byte tokens never appear as replacement characters."""
    shown = [response for response, _ in model.stream_chat(tokenizer, "hi", **forcing(tokenizer, text + "<eoa>"))]
    assert shown[-1] == text
    assert len(set(shown)) == len(shown) and all(shown)  # nothing is shown before there is something, or twice
    assert not any("�" in response for response in shown)


def test_error_in_generation_reaches_the_caller(model, tokenizer):
    class Broken(LogitsProcessor):
        def __call__(self, input_ids, scores):
            raise RuntimeError("the sky is falling")

    stream = model.stream_chat(tokenizer, "hi", logits_processor=LogitsProcessorList([Broken()]))
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="the sky is falling"):
        list(stream)
    assert time.monotonic() - start < 5


def test_an_undecodable_token_is_an_error_and_does_not_hang(tiny_dir, tokenizer):
    """With an embedding padded beyond the vocabulary, ids can be sampled that not even streamer.end() decodes."""
    model = AutoModelForCausalLM.from_pretrained(tiny_dir, trust_remote_code=True, dtype=torch.float32)
    model.resize_token_embeddings(len(tokenizer) + 64)
    forced = LogitsProcessorList([Forced(0, [len(tokenizer) + 63])])
    caught: list[BaseException] = []

    def consume():
        try:
            list(model.stream_chat(tokenizer, "hi", logits_processor=forced, max_new_tokens=3))
        except ValueError as error:
            caught.append(error)

    consumer = threading.Thread(target=consume, daemon=True)
    consumer.start()
    consumer.join(timeout=20)
    assert not consumer.is_alive()
    assert "is outside the vocabulary" in str(caught[0])


def test_signatures_are_the_official_ones(model):
    """Names, order and defaults of 2023, so that positional calls mean what they meant."""
    sampling = {"max_new_tokens": 1024, "do_sample": True, "temperature": 0.8, "top_p": 0.8}
    for method, expected in (
        (model.chat, {"streamer": None, **sampling, "meta_instruction": None}),
        (model.stream_chat, sampling),
    ):
        tokenizer, query, history, *rest = inspect.signature(method).parameters.values()
        assert [tokenizer.name, query.name, history.name] == ["tokenizer", "query", "history"]
        assert history.default is None
        named = {each.name: each.default for each in rest if each.kind is not each.VAR_KEYWORD}
        assert list(named.items()) == list(expected.items())


OUT_OF_MEMORY = """
import resource, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(
    sys.argv[1], trust_remote_code=True, dtype=torch.float32, attn_implementation="eager"
)
model.chat(tokenizer, "hi", max_new_tokens=2)
in_use = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (in_use + 200_000_000, -1))
history = [("What is a lake? " * 500, "Water.")] * 2
for answer in (model.chat, lambda *given: list(model.stream_chat(*given))):
    try:
        answer(tokenizer, "hi", history)
    except torch.OutOfMemoryError as error:
        print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the memory of a process, which needs Linux")
def test_out_of_memory_errors_name_the_fix(tiny_dir):
    """A process without enough memory for the attention of a long history; chat and stream_chat alike."""
    child = subprocess.run(
        [sys.executable, "-c", OUT_OF_MEMORY, str(tiny_dir)], capture_output=True, text=True, timeout=120
    )
    assert child.returncode == 0, child.stderr
    for line in (lines := child.stdout.splitlines()):
        assert re.fullmatch(
            r"Out of memory at a prompt of \d{4,} tokens with a history of 2: drop its oldest turns or set a smaller "
            r"max_new_tokens \(1024 now\).",
            line,
        )
    assert len(lines) == 2


@pytest.mark.parametrize("closed", [True, False], ids=["closed", "left"])
def test_abandoned_stream_stops_generating(closed, model, tokenizer):
    """Closing the iterator, or leaving the loop, ends the thread at its next token, long before max_new_tokens."""
    before, others = threading.active_count(), set(threading.enumerate())
    stream = model.stream_chat(tokenizer, "hi", max_new_tokens=100_000, **forcing(tokenizer, "word " * 100_000))
    for _ in range(3):
        next(stream)
    (generating,) = set(threading.enumerate()) - others
    assert generating.daemon  # a program may end while it runs
    start = time.monotonic()
    if closed:
        stream.close()
    del stream  # as after `break`
    assert threading.active_count() == before
    assert time.monotonic() - start < 5


def test_an_abandoned_stream_stops_where_its_tokens_are(model):
    """generate combines the criteria of all callers on the device of the tokens."""
    closed = threading.Event()
    stop = sys.modules[type(model).chat.__module__]._StopWhen(closed)
    assert stop(torch.ones(2, 3, device="meta"), None).device.type == "meta"
    for expected in (False, True):
        assert stop(torch.ones(2, 3), None).tolist() == [expected, expected]
        closed.set()


def test_a_user_supplied_streamer(model, tokenizer):
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    response, _ = model.chat(tokenizer, "hi", streamer=streamer, **forcing(tokenizer, "good day to you<eoa>"))
    assert "".join(streamer) == response == "good day to you"


def test_control_tokens_in_a_query_stay_text(model, tokenizer, monkeypatch):
    """`<eoa>` typed by a user neither ends the turn nor reaches the model as the control token."""
    seen = []
    monkeypatch.setattr(model, "generate", lambda **kwargs: seen.append(kwargs["input_ids"]) or kwargs["input_ids"])
    model.chat(tokenizer, "<s>a</s><eoa><eoh>", [("q<eoa>", "a</s>")], meta_instruction="<eoa>")
    ids = seen[0][0].tolist()
    special = [tokenizer.convert_ids_to_tokens(i) for i in ids if i in set(tokenizer.all_special_ids)]
    assert special == ["<s>", "<eoa>"]  # from the template: at the start, and after the reply in the history
    assert tokenizer.decode(ids).count("<eoa>") == 4


def test_batched_chats_equal_single_ones(model, tokenizer):
    """Left-padded prompts of several conversations: each gets its greedy single reply."""
    chats = [[{"role": "user", "content": query}] for query in ("Who are you?", "你好", "What is 2 + 3?")]
    settings = {
        "max_new_tokens": 30,
        "do_sample": False,
        "eos_token_id": [2, tokenizer.convert_tokens_to_ids("<eoa>")],
    }
    batch = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True
    )
    together = model.generate(**batch, **settings)[:, batch["input_ids"].shape[1] :]
    for row, chat in enumerate(chats):
        alone, _ = model.chat(tokenizer, chat[0]["content"], max_new_tokens=30, do_sample=False)
        assert tokenizer.decode(together[row], skip_special_tokens=True) == alone


def test_a_conversation_continues_beyond_the_window(model, tokenizer):
    """Turn after turn past the trained window, where dynamic NTK applies; replies still end at <eoa>."""
    history, window = [], model.config.max_position_embeddings
    for _ in range(40):
        response, history = model.chat(tokenizer, "Who are you?", history, do_sample=False, max_new_tokens=60)
        length = len(tokenizer(str(history))["input_ids"])
        if length > 1.5 * window:
            break
    assert length > 1.5 * window
    assert response and "<" not in response


def test_base_model_names_the_class_that_chats(modeling):
    """AutoModel was the causal LM in 2023; scripts that call .chat on it get an error that names the right class."""
    model = modeling.InternLMModel.from_pretrained(GOLDEN / "tiny_7b_origin")
    for method in (model.chat, model.stream_chat):
        with pytest.raises(AttributeError, match="AutoModelForCausalLM"):
            method(None, "hi")
