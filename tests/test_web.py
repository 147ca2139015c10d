"""The page of `make web` in a real browser: headless Chromium, driven by Playwright."""

import importlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from support.paths import ROOT


pytestmark = pytest.mark.web

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ANSWER = "[data-testid=bot]"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    assert CHROMIUM, "Chromium is not installed: apt-get install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def serving(*command: object, **settings: str) -> Iterator[str]:
    """The address of a page that a process serves."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, *map(str, command), "--port", str(port)],
        cwd=ROOT,
        env={**os.environ, **settings},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        for line in process.stdout:
            if found := re.search(r"http://\S+", line):
                listening = [c.laddr for c in psutil.Process(process.pid).net_connections() if c.status == "LISTEN"]
                assert [(address.ip, address.port) for address in listening] == [("127.0.0.1", port)]
                yield found[0]
                break
        else:
            raise AssertionError(f"it ends with {process.wait()}")
    finally:
        process.terminate()
        process.communicate(timeout=20)


@pytest.fixture(scope="module")
def url(tiny_dir: Path) -> Iterator[str]:
    with serving("examples/web.py", "--model", tiny_dir) as url:
        yield url


@contextmanager
def opened(browser: Browser, url: str, locale: str = "en-US", greedy: bool = True) -> Iterator[Page]:
    """The page, which takes the likeliest token if `greedy`, and asks no other computer for anything."""
    with browser.new_context(locale=locale) as context:
        page = context.new_page()
        page.set_default_timeout(20_000)
        hosts: set[str | None] = set()
        page.on("request", lambda request: hosts.add(urlsplit(request.url).hostname))
        page.goto(url)
        if greedy:
            page.get_by_role("button", name="▼").click()
            page.get_by_label(re.compile("likeliest|贪心")).check()
        yield page
        assert hosts <= {"127.0.0.1", None}


def ask(page: Page, text: str) -> None:
    box = page.get_by_test_id("textbox").first
    box.fill(text)
    box.press("Enter")


def answer(model, tokenizer, *queries: str, system: str | None = None) -> str:
    """The last of the answers of chat()."""
    history, response = [], ""
    for query in queries:
        response, history = model.chat(tokenizer, query, history, meta_instruction=system, do_sample=False)
    return response


def test_a_conversation_in_two_languages(browser, url, tiny_model, tiny_tokenizer):
    """The answers are chat()'s, of the whole conversation; the settings are in the browser's language."""
    for locale, label, queries in (
        ("en-US", "System text", ("Remember: the key is apple4321.", "Which key begins with apple?")),
        ("zh-CN", "系统提示", ("你是谁？", "你好")),
    ):
        with opened(browser, url, locale) as page:
            expect(page.get_by_label(label)).to_be_visible()
            for asked in range(len(queries)):
                ask(page, queries[asked])
                expected = answer(tiny_model, tiny_tokenizer, *queries[: asked + 1])
                expect(page.locator(ANSWER).nth(asked)).to_have_text(expected, timeout=30_000)


def test_system_text_and_retry(browser, url, tiny_model, tiny_tokenizer):
    system, question = "Remember: the key is apple8765.", "Which key begins with apple?"
    with opened(browser, url) as page:
        ask(page, question)
        expect(page.locator(ANSWER)).to_have_text(answer(tiny_model, tiny_tokenizer, question), timeout=30_000)
        page.get_by_label("System text").fill(system)
        page.get_by_label("System text").blur()
        page.get_by_label("Retry").click()
        expected = answer(tiny_model, tiny_tokenizer, question, system=system)
        expect(page.locator(ANSWER)).to_have_text(expected, timeout=30_000)


def test_a_reload_keeps_the_conversation(browser, url, tiny_model, tiny_tokenizer):
    question = "Where do bees live?"
    with opened(browser, url) as page:
        ask(page, question)
        expected = answer(tiny_model, tiny_tokenizer, question)
        expect(page.locator(ANSWER)).to_have_text(expected, timeout=30_000)
        earlier = page.get_by_text(question).first  # in the list of conversations
        page.reload()
        expect(page.locator(ANSWER)).to_have_count(0)
        earlier.click()
        expect(page.locator(ANSWER)).to_have_text(expected)


def test_stop(browser, tiny_dir, tmp_path):
    """A long answer grows, stops when the reader says so, and no longer keeps the model busy."""
    folder = shutil.copytree(tiny_dir, tmp_path / "talkative")
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").unlink()
    (folder / "generation_config.json").write_text(json.dumps(settings | {"min_new_tokens": 1000}))
    with serving("examples/web.py", "--model", folder) as url, opened(browser, url) as page:
        ask(page, "Who are you?")
        expect(page.locator(ANSWER)).to_contain_text("I am InternLM", timeout=30_000)
        page.get_by_test_id("stop-button").click()
        expect(page.get_by_test_id("stop-button")).not_to_be_visible()
        stopped = page.locator(ANSWER).inner_text()
        server = next(p for p in psutil.process_iter() if str(folder) in " ".join(p.cmdline()))
        time.sleep(1)
        before = server.cpu_times()
        time.sleep(2)
        after = server.cpu_times()
        assert after.user - before.user < 0.5
        assert page.locator(ANSWER).inner_text() == stopped and len(stopped) < 1000


def test_an_error_is_a_sentence(browser, tiny_dir, tmp_path):
    """Here: the folder lacks its chat template."""
    folder = shutil.copytree(tiny_dir, tmp_path / "old", ignore=shutil.ignore_patterns("chat_template.jinja"))
    with serving("examples/web.py", "--model", folder) as url, opened(browser, url) as page:
        ask(page, "Who are you?")
        expect(page.get_by_text("The tokenizer has no chat template")).to_be_visible(timeout=30_000)
        expect(page.get_by_text("Traceback")).not_to_be_visible()


def test_a_question_without_an_answer_is_left_out(tiny_model, tiny_tokenizer, monkeypatch):
    """One that was stopped before its first token, or failed: the next question gets its answer."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    web = importlib.import_module("web")
    said = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in (("user", "Hello!"),) * 2]
    *_, last = web.page(tiny_tokenizer, tiny_model, "x").fn("Who are you?", said, "", True, 1.0, 1.0, 100)
    assert last == answer(tiny_model, tiny_tokenizer, "Who are you?")


def test_it_is_the_app_of_a_space(browser, tiny_dir, tmp_path, tiny_model, tiny_tokenizer):
    """One file, and the model in a variable."""
    shutil.copy(ROOT / "examples" / "web.py", tmp_path / "app.py")
    with serving(tmp_path / "app.py", MODEL=str(tiny_dir)) as url, opened(browser, url) as page:
        ask(page, "Who are you?")
        expected = answer(tiny_model, tiny_tokenizer, "Who are you?")
        expect(page.locator(ANSWER)).to_have_text(expected, timeout=30_000)
    alone = subprocess.run([sys.executable, tmp_path / "app.py"], capture_output=True, text=True, timeout=60)
    assert alone.returncode == 1 and alone.stderr.splitlines()[-1].startswith("Set MODEL to a repository that holds")
