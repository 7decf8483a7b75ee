"""The layered proximity graph: search, insertion and repair as compiled kernels over flat arrays.

Malkov and Yashunin, arXiv 1603.09320: SEARCH-LAYER (algorithm 2) as one sorted array of candidates with a
cursor, the neighbour heuristic (algorithm 4), insertion (algorithm 1). Many threads may search while others
insert: a node's list is changed only under its lock, entries first and the count last, so a reader always
sees a valid list.
"""

# The intrinsics are called by numba's typing pass, not as Python.
# pyright: reportCallIssue=false
from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from .intrinsics import (
    address,
    compare_and_swap,
    fetch_add,
    inner_product,
    inner_product_int8,
    load_acquire,
    prefetch,
    squared_distance,
    store_release,
    yield_core,
)

L2, IP = 0, 1  # squared Euclidean; 1 - inner product (cosine: of unit vectors)
ENTRY, TOP = 0, 1  # cells of `meta`
UNUSED = -1  # level of a slot that holds no vector


class Graph(NamedTuple):
    """Arrays of ``capacity`` slots; a slot is a node. M links a node and layer, 2M on layer 0.

    vectors: float32 or int8 ``[capacity, padded dim]``; scales: float32 ``[capacity]`` of int8 rows, 1
    otherwise; norms: float32 ``[capacity]``, squared length of the row. level: int16, UNUSED for free slots.
    links0 int32 ``[capacity, 2M]`` with count0; links ``[rows, M]`` with count: the row of node u on layer l
    is ``upper[u] + l - 1``. incoming: links that point to a node on layer 0. dead: 1 for removed, still
    passable nodes. locks: one a node, the last one for the entry point. meta: entry node (-1: empty) and its
    level.
    """

    vectors: np.ndarray
    scales: np.ndarray
    norms: np.ndarray
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
    """What one thread needs for itself: visited marks with the current tag, the sorted candidates, work
    lists, and two rows of floats (the query; a node's vector when the rows are bytes).
    """

    visited: np.ndarray  # uint32 [capacity]
    tag: np.ndarray  # uint32 [1]
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


@njit(nogil=True, cache=True, inline="always")
def _distance(g, metric, node, query, norm):
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


@njit(nogil=True, cache=True)
def _lock(g, node):
    at = address(g.locks) + 4 * np.int64(node)
    spins = 0
    while not compare_and_swap(at, np.int32(0), np.int32(1)):
        spins += 1
        if spins & 63 == 0:
            yield_core()


@njit(nogil=True, cache=True)
def _unlock(g, node):
    store_release(address(g.locks) + 4 * np.int64(node), np.int32(0))


@njit(nogil=True, cache=True)
def descend(g, metric, query, norm, entry, distance, layer):
    """Greedy walk on one layer to a node none of whose neighbours is closer: (node, distance)."""
    changed = True
    while changed:
        changed = False
        row = np.uint64(g.upper[np.uint64(entry)] + layer - 1)
        for j in range(load_acquire(address(g.count) + 4 * np.int64(row))):
            node = g.links[row, np.uint64(j)]
            d = _distance(g, metric, node, query, norm)
            if d < distance:
                entry, distance, changed = node, d, True
    return entry, distance


@njit(nogil=True, cache=True)
def _insert_sorted(distances, nodes, n, distance, node):
    at = n
    while at > 0 and distances[at - 1] > distance:
        distances[at], nodes[at] = distances[at - 1], nodes[at - 1]
        at -= 1
    distances[at], nodes[at] = distance, node


