"""Searching the layered proximity graph as compiled kernels over flat arrays.

Malkov and Yashunin, arXiv 1603.09320: SEARCH-LAYER (algorithm 2) as one sorted array of candidates with a
cursor. Searches take no lock: others may insert meanwhile, see insertion.py.

When you change this file, sorted_keys.py or intrinsics.py, touch the other files with kernels, too: numba's
cache on disk looks at the file of the outermost kernel only, and would go on running what it has compiled.
"""

# The intrinsics are called by numba's typing pass, not as Python.
# pyright: reportCallIssue=false
from __future__ import annotations

import math

import numpy as np
from numba import carray, njit  # pyright: ignore[reportPrivateImportUsage]

from .graph import ENTRY, L2
from .intrinsics import (
    address,
    inner_product,
    inner_product_int8,
    inner_product_int16,
    load_acquire,
    pointer,
    prefetch,
    squared_distance,
)
from .sorted_keys import (
    EXPANDED,
    GUARDS,
    insert_key,
    key_distance,
    key_node,
    key_of,
    load_key,
    store_key,
)


@njit(nogil=True, cache=True, inline="always")
def distance_to(g, metric, node, query, norm):
    """From the float row at address ``query`` (squared length ``norm``) to a node."""
    vectors = g.vectors
    blocks = vectors.shape[1] // 16
    u = np.uint64(node)
    at = address(vectors) + np.int64(node) * vectors.strides[0]
    if vectors.itemsize == 4:
        if metric == L2:
            return squared_distance(at, query, blocks)
        return np.float32(1) - inner_product(at, query, blocks)
    product = inner_product_int8(at, query, blocks) * g.scales[u]
    if metric == L2:
        return max(norm + g.norms[u] - np.float32(2) * product, np.float32(0))
    return np.float32(1) - product


@njit(nogil=True, cache=True)
def row_address(g, node, room):
    """Address of the node's vector as floats; bytes are widened into ``room``."""
    if g.vectors.itemsize == 4:
        return address(g.vectors) + np.int64(node) * g.vectors.strides[0]
    scale = g.scales[np.uint64(node)]
    for i in range(g.vectors.shape[1]):
        room[i] = np.float32(g.vectors[node, i]) * scale
    return address(room)


@njit(nogil=True, cache=True, inline="always")
def _limit(metric, bound, slack):
    """What a sketch is compared with: the Euclidean distance, or the inner product, at distance ``bound``."""
    if metric == L2:
        return np.float32(math.sqrt(bound)) * slack
    # less what rounding may do to 1 - product
    return np.float32(1) - bound - np.float32(2.5e-7) * (np.float32(1) + abs(bound))


@njit(nogil=True, cache=True)
def next_tag(s):
    """A tag that no node carries in ``s.visited``."""
    tag = s.tag[0] + np.uint8(1)
    if tag == 256:
        s.visited[:] = 0
        tag = 1
    s.tag[0] = tag
    return np.uint8(tag)


