"""Lazy greedy placement as compiled loops, over a flat list of resources or a tree of clusters.

Both give the same allocation, pair by pair: the tree only leaves out clusters whose bound cannot win.
"""

from __future__ import annotations

import numpy as np
from numba import njit

# Bounds and utilities are sums in different order; a cluster is left out only when it is behind by more.
_SLACK = 1e-11


@njit(cache=True)
def _utility(payment, budget, fr, fa, lat, max_lat, rel, ava, energy, worst, w):
    reliability = (rel - fr) / max(1.0 - fr, 1e-9)
    availability = (ava - fa) / max(1.0 - fa, 1e-9)
    return (
        w[0] * (1.0 - payment / budget)
        + w[1] * (reliability + availability + (1.0 - lat / max_lat)) / 3.0
        + w[2] * (1.0 - energy / worst)
    )


@njit(cache=True)
def _collect(i, start, stop, top, at, req, demand, rloc, res, remaining, jloc, price, ids, worst, w):
    """Merge the feasible resources among rows [start, stop) into the best list of ``i`` (``top`` utilities
    descending, ``at`` rows or -1); ties to the lowest id."""
    dims, keep = demand.shape[1], len(top)
    for j in range(start, stop):
        if res[j, 0] < req[i, 1] or res[j, 1] < req[i, 2]:
            continue
        payment = price[j] * req[i, 4]
        if payment > req[i, 0]:
            continue
        fits = True
        for d in range(dims):
            if demand[i, d] > remaining[j, d]:
                fits = False
                break
        if not fits:
            continue
        dx, dy = jloc[j, 0] - rloc[i, 0], jloc[j, 1] - rloc[i, 1]
        lat = np.sqrt(dx * dx + dy * dy)
        if lat > req[i, 3]:
            continue
        u = _utility(
            payment,
            req[i, 0],
            req[i, 1],
            req[i, 2],
            lat,
            req[i, 3],
            res[j, 0],
            res[j, 1],
            res[j, 2],
            worst,
            w,
        )
        k = keep
        while k > 0 and (u > top[k - 1] or (u == top[k - 1] and at[k - 1] >= 0 and ids[j] < ids[at[k - 1]])):
            k -= 1
        if k < keep:
            for back in range(keep - 1, k, -1):
                top[back], at[back] = top[back - 1], at[back - 1]
            top[k], at[k] = u, j


@njit(cache=True)
def _bound(i, node, req, rloc, demand, box, room, coef, beta, gain_r, gain_a, t, lam, unit_e, base, w):
    """The utility that no member of ``node`` can exceed for ``i``; minus infinity when none can be feasible.

    ``box`` columns: lowest price, highest reliability and availability, lowest energy, x and y ranges, and
    for each direction the members' greatest weighted sum. A request's weights are ``lam`` times its direction
    ``t`` and a rest that is not negative; the rest is bounded attribute by attribute.
    """
    if box[node, 1] < req[i, 1] or box[node, 2] < req[i, 2] or box[node, 0] * req[i, 4] > req[i, 0]:
        return -np.inf
    for d in range(demand.shape[1]):
        if demand[i, d] > room[node, d]:
            return -np.inf
    x, y = rloc[i, 0], rloc[i, 1]
    dx = max(box[node, 4] - x, 0.0, x - box[node, 5])
    dy = max(box[node, 6] - y, 0.0, y - box[node, 7])
    lat = np.sqrt(dx * dx + dy * dy)
    if lat > req[i, 3]:
        return -np.inf
    return (
        base
        + lam * box[node, 8 + t]
        - (coef[i, 0] - lam * beta[t]) * box[node, 0]
        + (coef[i, 1] - lam * gain_r[t]) * box[node, 1]
        + (coef[i, 2] - lam * gain_a[t]) * box[node, 2]
        - (1.0 - lam) * unit_e * box[node, 3]
        - w[1] * lat / (3.0 * req[i, 3])
    )


@njit(cache=True)
def _sift_up(keys, items, at):
    """Max-heap by (key, lower item first)."""
    while at > 0:
        up = (at - 1) // 2
        if keys[at] > keys[up] or (keys[at] == keys[up] and items[at] < items[up]):
            keys[at], keys[up] = keys[up], keys[at]
            items[at], items[up] = items[up], items[at]
            at = up
        else:
            break


