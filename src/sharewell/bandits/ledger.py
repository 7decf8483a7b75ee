"""The journal of decisions and feedback: what happened, in the order in which it changed the statistics."""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np


class FeedbackError(ValueError):
    """Feedback that cannot be taken; ``kind`` is unknown, expired or finished."""

    def __init__(self, kind: str, decision_id: str) -> None:
        super().__init__(f"decision_id must be one that waits for feedback, got {decision_id!r} ({kind})")
        self.kind = kind


class LedgerInUse(ValueError):
    """Another process holds this ledger."""


class UnixClock(Protocol):
    """A ``sharewell.simulation.Clock`` is one."""

    def unix(self) -> float: ...


class Event(NamedTuple):
    """One change. What ``value`` and ``blob`` mean depends on ``kind`` (see ``LinearPolicy``)."""

    kind: str
    decision: str = ""
    arm: int = -1
    blob: bytes = b""
    value: float = 0.0
    weight: float = 1.0
    propensity: float = 1.0
    part: str = ""
    unix_s: float = 0.0

    def rows(self, width: int) -> np.ndarray:
        return np.frombuffer(self.blob, dtype="<f8").reshape(-1, width)


_COLUMNS = "kind, decision, arm, blob, value, weight, propensity, part, unix_s"
_TABLE = """
CREATE TABLE IF NOT EXISTS events (seq INTEGER PRIMARY KEY, kind TEXT, decision TEXT, arm INTEGER, blob BLOB,
    value REAL, weight REAL, propensity REAL, part TEXT, unix_s REAL);
CREATE INDEX IF NOT EXISTS decisions ON events (decision) WHERE decision != '';
CREATE TABLE IF NOT EXISTS about (name TEXT PRIMARY KEY, value TEXT);
"""


class Ledger:
    """An SQLite file (write-ahead log) that one process owns at a time.

    An event is committed before it changes the statistics, so that a process killed at any moment comes back
    by replay to the arrays that it had. ``timeout_s``: decisions older than this expire; ``on_timeout`` is
    the reward that they then count with, None takes them out of the statistics. ``power_safe`` waits for the
    disk at every event (a killed process loses nothing without it). Raises :class:`LedgerInUse`, and
    ValueError for a wrong setting or a file that is no ledger.
    """

    def __init__(
        self,
        path: str | Path,
        clock: UnixClock,
        *,
        timeout_s: float | None = None,
        on_timeout: float | None = None,
        power_safe: bool = False,
    ) -> None:
        if timeout_s is not None and not (math.isfinite(timeout_s) and timeout_s > 0):
            raise ValueError(f"timeout_s must be None or finite and above 0, got {timeout_s}")
        if on_timeout is not None and not math.isfinite(on_timeout):
            raise ValueError(f"on_timeout must be None or finite, got {on_timeout}")
        self.path, self.clock = Path(path), clock
        self.timeout_s, self.on_timeout = timeout_s, on_timeout
        if not self.path.parent.is_dir():
            raise ValueError(f"path must be in a folder that exists, got {self.path}")
        self._db = sqlite3.connect(self.path, timeout=0.0, isolation_level=None, check_same_thread=False)
        try:
            self._db.execute("PRAGMA locking_mode=EXCLUSIVE")
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute(f"PRAGMA synchronous={'FULL' if power_safe else 'NORMAL'}")
            self._db.executescript("BEGIN IMMEDIATE;" + _TABLE + "COMMIT;")
            row = self._db.execute("SELECT max(seq) FROM events").fetchone()
        except sqlite3.OperationalError as error:
            self._db.close()
            if "locked" in str(error):
                raise LedgerInUse(f"path must be a ledger that no other process holds, got {path}") from None
            raise
        except sqlite3.DatabaseError as error:
            self._db.close()
            raise ValueError(f"path must be a ledger or a new file, got {path}: {error}") from None
        self.last = int(row[0] or 0)  # number of the newest event

    def claim(self, settings: str) -> None:
        """Bind a new ledger to a policy's settings; ValueError when it belongs to others."""
        row = self._db.execute("SELECT value FROM about WHERE name = 'settings'").fetchone()
        if row is None:
            self._db.execute("INSERT INTO about VALUES ('settings', ?)", (settings,))
        elif row[0] != settings:
            raise ValueError(
                f"ledger must be one of this policy's settings {settings}, got one written under {row[0]}"
            )

    def append(self, events: list[Event]) -> None:
        """All of them or none. Raises sqlite3.OperationalError when the disk is full."""
        rows = [(self.last + 1 + i, *event) for i, event in enumerate(events)]
        self._db.execute("BEGIN")
        try:
            self._db.executemany(f"INSERT INTO events VALUES ({','.join('?' * 10)})", rows)
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise
        self.last += len(rows)

    def events(self, after: int = 0) -> Iterator[Event]:
        """In order, those behind number ``after``."""
        query = f"SELECT {_COLUMNS} FROM events WHERE seq > ? ORDER BY seq"
        for row in self._db.execute(query, (after,)):
            yield Event(*row)

    def end_of(self, decision: str) -> str | None:
        """``settled`` or ``expired``; None for a decision without an end."""
        row = self._db.execute(
            "SELECT kind, part FROM events WHERE decision = ? AND kind IN ('settle', 'expire')", (decision,)
        ).fetchone()
        return None if row is None else "settled" if row[0] == "settle" and row[1] != "timeout" else "expired"

    def close(self) -> None:
        self._db.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
