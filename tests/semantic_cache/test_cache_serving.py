"""Two servers on one cache file, and the replay that the benchmark counts."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

_API = str(Path(__file__).parents[1] / "serving" / "api")
_ROOT = str(Path(__file__).parents[2])
for _folder in (_API, _ROOT):
    if _folder not in sys.path:
        sys.path.insert(0, _folder)

from running_server import serving  # noqa: E402

from benchmarks.semantic_cache.cache_serving import drive  # noqa: E402
from benchmarks.semantic_cache.questions import Request  # noqa: E402
from sharewell.semantic_cache import AUDIT_PATH, NONCE_HEADER, AuditRefused, loopback_cache_file  # noqa: E402

MARK = "x-sharewell-cache"


def ask(client: httpx.Client, text: str, headers: dict | None = None) -> httpx.Response:
    body = {
        "model": "smollm2",
        "max_tokens": 8,
        "temperature": 0,
        "messages": [{"role": "user", "content": text}],
    }
    return client.post("/v1/chat/completions", json=body, headers=headers).raise_for_status()


def content(answer: httpx.Response) -> str:
    return answer.json()["choices"][0]["message"]["content"]


def until(client: httpx.Client, done: Callable[[dict], bool], timeout_s: float = 60) -> dict:
    """The cache's figures once they are ``done``."""
    deadline = time.monotonic() + timeout_s
    while True:
        figures = client.get("/stats").raise_for_status().json()["cache"]
        if done(figures) or time.monotonic() > deadline:
            return figures
        time.sleep(0.05)


def test_hits_in_other_words_are_computed_as_well_and_compared(tmp_path: Path, smollm2: Path):
    """Nobody waits for it, nobody pays for it, and what disagrees takes the category out of the tier."""
    body = {"model": "smollm2", "max_tokens": 40, "temperature": 0, "stop": [".", "\n"]}
    with (
        serving(tmp_path, "--cache", "semantic", "--cache-recheck", "1") as server,
        server.client() as client,
    ):

        def ask_for(text: str) -> httpx.Response:
            message = {"role": "user", "content": text}
            return client.post(
                "/v1/chat/completions", json={**body, "messages": [message]}
            ).raise_for_status()

        assert ask_for("What is the capital of France?").headers[MARK] == "miss"
        usage = client.get("/stats").json()["engine"]
        hit = ask_for("Which city is the capital of France?")
        assert (hit.headers[MARK], hit.headers[f"{MARK}-tier"]) == ("hit", "semantic")
        figures = until(client, lambda f: f["rechecked"] == 1)
        assert figures["rechecked"] == 1
        assert client.get("/stats").json()["engine"]["generated_tokens"] > usage["generated_tokens"]
        text = client.get("/metrics").text
        agree = 1 - figures["disagreed"]
        assert f'sharewell_cache_reanswered_total{{agree="true"}} {agree:.1f}' in text
        # an equal request is not compared: it is the same computation
        ask_for("Which city is the capital of France?")
        ask_for("What is the capital of France?")
        assert until(client, lambda f: f["exact_hits"] >= 1)["rechecked"] <= 2


def test_the_cache_is_told_how_busy_the_engine_is(tmp_path: Path, smollm2: Path):
    many = ("--cache", "semantic", "--cache-queue", "1", "--max-seqs", "2")
    with serving(tmp_path, *many) as server, server.client() as client:
        ask(client, "Name a sea.")  # loads the embedder: the exact tier knows no load
        assert client.get("/stats").json()["cache"]["load"] == 0.0
        pause = threading.Event()

        def busy(number: int) -> None:
            with server.client() as mine:
                body = {
                    "model": "smollm2", "temperature": 1, "max_tokens": 400, "ignore_eos": True,
                    "stream": True,
                    "messages": [{"role": "user", "content": f"Tell a story about {number} men."}],
                }  # fmt: skip
                with mine.stream("POST", "/v1/chat/completions", json=body) as answer:
                    for _ in answer.iter_lines():
                        if pause.is_set():
                            return

        threads = [threading.Thread(target=busy, args=(n,)) for n in range(6)]
        for thread in threads:
            thread.start()
        figures = until(client, lambda f: f["load"] > 0.02)
        pause.set()
        for thread in threads:
            thread.join()
        assert 0.02 < figures["load"] <= 1
        line = next(
            x for x in client.get("/metrics").text.splitlines() if x.startswith("sharewell_cache_load")
        )
        assert float(line.split()[1]) > 0
        # smoothed: it does not fall at once
        assert client.get("/stats").json()["cache"]["load"] > figures["load"] * 0.5


def test_two_servers_share_one_file(tmp_path: Path, smollm2: Path):
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    shared = ("--cache", "exact", "--cache-file", str(tmp_path / "answers.sqlite3"))
    with serving(folders[0], *shared) as one, serving(folders[1], *shared) as two:
        with one.client() as first, two.client() as second:
            answer = ask(first, "Name a sea.")
            for _ in range(100):  # within a second or so the other has seen it
                other = ask(second, "Name a sea.", headers={"cache-control": "max-age=600"})
                if other.headers[MARK] == "hit":
                    break
            assert other.headers[MARK] == "hit"
            one.process.kill()
            one.process.wait()
            assert ask(second, "Name a sea.").headers[MARK] == "hit"
            assert content(other) == content(answer)
            assert ask(second, "Name a bay.").headers[MARK] == "miss"


def test_an_auditor_with_the_owners_token_finds_the_file_of_a_server_on_this_machine(
    tmp_path: Path, smollm2: Path, monkeypatch: pytest.MonkeyPatch
):
    file, token = tmp_path / "answers.sqlite3", "a token of the owner's"
    monkeypatch.setenv("SHAREWELL_AUDIT_TOKEN", token)
    with serving(tmp_path, "--cache", "exact", "--cache-file", str(file)) as server:
        assert loopback_cache_file(server.url, token) == file.resolve()
        with pytest.raises(AuditRefused, match="does not know this audit token"):
            loopback_cache_file(server.url, "another token, as long")
        with server.client() as client:
            short = client.get(AUDIT_PATH, headers={NONCE_HEADER: "short"})
            assert (short.status_code, short.json()["error"]["param"]) == (400, NONCE_HEADER)
    monkeypatch.delenv("SHAREWELL_AUDIT_TOKEN")
    with serving(tmp_path, "--cache", "exact") as server:
        with pytest.raises(AuditRefused, match="does not allow an audit: HTTP Error 404"):
            loopback_cache_file(server.url, token)


def test_the_replay_counts_what_was_computed_and_which_answers_were_anothers(tmp_path: Path, smollm2: Path):
    texts = [
        "What is the capital of France?",
        "What is the capital of Peru?",
        "What is the capital of France?",
    ]
    requests = [Request(text, "reference", text, 0.0) for text in texts]
    alike = "Which city is the capital of France?"
    requests += [Request(alike, "reference", texts[0], 0.0), Request(alike, "chat", "something else", 0.0)]
    with serving(tmp_path, "--cache", "semantic") as server:
        served = asyncio.run(drive(server.url, requests, lambda *_: None, "semantic", clients=1))
    assert served.counts["reference"] == [4, 1, 1, 0]
    asked, exact, other, wrong = served.counts["chat"]
    assert (asked, exact + other, wrong) == (1, 1, 1)
    assert served.tokens == sum(served.computed.values()) > 0
