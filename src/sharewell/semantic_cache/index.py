"""What is kept in memory: the vectors, grouped by partition and category, and the keys of the exact tier.

One group is one small index, so a lookup can only ever see vectors of its own namespace and category. Groups
begin with an exact scan and become a graph when that is faster.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..ann import FlatIndex, HNSWIndex, VectorIndex

GRAPH_FROM = 2000  # vectors; below, a scan is as fast and exact


@dataclass(frozen=True)
class Found:
    """One neighbour."""

    id: int
    similarity: float
    created: float


class MemoryIndex:
    """Neighbours within (partition, category), and ids by exact key. Safe to use from many threads.

    ``background=True`` builds graphs in a thread of their own while the scan goes on answering.
    """

    def __init__(
        self, dim: int, *, graph_from: int = GRAPH_FROM, background: bool = True, seed: int = 0
    ) -> None:
        self.dim, self._graph_from, self._background, self._seed = dim, graph_from, background, seed
        self._groups: dict[tuple[str, str], VectorIndex] = {}
        self._place: dict[int, tuple[tuple[str, str], bytes, float, bool]] = {}
        self._ids: dict[bytes, int] = {}
        self._building: set[tuple[str, str]] = set()
        self._lock = threading.RLock()
        self._threads: list[threading.Thread] = []

    def __len__(self) -> int:
        return len(self._place)

    def __contains__(self, entry_id: int) -> bool:
        return entry_id in self._place

    def exact(self, key: bytes) -> int | None:
        """The id under an exact key."""
        return self._ids.get(key)

    def created(self, entry_id: int) -> float | None:
        """When an entry came, unix seconds."""
        place = self._place.get(entry_id)
        return place[2] if place else None

    def category(self, entry_id: int) -> str | None:
        """Its category."""
        place = self._place.get(entry_id)
        return place[0][1] if place else None

    def add(self, rows: Iterable[tuple[int, bytes, str, str, NDArray[np.float32] | None, float]]) -> None:
        """Add (id, key, partition, category, embedding or None, created); known ids are left as they are."""
        grouped: dict[tuple[str, str], tuple[list[int], list[NDArray[np.float32]]]] = {}
        with self._lock:
            for entry_id, key, partition, category, embedding, created in rows:
                if entry_id in self._place:
                    continue
                group = (partition, category)
                # a vector that is none (of another length, or not finite) leaves the entry to the exact tier
                usable = embedding is not None and embedding.shape == (self.dim,) and bool(embedding.any())
                self._place[entry_id] = (group, key, created, usable)
                self._ids[key] = entry_id
                if usable and embedding is not None:
                    ids, vectors = grouped.setdefault(group, ([], []))
                    ids.append(entry_id)
                    vectors.append(embedding)
            for group, (ids, vectors) in grouped.items():
                index = self._groups.setdefault(group, FlatIndex(self.dim, "cosine"))
                index.add(np.stack(vectors), np.array(ids, np.int64), threads=1)
                if isinstance(index, FlatIndex) and len(index) >= self._graph_from:
                    self._promote(group)

    def remove(self, entry_ids: Iterable[int]) -> None:
        """Remove ids; unknown ones are passed over."""
        with self._lock:
            grouped: dict[tuple[str, str], list[int]] = {}
            for entry_id in entry_ids:
                place = self._place.pop(entry_id, None)
                if place is None:
                    continue
                group, key, _, indexed = place
                if self._ids.get(key) == entry_id:
                    del self._ids[key]
                if indexed:
                    grouped.setdefault(group, []).append(entry_id)
            for group, ids in grouped.items():
                self._groups[group].remove(np.array(ids, np.int64))
                if not len(self._groups[group]):
                    del self._groups[group]

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._groups, self._place, self._ids = {}, {}, {}

    def near(
        self,
        partitions: Iterable[str],
        category: str,
        embedding: NDArray[np.float32],
        k: int,
        *,
        exact: bool = False,
    ) -> list[Found]:
        """The ``k`` nearest of some partitions and one category, nearest first; ``exact`` looks at all."""
        found: list[Found] = []
        for partition in partitions:
            index = self._groups.get((partition, category))
            if index is None:
                continue
            if isinstance(index, HNSWIndex):
                result = index.search(embedding, k, threads=1, strategy="scan" if exact else "auto")
            else:
                result = index.search(embedding, k)
            for entry_id, distance in zip(
                result.labels[0].tolist(), result.distances[0].tolist(), strict=True
            ):
                created = self.created(entry_id)
                if entry_id >= 0 and created is not None:
                    found.append(Found(entry_id, 1.0 - distance, created))
        found.sort(key=lambda f: (-f.similarity, f.id))
        return found[:k]

    def is_graph(self, partition: str, category: str) -> bool:
        """True when this group is answered approximately."""
        return isinstance(self._groups.get((partition, category)), HNSWIndex)

    def join(self) -> None:
        """Wait until every graph under construction is in use."""
        for thread in self._threads:
            thread.join()
        self._threads.clear()

    def _promote(self, group: tuple[str, str]) -> None:
        if group in self._building:
            return
        self._building.add(group)
        if not self._background:
            self._build(group)
            return
        thread = threading.Thread(
            target=self._build, args=(group,), name="sharewell-cache-graph", daemon=True
        )
        self._threads = [t for t in self._threads if t.is_alive()] + [thread]
        thread.start()

    def _build(self, group: tuple[str, str]) -> None:
        try:
            graph = HNSWIndex(
                self.dim, metric="cosine", threads=1, seed=self._seed, capacity=self._graph_from
            )
            held: set[int] = set()
            while True:
                with self._lock:
                    flat = self._groups.get(group)
                    if not isinstance(flat, FlatIndex):
                        return
                    wanted = {i for i, place in self._place.items() if place[0] == group and place[3]}
                    fresh = np.array(sorted(wanted - held)[:1000], np.int64)
                    vectors = flat.get(fresh)
                    if len(fresh) < 64 or not self._background:  # little enough to let others wait for it
                        gone = np.array(sorted(held - wanted), np.int64)
                        if len(fresh):
                            graph.add(vectors, fresh, threads=1)
                        if len(gone):
                            graph.remove(gone)
                        if held | set(fresh.tolist()) >= wanted:
                            self._groups[group] = graph
                            return
                        held |= set(fresh.tolist())
                        continue
                graph.add(vectors, fresh, threads=1)
                if not held:
                    _warm(graph, vectors)
                held |= set(fresh.tolist())
        finally:
            self._building.discard(group)


def _warm(graph: HNSWIndex, vectors: NDArray[np.float32]) -> None:
    """Compile what searches need, so that no request waits for it."""
    for strategy in ("graph", "scan"):
        graph.search(vectors[:1], 1, threads=1, strategy=strategy)
