"""A max-heap in two arrays for compiled loops: greater key first, then the lower item."""

from __future__ import annotations

from numba import njit

# For functions that allocate nothing: without numba's reference counts, which it makes for every array
# argument of every call and which took more time than the work.
lean = njit(cache=True, error_model="numpy", _nrt=False)  # pyright: ignore[reportCallIssue]


@lean
def _before(keys, items, a, b):
    return keys[a] > keys[b] or (keys[a] == keys[b] and items[a] < items[b])


@lean
def sift_up(keys, items, at):
    """Restore the order after the entry ``at`` was added or its key rose."""
    up = (at - 1) // 2
    while at > 0 and _before(keys, items, at, up):
        keys[at], keys[up] = keys[up], keys[at]
        items[at], items[up] = items[up], items[at]
        at = up
        up = (at - 1) // 2


@lean
def sift_down(keys, items, size, at):
    """Restore the order among the first ``size`` entries after the key of entry ``at`` fell."""
    while True:
        child = 2 * at + 1
        if child >= size:
            break
        if child + 1 < size and _before(keys, items, child + 1, child):
            child += 1
        if not _before(keys, items, child, at):
            break
        keys[at], keys[child] = keys[child], keys[at]
        items[at], items[child] = items[child], items[at]
        at = child


@lean
def order_heap(keys, items, size):
    """Make a heap of the first ``size`` entries."""
    for at in range(size // 2 - 1, -1, -1):
        sift_down(keys, items, size, at)


@lean
def drop_top(keys, items, size):
    """Remove the first entry; returns the new size."""
    size -= 1
    keys[0], items[0] = keys[size], items[size]
    sift_down(keys, items, size, 0)
    return size
