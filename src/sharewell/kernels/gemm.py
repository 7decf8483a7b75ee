"""Products of a few to a few hundred activation rows with a packed matrix, one work item at a time."""

from __future__ import annotations

import numpy as np

from .compile import compiled, entry, invoke
from .simd import Q4_RECORD, Q8_RECORD, tile_bf16, tile_f32, tile_q4, tile_q8
from .team import UNIT, work_item
from .vectors import load_bf16, load_f16, load_f32, load_u8

F32, BF16, Q8, Q4 = 0, 1, 2, 3  # as FORMATS of packing


@entry
def _rows_f32(w, first, blocks, x, ldx, rows, k, out, ldo):
    w += first // 4 * k * 256 + first % 4 * 64
    t = 0
    while t < rows:
        left, xt, ot = rows - t, x + t * ldx, out + t * ldo
        if blocks == 4 and left >= 6:
            tile_f32(4, 6, 1, 256, 1, w, 64, xt, ldx, k, ot, ldo)
            t += 6
        elif blocks == 4 and left >= 2:
            tile_f32(4, 2, 1, 256, 1, w, 64, xt, ldx, k, ot, ldo)
            t += 2
        elif blocks == 4:
            tile_f32(4, 1, 1, 256, 1, w, 64, xt, ldx, k, ot, ldo)
            t += 1
        elif left >= 4:
            tile_f32(2, 4, 1, 256, 1, w, 64, xt, ldx, k, ot, ldo)
            t += 4
        else:
            tile_f32(2, 1, 1, 256, 1, w, 64, xt, ldx, k, ot, ldo)
            t += 1


@entry
def _rows_bf16(w, first, blocks, x, ldx, rows, k, out, ldo):
    w += first // 4 * k * 128 + first % 4 * 64
    t = 0
    while t < rows:
        left, xt, ot = rows - t, x + t * ldx, out + t * ldo
        if left >= 12:  # widening is paid once for all rows of a tile, so tall tiles
            for n in range(0, blocks, 2):
                tile_bf16(2, 12, 1, 256, 1, 0, w + 64 * n, 64, xt, ldx, k, ot + 64 * n, ldo)
            t += 12
        elif blocks == 4 and left >= 4:
            tile_bf16(4, 4, 1, 256, 1, 0, w, 64, xt, ldx, k, ot, ldo)
            t += 4
        elif blocks == 4 and left >= 2:
            tile_bf16(4, 2, 1, 256, 1, 0, w, 64, xt, ldx, k, ot, ldo)
            t += 2
        elif blocks == 4:
            tile_bf16(4, 1, 1, 256, 1, 0, w, 64, xt, ldx, k, ot, ldo)
            t += 1
        elif left >= 4:
            tile_bf16(2, 4, 1, 256, 1, 0, w, 64, xt, ldx, k, ot, ldo)
            t += 4
        else:
            tile_bf16(2, 1, 1, 256, 1, 0, w, 64, xt, ldx, k, ot, ldo)
            t += 1


@entry
def _rows_q4(w, first, blocks, x, ldx, rows, k, out, ldo):
    w += first // 4 * (k // 32) * Q4_RECORD
    first %= 4
    t = 0
    while t < rows:
        left, xt, ot = rows - t, x + t * ldx, out + t * ldo
        if left >= 6:
            for n in range(0, blocks, 2):
                tile_q4(2, 6, w, first + n, xt, ldx, k, ot + 64 * n, ldo)
            t += 6
        elif blocks == 4 and left >= 2:
            tile_q4(4, 2, w, first, xt, ldx, k, ot, ldo)
            t += 2
        elif blocks == 4:
            tile_q4(4, 1, w, first, xt, ldx, k, ot, ldo)
            t += 1
        else:
            tile_q4(2, 1, w, first, xt, ldx, k, ot, ldo)
            t += 1


@entry
def _rows_q8(w, first, blocks, x, ldx, rows, k, out, ldo):
    w += first // 4 * (k // 32) * Q8_RECORD
    first %= 4
    t = 0
    while t < rows:
        left, xt, ot = rows - t, x + t * ldx, out + t * ldo
        if left >= 6:
            for n in range(0, blocks, 2):
                tile_q8(2, 6, w, first + n, xt, ldx, k, ot + 64 * n, ldo)
            t += 6
        elif blocks == 4 and left >= 2:
            tile_q8(4, 2, w, first, xt, ldx, k, ot, ldo)
            t += 2
        elif blocks == 4:
            tile_q8(4, 1, w, first, xt, ldx, k, ot, ldo)
            t += 1
        else:
            tile_q8(2, 1, w, first, xt, ldx, k, ot, ldo)
            t += 1


@compiled()
def add_product(matrix, first, blocks, x, ldx, rows, out, ldo):
    """``out[t, :16 blocks] += x[t] @ W[16 first : 16 (first + blocks)].T`` for ``rows`` rows.

    ``matrix``: int64 [5] from :meth:`PackedMatrix.row`; ``blocks`` 2 or 4, within one panel of 64 features;
    ``x`` float32 rows for a float matrix, rows of :func:`~sharewell.kernels.vectors.quantize_row` for an
    integer one; addresses and row strides in bytes; ``out`` float32.
    """
    invoke(matrix[4], matrix[1], first, blocks, x, ldx, rows, matrix[3], out, ldo)


def product_entry(format: str) -> int:
    """Address of the product with matrices of ``format``, which ``add_product`` calls; may compile it."""
    return {"float32": _rows_f32, "bfloat16": _rows_bf16, "int8": _rows_q8, "int4": _rows_q4}[format]()


@compiled()
def product(matrix, x, ldx, rows, out, ldo):
    """``out += x W.T`` whole, on the calling thread; arguments as :func:`add_product`'s."""
    units = matrix[2] // UNIT
    index = np.int64(0)
    first, number = work_item(index, units, 1)
    while number:
        add_product(matrix, 2 * first, 2 * number, x, ldx, rows, out + first * UNIT * 4, ldo)
        index += 1
        first, number = work_item(index, units, 1)


@compiled()
def read_row(matrix, row, out):
    """``out[:k]`` = row ``row`` of the matrix in float32: an embedding read from packed weights."""
    kind, w, k = matrix[0], matrix[1], matrix[3]
    panel, lane = row // 64, row % 64
    if kind == F32:
        for i in range(k):
            out[i] = load_f32(w + (panel * k + i) * 256 + lane * 4)
    elif kind == BF16:
        for i in range(k):
            out[i] = load_bf16(w + (panel * k // 2 + i // 2) * 256 + lane * 4 + i % 2 * 2)
    else:
        size = Q8_RECORD if kind == Q8 else Q4_RECORD
        for group in range(k // 32):
            record = w + (panel * (k // 32) + group) * size
            if kind == Q8:
                scale = load_f16(record + 2048 + 2 * lane)
                for i in range(32):
                    q = load_u8(record + i // 4 * 256 + lane * 4 + i % 4) - 128
                    out[group * 32 + i] = scale * np.float32(q)
            else:
                scale, minimum = load_f16(record + 1024 + 2 * lane), load_f16(record + 1152 + 2 * lane)
                for i in range(32):
                    q = load_u8(record + i % 16 // 4 * 256 + lane * 4 + i % 4) >> (i // 16 * 4) & 15
                    out[group * 32 + i] = scale * np.float32(q) + minimum
