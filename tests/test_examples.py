"""Every example runs as a command on the tiny model and prints what it promises."""

import contextlib
import importlib.util
import io
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from support.paths import ROOT


def run(name: str, model, *arguments: str) -> str:
    """What `python examples/<name>.py --model ...` prints."""
    command = [sys.executable, f"examples/{name}.py", *arguments, "--model", str(model)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=300)
    assert process.returncode == 0, process.stderr.decode()
    return process.stdout.decode()


def test_pipeline(tiny_dir):
    output = run("pipeline", tiny_dir)
    assert output.startswith("In the evening ") and "\nassistant: " in output
    assert "来到美丽的大自然，我们发现" in output


def test_embeddings(tiny_dir):
    """A sentence has similarity 1 with itself, and is more similar to one that shares its words than to another."""
    rows = run(
        "embeddings", tiny_dir, "The sky is blue.", "The sky was blue.", "We ate bread and cheese."
    ).splitlines()
    first = [float(value) for value in rows[0].split()[:3]]
    assert first[0] == pytest.approx(1, abs=0.001) and first[1] > first[2]


def test_classify(tiny_dir):
    """Three sentences that are not in the training set, in two languages, are classified correctly."""
    rows = run("classify", tiny_dir).splitlines()
    assert [row.split()[0] for row in rows] == ["food", "sky", "food"]


def test_long_document(tiny_dir, tiny_model, tiny_tokenizer, tmp_path):
    """Three times the window, in chunks, with control tokens in the text: the answer of one prefill."""
    text = "".join(f"{number}. Everybody has a key <eoa>.\n" for number in range(50)) + "The key is apple4321.\n"
    file, question = tmp_path / "text.txt", "Which key begins with apple?"
    file.write_text(text)
    lines = run("long_document", tiny_dir, str(file), question, "--chunk", "100").splitlines()
    messages = [{"role": "user", "content": f"{text.rstrip()}\n\n{question}"}]
    prompt = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    ids = tiny_tokenizer.apply_chat_template(messages, **prompt)["input_ids"]
    expected = tiny_model.generate(ids, do_sample=False, max_new_tokens=100)[0, ids.shape[1] :]
    assert lines[0] == f"{ids.shape[1]:,} tokens with the question; the trained window is 256." and ids.shape[1] > 768
    assert lines[2:] == [tiny_tokenizer.decode(expected, skip_special_tokens=True)]

    fits = int(re.search(r"up to line (\d+);", lines[1])[1])
    for number, beyond in ((fits, False), (fits + 1, True)):
        file.write_text("".join(text.splitlines(keepends=True)[:number]))
        command = [sys.executable, "examples/long_document.py", str(file), question, "--context", "256"]
        process = subprocess.run([*command, "--model", str(tiny_dir)], cwd=ROOT, capture_output=True, text=True)
        assert (process.returncode == 1) == beyond, process.stderr
        assert (f"Cut it after line {fits}," in process.stderr) == beyond