@njit(nogil=True, cache=True)
def search_layer(g, metric, query, norm, entry, distance, ef, layer, s):
    """The ``ef`` nearest found nodes of a layer, ascending, in ``s.distance`` and ``s.node``; how many.

    One sorted array is both the candidates and the results: expanded entries are marked by their sign, the
    cursor stands on the first that is not, and an insertion before it moves it back.
    """
    visited, near, found_d, found = s.visited, s.near, s.distance, s.node
    tag = s.tag[0] + np.uint32(1)
    if tag == 0:
        visited[:] = 0
        tag = np.uint32(1)
    s.tag[0] = tag
    lines = (g.vectors.shape[1] * g.vectors.itemsize + 63) // 64
    base, stride = address(g.vectors), g.vectors.strides[0]
    links, counts = (g.links0, g.count0) if layer == 0 else (g.links, g.count)
    counts_at = address(counts)
    found_d[0], found[0] = distance, entry
    visited[np.uint64(entry)] = tag
    n, cursor = 1, 0
    gate = g.meta[ENTRY]
    if layer == 0 and ef > 1 and gate != entry:
        # every node can be reached from here, which need not be so from where the upper layers led
        _insert_sorted(found_d, found, 1, _distance(g, metric, gate, query, norm), gate)
        visited[np.uint64(gate)] = tag
        n = 2
    while cursor < n:
        node = found[cursor]
        if node < 0:
            cursor += 1
            continue
        found[cursor] = -node - 1
        row = np.uint64(node) if layer == 0 else np.uint64(g.upper[np.uint64(node)] + layer - 1)
        fresh = 0
        for j in range(load_acquire(counts_at + 4 * np.int64(row))):
            neighbour = links[row, np.uint64(j)]
            if visited[np.uint64(neighbour)] != tag:
                visited[np.uint64(neighbour)] = tag
                near[fresh] = neighbour
                fresh += 1
                at = base + np.int64(neighbour) * stride
                for line in range(lines):
                    prefetch(at + 64 * line)
        lowest = n
        for j in range(fresh):
            neighbour = near[j]
            d = _distance(g, metric, neighbour, query, norm)
            if n < ef:
                at = n
                n += 1
            elif d < found_d[n - 1]:
                at = n - 1
            else:
                continue
            while at > 0 and found_d[at - 1] > d:
                found_d[at], found[at] = found_d[at - 1], found[at - 1]
                at -= 1
            found_d[at], found[at] = d, neighbour
            lowest = min(lowest, at)
        cursor = lowest if lowest <= cursor else cursor + 1
    for j in range(n):
        if found[j] < 0:
            found[j] = -found[j] - 1
    return n


@njit(nogil=True, cache=True)
def _choose(g, metric, distances, nodes, n, most, out, room):
    """The neighbour heuristic over candidates ascending by distance: keep one only if it is not closer to one
    that is kept than to the query. ``nodes`` of -1 are passed over. How many are in ``out``.
    """
    kept = 0
    for i in range(n):
        if kept == most:
            break
        node = nodes[i]
        if node < 0:
            continue
        at = row_address(g, node, room)
        norm = g.norms[np.uint64(node)]
        good = True
        for j in range(kept):
            if _distance(g, metric, out[j], at, norm) < distances[i]:
                good = False
                break
        if good:
            out[kept] = node
            kept += 1
    return kept


@njit(nogil=True, cache=True)
def _link_back(g, metric, node, new, distance, layer, s):
    """Let ``node`` point to ``new``, re-choosing its neighbours when its list is full.

    On layer 0 nobody loses its last incoming link by that: such a link stays in place of a chosen one.
    """
    links, counts = (g.links0, g.count0) if layer == 0 else (g.links, g.count)
    row = node if layer == 0 else g.upper[node] + layer - 1
    most = links.shape[1]
    incoming = address(g.incoming)
    _lock(g, node)
    c = counts[row]
    for j in range(c):
        if links[row, j] == new:
            _unlock(g, node)
            return
    if c < most:
        links[row, c] = new
        store_release(address(counts) + 4 * np.int64(row), np.int32(c + 1))
        if layer == 0:
            fetch_add(incoming + 4 * np.int64(new), np.int32(1))
        _unlock(g, node)
        return
    distances, nodes, chosen = s.list_distance, s.list_node, s.chosen
    distances[0], nodes[0] = distance, new
    at = row_address(g, node, s.row)
    norm = g.norms[node]
    for j in range(c):
        d = _distance(g, metric, links[row, j], at, norm)
        _insert_sorted(distances, nodes, j + 1, d, links[row, j])
    kept = _choose(g, metric, distances, nodes, c + 1, most, chosen, s.row)
    if layer == 0:
        kept = _keep_last_links(g, nodes, c + 1, new, chosen, kept, most)
        for j in range(c + 1):
            was, now = nodes[j] != new, False
            for i in range(kept):
                now = now or chosen[i] == nodes[j]
            if was != now:
                fetch_add(incoming + 4 * np.int64(nodes[j]), np.int32(1 if now else -1))
    for j in range(kept):
        links[row, j] = chosen[j]
    store_release(address(counts) + 4 * np.int64(row), np.int32(kept))
    _unlock(g, node)


@njit(nogil=True, cache=True)
def _keep_last_links(g, nodes, n, new, chosen, kept, most):
    """Put back into ``chosen`` those of ``nodes`` that would be left without any incoming link; how many
    there are then.
    """
    for j in range(n):
        node = nodes[j]
        left = g.incoming[node] - (0 if node == new else 1)
        if left > 0:
            continue
        present = False
        for i in range(kept):
            present = present or chosen[i] == node
        if present:
            continue
        if kept < most:
            chosen[kept] = node
            kept += 1
            continue
        for i in range(kept - 1, -1, -1):
            other = chosen[i]
            if g.incoming[other] - (0 if other == new else 1) > 0:
                chosen[i] = node
                break
    return kept


