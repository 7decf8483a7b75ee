"""Low-rank updates of a product for runs of rows that share an adapter (arXiv 2106.09685)."""

from __future__ import annotations

import numpy as np

from .compile import compiled
from .gemm import add_product
from .team import UNIT, complete, finish, take
from .vectors import address


@compiled()
def lora_down(lora, segments, source, stride, u, sync, phase):
    """u = x A.T for every run of rows, each an item of ``phase``; the number of the next phase.

    ``lora``: int64 ``[slots, 6]``: addresses of A and B (0 for none), columns of B, rows of A, columns of A,
    address of the product for both. ``segments``: int64 ``[runs, 3]`` (first row, rows, slot).
    """
    matrix = np.zeros(5, np.int64)
    while True:
        s = take(sync, phase)
        if s >= segments.shape[0]:
            break
        start, count, slot = segments[s, 0], segments[s, 1], segments[s, 2]
        if lora[slot, 0] != 0:
            width = lora[slot, 3]
            matrix[1], matrix[2], matrix[3], matrix[4] = lora[slot, 0], width, lora[slot, 4], lora[slot, 5]
            u[start : start + count, :width] = 0
            for unit in range(width // UNIT):
                out = address(u) + start * u.strides[0] + unit * UNIT * 4
                add_product(matrix, 2 * unit, 2, source + start * stride, stride, count, out, u.strides[0])
        finish(sync, phase)
    return complete(sync, phase, segments.shape[0])


@compiled()
def lora_up(lora, segments, first, blocks, u, out, ldo):
    """out += u B.T over features 16 ``first`` .. for every run of rows."""
    matrix = np.zeros(5, np.int64)
    stride = u.strides[0]
    for s in range(segments.shape[0]):
        start, count, slot = segments[s, 0], segments[s, 1], segments[s, 2]
        if lora[slot, 0] == 0:
            continue
        matrix[1], matrix[3], matrix[4] = lora[slot, 1], lora[slot, 2], lora[slot, 5]
        add_product(matrix, first, blocks, address(u) + start * stride, stride, count, out + start * ldo, ldo)