@njit(cache=True)
def _sift_down(keys, items, size, at):
    while True:
        child = 2 * at + 1
        if child >= size:
            break
        right = child + 1
        if right < size and (
            keys[right] > keys[child] or (keys[right] == keys[child] and items[right] < items[child])
        ):
            child = right
        if keys[child] > keys[at] or (keys[child] == keys[at] and items[child] < items[at]):
            keys[at], keys[child] = keys[child], keys[at]
            items[at], items[child] = items[child], items[at]
            at = child
        else:
            break


@njit(cache=True)
def _search(
    i,
    top,
    at,
    req,
    demand,
    rloc,
    res,
    remaining,
    jloc,
    price,
    ids,
    first,
    last,
    leaf,
    box,
    room,
    coef,
    beta,
    gain_r,
    gain_a,
    worst,
    w,
    keys,
    items,
    count,
    use_tree,
):
    """Fill the best list of ``i``: all resources, or the most promising cluster first until no bound reaches
    the last of the list."""
    count[2] += 1
    top[:] = -np.inf
    at[:] = -1
    if not use_tree:
        count[0] += len(price)
        _collect(i, 0, len(price), top, at, req, demand, rloc, res, remaining, jloc, price, ids, worst, w)
        return
    unit_e = w[2] / worst
    t, lam = 0, -1.0
    for d in range(len(beta)):
        share = 1.0
        if beta[d] > 0:
            share = min(share, coef[i, 0] / beta[d])
        if gain_r[d] > 0:
            share = min(share, coef[i, 1] / gain_r[d])
        if gain_a[d] > 0:
            share = min(share, coef[i, 2] / gain_a[d])
        if share > lam:
            t, lam = d, share
    base = w[0] + w[1] / 3.0 + w[2] - coef[i, 1] * req[i, 1] - coef[i, 2] * req[i, 2]
    keep = len(top)
    keys[0], items[0], size = np.inf, 0, 1
    while size > 0:
        key, node = keys[0], items[0]
        if key < top[keep - 1] - _SLACK:
            break
        size -= 1
        keys[0], items[0] = keys[size], items[size]
        _sift_down(keys, items, size, 0)
        if leaf[node]:
            count[0] += last[node] - first[node]
            _collect(
                i,
                first[node],
                last[node],
                top,
                at,
                req,
                demand,
                rloc,
                res,
                remaining,
                jloc,
                price,
                ids,
                worst,
                w,
            )
        else:
            count[1] += last[node] - first[node]
            for child in range(first[node], last[node]):
                bound = _bound(
                    i,
                    child,
                    req,
                    rloc,
                    demand,
                    box,
                    room,
                    coef,
                    beta,
                    gain_r,
                    gain_a,
                    t,
                    lam,
                    unit_e,
                    base,
                    w,
                )
                if bound >= top[keep - 1] - _SLACK and bound > -np.inf:
                    keys[size], items[size] = bound, child
                    size += 1
                    _sift_up(keys, items, size - 1)


@njit(cache=True)
def _refresh_one(node, first, last, leaf, price, remaining, box, room, still, beta):
    """What changes with load in one cluster: lowest price, largest room, greatest weighted sums."""
    low, dims, directions = np.inf, room.shape[1], len(beta)
    for d in range(dims):
        room[node, d] = 0.0
    for t in range(directions):
        box[node, 8 + t] = -np.inf
    for k in range(first[node], last[node]):
        if leaf[node]:
            low = min(low, price[k])
            for d in range(dims):
                room[node, d] = max(room[node, d], remaining[k, d])
            for t in range(directions):
                box[node, 8 + t] = max(box[node, 8 + t], still[k, t] - beta[t] * price[k])
        else:
            low = min(low, box[k, 0])
            for d in range(dims):
                room[node, d] = max(room[node, d], room[k, d])
            for t in range(directions):
                box[node, 8 + t] = max(box[node, 8 + t], box[k, 8 + t])
    box[node, 0] = low


@njit(cache=True)
def _key(i, u, group, group_size, share, served, w_fair, by_density, demand, total):
    """Gain of placing ``i``, per unit of what is left of each capacity when ``by_density``."""
    g = group[i]
    gain = u + w_fair * np.sqrt(group_size[g]) * (np.sqrt(served[g] + share[i]) - np.sqrt(served[g]))
    if not by_density:
        return gain
    weight = 0.0
    for d in range(demand.shape[1]):
        weight += demand[i, d] / total[d]
    return gain / max(weight, 1e-300)


