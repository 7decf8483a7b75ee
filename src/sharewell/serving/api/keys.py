"""API keys, their budgets and the ledger of usage, in SQLite (write-ahead log).

Keys are stored as salted hashes and compared in constant time. Usage is written before it is reported, so
what a client was told is never lost when a process dies.
"""

from __future__ import annotations

import hashlib
import secrets
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hmac import compare_digest
from pathlib import Path

from ...simulation import Clock

_SCHEMA = """
CREATE TABLE IF NOT EXISTS keys (
    id INTEGER PRIMARY KEY, name TEXT UNIQUE NOT NULL, prefix TEXT NOT NULL, salt BLOB NOT NULL,
    hash BLOB NOT NULL, requests_per_min INTEGER, tokens_per_min INTEGER, total_tokens INTEGER,
    spent INTEGER NOT NULL DEFAULT 0, created REAL NOT NULL, revoked REAL);
CREATE TABLE IF NOT EXISTS admissions (key_id INTEGER NOT NULL, at REAL NOT NULL);
CREATE INDEX IF NOT EXISTS admissions_by_key ON admissions (key_id, at);
CREATE TABLE IF NOT EXISTS usage (
    request_id TEXT PRIMARY KEY, key_id INTEGER NOT NULL, at REAL NOT NULL,
    prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL, cached_tokens INTEGER NOT NULL);
CREATE INDEX IF NOT EXISTS usage_by_key ON usage (key_id, at);
CREATE TABLE IF NOT EXISTS responses (
    id TEXT PRIMARY KEY, key_id INTEGER NOT NULL, at REAL NOT NULL,
    body TEXT NOT NULL, messages TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS responses_by_age ON responses (at);
"""
KEPT_RESPONSES = 10_000
MINUTE_S = 60.0
_NOBODY = bytes(32)


@dataclass(frozen=True)
class ApiKey:
    """A key without its secret. None budgets are unlimited; id 0 is the keyless user of a loopback server."""

    id: int
    name: str
    requests_per_min: int | None = None
    tokens_per_min: int | None = None
    total_tokens: int | None = None


@dataclass(frozen=True)
class Exceeded:
    """A budget that is used up: which, and when to come back (None: never)."""

    what: str
    retry_after_s: float | None


