"""What every index offers, and what passes through it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

Metric = Literal["cosine", "l2", "ip"]
Strategy = Literal["auto", "graph", "scan"]
METRICS = ("cosine", "l2", "ip")
INT64 = np.iinfo(np.int64)


class IndexFormatError(ValueError):
    """A file that is not an index, is damaged, or is of another dimension, metric or version."""


@dataclass(frozen=True)
class SearchResult:
    """``labels`` int64 and ``distances`` float32, both ``[queries, k]``, ascending; -1 and inf where fewer
    were found.

    Distances: squared Euclidean for l2, 1 - inner product for ip, 1 - cosine for cosine. ``strategy`` says
    which way the answer was found: "graph" (approximate) or "scan" (exact).
    """

    labels: np.ndarray
    distances: np.ndarray
    strategy: str


class VectorIndex(ABC):
    """Vectors of one dimension under int64 labels of the caller's choice. Safe to use from many threads."""

    dim: int
    metric: Metric

    @abstractmethod
    def add(
        self, vectors: npt.ArrayLike, labels: npt.ArrayLike | None = None, *, threads: int | None = None
    ) -> np.ndarray:
        """Add rows ``[n, dim]``; returns their labels (the next free numbers when none are given).

        Raises ValueError naming the row (wrong dimension, NaN, zero vector under cosine, label in use or
        given twice); then nothing was added.
        """

    @abstractmethod
    def remove(self, labels: npt.ArrayLike) -> None:
        """Remove labels. Raises KeyError for one that is not there; then nothing was removed."""

    @abstractmethod
    def search(
        self,
        queries: npt.ArrayLike,
        k: int = 10,
        *,
        filter: npt.ArrayLike | None = None,
        threads: int | None = None,
    ) -> SearchResult:
        """The ``k`` nearest of each row of ``queries`` (one vector counts as one row), of the labels in
        ``filter`` only.
        """

    @abstractmethod
    def range_search(self, query: npt.ArrayLike, radius: float) -> SearchResult:
        """Everything within ``radius`` (a distance as in :class:`SearchResult`) of one query: ``[1,
        found]``.
        """

    @abstractmethod
    def get(self, labels: npt.ArrayLike) -> np.ndarray:
        """The vectors float32 ``[n, dim]`` as they are kept (unit length under cosine). Raises KeyError."""

    @abstractmethod
    def save(self, path: Path | str) -> None:
        """Write the index to a file, atomically."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __contains__(self, label: int) -> bool: ...

    def update(self, labels: npt.ArrayLike, vectors: npt.ArrayLike) -> None:
        """Give existing labels other vectors. Raises KeyError or ValueError; then nothing was changed."""
        wanted = np.atleast_1d(np.asarray(labels))
        rows = checked_rows("vectors", vectors, self.dim, self.metric)
        if len(wanted) != len(rows):
            raise ValueError(f"vectors must have one row for each of {len(wanted)} labels, got {len(rows)}")
        self.remove(wanted)
        self.add(rows, wanted)


def checked_rows(name: str, values: npt.ArrayLike, dim: int, metric: Metric) -> np.ndarray:
    """float32 ``[n, dim]``, of unit length under cosine. Raises ValueError naming the row."""
    rows = np.asarray(values, dtype=np.float32)
    if rows.ndim == 1:
        rows = rows[None]
    if rows.ndim != 2 or rows.shape[1] != dim:
        raise ValueError(f"{name} must have shape [n, {dim}], got {np.shape(values)}")
    bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if bad.size:
        raise ValueError(f"{name}: row {bad[0]} holds NaN or infinite values")
    if metric != "cosine":
        return rows
    length = np.linalg.norm(rows.astype(np.float64), axis=1)
    bad = np.flatnonzero(length == 0)
    if bad.size:
        raise ValueError(f"{name}: row {bad[0]} is zero, which has no direction under cosine")
    return (rows / length[:, None]).astype(np.float32)


def checked_labels(labels: npt.ArrayLike, n: int | None = None) -> np.ndarray:
    """int64 ``[n]`` without repetition. Raises ValueError naming the row."""
    given = np.atleast_1d(np.asarray(labels))
    if given.size == 0:
        given = given.astype(np.int64)
    if given.ndim != 1 or given.dtype.kind not in "iu":
        raise ValueError(f"labels must be one row of whole numbers, got {given.dtype} of shape {given.shape}")
    if given.dtype.kind == "u" and given.size and int(given.max()) > INT64.max:
        raise ValueError(f"labels: row {int(given.argmax())} is beyond int64, got {int(given.max())}")
    whole = given.astype(np.int64)
    if n is not None and len(whole) != n:
        raise ValueError(f"labels must have one entry for each of {n} vectors, got {len(whole)}")
    if whole.size and int(whole.min()) < 0:
        raise ValueError(f"labels: row {int(whole.argmin())} must be at least 0, got {int(whole.min())}")
    order = np.argsort(whole, kind="stable")
    twice = np.flatnonzero(np.diff(whole[order]) == 0)
    if twice.size:
        row = int(order[twice[0] + 1])
        raise ValueError(f"labels: row {row} repeats label {int(whole[row])}")
    return whole


def checked_k(k: int) -> int:
    """``k``, a whole number of at least 1. Raises ValueError."""
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
        raise ValueError(f"k must be a whole number of at least 1, got {k!r}")
    return int(k)


def padded(dim: int) -> int:
    """``dim`` rounded up to whole blocks of 16 floats."""
    return -(-dim // 16) * 16


def spread(n: int, threads: int) -> Sequence[tuple[int, int]]:
    """``range(n)`` cut into at most ``threads`` contiguous parts that are not empty."""
    threads = max(1, min(threads, n))
    return [(n * i // threads, n * (i + 1) // threads) for i in range(threads)]
