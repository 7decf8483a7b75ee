"""HNSW: the layered navigable small-world graph (Malkov and Yashunin, arXiv 1603.09320) as an index to live
with.

Searches run while others insert; removed vectors are passed over at once and really taken out by
:meth:`HNSWIndex.compact`; filters and small collections are answered by an exact scan where that is cheaper.
"""

from __future__ import annotations

import math
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from . import insertion, repair, searching
from .base import (
    METRICS,
    Metric,
    SearchResult,
    Strategy,
    VectorIndex,
    checked_k,
    checked_labels,
    checked_rows,
    spread,
)
from .graph import ENTRY, TOP, UNUSED, Graph
from .rows import LAYERS, Rows

SCAN_BELOW = 2000  # vectors; there an exact scan is as fast as the graph
GRAPH_STEP = (
    1.0  # cost of one distance on a walk over one in a scan: sketches save as much as cache misses cost
)
COMPACT_ABOVE = 0.3  # share of tombstones


@dataclass(frozen=True)
class HNSWConfig:
    """``M``: links a node and layer (2M on layer 0); ``ef_construction``, ``ef``: candidates kept while
    inserting and searching; ``capacity``: slots to begin with (it grows); ``storage="int8"`` keeps a quarter
    of the bytes at some loss of recall; ``sketches`` keep a copy of float32 vectors in bytes beside them,
    which spares most distances on a walk and changes nothing in what is found. Raises ValueError naming the
    field and its range.
    """

    dim: int
    metric: Metric = "cosine"
    M: int = 16
    ef_construction: int = 200
    ef: int = 64
    capacity: int = 1024
    seed: int = 100
    storage: str = "float32"
    threads: int | None = None
    sketches: bool = True

    def __post_init__(self) -> None:
        def check(ok: bool, field: str, allowed: str) -> None:
            if not ok:
                raise ValueError(f"{field} must be {allowed}, got {getattr(self, field)!r}")

        check(1 <= self.dim <= 65536, "dim", "in [1, 65536]")
        check(self.metric in METRICS, "metric", "cosine, l2 or ip")
        check(2 <= self.M <= 512, "M", "in [2, 512]")
        check(1 <= self.ef_construction <= 100_000, "ef_construction", "in [1, 100000]")
        check(1 <= self.ef <= 1_000_000, "ef", "in [1, 1000000]")
        check(1 <= self.capacity <= 2**31 - 2, "capacity", "in [1, 2147483646]")
        check(0 <= self.seed < 2**63, "seed", "in [0, 2**63)")
        check(self.storage in ("float32", "int8"), "storage", "float32 or int8")
        check(self.threads is None or self.threads >= 1, "threads", "None or at least 1")


@dataclass(frozen=True)
class IndexStats:
    """``degrees[d]``: live nodes with d links on layer 0; ``unreachable``: live nodes that no walk from the
    entry reaches.
    """

    vectors: int
    tombstones: int
    unreachable: int
    layers: int
    degrees: tuple[int, ...]
    nbytes: int


