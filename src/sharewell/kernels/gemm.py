"""Products of a few to a few hundred activation rows with a packed matrix, one work item at a time."""

from __future__ import annotations

import numpy as np
from numba import njit

from .simd import Q4_RECORD, Q8_RECORD, tile_bf16, tile_f32, tile_q4, tile_q8

F32, BF16, Q8, Q4 = 0, 1, 2, 3
UNIT = 32  # output features of the smallest work item


@njit(nogil=True, cache=True)
def _rows_f32(blocks, w, x, ldx, rows, k, out, ldo):
    t = 0
    while t < rows:
        left, xt, ot = rows - t, x + t * ldx, out + t * ldo
        if left >= 6 and blocks == 4:
            tile_f32(4, 6, 1, 256, w, 64, xt, ldx, k, ot, ldo)
            t += 6
        elif left >= 4 and blocks == 4:
            tile_f32(4, 4, 1, 256, w, 64, xt, ldx, k, ot, ldo)
            t += 4
        elif left >= 2 and blocks == 4:
            tile_f32(4, 2, 1, 256, w, 64, xt, ldx, k, ot, ldo)
            t += 2
        elif blocks == 4:
            tile_f32(4, 1, 1, 256, w, 64, xt, ldx, k, ot, ldo)
            t += 1
        elif left >= 4:
            tile_f32(2, 4, 1, 256, w, 64, xt, ldx, k, ot, ldo)
            t += 4
        else:
            tile_f32(2, 1, 1, 256, w, 64, xt, ldx, k, ot, ldo)
            t += 1


@njit(nogil=True, cache=True)
def _rows_bf16(blocks, w, x, ldx, rows, k, out, ldo):
    t = 0
    while t < rows:
        left, xt, ot = rows - t, x + t * ldx, out + t * ldo
        if left >= 6 and blocks == 4:
            tile_bf16(4, 6, 1, 256, w, 64, xt, ldx, k, ot, ldo)
            t += 6
        elif left >= 4 and blocks == 4:
            tile_bf16(4, 4, 1, 256, w, 64, xt, ldx, k, ot, ldo)
            t += 4
        elif left >= 2 and blocks == 4:
            tile_bf16(4, 2, 1, 256, w, 64, xt, ldx, k, ot, ldo)
            t += 2
        elif blocks == 4:
            tile_bf16(4, 1, 1, 256, w, 64, xt, ldx, k, ot, ldo)
            t += 1
        elif left >= 4:
            tile_bf16(2, 4, 1, 256, w, 64, xt, ldx, k, ot, ldo)
            t += 4
        else:
            tile_bf16(2, 1, 1, 256, w, 64, xt, ldx, k, ot, ldo)
            t += 1


@njit(nogil=True, cache=True)
def _rows_q4(blocks, w, first, x, ldx, xs, ldxs, rows, k, out, ldo):
    t = 0
    while t < rows:
        left, xt, st, ot = rows - t, x + t * ldx, xs + t * ldxs, out + t * ldo
        if left >= 16:  # unpacking is paid once for all rows of a tile, so tall tiles
            for n in range(blocks):
                tile_q4(1, 16, w, first + n, xt, ldx, st, ldxs, k, ot + 64 * n, ldo)
            t += 16
        elif left >= 4 and blocks == 4:
            tile_q4(4, 4, w, first, xt, ldx, st, ldxs, k, ot, ldo)
            t += 4
        elif left >= 2 and blocks == 4:
            tile_q4(4, 2, w, first, xt, ldx, st, ldxs, k, ot, ldo)
            t += 2
        elif blocks == 4:
            tile_q4(4, 1, w, first, xt, ldx, st, ldxs, k, ot, ldo)
            t += 1
        elif left >= 4:
            tile_q4(2, 4, w, first, xt, ldx, st, ldxs, k, ot, ldo)
            t += 4
        else:
            tile_q4(2, 1, w, first, xt, ldx, st, ldxs, k, ot, ldo)
            t += 1


@njit(nogil=True, cache=True)
def _rows_q8(blocks, w, first, x, ldx, rows, k, out, ldo):
    t = 0
    while t < rows:
        left, xt, ot = rows - t, x + t * ldx, out + t * ldo
        if left >= 4 and blocks == 4:
            tile_q8(4, 4, w, first, xt, ldx, k, ot, ldo)
            t += 4
        elif left >= 2 and blocks == 4:
            tile_q8(4, 2, w, first, xt, ldx, k, ot, ldo)
            t += 2
        elif blocks == 4:
            tile_q8(4, 1, w, first, xt, ldx, k, ot, ldo)
            t += 1
        elif left >= 4:
            tile_q8(2, 4, w, first, xt, ldx, k, ot, ldo)
            t += 4
        else:
            tile_q8(2, 1, w, first, xt, ldx, k, ot, ldo)
            t += 1


@njit(nogil=True, cache=True)
def add_product(matrix, first, blocks, x, ldx, xs, ldxs, rows, out, ldo):
    """``out[t, :16 blocks] += x[t] @ W[16 first : 16 (first + blocks)].T`` for ``rows`` rows.

    ``matrix``: int64 [4] from :meth:`PackedMatrix.row`; ``blocks`` 2 or 4, within one panel of 64 features; ``x``
    float32 rows for a float32 matrix, else bfloat16; ``xs`` group sums of x (int4 only); addresses and row strides in
    bytes; ``out`` float32.
    """
    kind, w, k = matrix[0], matrix[1], matrix[3]
    panel, block = first // 4, first % 4
    if kind == F32:
        _rows_f32(blocks, w + panel * k * 256 + block * 64, x, ldx, rows, k, out, ldo)
    elif kind == BF16:
        _rows_bf16(blocks, w + panel * k * 128 + block * 64, x, ldx, rows, k, out, ldo)
    elif kind == Q8:
        _rows_q8(blocks, w + panel * (k // 32) * Q8_RECORD, block, x, ldx, rows, k, out, ldo)
    else:
        _rows_q4(blocks, w + panel * (k // 32) * Q4_RECORD, block, x, ldx, xs, ldxs, rows, k, out, ldo)


@njit(nogil=True, cache=True)
def work_item(index, units, threads):
    """Work item ``index`` over ``units`` units: (first unit, number), pairs first and singles last so that
    ``threads`` threads end together; number 0 when there is nothing left."""
    singles = units % 2 + (2 if units >= 4 and (units // 2) % threads else 0)
    pairs = (units - singles) // 2
    if index < pairs:
        return 2 * index, 2
    first = 2 * pairs + (index - pairs)
    return first, 1 if first < units else 0


@njit(nogil=True, cache=True)
def product(matrix, x, ldx, xs, ldxs, rows, out, ldo):
    """``out += x W.T`` whole, on the calling thread: the layer-wise decoder's product."""
    units = matrix[2] // UNIT
    index = np.int64(0)
    first, number = work_item(index, units, 1)
    while number:
        add_product(matrix, 2 * first, 2 * number, x, ldx, xs, ldxs, rows, out + first * UNIT * 4, ldo)
        index += 1
        first, number = work_item(index, units, 1)
