"""Recall against queries a second, for ours and for other libraries on the same vectors in the same
process.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np

from .base import Metric
from .flat import FlatIndex
from .hnsw import HNSWConfig, HNSWIndex

EFS = (10, 14, 20, 28, 40, 56, 80, 112, 160, 224, 320, 448, 640)


class Contender(ABC):
    """One library with its graph index; one thread. ``M`` and ``ef_construction`` are the same for all."""

    name: str
    package: str  # to import; empty for ours

    def __init__(self, dim: int, metric: Metric, m: int, ef_construction: int) -> None:
        self.metric: Metric = metric
        self.dim, self.m, self.ef_construction = dim, m, ef_construction

    @classmethod
    def installed(cls) -> bool:
        return not cls.package or find_spec(cls.package) is not None

    @abstractmethod
    def build(self, vectors: np.ndarray) -> None:
        """Index the rows under their numbers."""

    @abstractmethod
    def query(self, queries: np.ndarray, k: int, ef: int) -> np.ndarray:
        """Labels ``[q, k]``."""

    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of the index, as the library says or as its file has."""


class Ours(Contender):
    name, package = "sharewell", ""

    def build(self, vectors: np.ndarray) -> None:
        config = HNSWConfig(
            self.dim,
            self.metric,
            M=self.m,
            ef_construction=self.ef_construction,
            capacity=len(vectors),
            threads=1,
        )
        self.index = HNSWIndex(config)
        self.index.add(vectors)

    def query(self, queries: np.ndarray, k: int, ef: int) -> np.ndarray:
        return self.index.search(queries, k, ef=ef, strategy="graph").labels

    def nbytes(self) -> int:
        return self.index.stats().nbytes


class Hnswlib(Contender):
    name, package = "hnswlib", "hnswlib"

    def build(self, vectors: np.ndarray) -> None:
        import hnswlib  # pyright: ignore[reportMissingImports]

        self.index = hnswlib.Index(space=self.metric, dim=self.dim)
        self.index.init_index(len(vectors), ef_construction=self.ef_construction, M=self.m)
        self.index.set_num_threads(1)
        self.index.add_items(vectors)

    def query(self, queries: np.ndarray, k: int, ef: int) -> np.ndarray:
        self.index.set_ef(max(ef, k))
        return self.index.knn_query(queries, k)[0].astype(np.int64)

    def nbytes(self) -> int:
        return self.index.index_file_size()


class Faiss(Contender):
    name, package = "faiss", "faiss"

    def build(self, vectors: np.ndarray) -> None:
        import faiss  # pyright: ignore[reportMissingImports]

        faiss.omp_set_num_threads(1)
        kind = faiss.METRIC_L2 if self.metric == "l2" else faiss.METRIC_INNER_PRODUCT
        self.index = faiss.IndexHNSWFlat(self.dim, self.m, kind)
        self.index.hnsw.efConstruction = self.ef_construction
        self.index.add(self._unit(vectors))

    def query(self, queries: np.ndarray, k: int, ef: int) -> np.ndarray:
        self.index.hnsw.efSearch = max(ef, k)
        return self.index.search(self._unit(queries), k)[1]

    def _unit(self, rows: np.ndarray) -> np.ndarray:
        return rows / np.linalg.norm(rows, axis=1, keepdims=True) if self.metric == "cosine" else rows

    def nbytes(self) -> int:
        import faiss  # pyright: ignore[reportMissingImports]

        return faiss.serialize_index(self.index).nbytes


class Usearch(Contender):
    name, package = "usearch", "usearch"

    def build(self, vectors: np.ndarray) -> None:
        from usearch.index import Index  # pyright: ignore[reportMissingImports]

        metric = {"l2": "l2sq", "cosine": "cos", "ip": "ip"}[self.metric]
        self.index = Index(
            ndim=self.dim, metric=metric, dtype="f32", connectivity=self.m, expansion_add=self.ef_construction
        )
        self.index.add(np.arange(len(vectors)), vectors, threads=1)

    def query(self, queries: np.ndarray, k: int, ef: int) -> np.ndarray:
        self.index.expansion_search = max(ef, k)
        return (
            np.asarray(self.index.search(queries, k, threads=1).keys)
            .astype(np.int64)
            .reshape(len(queries), -1)
        )

    def nbytes(self) -> int:
        return int(self.index.serialized_length)


CONTENDERS: dict[str, type[Contender]] = {c.name: c for c in (Ours, Hnswlib, Faiss, Usearch)}


@dataclass(frozen=True)
class Point:
    """One setting of ef: the recall it reaches and the CPU seconds of one query (median of the repeats)."""

    ef: int
    recall: float
    query_s: float


def truth(vectors: np.ndarray, queries: np.ndarray, k: int, metric: Metric) -> np.ndarray:
    """Labels of the exact ``k`` nearest."""
    flat = FlatIndex(vectors.shape[1], metric)
    flat.add(vectors)
    return flat.search(queries, k).labels


def recall_of(found: np.ndarray, true: np.ndarray) -> float:
    """Share of the true neighbours that were found."""
    hits = sum(len(np.intersect1d(a, b, assume_unique=False)) for a, b in zip(found, true, strict=True))
    return hits / true.size


def curves(
    contenders: Sequence[Contender],
    queries: np.ndarray,
    true: np.ndarray,
    cpu_s: Callable[[], float],
    *,
    efs: Sequence[int] = EFS,
    repeats: int = 5,
) -> dict[str, list[Point]]:
    """The curve of each, measured in turns: every contender at an ef, then the next repeat, then the next ef.

    ``cpu_s``: the process's CPU clock. A contender that is past 0.999 is not measured further.
    """
    k = true.shape[1]
    found: dict[str, list[Point]] = {c.name: [] for c in contenders}
    for ef in efs:
        times: dict[str, list[float]] = {c.name: [] for c in contenders}
        recalls: dict[str, float] = {}
        running = [c for c in contenders if not found[c.name] or found[c.name][-1].recall < 0.999]
        for repeat in range(repeats + 1):
            for contender in running if repeat % 2 else reversed(running):
                start = cpu_s()
                labels = contender.query(queries, k, ef)
                spent = cpu_s() - start
                if repeat:  # the first is to warm up
                    times[contender.name].append(spent / len(queries))
                else:
                    recalls[contender.name] = recall_of(labels, true)
        for contender in running:
            seconds = float(np.median(times[contender.name]))
            found[contender.name].append(Point(ef, recalls[contender.name], seconds))
    return found


def query_seconds_at(curve: Sequence[Point], recall: float) -> float | None:
    """CPU seconds a query at a recall, between the two settings around it (logarithmic); None when it is not
    reached.
    """
    for before, after in zip((None, *curve), curve, strict=False):
        if after.recall >= recall:
            if before is None or after.recall == before.recall:
                return after.query_s
            share = (recall - before.recall) / (after.recall - before.recall)
            return math.exp(math.log(before.query_s) * (1 - share) + math.log(after.query_s) * share)
    return None