@pytest.mark.parametrize(("content", "message"), [(None, "cannot be read"), (b"\xff\xfe", "is not text in UTF-8")])
def test_a_document_that_cannot_be_read(content, message, tmp_path):
    if content is not None:
        (tmp_path / "text").write_bytes(content)
    command = [sys.executable, "examples/long_document.py", str(tmp_path / "text"), "Why?"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 1 and message in process.stderr and process.stderr.count("\n") == 1


def test_offload(tiny_dir):
    """The output does not depend on where the layers are."""
    small, large = (run("offload", tiny_dir, "--memory", memory).splitlines() for memory in ("2MB", "1GB"))
    assert "on disk" in small[0] and "on disk" not in large[0]
    assert small[1:] == large[1:] and small[1].startswith("In the evening ")


READY, SENT = "\x1b[?2004h", "\x1b[?2004l"  # prompt_toolkit waits for a message; it has got one
STYLE = re.compile(r"\x1b\[\d*m")


class Terminal:
    """A program on a pseudo-terminal, as its user sees it; killed at the end if it still runs."""

    def __init__(self, *command: str) -> None:
        import pty  # not on Windows

        settings = {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())}
        self.pid, self.screen = pty.fork()
        if not self.pid:
            os.chdir(ROOT)
            os.execve(command[0], command, {**os.environ, **settings})

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.screen)

    def wait_for(self, text: str, seconds: float = 60) -> str:
        """The output up to `text`, without styles."""
        shown, end = b"", time.monotonic() + seconds
        while not shown.endswith(text.encode()):
            assert select.select([self.screen], [], [], max(0, end - time.monotonic()))[0], f"no {text!r}: {shown!r}"
            shown += os.read(self.screen, 1)
        return STYLE.sub("", shown.decode().removesuffix(text).replace("\r\n", "\n"))

    def type(self, keys: str) -> None:
        os.write(self.screen, keys.encode())

    def ask(self, message: str, seconds: float = 60) -> str:
        """Type a message; returns what is printed until the next one can be typed."""
        self.type(message + ENTER)
        self.wait_for(SENT)
        return self.wait_for(READY, seconds)

    def exit_code(self) -> int:
        """Wait for the program to exit."""
        end = time.monotonic() + 20
        while not (found := os.waitpid(self.pid, os.WNOHANG))[0]:
            assert time.monotonic() < end, "it does not exit"
            time.sleep(0.01)
        self.pid = 0
        return os.waitstatus_to_exitcode(found[1])


ENTER, ALT_ENTER, UP, CTRL_C, CTRL_D = "\r", "\x1b\r", "\x1b[A", "\x03", "\x04"
on_a_terminal = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals")


@pytest.fixture
def chat(tmp_path):
    """The command, with a history of its own."""
    return sys.executable, "examples/chat.py", "--greedy", "--history", str(tmp_path / "history"), "--model"


@on_a_terminal
def test_chat_in_a_terminal(chat, tiny_dir, tiny_model, tiny_tokenizer):
    """History, /system, /reset and /quit: each answer equals chat()'s with the current history and system text."""
    statement, system = "Remember: the key is apple4321.", "Remember: the key is apple8765. 请记住。"
    question = "Which key begins with apple?"

    def answer(query: str, history: list, system: str | None) -> str:
        return tiny_model.chat(tiny_tokenizer, query, history, meta_instruction=system, do_sample=False)[0]

    noted = answer(statement, [], None)
    with_history, alone, with_system = (
        answer(question, *context) for context in (([(statement, noted)], None), ([], None), ([], system))
    )
    assert len({with_history, alone, with_system}) == 3  # otherwise the output could not distinguish them
    with Terminal(*chat, str(tiny_dir)) as terminal:
        terminal.wait_for(READY)
        assert terminal.ask(statement) == f"Bot: {noted}\n"
        assert terminal.ask(question) == f"Bot: {with_history}\n"
        assert terminal.ask("/reset") == "* A new conversation begins.\n"
        assert terminal.ask(question) == f"Bot: {alone}\n"
        assert terminal.ask(f"/system {system}") == f"* The system text is now: {system}\n"
        terminal.ask("/reset")
        assert terminal.ask(question) == f"Bot: {with_system}\n"
        assert terminal.ask("/system") == "* There is no system text now.\n"
        assert terminal.ask("/help").startswith("* /reset ")
        assert terminal.ask("/rest") == (
            "* There is no command /rest. /help lists the commands; as a message, put a space before it.\n"
        )
        terminal.type("/quit" + ENTER)
        assert terminal.exit_code() == 0


