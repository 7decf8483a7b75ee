"""Keys, budgets and the ledger: no secret is kept, budgets hold at once, what was written survives."""

from __future__ import annotations

import hmac
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharewell.serving.api import keys
from sharewell.serving.api.keys import ApiKey, Exceeded, StateStore
from sharewell.simulation import VirtualClock, WallClock


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock(unix_start=1_700_000_000.0)


@pytest.fixture
def store(tmp_path: Path, clock: VirtualClock) -> Iterator[StateStore]:
    made = StateStore(tmp_path / "state.sqlite3", clock)
    yield made
    made.close()


def found(store: StateStore, secret: str) -> ApiKey:
    key = store.find(secret)
    assert key is not None
    return key


# Secrets


def test_a_key_is_found_by_its_secret_and_by_nothing_else(store: StateStore) -> None:
    secret = store.add_key("alice", requests_per_min=5, total_tokens=100)
    assert store.find(secret) == ApiKey(1, "alice", 5, None, 100)
    other = store.add_key("bob")
    assert found(store, other).name == "bob"
    for wrong in (
        "",
        "sk-sharewell-",
        secret[:-1],
        secret + "x",
        secret[:20] + "x" * 36,
        other[:30] + secret[30:],
    ):
        assert store.find(wrong) is None, wrong


def test_no_file_holds_a_secret(tmp_path: Path, store: StateStore) -> None:
    secret = store.add_key("alice")
    for path in tmp_path.iterdir():
        content = path.read_bytes()
        assert secret.encode() not in content and secret[20:].encode() not in content, path.name
    assert any(
        secret[:20].encode() in p.read_bytes() for p in tmp_path.iterdir()
    )  # to tell keys apart in a list


def test_two_keys_of_one_secret_would_not_share_a_hash() -> None:
    assert keys._hash("secret", b"a" * 16) != keys._hash("secret", b"b" * 16)


def test_secrets_are_compared_in_constant_time(store: StateStore, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = store.add_key("alice")
    compared: list[tuple[bytes, bytes]] = []

    def watched(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return hmac.compare_digest(a, b)

    monkeypatch.setattr(keys, "compare_digest", watched)
    assert store.find(secret) is not None
    assert store.find(secret[:20] + "x" * 36) is None
    assert store.find("sk-sharewell-of-nobody-at-all-whatever") is None
    assert len(compared) == 3 and all(len(a) == len(b) == 32 for a, b in compared)


def test_a_revoked_key_is_not_found_and_keys_stay_required(store: StateStore) -> None:
    assert not store.any_key and not store.ever_key
    secret = store.add_key("alice")
    store.revoke_key("alice")
    assert store.find(secret) is None
    assert not store.any_key and store.ever_key
    for name in ("alice", "nobody"):
        with pytest.raises(ValueError, match=f"name must be an active key, got '{name}'"):
            store.revoke_key(name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("",), "name must have 1 to 100 characters, got 0"),
        (("x" * 101,), "name must have 1 to 100 characters, got 101"),
        (("taken",), "name must be new, got 'taken', which exists"),
        (("a", 0), "requests_per_min must be at least 1, got 0"),
        (("a", None, -5), "tokens_per_min must be at least 1, got -5"),
        (("a", None, None, 0), "total_tokens must be at least 1, got 0"),
    ],
)
def test_a_bad_key_is_refused_with_its_field(store: StateStore, arguments: tuple, message: str) -> None:
    store.add_key("taken")
    with pytest.raises(ValueError, match=message):
        store.add_key(*arguments)


# Budgets


def test_requests_per_minute_slide(store: StateStore, clock: VirtualClock) -> None:
    key = found(store, store.add_key("alice", requests_per_min=2))
    assert store.admit(key) is None
    clock.advance(20)
    assert store.admit(key) is None
    clock.advance(10)
    assert store.admit(key) == Exceeded("2 requests per minute", 30.0)
    clock.advance(30)
    assert store.admit(key) is None  # the first is a minute old
    assert store.admit(key) == Exceeded("2 requests per minute", 20.0)


