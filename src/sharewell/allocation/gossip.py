"""The gossip log: append-only, signed, a grow-only set that any order of merging makes equal.

Each author numbers its rows from 1 and links each to the one before; a signature over the newest link vouches
for all of them. Merging is a union keyed by (author, number), hence commutative, associative and idempotent.
An author that signs two histories is found out by any peer that sees both: its rows then count for nothing.
SQLite holds the truth, in one transaction a merge; every row is checked again when a log is opened.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .identity import Identity, Signatures, sealed
from .wire import (
    ROOT,
    SIGNATURE,
    GossipFormatError,
    Row,
    Run,
    decode,
    encode,
    link_of_packed,
    pack_row,
    split_points,
    unpack_row,
)

HONEST, FORKED, FORGOTTEN = 0, 1, 2
_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS authors (author BLOB PRIMARY KEY, state INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS rows (author BLOB, seq INTEGER, packed BLOB NOT NULL, link BLOB NOT NULL,
    signature BLOB, PRIMARY KEY (author, seq)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS aside (author BLOB, kind TEXT, message BLOB, PRIMARY KEY (author, kind, message));
"""


class LogConflict(ValueError):
    """An author signed two different rows under one number. Both are kept aside."""

    def __init__(self, author: bytes, seq: int, ours: Row, theirs: Row) -> None:
        super().__init__(f"author {author.hex()[:16]} signed two histories that differ at row {seq}")
        self.author, self.seq, self.ours, self.theirs = author, seq, ours, theirs


class DamagedLog(ValueError):
    """The file of a log is not as it was written; no row of it is used."""