@njit(cache=True)
def place(
    req,
    demand,
    rloc,
    group,
    group_size,
    share,
    served,
    res,
    remaining,
    jloc,
    base,
    capacity,
    ids,
    first,
    last,
    leaf,
    parent,
    home,
    box,
    room,
    still,
    coef,
    beta,
    gain_r,
    gain_a,
    survey_u,
    survey_j,
    surveyed,
    use_tree,
    by_density,
    forced,
    worst,
    w,
    w_fair,
    eta,
    target,
    low,
    high,
):
    """Lazy greedy (Minoux). ``req`` columns: budget, floors of reliability and availability, latency, size.

    ``remaining`` and ``served`` are used up; ``base`` is the price level of each resource. ``forced``: those
    placed first, in this order. ``survey_u``, ``survey_j`` [N, K]: each request's best list, filled here when
    not yet ``surveyed``. As utilities only fall, the best of a list is the best of all while it is above what
    the last of the list was when it was made. Returns (row of each request's resource or -1, payments,
    prices, counters). Counters: pairs looked at, bounds looked at, searches, answers from a list.
    """
    n, dims, m = demand.shape[0], demand.shape[1], res.shape[0]
    nodes, keep = len(first), survey_u.shape[1]
    price = np.empty(m)
    version = np.zeros(m, np.int64)
    for j in range(m):
        load = 0.0
        for d in range(dims):
            if capacity[j, d] > 0:
                load = max(load, 1.0 - remaining[j, d] / capacity[j, d])
        price[j] = base[j] * min(max(1.0 + eta * (load - target), low), high)
    if use_tree:
        for node in range(nodes - 1, -1, -1):  # children come after their parents
            _refresh_one(node, first, last, leaf, price, remaining, box, room, still, beta)
    assign = np.full(n, -1, np.int64)
    payment = np.zeros(n)
    count = np.zeros(4, np.int64)
    keys, items = np.empty(nodes + 1), np.empty(nodes + 1, np.int64)
    if not surveyed:
        for i in range(n):
            _search(
                i,
                survey_u[i],
                survey_j[i],
                req,
                demand,
                rloc,
                res,
                remaining,
                jloc,
                price,
                ids,
                first,
                last,
                leaf,
                box,
                room,
                coef,
                beta,
                gain_r,
                gain_a,
                worst,
                w,
                keys,
                items,
                count,
                use_tree,
            )
    list_u, list_j = survey_u.copy(), survey_j.copy()
    best_u, best_j, stamp = list_u[:, 0].copy(), list_j[:, 0].copy(), np.zeros(n, np.int64)
    one_u, one_j = np.empty(1), np.empty(1, np.int64)
    total = np.zeros(dims)
    for j in range(m):
        for d in range(dims):
            total[d] += remaining[j, d]
    frozen = np.maximum(total, 1e-12)
    heap_keys, heap_items, size = np.empty(n), np.empty(n, np.int64), 0
    done = np.zeros(n, np.bool_)
    k = 0
    while True:
        if k < len(forced):
            i = forced[k]
            done[i] = True
        elif k == len(forced):
            for i in range(n):
                if not done[i] and best_j[i] >= 0:
                    heap_keys[size] = _key(
                        i, best_u[i], group, group_size, share, served, w_fair, by_density, demand, frozen
                    )
                    heap_items[size] = i
                    size += 1
            for at in range(size // 2 - 1, -1, -1):
                _sift_down(heap_keys, heap_items, size, at)
            k += 1
            continue
        else:
            if size == 0:
                break
            i = heap_items[0]
        if best_j[i] >= 0 and stamp[i] != version[best_j[i]]:
            one_u[0], one_j[0] = -np.inf, -1
            for c in range(keep):
                j = list_j[i, c]
                if j >= 0:
                    _collect(
                        i,
                        j,
                        j + 1,
                        one_u,
                        one_j,
                        req,
                        demand,
                        rloc,
                        res,
                        remaining,
                        jloc,
                        price,
                        ids,
                        worst,
                        w,
                    )
            full_list = list_j[i, keep - 1] >= 0
            if full_list and one_u[0] <= list_u[i, keep - 1]:
                _search(
                    i,
                    list_u[i],
                    list_j[i],
                    req,
                    demand,
                    rloc,
                    res,
                    remaining,
                    jloc,
                    price,
                    ids,
                    first,
                    last,
                    leaf,
                    box,
                    room,
                    coef,
                    beta,
                    gain_r,
                    gain_a,
                    worst,
                    w,
                    keys,
                    items,
                    count,
                    use_tree,
                )
                one_u[0], one_j[0] = list_u[i, 0], list_j[i, 0]
            else:
                count[3] += 1
            best_u[i], best_j[i] = one_u[0], one_j[0]
            if best_j[i] >= 0:
                stamp[i] = version[best_j[i]]
        if k < len(forced):
            k += 1
            if best_j[i] < 0:
                continue
        else:
            key = -np.inf
            if best_j[i] >= 0:
                key = _key(i, best_u[i], group, group_size, share, served, w_fair, by_density, demand, frozen)
                if key < heap_keys[0]:
                    heap_keys[0] = key
                    _sift_down(heap_keys, heap_items, size, 0)
                    if heap_items[0] != i:
                        continue
            size -= 1
            heap_keys[0], heap_items[0] = heap_keys[size], heap_items[size]
            _sift_down(heap_keys, heap_items, size, 0)
            if best_j[i] < 0:
                continue
        # Accept.
        j = best_j[i]
        assign[i] = j
        payment[i] = price[j] * req[i, 4]
        served[group[i]] += share[i]
        load, tight = 0.0, False
        for d in range(dims):
            remaining[j, d] -= demand[i, d]
            total[d] -= demand[i, d]
            if capacity[j, d] > 0:
                load = max(load, 1.0 - remaining[j, d] / capacity[j, d])
            if total[d] < 0.95 * frozen[d]:
                tight = True
        # Prices only rise within a round; so gains only fall, and old keys stay upper bounds.
        price[j] = max(price[j], base[j] * min(max(1.0 + eta * (load - target), low), high))
        version[j] += 1
        if use_tree:
            node = home[j]
            while node >= 0:
                _refresh_one(node, first, last, leaf, price, remaining, box, room, still, beta)
                node = parent[node]
        if tight and by_density and k > len(forced):
            for d in range(dims):
                frozen[d] = max(total[d], 1e-12)
            for at in range(size):
                r = heap_items[at]
                heap_keys[at] = _key(
                    r, best_u[r], group, group_size, share, served, w_fair, by_density, demand, frozen
                )
            for at in range(size // 2 - 1, -1, -1):
                _sift_down(heap_keys, heap_items, size, at)
    return assign, payment, price, count


@njit(cache=True)
def best_reduced(req, demand, rloc, res, capacity, jloc, price, duals, worst, w, keep):
    """For the LP bound: of each request the ``keep`` resources of greatest u - dual price of its demand.

    Returns (rows [N, keep] or -1, reduced values [N, keep], utilities [N, keep]).
    """
    n, m, dims = demand.shape[0], res.shape[0], demand.shape[1]
    rows, value, utility = np.full((n, keep), -1, np.int64), np.full((n, keep), -np.inf), np.zeros((n, keep))
    for i in range(n):
        for j in range(m):
            if res[j, 0] < req[i, 1] or res[j, 1] < req[i, 2]:
                continue
            payment = price[j] * req[i, 4]
            if payment > req[i, 0]:
                continue
            fits, toll = True, 0.0
            for d in range(dims):
                if demand[i, d] > capacity[j, d]:
                    fits = False
                    break
                toll += duals[j, d] * demand[i, d]
            if not fits:
                continue
            dx, dy = jloc[j, 0] - rloc[i, 0], jloc[j, 1] - rloc[i, 1]
            lat = np.sqrt(dx * dx + dy * dy)
            if lat > req[i, 3]:
                continue
            u = _utility(
                payment,
                req[i, 0],
                req[i, 1],
                req[i, 2],
                lat,
                req[i, 3],
                res[j, 0],
                res[j, 1],
                res[j, 2],
                worst,
                w,
            )
            net = u - toll
            if net <= value[i, keep - 1]:
                continue
            at = keep - 1
            while at > 0 and net > value[i, at - 1]:
                value[i, at], rows[i, at], utility[i, at] = (
                    value[i, at - 1],
                    rows[i, at - 1],
                    utility[i, at - 1],
                )
                at -= 1
            value[i, at], rows[i, at], utility[i, at] = net, j, u
    return rows, value, utility