def test_tokens_per_minute_come_back_when_enough_of_them_are_old(
    store: StateStore, clock: VirtualClock
) -> None:
    key = found(store, store.add_key("alice", tokens_per_min=100))
    store.record("a", key, 10, 20, 0)
    clock.advance(10)
    store.record("b", key, 60, 30, 0)
    clock.advance(10)
    store.record("c", key, 15, 0, 0)
    assert store.admit(key) == Exceeded(
        "100 tokens per minute", 50.0
    )  # until b is old: without a there are 105
    clock.advance(50)
    assert store.admit(key) is None


def test_a_long_answer_counts_when_it_is_recorded(store: StateStore, clock: VirtualClock) -> None:
    key = found(store, store.add_key("alice", tokens_per_min=100))
    store.record("a", key, 50, 0, 0)
    clock.advance(90)
    assert store.admit(key) is None
    store.record("a", key, 50, 80, 0)
    assert store.admit(key) == Exceeded("100 tokens per minute", 60.0)


def test_a_total_is_for_ever(store: StateStore, clock: VirtualClock) -> None:
    key = found(store, store.add_key("alice", total_tokens=100))
    store.record("a", key, 60, 39, 0)
    assert store.admit(key) is None
    store.record("b", key, 1, 0, 0)
    assert store.admit(key) == Exceeded("100 tokens in all", None)
    clock.advance(1e9)
    assert store.admit(key) == Exceeded("100 tokens in all", None)


def test_budgets_are_of_one_key_alone(store: StateStore) -> None:
    alice = found(store, store.add_key("alice", 1, 10, 10))
    bob = found(store, store.add_key("bob", 1, 10, 10))
    store.record("a", alice, 10, 10, 0)
    assert store.admit(alice) is not None
    assert store.admit(bob) is None
    assert store.admit(bob) == Exceeded("1 requests per minute", 60.0)


def test_the_keyless_user_has_no_budget(store: StateStore) -> None:
    local = ApiKey(0, "local")
    store.record("a", local, 10**9, 10**9, 0)
    assert all(store.admit(local) is None for _ in range(100))
    assert store.usage("a") == (10**9, 10**9, 0)


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.floats(0, 40), st.integers(0, 60)), max_size=25),
    st.integers(1, 4),
    st.integers(1, 100),
)
def test_budgets_agree_with_a_plain_model(events: list[tuple[float, int]], per_min: int, tokens: int) -> None:
    clock = VirtualClock()
    store = StateStore(None, clock)
    key = found(store, store.add_key("k", per_min, tokens))
    passed: list[tuple[float, int]] = []
    for i, (pause, spent) in enumerate(events):
        clock.advance(pause)
        now = clock.unix()
        recent = [(at, n) for at, n in passed if at > now - 60]
        over = store.admit(key)
        assert (over is None) == (len(recent) < per_min and sum(n for _, n in recent) < tokens)
        if over is None:
            store.record(f"r{i}", key, spent, 0, 0)
            passed.append((now, spent))
        else:
            assert over.retry_after_s is not None and 1 <= over.retry_after_s <= 60
    store.close()


def test_requests_that_come_at_once_cannot_pass_a_budget_together(tmp_path: Path) -> None:
    path = tmp_path / "state.sqlite3"
    stores = [StateStore(path, WallClock()) for _ in range(3)]  # as three processes would
    key = found(stores[0], stores[0].add_key("alice", requests_per_min=17))
    passed: list[int] = []

    def many(store: StateStore) -> None:
        for _ in range(10):
            if store.admit(key) is None:
                passed.append(1)

    threads = [threading.Thread(target=many, args=(store,)) for store in stores for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(passed) == 17
    for store in stores:
        store.close()


# The ledger


def test_usage_is_written_once_per_request_and_updated(store: StateStore) -> None:
    key = found(store, store.add_key("alice"))
    store.record("a", key, 10, 0, 0)
    store.record("a", key, 10, 5, 8)
    store.record("b", key, 1, 1, 0)
    assert store.usage("a") == (10, 5, 8)
    (row,) = store.list_keys()
    assert (row["requests"], row["tokens"]) == (2, 17)
    store.forget("a", key)
    store.forget("a", key)
    (row,) = store.list_keys()
    assert (row["requests"], row["tokens"]) == (1, 2) and store.usage("a") is None


@settings(max_examples=40)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 9), st.booleans()), max_size=30))
def test_what_a_key_spent_is_the_sum_of_its_ledger(steps: list[tuple[str, int, bool]]) -> None:
    store = StateStore(None, VirtualClock())
    key = found(store, store.add_key("alice"))
    for request, tokens, forget in steps:
        if forget:
            store.forget(request, key)
        else:
            store.record(request, key, tokens, tokens, 0)
    (row,) = store.list_keys()
    assert row["tokens"] == sum(sum((store.usage(r) or (0, 0))[:2]) for r in "abc")
    store.close()


