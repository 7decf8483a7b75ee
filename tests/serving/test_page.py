"""The page at ``/`` in a real browser, from the real server: what a person sees, and what nobody must see."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")

ARGUMENTS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
DONE = ".turn:last-of-type:not([data-state=streaming])"


class Relay:
    """A TCP relay to the server, so that a test can take the server away from the page and give it back."""

    def __init__(self, target: tuple[str, int]) -> None:
        self.target = target
        self.port = 0
        self._listener: socket.socket | None = None
        self._open: list[socket.socket] = []

    def up(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def down(self) -> None:
        assert self._listener is not None
        for end in (self._listener, *self._open):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
            end.close()
        self._open.clear()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                near, _ = listener.accept()
            except OSError:
                return
            far = socket.create_connection(self.target)
            self._open += (near, far)
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._copy, args=(source, sink), daemon=True).start()

    @staticmethod
    def _copy(source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass


class Tab:
    """One page in the browser, with what it complained about and which addresses it asked for."""

    def __init__(self, browser: Any, url: str, **context: Any) -> None:
        self.url = url
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **context})
        self.page = self.context.new_page()
        self.page.set_default_timeout(30_000)
        self.complaints: list[str] = []
        self.asked: list[str] = []
        self.expected: tuple[str, ...] = ()  # complaints that the test itself provokes
        self.page.on("console", self._heard)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))

    def _heard(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def open(self) -> Any:
        self.page.goto(self.url)
        self.page.wait_for_selector("#model:enabled")
        return self.page

    def settings(self, **values: str) -> None:
        self.page.click("#settings-toggle")
        for name, value in values.items():
            self.page.fill(f"#{name.replace('_', '-')}", value)
        self.page.click("#settings-toggle")

    def ask(self, text: str) -> None:
        self.page.fill("#prompt", text)
        self.page.press("#prompt", "Enter")

    def turns(self) -> list[dict[str, Any]]:
        kept = self.page.evaluate("() => sessionStorage.getItem('sharewell.conversation')")
        return json.loads(kept or "[]")

    def close(self) -> None:
        self.context.close()
        origin = urlsplit(self.url)._replace(path="").geturl()
        strangers = [u for u in self.asked if not u.startswith(origin + "/")]
        assert not strangers, f"requests left the origin: {strangers}"
        unexpected = [c for c in self.complaints if not any(e in c for e in self.expected)]
        assert not unexpected, f"the console says: {unexpected}"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=CHROMIUM, args=list(ARGUMENTS))
        yield chromium
        chromium.close()


@pytest.fixture
def tab(browser: Any, server: Any) -> Iterator[Tab]:
    """A tab on the server's page; at the end its console must be clean and every request its own server's."""
    opened = Tab(browser, server.url.rstrip("/") + "/")
    yield opened
    opened.close()


def number(text: str) -> float:
    """The figure that a text begins with: "12.4 %" -> 12.4."""
    return float(text.split()[0].replace(",", ""))


def test_answer_arrives_in_pieces_and_is_the_one_the_api_gives(tab: Tab, server: Any) -> None:
    page = tab.open()
    tab.settings(temperature="0", max_tokens="160")
    page.evaluate(
        """() => {
            window.lengths = [];
            const look = () => window.lengths.push(document.querySelector('.body')?.textContent.length ?? 0);
            const every = {subtree: true, childList: true, characterData: true};
            new MutationObserver(look).observe(document.getElementById('log'), every);
        }"""
    )
    question = "Name three rivers of Europe."
    tab.ask(question)
    page.wait_for_selector(DONE)
    grown = sorted({n for n in page.evaluate("() => window.lengths") if n})
    assert len(grown) >= 3, f"the answer came in one piece: {grown}"
    answer = httpx.post(
        f"{tab.url}v1/chat/completions",
        json={
            "model": page.input_value("#model"),
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "max_tokens": 160,
        },
        timeout=60,
    ).json()
    assert tab.turns()[0]["text"] == answer["choices"][0]["message"]["content"]
    notes = page.inner_text(".turn footer")
    assert "first token" in notes and "tokens/s" in notes
    assert f"{answer['usage']['completion_tokens']} tokens" in notes
    assert f"of {answer['usage']['prompt_tokens']} prompt tokens shared" in notes
    spoken = page.inner_text("#spoken")
    assert "".join(spoken.split()) == "".join(tab.turns()[0]["text"].split())


def test_stop_ends_the_answer_in_the_engine_and_keeps_what_came(tab: Tab) -> None:
    page = tab.open()
    tab.ask("Write a very long story about a lighthouse, with many chapters.")
    page.wait_for_function("() => document.querySelector('.body')?.textContent.length > 20", polling=100)
    assert page.inner_text("#send") == "Stop"
    page.dispatch_event("#send", "click")
    page.wait_for_selector(".turn[data-state=stopped]")
    shown = page.inner_text(".body")
    page.wait_for_function(
        "() => document.getElementById('running').textContent.startsWith('0 ')", polling=100
    )
    assert page.inner_text(".body") == shown != ""
    assert "You stopped this answer." in page.inner_text(".turn footer")
    assert page.inner_text("#send") == "Send"


def test_panels_show_the_running_request_and_what_the_second_turn_shares(tab: Tab) -> None:
    page = tab.open()
    tab.settings(system="You are the keeper of a lighthouse. " * 12, max_tokens="160")
    page.wait_for_function(
        "() => document.getElementById('running').textContent.startsWith('0 ')", polling=100
    )
    saved = number(page.inner_text("#saved-tokens"))
    tab.ask("Tell me about the sea and about the ships that pass.")
    page.wait_for_function("() => parseInt(document.getElementById('running').textContent) > 0", polling=100)
    page.wait_for_function("() => parseFloat(document.getElementById('rate').textContent) > 0", polling=100)
    page.wait_for_function("() => parseInt(document.getElementById('kv-used').textContent) > 0", polling=100)
    page.wait_for_selector(DONE)
    page.wait_for_function(
        "() => document.getElementById('running').textContent.startsWith('0 ')", polling=100
    )
    before = number(page.inner_text("#hit-rate"))
    tab.ask("And about the light?")
    page.wait_for_selector(DONE)
    page.wait_for_function(
        "before => parseFloat(document.getElementById('hit-rate').textContent) > before",
        arg=before,
        polling=100,
    )
    figures = tab.turns()[1]["figures"]
    assert figures["cachedTokens"] > figures["promptTokens"] / 2  # the system prompt alone is more than half
    assert number(page.inner_text("#saved-tokens")) >= saved + figures["cachedTokens"]
    stats = httpx.get(f"{tab.url}stats").json()["engine"]
    parts = [number(page.inner_text(f"#kv-{name}")) for name in ("shared", "used", "cached", "free")]
    assert sum(parts) == stats["blocks_total"]
    assert parts[2] > 0  # the conversation stays for the next turn
    assert page.get_attribute("#rate-chart .line", "d")


def test_lost_server_is_told_and_forgotten_when_it_is_back(browser: Any, server: Any) -> None:
    parts = urlsplit(server.url)
    relay = Relay((parts.hostname or "127.0.0.1", parts.port or 80))
    relay.up()
    tab = Tab(browser, f"http://127.0.0.1:{relay.port}/")
    tab.expected = ("net::ERR_",)  # the browser's own note about a refused connection
    page = tab.open()
    page.wait_for_selector("#dot[data-state=idle], #dot[data-state=busy]")
    assert page.is_hidden("#away")
    relay.down()
    page.wait_for_selector("#away", state="visible")
    assert "cannot be reached" in page.inner_text("#away-text")
    assert page.get_attribute("#engine", "data-stale") == "true"
    tab.ask("Is anybody there?")
    page.wait_for_selector(".failure")
    assert "The server cannot be reached." in page.inner_text(".failure")
    relay.up()
    page.wait_for_selector("#away", state="hidden")
    assert page.get_attribute("#engine", "data-stale") == "false"
    tab.settings(max_tokens="8")
    page.click(".failure button")
    page.wait_for_selector(".turn[data-state=cut], .turn[data-state=done]")
    assert page.query_selector(".failure") is None
    tab.close()
    relay.down()


def test_answer_that_breaks_off_says_so_and_keeps_what_came(browser: Any, server: Any) -> None:
    parts = urlsplit(server.url)
    relay = Relay((parts.hostname or "127.0.0.1", parts.port or 80))
    relay.up()
    tab = Tab(browser, f"http://127.0.0.1:{relay.port}/")
    tab.expected = ("net::ERR_",)
    page = tab.open()
    tab.ask("Write a very long story about a mountain, with many chapters.")
    page.wait_for_function("() => document.querySelector('.body')?.textContent.length > 20", polling=100)
    relay.down()
    page.wait_for_selector(".failure")
    assert "broke off in the middle of the answer" in page.inner_text(".failure")
    assert len(page.inner_text(".body")) > 20
    tab.close()


def test_refusal_is_shown_in_the_servers_words(tab: Tab) -> None:
    page = tab.open()
    tab.expected = ("400 (Bad Request)",)  # the browser's own note about the status
    context = httpx.get(f"{tab.url}stats").json()["info"]["context_length"]
    tab.settings(max_tokens=str(context * 3))
    tab.ask("Hello")
    page.wait_for_selector(".failure")
    words = page.inner_text(".failure")
    assert str(context) in words and str(context * 3) in words
    assert "Start a new chat" in words


def test_keyboard_alone_is_enough(tab: Tab) -> None:
    page = tab.open()
    page.focus("#prompt")
    page.keyboard.type("Write a long poem")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("about winter.")
    assert page.input_value("#prompt") == "Write a long poem\nabout winter."
    page.keyboard.press("Enter")
    page.wait_for_function("() => document.querySelector('.body')?.textContent.length > 10", polling=100)
    assert page.input_value("#prompt") == ""
    page.keyboard.press("Escape")
    page.wait_for_selector(".turn[data-state=stopped]")
    assert page.evaluate("() => document.activeElement.id") == "prompt"
    assert tab.turns()[0]["prompt"] == "Write a long poem\nabout winter."


def test_conversation_survives_a_reload_and_ends_with_new_chat(tab: Tab) -> None:
    page = tab.open()
    tab.settings(max_tokens="8", system="Be brief.")
    tab.ask("Hello there")
    page.wait_for_selector(DONE)
    said = page.inner_text(".body")
    page.reload()
    page.wait_for_selector("#model:enabled")
    assert page.inner_text(".body") == said
    assert page.input_value("#system") == "Be brief."
    page.click("#new-chat")
    assert page.query_selector(".turn") is None
    assert page.is_visible("#welcome")
    page.reload()
    assert page.query_selector(".turn") is None


def test_wrong_setting_is_pointed_at_and_nothing_is_sent(tab: Tab) -> None:
    page = tab.open()
    tab.settings(temperature="7")
    tab.ask("Hello")
    assert page.is_visible("#temperature")  # the settings open by themselves
    assert page.evaluate("() => document.activeElement.id") in ("temperature", "prompt")
    assert page.input_value("#prompt") == "Hello"
    assert not any("chat/completions" in url for url in tab.asked)


def test_only_models_that_generate_are_offered(tab: Tab) -> None:
    page = tab.open()
    known = httpx.get(f"{tab.url}v1/models").json()["data"]
    offered = page.evaluate("() => [...document.getElementById('model').options].map(o => o.value)")
    assert offered == [m["id"] for m in known if m.get("dtype")]
    assert len(offered) < len(known)  # the embedding model is known, and not offered


def test_other_processes_that_take_cores_are_told(tab: Tab) -> None:
    page = tab.open()
    rivals = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in os.sched_getaffinity(0)]
    try:
        page.wait_for_selector("#competing", state="visible", timeout=60_000)
        assert "Other processes use" in page.inner_text("#competing")
    finally:
        for rival in rivals:
            rival.kill()
            rival.wait()


def test_hidden_tab_asks_nothing(tab: Tab) -> None:
    page = tab.open()
    page.wait_for_selector("#dot[data-state=idle], #dot[data-state=busy]")
    hide = "hidden => {Object.defineProperty(document, 'hidden', {value: hidden, configurable: true});"
    hide += " document.dispatchEvent(new Event('visibilitychange'));}"
    page.evaluate(hide, True)
    page.wait_for_timeout(500)  # what was under way
    asked = len(tab.asked)
    page.wait_for_timeout(2500)
    assert len(tab.asked) == asked
    with page.expect_request("**/stats"):
        page.evaluate(hide, False)


def test_page_forbids_everything_from_elsewhere(server: Any) -> None:
    answer = httpx.get(server.url)
    policy = answer.headers["content-security-policy"]
    assert "default-src 'self'" in policy and "unsafe" not in policy
    assert " style=" not in answer.text and "<style" not in answer.text
    assert "http://" not in answer.text and "https://" not in answer.text


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_page_fits_every_width(browser: Any, server: Any, width: int) -> None:
    tab = Tab(browser, server.url.rstrip("/") + "/", viewport={"width": width, "height": 700})
    page = tab.open()
    page.click("#settings-toggle")
    assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
    assert page.is_visible("#engine") == (width > 900)
    if width <= 900:
        page.click("#pulse")
        assert page.is_visible("#kv-bar")
        assert page.get_attribute("#pulse", "aria-expanded") == "true"
        assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
        page.click("#pulse")
        assert page.is_visible("#prompt")
    tab.close()


def test_every_control_has_a_name(tab: Tab) -> None:
    page = tab.open()
    nameless = page.evaluate(
        """() => [...document.querySelectorAll('button, input, select, textarea')]
            .filter(c => !(c.labels?.length || c.ariaLabel || c.textContent.trim()))
            .map(c => c.outerHTML)"""
    )
    assert nameless == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(browser: Any, server: Any, scheme: str) -> None:
    tab = Tab(browser, server.url.rstrip("/") + "/", color_scheme=scheme)
    page = tab.open()
    pairs = [(text, ground) for text in ("ink", "soft", "accent") for ground in ("paper", "surface")]
    pairs += [("ink", "wash"), ("soft", "raised"), ("on-accent", "accent")]
    pairs += [("warn", "warn-wash"), ("bad", "bad-wash")]
    colours = page.evaluate(
        """names => {
            const probe = document.body.appendChild(document.createElement('i'));
            const look = name => {
                probe.style.color = `var(--${name})`;
                return getComputedStyle(probe).color.match(/[\\d.]+/g).slice(0, 3).map(Number);
            };
            return Object.fromEntries(names.map(n => [n, look(n)]));
        }""",
        sorted({name for pair in pairs for name in pair}),
    )

    def luminance(rgb: list[float]) -> float:
        linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for text, ground in pairs:
        low, high = sorted((luminance(colours[text]), luminance(colours[ground])))
        ratio = (high + 0.05) / (low + 0.05)
        assert ratio >= 4.5, f"{text} on {ground} ({scheme})"  # WCAG 2.2 AA for normal text
    tab.close()


def test_durations_read_as_people_say_them(tab: Tab) -> None:
    page = tab.open()
    said = {
        0: "0 s", 0.0084: "8.4 ms", 0.34: "340 ms", 0.9999: "1.00 s", 1.24: "1.24 s", 30: "30 s",
        30.04: "30.0 s", 59.99: "1 min", 200: "3 min 20 s", 7500: "2 h 5 min", 273600: "3 d 4 h",
    }  # fmt: skip
    words = page.evaluate(
        "async values => values.map((await import('/page/format.js')).duration)", list(said)
    )
    assert words == list(said.values())
    assert page.evaluate("async () => (await import('/page/format.js')).duration(null)") == "–"


RENDER = """async texts => {
    const { MarkdownView } = await import('/page/markdown.js');
    return texts.map(text => {
        const root = document.createElement('div');
        new MarkdownView(root).show(text);
        const grown = document.createElement('div');
        const view = new MarkdownView(grown);
        for (let i = 1; i <= text.length; i++) view.show(text.slice(0, i));
        return {
            text: root.textContent, tags: [...root.querySelectorAll('*')].map(e => e.localName),
            attributes: [...root.querySelectorAll('*')].flatMap(e => e.getAttributeNames()),
            same: root.innerHTML === grown.innerHTML,
        };
    });
}"""
TAGS = {"p", "h3", "h4", "h5", "h6", "ul", "ol", "li", "blockquote", "hr", "strong", "em", "code"}
TAGS |= {"figure", "figcaption", "pre", "button"}
MARKS = st.sampled_from(
    ["<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "[a](javascript:alert(1))", "```", "`",
     "**", "*", "# ", "- ", "1. ", "> ", "\n", "\n\n", "    ", "---", "~~~", "\r", "&lt;", "word ", "ü🦊"]
)  # fmt: skip


def test_model_text_never_becomes_markup(tab: Tab) -> None:
    page = tab.open()

    @settings(
        max_examples=15,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )
    @given(st.lists(st.lists(MARKS | st.text(max_size=6), max_size=20).map("".join), min_size=1, max_size=20))
    def check(texts: list[str]) -> None:
        for text, seen in zip(texts, page.evaluate(RENDER, texts), strict=True):
            assert set(seen["tags"]) <= TAGS, text
            assert set(seen["attributes"]) <= {"class", "type", "tabindex", "start"}, text
            assert seen["same"], f"shown while growing and shown at once differ: {text!r}"

    check()
    parts = {
        "a **b** `c < d` *e*": ["p", "strong", "code", "em"],
        "```python\nx = 1\n<b>\n```\nafter": ["figure", "figcaption", "button", "pre", "code", "p"],
        "1. a\n2. b\n   - c": ["ol", "li", "li", "ul", "li"],
        "# T\ntext": ["h3", "p"],
        "2 * 3 * 4 and snake_case_name": ["p"],
    }
    for seen, tags in zip(page.evaluate(RENDER, list(parts)), parts.values(), strict=True):
        assert seen["tags"] == tags
    (code,) = page.evaluate(RENDER, ["```\na **b**\n  <i>\n"])
    assert code["text"].endswith("a **b**\n  <i>\n")
    (html,) = page.evaluate(RENDER, ["<img src=x onerror=alert(1)>"])
    assert html["text"] == "<img src=x onerror=alert(1)>"
