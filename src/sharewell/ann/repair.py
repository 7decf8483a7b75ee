"""Looking after the graph: what a walk reaches, linking what it does not, taking dead nodes out."""

# The intrinsics are called by numba's typing pass, not as Python.
# pyright: reportCallIssue=false
from __future__ import annotations

import numpy as np
from numba import njit

from .graph import ENTRY, UNUSED
from .insertion import choose, insert_sorted, lock, unlock
from .intrinsics import address, fetch_add, store_release
from .searching import distance_to, next_tag, row_address, search_layer, sketch_query


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
    lock(g, host)
    c = g.count0[host]
    if c < g.links0.shape[1]:
        g.links0[host, c] = node
        fetch_add(address(g.incoming) + 4 * np.int64(node), np.int32(1))
        store_release(address(g.count0) + 4 * np.int64(host), np.int32(c + 1))
    unlock(g, host)


@njit(nogil=True, cache=True)
def _replace_link(g, host, node):
    """Point to ``node`` instead of the farthest neighbour that others point to, too."""
    lock(g, host)
    for j in range(g.count0[host] - 1, -1, -1):
        other = g.links0[host, j]
        if g.incoming[other] > 1 and other != g.meta[ENTRY]:
            fetch_add(address(g.incoming) + 4 * np.int64(other), np.int32(-1))
            fetch_add(address(g.incoming) + 4 * np.int64(node), np.int32(1))
            g.links0[host, j] = node
            break
    unlock(g, host)


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
        sketch_query(g, at, s)
        distance = distance_to(g, metric, entry, at, norm)
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
                    d = distance_to(g, metric, other, at, norm)
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
    tag = next_tag(s)
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
                insert_sorted(distances, nodes, n, distance_to(g, metric, other, at, norm), other)
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
            kept = choose(g, metric, distances, nodes, found, links.shape[1], s.chosen, s.row)
            lock(g, node)
            for j in range(kept):
                links[row, j] = s.chosen[j]
            store_release(address(counts) + 4 * np.int64(row), np.int32(kept))
            unlock(g, node)


@njit(nogil=True, cache=True)
def count_incoming(g, n):
    """Recount ``incoming`` from the lists of layer 0."""
    g.incoming[:n] = 0
    for node in range(n):
        if g.level[node] != UNUSED:
            for j in range(g.count0[node]):
                g.incoming[g.links0[node, j]] += 1
