"""One decoder pass over packed tokens and paged keys and values, compiled as one function that a few threads run.

The layers of a Llama-like decoder are five phases with a barrier between them; within a phase the threads take
work items from a shared counter, so a thread that the machine holds up delays the others by one item at most.
There is no Python, no allocation and no OpenMP region inside a step.

Keys and values are paged and tiled: a page holds, for each head and each 16 tokens, keys as ``[head_dim, 16]``
and values as ``[head_dim / 16, 16, 16]`` (bfloat16: pairs along the summed axis are neighbours), so that scores and
mixtures are the same register tiles as the weight products. The tiling is :func:`tile_offset`'s.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from .gemm import UNIT, add_product, work_item
from .simd import (
    address,
    exp_shifted,
    fetch_add,
    group_sums,
    load_i64,
    maximum,
    narrow_bf16,
    pause,
    scale_floats,
    silu_product,
    tile_bf16,
    tile_f32,
    yield_core,
)

LANES = 16
CHUNK = 8  # key tiles whose scores are kept at once
MAX_ITEM_ROWS = 24  # query rows (tokens times heads of a group) of one attention item
QKV, OUT, GATE_UP, DOWN = 0, 1, 2, 3  # matrices of a layer
MASKED = np.float32(-3.0e38)

# indices into the int64 vector `shape`
(
    N_LAYERS,
    HIDDEN,
    N_HEADS,
    N_KV,
    HEAD_DIM,
    INTERMEDIATE,
    BLOCK_SIZE,
    BLOCK_BYTES,
    LAYER_BYTES,
    VALUES_AT,
    POOL,
    WINDOW,
    IS_BF16,
    QK_NORM,
    GATE_UP_HALF,
    MAX_ROWS,
    LORA_WIDTH,
) = range(17)


@njit(nogil=True, cache=True)
def _barrier(sync, threads, passed):
    """Wait until every thread has come here ``passed + 1`` times."""
    arrived = address(sync)
    fetch_add(arrived, 1)
    target = (passed + 1) * threads
    spins = 0
    while load_i64(arrived) < target:
        spins += 1
        if spins > 4000:
            yield_core()
        else:
            pause()
    return passed + 1


@njit(nogil=True, cache=True)
def _take(sync, phase):
    return fetch_add(address(sync) + 64 + 8 * phase, 1)


@njit(nogil=True, cache=True, fastmath={"reassoc", "contract"})
def _sum_of_squares(row):
    total = np.float32(0)
    for i in range(row.size):
        total += row[i] * row[i]
    return total


@njit(nogil=True, cache=True)
def _rms_norm(row, weight, eps, out):
    scale = np.float32(1) / np.sqrt(_sum_of_squares(row) / np.float32(row.size) + eps)
    for i in range(row.size):
        out[i] = row[i] * scale * weight[i]


@njit(nogil=True, cache=True)
def _norm_rows(hidden, weight, eps, x, xf, xs, k, is_bf16, first, last, rows_of):
    for t in range(first, last):
        _rms_norm(hidden[rows_of[t]], weight, eps, xf[t, :k])
        if is_bf16:
            narrow_bf16(address(xf[t]), address(x[t]), k)
            if k % 32 == 0:
                group_sums(address(x[t]), address(xs[t]), k // 32)


@njit(nogil=True, cache=True)
def _lora_down(lora, segments, source, stride, u, uf, is_bf16, thread, threads):
    """u = x A.T for every run of rows that share an adapter; ``lora`` int64 [slots, 5]:
    addresses of A and B, columns of B, rows of A, columns of A."""
    matrix = np.zeros(4, np.int64)
    for s in range(thread, segments.shape[0], threads):
        start, count, slot = segments[s, 0], segments[s, 1], segments[s, 2]
        if lora[slot, 0] == 0:
            continue
        width = lora[slot, 3]
        matrix[0], matrix[1], matrix[2], matrix[3] = int(is_bf16), lora[slot, 0], width, lora[slot, 4]
        uf[start : start + count, :width] = 0
        for unit in range(width // UNIT):
            out = address(uf) + start * uf.strides[0] + unit * UNIT * 4
            add_product(matrix, 2 * unit, 2, source + start * stride, stride, 0, 0, count, out, uf.strides[0])
        if is_bf16:
            for t in range(start, start + count):
                narrow_bf16(address(uf[t]), address(u[t]), width)


@njit(nogil=True, cache=True)
def _lora_up(lora, segments, first, blocks, u, uf, is_bf16, out, ldo):
    """out += u B.T over features 16 first .. for every run of rows that share an adapter."""
    source, stride = (address(u), u.strides[0]) if is_bf16 else (address(uf), uf.strides[0])
    matrix = np.zeros(4, np.int64)
    for s in range(segments.shape[0]):
        start, count, slot = segments[s, 0], segments[s, 1], segments[s, 2]
        if lora[slot, 0] == 0:
            continue
        matrix[0], matrix[1], matrix[3] = int(is_bf16), lora[slot, 1], lora[slot, 2]
        add_product(matrix, first, blocks, source + start * stride, stride, 0, 0, count, out + start * ldo, ldo)


@njit(nogil=True, cache=True)
def _rotate(source, cos, sin, out, scale):
    half = cos.size
    for i in range(half):
        a, b = source[i], source[i + half]
        out[i] = (a * cos[i] - b * sin[i]) * scale
        out[i + half] = (b * cos[i] + a * sin[i]) * scale


@njit(nogil=True, cache=True)
def _bits_bf16(value_bits):
    return np.uint16((value_bits + np.uint32(0x7FFF) + ((value_bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@njit(nogil=True, cache=True)
def _place_token(t, shape, qkv, pool, layer, slots, positions, cos, sin, q_norm, k_norm, eps, scale, q, qf, temp):
    """Rotate the query of row ``t`` into the item order ``[kv head, row, head of group]`` and write its key and value."""
    heads, kv_heads, dim = shape[N_HEADS], shape[N_KV], shape[HEAD_DIM]
    group, rows = heads // kv_heads, qkv.shape[0]
    is_bf16 = shape[IS_BF16] == 1
    block_size = shape[BLOCK_SIZE]
    position, slot = positions[t], slots[t]
    row = qkv[t]
    bits = temp.view(np.uint32)
    for h in range(heads + kv_heads):
        head = row[h * dim : (h + 1) * dim]
        if shape[QK_NORM]:
            _rms_norm(head, q_norm if h < heads else k_norm, eps, head)
        _rotate(head, cos[position], sin[position], temp, scale if h < heads else np.float32(1))
        if h < heads:
            at = ((h // group) * rows + t) * group + h % group
            if is_bf16:
                narrow_bf16(address(temp), address(q) + at * dim * 2, dim)
            else:
                qf[at * dim : (at + 1) * dim] = temp
            continue
        _write_tiled(shape, pool, layer, slot, h - heads, temp, bits, False, block_size, dim, is_bf16)
    for h in range(kv_heads):
        at = (heads + kv_heads + h) * dim
        temp[:] = row[at : at + dim]
        _write_tiled(shape, pool, layer, slot, h, temp, bits, True, block_size, dim, is_bf16)


@njit(nogil=True, cache=True)
def tile_offset(block_size, dim, head, offset):
    """Elements from the start of a page's plane to the 16-token tile of (head, token offset)."""
    return (head * (block_size // LANES) + offset // LANES) * LANES * dim


@njit(nogil=True, cache=True)
def _write_tiled(shape, pool, layer, slot, head, values, bits, is_value, block_size, dim, is_bf16):
    offset = slot % block_size
    lane = offset % LANES
    size = 2 if is_bf16 else 4
    base = (slot // block_size) * shape[BLOCK_BYTES] + layer * shape[LAYER_BYTES]
    if is_value:
        base += shape[VALUES_AT]
    at = base // size + tile_offset(block_size, dim, head, offset)
    if is_bf16:
        page = pool.view(np.uint16)
        if is_value:
            for i in range(dim):
                page[at + (i // LANES) * 256 + (lane // 2) * 32 + (i % LANES) * 2 + lane % 2] = _bits_bf16(bits[i])
        else:
            for i in range(dim):
                page[at + (i // 2) * 32 + lane * 2 + i % 2] = _bits_bf16(bits[i])
    else:
        plain = pool.view(np.float32)
        if is_value:
            for i in range(dim):
                plain[at + (i // LANES) * 256 + lane * LANES + i % LANES] = values[i]
        else:
            for i in range(dim):
                plain[at + i * LANES + lane] = values[i]


@njit(nogil=True, cache=True)
def _silence_tail(shape, pool, layer, slot, heads, dim, is_bf16):
    """Zero the values behind ``slot`` in its tile: a reused page may hold NaN, which a zero weight does not silence."""
    block_size = shape[BLOCK_SIZE]
    lane = slot % LANES
    base = (slot // block_size) * shape[BLOCK_BYTES] + layer * shape[LAYER_BYTES] + shape[VALUES_AT]
    for head in range(heads):
        at = base // (2 if is_bf16 else 4) + tile_offset(block_size, dim, head, slot % block_size)
        for part in range(dim // LANES):
            for behind in range(lane + 1, LANES):
                if is_bf16:
                    first = at + part * 256 + (behind // 2) * 32 + behind % 2
                    pool.view(np.uint16)[first : first + 32 : 2] = 0
                else:
                    first = at + part * 256 + behind * LANES
                    pool.view(np.float32)[first : first + LANES] = 0


@njit(nogil=True, cache=True)
def _scores(is_bf16, keys, q, ldq, rows, dim, out, ldo):
    t = 0
    while t < rows:
        left, qt, ot = rows - t, q + t * ldq, out + t * ldo
        if is_bf16:
            if left >= 12:
                tile_bf16(1, 12, 0, 64, keys, 0, qt, ldq, dim, ot, ldo)
                t += 12
            elif left >= 6:
                tile_bf16(1, 6, 0, 64, keys, 0, qt, ldq, dim, ot, ldo)
                t += 6
            elif left >= 3:
                tile_bf16(1, 3, 0, 64, keys, 0, qt, ldq, dim, ot, ldo)
                t += 3
            else:
                tile_bf16(1, 1, 0, 64, keys, 0, qt, ldq, dim, ot, ldo)
                t += 1
        elif left >= 12:
            tile_f32(1, 12, 0, 64, keys, 0, qt, ldq, dim, ot, ldo)
            t += 12
        elif left >= 6:
            tile_f32(1, 6, 0, 64, keys, 0, qt, ldq, dim, ot, ldo)
            t += 6
        elif left >= 3:
            tile_f32(1, 3, 0, 64, keys, 0, qt, ldq, dim, ot, ldo)
            t += 3
        else:
            tile_f32(1, 1, 0, 64, keys, 0, qt, ldq, dim, ot, ldo)
            t += 1


@njit(nogil=True, cache=True)
def _mix(is_bf16, values, p, ldp, rows, dim, out, ldo):
    size = 512 if is_bf16 else 1024
    n = 0
    while n < dim // LANES:
        wide = dim // LANES - n >= 4
        v, on = values + n * size, out + n * 64
        t = 0
        while t < rows:
            left, pt, ot = rows - t, p + t * ldp, on + t * ldo
            if is_bf16:
                if wide and left >= 6:
                    tile_bf16(4, 6, 1, 64, v, 512, pt, ldp, 16, ot, ldo)
                    t += 6
                elif wide and left >= 3:
                    tile_bf16(4, 3, 1, 64, v, 512, pt, ldp, 16, ot, ldo)
                    t += 3
                elif wide:
                    tile_bf16(4, 1, 1, 64, v, 512, pt, ldp, 16, ot, ldo)
                    t += 1
                else:
                    tile_bf16(1, 1, 1, 64, v, 512, pt, ldp, 16, ot, ldo)
                    t += 1
            elif wide and left >= 3:
                tile_f32(4, 3, 1, 64, v, 1024, pt, ldp, 16, ot, ldo)
                t += 3
            elif wide:
                tile_f32(4, 1, 1, 64, v, 1024, pt, ldp, 16, ot, ldo)
                t += 1
            else:
                tile_f32(1, 1, 1, 64, v, 1024, pt, ldp, 16, ot, ldo)
                t += 1
        n += 4 if wide else 1


@njit(nogil=True, cache=True)
def _mask(scores, row, first, last, position, window, value):
    """Set the scores of key positions ``first .. last - 1`` that the query at ``position`` may not see."""
    for j in range(max(first, position + 1), last):
        scores[row, j - first] = value
    if window > 0:
        for j in range(first, min(last, position - window + 1)):
            scores[row, j - first] = value


@njit(nogil=True, cache=True)
def _attend(shape, layer, head, row0, count, table, positions, total_rows, q, qf, scores, p, acc, best, mass, x, xf, xs):
    """Online-softmax attention of ``count`` neighbouring rows of one sequence for one kv head."""
    kv_heads, dim, is_bf16 = shape[N_KV], shape[HEAD_DIM], shape[IS_BF16] == 1
    group = shape[N_HEADS] // kv_heads
    rows = count * group
    block_size, window = shape[BLOCK_SIZE], shape[WINDOW]
    at = (head * total_rows + row0) * group
    size = 2 if is_bf16 else 4
    q_at, ldq = (address(q) if is_bf16 else address(qf)) + at * dim * size, dim * size
    first_position, last_position = positions[row0], positions[row0 + count - 1]
    tiles = last_position // LANES + 1
    start = 0
    if window > 0:
        start = max(0, first_position - window + 1) // LANES
    acc[:rows, :dim] = 0
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
            k_at = page + size * tile_offset(block_size, dim, head, (tile % per_block) * LANES)
            _scores(is_bf16, k_at, q_at, ldq, rows, dim, address(scores) + 64 * j, scores.strides[0])
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
            if is_bf16:
                narrow_bf16(address(scores[t]), address(p) + t * p.strides[0], keys)
        for j in range(n):
            tile = start + j
            page = layer_at + table[tile // per_block] * shape[BLOCK_BYTES] + shape[VALUES_AT]
            v_at = page + size * tile_offset(block_size, dim, head, (tile % per_block) * LANES)
            at_p, ldp = address(scores) + 64 * j, scores.strides[0]
            if is_bf16:
                at_p, ldp = address(p) + 32 * j, p.strides[0]
            _mix(is_bf16, v_at, at_p, ldp, rows, dim, address(acc), acc.strides[0])
        start += n
    for t in range(rows):
        scale_floats(address(acc[t]), dim, np.float32(1) / mass[t])
        column = (head * group + t % group) * dim
        row = row0 + t // group
        if is_bf16:
            target = address(x) + row * x.strides[0] + column * 2
            narrow_bf16(address(acc[t]), target, dim)
            if dim % 32 == 0:
                group_sums(target, address(xs[row]) + column // 32 * 4, dim // 32)
        else:
            xf[row, column : column + dim] = acc[t, :dim]


@njit(nogil=True, cache=True)
def decoder_step(
    thread,
    threads,
    sync,
    shape,
    eps,
    scale,
    matrices,
    norms,
    q_norms,
    k_norms,
    qkv_bias,
    head,
    final_norm,
    cos,
    sin,
    pool,
    positions,
    slots,
    query_starts,
    tables,
    items,
    segments,
    lora,
    logit_rows,
    every_row,
    hidden,
    qkv,
    x,
    xf,
    xs,
    q,
    qf,
    u,
    uf,
    scratch,
    logits,
):
    """Thread ``thread`` of ``threads`` computes its share of one step; all must call with the same arrays.

    sync: int64, zeroed. matrices: int64 [layers, 4, 4] rows of PackedMatrix. norms: float32 [layers, 2, hidden].
    hidden: float32 [T, hidden], embeddings in, residual stream out. positions, slots: int64 [T]. query_starts: int32 [S + 1]. tables: int32 [S, blocks].
    items: int64 [I, 3] attention work (first row, rows, sequence). segments: int64 [G, 3] runs of rows with one adapter
    (first row, rows, slot). logit_rows: int64 [R]. logits: float32 [R, padded vocabulary], written.
    x/xf: activations (bfloat16 bits / float32), xs: their group sums; q/qf: rotated queries, flat; u/uf: LoRA's inner rows.
    scratch: float32 [threads, ...], one row of attention and feed-forward workspace a thread.
    """
    rows, width = hidden.shape
    heads, kv_heads, dim = shape[N_HEADS], shape[N_KV], shape[HEAD_DIM]
    is_bf16 = shape[IS_BF16] == 1
    inner, half = shape[INTERMEDIATE], shape[GATE_UP_HALF]
    qkv_width = qkv.shape[1]
    adapted = segments.shape[0] > 0
    passed, phase = 0, 0
    mine = scratch[thread]
    at = 0
    scores = mine[at : at + MAX_ITEM_ROWS * CHUNK * LANES].reshape(MAX_ITEM_ROWS, CHUNK * LANES)
    at += MAX_ITEM_ROWS * CHUNK * LANES
    p = mine[at : at + MAX_ITEM_ROWS * CHUNK * LANES // 2].view(np.uint16).reshape(MAX_ITEM_ROWS, CHUNK * LANES)
    at += MAX_ITEM_ROWS * CHUNK * LANES // 2
    acc = mine[at : at + MAX_ITEM_ROWS * dim].reshape(MAX_ITEM_ROWS, dim)
    at += MAX_ITEM_ROWS * dim
    best, mass = mine[at : at + MAX_ITEM_ROWS], mine[at + MAX_ITEM_ROWS : at + 2 * MAX_ITEM_ROWS]
    at += 2 * MAX_ITEM_ROWS
    temp = mine[at : at + dim]
    at += dim
    gate = mine[at : at + rows * 128].reshape(rows, 128)

    x_at, ldx = (address(x), x.strides[0]) if is_bf16 else (address(xf), xf.strides[0])
    xs_at, ldxs = address(xs), xs.strides[0]
    split = rows * thread // threads, rows * (thread + 1) // threads

    for layer in range(shape[N_LAYERS]):
        _norm_rows(hidden, norms[layer, 0], eps, x, xf, xs, width, is_bf16, split[0], split[1], every_row)
        passed = _barrier(sync, threads, passed)
        if adapted:
            _lora_down(lora[layer, QKV], segments, x_at, ldx, u, uf, is_bf16, thread, threads)
            passed = _barrier(sync, threads, passed)

        matrix = matrices[layer, QKV]
        units = matrix[2] // UNIT
        while True:
            first, number = work_item(_take(sync, phase), units, threads)
            if number == 0:
                break
            a, b = first * UNIT, (first + number) * UNIT
            for t in range(rows):
                qkv[t, a:b] = qkv_bias[layer, a:b]
            out = address(qkv) + a * 4
            add_product(matrix, 2 * first, 2 * number, x_at, ldx, xs_at, ldxs, rows, out, qkv_width * 4)
            if adapted:
                _lora_up(lora[layer, QKV], segments, 2 * first, 2 * number, u, uf, is_bf16, out, qkv_width * 4)
        phase += 1
        passed = _barrier(sync, threads, passed)

        for t in range(split[0], split[1]):
            _place_token(
                t, shape, qkv, pool, layer, slots, positions, cos, sin, q_norms[layer], k_norms[layer], eps, scale, q, qf, temp
            )
        for sequence in range(thread, query_starts.size - 1, threads):
            last = query_starts[sequence + 1] - 1
            begun = positions[query_starts[sequence]] > positions[last] // LANES * LANES
            if last >= query_starts[sequence] and not begun:
                _silence_tail(shape, pool, layer, slots[last], kv_heads, dim, is_bf16)
        passed = _barrier(sync, threads, passed)

        while True:
            index = _take(sync, phase)
            if index >= items.shape[0] * kv_heads:
                break
            item = items.shape[0] - 1 - index // kv_heads  # later rows see more keys: the long items first
            row0, count, sequence = items[item, 0], items[item, 1], items[item, 2]
            _attend(
                shape, layer, index % kv_heads, row0, count, tables[sequence], positions, rows,
                q, qf, scores, p, acc, best, mass, x, xf, xs,
            )  # fmt: skip
        phase += 1
        passed = _barrier(sync, threads, passed)
        if adapted:
            _lora_down(lora[layer, OUT], segments, x_at, ldx, u, uf, is_bf16, thread, threads)
            passed = _barrier(sync, threads, passed)

        matrix = matrices[layer, OUT]
        units = matrix[2] // UNIT
        while True:
            first, number = work_item(_take(sync, phase), units, threads)
            if number == 0:
                break
            out = address(hidden) + first * UNIT * 4
            add_product(matrix, 2 * first, 2 * number, x_at, ldx, xs_at, ldxs, rows, out, width * 4)
            if adapted:
                _lora_up(lora[layer, OUT], segments, 2 * first, 2 * number, u, uf, is_bf16, out, width * 4)
        phase += 1
        passed = _barrier(sync, threads, passed)

        _norm_rows(hidden, norms[layer, 1], eps, x, xf, xs, width, is_bf16, split[0], split[1], every_row)
        passed = _barrier(sync, threads, passed)
        if adapted:
            _lora_down(lora[layer, GATE_UP], segments, x_at, ldx, u, uf, is_bf16, thread, threads)
            passed = _barrier(sync, threads, passed)

        matrix = matrices[layer, GATE_UP]
        units = half // UNIT
        up_first = half // LANES
        while True:
            first, number = work_item(_take(sync, phase), units, threads)
            if number == 0:
                break
            gate[:] = 0
            out = address(gate)
            add_product(matrix, 2 * first, 2 * number, x_at, ldx, xs_at, ldxs, rows, out, 512)
            add_product(matrix, up_first + 2 * first, 2 * number, x_at, ldx, xs_at, ldxs, rows, out + 256, 512)
            if adapted:
                _lora_up(lora[layer, GATE_UP], segments, 2 * first, 2 * number, u, uf, is_bf16, out, 512)
                up = up_first + 2 * first
                _lora_up(lora[layer, GATE_UP], segments, up, 2 * number, u, uf, is_bf16, out + 256, 512)
            a = first * UNIT
            columns = min(number * UNIT, inner - a)
            if columns <= 0:
                continue
            for t in range(rows):
                silu_product(out + t * 512, out + t * 512 + 256, columns)
                if is_bf16:
                    target = address(q) + (t * inner + a) * 2
                    narrow_bf16(out + t * 512, target, columns)
                    if columns % 32 == 0:
                        group_sums(target, address(qkv) + t * qkv_width * 4 + a // 32 * 4, columns // 32)
                else:
                    qf[t * inner + a : t * inner + a + columns] = gate[t, :columns]
        phase += 1
        passed = _barrier(sync, threads, passed)
        # The feed-forward activations reuse the query buffers (rows of `inner`) and their sums the qkv buffer.
        if is_bf16:
            f_at, ldf = address(q), inner * 2
        else:
            f_at, ldf = address(qf), inner * 4
        if adapted:
            _lora_down(lora[layer, DOWN], segments, f_at, ldf, u, uf, is_bf16, thread, threads)
            passed = _barrier(sync, threads, passed)

        matrix = matrices[layer, DOWN]
        units = matrix[2] // UNIT
        while True:
            first, number = work_item(_take(sync, phase), units, threads)
            if number == 0:
                break
            out = address(hidden) + first * UNIT * 4
            add_product(matrix, 2 * first, 2 * number, f_at, ldf, address(qkv), qkv_width * 4, rows, out, width * 4)
            if adapted:
                _lora_up(lora[layer, DOWN], segments, 2 * first, 2 * number, u, uf, is_bf16, out, width * 4)
        phase += 1
        passed = _barrier(sync, threads, passed)

    wanted = logit_rows.size
    a, b = wanted * thread // threads, wanted * (thread + 1) // threads
    _norm_rows(hidden, final_norm, eps, x, xf, xs, width, is_bf16, a, b, logit_rows)
    passed = _barrier(sync, threads, passed)
    units = head[2] // UNIT
    while wanted:
        first, number = work_item(_take(sync, phase), units, threads)
        if number == 0:
            break
        logits[:wanted, first * UNIT : (first + number) * UNIT] = 0
        out = address(logits) + first * UNIT * 4
        add_product(head, 2 * first, 2 * number, x_at, ldx, xs_at, ldxs, wanted, out, logits.strides[0])
    passed = _barrier(sync, threads, passed)
