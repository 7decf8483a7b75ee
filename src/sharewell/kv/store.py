"""Segments within a budget of bytes: found by the token ids they hold, evicted by what they are worth.

Lookup is Rabin and Karp's rolling hash over windows of ``block`` ids, compared id by id before anything
counts as a match. Worth is the expected number of (token, layer) computations saved per byte."""

from __future__ import annotations

import itertools
import logging
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from .segments import Segment, SegmentKV, TensorKV

log = logging.getLogger(__name__)

SegmentId = int
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd: multiplication by it is a bijection modulo 2**64
_HALF_LIFE = 256  # lookups after which a use counts half
# Places of one segment with the same window, and segments with it, that a lookup looks at: repetitive texts
# would have quadratically many.
_REPEATS = 16
_HOLDERS = 64


@dataclass(frozen=True)
class Match:
    """``length`` tokens that a text from ``start`` on and a segment from ``offset`` on have in common."""

    segment: SegmentId
    start: int
    offset: int
    length: int


@dataclass
class StoreStats:
    """Counts since the store was made; ``bytes_used``, ``segments`` and ``pinned`` are of now."""

    segments: int = 0
    bytes_used: int = 0
    pinned: int = 0
    puts: int = 0
    refused: int = 0  # larger than what can be made free
    evictions: int = 0
    lookups: int = 0
    hits: int = 0
    tokens_matched: int = 0
    damaged: int = 0  # files with a wrong checksum: taken as misses


@dataclass
class _Entry:
    segment: Segment
    nbytes: int
    windows: list[int]
    pins: int = 0
    uses: float = 0.0
    at: int = 0
    doomed: bool = field(default=False)  # dropped while pinned: goes when the last pin does


