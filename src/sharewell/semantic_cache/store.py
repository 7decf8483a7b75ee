"""The document store: one SQLite file (WAL) that is the truth for every process that opens it.

A row is written before the index knows of it, so a crash leaves at worst a row that the next start indexes,
and never an index entry without its row. Ids are never used twice. Every insertion and removal is numbered in
``changes``; other processes learn of them by asking for what came after the last number they saw.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .base import CacheVersionError, Entry
from .calibration import Judged
from .policy import CategoryPolicy

FORMAT = "sharewell-cache-1"
HEAT_HALF_LIFE_S = 3600.0
KEPT_CHANGES = 200_000
_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS entries (
  id INTEGER PRIMARY KEY AUTOINCREMENT, key BLOB NOT NULL UNIQUE, partition TEXT NOT NULL,
  owner TEXT NOT NULL, category TEXT NOT NULL, text TEXT NOT NULL, embedding BLOB, crops BLOB,
  response TEXT NOT NULL, answer TEXT NOT NULL, meta TEXT NOT NULL, created REAL NOT NULL,
  expires REAL NOT NULL, cost REAL NOT NULL, heat REAL NOT NULL, heated REAL NOT NULL,
  hits INTEGER NOT NULL DEFAULT 0, checksum BLOB);
CREATE INDEX IF NOT EXISTS entries_category ON entries (category, id);
CREATE INDEX IF NOT EXISTS entries_owner ON entries (owner);
CREATE INDEX IF NOT EXISTS entries_expires ON entries (expires);
CREATE TABLE IF NOT EXISTS changes (
  seq INTEGER PRIMARY KEY AUTOINCREMENT, entry INTEGER NOT NULL, gone INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS held (category TEXT PRIMARY KEY, n INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS counters (
  category TEXT NOT NULL, name TEXT NOT NULL, value REAL NOT NULL, PRIMARY KEY (category, name));
CREATE TABLE IF NOT EXISTS policies (category TEXT PRIMARY KEY, policy TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS judged (
  id INTEGER PRIMARY KEY, category TEXT NOT NULL, similarity REAL NOT NULL, right INTEGER NOT NULL);
CREATE TRIGGER IF NOT EXISTS entry_added AFTER INSERT ON entries BEGIN
  INSERT INTO changes (entry, gone) VALUES (new.id, 0);
  INSERT INTO held VALUES (new.category, 1) ON CONFLICT (category) DO UPDATE SET n = n + 1;
END;
CREATE TRIGGER IF NOT EXISTS entry_gone AFTER DELETE ON entries BEGIN
  INSERT INTO changes (entry, gone) VALUES (old.id, 1);
  UPDATE held SET n = n - 1 WHERE category = old.category;
END;
"""
_FIELDS = "id, partition, owner, category, text, embedding, response, created, crops, answer, meta"


class StoreError(RuntimeError):
    """The file cannot be read or written now: damaged, locked or full."""


