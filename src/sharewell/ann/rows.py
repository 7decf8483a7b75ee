"""Slots for vectors under labels: growth, tombstones, reuse of slots that no search can still see, scratch
memory.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import numpy as np

from .base import Metric, padded
from .graph import IP, L2, UNUSED, Graph, Scratch

LAYERS = 32  # more than any level that is ever drawn


def aligned(shape: tuple[int, ...], dtype: np.dtype | type, fill: int | None = 0) -> np.ndarray:
    """An array that begins on a cache line; ``fill`` None leaves it as it comes."""
    kind = np.dtype(dtype)
    size = int(np.prod(shape)) * kind.itemsize
    raw = np.empty(size + 64, np.uint8) if fill is None else np.zeros(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    array = raw[start : start + size].view(kind).reshape(shape)
    if fill:
        array[...] = fill
    return array


def empty_graph(capacity: int, dim: int, m: int, storage: str, upper_rows: int = 0) -> Graph:
    """A graph without nodes for ``capacity`` slots."""
    kind = np.int8 if storage == "int8" else np.float32
    return Graph(
        vectors=aligned((capacity, padded(dim)), kind),
        scales=aligned((capacity,), np.float32, 1),
        norms=aligned((capacity,), np.float32),
        level=aligned((capacity,), np.int16, UNUSED),
        links0=aligned((capacity, 2 * m), np.int32),
        count0=aligned((capacity,), np.int32),
        links=aligned((upper_rows, m), np.int32),
        count=aligned((upper_rows,), np.int32),
        upper=aligned((capacity,), np.int64),
        incoming=aligned((capacity,), np.int32),
        dead=aligned((capacity,), np.uint8),
        locks=aligned((capacity + 1,), np.int32),
        meta=np.array([-1, -1], np.int64),
    )


def grown(g: Graph, capacity: int, upper_rows: int) -> Graph:
    """A copy with room for more; whoever holds ``g`` can go on reading it."""
    arrays = {}
    for name, old in zip(Graph._fields, g, strict=True):
        if name == "meta":
            arrays[name] = old.copy()
            continue
        rows = {"links": upper_rows, "count": upper_rows, "locks": capacity + 1}.get(name, capacity)
        fill = {"level": UNUSED, "scales": 1}.get(name, 0)
        new = aligned((rows, *old.shape[1:]), old.dtype, fill)
        new[: len(old)] = old
        arrays[name] = new
    arrays["locks"][:] = 0
    return Graph(**arrays)


class Rows:
    """Vectors in the slots of a graph's arrays. Callers serialise changes with ``self.lock``; readers need
    none.
    """

    def __init__(self, dim: int, metric: Metric, m: int, storage: str, capacity: int) -> None:
        self.dim, self.metric, self.m, self.storage = dim, metric, m, storage
        self.code = L2 if metric == "l2" else IP
        self.graph = empty_graph(capacity, dim, m, storage)
        self.labels = np.full(capacity, -1, np.int64)
        self.slot_of: dict[int, int] = {}
        self.n = 0  # slots ever used; those beyond are fresh
        self.upper_used = 0
        self.tombstones = 0
        self.lock = threading.RLock()
        self._free: list[int] = []  # slots that may be written again
        self._freed: list[
            tuple[int, np.ndarray]
        ] = []  # (turn, slots) that a search from before may still look at
        self._turn = 0
        self._searches: dict[object, int] = {}
        self._scratch: list[Scratch] = []
        self._guard = threading.Lock()

    # Changing

    def adopt(self, g: Graph, labels: np.ndarray, n: int, upper_used: int) -> None:
        """Hold what was loaded or converted; slots without a vector are free."""
        self.graph, self.labels, self.n, self.upper_used = g, labels, n, upper_used
        self.tombstones = int(((g.dead[:n] == 1) & (g.level[:n] != UNUSED)).sum())
        live = self.live(g)
        self.slot_of = dict(zip(labels[live].tolist(), live.tolist(), strict=True))
        self._free = np.flatnonzero(g.level[:n] == UNUSED).tolist()

    def place(self, vectors: np.ndarray, labels: np.ndarray, levels: np.ndarray) -> np.ndarray:
        """Put rows into slots (int32 ``[n]``), not yet linked nor findable."""
        self._reclaim()
        n = len(vectors)
        reused = [self._free.pop() for _ in range(min(n, len(self._free)))]
        rows_needed = self.upper_used + int(levels.sum())
        end = self.n + n - len(reused)
        g = self.graph
        if end > len(g.level) or rows_needed > len(g.count):
            capacity = len(g.level) if end <= len(g.level) else max(end, 2 * len(g.level))
            rows = len(g.count) if rows_needed <= len(g.count) else max(rows_needed, 2 * len(g.count))
            try:
                bigger, labels_bigger = grown(g, capacity, rows), np.full(capacity, -1, np.int64)
            except MemoryError:
                self._free += reused
                raise
            labels_bigger[: len(self.labels)] = self.labels
            self.labels, self.graph = labels_bigger, bigger
            g = bigger
        slots = np.array([*reused, *range(self.n, end)], np.int32)
        self.n = end
        if self.storage == "int8":
            scale = np.abs(vectors).max(axis=1) / 127
            scale[scale == 0] = 1
            g.scales[slots] = scale
            g.vectors[slots, : self.dim] = np.rint(vectors / scale[:, None]).astype(np.int8)
            kept = g.vectors[slots].astype(np.float32) * scale[:, None].astype(np.float32)
            g.norms[slots] = np.einsum("ij,ij->i", kept, kept)
        else:
            g.vectors[slots, : self.dim] = vectors
            g.norms[slots] = np.einsum("ij,ij->i", vectors, vectors)
        g.upper[slots] = self.upper_used + np.concatenate(([0], np.cumsum(levels)[:-1])) if n else 0
        self.upper_used = rows_needed
        g.count0[slots], g.incoming[slots], g.dead[slots] = 0, 0, 0
        g.level[slots] = levels
        self.labels[slots] = labels
        return slots

    def publish(self, labels: np.ndarray, slots: np.ndarray) -> None:
        """Make placed rows findable by their label."""
        self.slot_of.update(zip(labels.tolist(), slots.tolist(), strict=True))

    def withdraw(self, slots: np.ndarray) -> None:
        """Undo :meth:`place` for rows that could not be linked; they are passed over for good."""
        self.graph.dead[slots] = 1
        self.tombstones += len(slots)

    def bury(self, labels: np.ndarray) -> np.ndarray:
        """Mark labels as removed; their slots. Raises KeyError, changing nothing."""
        missing = next((label for label in labels.tolist() if label not in self.slot_of), None)
        if missing is not None:
            raise KeyError(f"label {missing} is not in the index")
        slots = np.array([self.slot_of.pop(label) for label in labels.tolist()], np.int32)
        self.graph.dead[slots] = 1
        self.tombstones += len(slots)
        return slots

    def release(self, slots: np.ndarray) -> None:
        """Free slots that nothing points to any more; they are written again once no search can still look at
        them.
        """
        self.graph.level[slots] = UNUSED
        self.tombstones -= len(slots)
        with self._guard:
            self._turn += 1
            self._freed.append((self._turn, slots))

    def _reclaim(self) -> None:
        with self._guard:
            oldest = min(self._searches.values(), default=self._turn)
            while self._freed and self._freed[0][0] <= oldest:
                self._free += self._freed.pop(0)[1].tolist()

    # Reading

    @contextlib.contextmanager
    def reading(self) -> Iterator[Graph]:
        """The graph as it is now, for a search; freed slots are not written again while it runs."""
        token = object()
        with self._guard:
            self._searches[token] = self._turn
        try:
            yield self.graph
        finally:
            with self._guard:
                del self._searches[token]

    @contextlib.contextmanager
    def scratch(self, g: Graph, ef: int) -> Iterator[Scratch]:
        """Memory for one thread's searches with up to ``ef`` candidates."""
        with self._guard:
            s = self._scratch.pop() if self._scratch else None
        if s is None or s.visited.size < len(g.level) or s.distance.size < ef:
            m = max(1, self.m)
            s = Scratch(
                visited=np.zeros(len(g.level), np.uint32),
                tag=np.zeros(1, np.uint32),
                distance=np.empty(max(ef, 256), np.float32),
                node=np.empty(max(ef, 256), np.int32),
                near=np.empty(2 * m + 1, np.int32),
                list_distance=np.empty(2 * m + 2, np.float32),
                list_node=np.empty(2 * m + 2, np.int32),
                chosen=np.empty(2 * m + 1, np.int32),
                kept=np.empty((LAYERS, m), np.int32),
                kept_count=np.empty(LAYERS, np.int32),
                query=aligned((padded(self.dim),), np.float32),
                row=aligned((padded(self.dim),), np.float32),
            )
        try:
            yield s
        finally:
            with self._guard:
                if len(self._scratch) < 64:
                    self._scratch.append(s)

    def live(self, g: Graph) -> np.ndarray:
        """Slots of all findable vectors, ascending (int32)."""
        n = min(self.n, len(g.level))
        return np.flatnonzero((g.level[:n] != UNUSED) & (g.dead[:n] == 0)).astype(np.int32)

    def slots(self, labels: np.ndarray) -> np.ndarray:
        """Slots of labels, -1 for those that are not there."""
        get = self.slot_of.get
        return np.array([get(label, -1) for label in labels.tolist()], np.int32)

    def vectors(self, slots: np.ndarray) -> np.ndarray:
        """float32 ``[n, dim]``."""
        g = self.graph
        return g.vectors[slots, : self.dim].astype(np.float32) * g.scales[slots, None]

    def padded_queries(self, queries: np.ndarray) -> np.ndarray:
        """float32 ``[q, padded dim]``."""
        if queries.shape[1] == padded(self.dim):
            return np.ascontiguousarray(queries)
        wide = np.zeros((len(queries), padded(self.dim)), np.float32)
        wide[:, : self.dim] = queries
        return wide