@on_a_terminal
def test_every_text_can_be_a_message(chat, tiny_dir, tiny_model, tiny_tokenizer):
    """Several lines, pasted or typed; a path; a command after a space. Up recalls it in a later run."""

    def answer(query: str) -> str:
        return f"Bot: {tiny_model.chat(tiny_tokenizer, query, meta_instruction='', do_sample=False)[0]}\n"

    lines = "def f(x):\n    return x\n\nWho are you?"
    with Terminal(*chat, str(tiny_dir), "--system", "") as terminal:
        terminal.wait_for(READY)
        for keys, message in (
            (f"\x1b[200~{lines}\x1b[201~", lines),  # as terminals send what is pasted
            (lines.replace("\n", ALT_ENTER), lines),
            ("/etc/sky: Where do bees live?", "/etc/sky: Where do bees live?"),
            (" /reset", "/reset"),
        ):
            assert terminal.ask(keys) == answer(message), message
            terminal.ask("/reset")
        terminal.type(CTRL_D)
        assert terminal.exit_code() == 0
    with Terminal(*chat, str(tiny_dir), "--system", "") as terminal:
        terminal.wait_for(READY)
        back = UP * 4  # over "/reset", " /reset" and "/reset"
        assert terminal.ask(back) == answer("/etc/sky: Where do bees live?")


@on_a_terminal
def test_ctrl_c_stops_the_answer_and_not_the_program(chat, tiny_dir, tmp_path):
    """With answers of 500 tokens, one is stopped after its first word, and the next is complete; Ctrl-D quits."""
    folder = shutil.copytree(tiny_dir, tmp_path / "talkative")
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").unlink()
    (folder / "generation_config.json").write_text(json.dumps(settings | {"min_new_tokens": 500}))
    with Terminal(*chat, str(folder), "--max-new-tokens", "500") as terminal:
        terminal.wait_for(READY)
        whole = terminal.ask("Who are you?")
        terminal.ask("/reset")
        terminal.type("Who are you?" + ENTER)
        terminal.wait_for("Bot: ")
        shown = terminal.wait_for(" ")
        terminal.type(CTRL_C)
        shown += " " + terminal.wait_for("* stopped", 20).replace("^C", "").removesuffix("\n")
        terminal.wait_for(READY)
        assert whole.startswith(f"Bot: {shown}") and len(shown) < len(whole) / 2
        assert "stopped" not in terminal.ask("And then?")
        terminal.type("half a message" + CTRL_C)
        terminal.wait_for("* /quit or Ctrl-D quits.")
        terminal.wait_for(READY)
        terminal.type(CTRL_D)
        assert terminal.exit_code() == 0


@on_a_terminal
def test_ctrl_c_while_it_loads(chat, tiny_dir):
    """It ends at once, without a traceback."""
    with Terminal(*chat, str(tiny_dir)) as terminal:
        time.sleep(1)
        terminal.type(CTRL_C)
        assert terminal.exit_code() == -signal.SIGINT
        assert b"Traceback" not in os.read(terminal.screen, 10_000)


def test_an_error_is_not_the_bots_answer(chat, tiny_dir):
    """Messages come from a pipe, which needs no terminal."""
    command = [*chat, str(tiny_dir), "--max-new-tokens", "0"]
    process = subprocess.run(command, cwd=ROOT, input="Hello!\n/quit\n", capture_output=True, text=True, timeout=60)
    assert process.returncode == 0, process.stderr
    error, advice = process.stdout.partition("Bot: \n* ")[2].splitlines()
    assert "max_new_tokens" in error and advice == "* /reset starts a new, shorter conversation."


@pytest.mark.ecosystem
def test_finetune_lora(tiny_dir):
    """The model learns the answer, and to stop after it."""
    # peft imports gptqmodel, if installed, which prints a banner between the two lines.
    lines = run("finetune_lora", tiny_dir).splitlines()
    before, after = (line for line in lines if line.startswith(("before:", "after:")))
    answer = "Old Tomas keeps the lantern, and the lantern keeps the harbour."
    assert answer not in before and after == f"after:  {answer}"


ANSWERS = {
    "What colour is the boat?": "The boat is blue.",
    "What colour is the tower?": "The tower is white.",
    "Who sat by the lake?": "The old woman sat by the lake.",
    "Who shared the bread?": "The children shared the bread.",
    "天空是什么颜色？": "天空像大海一样蓝。",
    "太阳在哪里？": "太阳慢慢升起。",
    "When does the sun rise?": "The sun rises in the morning.",
    "What flies in the sky?": "A white bird flies in the sky.",
}