class DocumentStore:
    """The rows of one file; ``path`` None keeps them in memory. Safe to use from many threads.

    Raises CacheVersionError for a file of another embedder or format, StoreError for one that is damaged.
    """

    def __init__(self, path: Path | None, embedder_id: str | None, dim: int) -> None:
        self.path = path
        self._lock = threading.RLock()
        try:
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(
                path or ":memory:", check_same_thread=False, isolation_level=None, timeout=10
            )
        except (sqlite3.Error, OSError) as error:
            raise StoreError(f"{path} cannot be opened: {error}") from None
        try:
            with self._guard():
                self._db.execute("PRAGMA journal_mode=WAL")
                self._db.execute("PRAGMA synchronous=NORMAL")
                self._db.execute("PRAGMA busy_timeout=10000")
                self._db.executescript(_SCHEMA)
                if not any(row[1] == "checksum" for row in self._db.execute("PRAGMA table_info(entries)")):
                    self._db.execute("ALTER TABLE entries ADD COLUMN checksum BLOB")
                self._claim(embedder_id, dim)
        except BaseException:
            self._db.close()
            raise

    def claim(self, embedder_id: str, dim: int) -> None:
        """Say whose vectors the file holds from now on. Raises CacheVersionError when they are another's."""
        with self._guard():
            self._claim(embedder_id, dim)

    def _claim(self, embedder_id: str | None, dim: int) -> None:
        self.dim = dim
        with self.writing():
            known = dict(self._db.execute("SELECT name, value FROM meta"))
            if known.setdefault("format", FORMAT) != FORMAT:
                raise CacheVersionError(f"{self.path} is of format {known['format']}, this is {FORMAT}")
            self._db.execute("INSERT OR IGNORE INTO meta VALUES ('format', ?)", (FORMAT,))
            if embedder_id is None:
                return
            mine = f"{embedder_id}/{dim}"
            if known.setdefault("embedder", mine) != mine:
                raise CacheVersionError(
                    f"{self.path} holds vectors of {known['embedder']}, but the embedder is {mine}: open it"
                    " with reembed=True to compute them again, or take another file"
                )
            self._db.execute("INSERT OR IGNORE INTO meta VALUES ('embedder', ?)", (mine,))

    @contextmanager
    def _guard(self) -> Iterator[None]:
        with self._lock:
            try:
                yield
            except sqlite3.Error as error:
                raise StoreError(f"{self.path or 'the cache'}: {error}") from error

    @contextmanager
    def writing(self) -> Iterator[None]:
        """One transaction. Raises StoreError, and then nothing was written."""
        with self._guard():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def _rows(self, sql: str, *values: object) -> list[tuple]:
        with self._guard():
            return self._db.execute(sql, values).fetchall()

    # Rows

    def insert(
        self, entry: Entry, key: bytes, expires: float, cost_s: float, heated: float
    ) -> tuple[int, list[int]]:
        """Write an entry (inside :meth:`writing`), replacing the one of the same key; (new id, replaced
        ids)."""
        old = [r[0] for r in self._db.execute("DELETE FROM entries WHERE key = ? RETURNING id", (key,))]
        said = (
            entry.partition, entry.owner, entry.category, _text(entry.text), _text(entry.response),
            _text(entry.answer_text), json.dumps(dict(entry.meta)),
        )  # fmt: skip
        cursor = self._db.execute(
            "INSERT INTO entries (key, partition, owner, category, text, embedding, crops, response, answer,"
            " meta, created, expires, cost, heat, heated, checksum)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 1, ?, ?)",
            (
                key, *said[:4], _blob(entry.embedding), _blob(entry.crops), *said[4:],
                entry.created, expires, cost_s, heated, checksum(key, entry.created, expires, *said),
            ),
        )  # fmt: skip
        return int(cursor.lastrowid or 0), old

    def read(self, entry_id: int) -> tuple[Entry, float, float] | None:
        """(entry, expires, cost) as the row says now; None when it is gone. Raises StoreError for a row that
        is not as it was written."""
        rows = self._rows(
            f"SELECT {_FIELDS}, expires, cost, key, checksum FROM entries WHERE id = ?", entry_id
        )
        if not rows:
            return None
        *row, expires, cost_s, key, kept = rows[0]
        # rows of before there were checksums have none
        if kept is not None and kept != checksum(key, row[7], expires, *row[1:5], row[6], *row[9:11]):
            raise StoreError(f"{self.path or 'the cache'}: entry {entry_id} is damaged")
        return self._entry(tuple(row)), expires, cost_s

    def find(self, key: bytes) -> int | None:
        """The id under an exact key."""
        rows = self._rows("SELECT id FROM entries WHERE key = ?", key)
        return rows[0][0] if rows else None

    def _entry(self, row: tuple) -> Entry:
        id_, partition, owner, category, text, embedding, response, created, crops, answer, meta = row
        return Entry(
            id_, partition, owner, category, text, self._vectors(embedding, 1), response, created,
            self._vectors(crops, 2), answer, json.loads(meta),
        )  # fmt: skip

    def _vectors(self, blob: bytes | None, axes: int) -> NDArray[np.float32] | None:
        if blob is None:
            return None
        flat = np.frombuffer(blob, np.float32)
        return flat if axes == 1 else flat.reshape(-1, self.dim)

    def scan(self) -> Iterator[tuple[int, bytes, str, str, bytes | None, float, str]]:
        """(id, key, partition, category, embedding, created, text) of every row, in order of ids."""
        last = 0
        while True:
            rows = self._rows(
                "SELECT id, key, partition, category, embedding, created, text FROM entries"
                " WHERE id > ? ORDER BY id LIMIT 5000",
                last,
            )
            if not rows:
                return
            yield from rows
            last = rows[-1][0]

    def some(self, ids: list[int]) -> list[tuple[int, bytes, str, str, bytes | None, float, str]]:
        """The same of some ids."""
        found: list[tuple] = []
        for first in range(0, len(ids), 500):
            part = ids[first : first + 500]
            found += self._rows(
                "SELECT id, key, partition, category, embedding, created, text FROM entries"
                f" WHERE id IN ({','.join('?' * len(part))})",
                *part,
            )
        return found

    def delete(self, ids: list[int]) -> int:
        """Remove rows; how many were there."""
        with self.writing():
            return self.delete_within(ids)

    def delete_within(self, ids: list[int]) -> int:
        """The same, inside :meth:`writing`."""
        gone = 0
        for first in range(0, len(ids), 500):
            part = ids[first : first + 500]
            marks = ",".join("?" * len(part))
            gone += self._db.execute(f"DELETE FROM entries WHERE id IN ({marks})", part).rowcount
        return gone

    def matching(
        self, *, text: str | None = None, partitions: tuple[str, ...] | None = None, owner: str | None = None,
        category: str | None = None, created_before: float | None = None, key: bytes | None = None,
    ) -> list[int]:  # fmt: skip
        """Ids of rows that meet every condition that is given."""
        parts, values = ["1"], []
        for sql, value in (
            ("text = ?", text), ("owner = ?", owner), ("category = ?", category), ("key = ?", key),
            ("created < ?", created_before),
        ):  # fmt: skip
            if value is not None:
                parts.append(sql)
                values.append(value)
        if partitions is not None:
            parts.append(f"partition IN ({','.join('?' * len(partitions))})")
            values += partitions
        return [r[0] for r in self._rows(f"SELECT id FROM entries WHERE {' AND '.join(parts)}", *values)]

    def expired(self, now: float, most: int) -> list[int]:
        """Ids of at most ``most`` rows whose time is over."""
        return [r[0] for r in self._rows("SELECT id FROM entries WHERE expires <= ? LIMIT ?", now, most)]

    # Quotas

    def held(self) -> dict[str, int]:
        """Rows of each category."""
        return {name: n for name, n in self._rows("SELECT category, n FROM held") if n}

    def coldest(self, category: str, n: int, now: float, ttl_s: float) -> list[int]:
        """The ``n`` rows of a category with the lowest ``heat * cost / (1 + age / ttl)``, oldest first among
        equals. Heat is hits, halved every hour."""
        rows = self._rows("SELECT id, heat, heated, cost, created FROM entries WHERE category = ?", category)
        if not rows:
            return []
        table = np.array(rows, np.float64)
        ids, heat, heated, cost, created = table.T
        hot = heat * 2.0 ** (-np.maximum(0, now - heated) / HEAT_HALF_LIFE_S)
        score = hot * np.maximum(cost, 1e-6) / (1 + np.maximum(0, now - created) / ttl_s)
        return ids[np.lexsort((ids, score))[:n]].astype(np.int64).tolist()

    def touch(self, touched: Mapping[int, tuple[int, float]]) -> None:
        """Add hits: id to (how many, when last)."""
        with self.writing():
            for entry_id, (n, at) in touched.items():
                row = self._db.execute(
                    "SELECT heat, heated FROM entries WHERE id = ?", (entry_id,)
                ).fetchone()
                if row is not None:
                    heat = row[0] * 2.0 ** (-max(0.0, at - row[1]) / HEAT_HALF_LIFE_S) + n
                    self._db.execute(
                        "UPDATE entries SET heat = ?, heated = ?, hits = hits + ? WHERE id = ?",
                        (heat, max(at, row[1]), n, entry_id),
                    )

    # Other processes

    def version(self) -> int:
        """Changes when another process wrote."""
        return self._rows("PRAGMA data_version")[0][0]

    def last_change(self) -> int:
        """Number of the last change."""
        return self._rows("SELECT COALESCE((SELECT seq FROM sqlite_sequence WHERE name = 'changes'), 0)")[0][
            0
        ]

    def changes(self, since: int) -> tuple[int, list[int], list[int], bool]:
        """(last number, added ids, removed ids, whether some numbers after ``since`` are lost)."""
        rows = self._rows("SELECT seq, entry, gone FROM changes WHERE seq > ? ORDER BY seq", since)
        lost = bool(rows) and rows[0][0] != since + 1
        gone = {entry for _, entry, is_gone in rows if is_gone}
        added = [entry for _, entry, is_gone in rows if not is_gone and entry not in gone]
        return (rows[-1][0] if rows else since), added, sorted(gone), lost

    def forget_changes(self) -> None:
        """Drop all but the last numbers."""
        with self.writing():
            self._db.execute(
                "DELETE FROM changes WHERE seq <= (SELECT MAX(seq) FROM changes) - ?", (KEPT_CHANGES,)
            )

    # Figures and settings

    def count(self, added: Mapping[tuple[str, str], float]) -> None:
        """Add to counters ``(category, name)``."""
        with self.writing():
            self._db.executemany(
                "INSERT INTO counters VALUES (?, ?, ?)"
                " ON CONFLICT (category, name) DO UPDATE SET value = value + excluded.value",
                [(category, name, value) for (category, name), value in added.items()],
            )

    def counters(self) -> dict[tuple[str, str], float]:
        """All counters, of all processes that ever wrote."""
        return {(c, n): v for c, n, v in self._rows("SELECT category, name, value FROM counters")}

    def judge(self, judged: list[Judged]) -> None:
        """Keep judged candidates for calibration."""
        with self.writing():
            self._db.executemany(
                "INSERT INTO judged (category, similarity, right) VALUES (?, ?, ?)",
                [(j.category, j.similarity, j.right) for j in judged],
            )

    def judged(self, most: int = 20_000) -> list[Judged]:
        """The latest judged candidates."""
        rows = self._rows("SELECT category, similarity, right FROM judged ORDER BY id DESC LIMIT ?", most)
        return [Judged(c, s, bool(r)) for c, s, r in rows]

    def policies(self) -> dict[str, CategoryPolicy]:
        """Policies that calibration wrote into the file."""
        rows = self._rows("SELECT category, policy FROM policies")
        return {category: CategoryPolicy(**json.loads(policy)) for category, policy in rows}

    def save_policy(self, category: str, policy: CategoryPolicy) -> None:
        """Write a policy into the file; every process that opens it takes it."""
        with self.writing():
            text = json.dumps(asdict(policy))
            self._db.execute("INSERT OR REPLACE INTO policies VALUES (?, ?)", (category, text))

    def forget_vectors(self, embedder_id: str, dim: int) -> None:
        """Drop all vectors, for another embedder."""
        with self.writing():
            self._db.execute("UPDATE entries SET embedding = NULL, crops = NULL")
            self._db.execute("INSERT OR REPLACE INTO meta VALUES ('embedder', ?)", (f"{embedder_id}/{dim}",))

    def set_vectors(self, vectors: Mapping[int, NDArray[np.float32]]) -> None:
        """Write embeddings of some ids."""
        with self.writing():
            self._db.executemany(
                "UPDATE entries SET embedding = ? WHERE id = ?",
                [(_blob(vector), entry_id) for entry_id, vector in vectors.items()],
            )

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()


def checksum(key: bytes, created: float, expires: float, *texts: str) -> bytes:
    """8 bytes over what an answer is given by: SQLite itself notices only damage to its own structure."""
    digest = hashlib.blake2b(key, digest_size=8)
    for text in (repr(float(created)), repr(float(expires)), *texts):
        part = text.encode()
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()


def _blob(vectors: NDArray[np.float32] | None) -> bytes | None:
    return None if vectors is None else np.ascontiguousarray(vectors, np.float32).tobytes()


def _text(text: str) -> str:
    """``text`` as SQLite can keep it: lone surrogates are no UTF-8."""
    return text.encode("utf-8", "replace").decode() if not text.isascii() else text