WRITER = """
import sys
from pathlib import Path
from sharewell.serving.api.keys import StateStore
from sharewell.simulation import WallClock
store = StateStore(Path(sys.argv[1]), WallClock())
key = store.find(store.add_key("alice"))
for i in range(10**6):
    store.record(f"r{i}", key, 3, i % 7, 0)
    print(i, flush=True)
"""


def test_a_killed_writer_loses_nothing_that_it_reported(tmp_path: Path) -> None:
    path = tmp_path / "state.sqlite3"
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    while int(writer.stdout.readline()) < 200:
        pass
    os.kill(writer.pid, signal.SIGKILL)
    rest = [int(line) for line in writer.stdout.read().splitlines() if line.strip()]
    writer.wait()
    writer.stdout.close()
    last = max([200, *rest])
    store = StateStore(path, WallClock())
    for i in range(last + 1):
        assert store.usage(f"r{i}") == (3, i % 7, 0)
    (row,) = store.list_keys()
    db = sqlite3.connect(path)
    total = db.execute("SELECT SUM(prompt_tokens + completion_tokens) FROM usage").fetchone()[0]
    assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    db.close()
    assert row["tokens"] == total and int(str(row["requests"])) >= last + 1
    store.close()


# Stored responses


def test_a_response_is_its_own_keys_alone(store: StateStore) -> None:
    alice, bob = (found(store, store.add_key(name)) for name in ("alice", "bob"))
    store.store_response("resp_1", alice, "{}", "[]")
    assert store.response("resp_1", alice) == ("{}", "[]")
    assert store.response("resp_1", bob) is None
    assert not store.delete_response("resp_1", bob)
    assert store.delete_response("resp_1", alice) and store.response("resp_1", alice) is None


def test_the_oldest_responses_make_room(
    store: StateStore, clock: VirtualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "KEPT_RESPONSES", 3)
    local = ApiKey(0, "local")
    for i in range(5):
        clock.advance(1)
        store.store_response(f"resp_{i}", local, str(i), "[]")
    assert [store.response(f"resp_{i}", local) is not None for i in range(5)] == [
        False,
        False,
        True,
        True,
        True,
    ]


# The command line


def test_keys_are_added_listed_and_revoked_from_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "state.sqlite3"

    def run(*arguments: str, code: int = 0) -> str:
        command = [sys.executable, "-m", "sharewell", "keys", *arguments, "--state", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout if code == 0 else done.stderr

    secret = run("add", "alice", "--tokens-per-min", "500").split()[-1]
    store = StateStore(path, WallClock())
    assert found(store, secret).tokens_per_min == 500
    assert "alice" in run("list") and secret not in run("list")
    (row,) = json.loads(run("list", "--json"))
    assert (row["name"], row["tokens_per_min"], row["revoked"]) == ("alice", 500, None)
    assert "name must be new" in run("add", "alice", code=2)
    run("revoke", "alice")
    assert store.find(secret) is None
    assert "name must be an active key" in run("revoke", "alice", code=2)
    store.close()


def test_without_any_key_other_machines_are_not_served(tmp_path: Path, smollm2: Path) -> None:
    command = [sys.executable, "-m", "sharewell", "serve", "--host", "0.0.0.0", "--port", "0"]
    command += ["--state", str(tmp_path / "state.sqlite3")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "sharewell keys add NAME" in done.stderr