@njit(nogil=True, cache=True)
def sketch_query(g, query, s):
    """Round the float row at address ``query`` to int16 in ``s``, where the graph has sketches."""
    if g.sketches.shape[0] == 0:
        return
    size, words = g.vectors.shape[1], s.words
    row = carray(pointer(query, np.float32(0)), (size,))
    largest = np.float32(0)
    for j in range(size):
        largest = max(largest, abs(row[j]))
    # so many steps that no sum of products with bytes overflows
    steps = np.float32(min(32767, 2**31 // (127 * words.size) - 1))
    step = max(largest / steps, np.float32(1e-35))
    left_out, kept, total = 0.0, 0.0, 0.0
    for j in range(size):
        whole = np.int16(np.rint(row[j] / step))
        words[j] = whole
        value = np.float64(whole) * np.float64(step)
        left_out += (row[j] - value) ** 2
        kept += value * value
        total += np.float64(row[j]) ** 2
    s.word[0], s.word[1] = step, math.sqrt(left_out) * (1 + 1e-6)
    s.word[2] = kept * (1 - 2e-6) if kept < 1e36 else -np.inf  # beyond float32 nothing is surely farther
    s.word[3] = math.sqrt(kept) * (1 + 1e-6)
    s.word[4] = math.sqrt(total) * (1 + 1e-6)


@njit(nogil=True, cache=True, inline="always")
def _surely_farther(g, metric, node, limit, s):
    """Whether the sketch of a node shows that it is beyond ``limit``, as :func:`_limit` makes it.

    By the triangle inequality: neither rounding moved a vector by more than the length of what it left out.
    """
    u = np.uint64(node)
    sketch, word = g.sketch, s.word
    at = address(g.sketches) + np.int64(node) * g.sketches.strides[0]
    product = np.float32(inner_product_int16(at, address(s.words), s.words.size // 32))
    product = product * sketch[u, np.uint64(0)] * word[0]  # in this order: the steps alone may underflow
    if metric == L2:
        farthest = limit + sketch[u, np.uint64(1)] + word[1]
        least = sketch[u, np.uint64(2)] + word[2] - np.float32(2) * product
        return least > farthest * farthest + np.float32(1e-36)  # squares below that are too coarse
    return product + word[4] * sketch[u, np.uint64(1)] + word[1] * sketch[u, np.uint64(3)] < limit


@njit(nogil=True, cache=True, inline="always")
def _slack(g):
    """What rounding may add to a distance computed in full, as a factor, with a margin."""
    return np.float32(1 + 1e-6 + 2.5e-7 * (g.vectors.shape[1] // 16))


@njit(nogil=True, cache=True, inline="always")
def _prefetch_row(rows, node):
    at = address(rows) + np.int64(node) * rows.strides[0]
    for line in range(0, rows.strides[0], 64):
        prefetch(at + line)


@njit(nogil=True, cache=True)
def descend(g, metric, query, norm, entry, distance, layer, s):
    """Greedy walk on one layer to a node none of whose neighbours is closer: (node, distance)."""
    sketched = g.sketches.shape[0] > 0
    slack = _slack(g)
    changed = True
    while changed:
        changed = False
        row = np.uint64(g.upper[np.uint64(entry)] + layer - 1)
        count = load_acquire(address(g.count) + 4 * np.int64(row))
        for j in range(count):
            if sketched:
                _prefetch_row(g.sketches, g.links[row, np.uint64(j)])
            else:
                _prefetch_row(g.vectors, g.links[row, np.uint64(j)])
        for j in range(count):
            node = g.links[row, np.uint64(j)]
            if sketched and _surely_farther(g, metric, node, _limit(metric, distance, slack), s):
                continue
            d = distance_to(g, metric, node, query, norm)
            if d < distance:
                entry, distance, changed = node, d, True
    return entry, distance


@njit(nogil=True, cache=True)
def search_layer(g, metric, query, norm, entry, distance, ef, layer, s):
    """The ``ef`` nearest found nodes of a layer, ascending, in ``s.distance`` and ``s.node``; how many.

    One sorted array is both the candidates and the results: the cursor stands on the first that is not
    expanded, and an insertion before it moves it back. Once it is full, a neighbour whose sketch shows that
    it is farther than all of them is passed over without its vector being read; the others are measured, so
    sketches change nothing in what is found.
    """
    visited, near = s.visited, s.near
    tag = next_tag(s)
    keys = address(s.keys) + 8 * GUARDS
    sketched = g.sketches.shape[0] > 0
    links, counts = (g.links0, g.count0) if layer == 0 else (g.links, g.count)
    counts_at = address(counts)
    slack = _slack(g)
    limit = np.float32(0)
    store_key(keys, 0, key_of(distance, np.int32(entry)))
    visited[np.uint64(entry)] = tag
    n, cursor = 1, 0
    gate = g.meta[ENTRY]
    if layer == 0 and ef > 1 and gate != entry:
        # every node can be reached from here, which need not be so from where the upper layers led
        insert_key(keys, 1, key_of(distance_to(g, metric, gate, query, norm), np.int32(gate)))
        visited[np.uint64(gate)] = tag
        n = 2
    bound = key_distance(load_key(keys, n - 1)) if n == ef else np.float32(np.inf)
    narrow = False
    while cursor < n:
        if sketched and n == ef:
            narrow = True
            limit = _limit(metric, bound, slack)
        key = load_key(keys, cursor)
        if key & EXPANDED:
            cursor += 1
            continue
        node = key_node(key)
        store_key(keys, cursor, key | EXPANDED)
        row = np.uint64(node) if layer == 0 else np.uint64(g.upper[np.uint64(node)] + layer - 1)
        fresh = 0
        for j in range(load_acquire(counts_at + 4 * np.int64(row))):
            neighbour = links[row, np.uint64(j)]
            near[fresh] = neighbour  # without a branch: which way it would go cannot be foreseen
            fresh += visited[np.uint64(neighbour)] != tag
            visited[np.uint64(neighbour)] = tag
        if narrow:
            for j in range(fresh):
                _prefetch_row(g.sketches, near[j])
            kept = 0
            for j in range(fresh):
                neighbour = near[j]
                if not _surely_farther(g, metric, neighbour, limit, s):
                    near[kept] = neighbour
                    kept += 1
                    _prefetch_row(g.vectors, neighbour)
            fresh = kept
        else:
            for j in range(fresh):
                _prefetch_row(g.vectors, near[j])
        lowest = n
        for j in range(fresh):
            neighbour = near[j]
            d = distance_to(g, metric, neighbour, query, norm)
            if n < ef:
                at = insert_key(keys, n, key_of(d, neighbour))
                n += 1
            elif d < bound:
                at = insert_key(keys, n - 1, key_of(d, neighbour))
            else:
                continue
            if n == ef:
                bound = key_distance(load_key(keys, n - 1))
            lowest = min(lowest, at)
            if layer == 0:
                prefetch(counts_at + 4 * np.int64(neighbour))
                _prefetch_row(links, neighbour)
        cursor = lowest if lowest <= cursor else cursor + 1
    for j in range(n):
        key = load_key(keys, j)
        s.distance[j], s.node[j] = key_distance(key), key_node(key)
    return n


@njit(nogil=True, cache=True)
def search_many(g, metric, queries, k, ef, allowed, first, last, nodes, distances, s):
    """Rows ``first .. last - 1`` of ``queries`` (float32 [q, padded dim]): the k nearest live nodes that
    ``allowed`` (uint8 [capacity], or of size 0 for all) lets through, -1 where there are fewer.
    """
    filtered = allowed.size > 0
    for i in range(first, last):
        nodes[i, :] = -1
        distances[i, :] = np.inf
        entry = g.meta[ENTRY]
        if entry < 0:
            continue
        s.query[:] = queries[i]
        query = address(s.query)
        norm = inner_product(query, query, s.query.size // 16)
        sketch_query(g, query, s)
        distance = distance_to(g, metric, entry, query, norm)
        for layer in range(g.level[entry], 0, -1):
            entry, distance = descend(g, metric, query, norm, entry, distance, layer, s)
        n = search_layer(g, metric, query, norm, entry, distance, ef, 0, s)
        taken = 0
        for j in range(n):
            node = s.node[j]
            if g.dead[node] or (filtered and not allowed[node]):
                continue
            nodes[i, taken], distances[i, taken] = node, s.distance[j]
            taken += 1
            if taken == k:
                break


@njit(nogil=True, cache=True)
def scan_many(g, metric, queries, k, candidates, first, last, nodes, distances, s):
    """As :func:`search_many`, by looking at every node of ``candidates`` (int32, ascending): exact."""
    for i in range(first, last):
        nodes[i, :] = -1
        distances[i, :] = np.inf
        s.query[:] = queries[i]
        query = address(s.query)
        norm = inner_product(query, query, s.query.size // 16)
        taken = 0
        for j in range(candidates.size):
            node = candidates[j]
            d = distance_to(g, metric, node, query, norm)
            if taken == k and not d < distances[i, k - 1]:
                continue
            at = min(taken, k - 1)
            taken = min(taken + 1, k)
            while at > 0 and distances[i, at - 1] > d:
                distances[i, at], nodes[i, at] = distances[i, at - 1], nodes[i, at - 1]
                at -= 1
            distances[i, at], nodes[i, at] = d, node
