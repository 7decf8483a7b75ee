"""Lazy greedy placement as a compiled loop, over a flat list of resources or a tree of clusters.

Both give the same allocation, pair by pair: the tree only leaves out clusters whose bound cannot win.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from .lazy_heap import drop_top, lean, order_heap, sift_down
from .offers import Fan, Tree, best_known, grow, scan, search, update


class Crowd(NamedTuple):
    """Who is served: ``group`` [N], ``share`` [N] of served demand that a request adds to its group, ``size``
    [G] of the groups, and ``served`` [G], which placing uses up."""

    group: np.ndarray
    share: np.ndarray
    size: np.ndarray
    served: np.ndarray


class Rules(NamedTuple):
    """Weights of the objective and the price rule."""

    worst_energy: float
    w: np.ndarray
    w_fair: float
    eta: float
    target: float
    low: float
    high: float


class Layout(NamedTuple):
    """How the tree is (re)built; see :func:`offers.grow`. ``every``: placements between two times, 0 for no
    tree."""

    label: np.ndarray
    clusters: int
    scale: np.ndarray
    leaf_size: int
    every: int


@lean
def _key(i, u, crowd, w_fair, by_density, ask, left):
    """Gain of placing ``i``, per unit of what is left of each capacity when ``by_density``."""
    g = crowd.group[i]
    served = crowd.served[g]
    gain = u + w_fair * np.sqrt(crowd.size[g]) * (np.sqrt(served + crowd.share[i]) - np.sqrt(served))
    if not by_density:
        return gain
    weight = 0.0
    for d in range(len(left)):
        weight += ask[i, 7 + d] / left[d]
    return gain / max(weight, 1e-300)


@lean
def _price(j, offer, base, capacity, rules):
    load = 0.0
    for d in range(capacity.shape[1]):
        if capacity[j, d] > 0:
            load = max(load, 1.0 - offer[j, 6 + d] / capacity[j, d])
    return base[j] * min(max(1.0 + rules.eta * (load - rules.target), rules.low), rules.high)


@njit(cache=True, error_model="numpy")
def place(
    ask: np.ndarray,
    offer: np.ndarray,
    base: np.ndarray,
    capacity: np.ndarray,
    crowd: Crowd,
    rules: Rules,
    layout: Layout,
    tree: Tree,
    fan: Fan,
    survey_u: np.ndarray,
    survey_j: np.ndarray,
    surveyed: bool,
    by_density: bool,
    forced: np.ndarray,
):
    """Lazy greedy (Minoux). ``offer`` is used up, its prices are filled in; ``base`` [M]: the price level of
    each resource. ``forced``: those placed first, in this order.

    ``survey_u``, ``survey_j`` [N, K]: each request's best list, filled here when not yet ``surveyed``. As
    utilities only fall, the best of a list is the best of all while it is above what the last of the list was
    when it was made. A request whose list is used up first takes that last utility as its bound and is looked
    for again only when even that makes it the first in line. Returns (row of each request's resource or -1,
    payments, counters). Counters: pairs looked at, bounds looked at, searches, answers from a list.
    """
    n, m, dims = len(ask), len(offer), capacity.shape[1]
    keep, use_tree = survey_u.shape[1], layout.every > 0
    worst, w = rules.worst_energy, rules.w
    count = np.zeros(4, np.int64)
    version = np.zeros(m, np.int64)
    for j in range(m):
        offer[j, 5] = _price(j, offer, base, capacity, rules)
    if use_tree:
        grow(tree, fan, layout.label, layout.clusters, layout.scale, layout.leaf_size, offer)
    if not surveyed:
        count[2] += n
        for i in range(n):
            if use_tree:
                search(i, survey_u[i], survey_j[i], tree, fan, ask, offer, worst, w, count)
            else:
                scan(i, survey_u[i], survey_j[i], ask, offer, worst, w)
                count[0] += m
    list_u, list_j = survey_u.copy(), survey_j.copy()
    best_u, best_j, stamp = list_u[:, 0].copy(), list_j[:, 0].copy(), np.zeros(n, np.int64)
    assign, payment = np.full(n, -1, np.int64), np.zeros(n)
    total = np.zeros(dims)
    for j in range(m):
        for d in range(dims):
            total[d] += offer[j, 6 + d]
    left = np.maximum(total, 1e-12)
    keys, items, size = np.empty(n), np.empty(n, np.int64), 0
    done = np.zeros(n, np.bool_)
    k, since = 0, 0
    while True:
        if k < len(forced):
            i = forced[k]
            done[i] = True
        elif k == len(forced):
            for i in range(n):
                if not done[i] and best_j[i] >= 0:
                    keys[size] = _key(i, best_u[i], crowd, rules.w_fair, by_density, ask, left)
                    items[size] = i
                    size += 1
            order_heap(keys, items, size)
            k += 1
            continue
        else:
            if size == 0:
                break
            i = items[0]
        if best_j[i] >= 0 and stamp[i] != version[best_j[i]]:
            u, j = best_known(i, list_u[i], list_j[i], ask, offer, worst, w)
            bar = list_u[i, keep - 1]
            if list_j[i, keep - 1] >= 0 and u <= bar:
                if k > len(forced) and bar < best_u[i]:
                    best_u[i] = bar
                    keys[0] = _key(i, bar, crowd, rules.w_fair, by_density, ask, left)
                    sift_down(keys, items, size, 0)
                    if items[0] != i:
                        continue
                count[2] += 1
                if use_tree:
                    search(i, list_u[i], list_j[i], tree, fan, ask, offer, worst, w, count)
                else:
                    scan(i, list_u[i], list_j[i], ask, offer, worst, w)
                    count[0] += m
                u, j = list_u[i, 0], list_j[i, 0]
            else:
                count[3] += 1
            best_u[i], best_j[i] = u, j
            if j >= 0:
                stamp[i] = version[j]
        if k < len(forced):
            k += 1
            if best_j[i] < 0:
                continue
        else:
            if best_j[i] >= 0:
                key = _key(i, best_u[i], crowd, rules.w_fair, by_density, ask, left)
                if key < keys[0]:
                    keys[0] = key
                    sift_down(keys, items, size, 0)
                    if items[0] != i:
                        continue
            size = drop_top(keys, items, size)
            if best_j[i] < 0:
                continue
        # Accept.
        j = best_j[i]
        assign[i] = j
        payment[i] = offer[j, 5] * ask[i, 4]
        crowd.served[crowd.group[i]] += crowd.share[i]
        tight = False
        for d in range(dims):
            offer[j, 6 + d] -= ask[i, 7 + d]
            total[d] -= ask[i, 7 + d]
            tight = tight or total[d] < 0.95 * left[d]
        # Prices only rise within a round; so gains only fall, and old keys stay upper bounds.
        offer[j, 5] = max(offer[j, 5], _price(j, offer, base, capacity, rules))
        version[j] += 1
        since += 1
        if use_tree:
            if since == layout.every:
                since = 0
                grow(tree, fan, layout.label, layout.clusters, layout.scale, layout.leaf_size, offer)
            else:
                update(j, tree, fan, offer)
        if tight and by_density and k > len(forced):
            left = np.maximum(total, 1e-12)
            for at in range(size):
                r = items[at]
                keys[at] = _key(r, best_u[r], crowd, rules.w_fair, by_density, ask, left)
            order_heap(keys, items, size)
    return assign, payment, count
