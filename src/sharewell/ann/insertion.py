"""Inserting into the layered proximity graph: the neighbour heuristic (algorithm 4) and insertion
(algorithm 1) of Malkov and Yashunin, arXiv 1603.09320.

Many threads may search while others insert: a node's list is changed only under its lock, entries first and
the count last, so a reader always sees a valid list.
"""

# The intrinsics are called by numba's typing pass, not as Python.
# pyright: reportCallIssue=false
from __future__ import annotations

import numpy as np
from numba import njit

from .graph import ENTRY, TOP
from .intrinsics import address, compare_and_swap, fetch_add, store_release, yield_core
from .searching import descend, distance_to, row_address, search_layer, sketch_query


@njit(nogil=True, cache=True)
def lock(g, node):
    at = address(g.locks) + 4 * np.int64(node)
    spins = 0
    while not compare_and_swap(at, np.int32(0), np.int32(1)):
        spins += 1
        if spins & 63 == 0:
            yield_core()


@njit(nogil=True, cache=True)
def unlock(g, node):
    store_release(address(g.locks) + 4 * np.int64(node), np.int32(0))


@njit(nogil=True, cache=True)
def insert_sorted(distances, nodes, n, distance, node):
    at = n
    while at > 0 and distances[at - 1] > distance:
        distances[at], nodes[at] = distances[at - 1], nodes[at - 1]
        at -= 1
    distances[at], nodes[at] = distance, node


@njit(nogil=True, cache=True)
def choose(g, metric, distances, nodes, n, most, out, room):
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
            if distance_to(g, metric, out[j], at, norm) < distances[i]:
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
    lock(g, node)
    c = counts[row]
    for j in range(c):
        if links[row, j] == new:
            unlock(g, node)
            return
    if c < most:
        links[row, c] = new
        store_release(address(counts) + 4 * np.int64(row), np.int32(c + 1))
        if layer == 0:
            fetch_add(incoming + 4 * np.int64(new), np.int32(1))
        unlock(g, node)
        return
    distances, nodes, chosen = s.list_distance, s.list_node, s.chosen
    distances[0], nodes[0] = distance, new
    at = row_address(g, node, s.row)
    norm = g.norms[node]
    for j in range(c):
        d = distance_to(g, metric, links[row, j], at, norm)
        insert_sorted(distances, nodes, j + 1, d, links[row, j])
    kept = choose(g, metric, distances, nodes, c + 1, most, chosen, s.row)
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
    unlock(g, node)


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
        lock(g, gate)
        guarded = level > g.meta[TOP]
        if not guarded:
            unlock(g, gate)
    entry = g.meta[ENTRY]
    if entry < 0:
        g.meta[ENTRY] = node
        g.meta[TOP] = level
        unlock(g, gate)
        return
    top = np.int64(g.level[entry])  # not meta[TOP]: the two cells change one after the other
    query = address(s.query)
    at = row_address(g, node, s.query)
    if g.vectors.itemsize == 4:
        query = at
    norm = g.norms[node]
    sketch_query(g, query, s)
    distance = distance_to(g, metric, entry, query, norm)
    for layer in range(top, level, -1):
        entry, distance = descend(g, metric, query, norm, entry, distance, layer, s)
    m = g.links.shape[1]
    for layer in range(min(level, top), -1, -1):
        n = search_layer(g, metric, query, norm, entry, distance, ef, layer, s)
        entry, distance = s.node[0], s.distance[0]
        for j in range(n):  # a dead node passes searches on, but is no neighbour for life
            if g.dead[s.node[j]] or s.node[j] == node:
                s.node[j] = -1
        s.kept_count[layer] = choose(g, metric, s.distance, s.node, n, m, s.kept[layer], s.row)
    for layer in range(min(level, top) + 1):
        links, counts = (g.links0, g.count0) if layer == 0 else (g.links, g.count)
        row = node if layer == 0 else g.upper[node] + layer - 1
        kept = s.kept_count[layer]
        lock(g, node)
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
        unlock(g, node)
        for j in range(kept):
            other = s.kept[layer, j]
            _link_back(g, metric, other, node, distance_to(g, metric, other, query, norm), layer, s)
    if guarded:
        g.meta[ENTRY] = node
        g.meta[TOP] = level
        unlock(g, gate)


@njit(nogil=True, cache=True)
def insert_many(g, metric, nodes, ticket, ef, s):
    """Insert ``nodes``, taking one after the other by the shared counter ``ticket`` (int32 [1])."""
    while True:
        i = fetch_add(address(ticket), np.int32(1))
        if i >= nodes.size:
            return
        insert(g, metric, nodes[i], ef, s)