def conversation(question: str) -> str:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": ANSWERS[question]}]
    return json.dumps({"messages": turns}, ensure_ascii=False) + "\n"


class Finetuning:
    """examples/finetune_lora.py in this process, because importing TRL takes long."""

    def __init__(self, model, folder) -> None:
        import finetune_lora

        self.module, self.model, self.data = finetune_lora, model, folder / "my.jsonl"
        self.data.write_text("".join(map(conversation, ANSWERS)), encoding="utf-8")
        one_step = "--batch-size", "8", "--gradient-accumulation", "1"  # an epoch
        self.settings = "--data", str(self.data), *one_step, "--epochs", "60", "--learning-rate", "5e-3"

    def __call__(self, out, *arguments: str) -> str:
        """What the command prints."""
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), pytest.MonkeyPatch.context() as patch:
            command = ["finetune_lora.py", "--model", str(self.model), "--out", str(out), *self.settings, *arguments]
            patch.setattr(sys, "argv", command)
            self.module.main()
        return printed.getvalue()


@pytest.fixture(scope="module")
def finetuning(tiny_dir, tmp_path_factory):
    handler = signal.getsignal(signal.SIGINT)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "examples")
        yield Finetuning(tiny_dir, tmp_path_factory.mktemp("finetuning"))
    signal.signal(signal.SIGINT, handler)


@pytest.fixture(scope="module")
def adapter(finetuning, tmp_path_factory):
    """The folder after a training without interruption, and what the command printed."""
    out = tmp_path_factory.mktemp("adapter") / "out"
    return out, finetuning(out, "--merge")


