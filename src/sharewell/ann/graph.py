"""The arrays of the layered proximity graph and of one thread's work on it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

L2, IP = 0, 1  # squared Euclidean; 1 - inner product (cosine: of unit vectors)
ENTRY, TOP = 0, 1  # cells of `meta`
UNUSED = -1  # level of a slot that holds no vector


class Graph(NamedTuple):
    """Arrays of ``capacity`` slots; a slot is a node. M links a node and layer, 2M on layer 0.

    vectors: float32 or int8 ``[capacity, padded dim]``; scales: float32 ``[capacity]`` of int8 rows, 1
    otherwise; norms: float32 ``[capacity]``, squared length of the row. sketches: int8 ``[capacity, dim
    padded to 32]``, float rows rounded to bytes, or no rows; sketch: float32 ``[capacity, 4]``, the value of
    one step of such a byte, the length of what the rounding left out, the squared length (rounded down) and
    the length (rounded up) of what the bytes stand for. level: int16, UNUSED for free slots. links0
    int32 ``[capacity, 2M]`` with count0; links ``[rows, M]`` with count: the row of node u on layer l is
    ``upper[u] + l - 1``. incoming: links that point to a node on layer 0. dead: 1 for removed, still passable
    nodes. locks: one a node, the last one for the entry point. meta: entry node (-1: empty) and its level.
    """

    vectors: np.ndarray
    scales: np.ndarray
    norms: np.ndarray
    sketches: np.ndarray
    sketch: np.ndarray
    level: np.ndarray
    links0: np.ndarray
    count0: np.ndarray
    links: np.ndarray
    count: np.ndarray
    upper: np.ndarray
    incoming: np.ndarray
    dead: np.ndarray
    locks: np.ndarray
    meta: np.ndarray


class Scratch(NamedTuple):
    """What one thread needs for itself: visited marks with the current tag, the sorted candidates as keys and
    taken apart, work lists, two rows of floats (the query; a node's vector when the rows are bytes), and the
    query's sketch.
    """

    visited: np.ndarray  # uint8 [capacity]: a byte, so that the marks of many nodes stay in the nearest cache
    tag: np.ndarray  # uint8 [1]
    keys: np.ndarray  # int64 [GUARDS + ef + 1]
    distance: np.ndarray  # float32 [ef]
    node: np.ndarray  # int32 [ef]
    near: np.ndarray  # int32 [2M + 1]
    list_distance: np.ndarray  # float32 [2M + 2]
    list_node: np.ndarray  # int32 [2M + 2]
    chosen: np.ndarray  # int32 [2M + 1]
    kept: np.ndarray  # int32 [layers, M]
    kept_count: np.ndarray  # int32 [layers]
    query: np.ndarray  # float32 [padded dim]
    row: np.ndarray  # float32 [padded dim]
    words: np.ndarray  # int16 [dim padded to 32]: the query rounded, to be compared with sketches
    word: np.ndarray  # float32 [5]: as `sketch` of the words, and the query's own length