class StateStore:
    """Keys, usage and stored responses. ``path`` None keeps them in memory.

    One connection behind a lock, so that threads may share it; other processes (``sharewell keys``) may write
    the same file. Raises ValueError for bad names or budgets.
    """

    def __init__(self, path: Path | None, clock: Clock) -> None:
        self._clock = clock
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        self._db = sqlite3.connect(
            path or ":memory:", check_same_thread=False, isolation_level=None, timeout=10
        )
        self._lock = threading.Lock()
        with self._lock:
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.executescript(_SCHEMA)

    def _run(self, sql: str, *values: object) -> list[tuple]:
        with self._lock:
            return self._db.execute(sql, values).fetchall()

    def add_key(
        self,
        name: str,
        requests_per_min: int | None = None,
        tokens_per_min: int | None = None,
        total_tokens: int | None = None,
    ) -> str:
        """Create a key and return its secret, which is shown this once."""
        if not name or len(name) > 100:
            raise ValueError(f"name must have 1 to 100 characters, got {len(name)}")
        for field, value in (
            ("requests_per_min", requests_per_min), ("tokens_per_min", tokens_per_min),
            ("total_tokens", total_tokens),
        ):  # fmt: skip
            if value is not None and value < 1:
                raise ValueError(f"{field} must be at least 1, got {value}")
        secret = "sk-sharewell-" + secrets.token_urlsafe(32)
        salt = secrets.token_bytes(16)
        try:
            self._run(
                "INSERT INTO keys"
                " (name, prefix, salt, hash, requests_per_min, tokens_per_min, total_tokens, created)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                name, secret[:20], salt, _hash(secret, salt), requests_per_min, tokens_per_min, total_tokens,
                self._clock.unix(),
            )  # fmt: skip
        except sqlite3.IntegrityError:
            raise ValueError(f"name must be new, got {name!r}, which exists") from None
        return secret

    def revoke_key(self, name: str) -> None:
        """End a key. Raises ValueError for a name that is not active."""
        if not self._run(
            "UPDATE keys SET revoked = ? WHERE name = ? AND revoked IS NULL RETURNING id",
            self._clock.unix(),
            name,
        ):
            raise ValueError(f"name must be an active key, got {name!r}")

    def list_keys(self) -> list[dict[str, object]]:
        """Active and revoked keys with their budgets and usage; no secrets."""
        rows = self._run(
            "SELECT k.name, k.prefix, k.requests_per_min, k.tokens_per_min, k.total_tokens, k.created,"
            " k.revoked, (SELECT COUNT(*) FROM usage u WHERE u.key_id = k.id), k.spent"
            " FROM keys k ORDER BY k.id"
        )
        names = (
            "name", "prefix", "requests_per_min", "tokens_per_min", "total_tokens", "created", "revoked",
            "requests", "tokens",
        )  # fmt: skip
        return [dict(zip(names, row, strict=True)) for row in rows]

    @property
    def any_key(self) -> bool:
        """True when a key is active."""
        return bool(self._run("SELECT 1 FROM keys WHERE revoked IS NULL LIMIT 1"))

    @property
    def ever_key(self) -> bool:
        """True when a key was ever made: from then on requests must carry one, also when all were revoked."""
        return bool(self._run("SELECT 1 FROM keys LIMIT 1"))

    def find(self, secret: str) -> ApiKey | None:
        """The active key with this secret."""
        found = None
        compared = False
        for row in self._run(
            "SELECT id, name, salt, hash, requests_per_min, tokens_per_min, total_tokens FROM keys"
            " WHERE revoked IS NULL AND prefix = ?",
            secret[:20],
        ):
            compared = True
            if compare_digest(_hash(secret, row[2]), row[3]):
                found = ApiKey(row[0], row[1], *row[4:])
        if not compared:
            compare_digest(_hash(secret, _NOBODY[:16]), _NOBODY)  # as long as for a key that exists
        return found

    def admit(self, key: ApiKey) -> Exceeded | None:
        """Count one request against the key's budgets, or say which of them is used up.

        Check and count are one transaction, so requests that come at once cannot pass together. Tokens count
        when they are recorded: requests under way may overshoot a budget of tokens by what they still
        produce.
        """
        if key.requests_per_min is None and key.tokens_per_min is None and key.total_tokens is None:
            return None
        with self._transaction():
            over = self._exceeded(key)
            if over is None and key.requests_per_min is not None:
                now = self._clock.unix()
                old = (key.id, now - MINUTE_S)
                self._db.execute("DELETE FROM admissions WHERE key_id = ? AND at <= ?", old)
                self._db.execute("INSERT INTO admissions VALUES (?, ?)", (key.id, now))
        return over

    def _exceeded(self, key: ApiKey) -> Exceeded | None:
        if key.requests_per_min is not None:
            wait = self._wait("1 FROM admissions", key, key.requests_per_min)
            if wait is not None:
                return Exceeded(f"{key.requests_per_min} requests per minute", wait)
        if key.tokens_per_min is not None:
            wait = self._wait("prompt_tokens + completion_tokens FROM usage", key, key.tokens_per_min)
            if wait is not None:
                return Exceeded(f"{key.tokens_per_min} tokens per minute", wait)
        if key.total_tokens is not None:
            (spent,) = self._db.execute("SELECT spent FROM keys WHERE id = ?", (key.id,)).fetchone()
            if spent >= key.total_tokens:
                return Exceeded(f"{key.total_tokens} tokens in all", None)
        return None

    def _wait(self, what: str, key: ApiKey, budget: int) -> float | None:
        """Seconds until what the key spent within a minute is below ``budget`` again; None when it is."""
        now = self._clock.unix()
        sql = f"SELECT at, {what} WHERE key_id = ? AND at > ? ORDER BY at"
        rows = self._db.execute(sql, (key.id, now - MINUTE_S)).fetchall()
        left = sum(spent for _, spent in rows)
        wait = None
        for at, spent in rows:
            if left < budget:
                break
            left -= spent
            wait = max(1.0, MINUTE_S - (now - at))
        return wait

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    def record(
        self, request_id: str, key: ApiKey, prompt_tokens: int, completion_tokens: int, cached_tokens: int
    ) -> None:
        """Write (or update) what a request used; it counts as spent now."""
        with self._transaction():
            spent = prompt_tokens + completion_tokens - self._spent(request_id)
            self._db.execute(
                "INSERT INTO usage VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (request_id) DO UPDATE SET"
                " at = excluded.at, prompt_tokens = excluded.prompt_tokens,"
                " completion_tokens = excluded.completion_tokens, cached_tokens = excluded.cached_tokens",
                (request_id, key.id, self._clock.unix(), prompt_tokens, completion_tokens, cached_tokens),
            )
            self._db.execute("UPDATE keys SET spent = spent + ? WHERE id = ?", (spent, key.id))

    def _spent(self, request_id: str) -> int:
        sql = "SELECT prompt_tokens + completion_tokens FROM usage WHERE request_id = ?"
        row = self._db.execute(sql, (request_id,)).fetchone()
        return row[0] if row else 0

    def forget(self, request_id: str, key: ApiKey) -> None:
        """Take back what :meth:`record` wrote of a request that the engine refused."""
        with self._transaction():
            spent = self._spent(request_id)
            self._db.execute("DELETE FROM usage WHERE request_id = ?", (request_id,))
            self._db.execute("UPDATE keys SET spent = spent - ? WHERE id = ?", (spent, key.id))

    def usage(self, request_id: str) -> tuple[int, int, int] | None:
        """(prompt, completion, cached) tokens of a request."""
        rows = self._run(
            "SELECT prompt_tokens, completion_tokens, cached_tokens FROM usage WHERE request_id = ?",
            request_id,
        )
        return rows[0] if rows else None

    def owns(self, request_id: str, key: ApiKey | None) -> bool:
        """True when a request of that id was answered: to ``key``, or with None to anybody."""
        sql = "SELECT key_id FROM usage WHERE request_id = ?"
        return any(key is None or row[0] == key.id for row in self._run(sql, request_id))

    def store_response(self, response_id: str, key: ApiKey, body: str, messages: str) -> None:
        """Keep a response for ``previous_response_id``; the oldest beyond a bound are forgotten."""
        self._run(
            "INSERT OR REPLACE INTO responses VALUES (?, ?, ?, ?, ?)",
            response_id,
            key.id,
            self._clock.unix(),
            body,
            messages,
        )
        self._run(
            "DELETE FROM responses WHERE id IN (SELECT id FROM responses ORDER BY at DESC LIMIT -1 OFFSET ?)",
            KEPT_RESPONSES,
        )

    def response(self, response_id: str, key: ApiKey) -> tuple[str, str] | None:
        """(body, messages) of a stored response of this very key."""
        rows = self._run(
            "SELECT body, messages FROM responses WHERE id = ? AND key_id = ?", response_id, key.id
        )
        return rows[0] if rows else None

    def delete_response(self, response_id: str, key: ApiKey) -> bool:
        """Forget a response; False when this key has none of that id."""
        return bool(
            self._run("DELETE FROM responses WHERE id = ? AND key_id = ? RETURNING id", response_id, key.id)
        )

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()


def _hash(secret: str, salt: bytes) -> bytes:
    # The secret has 256 random bits, so a plain keyed hash is enough: there is nothing to guess.
    return hashlib.blake2b(secret.encode(), key=salt, digest_size=32).digest()