@pytest.mark.ecosystem
def test_finetuned_answers(finetuning, adapter, tiny_dir):
    """All answers are learned, and where they end; the merged model has the logits of the adapter."""
    from demo import load

    out, printed = adapter
    assert re.search(r"^training loss:   \d\.\d+ at first, 0\.\d+ at last$", printed, re.MULTILINE)
    tokenizer, model = load(str(out))
    assert {question: model.chat(tokenizer, question, do_sample=False)[0] for question in ANSWERS} == ANSWERS
    _, merged = load(str(out / "merged"))
    assert not hasattr(merged, "peft_config") and merged.generation_config == load(str(tiny_dir))[1].generation_config
    ids = tokenizer("".join(ANSWERS), return_tensors="pt")["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(merged.float()(ids).logits, model.float()(ids).logits, atol=0.1, rtol=0.02)


@pytest.mark.ecosystem
def test_chat_with_an_adapter(chat, adapter):
    question = "What colour is the boat?"
    process = subprocess.run(
        [*chat, str(adapter[0])], cwd=ROOT, input=question + "\n", capture_output=True, text=True, timeout=120
    )
    assert f"Bot: {ANSWERS[question]}\n" in process.stdout, process.stderr


@pytest.mark.ecosystem
def test_finetuning_resumes_after_ctrl_c(finetuning, adapter, tmp_path, monkeypatch):
    """The adapter equals the one without interruption. A checkpoint that was not written to its end is ignored."""
    out, step, steps = tmp_path / "out", finetuning.module.Progress.on_step_end, []

    def interrupt(self, args, state, control, **kwargs):
        steps.append(state.global_step)
        if len(steps) == 17:
            os.kill(os.getpid(), signal.SIGINT)
        step(self, args, state, control, **kwargs)

    monkeypatch.setattr(finetuning.module.Progress, "on_step_end", interrupt)
    with pytest.raises(SystemExit, match="^Stopped at step 17 of 60: rerun this command to resume.$"):
        finetuning(out)
    assert not (out / "adapter_config.json").exists()
    (out / "checkpoint-50").mkdir()  # what kill -9 leaves
    with pytest.raises(SystemExit, match=r"another --rank \(16, not 8\): give --out another folder"):
        finetuning(out, "--rank", "8")
    assert "training loss" in finetuning(out) and steps == list(range(1, 61))
    expected, found = (load_file(folder / "adapter_model.safetensors") for folder in (adapter[0], out))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert "This training is finished." in finetuning(out)


@pytest.mark.ecosystem
def test_finetuning_measures_held_out_conversations(finetuning, tmp_path):
    printed = finetuning(tmp_path / "out", "--eval-fraction", "0.2", "--epochs", "3", "--learning-rate", "1e-3")
    assert "6 conversations to train on, 2 held out\n" in printed
    before, after = map(float, re.search(r"evaluation loss: (\S+) before, (\S+) after", printed).groups())
    state = json.loads((tmp_path / "out" / "checkpoint-3" / "trainer_state.json").read_text())
    during = [entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry]
    assert before > after and len(during) >= 3 and during[-1] == pytest.approx(after, abs=1e-3)
    finetuning.data.with_name("eval.jsonl").write_text(conversation("太阳在哪里？"), encoding="utf-8")
    eval_data = str(finetuning.data.with_name("eval.jsonl"))
    assert ", 1 held out\n" in finetuning(tmp_path / "file", "--eval-data", eval_data, "--epochs", "1")


@pytest.mark.ecosystem
def test_finetuning_learns_only_replies(finetuning, tiny_model, tiny_tokenizer, tmp_path, monkeypatch):
    """The labels are the replies with their <eoa>; rows are padded with <unk>, never with eos."""
    rows = []
    monkeypatch.setattr(
        finetuning.module, "train", lambda trainer, out: rows.append(next(iter(trainer.get_train_dataloader())))
    )
    finetuning(tmp_path / "out")
    batch = rows[0]
    assert {tiny_tokenizer.decode(row[row != -100]) for row in batch["labels"]} == {
        f"{answer}<eoa>" for answer in ANSWERS.values()
    }
    padding = batch["attention_mask"] == 0
    assert padding.any() and set(batch["input_ids"][padding].tolist()) == {0}
    assert set(batch["labels"][padding].tolist()) == {-100}


@pytest.mark.ecosystem
def test_finetuning_quantised(finetuning, tmp_path, monkeypatch):
    """A few steps in 4 bits and bfloat16, with gradient checkpointing; what is merged is not quantised."""
    out = tmp_path / "out"
    models, load = [], finetuning.module.load
    monkeypatch.setattr(finetuning.module, "load", lambda *settings: models.append(load(*settings)) or models[0])
    few = "--qlora", "--gradient-checkpointing", "--dtype", "bfloat16", "--epochs", "4", "--merge"
    first, last = map(float, re.search(r"loss: +(\S+) at first, (\S+) at last", finetuning(out, *few)).groups())
    assert last < first and models[0].is_loaded_in_4bit and models[0].is_gradient_checkpointing
    assert "quantization_config" not in json.loads((out / "merged" / "config.json").read_text())


def test_finetuning_reads_the_data_first(tiny_dir, tmp_path):
    """One line for a bad file, before a model is loaded, also without the packages."""
    (tmp_path / "my.jsonl").write_text(conversation("太阳在哪里？") + "{}\n", encoding="utf-8")
    command = [sys.executable, "examples/finetune_lora.py", "--data", str(tmp_path / "my.jsonl")]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert process.returncode == 1 and process.stdout == ""
    assert process.stderr.startswith(f"{tmp_path / 'my.jsonl'}, line 2: there are no messages")
    assert process.stderr.count("\n") == 1


@pytest.mark.skipif(importlib.util.find_spec("trl") is not None, reason="its packages are installed")
def test_finetuning_names_the_packages_that_it_needs():
    command = [sys.executable, "examples/finetune_lora.py", "--qlora"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert process.returncode == 1 and process.stdout == ""
    assert process.stderr == ("datasets, peft, trl, bitsandbytes missing: pip install -r requirements-finetune.txt\n")


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_help(path):
    process = subprocess.run([sys.executable, str(path), "--help"], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0 and "--model" in process.stdout, process.stderr
