"""Attention over paged keys and values for the compiled decoder step.

Pages are tiled: a page holds, for each head and each 16 tokens, keys as ``[head_dim, 16]`` and values as
``[head_dim / 16, 16, 16]`` (bfloat16: pairs along the summed axis are neighbours), so that scores and
mixtures are the same register tiles as the weight products. The tiling is :func:`tile_offset`'s. Queries,
scores and sums are float32 in every format.
"""

from __future__ import annotations

import math

import numpy as np

from .compile import compiled, entry, invoke
from .shape import (
    BLOCK_BYTES,
    BLOCK_SIZE,
    HEAD_DIM,
    LAYER_BYTES,
    MIX,
    N_HEADS,
    N_KV,
    PAGES_BF16,
    POOL,
    SCORES,
    VALUES_AT,
    WINDOW,
)
from .simd import tile_bf16, tile_f32
from .vectors import address, exp_shifted, maximum, scale_floats

LANES = 16
CHUNK = 8  # key tiles whose scores are kept at once
MAX_ITEM_ROWS = 24  # query rows (tokens times heads of a group) of one attention item
MASKED = np.float32(-3.0e38)


@compiled()
def tile_offset(block_size, dim, head, offset):
    """Elements from the start of a page's plane to the 16-token tile of (head, token offset)."""
    return (head * (block_size // LANES) + offset // LANES) * LANES * dim


@compiled()
def _bits_bf16(bits):
    """The upper half of a float32's bits, rounded to nearest even; NaN stays NaN."""
    if bits & np.uint32(0x7FFFFFFF) > np.uint32(0x7F800000):
        return np.uint16((bits >> np.uint32(16)) | np.uint32(64))
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@compiled()
def write_tiled(shape, pool, layer, slot, head, values, is_value):
    """Write one token's key or value of one head, float32 ``[head_dim]``, into its page."""
    block_size, dim, is_bf16 = shape[BLOCK_SIZE], shape[HEAD_DIM], shape[PAGES_BF16] == 1
    offset = slot % block_size
    lane = offset % LANES
    base = (slot // block_size) * shape[BLOCK_BYTES] + layer * shape[LAYER_BYTES]
    if is_value:
        base += shape[VALUES_AT]
    if is_bf16:
        at = base // 2 + tile_offset(block_size, dim, head, offset)
        page, bits = pool.view(np.uint16), values.view(np.uint32)
        if is_value:
            for i in range(dim):
                page[at + i // LANES * 256 + lane // 2 * 32 + i % LANES * 2 + lane % 2] = _bits_bf16(bits[i])
        else:
            for i in range(dim):
                page[at + i // 2 * 32 + lane * 2 + i % 2] = _bits_bf16(bits[i])
    else:
        at = base // 4 + tile_offset(block_size, dim, head, offset)
        plain = pool.view(np.float32)
        if is_value:
            for i in range(dim):
                plain[at + i // LANES * 256 + lane * LANES + i % LANES] = values[i]
        else:
            for i in range(dim):
                plain[at + i * LANES + lane] = values[i]


@compiled()
def silence_tail(shape, pool, layer, slot):
    """Zero the values behind ``slot`` in its tile: a reused page may hold NaN, which a zero weight does not
    silence.
    """
    block_size, dim, is_bf16 = shape[BLOCK_SIZE], shape[HEAD_DIM], shape[PAGES_BF16] == 1
    lane = slot % LANES
    base = (slot // block_size) * shape[BLOCK_BYTES] + layer * shape[LAYER_BYTES] + shape[VALUES_AT]
    for head in range(shape[N_KV]):
        at = base // (2 if is_bf16 else 4) + tile_offset(block_size, dim, head, slot % block_size)
        for part in range(dim // LANES):
            for behind in range(lane + 1, LANES):
                if is_bf16:
                    first = at + part * 256 + behind // 2 * 32 + behind % 2
                    pool.view(np.uint16)[first : first + 32 : 2] = 0
                else:
                    first = at + part * 256 + behind * LANES
                    pool.view(np.float32)[first : first + LANES] = 0


@entry
def _scores_bf16(keys, q, ldq, rows, dim, out, ldo, _a, _b):
    t = 0
    while t < rows:
        left, qt, ot = rows - t, q + t * ldq, out + t * ldo
        if left >= 12:
            tile_bf16(1, 12, 0, 64, 0, 1, keys, 0, qt, ldq, dim, ot, ldo)
            t += 12
        elif left >= 3:
            tile_bf16(1, 3, 0, 64, 0, 1, keys, 0, qt, ldq, dim, ot, ldo)
            t += 3
        else:
            tile_bf16(1, 1, 0, 64, 0, 1, keys, 0, qt, ldq, dim, ot, ldo)
            t += 1


@entry
def _scores_f32(keys, q, ldq, rows, dim, out, ldo, _a, _b):
    t = 0
    while t < rows:
        left, qt, ot = rows - t, q + t * ldq, out + t * ldo
        if left >= 12:
            tile_f32(1, 12, 0, 64, 0, keys, 0, qt, ldq, dim, ot, ldo)
            t += 12
        elif left >= 3:
            tile_f32(1, 3, 0, 64, 0, keys, 0, qt, ldq, dim, ot, ldo)
            t += 3
        else:
            tile_f32(1, 1, 0, 64, 0, keys, 0, qt, ldq, dim, ot, ldo)
            t += 1


@entry
def _mix_bf16(values, p, ldp, rows, dim, out, ldo, _a, _b):
    n = 0
    while n < dim // LANES:
        wide = dim // LANES - n >= 4
        v, on = values + n * 512, out + n * 64
        t = 0
        while t < rows:
            left, pt, ot = rows - t, p + t * ldp, on + t * ldo
            if wide and left >= 12:
                for half in range(2):
                    tile_bf16(2, 12, 1, 64, 0, 0, v + 1024 * half, 512, pt, ldp, 16, ot + 128 * half, ldo)
                t += 12
            elif wide and left >= 3:
                tile_bf16(4, 3, 1, 64, 0, 0, v, 512, pt, ldp, 16, ot, ldo)
                t += 3
            elif wide:
                tile_bf16(4, 1, 1, 64, 0, 0, v, 512, pt, ldp, 16, ot, ldo)
                t += 1
            else:
                tile_bf16(1, 1, 1, 64, 0, 0, v, 512, pt, ldp, 16, ot, ldo)
                t += 1
        n += 4 if wide else 1


@entry
def _mix_f32(values, p, ldp, rows, dim, out, ldo, _a, _b):
    n = 0
    while n < dim // LANES:
        wide = dim // LANES - n >= 4
        v, on = values + n * 1024, out + n * 64
        t = 0
        while t < rows:
            left, pt, ot = rows - t, p + t * ldp, on + t * ldo
            if wide and left >= 3:
                tile_f32(4, 3, 1, 64, 0, v, 1024, pt, ldp, 16, ot, ldo)
                t += 3
            elif wide:
                tile_f32(4, 1, 1, 64, 0, v, 1024, pt, ldp, 16, ot, ldo)
                t += 1
            else:
                tile_f32(1, 1, 1, 64, 0, v, 1024, pt, ldp, 16, ot, ldo)
                t += 1
        n += 4 if wide else 1


def attention_entries(bf16: bool) -> tuple[int, int]:
    """Addresses of the tiles for scores and for mixing, for bfloat16 or float32 pages; may compile them."""
    return (_scores_bf16(), _mix_bf16()) if bf16 else (_scores_f32(), _mix_f32())


@compiled()
def _mask(scores, row, first, last, position, window, value):
    """Set the scores of key positions ``first .. last - 1`` that the query at ``position`` may not see."""
    for j in range(max(first, position + 1), last):
        scores[row, j - first] = value
    if window > 0:
        for j in range(first, min(last, position - window + 1)):
            scores[row, j - first] = value


@compiled()
def attend(shape, layer, head, row0, count, table, positions, q, q_at, scratch, out):
    """Online-softmax attention (FlashAttention, arXiv 2205.14135) of ``count`` neighbouring rows of one
    sequence for one key head.

    ``q``: float32, flat; the item's ``count * group`` scaled query rows start at element ``q_at``.
    ``scratch``: float32, the thread's own, at least :func:`scratch_floats`. ``out``: float32 ``[T, heads *
    head_dim]``, rows ``row0 ..``.
    """
    dim, is_bf16, block_size, window = (
        shape[HEAD_DIM],
        shape[PAGES_BF16] == 1,
        shape[BLOCK_SIZE],
        shape[WINDOW],
    )
    group = shape[N_HEADS] // shape[N_KV]
    rows = count * group
    width = CHUNK * LANES
    at = MAX_ITEM_ROWS * width
    scores = scratch[:at].reshape(MAX_ITEM_ROWS, width)
    acc = scratch[at : at + MAX_ITEM_ROWS * dim].reshape(MAX_ITEM_ROWS, dim)
    at += MAX_ITEM_ROWS * dim
    best, mass = scratch[at : at + MAX_ITEM_ROWS], scratch[at + MAX_ITEM_ROWS : at + 2 * MAX_ITEM_ROWS]
    size = 2 if is_bf16 else 4
    queries, ldq = address(q) + q_at * 4, dim * 4
    first_position, last_position = positions[row0], positions[row0 + count - 1]
    tiles = last_position // LANES + 1
    start = 0
    if window > 0:  # whole chunks, so that the order of the sums does not depend on which rows share an item
        start = max(0, first_position - window + 1) // width * CHUNK
    acc[:rows] = 0
    best[:rows] = MASKED
    mass[:rows] = 0
    per_block = block_size // LANES
    layer_at = shape[POOL] + layer * shape[LAYER_BYTES]
    while start < tiles:
        n = min(CHUNK, tiles - start)
        keys = n * LANES
        for j in range(n):
            tile = start + j
            page = layer_at + table[tile // per_block] * shape[BLOCK_BYTES]
            k_at = page + size * tile_offset(block_size, dim, head, tile % per_block * LANES)
            invoke(
                shape[SCORES],
                k_at,
                queries,
                ldq,
                rows,
                dim,
                address(scores) + 64 * j,
                scores.strides[0],
                0,
                0,
            )
        low, high = start * LANES, start * LANES + keys
        masked = high > first_position + 1 or window > 0
        for t in range(rows):
            position = positions[row0 + t // group]
            if masked:
                _mask(scores, t, low, high, position, window, MASKED)
            top = max(best[t], maximum(address(scores[t]), keys))
            decay = np.float32(math.exp(best[t] - top)) if best[t] > MASKED else np.float32(0)
            total = exp_shifted(address(scores[t]), keys, top)
            if masked:
                _mask(scores, t, low, high, position, window, np.float32(0))
            mass[t] = mass[t] * decay + total
            if decay != 1:
                scale_floats(address(acc[t]), dim, decay)
            best[t] = top
        for j in range(n):
            tile = start + j
            page = layer_at + table[tile // per_block] * shape[BLOCK_BYTES] + shape[VALUES_AT]
            v_at = page + size * tile_offset(block_size, dim, head, tile % per_block * LANES)
            p_at, ldp = address(scores) + 64 * j, scores.strides[0]
            invoke(shape[MIX], v_at, p_at, ldp, rows, dim, address(acc), acc.strides[0], 0, 0)
        start += n
    for t in range(rows):
        scale_floats(address(acc[t]), dim, np.float32(1) / mass[t])
        column = (head * group + t % group) * dim
        out[row0 + t // group, column : column + dim] = acc[t]


def scratch_floats(head_dim: int) -> int:
    """Floats of scratch that :func:`attend` needs."""
    return MAX_ITEM_ROWS * (CHUNK * LANES + head_dim + 2)