class HNSWIndex(VectorIndex):
    """``HNSWIndex(HNSWConfig(dim=384))`` or, in short, ``HNSWIndex(384, metric="cosine")``."""

    def __init__(self, config: HNSWConfig | int, **settings: Any) -> None:
        self.config = config if isinstance(config, HNSWConfig) else HNSWConfig(config, **settings)
        if isinstance(config, HNSWConfig) and settings:
            raise TypeError(f"settings go into the HNSWConfig, got {sorted(settings)}")
        c = self.config
        self.dim, self.metric = c.dim, c.metric
        self._rows = Rows(c.dim, c.metric, c.M, c.storage, c.capacity, c.sketches)
        self._levels = np.random.default_rng(c.seed)
        self._mean_level = 1 / math.log(c.M)
        self._unchecked = 0  # insertions since reachability was last looked at
        self._next_label = 0

    def __len__(self) -> int:
        return len(self._rows.slot_of)

    def __contains__(self, label: int) -> bool:
        return label in self._rows.slot_of

    # Changing

    def add(
        self, vectors: npt.ArrayLike, labels: npt.ArrayLike | None = None, *, threads: int | None = None
    ) -> np.ndarray:
        vectors = checked_rows("vectors", vectors, self.dim, self.metric)
        rows, n = self._rows, len(vectors)
        with rows.lock:
            if labels is None:
                chosen = np.arange(self._next_label, self._next_label + n, dtype=np.int64)
            else:
                chosen = checked_labels(labels, n)
            used = next((i for i, label in enumerate(chosen.tolist()) if label in rows.slot_of), None)
            if used is not None:
                raise ValueError(f"labels: row {used} is label {int(chosen[used])}, which is in the index")
            if n == 0:
                return chosen
            uniform = 1.0 - self._levels.random(n)  # in (0, 1]
            levels = np.minimum(-np.log(uniform) * self._mean_level, LAYERS - 1).astype(np.int64)
            slots = rows.place(vectors, chosen, levels)
            try:
                self._link(slots, self._thread_count(threads))
            except BaseException:
                rows.withdraw(slots)
                raise
            rows.publish(chosen, slots)
            self._next_label = max(self._next_label, int(chosen.max()) + 1)
            self._unchecked += n
            # among removed vectors a new one may find nobody to link to
            alone = bool((rows.graph.incoming[slots] == 0).any())
            if alone or self._unchecked * 20 >= len(self):
                self._connect()
        return chosen

    def _link(self, slots: np.ndarray, threads: int) -> None:
        rows, config = self._rows, self.config
        g, ticket = rows.graph, np.zeros(1, np.int32)
        ef = max(config.ef_construction, config.M)

        def work() -> None:
            with rows.scratch(g, ef) as s:
                insertion.insert_many(g, rows.code, slots, ticket, ef, s)

        _run([work] * max(1, min(threads, len(slots) // 32)))

    def _connect(self) -> None:
        """Link what no walk reaches, until everything is reached."""
        rows = self._rows
        g, ef = rows.graph, max(self.config.ef_construction, self.config.M)
        with rows.scratch(g, ef) as s:
            for _ in range(16):
                if not repair.connect_lost(g, rows.code, rows.n, ef, s):
                    break
        self._unchecked = 0

    def remove(self, labels: npt.ArrayLike) -> None:
        wanted = checked_labels(labels)
        rows = self._rows
        with rows.lock:
            rows.bury(wanted)
            if rows.tombstones > COMPACT_ABOVE * max(rows.n, 1000):
                self.compact()

    def compact(self) -> None:
        """Take removed vectors really out of the graph and free their slots. Searches go on meanwhile."""
        rows = self._rows
        with rows.lock:
            g = rows.graph
            gone = np.flatnonzero((g.dead[: rows.n] == 1) & (g.level[: rows.n] != UNUSED)).astype(np.int32)
            if not gone.size:
                return
            with rows.scratch(g, 256) as s:
                repair.bypass_dead(g, rows.code, rows.n, s)
            live = rows.live(g)
            entry = int(live[g.level[live].argmax()]) if live.size else -1
            g.meta[ENTRY], g.meta[TOP] = entry, g.level[entry] if live.size else -1
            rows.release(gone)
            repair.count_incoming(g, rows.n)
            if live.size:
                self._connect()

    # Searching

    def search(
        self,
        queries: npt.ArrayLike,
        k: int = 10,
        *,
        ef: int | None = None,
        filter: npt.ArrayLike | None = None,
        threads: int | None = None,
        strategy: Strategy = "auto",
    ) -> SearchResult:
        """As :meth:`VectorIndex.search`. ``ef`` (at least k is taken) trades time for recall; ``filter``:
        allowed labels.

        ``strategy="auto"`` takes the graph or an exact scan, whichever costs less; "graph" and "scan" insist.
        """
        rows = self._rows
        if filter is None and isinstance(queries, np.ndarray) and (threads is None or threads >= 1):
            found = self._look_up(queries, k, ef, strategy)
            if found is not None:
                return found
        q = rows.padded_queries(checked_rows("queries", queries, self.dim, self.metric))
        k = checked_k(k)
        if ef is not None and ef < 1:
            raise ValueError(f"ef must be at least 1, got {ef}")
        if strategy not in ("auto", "graph", "scan"):
            raise ValueError(f"strategy must be auto, graph or scan, got {strategy!r}")
        wide = max(ef or self.config.ef, k)
        with rows.reading() as g:
            allowed = None if filter is None else self._allowed(g, filter)
            size = len(self) if allowed is None else len(allowed)
            if strategy == "auto":
                strategy = "scan" if self._scan_is_cheaper(size, wide) else "graph"
            if strategy == "scan":
                slots = rows.live(g) if allowed is None else allowed
                nodes, distances = self._scan(g, q, k, slots, self._thread_count(threads))
            else:
                nodes, distances = self._walk(g, q, k, wide, allowed, self._thread_count(threads))
            labels = np.where(nodes >= 0, rows.labels[nodes], -1)
        return SearchResult(labels, distances, strategy)

    def _look_up(self, query: np.ndarray, k: int, ef: int | None, strategy: Strategy) -> SearchResult | None:
        """The short way for one float32 vector that a walk answers in full; None for everything else, errors
        included.
        """
        if (
            query.dtype != np.float32
            or query.size != self.dim
            or query.shape[-1] != self.dim
            or query.ndim > 2
        ):
            return None
        if type(k) is not int or not 1 <= k <= len(self) or (ef is not None and ef < 1):
            return None
        wide = max(ef or self.config.ef, k)
        if strategy != "graph" and (strategy != "auto" or self._scan_is_cheaper(len(self), wide)):
            return None
        found = self._rows.look_up(np.ascontiguousarray(query.reshape(-1)), k, wide)
        return None if found is None else SearchResult(*found, "graph")

    def _allowed(self, g: Graph, filter: npt.ArrayLike) -> np.ndarray:
        """Live slots of the labels in ``filter``, ascending; labels that are not there allow nothing."""
        slots = self._rows.slots(np.unique(np.asarray(filter, np.int64)))
        slots = np.sort(slots[(slots >= 0) & (slots < len(g.level))])
        return slots[g.dead[slots] == 0].astype(np.int32)

    def _scan_is_cheaper(self, candidates: int, ef: int) -> bool:
        if candidates <= SCAN_BELOW:
            return True
        share = candidates / max(1, len(self))
        return candidates < GRAPH_STEP * ef * self.config.M / share  # about half of a node's 2M links are new

    def _scan(
        self, g: Graph, q: np.ndarray, k: int, slots: np.ndarray, threads: int
    ) -> tuple[np.ndarray, np.ndarray]:
        rows = self._rows
        nodes, distances = np.empty((len(q), k), np.int32), np.empty((len(q), k), np.float32)

        def part(first: int, last: int) -> None:
            with rows.scratch(g, 1) as s:
                searching.scan_many(g, rows.code, q, k, slots, first, last, nodes, distances, s)

        _run([lambda a=a, b=b: part(a, b) for a, b in spread(len(q), threads)])
        return nodes, distances

    def _walk(
        self, g: Graph, q: np.ndarray, k: int, ef: int, allowed: np.ndarray | None, threads: int
    ) -> tuple[np.ndarray, np.ndarray]:
        rows = self._rows
        mask, total = np.empty(0, np.uint8), max(1, len(self))
        if allowed is not None:
            mask = np.zeros(len(g.level), np.uint8)
            mask[allowed] = 1
            ef = min(rows.n, math.ceil(ef * total / max(1, len(allowed))))
        nodes, distances = np.empty((len(q), k), np.int32), np.empty((len(q), k), np.float32)

        def part(
            q: np.ndarray, first: int, last: int, ef: int, nodes: np.ndarray, distances: np.ndarray
        ) -> None:
            with rows.scratch(g, ef) as s:
                searching.search_many(g, rows.code, q, k, ef, mask, first, last, nodes, distances, s)

        threads = threads if len(q) >= 32 else 1
        _run([lambda a=a, b=b: part(q, a, b, ef, nodes, distances) for a, b in spread(len(q), threads)])
        # Removed and filtered nodes take places among the ef candidates: where too few are left, look wider.
        enough = min(k, total if allowed is None else len(allowed))
        while ef < rows.n and enough and nodes[:, enough - 1].min(initial=0) < 0:
            short = np.flatnonzero(nodes[:, enough - 1] < 0)
            ef = min(rows.n, 4 * ef)
            again_n, again_d = nodes[short], distances[short]
            part(q[short], 0, len(short), ef, again_n, again_d)
            nodes[short], distances[short] = again_n, again_d
        return nodes, distances

    def range_search(self, query: npt.ArrayLike, radius: float) -> SearchResult:
        if not math.isfinite(radius):
            raise ValueError(f"radius must be finite, got {radius}")
        k = 64
        while True:
            found = self.search(query, min(k, max(1, len(self))), ef=2 * k)
            if len(found.labels) != 1:
                raise ValueError(f"query must be one vector, got {len(found.labels)}")
            inside = found.distances[0] <= radius
            if not inside.all() or k >= len(self):
                inside &= found.labels[0] >= 0
                return SearchResult(found.labels[:, inside], found.distances[:, inside], found.strategy)
            k *= 4

    def get(self, labels: npt.ArrayLike) -> np.ndarray:
        wanted = np.atleast_1d(np.asarray(labels, np.int64))
        slots = self._rows.slots(wanted)
        if (slots < 0).any():
            raise KeyError(f"label {int(wanted[slots < 0][0])} is not in the index")
        return self._rows.vectors(slots)

    # Looking after it

    def stats(self) -> IndexStats:
        """Figures of the graph; walks over all of it."""
        rows = self._rows
        with rows.lock:
            g = rows.graph
            live = rows.live(g)
            seen = repair.reachable(g, rows.n)
            degrees = np.bincount(g.count0[live], minlength=1)
            return IndexStats(
                vectors=len(self),
                tombstones=rows.tombstones,
                unreachable=int(len(live) - seen[live].sum()),
                layers=int(g.meta[TOP]) + 1,
                degrees=tuple(degrees.tolist()),
                nbytes=sum(array.nbytes for array in g) + rows.labels.nbytes,
            )

    def warmup(self, *, background: bool = False) -> None:
        """Compile the kernels (seconds the first time on a machine, less from the disk's cache), or begin
        to.
        """
        if background:
            threading.Thread(target=self.warmup, name="sharewell-ann-warmup", daemon=True).start()
            return
        small = HNSWIndex(
            HNSWConfig(
                self.dim, self.metric, M=2, ef_construction=4, capacity=64, storage=self.config.storage
            )
        )
        vectors = np.random.default_rng(0).standard_normal((40, self.dim))
        small.add(vectors, threads=1)
        small.search(vectors[:2], 2, strategy="graph")
        small.search(vectors[0].astype(np.float32), 2, strategy="graph")
        small.search(vectors[:2], 2, strategy="scan")
        small.remove([0])
        small.compact()

    def save(self, path: Path | str) -> None:
        from .files import save_index

        with self._rows.lock:
            self.compact()
            self._connect()
            save_index(Path(path), self._rows, asdict(self.config), self._next_label)

    @classmethod
    def load(cls, path: Path | str, *, mmap: bool = False) -> HNSWIndex:
        """Read an index back. ``mmap`` maps the file instead of reading it: processes share its pages, and
        what this one changes stays its own until it saves.

        Raises IndexFormatError for a file that is damaged, truncated or no index, FileNotFoundError.
        """
        from .files import load_index

        loaded = load_index(Path(path), mmap=mmap)
        index = cls(HNSWConfig(**loaded.config))
        index._rows.adopt(loaded.graph, loaded.labels, loaded.n, loaded.upper)
        index._next_label = loaded.next_label
        return index

    def _thread_count(self, threads: int | None) -> int:
        wanted = threads if threads is not None else self.config.threads
        if wanted is None:
            return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        if wanted < 1:
            raise ValueError(f"threads must be at least 1, got {wanted}")
        return wanted


def _run(work: list[Any]) -> None:
    """Run the callables side by side (they release the interpreter's lock) and raise what one of them
    raised.
    """
    if len(work) == 1:
        work[0]()
        return
    with ThreadPoolExecutor(len(work)) as pool:
        for future in [pool.submit(job) for job in work]:
            future.result()
