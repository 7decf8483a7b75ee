"""What makes the graph fast and must not be seen: sketches, sorted keys, the short way for one query."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

from sharewell.ann import HNSWIndex
from sharewell.ann.base import METRICS, Metric
from sharewell.ann.intrinsics import address
from sharewell.ann.sorted_keys import GUARDS, LEAST, insert_key, key_distance, key_node, key_of


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("shift", [0.0, 30.0])
def test_sketches_change_nothing_in_what_is_found(metric: Metric, shift: float):
    rng = np.random.default_rng(21)
    vectors, queries = (rng.standard_normal((n, 70)).astype(np.float32) + shift for n in (2500, 60))
    with_them, without = (HNSWIndex(70, metric=metric, sketches=kept) for kept in (True, False))
    for index in (with_them, without):
        index.add(vectors, threads=1)
    np.testing.assert_array_equal(with_them._rows.graph.links0, without._rows.graph.links0)
    for ef in (1, 10, 60, 300):
        a, b = (i.search(queries, 10, ef=ef, strategy="graph") for i in (with_them, without))
        np.testing.assert_array_equal(a.labels, b.labels)
        np.testing.assert_array_equal(a.distances, b.distances)
    assert with_them.stats().nbytes > without.stats().nbytes


@settings(max_examples=40, deadline=None)
@given(exponent=st.integers(-44, 38), offset=st.sampled_from([0.0, 1.0, 100.0]), seed=st.integers(0, 2**16))
def test_sketches_of_tiny_and_huge_vectors_hide_nothing(exponent: int, offset: float, seed: int):
    rng = np.random.default_rng(seed)
    rows = ((rng.standard_normal((60, 9)) + offset) * 10.0**exponent / 200).astype(np.float32)
    for metric in ("l2", "ip"):
        a, b = (HNSWIndex(9, metric=metric, M=4, sketches=kept) for kept in (True, False))
        for index in (a, b):
            index.add(rows, threads=1)
        x, y = (i.search(rows, 5, ef=8, strategy="graph") for i in (a, b))
        np.testing.assert_array_equal(x.labels, y.labels)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("storage", ["float32", "int8"])
def test_one_query_is_answered_as_among_many(metric: Metric, storage: str):
    index = HNSWIndex(64, metric=metric, storage=storage)
    rng = np.random.default_rng(22)
    corpus = rng.standard_normal((5000, 64)).astype(np.float32)
    index.add(corpus[:3000], np.arange(3000) * 5)
    index.remove(np.arange(0, 500, 5))
    queries = rng.standard_normal((40, 64)).astype(np.float32)
    for k in (1, 10, 3):
        many = index.search(queries, k, strategy="graph")
        for row, query in enumerate(queries):
            one = index.search(query, k, strategy="graph")
            np.testing.assert_array_equal(one.labels[0], many.labels[row])
            np.testing.assert_allclose(one.distances[0], many.distances[row], rtol=1e-5, atol=1e-6)
            assert one.strategy == "graph" and one.labels.shape == (1, k)
    index.add(corpus[3000:], np.arange(3000, 5000) * 5)  # the arrays grow: the next answer knows
    assert index.search(corpus[4000], 1, strategy="graph").labels[0, 0] == 20_000


@settings(max_examples=60, deadline=None)
@given(
    pairs=st.lists(
        st.tuples(st.floats(width=32, allow_nan=False), st.integers(0, 2**31 - 2)), max_size=70, unique=True
    )
)
def test_keys_are_sorted_by_distance_then_node(pairs: list[tuple[float, int]]):
    keys = np.full(GUARDS + 71, LEAST, np.int64)
    so_far: list[tuple[float, int]] = []
    for n, (distance, node) in enumerate(pairs):
        so_far.append((distance + 0.0 if distance else math.copysign(0.0, distance), node))
        so_far.sort(key=lambda pair: (pair[0], math.copysign(1.0, pair[0]), pair[1]))
        put_key(keys, n, np.float32(distance), np.int32(node))
        assert [read_key(key) for key in keys[GUARDS : GUARDS + n + 1]] == so_far


@njit
def put_key(keys: np.ndarray, n: int, distance: np.float32, node: np.int32) -> int:
    at = address(keys) + 8 * GUARDS  # pyright: ignore[reportCallIssue]
    return insert_key(at, n, key_of(distance, node))  # pyright: ignore[reportCallIssue]


@njit
def read_key(key: int) -> tuple[float, int]:
    return key_distance(key), key_node(key)  # pyright: ignore[reportCallIssue]
