"""Who was served whose answer, and how to take all of one principal's answers out."""

from __future__ import annotations

import logging
import threading
from collections import deque
from dataclasses import dataclass

from ..base import Context, Entry, Query, Verdict

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HitRecord:
    """One served hit: unix seconds, entry, its owner, who asked, and how alike both were."""

    time: float
    entry_id: int
    entry_owner: str
    asked_by: str
    category: str
    similarity: float
    threshold: float


class Provenance:
    """Records every hit that all checks before it accepted, so put it last. Keeps the ``capacity`` newest.

    :meth:`quarantine` stops a principal's entries from being stored and served at once; taking them out of
    the file is the cache's ``invalidate(owner=...)``. Raises ValueError for a capacity below 1.
    """

    name = "provenance"

    def __init__(self, capacity: int = 10_000) -> None:
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1, got {capacity}")
        self._records: deque[HitRecord] = deque(maxlen=capacity)
        self._quarantined: set[str] = set()
        self._lock = threading.Lock()

    def quarantine(self, owner: str) -> tuple[HitRecord, ...]:
        """Refuse all entries of ``owner`` from now on; returns the hits on them that are on record."""
        with self._lock:
            self._quarantined.add(owner)
            return tuple(r for r in self._records if r.entry_owner == owner)

    def release(self, owner: str) -> None:
        """Trust ``owner`` again."""
        with self._lock:
            self._quarantined.discard(owner)

    def records(self) -> tuple[HitRecord, ...]:
        """Oldest first."""
        with self._lock:
            return tuple(self._records)

    def without_records(self) -> Provenance:
        """Another one with the same quarantine: for a copy of the cache."""
        with self._lock:
            made = Provenance(self._records.maxlen or 1)
            made._quarantined = set(self._quarantined)
        return made

    def admit(self, entry: Entry, context: Context) -> Verdict:
        """Refuse a quarantined owner."""
        return self._check(entry)

    def accept(self, query: Query, entry: Entry, context: Context) -> Verdict:
        """Refuse a quarantined owner's entry, record any other that is stored."""
        verdict = self._check(entry)
        if verdict.ok and entry.id:  # calibration asks about entries that nobody stored
            record = HitRecord(
                context.now,
                entry.id,
                entry.owner,
                query.owner,
                query.category,
                context.similarity,
                context.threshold,
            )
            with self._lock:
                self._records.append(record)
            log.debug("hit %s", record)
        return verdict

    def _check(self, entry: Entry) -> Verdict:
        with self._lock:
            ok = entry.owner not in self._quarantined
        return Verdict(ok, "" if ok else "provenance: quarantined owner")
