"""The exact index: looks at every vector. The oracle of the graph, and what needs no compiler to be right."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .base import METRICS, Metric, SearchResult, VectorIndex, checked_k, checked_labels, checked_rows, padded

_CHUNK = 1 << 22  # scores kept at once


class FlatIndex(VectorIndex):
    """Exact search through matrix products (BLAS). Raises ValueError naming ``dim`` or ``metric``."""

    def __init__(self, dim: int, metric: Metric = "cosine") -> None:
        if dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}")
        if metric not in METRICS:
            raise ValueError(f"metric must be cosine, l2 or ip, got {metric!r}")
        self.dim, self.metric = dim, metric
        self._vectors = np.zeros((0, dim), np.float32)
        self._labels = np.zeros(0, np.int64)
        self._place: dict[int, int] = {}
        self._lock = threading.RLock()
        self._next_label = 0

    def __len__(self) -> int:
        return len(self._place)

    def __contains__(self, label: int) -> bool:
        return label in self._place

    def add(
        self, vectors: npt.ArrayLike, labels: npt.ArrayLike | None = None, *, threads: int | None = None
    ) -> np.ndarray:
        rows = checked_rows("vectors", vectors, self.dim, self.metric)
        with self._lock:
            n = len(rows)
            if labels is None:
                chosen = np.arange(self._next_label, self._next_label + n, dtype=np.int64)
            else:
                chosen = checked_labels(labels, n)
            used = next((i for i, label in enumerate(chosen.tolist()) if label in self._place), None)
            if used is not None:
                raise ValueError(f"labels: row {used} is label {int(chosen[used])}, which is in the index")
            if n:
                start = len(self._labels)
                # new arrays: searches that run hold the old ones
                self._vectors = np.concatenate([self._vectors, rows])
                self._labels = np.concatenate([self._labels, chosen])
                self._place.update(zip(chosen.tolist(), range(start, start + n), strict=True))
                self._next_label = max(self._next_label, int(chosen.max()) + 1)
            return chosen

    def remove(self, labels: npt.ArrayLike) -> None:
        wanted = checked_labels(labels).tolist()
        with self._lock:
            missing = next((label for label in wanted if label not in self._place), None)
            if missing is not None:
                raise KeyError(f"label {missing} is not in the index")
            keep = np.ones(len(self._labels), bool)
            keep[[self._place[label] for label in wanted]] = False
            self._vectors, self._labels = self._vectors[keep], self._labels[keep]
            self._place = {label: i for i, label in enumerate(self._labels.tolist())}

    def search(
        self,
        queries: npt.ArrayLike,
        k: int = 10,
        *,
        filter: npt.ArrayLike | None = None,
        threads: int | None = None,
    ) -> SearchResult:
        q, k = checked_rows("queries", queries, self.dim, self.metric), checked_k(k)
        with self._lock:
            vectors, labels = self._vectors, self._labels
        if filter is not None:
            kept = np.isin(labels, np.asarray(filter, np.int64))
            vectors, labels = vectors[kept], labels[kept]
        found = np.full((len(q), k), -1, np.int64)
        distances = np.full((len(q), k), np.inf, np.float32)
        most = min(k, len(labels))
        step = max(1, _CHUNK // max(1, len(labels)))
        for a in range(0, len(q), step) if most else ():
            part = q[a : a + step]
            scores = self._distances(part, vectors)
            # the products round otherwise than a sum of squares: take some more and measure those exactly
            near = np.argpartition(scores, min(most + 16, len(labels)) - 1, axis=1)[:, : most + 16]
            for i, ids in enumerate(near):
                exact = self._exactly(part[i], vectors[ids])
                order = np.lexsort((labels[ids], exact))[:most]
                found[a + i, :most], distances[a + i, :most] = labels[ids[order]], exact[order]
        return SearchResult(found, distances, "scan")

    def _distances(self, q: np.ndarray, x: np.ndarray) -> np.ndarray:
        products = q @ x.T
        if self.metric != "l2":
            return 1 - products
        return np.einsum("ij,ij->i", x, x)[None] - 2 * products

    def _exactly(self, q: np.ndarray, x: np.ndarray) -> np.ndarray:
        if self.metric == "l2":
            difference = x - q
            return np.einsum("ij,ij->i", difference, difference)
        return 1 - x @ q

    def range_search(self, query: npt.ArrayLike, radius: float) -> SearchResult:
        if not np.isfinite(radius):
            raise ValueError(f"radius must be finite, got {radius}")
        found = self.search(query, max(1, len(self)))
        if len(found.labels) != 1:
            raise ValueError(f"query must be one vector, got {len(found.labels)}")
        inside = (found.distances[0] <= radius) & (found.labels[0] >= 0)
        return SearchResult(found.labels[:, inside], found.distances[:, inside], "scan")

    def get(self, labels: npt.ArrayLike) -> np.ndarray:
        wanted = np.atleast_1d(np.asarray(labels, np.int64)).tolist()
        with self._lock:
            missing = next((label for label in wanted if label not in self._place), None)
            if missing is not None:
                raise KeyError(f"label {missing} is not in the index")
            return self._vectors[[self._place[label] for label in wanted]]

    def save(self, path: Path | str) -> None:
        from .files import write_arrays

        with self._lock:
            header = {
                "kind": "flat", "dim": self.dim, "metric": self.metric, "next_label": self._next_label,
                "padded": padded(self.dim),
            }  # fmt: skip
            write_arrays(Path(path), header, {"vectors": self._vectors, "labels": self._labels})

    @classmethod
    def load(cls, path: Path | str) -> FlatIndex:
        """Read an index back. Raises IndexFormatError, FileNotFoundError."""
        from .files import read_arrays

        header, arrays = read_arrays(Path(path), "flat")
        index = cls(header["dim"], header["metric"])
        index._vectors, index._labels = arrays["vectors"], arrays["labels"]
        index._place = {label: i for i, label in enumerate(index._labels.tolist())}
        index._next_label = header["next_label"]
        return index