@dataclass(frozen=True)
class LogLimits:
    """What a log takes from others. Rows of an author beyond ``max_rows_per_author`` are refused whatever the
    order they come in; so are all beyond ``max_rows``."""

    max_rows_per_author: int = 100_000
    max_rows: int = 10_000_000
    max_row_bytes: int = 4096
    max_aside: int = 1000

    def __post_init__(self) -> None:
        for name in ("max_rows_per_author", "max_rows", "max_row_bytes", "max_aside"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass
class MergeReport:
    """``added``: new rows as (author, seq, row), in an order that a reader may apply. ``duplicates``: rows
    that were known. ``waiting``: rows kept until those before them come. ``refused``: author and why.
    ``conflicts``: authors found out by this merge."""

    added: list[tuple[bytes, int, Row]] = field(default_factory=list)
    duplicates: int = 0
    waiting: int = 0
    refused: dict[bytes, str] = field(default_factory=dict)
    conflicts: list[LogConflict] = field(default_factory=list)


class GossipLog:
    """A log in an SQLite file (or ``:memory:``). ``identity``: who appends; kept in the file, made when
    missing. ``share=False`` keeps the own rows out of every delta. Raises DamagedLog when a file fails its
    checks."""

    def __init__(
        self,
        path: str | Path = ":memory:",
        identity: Identity | None = None,
        limits: LogLimits | None = None,
        share: bool = True,
    ) -> None:
        self.limits, self.share = limits or LogLimits(), share
        self._name = Path(path).name
        self._signatures = Signatures()
        self._heads: dict[bytes, tuple[int, bytes]] = {}
        self._state: dict[bytes, int] = {}
        self._aside: dict[bytes, int] = {}  # runs that wait, by author
        self._count = 0
        # An existing file that holds nothing has lost it: only a file that is not there, or empty, is a new
        # log.
        existing = Path(path).is_file() and Path(path).stat().st_size > 0
        self._db = sqlite3.connect(str(path), isolation_level=None, check_same_thread=False)
        try:
            self._open(identity, existing)
        except (sqlite3.Error, GossipFormatError, TypeError, ValueError) as error:
            self._db.close()
            if isinstance(error, DamagedLog):
                raise
            raise DamagedLog(f"{self._name}: not a gossip log, or damaged ({error})") from None

    def _open(self, identity: Identity | None, existing: bool) -> None:
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        self._db.execute("PRAGMA cell_size_check=ON")
        self._db.executescript(_SCHEMA)
        for author, state in self._db.execute("SELECT author, state FROM authors"):
            self._state[author] = state
        newest: dict[bytes, tuple[int, bytes, bytes]] = {}
        for author, seq, packed, link, signature in self._db.execute(
            "SELECT author, seq, packed, link, signature FROM rows ORDER BY author, seq"
        ):
            if not all(isinstance(value, bytes) for value in (author, packed, link)):
                raise DamagedLog(f"{self._name}: a row holds a value of another type")
            before, previous = self._heads.get(author, (0, ROOT))
            if seq != before + 1 or link_of_packed(previous, author, seq, packed) != link:
                raise DamagedLog(
                    f"{self._name}: row {seq} of author {author.hex()[:16]} is missing or altered"
                )
            self._heads[author] = (seq, link)
            self._count += 1
            if signature is not None:
                newest[author] = (seq, link, self._unsealed(signature))
        for author, (seq, link, signature) in newest.items():
            if not self._signatures.right(author, seq, link, signature):
                raise DamagedLog(f"{self._name}: the rows of author {author.hex()[:16]} are not its own")
        for author, count in self._db.execute(
            "SELECT author, COUNT(*) FROM aside WHERE kind = 'waiting' GROUP BY author"
        ):
            self._aside[author] = count
        for (message,) in self._db.execute("SELECT message FROM aside"):
            decode(message)
        meta = dict(self._db.execute("SELECT key, value FROM meta"))
        if (meta or existing) and meta.get("hash") != self.hash():
            raise DamagedLog(f"{self._name}: the rows are not those that were written last")
        secret = meta.get("secret")
        if (
            secret is not None
            and meta.get("secret_check") != hashlib.blake2b(secret, digest_size=16).digest()
        ):
            raise DamagedLog(f"{self._name}: the key is altered")
        self.identity = identity or Identity(secret)
        with self._transaction():
            self._remember_identity()

    def _unsealed(self, stored: bytes) -> bytes:
        if sealed(stored[:SIGNATURE]) != stored:
            raise DamagedLog(f"{self._name}: a signature is altered")
        return stored[:SIGNATURE]

    def _remember_identity(self) -> None:
        secret = self.identity.secret
        self._put("secret", secret)
        self._put("secret_check", hashlib.blake2b(secret, digest_size=16).digest())

    def _put(self, key: str, value: bytes) -> None:
        self._db.execute("INSERT INTO meta VALUES (?, ?) ON CONFLICT DO UPDATE SET value = ?2", (key, value))

    def _transaction(self) -> _Transaction:
        return _Transaction(self)

    @property
    def author(self) -> bytes:
        """Who appends here."""
        return self.identity.author

    def __len__(self) -> int:
        """Rows, those of forked authors included."""
        return self._count

    def close(self) -> None:
        self._db.close()

    def hash(self) -> bytes:
        """32 bytes that are equal for equal logs, however they came about."""
        whole = hashlib.blake2b(digest_size=32)
        for author in sorted({*self._heads, *self._state}):
            state = self._state.get(author, HONEST)
            seq, link = self._heads.get(author, (0, ROOT)) if state == HONEST else (0, ROOT)
            whole.update(author + bytes([state]) + seq.to_bytes(8, "big") + link)
        return whole.digest()

    def heads(self) -> dict[bytes, int]:
        """Highest row known of each author; -1 for those whose rows are not wanted (forked, forgotten)."""
        heads = {author: seq for author, (seq, _) in self._heads.items()}
        return heads | {author: -1 for author, state in self._state.items() if state != HONEST}

    def excluded(self) -> frozenset[bytes]:
        """Authors whose rows count for nothing."""
        return frozenset(author for author, state in self._state.items() if state != HONEST)

    def rows(self) -> Iterator[tuple[bytes, int, Row]]:
        """All rows that count, author by author in order."""
        for author, seq, packed in self._db.execute(
            "SELECT author, seq, packed FROM rows ORDER BY author, seq"
        ):
            if self._state.get(author, HONEST) == HONEST:
                yield author, seq, unpack_row(packed)

    def append(self, row: Row) -> int:
        """Write and sign one's own next row; returns its number. Raises ValueError for one that is too
        big.
        """
        packed = pack_row(row)
        if len(packed) > self.limits.max_row_bytes or len(row) > 255:
            raise ValueError(f"row must have at most {self.limits.max_row_bytes} bytes, got {len(packed)}")
        if self._state.get(self.author, HONEST) == FORKED:
            raise LogConflict(self.author, self._heads[self.author][0], row, row)
        seq, link = self._heads.get(self.author, (0, ROOT))
        seq += 1
        link = link_of_packed(link, self.author, seq, packed)
        with self._transaction():
            self._insert(self.author, seq, packed, link, self.identity.sign(seq, link))
        return seq

    def _insert(self, author: bytes, seq: int, packed: bytes, link: bytes, signature: bytes | None) -> None:
        values = (author, seq, packed, link, None if signature is None else sealed(signature))
        self._db.execute("INSERT INTO rows VALUES (?, ?, ?, ?, ?)", values)
        self._heads[author] = (seq, link)
        self._count += 1

    def delta(self, since: Mapping[bytes, int], max_rows: int = 50_000, compress: bool = True) -> bytes:
        """A message with the rows above ``since`` (a peer's heads), about ``max_rows`` at most; ask again for
        the rest. Of forked authors it carries the proof instead."""
        if max_rows < 1:
            raise ValueError(f"max_rows must be at least 1, got {max_rows}")
        runs: list[Run] = []
        for author in sorted(self._heads):
            known = since.get(author, 0)
            if self._state.get(author, HONEST) != HONEST or known < 0 or self._heads[author][0] <= known:
                continue
            if author == self.author and not self.share:
                continue
            if max_rows <= 0:
                break
            run = self._run(author, known, max_rows)
            if run is not None:
                runs.append(run)
                max_rows -= len(run.rows)
        for author, state in self._state.items():
            if state == FORKED and since.get(author, 0) >= 0:
                runs += self._aside_runs(author, "proof")
        return encode(runs, compress)

    def _run(self, author: bytes, after: int, budget: int) -> Run | None:
        """Rows after ``after``, up to a row whose signature is here."""
        if after + 1 == self._heads[author][0]:
            end = after + 1  # by far the most common
        else:
            signed = self._db.execute(
                "SELECT seq FROM rows WHERE author = ? AND seq > ? AND signature IS NOT NULL ORDER BY seq",
                (author, after),
            )
            end = split_points([s for (s,) in signed], after, budget)
        if not end:
            return None
        found = self._db.execute(
            "SELECT packed, signature FROM rows WHERE author = ? AND seq > ? AND seq <= ? ORDER BY seq",
            (author, after, end),
        ).fetchall()
        if found[-1][1] is None:
            return None
        rows = tuple(unpack_row(packed) for packed, _ in found)
        return Run(author, after + 1, self._link(author, after), rows, self._unsealed(found[-1][1]))

    def _link(self, author: bytes, seq: int) -> bytes:
        if seq == 0:
            return ROOT
        row = self._db.execute("SELECT link FROM rows WHERE author = ? AND seq = ?", (author, seq)).fetchone()
        return row[0]

    def _aside_runs(self, author: bytes, kind: str) -> list[Run]:
        found = self._db.execute("SELECT message FROM aside WHERE author = ? AND kind = ?", (author, kind))
        return [run for (message,) in found for run in decode(message)]

    def merge(self, message: bytes) -> MergeReport:
        """Take in a delta: all of it or, when anything is wrong with it, nothing.

        Raises GossipFormatError for a damaged message, another version, an oversized row, or a signature that
        is not the author's. An author found to have signed two histories is no error: see ``conflicts``.
        """
        runs = decode(message)
        report = MergeReport()
        with self._transaction():
            for run in runs:
                self._take(run, report)
        return report

    def _take(self, run: Run, report: MergeReport) -> None:
        author, state = run.author, self._state.get(run.author, HONEST)
        if state != HONEST:
            report.refused[author] = "forked" if state == FORKED else "forgotten"
            return
        packed = [pack_row(row) for row in run.rows]
        if max(map(len, packed)) > self.limits.max_row_bytes:
            raise GossipFormatError(
                f"a row of author {author.hex()[:16]} is over {self.limits.max_row_bytes} bytes"
            )
        links, link = [], run.link
        for seq, body in enumerate(packed, start=run.first):
            link = link_of_packed(link, author, seq, body)
            links.append(link)
        head = self._heads.get(author, (0, ROOT))[0]
        if run.last <= head and self._link(author, run.last) == links[-1]:
            report.duplicates += len(packed)  # one link fixes all before it
            return
        if not self._signatures.right(author, run.last, links[-1], run.signature):
            raise GossipFormatError(f"signature of author {author.hex()[:16]} up to row {run.last} is wrong")
        if run.first == 1 and run.link != ROOT:
            raise GossipFormatError(f"author {author.hex()[:16]} signed a first row that has one before it")
        if run.first > self.limits.max_rows_per_author:
            report.refused[author] = f"over the limit of {self.limits.max_rows_per_author} rows an author"
            return
        if run.first <= head + 1:
            fork = self._fork_with_rows(run, links, head)
            if fork:
                self._found_out(run, fork, report)
                return
            start = head + 1 - run.first
            report.duplicates += start
            self._extend(run, packed, links, start, report)
        else:
            for other in self._aside_runs(author, "waiting"):
                seq = _differ(run, links, other)
                if seq:
                    self._found_out(run, seq, report, other)
                    return
            if self._aside.get(author, 0) >= self.limits.max_aside:
                report.refused[author] = "too many rows that wait for earlier ones"
                return
            cursor = self._db.execute(
                "INSERT OR IGNORE INTO aside VALUES (?, 'waiting', ?)",
                (author, encode([run], compress=False)),
            )
            self._aside[author] = self._aside.get(author, 0) + cursor.rowcount
            report.waiting += len(packed)
            return
        if self._aside.get(author):
            self._use_waiting(author, report)

    def _extend(
        self, run: Run, packed: list[bytes], links: list[bytes], start: int, report: MergeReport
    ) -> None:
        stop = min(len(packed), self.limits.max_rows_per_author - run.first + 1)
        stop = min(stop, start + self.limits.max_rows - self._count)
        if stop < len(packed):
            report.refused[run.author] = f"over the limit of {self.limits.max_rows_per_author} rows an author"
        if stop <= start:
            return
        last = len(packed) - 1
        self._db.executemany(
            "INSERT INTO rows VALUES (?, ?, ?, ?, ?)",
            [
                (
                    run.author,
                    run.first + k,
                    packed[k],
                    links[k],
                    sealed(run.signature) if k == last else None,
                )
                for k in range(start, stop)
            ],
        )
        self._heads[run.author] = (run.first + stop - 1, links[stop - 1])
        self._count += stop - start
        report.added += [(run.author, run.first + k, run.rows[k]) for k in range(start, stop)]

    def _use_waiting(self, author: bytes, report: MergeReport) -> None:
        """Runs that waited and now connect; those still ahead stay."""
        waiting = self._aside_runs(author, "waiting")
        self._db.execute("DELETE FROM aside WHERE author = ? AND kind = 'waiting'", (author,))
        self._aside.pop(author, None)
        before = report.waiting
        for run in sorted(waiting, key=lambda run: run.first):
            self._take(run, report)
        report.waiting = before

    def _fork_with_rows(self, run: Run, links: list[bytes], head: int) -> int:
        """First number at which a run differs from the rows that are here, 0 for none."""
        if self._link(run.author, run.first - 1) != run.link:
            return run.first
        end = min(run.last, head)
        known = self._db.execute(
            "SELECT seq, link FROM rows WHERE author = ? AND seq >= ? AND seq <= ? ORDER BY seq",
            (run.author, run.first, end),
        )
        for seq, link in known:
            if links[seq - run.first] != link:
                return seq
        return 0

    def _found_out(self, run: Run, seq: int, report: MergeReport, other: Run | None = None) -> None:
        """Keep both histories aside, and let the author's rows count no more."""
        if other is None:
            other = self._run(run.author, run.first - 1, len(run.rows))
            if other is None or other.last < seq:
                other = self._run(run.author, 0, seq)
        ours: Row = ()
        if other is not None and other.first <= seq <= other.last:
            ours = other.rows[seq - other.first]
        theirs = run.rows[seq - run.first] if run.first <= seq <= run.last else ()
        for proof in (run, other):
            if proof is not None:
                self._db.execute(
                    "INSERT OR IGNORE INTO aside VALUES (?, 'proof', ?)",
                    (run.author, encode([proof], compress=False)),
                )
        self._db.execute("DELETE FROM aside WHERE author = ? AND kind = 'waiting'", (run.author,))
        self._aside.pop(run.author, None)
        self._set_state(run.author, FORKED)
        report.added = [row for row in report.added if row[0] != run.author]
        report.conflicts.append(LogConflict(run.author, seq, ours, theirs))

    def _set_state(self, author: bytes, state: int) -> None:
        self._state[author] = state
        self._db.execute(
            "INSERT INTO authors VALUES (?, ?) ON CONFLICT DO UPDATE SET state = ?2", (author, state)
        )

    def forget(self, author: bytes) -> int:
        """Delete an author's rows here and take no more of them; returns how many. Forgetting oneself also
        draws a new key: the old numbers may live on elsewhere and must not be used twice."""
        with self._transaction():
            gone = self._db.execute("DELETE FROM rows WHERE author = ?", (author,)).rowcount
            self._db.execute("DELETE FROM aside WHERE author = ?", (author,))
            self._heads.pop(author, None)
            self._aside.pop(author, None)
            self._count -= gone
            self._set_state(author, FORGOTTEN)
            if author == self.author:
                self.identity = Identity()
                self._remember_identity()
        return gone


class _Transaction:
    """All of it is written, with the log's new hash, or none; memory follows the file."""

    def __init__(self, log: GossipLog) -> None:
        self._log = log

    def __enter__(self) -> None:
        log = self._log
        log._db.execute("BEGIN IMMEDIATE")
        self._kept = (
            dict(log._heads),
            dict(log._state),
            dict(log._aside),
            log._count,
            getattr(log, "identity", None),
        )

    def __exit__(self, kind: type | None, *_: object) -> None:
        log = self._log
        if kind is None:
            try:
                log._put("hash", log.hash())
                log._db.execute("COMMIT")
                return
            except BaseException:
                self._undo()
                raise
        self._undo()

    def _undo(self) -> None:
        log = self._log
        log._heads, log._state, log._aside, log._count, identity = self._kept
        if identity is not None:
            log.identity = identity
        if log._db.in_transaction:
            log._db.execute("ROLLBACK")


def _differ(run: Run, links: list[bytes], other: Run) -> int:
    """First number at which two runs of an author contradict each other, 0 when they do not."""
    a = {run.first - 1: run.link} | dict(enumerate(links, start=run.first))
    b = {other.first - 1: other.link} | dict(enumerate(other.links(), start=other.first))
    for seq in sorted(a.keys() & b.keys()):
        if a[seq] != b[seq]:
            return max(seq, 1)
    return 0
