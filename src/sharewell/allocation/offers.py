"""Which resource is best for a request: by looking at all, or through a tree of clusters with bounds.

Rows of ``ask`` [N, 7 + D]: budget, floors of reliability and availability, greatest latency, size, x, y, then
the demand of each kind. Rows of ``offer`` [M, 6 + D]: reliability, availability, energy, x, y, price a unit,
then what is left of each capacity.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from .lazy_heap import drop_top, lean, sift_up

# Bounds and utilities are sums in different order; a cluster is left out only when it is behind by more.
_SLACK = 1e-11


class Tree(NamedTuple):
    """Clusters of resources. Children of node v, or the entries of ``member`` of a leaf, are ``first[v]`` up
    to ``last[v]``; children come after their parent, the root is 0, its children are the given clusters.

    ``box`` [nodes, 8 + T]: lowest price, highest reliability and availability, lowest energy, x and y ranges,
    and for each of T directions the greatest weighted sum of a member. ``room`` [nodes, D]: the most that any
    member has left. ``keys``, ``items``: scratch of a search. ``size`` [1]: nodes in use.
    """

    first: np.ndarray
    last: np.ndarray
    leaf: np.ndarray
    parent: np.ndarray
    home: np.ndarray
    member: np.ndarray
    box: np.ndarray
    room: np.ndarray
    keys: np.ndarray
    items: np.ndarray
    size: np.ndarray


class Fan(NamedTuple):
    """T sampled directions of the requests' weights, for which nodes know their members' greatest sum.

    ``fixed`` [M, T]: the part of that sum that prices do not change; ``price``, ``reliability``,
    ``availability`` [T]: the weights; ``coef`` [N, 3]: those of every request; ``near``, ``share`` [N]: each
    request's weights are ``share`` times those of direction ``near`` and a rest that is not negative.
    """

    fixed: np.ndarray
    price: np.ndarray
    reliability: np.ndarray
    availability: np.ndarray
    coef: np.ndarray
    near: np.ndarray
    share: np.ndarray


@lean
def latency_if_fits(i, j, ask, offer):
    """Latency of the pair in ms, or -1 when a floor, the budget or a capacity forbids it."""
    latency = -1.0
    fits = offer[j, 0] >= ask[i, 1] and offer[j, 1] >= ask[i, 2] and offer[j, 5] * ask[i, 4] <= ask[i, 0]
    if fits:
        for d in range(ask.shape[1] - 7):
            fits = fits and ask[i, 7 + d] <= offer[j, 6 + d]
    if fits:
        dx, dy = offer[j, 3] - ask[i, 5], offer[j, 4] - ask[i, 6]
        away = np.sqrt(dx * dx + dy * dy)
        if away <= ask[i, 3]:
            latency = away
    return latency


@lean
def utility(i, j, latency, ask, offer, worst, w):
    """u of a pair that fits, at the price of now."""
    reliability = (offer[j, 0] - ask[i, 1]) / max(1.0 - ask[i, 1], 1e-9)
    availability = (offer[j, 1] - ask[i, 2]) / max(1.0 - ask[i, 2], 1e-9)
    return (
        w[0] * (1.0 - offer[j, 5] * ask[i, 4] / ask[i, 0])
        + w[1] * (reliability + availability + (1.0 - latency / ask[i, 3])) / 3.0
        + w[2] * (1.0 - offer[j, 2] / worst)
    )


@lean
def _keep(top, at, u, j):
    """Put (u, j) into the list ``top`` (descending), ``at``; ties to the lowest j."""
    keep = len(top)
    k = keep
    while k > 0 and (u > top[k - 1] or (u == top[k - 1] and j < at[k - 1])):
        k -= 1
    if k < keep:
        for back in range(keep - 1, k, -1):
            top[back], at[back] = top[back - 1], at[back - 1]
        top[k], at[k] = u, j


@lean
def scan(i, top, at, ask, offer, worst, w):
    """The best list of ``i`` by looking at every resource."""
    top[:] = -np.inf
    at[:] = -1
    for j in range(len(offer)):
        latency = latency_if_fits(i, j, ask, offer)
        if latency >= 0.0:
            _keep(top, at, utility(i, j, latency, ask, offer, worst, w), j)


@lean
def best_known(i, known_u, known_j, ask, offer, worst, w):
    """(utility, row) of the best of a list made earlier, or (-inf, -1). Utilities only fall: the search ends
    where the old ones do not reach the best found."""
    best_u, best_j = -np.inf, -1
    for c in range(len(known_j)):
        j = known_j[c]
        if j < 0 or known_u[c] < best_u:
            break
        latency = latency_if_fits(i, j, ask, offer)
        if latency >= 0.0:
            u = utility(i, j, latency, ask, offer, worst, w)
            if u > best_u or (u == best_u and j < best_j):
                best_u, best_j = u, j
    return best_u, best_j


@lean
def enclose(node, tree, fan, offer, everything):
    """Make the bounds of a node those of its members or children; only what changes with load unless
    ``everything``. Returns whether anything changed."""
    box, room, member, fixed, weight = tree.box, tree.room, tree.member, fan.fixed, fan.price
    start, stop, leaf = tree.first[node], tree.last[node], tree.leaf[node]
    dims, directions = room.shape[1], len(weight)
    low, changed = np.inf, False
    for k in range(start, stop):
        low = min(low, offer[member[k], 5] if leaf else box[k, 0])
    if low != box[node, 0]:
        box[node, 0], changed = low, True
    for d in range(dims):
        most = 0.0
        for k in range(start, stop):
            most = max(most, offer[member[k], 6 + d] if leaf else room[k, d])
        if most != room[node, d]:
            room[node, d], changed = most, True
    for t in range(directions):
        most = -np.inf
        for k in range(start, stop):
            if leaf:
                j = member[k]
                most = max(most, fixed[j, t] - weight[t] * offer[j, 5])
            else:
                most = max(most, box[k, 8 + t])
        if most != box[node, 8 + t]:
            box[node, 8 + t], changed = most, True
    if everything:
        box[node, 1:3], box[node, 3] = -np.inf, np.inf
        box[node, 4], box[node, 5], box[node, 6], box[node, 7] = np.inf, -np.inf, np.inf, -np.inf
        for k in range(start, stop):
            j = member[k] if leaf else 0
            for c in range(2):
                box[node, 1 + c] = max(box[node, 1 + c], offer[j, c] if leaf else box[k, 1 + c])
                low, high = 4 + 2 * c, 5 + 2 * c
                box[node, low] = min(box[node, low], offer[j, 3 + c] if leaf else box[k, low])
                box[node, high] = max(box[node, high], offer[j, 3 + c] if leaf else box[k, high])
            box[node, 3] = min(box[node, 3], offer[j, 2] if leaf else box[k, 3])
    return changed


@njit(cache=True, error_model="numpy")
def grow(tree, fan, label, clusters, scale, leaf_size, offer):
    """(Re)build the tree: the ``clusters`` that ``label`` [M] names, each cut at the median of the column of
    ``offer`` with the greatest variance times ``scale``² until at most ``leaf_size`` members are left.

    Doing it again while capacity falls keeps what is full apart from what is free.
    """
    first, last, leaf, member = tree.first, tree.last, tree.leaf, tree.member
    count = np.zeros(clusters + 1, np.int64)
    for j in range(len(label)):
        count[label[j] + 1] += 1
    for c in range(clusters):
        count[c + 1] += count[c]
        first[1 + c], last[1 + c], tree.parent[1 + c] = count[c], count[c + 1], 0
    for j in range(len(label)):
        member[count[label[j]]] = j
        count[label[j]] += 1
    first[0], last[0], leaf[0], tree.parent[0] = 1, 1 + clusters, False, -1
    nodes, node = 1 + clusters, 1
    while node < nodes:
        start, stop = first[node], last[node]
        if stop - start <= leaf_size:
            leaf[node] = True
            for k in range(start, stop):
                tree.home[member[k]] = node
        else:
            widest, most = 0, -1.0
            for f in range(offer.shape[1]):
                total, squares = 0.0, 0.0
                for k in range(start, stop):
                    x = offer[member[k], f] * scale[f]
                    total += x
                    squares += x * x
                spread = squares - total * total / (stop - start)
                if spread > most:
                    widest, most = f, spread
            own = member[start:stop].copy()
            values = np.empty(stop - start)
            for k in range(stop - start):
                values[k] = offer[own[k], widest]
            member[start:stop] = own[np.argsort(values)]
            half = (start + stop) // 2
            leaf[node], first[node], last[node] = False, nodes, nodes + 2
            first[nodes], last[nodes], first[nodes + 1], last[nodes + 1] = start, half, half, stop
            tree.parent[nodes], tree.parent[nodes + 1] = node, node
            nodes += 2
        node += 1
    tree.size[0] = nodes
    for node in range(nodes - 1, 0, -1):
        enclose(node, tree, fan, offer, True)


@lean
def update(j, tree, fan, offer):
    """Resource ``j`` was loaded: carry that up to the clusters. The root has no bound."""
    node = tree.home[j]
    while node > 0 and enclose(node, tree, fan, offer, False):
        node = tree.parent[node]


@lean
def _bound(i, node, ask, box, room, t, share, base, price, reliability, availability, energy, latency_cost):
    """What the utility of no member exceeds; -inf when none can fit.

    The part of the weights along the nearest direction is bounded by the members' greatest sum, the rest
    attribute by attribute: ``price`` and so on are what the rest weighs.
    """
    bound = -np.inf
    fits = box[node, 1] >= ask[i, 1] and box[node, 2] >= ask[i, 2] and box[node, 0] * ask[i, 4] <= ask[i, 0]
    if fits:
        for d in range(room.shape[1]):
            fits = fits and ask[i, 7 + d] <= room[node, d]
    if fits:
        x, y = ask[i, 5], ask[i, 6]
        dx = max(box[node, 4] - x, 0.0, x - box[node, 5])
        dy = max(box[node, 6] - y, 0.0, y - box[node, 7])
        latency = np.sqrt(dx * dx + dy * dy)
        if latency <= ask[i, 3]:
            bound = (
                base
                + share * box[node, 8 + t]
                - price * box[node, 0]
                + reliability * box[node, 1]
                + availability * box[node, 2]
                - energy * box[node, 3]
                - latency_cost * latency
            )
    return bound


@lean
def search(i, top, at, tree, fan, ask, offer, worst, w, count):
    """The best list of ``i``, the most promising cluster first, until no bound reaches the last of the list:
    what :func:`scan` gives. Adds pairs and bounds looked at to ``count``."""
    top[:] = -np.inf
    at[:] = -1
    first, last, leaf, member = tree.first, tree.last, tree.leaf, tree.member
    box, room, keys, items, keep = tree.box, tree.room, tree.keys, tree.items, len(top)
    t, share = fan.near[i], fan.share[i]
    on_price, on_reliability, on_availability = fan.coef[i, 0], fan.coef[i, 1], fan.coef[i, 2]
    base = w[0] + w[1] / 3.0 + w[2] - on_reliability * ask[i, 1] - on_availability * ask[i, 2]
    on_price -= share * fan.price[t]
    on_reliability -= share * fan.reliability[t]
    on_availability -= share * fan.availability[t]
    on_energy, on_latency = (1.0 - share) * w[2] / worst, w[1] / (3.0 * ask[i, 3])
    # Clusters wait in a heap. Inside one the better half is looked at first and the other waits on a stack,
    # behind the heap's entries: for pairs a heap costs more than the few nodes that it saves.
    size, bottom = 0, last[0]
    node, stack = 0, bottom
    while True:
        if leaf[node]:
            count[0] += last[node] - first[node]
            for k in range(first[node], last[node]):
                j = member[k]
                latency = latency_if_fits(i, j, ask, offer)
                if latency >= 0.0:
                    _keep(top, at, utility(i, j, latency, ask, offer, worst, w), j)
        else:
            count[1] += last[node] - first[node]
            for child in range(first[node], last[node]):
                bound = _bound(
                    i, child, ask, box, room, t, share, base, on_price, on_reliability, on_availability,
                    on_energy, on_latency,
                )  # fmt: skip
                if bound < top[keep - 1] - _SLACK or bound == -np.inf:
                    continue
                if node == 0:
                    keys[size], items[size] = bound, child
                    sift_up(keys, items, size)
                    size += 1
                else:
                    keys[stack], items[stack] = bound, child
                    if child > first[node] and stack > bottom and keys[stack - 1] > bound:
                        if items[stack - 1] == child - 1:
                            keys[stack], items[stack] = keys[stack - 1], items[stack - 1]
                            keys[stack - 1], items[stack - 1] = bound, child
                    stack += 1
        low = top[keep - 1] - _SLACK
        while stack > bottom and keys[stack - 1] < low:
            stack -= 1
        if stack > bottom:
            stack -= 1
            node = items[stack]
        elif size > 0 and keys[0] >= low:
            node = items[0]
            size = drop_top(keys, items, size)
        else:
            break


@njit(cache=True, error_model="numpy")
def best_reduced(ask, offer, duals, worst, w, keep):
    """For the LP bound: of each request the ``keep`` resources of greatest u - dual price of its demand.

    Returns (rows [N, keep] or -1, reduced values [N, keep], utilities [N, keep]).
    """
    n, dims = len(ask), ask.shape[1] - 7
    rows, value, own = np.full((n, keep), -1, np.int64), np.full((n, keep), -np.inf), np.zeros((n, keep))
    for i in range(n):
        for j in range(len(offer)):
            latency = latency_if_fits(i, j, ask, offer)
            if latency < 0.0:
                continue
            net = utility(i, j, latency, ask, offer, worst, w)
            for d in range(dims):
                net -= duals[j, d] * ask[i, 7 + d]
            if net > value[i, keep - 1]:
                _keep(value[i], rows[i], net, j)
        for k in range(keep):
            j = rows[i, k]
            if j >= 0:
                own[i, k] = utility(i, j, latency_if_fits(i, j, ask, offer), ask, offer, worst, w)
    return rows, value, own