@njit(nogil=True, cache=True)
def insert(g, metric, node, ef, s):
    """Link a node whose vector and level are set into the graph.

    Neighbours of all layers are found from the top down and linked from the bottom up, so that whoever meets
    the node on a layer finds it linked on the layers below.
    """
    level = np.int64(g.level[node])
    gate = g.locks.size - 1
    guarded = level > g.meta[TOP]
    if guarded:
        _lock(g, gate)
        guarded = level > g.meta[TOP]
        if not guarded:
            _unlock(g, gate)
    entry = g.meta[ENTRY]
    if entry < 0:
        g.meta[ENTRY] = node
        g.meta[TOP] = level
        _unlock(g, gate)
        return
    top = np.int64(g.level[entry])  # not meta[TOP]: the two cells change one after the other
    query = address(s.query)
    at = row_address(g, node, s.query)
    if g.vectors.itemsize == 4:
        query = at
    norm = g.norms[node]
    distance = _distance(g, metric, entry, query, norm)
    for layer in range(top, level, -1):
        entry, distance = descend(g, metric, query, norm, entry, distance, layer)
    m = g.links.shape[1]
    for layer in range(min(level, top), -1, -1):
        n = search_layer(g, metric, query, norm, entry, distance, ef, layer, s)
        entry, distance = s.node[0], s.distance[0]
        for j in range(n):  # a dead node passes searches on, but is no neighbour for life
            if g.dead[s.node[j]] or s.node[j] == node:
                s.node[j] = -1
        s.kept_count[layer] = _choose(g, metric, s.distance, s.node, n, m, s.kept[layer], s.row)
    for layer in range(min(level, top) + 1):
        links, counts = (g.links0, g.count0) if layer == 0 else (g.links, g.count)
        row = node if layer == 0 else g.upper[node] + layer - 1
        kept = s.kept_count[layer]
        _lock(g, node)
        c = counts[row]  # others may have linked to this node meanwhile
        for j in range(kept):
            other, known = s.kept[layer, j], False
            for i in range(c):
                known = known or links[row, i] == other
            if not known and c < links.shape[1]:
                links[row, c] = other
                c += 1
                if layer == 0:
                    fetch_add(address(g.incoming) + 4 * np.int64(other), np.int32(1))
        store_release(address(counts) + 4 * np.int64(row), np.int32(c))
        _unlock(g, node)
        for j in range(kept):
            other = s.kept[layer, j]
            _link_back(g, metric, other, node, _distance(g, metric, other, query, norm), layer, s)
    if guarded:
        g.meta[ENTRY] = node
        g.meta[TOP] = level
        _unlock(g, gate)


@njit(nogil=True, cache=True)
def insert_many(g, metric, nodes, ticket, ef, s):
    """Insert ``nodes``, taking one after the other by the shared counter ``ticket`` (int32 [1])."""
    while True:
        i = fetch_add(address(ticket), np.int32(1))
        if i >= nodes.size:
            return
        insert(g, metric, nodes[i], ef, s)


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
        distance = _distance(g, metric, entry, query, norm)
        for layer in range(g.level[entry], 0, -1):
            entry, distance = descend(g, metric, query, norm, entry, distance, layer)
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
            d = _distance(g, metric, node, query, norm)
            if taken == k and not d < distances[i, k - 1]:
                continue
            at = min(taken, k - 1)
            taken = min(taken + 1, k)
            while at > 0 and distances[i, at - 1] > d:
                distances[i, at], nodes[i, at] = distances[i, at - 1], nodes[i, at - 1]
                at -= 1
            distances[i, at], nodes[i, at] = d, node


@njit(nogil=True, cache=True)
def reachable(g, n):
    """uint8 [n]: which nodes a walk along layer 0 from the entry point comes to (dead ones pass it on)."""
    seen = np.zeros(n, np.uint8)
    queue = np.empty(n, np.int32)
    if g.meta[ENTRY] < 0:
        return seen
    queue[0] = g.meta[ENTRY]
    seen[queue[0]] = 1
    head, tail = 0, 1
    while head < tail:
        node = queue[head]
        head += 1
        for j in range(g.count0[node]):
            other = g.links0[node, j]
            if not seen[other]:
                seen[other] = 1
                queue[tail] = other
                tail += 1
    return seen


@njit(nogil=True, cache=True)
def _add_link(g, host, node):
    _lock(g, host)
    c = g.count0[host]
    if c < g.links0.shape[1]:
        g.links0[host, c] = node
        fetch_add(address(g.incoming) + 4 * np.int64(node), np.int32(1))
        store_release(address(g.count0) + 4 * np.int64(host), np.int32(c + 1))
    _unlock(g, host)


