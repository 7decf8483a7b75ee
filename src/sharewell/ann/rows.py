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
from .single import FOUND_ALL, Lookup
from .sorted_keys import GUARDS, LEAST

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


def rounded(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of floats as signed bytes, the value of one step of each row's bytes, and the rows that the bytes
    stand for.
    """
    step = (np.abs(rows).max(axis=1) / 127).astype(np.float32)
    step[step == 0] = 1
    whole = np.clip(np.rint(rows / step[:, None]), -127, 127)
    return whole.astype(np.int8), step, whole.astype(np.float32) * step[:, None]


def empty_graph(
    capacity: int, dim: int, m: int, storage: str, upper_rows: int = 0, sketches: bool = True
) -> Graph:
    """A graph without nodes for ``capacity`` slots."""
    kind = np.int8 if storage == "int8" else np.float32
    sketched = capacity if sketches and storage == "float32" else 0
    return Graph(
        vectors=aligned((capacity, padded(dim)), kind),
        scales=aligned((capacity,), np.float32, 1),
        norms=aligned((capacity,), np.float32),
        sketches=aligned((sketched, _padded_sketch(dim)), np.int8),
        sketch=aligned((sketched, 4), np.float32),
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


def draw_sketches(g: Graph, slots: np.ndarray, vectors: np.ndarray) -> None:
    """Round rows to bytes, where the graph keeps sketches, and note how far that moved them."""
    if not len(g.sketches):
        return
    g.sketches[slots, : vectors.shape[1]], step, kept = rounded(vectors)
    exact = kept.astype(np.float64)
    left_out = np.sqrt(np.square(vectors - exact).sum(axis=1))
    length = np.sqrt(np.square(exact).sum(axis=1))
    # sums of products are rounded, too: in proportion to their number and to the length of the row
    rounding = length * (2e-6 + 2.5e-7 * (g.vectors.shape[1] // 16))
    g.sketch[slots, 0], g.sketch[slots, 1] = step, left_out * (1 + 1e-6) + rounding
    # beyond what float32 holds nothing is surely farther
    g.sketch[slots, 2] = np.where(length < 1e18, length**2 * (1 - 2e-6), -np.inf)
    g.sketch[slots, 3] = length * (1 + 1e-6)


def _padded_sketch(dim: int) -> int:
    return -(-dim // 32) * 32


def grown(g: Graph, capacity: int, upper_rows: int) -> Graph:
    """A copy with room for more; whoever holds ``g`` can go on reading it."""
    arrays = {}
    for name, old in zip(Graph._fields, g, strict=True):
        if name == "meta":
            arrays[name] = old.copy()
            continue
        rows = {"links": upper_rows, "count": upper_rows, "locks": capacity + 1}.get(name, capacity)
        if name in ("sketches", "sketch") and not len(old):
            rows = 0
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

    def __init__(self, dim: int, metric: Metric, m: int, storage: str, capacity: int, sketches: bool) -> None:
        self.dim, self.metric, self.m, self.storage = dim, metric, m, storage
        self.code = L2 if metric == "l2" else IP
        self.graph = empty_graph(capacity, dim, m, storage, sketches=sketches)
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
        self._lookups: list[Lookup] = []
        self._guard = threading.Lock()

    # Changing

    def adopt(self, g: Graph, labels: np.ndarray, n: int, upper_used: int) -> None:
        """Hold what was loaded or converted; slots without a vector are free."""
        self.graph, self.labels, self.n, self.upper_used = g, labels, n, upper_used
        self._lookups.clear()
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
            with self._guard:
                self._lookups.clear()  # they keep the old arrays alive
            g = bigger
        slots = np.array([*reused, *range(self.n, end)], np.int32)
        self.n = end
        if self.storage == "int8":
            g.vectors[slots, : self.dim], g.scales[slots], kept = rounded(vectors)
            g.norms[slots] = np.einsum("ij,ij->i", kept, kept)
        else:
            g.vectors[slots, : self.dim] = vectors
            g.norms[slots] = np.einsum("ij,ij->i", vectors, vectors)
            draw_sketches(g, slots, vectors)
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
            s = self._new_scratch(g, ef)
        try:
            yield s
        finally:
            with self._guard:
                if len(self._scratch) < 64:
                    self._scratch.append(s)

    def _new_scratch(self, g: Graph, ef: int) -> Scratch:
        m = max(1, self.m)
        return Scratch(
            visited=np.zeros(len(g.level), np.uint8),
            tag=np.zeros(1, np.uint8),
            keys=np.full(GUARDS + max(ef, 256) + 1, LEAST, np.int64),
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
            words=aligned((_padded_sketch(self.dim),), np.int16),
            word=np.zeros(5, np.float32),
        )

    def look_up(self, vector: np.ndarray, k: int, ef: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Labels and distances ``[1, k]`` of one vector (float32, contiguous) by a walk; None when it is no
        vector to search for, or fewer than ``k`` were found.
        """
        token = object()
        with self._guard:
            self._searches[token] = self._turn
            ask = self._lookups.pop() if self._lookups else None
        try:
            g, names = self.graph, self.labels
            if ask is None or ask.graph is not g or ask.labels is not names or ask.k != k or ask.ef < ef:
                ask = Lookup(g, names, self._new_scratch(g, ef), self.code, self.metric == "cosine", k)
            labels, distances = np.empty((1, k), np.int64), np.empty((1, k), np.float32)
            return (labels, distances) if ask(vector, ef, labels, distances) == FOUND_ALL else None
        finally:
            with self._guard:
                del self._searches[token]
                if ask is not None and ask.graph is self.graph and len(self._lookups) < 64:
                    self._lookups.append(ask)

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
