"""What belongs to one API key stays with it."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from running_server import RunningServer

from sharewell.cli import main

CHAT = "/v1/chat/completions"


def ask(api: httpx.Client, text: str = "Hi", **fields: Any) -> httpx.Response:
    messages = [{"role": "user", "content": text}]
    body = {"model": "smollm2", "messages": messages, "max_tokens": 1, "temperature": 0, **fields}
    return api.post(CHAT, json=body)


def cached(answer: httpx.Response) -> int:
    return answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_without_a_valid_key_only_page_and_health_answer(keyed: RunningServer) -> None:
    for key in (None, "sk-sharewell-wrong", "\u00e9"):
        with httpx.Client(base_url=keyed.url) as api:
            headers = {b"Authorization": f"Bearer {key}".encode("latin-1")} if key else {}
            for method, path in (
                ("POST", CHAT),
                ("GET", "/v1/models"),
                ("GET", "/stats"),
                ("GET", "/metrics"),
            ):
                answer = api.request(method, path, headers=headers)
                assert answer.status_code == 401
                assert answer.json()["error"]["code"] == "invalid_api_key"
                assert answer.headers["www-authenticate"] == "Bearer"
            assert api.get("/health", headers=headers).status_code == 200
            assert api.get("/", headers=headers).status_code == 200


def test_two_keys_share_no_prefix(keyed: RunningServer) -> None:
    text = "The lighthouse keeper wrote a letter to his sister. " * 8
    with keyed.client("alice") as alice, keyed.client("bob") as bob:
        assert cached(ask(alice, text)) == 0
        assert cached(ask(alice, text)) > 60
        assert cached(ask(bob, text)) == 0
        assert cached(ask(bob, text)) > 60


def test_responses_of_another_key_do_not_exist(keyed: RunningServer) -> None:
    with keyed.client("alice") as alice, keyed.client("bob") as bob:
        body = {"model": "smollm2", "input": "Hi", "max_output_tokens": 2}
        made = alice.post("/v1/responses", json=body).json()["id"]
        unseen = [
            bob.get(f"/v1/responses/{made}"),
            bob.delete(f"/v1/responses/{made}"),
            bob.post("/v1/responses", json={**body, "previous_response_id": made}),
        ]
        never = bob.get("/v1/responses/" + made[::-1])
        assert [answer.status_code for answer in (*unseen, never)] == [404] * 4
        assert unseen[0].json()["error"]["code"] == never.json()["error"]["code"]
        assert alice.get(f"/v1/responses/{made}").status_code == 200
        assert alice.post("/v1/responses", json={**body, "previous_response_id": made}).status_code == 200
        forgotten = alice.post("/v1/responses", json={**body, "store": False}).json()["id"]
        assert alice.get(f"/v1/responses/{forgotten}").status_code == 404


def test_budget_of_requests_is_a_429_that_says_when_to_come_back(keyed: RunningServer) -> None:
    with keyed.client("carol") as carol:
        assert carol.get("/v1/models").status_code == 200  # costs no tokens, so it counts nowhere
        assert ask(carol, model="none").status_code == 404
        assert [ask(carol).status_code for _ in range(2)] == [200, 200]
        refused = ask(carol)
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert 1 <= int(refused.headers["retry-after"]) <= 60


def test_ledger_holds_what_was_reported(keyed: RunningServer) -> None:
    with keyed.client("alice") as alice:
        answers = [ask(alice, n=2, max_tokens=3).json(), ask(alice, stop=["e"], max_tokens=20).json()]
        several = alice.post(
            "/v1/completions", json={"model": "smollm2", "prompt": ["a", "b c"], "max_tokens": 2}
        )
    ledger = sqlite3.connect(keyed.log_file.parent / "state.sqlite3")
    try:
        for answer in (*answers, several.json()):
            rows = ledger.execute(
                "SELECT prompt_tokens, completion_tokens, cached_tokens FROM usage WHERE request_id LIKE ?",
                (answer["id"] + "%",),
            ).fetchall()
            usage = answer["usage"]
            cached_tokens = usage["prompt_tokens_details"]["cached_tokens"]
            totals = tuple(map(sum, zip(*rows, strict=True)))
            assert totals == (usage["prompt_tokens"], usage["completion_tokens"], cached_tokens)
        refused = ledger.execute("SELECT COUNT(*) FROM usage WHERE prompt_tokens > 8192").fetchone()
        assert refused == (0,)
    finally:
        ledger.close()


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "SHAREWELL_STATE": str(folder / "state.sqlite3")}
    line = [sys.executable, "-m", "sharewell", *arguments]
    return subprocess.run(line, env=environment, capture_output=True, text=True, check=False)


def test_key_made_while_serving_is_known_at_once_and_gone_when_revoked(keyed: RunningServer) -> None:
    folder = keyed.log_file.parent
    secret = command(folder, "keys", "add", "dave").stdout.strip()
    with keyed.client(secret) as dave:
        assert dave.get("/v1/models").status_code == 200
        assert command(folder, "keys", "revoke", "dave").stdout == "revoked dave\n"
        assert dave.get("/v1/models").status_code == 401


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("serve", "--host", "0.0.0.0"), "no API key exists"),
        (("serve", "none"), "model must be one of"),
        (("serve", "--max-body", "much"), "--max-body"),
        (("serve", "--lora", "x=nowhere"), "NAME=FOLDER"),
        (("serve", "--dtype", "int3"), "dtype must be"),
        (("serve", "--share-scope", "world"), "share_scope must be"),
        (("serve", "--body-timeout", "0"), "body_timeout_s must be positive"),
        (("keys", "revoke", "none"), "must be an active key"),
        (("keys", "add", "x", "--total-tokens", "0"), "total_tokens must be at least 1"),
    ],
)
def test_wrong_use_of_the_command_is_one_line_and_code_2(
    tmp_path: Path, arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--state", str(tmp_path / "state.sqlite3")]) == 2
    told = capsys.readouterr().err
    assert words in told
    assert told.startswith("error: ")
    assert told.count("\n") == 1