@njit(nogil=True, cache=True)
def _replace_link(g, host, node):
    """Point to ``node`` instead of the farthest neighbour that others point to, too."""
    _lock(g, host)
    for j in range(g.count0[host] - 1, -1, -1):
        other = g.links0[host, j]
        if g.incoming[other] > 1 and other != g.meta[ENTRY]:
            fetch_add(address(g.incoming) + 4 * np.int64(other), np.int32(-1))
            fetch_add(address(g.incoming) + 4 * np.int64(node), np.int32(1))
            g.links0[host, j] = node
            break
    _unlock(g, host)


@njit(nogil=True, cache=True)
def connect_lost(g, metric, n, ef, s):
    """Link every live node that no walk reaches from the nearest reached node that can spare a link; how many
    there were.
    """
    seen = reachable(g, n)
    lost = 0
    for node in range(n):
        if seen[node] or g.level[node] == UNUSED or g.dead[node]:
            continue
        lost += 1
        at = row_address(g, node, s.query)
        norm = g.norms[node]
        entry = g.meta[ENTRY]
        distance = _distance(g, metric, entry, at, norm)
        found = search_layer(g, metric, at, norm, entry, distance, ef, 0, s)
        host = -1
        for j in range(found):
            if s.node[j] != node and g.count0[s.node[j]] < g.links0.shape[1]:
                host = s.node[j]
                break
        if host < 0:  # all around are full: the nearest of all that are reached and not full
            nearest = np.float32(np.inf)
            for other in range(n):
                if seen[other] and g.count0[other] < g.links0.shape[1]:
                    d = _distance(g, metric, other, at, norm)
                    if d < nearest:
                        host, nearest = other, d
        if host >= 0:
            _add_link(g, host, node)
        elif found and s.node[0] != node:
            _replace_link(g, s.node[0], node)
        seen[node] = 1
    return lost


@njit(nogil=True, cache=True)
def _bridge(g, metric, node, layer, distances, nodes, s):
    """Candidates for the list of ``node`` when its dead neighbours are gone: its live ones, and the live ones
    that a walk over dead nodes reaches; how many.
    """
    links, counts = (g.links0, g.count0) if layer == 0 else (g.links, g.count)
    most = nodes.size
    tag = s.tag[0] + np.uint32(1)
    if tag == 0:
        s.visited[:] = 0
        tag = np.uint32(1)
    s.tag[0] = tag
    s.visited[node] = tag
    queue = np.empty(most, np.int32)
    queue[0] = node
    head, tail, n = 0, 1, 0
    at = row_address(g, node, s.query)
    norm = g.norms[node]
    while head < tail:
        via = queue[head]
        head += 1
        row = via if layer == 0 else g.upper[via] + layer - 1
        for j in range(counts[row]):
            other = links[row, j]
            if s.visited[other] == tag:
                continue
            s.visited[other] = tag
            if g.dead[other]:
                if tail < most:
                    queue[tail] = other
                    tail += 1
            elif n < most:
                _insert_sorted(distances, nodes, n, _distance(g, metric, other, at, norm), other)
                n += 1
    return n


@njit(nogil=True, cache=True)
def bypass_dead(g, metric, n, s):
    """Re-choose the neighbours of every live node that points to dead ones, so that nothing points to them
    any more.
    """
    distances, nodes = np.empty(1024, np.float32), np.empty(1024, np.int32)
    for node in range(n):
        if g.level[node] == UNUSED or g.dead[node]:
            continue
        for layer in range(g.level[node] + 1):
            links, counts = (g.links0, g.count0) if layer == 0 else (g.links, g.count)
            row = node if layer == 0 else g.upper[node] + layer - 1
            touched = False
            for j in range(counts[row]):
                touched = touched or g.dead[links[row, j]] == 1
            if not touched:
                continue
            found = _bridge(g, metric, node, layer, distances, nodes, s)
            kept = _choose(g, metric, distances, nodes, found, links.shape[1], s.chosen, s.row)
            _lock(g, node)
            for j in range(kept):
                links[row, j] = s.chosen[j]
            store_release(address(counts) + 4 * np.int64(row), np.int32(kept))
            _unlock(g, node)


@njit(nogil=True, cache=True)
def count_incoming(g, n):
    """Recount ``incoming`` from the lists of layer 0."""
    g.incoming[:n] = 0
    for node in range(n):
        if g.level[node] != UNUSED:
            for j in range(g.count0[node]):
                g.incoming[g.links0[node, j]] += 1