class KVSegmentStore:
    """Segments of at most ``budget_bytes`` together, on ``device``; any number of threads.

    A segment is never changed: a plan copies what it reads into its own space (copy on write), so recomputing
    some of the tokens for one reader leaves the others' alone. What is pinned is not evicted. ``block``: the
    least number of tokens that a match has. Raises ValueError naming the field."""

    def __init__(self, budget_bytes: int, device: torch.device | str = "cpu", *, block: int = 16) -> None:
        if budget_bytes < 1:
            raise ValueError(f"budget_bytes must be at least 1, got {budget_bytes}")
        if block < 2:
            raise ValueError(f"block must be at least 2, got {block}")
        self.budget_bytes, self.device, self.block = budget_bytes, torch.device(device), block
        self._entries: dict[SegmentId, _Entry] = {}
        self._index: dict[tuple[str, str], dict[int, list[tuple[SegmentId, int]]]] = {}
        self._ids = itertools.count()
        self._lock = threading.RLock()
        self._stats = StoreStats()

    # Putting and evicting

    def put(
        self,
        model_key: str,
        token_ids: Sequence[int] | torch.Tensor | np.ndarray,
        kv: SegmentKV,
        positions: Sequence[int] | torch.Tensor | np.ndarray,
        *,
        hidden: Mapping[int, torch.Tensor] | None = None,
        influence: torch.Tensor | None = None,
        scope: str = "",
        writer: str = "",
    ) -> SegmentId | None:
        """Keep a segment; None when it does not fit beside what is pinned (the store is unchanged then, and
        ``kv`` still the caller's). Evicts what is worth least per byte. Raises ValueError as
        :class:`Segment` does."""
        ids, where = (torch.as_tensor(x, dtype=torch.int64).cpu().clone() for x in (token_ids, positions))
        if isinstance(kv, TensorKV) and kv.k.device != self.device:
            kv = TensorKV(kv.k.to(self.device), kv.v.to(self.device))
        with self._lock:
            segment = Segment(
                next(self._ids), model_key, ids, where, kv, dict(hidden or {}), influence, scope, writer
            )
            if not self._make_room(segment.nbytes):
                self._stats.refused += 1
                return None
            self._add(segment)
            self._stats.puts += 1
            return segment.id

    def _add(self, segment: Segment) -> None:
        # a segment counts as used once when it is new: it was worth putting
        entry = _Entry(segment, segment.nbytes, [], uses=1.0, at=self._stats.lookups)
        index = self._index.setdefault((segment.model_key, segment.scope), {})
        hashes = window_hashes(segment.token_ids.numpy(), self.block)
        seen: Counter[int] = Counter()
        for offset, key in enumerate(hashes.tolist()):
            seen[key] += 1
            if seen[key] <= _REPEATS:
                index.setdefault(key, []).append((segment.id, offset))
        entry.windows = list(seen)
        self._entries[segment.id] = entry
        self._stats.bytes_used += entry.nbytes

    def _make_room(self, needed: int) -> bool:
        free = self.budget_bytes - self._stats.bytes_used
        if needed <= free:
            return True
        loose = sorted((e for e in self._entries.values() if not e.pins), key=self._worth)
        if needed > free + sum(e.nbytes for e in loose):
            return False
        for entry in loose:
            if free >= needed:
                break
            free += entry.nbytes
            self._remove(entry)
            self._stats.evictions += 1
        return True

    def shrink(self) -> bool:
        """Evict the segment that is worth least per byte, for the memory; False when all are pinned."""
        with self._lock:
            loose = [e for e in self._entries.values() if not e.pins]
            if loose:
                self._remove(min(loose, key=self._worth))
                self._stats.evictions += 1
            return bool(loose)

    def _worth(self, entry: _Entry) -> tuple[float, int]:
        """Expected token-layers saved per byte: uses, halved every so many lookups; then the older goes."""
        age = self._stats.lookups - entry.at
        expected = entry.uses * 0.5 ** (age / _HALF_LIFE) * entry.segment.token_layers
        return expected / entry.nbytes, entry.segment.id

    def _remove(self, entry: _Entry) -> None:
        segment = entry.segment
        self._unlist(entry)
        del self._entries[segment.id]
        self._stats.bytes_used -= entry.nbytes
        segment.kv.release()

    def _unlist(self, entry: _Entry) -> None:
        """No lookup finds the segment any more."""
        scope = entry.segment.model_key, entry.segment.scope
        index = self._index.get(scope, {})
        for key in entry.windows:
            left = [found for found in index[key] if found[0] != entry.segment.id]
            if left:
                index[key] = left
            else:
                del index[key]
        entry.windows = []
        if not index:
            self._index.pop(scope, None)

    def drop(self, segment: SegmentId) -> None:
        """Forget a segment; a pinned one is no longer found, and goes with its last pin. Unknown ones are
        ignored."""
        with self._lock:
            entry = self._entries.get(segment)
            if entry is None:
                return
            if entry.pins:
                entry.doomed = True
                self._unlist(entry)
            else:
                self._remove(entry)

    def clear(self) -> None:
        """Drop every segment."""
        for segment in list(self._entries):
            self.drop(segment)

    # Finding

    def find(
        self,
        model_key: str,
        token_ids: Sequence[int] | torch.Tensor | np.ndarray,
        *,
        scope: str = "",
        among: Sequence[SegmentId] | None = None,
        min_tokens: int | None = None,
    ) -> list[Match]:
        """The longest runs of ``token_ids`` that segments hold, none overlapping, by start.

        ``among``: only these segments. ``min_tokens``: at least ``block``, the default. A segment may be
        evicted between this call and :meth:`pin`, which then raises KeyError: compute instead."""
        ids = np.ascontiguousarray(torch.as_tensor(token_ids, dtype=torch.int64).cpu().numpy())
        least = max(self.block, min_tokens or self.block)
        with self._lock:
            self._stats.lookups += 1
            found = self._candidates(ids, self._index.get((model_key, scope), {}), among, least)
            chosen: list[Match] = []
            taken = np.zeros(len(ids) + 1, dtype=bool)
            for m in sorted(found, key=lambda m: (-m.length, m.start, -m.segment)):
                clash = np.flatnonzero(taken[m.start : m.start + m.length])
                if len(clash):  # what is left of it in front of the longer one, or behind
                    free = np.flatnonzero(~taken[m.start : m.start + m.length])
                    if not len(free):
                        continue
                    run = max(np.split(free, np.flatnonzero(np.diff(free) > 1) + 1), key=len)
                    m = Match(m.segment, m.start + int(run[0]), m.offset + int(run[0]), len(run))
                    if m.length < least:
                        continue
                taken[m.start : m.start + m.length] = True
                chosen.append(m)
            for m in chosen:
                self._use(self._entries[m.segment], m.length)
            self._stats.hits += bool(chosen)
            self._stats.tokens_matched += sum(m.length for m in chosen)
            return sorted(chosen, key=lambda m: m.start)

    def _candidates(
        self,
        ids: np.ndarray,
        index: dict[int, list[tuple[SegmentId, int]]],
        among: Sequence[SegmentId] | None,
        least: int,
    ) -> list[Match]:
        if not index or len(ids) < self.block:
            return []
        allowed = None if among is None else set(among)
        found: list[Match] = []
        covered: dict[tuple[SegmentId, int], int] = {}  # (segment, diagonal) -> end of the run found last
        for start, key in enumerate(window_hashes(ids, self.block).tolist()):
            for segment, offset in index.get(key, ())[-_HOLDERS:]:
                if allowed is not None and segment not in allowed:
                    continue
                if covered.get((segment, start - offset), -1) > start:
                    continue
                held = self._entries[segment].segment.token_ids.numpy()
                if not np.array_equal(held[offset : offset + self.block], ids[start : start + self.block]):
                    continue
                back, ahead = _extend(ids, held, start, offset)
                match = Match(segment, start - back, offset - back, back + ahead)
                covered[segment, start - offset] = match.start + match.length
                if match.length >= least:
                    found.append(match)
        return found

    def _use(self, entry: _Entry, tokens: int) -> None:
        now = self._stats.lookups
        entry.uses = entry.uses * 0.5 ** ((now - entry.at) / _HALF_LIFE) + tokens / len(entry.segment)
        entry.at = now

    def __contains__(self, segment: SegmentId) -> bool:
        with self._lock:
            return segment in self._entries and not self._entries[segment].doomed

    def __len__(self) -> int:
        return len(self._entries)

    # Using

    def pin(self, segment: SegmentId) -> Segment:
        """The segment, safe from eviction until as many :meth:`release`. Raises KeyError for one that is
        gone."""
        with self._lock:
            entry = self._entries[segment]
            if entry.doomed:
                raise KeyError(segment)
            entry.pins += 1
            return entry.segment

    def release(self, segment: SegmentId) -> None:
        """Undo one :meth:`pin`. Raises KeyError for an unknown segment, ValueError for one without pins."""
        with self._lock:
            entry = self._entries[segment]
            if not entry.pins:
                raise ValueError(f"segment {segment} is not pinned")
            entry.pins -= 1
            if entry.doomed and not entry.pins:
                self._remove(entry)

    @contextmanager
    def pinned(self, *segments: SegmentId) -> Iterator[list[Segment]]:
        """Pinned for the length of a block."""
        held: list[Segment] = []
        try:
            for segment in segments:
                held.append(self.pin(segment))
            yield held
        finally:
            for segment in held:
                self.release(segment.id)

    def stats(self) -> StoreStats:
        """A snapshot."""
        with self._lock:
            now = StoreStats(**vars(self._stats))
            now.segments = len(self._entries)
            now.pinned = sum(e.pins > 0 for e in self._entries.values())
            return now

    # Keeping on disk

    def save(self, folder: Path | str) -> int:
        """Write every segment to ``folder``, one safetensors file each with a checksum; returns how many.
        Files of segments that are gone stay: an operator's folder is not emptied."""
        from .segment_files import write_segment

        with self._lock:
            segments = [e.segment for e in self._entries.values() if not e.doomed]
        for segment in segments:
            write_segment(Path(folder), segment)
        return len(segments)

    def load(self, folder: Path | str, model_key: str | None = None) -> int:
        """Put the segments of ``folder`` (of ``model_key`` only, if given); returns how many. A damaged file
        is a miss: counted, named in the log, and skipped."""
        from .segment_files import DamagedSegment, read_segment

        loaded = 0
        for path in sorted(Path(folder).glob("*.safetensors")):
            try:
                kept = read_segment(path)
            except DamagedSegment as error:
                log.warning("%s", error)
                with self._lock:
                    self._stats.damaged += 1
                continue
            if model_key is not None and kept.model_key != model_key:
                continue
            new = self.put(
                kept.model_key, kept.token_ids, kept.kv, kept.positions, hidden=kept.hidden,
                influence=kept.influence, scope=kept.scope, writer=kept.writer,
            )  # fmt: skip
            loaded += new is not None
        return loaded


def window_hashes(ids: np.ndarray, window: int) -> np.ndarray:
    """Polynomial hashes modulo 2**64 of all windows of ``window`` ids: uint64 ``[len(ids) - window + 1]``."""
    n = len(ids) - window + 1
    if n < 1:
        return np.zeros(0, np.uint64)
    values = (ids.astype(np.uint64) + np.uint64(1)) * _BASE
    values ^= values >> np.uint64(29)
    hashes = np.zeros(n, np.uint64)
    with np.errstate(over="ignore"):
        for i in range(window):
            hashes = hashes * _BASE + values[i : i + n]
    return hashes


def _extend(a: np.ndarray, b: np.ndarray, i: int, j: int) -> tuple[int, int]:
    """How many ids agree before and from a[i], b[j] on."""
    n = min(i, j)
    back = np.flatnonzero(a[i - n : i][::-1] != b[j - n : j][::-1])
    m = min(len(a) - i, len(b) - j)
    ahead = np.flatnonzero(a[i : i + m] != b[j : j + m])
    return int(back[0]) if len(back) else n, int(ahead[0]) if len(ahead) else m
