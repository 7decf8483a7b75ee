"""The file and the memory index, kept in step: what one process wrote the others find within a second."""

from __future__ import annotations

import logging
import math
import sqlite3
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np

from ..models import Embedder
from ..simulation import Clock
from .base import Entry
from .figures import EVERYTHING, Figures
from .index import MemoryIndex
from .policy import DEFAULT, CategoryPolicy
from .salvage import salvage
from .settings import CacheSettings
from .store import DocumentStore, StoreError

log = logging.getLogger(__name__)
SWEEP = 500  # rows that one sweep removes at most


class Documents:
    """Entries of one file (None: of this process only) with their vectors in memory.

    ``policies`` is read at every eviction and gets what calibration wrote into the file. Once it is there, no
    fault of the file is raised: reads find nothing, writes keep nothing, ``fault`` says why. Raises
    CacheVersionError for a file of another embedder.
    """

    def __init__(
        self, path: Path | None, embedder: Embedder | None, policies: dict[str, CategoryPolicy],
        settings: CacheSettings, clock: Clock, figures: Figures, *, reembed: bool = False,
    ) -> None:  # fmt: skip
        self.path, self.policies, self.settings = path, policies, settings
        self.clock, self.figures = clock, figures
        self.fault = ""
        self.store: DocumentStore | None = None
        self.lock = threading.RLock()
        self._vectors = embedder is not None
        dim = embedder.dim if embedder is not None else 1
        self.index = MemoryIndex(
            dim, graph_from=settings.graph_from, background=settings.background, seed=settings.seed
        )
        self._touched: dict[int, tuple[int, float]] = {}
        self._seq, self._version, self._polled = 0, -1, -math.inf
        try:
            if embedder is not None and reembed:
                self.store = _reembedded(path, embedder)
            else:
                self.store = DocumentStore(path, embedder.id if embedder else None, dim)
            self._rebuild()
        except StoreError as error:
            self.failed("open", error)
            self._salvage(error, embedder, dim)

    def _salvage(self, error: StoreError, embedder: Embedder | None, dim: int) -> None:
        """Go on from memory with what a damaged file still holds; the file is left as it is."""
        if self.store is not None:
            self.store.close()
        cause = error.__cause__
        # not one that is locked, or on a full disk
        damaged = type(cause) is sqlite3.DatabaseError or "decode" in str(cause)
        self.store = None
        self.index.clear()
        found = salvage(self.path, embedder.id if embedder else None, dim) if damaged and self.path else None
        if found is None:
            return
        self.store, taken = found
        self._rebuild()
        self.fault += f"; {taken} answers could be read and are served from memory, nothing is written"
        log.warning("%s", self.fault)

    def _rebuild(self) -> None:
        assert self.store is not None
        self._seq = self.store.last_change()
        self.index.clear()
        part: list[tuple] = []
        for row in self.store.scan():
            part.append(row)
            if len(part) == 20_000:
                self._index_rows(part)
                part = []
        self._index_rows(part)
        self._take_policies()

    def _index_rows(self, rows: Iterable[tuple]) -> None:
        self.index.add(
            (
                i,
                key,
                partition,
                category,
                np.frombuffer(v, np.float32) if v and self._vectors else None,
                created,
            )
            for i, key, partition, category, v, created, _ in rows
        )

    def _take_policies(self) -> None:
        assert self.store is not None
        for category, policy in self.store.policies().items():
            if category in self.policies:
                self.policies[category] = policy

    def attach(self, embedder: Embedder) -> None:
        """Index the file's vectors, which an embedder was missing for. Raises CacheVersionError."""
        with self.lock:
            if self.store is not None:
                self.store.claim(embedder.id, embedder.dim)
            self.index.clear()
            self.index.dim, self._vectors = embedder.dim, True
            self.attempt("open", lambda _: self._rebuild())

    def failed(self, doing: str, error: Exception) -> None:
        """A fault of the file: requests go on as misses."""
        if str(error) != self.fault:
            log.warning("the cache cannot %s: %s", doing, error)
        self.fault = str(error)
        self.figures.add(EVERYTHING, f"store_errors:{doing}")

    def attempt(self, doing: str, work: Callable[[DocumentStore], object]) -> bool:
        """``work`` on the file; False when that failed."""
        if self.store is None:
            return False
        try:
            work(self.store)
        except (StoreError, TypeError, ValueError) as error:
            self.failed(doing, error)
            return False
        return True

    def row(self, entry_id: int | None) -> tuple[Entry, float, float] | None:
        """(entry, expires, cost) as the file says now; None when it is gone."""
        if self.store is None or entry_id is None:
            return None
        try:
            found = self.store.read(entry_id)
        except (StoreError, ValueError) as error:
            self.failed("read", error)
            return None
        if found is None:  # another process removed it
            self.index.remove([entry_id])
        return found

    def touch(self, entry_id: int) -> None:
        """Count a hit; it is written with the next maintenance."""
        with self.lock:
            n, _ = self._touched.get(entry_id, (0, 0.0))
            self._touched[entry_id] = (n + 1, self.clock.unix())

    def add(self, entry: Entry, key: bytes, life_s: float, cost_s: float) -> int:
        """Write and index an entry, evicting when the cache is full; its id, or 0 when the file takes
        nothing."""
        new: list[int] = []
        gone: list[int] = []

        def write(store: DocumentStore) -> None:
            self._flush_touched()
            with store.writing():
                evicted = self._make_room(store, entry.category, entry.created)
                entry_id, old = store.insert(entry, key, entry.created + life_s, cost_s, entry.created)
            new.append(entry_id)
            gone.extend([*evicted, *old])

        with self.lock:
            if not self.attempt("write", write):
                return 0
            self.index.remove(gone)
            row = (new[0], key, entry.partition, entry.category, entry.embedding, entry.created)
            self.index.add([row])
        return new[0]

    def _make_room(self, store: DocumentStore, category: str, now: float) -> list[int]:
        """Ids evicted so that one more fits: of the category itself when it holds its quota, else of the one
        that borrowed most."""
        capacity, held = self.settings.capacity, store.held()
        over = sum(held.values()) + 1 - capacity
        if over <= 0:
            return []

        def borrowed(name: str) -> float:
            return held.get(name, 0) - (self.policies[name].quota if name in self.policies else 0) * capacity

        own = held.get(category, 0) and borrowed(category) >= 0
        source = category if own else max(held, key=lambda name: (borrowed(name), name))
        ttl_s = self.policies.get(source, self.policies[DEFAULT]).ttl_s
        # a hundredth at once, so that a full cache does not rank its entries at every insertion
        evicted = store.coldest(source, max(over, min(held[source], capacity) // 100), now, ttl_s)
        store.delete_within(evicted)
        self.figures.add(source, "evicted", len(evicted))
        return evicted

    def remove(self, ids: list[int]) -> int:
        """Remove entries for every process; how many were there. Raises StoreError."""
        if self.store is None:
            raise StoreError(self.fault or "the cache is closed")
        with self.lock:
            gone = self.store.delete(ids)
            self.index.remove(ids)
        return gone

    def maintain(self, *, force: bool = False) -> None:
        """Fetch what other processes wrote, remove what is over, write hits and counters; at most every
        ``poll_s``."""
        now = self.clock.monotonic()
        if not force and now - self._polled < self.settings.poll_s:
            return
        if not self.lock.acquire(blocking=force):
            return  # somebody is at it
        try:
            self._polled = now
            self.attempt("maintain", self._maintain)
        finally:
            self.lock.release()

    def _maintain(self, store: DocumentStore) -> None:
        self._poll(store)
        gone = store.expired(self.clock.unix(), SWEEP)
        if gone:
            for entry_id in gone:
                self.figures.add(self.index.category(entry_id) or DEFAULT, "expired")
            store.delete(gone)
            self.index.remove(gone)
        self._flush_touched()
        fresh = self.figures.drain()
        if fresh:
            store.count(fresh)

    def _poll(self, store: DocumentStore) -> None:
        version = store.version()
        if version == self._version:
            return
        self._version = version
        seq, added, gone, lost = store.changes(self._seq)
        if lost:
            self._rebuild()
            return
        self._seq = seq
        self.index.remove(gone)
        self._index_rows(store.some([i for i in added if i not in self.index]))
        self._take_policies()
        store.forget_changes()

    def _flush_touched(self) -> None:
        if self._touched and self.store is not None:
            touched: Mapping[int, tuple[int, float]]
            touched, self._touched = self._touched, {}
            self.store.touch(touched)

    def close(self) -> None:
        """Write what is pending and close the file."""
        self.maintain(force=True)
        self.index.join()
        if self.store is not None:
            self.store.close()
            self.store = None


def _reembedded(path: Path | None, embedder: Embedder) -> DocumentStore:
    store = DocumentStore(path, None, embedder.dim)
    store.forget_vectors(embedder.id, embedder.dim)
    rows = [(row[0], row[6]) for row in store.scan()]
    for first in range(0, len(rows), 64):
        part = rows[first : first + 64]
        vectors = embedder.embed([text for _, text in part])
        store.set_vectors({entry_id: v for (entry_id, _), v in zip(part, vectors, strict=True)})
    return store
