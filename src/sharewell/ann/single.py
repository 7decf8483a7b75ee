"""One query at a time: a compiled call that takes one table of addresses instead of thirty arrays.

Handing the arrays of a graph over to compiled code one by one costs more than a short walk does. Here they
are written down once, in a :class:`Lookup`, and each query passes that.
"""

# The intrinsics are called by numba's typing pass, not as Python.
# pyright: reportArgumentType=false, reportCallIssue=false
from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import carray, njit  # pyright: ignore[reportPrivateImportUsage]

from .graph import Graph, Scratch
from .intrinsics import pointer
from .searching import search_many

FOUND_ALL, NOT_FINITE, NO_DIRECTION, TOO_FEW = 0, 1, 2, 3


@njit(nogil=True, cache=True, inline="always")
def _row(table, i, like):
    return carray(pointer(table[i, 0], like), (table[i, 1],))


@njit(nogil=True, cache=True, inline="always")
def _rows(table, i, like):
    return carray(pointer(table[i, 0], like), (table[i, 1], table[i, 2]))


@njit(nogil=True, cache=True)
def look_up(table, like, metric, unit, vector, ef, labels, distances):
    """The nearest live nodes of one ``vector`` (float32 [dim]) into ``labels`` and ``distances`` (both [1,
    k]); one of the codes above. ``like``: a value of the type of the rows; ``unit``: bring the vector to
    length 1.
    """
    i8, u8, i16, i32, i64, f32 = np.int8(0), np.uint8(0), np.int16(0), np.int32(0), np.int64(0), np.float32(0)
    g = Graph(
        _rows(table, 0, like), _row(table, 1, f32), _row(table, 2, f32), _rows(table, 3, i8),
        _rows(table, 4, f32), _row(table, 5, i16), _rows(table, 6, i32), _row(table, 7, i32),
        _rows(table, 8, i32), _row(table, 9, i32), _row(table, 10, i64), _row(table, 11, i32),
        _row(table, 12, u8), _row(table, 13, i32), _row(table, 14, i64),
    )  # fmt: skip
    s = Scratch(
        _row(table, 15, u8), _row(table, 16, u8), _row(table, 17, i64), _row(table, 18, f32),
        _row(table, 19, i32), _row(table, 20, i32), _row(table, 21, f32), _row(table, 22, i32),
        _row(table, 23, i32), _rows(table, 24, i32), _row(table, 25, i32), _row(table, 26, f32),
        _row(table, 27, f32), _row(table, 28, i16), _row(table, 29, f32),
    )  # fmt: skip
    names, nodes, padded = _row(table, 30, i64), _rows(table, 31, i32), _rows(table, 32, f32)
    total = 0.0
    for j in range(vector.size):
        total += np.float64(vector[j]) * np.float64(vector[j])
    if not total < np.inf:
        return NOT_FINITE
    length = math.sqrt(total) if unit else 1.0
    if length == 0:
        return NO_DIRECTION
    for j in range(vector.size):
        padded[0, j] = np.float32(np.float64(vector[j]) / length) if unit else vector[j]
    k = labels.shape[1]
    search_many(g, metric, padded, k, ef, np.empty(0, np.uint8), 0, 1, nodes, distances, s)
    for j in range(k):
        node = nodes[0, j]
        if node < 0:
            return TOO_FEW
        labels[0, j] = names[node]
    return FOUND_ALL


class Lookup:
    """A graph, its labels and one thread's scratch, written down as addresses. It keeps them alive."""

    def __init__(self, g: Graph, labels: np.ndarray, s: Scratch, metric: int, unit: bool, k: int) -> None:
        self.graph, self.labels, self.k, self.ef = g, labels, k, s.distance.size
        self._metric, self._unit = metric, unit
        self._like = g.vectors.dtype.type(0)
        nodes, query = np.empty((1, k), np.int32), np.zeros((1, s.query.size), np.float32)
        self._held = (*g, *s, labels, nodes, query)
        self._table = np.array([self._cells(array) for array in self._held], np.int64)

    @staticmethod
    def _cells(array: np.ndarray) -> tuple[int, int, int]:
        return array.ctypes.data, array.shape[0], array.shape[1] if array.ndim == 2 else 0

    def __call__(self, vector: np.ndarray, ef: int, labels: np.ndarray, distances: np.ndarray) -> Any:
        """As :func:`look_up`."""
        return look_up(self._table, self._like, self._metric, self._unit, vector, ef, labels, distances)
