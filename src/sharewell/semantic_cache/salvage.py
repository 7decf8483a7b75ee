"""What can still be read of a damaged cache file, into memory. The file itself is never written to."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np

from .base import CacheVersionError
from .policy import CategoryPolicy
from .store import FORMAT, DocumentStore, checksum

MOST_ATTEMPTS = 20_000  # range queries; every damaged page costs some twenty
_ALL = (
    "SELECT id, key, partition, owner, category, text, embedding, crops, response, answer, meta, created,"
    " expires, cost, heated, checksum FROM entries WHERE id BETWEEN ? AND ? ORDER BY id"
)


def salvage(path: Path, embedder_id: str | None, dim: int) -> tuple[DocumentStore, int] | None:
    """(a store in memory, how many entries it took) of what is whole in ``path``; None when nothing can be
    read. A row is taken only when its checksum holds.

    Where the file no longer says whose vectors it has, or which thresholds were calibrated, its entries
    serve the exact tier only. Raises CacheVersionError for a readable file of another embedder or format.
    """
    for how in ("mode=ro", "immutable=1"):  # the second needs no write-ahead log, which may be damaged too
        try:
            with closing(sqlite3.connect(f"{path.resolve().as_uri()}?{how}", uri=True)) as db:
                db.text_factory = lambda raw: raw.decode("utf-8", "replace")
                found = _read(db, path, embedder_id, dim)
        except sqlite3.Error:
            continue
        if found is not None:
            return found
    return None


def _read(
    db: sqlite3.Connection, path: Path, embedder_id: str | None, dim: int
) -> tuple[DocumentStore, int] | None:
    known = dict(_rows(db, "SELECT name, value FROM meta") or [])
    mine = f"{embedder_id}/{dim}"
    if known.get("format", FORMAT) != FORMAT or (embedder_id and known.get("embedder", mine) != mine):
        raise CacheVersionError(
            f"{path} is damaged, and of {known.get('embedder')} in format {known.get('format')}: take another"
            " file"
        )
    policies = _rows(db, "SELECT category, policy FROM policies")
    alike = policies is not None and known.get("embedder") == mine
    store = DocumentStore(None, embedder_id, dim)
    taken = 0
    with store.writing():
        for row in _whole(db):
            vector = row[6] if alike and _usable(row[6], dim) else None
            id_, key, partition, owner, category, text, _, crops, response, answer, meta, *times = row[:-1]
            created, expires, cost_s, heated = times
            entry = replace(
                store._entry(
                    (id_, partition, owner, category, text, vector, response, created, None, answer, meta)
                ),
                crops=np.frombuffer(crops, np.float32).reshape(-1, dim) if vector and crops else None,
            )
            store.insert(entry, key, expires, cost_s, heated)
            taken += 1
    for category, policy in policies or []:
        try:
            store.save_policy(category, CategoryPolicy(**json.loads(policy)))
        except (TypeError, ValueError):
            continue
    if not taken:
        store.close()
        return None
    return store, taken


def _rows(db: sqlite3.Connection, sql: str) -> list[tuple] | None:
    try:
        return db.execute(sql).fetchall()
    except sqlite3.Error:
        return None


def _whole(db: sqlite3.Connection) -> Iterator[tuple]:
    """Rows with a good checksum; ranges that cannot be read are halved until what is damaged is left out."""
    last = _rows(db, "SELECT seq FROM sqlite_sequence WHERE name = 'entries'")
    highest = int(last[0][0]) if last and isinstance(last[0][0], int) else 1 << 24
    ranges, attempts = [(first, min(first + 499, highest)) for first in range(1, highest + 1, 500)], 0
    ranges.reverse()
    while ranges and attempts < MOST_ATTEMPTS:
        first, final = ranges.pop()
        attempts += 1
        try:
            rows = db.execute(_ALL, (first, final)).fetchall()
        except sqlite3.OperationalError:
            raise  # locked, or a file of before there were checksums
        except sqlite3.Error:
            if first < final:
                middle = (first + final) // 2
                ranges += [(middle + 1, final), (first, middle)]
            continue
        for row in rows:
            try:
                if row[-1] == checksum(row[1], row[11], row[12], *row[2:6], *row[8:11]):
                    yield row
            except (TypeError, ValueError, AttributeError):  # a field of another type: damaged
                continue


def _usable(blob: object, dim: int) -> bool:
    if not isinstance(blob, bytes) or len(blob) != 4 * dim:
        return False
    return abs(float(np.linalg.norm(np.frombuffer(blob, np.float32).astype(np.float64))) - 1) < 1e-3
