"""Two servers on one cache file, and the replay that the benchmark counts."""

from __future__ import annotations

import asyncio
import sys
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
