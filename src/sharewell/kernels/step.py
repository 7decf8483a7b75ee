"""One decoder pass over packed tokens and paged keys and values, compiled as one function for a few threads.

The layers of a Llama-like decoder are a few phases, one after the other. Within a phase the threads take work
items from a shared counter (:mod:`sharewell.kernels.team`). No Python and no OpenMP region runs in a step.
"""

from __future__ import annotations

import numpy as np

from .attention import attend, silence_tail, write_tiled
from .compile import compiled
from .gemm import add_product, read_row
from .lora import lora_down, lora_up
from .shape import (
    DOWN,
    EMBEDS,
    GATE_UP,
    GATE_UP_HALF,
    HEAD,
    HEAD_DIM,
    INTERMEDIATE,
    N_HEADS,
    N_KV,
    N_LAYERS,
    OUT,
    PRECISE,
    QK_NORM,
    QKV,
    QUANTIZED,
)
from .simd import X_RECORD
from .team import UNIT, complete, finish, part, take, work_item, work_items
from .vectors import address, load_f32, quantize_row, silu_product, subtract_quantized

LANES = 16
PHASES = 12  # of a layer at most: eight, and four more with adapters


@compiled(fastmath={"reassoc", "contract"})
def _sum_of_squares(row):
    total = np.float32(0)
    for i in range(row.size):
        total += row[i] * row[i]
    return total


@compiled()
def _rms_norm(row, weight, eps, out):
    scale = np.float32(1) / np.sqrt(_sum_of_squares(row) / np.float32(row.size) + eps)
    for i in range(row.size):
        out[i] = row[i] * scale * weight[i]


@compiled()
def _quantize(source, records, groups, second, temp):
    """Quantise ``groups`` groups; with ``second`` > 0 what rounding left out follows that many bytes on."""
    quantize_row(source, records, groups)
    if second > 0:
        for i in range(groups * 32):
            temp[i] = load_f32(source + 4 * i)
        subtract_quantized(address(temp), records, groups)
        quantize_row(address(temp), records + second, groups)


@compiled()
def _norm_row(row, weight, eps, x, xq, quantized, second, temp):
    width = row.size
    _rms_norm(row, weight, eps, x[:width])
    if quantized:
        _quantize(address(x), address(xq), width // 32, second, temp)


@compiled()
def _rotate(source, cos, sin, out, scale):
    half = cos.size
    for i in range(half):
        a, b = source[i], source[i + half]
        out[i] = (a * cos[i] - b * sin[i]) * scale
        out[i + half] = (b * cos[i] + a * sin[i]) * scale


@compiled()
def _place_token(t, shape, qkv, pool, kv_row, slot, cos, sin, q_norm, k_norm, eps, scale, q, temp):
    """Rotate the query of row ``t`` into the item order ``[kv head, row, head of group]``, write its key
    and value to row ``kv_row`` of its page (-1: to none).
    """
    heads, kv_heads, dim = shape[N_HEADS], shape[N_KV], shape[HEAD_DIM]
    group, rows = heads // kv_heads, qkv.shape[0]
    row = qkv[t]
    for h in range(heads + kv_heads if kv_row >= 0 else heads):
        head = row[h * dim : (h + 1) * dim]
        if shape[QK_NORM]:
            _rms_norm(head, q_norm if h < heads else k_norm, eps, head)
        if h < heads:
            at = ((h // group * rows + t) * group + h % group) * dim
            _rotate(head, cos, sin, q[at : at + dim], scale)
        else:
            _rotate(head, cos, sin, temp, np.float32(1))
            write_tiled(shape, pool, kv_row, slot, h - heads, temp[:dim], False)
    for h in range(kv_heads if kv_row >= 0 else 0):
        at = (heads + kv_heads + h) * dim
        write_tiled(shape, pool, kv_row, slot, h, row[at : at + dim], True)


@compiled()
def _add_to(out, matrix, x, ldx, second, sync, phase, threads, lora, segments, u):
    """out += x W.T (+ the rows' adapters), shared among the threads; the number of the next phase."""
    units = matrix[2] // UNIT
    rows, ldo = out.shape[0], out.strides[0]
    if rows == 0:
        return phase + 1
    while True:
        first, number = work_item(take(sync, phase), units, threads)
        if number == 0:
            break
        target = address(out) + first * UNIT * 4
        add_product(matrix, 2 * first, 2 * number, x, ldx, rows, target, ldo)
        if second > 0:
            add_product(matrix, 2 * first, 2 * number, x + second, ldx, rows, target, ldo)
        if segments.shape[0]:
            lora_up(lora, segments, 2 * first, 2 * number, u, target, ldo)
        finish(sync, phase)
    return complete(sync, phase, work_items(units, threads))


@compiled()
def _gate_up(
    matrix, half, inner, x, ldx, second, rows, sync, phase, threads, lora, segments, u,
    gate, act, actq, quantized, act_second, temp,
):  # fmt: skip
    """act = silu(x Gate.T) * (x Up.T), shared among the threads; ``gate``: a thread's own ``[rows, 128]``."""
    up_first, units = half // LANES, half // UNIT
    while True:
        first, number = work_item(take(sync, phase), units, threads)
        if number == 0:
            break
        gate[:] = 0
        out = address(gate)
        add_product(matrix, 2 * first, 2 * number, x, ldx, rows, out, 512)
        add_product(matrix, up_first + 2 * first, 2 * number, x, ldx, rows, out + 256, 512)
        if second > 0:
            add_product(matrix, 2 * first, 2 * number, x + second, ldx, rows, out, 512)
            add_product(matrix, up_first + 2 * first, 2 * number, x + second, ldx, rows, out + 256, 512)
        if segments.shape[0]:
            lora_up(lora, segments, 2 * first, 2 * number, u, out, 512)
            lora_up(lora, segments, up_first + 2 * first, 2 * number, u, out + 256, 512)
        a = first * UNIT
        columns = min(number * UNIT, inner - a)
        for t in range(rows if columns > 0 else 0):
            silu_product(out + t * 512, out + t * 512 + 256, columns)
            act[t, a : a + columns] = gate[t, :columns]
            if quantized:
                target = address(actq[t]) + a // 32 * X_RECORD
                _quantize(out + t * 512, target, columns // 32, act_second, temp)
        finish(sync, phase)
    return complete(sync, phase, work_items(units, threads))


@compiled()
def decoder_step(
    thread, threads, sync, shape, eps, scale,
    matrices, norms, q_norms, k_norms, qkv_bias, embedding, head, final_norm, cos, sin, pool, kv_rows,
    token_ids, positions, slots, query_starts, tables, items, segments, lora, logit_rows,
    hidden, qkv, x, xq, q, act, actq, u, scratch, logits,
):  # fmt: skip
    """Thread ``thread`` of ``threads`` computes its share of one step; returns when the whole step is done.

    All must call with the same arrays, and may come late or not at all but for one.

    sync: :func:`~sharewell.kernels.team.sync_words` of PHASES a layer and 2 more,
    new for each step. shape: int64, see
    :mod:`sharewell.kernels.shape`. matrices: int64 [layers, 4, 5] rows of PackedMatrix; embedding, head:
    such rows. norms: float32 [layers, 2, hidden]. cos, sin: float32 [positions, head_dim / 2]. pool: uint8,
    the pages; kv_rows: int64 [layers, 2], the row of a page that a layer reads and the one that it writes (-1
    for none). token_ids, positions, slots: int64 [T]. query_starts: int32 [S + 1]. tables: int32 [S,
    blocks]. items: int64 [I, 3] attention work (first row, rows, sequence). segments: int64 [G, 3] runs of
    rows with one adapter (first row, rows, slot); lora: int64 [layers, 4, slots, 6]. logit_rows: int64 [R].
    Workspace: hidden float32 [T, hidden], the residual stream; qkv [T, padded]; x, act float32 activations
    and xq, actq their quantised records; q: rotated queries, flat; u: LoRA's inner rows; scratch: float32
    [threads, ...]. logits: float32 [>= R, padded vocabulary], written.
    """
    rows = hidden.shape[0]
    kv_heads, dim = shape[N_KV], shape[HEAD_DIM]
    group = shape[N_HEADS] // kv_heads
    quantized = shape[QUANTIZED] == 1
    inner = shape[INTERMEDIATE]
    adapted = segments.shape[0] > 0
    phase = 0
    temp = scratch[thread, : x.shape[1]]
    mine = scratch[thread, x.shape[1] :]
    gate = mine[: rows * 128].reshape(rows, 128)
    groups = min(rows, 4 * threads)  # items of phases that work row by row
    x_at, ldx = address(x), x.strides[0]
    act_at, lda = address(act), act.strides[0]
    in_at, ldi, mid_at, ldm = x_at, ldx, act_at, lda
    if quantized:
        in_at, ldi, mid_at, ldm = address(xq), xq.strides[0], address(actq), actq.strides[0]
    # Where the records of what rounding left out begin, in bytes from the first ones; 0 where there are none.
    precise, behind = shape[PRECISE], xq.shape[1] // 2
    qkv_second = behind * (precise >> QKV & 1)
    out_second = behind * (precise >> OUT & 1)
    gate_second = behind * (precise >> GATE_UP & 1)
    down_second = actq.shape[1] // 2 * (precise >> DOWN & 1)
    head_second = behind * (precise >> HEAD & 1)

    for layer in range(shape[N_LAYERS]):
        while True:
            index = take(sync, phase)
            if index >= groups:
                break
            low, high = part(index, groups, rows)
            for t in range(low, high):
                if layer == 0 and shape[EMBEDS] == 1:
                    read_row(embedding, token_ids[t], hidden[t])
                _norm_row(
                    hidden[t],
                    norms[layer, 0],
                    eps,
                    x[t],
                    xq[t if quantized else 0],
                    quantized,
                    qkv_second,
                    temp,
                )
                qkv[t] = qkv_bias[layer]
            finish(sync, phase)
        phase = complete(sync, phase, groups)
        if adapted:
            phase = lora_down(lora[layer, QKV], segments, x_at, ldx, u, sync, phase)
        phase = _add_to(
            qkv,
            matrices[layer, QKV],
            in_at,
            ldi,
            qkv_second,
            sync,
            phase,
            threads,
            lora[layer, QKV],
            segments,
            u,
        )

        sequences = query_starts.size - 1
        while True:
            index = take(sync, phase)
            if index >= groups + sequences:
                break
            if index < groups:
                low, high = part(index, groups, rows)
                for t in range(low, high):
                    where = positions[t]
                    _place_token(
                        t, shape, qkv, pool, kv_rows[layer, 1], slots[t], cos[where], sin[where],
                        q_norms[layer], k_norms[layer], eps, scale, q, temp,
                    )  # fmt: skip
            else:
                first, last = query_starts[index - groups], query_starts[index - groups + 1] - 1
                # A tile that an earlier step began has been silenced by it.
                begins = last >= first and positions[first] <= positions[last] // LANES * LANES
                if begins and kv_rows[layer, 1] >= 0:
                    silence_tail(shape, pool, kv_rows[layer, 1], slots[last])
            finish(sync, phase)
        phase = complete(sync, phase, groups + sequences)

        attentions = items.shape[0] * kv_heads
        while True:
            index = take(sync, phase)
            if index >= attentions:
                break
            item = items.shape[0] - 1 - index // kv_heads  # later rows see more keys: the long items first
            row0, count, sequence = items[item, 0], items[item, 1], items[item, 2]
            key_head = index % kv_heads
            q_at = (key_head * rows + row0) * group * dim
            attend(
                shape, kv_rows[layer, 0], key_head, row0, count, tables[sequence], positions, q, q_at, mine, x
            )
            if quantized:
                column = key_head * group * dim
                for t in range(row0, row0 + count):
                    target = address(xq[t]) + column // 32 * X_RECORD
                    _quantize(address(x[t]) + column * 4, target, group * dim // 32, out_second, temp)
            finish(sync, phase)
        phase = complete(sync, phase, attentions)
        if adapted:
            phase = lora_down(lora[layer, OUT], segments, x_at, ldx, u, sync, phase)
        phase = _add_to(
            hidden,
            matrices[layer, OUT],
            in_at,
            ldi,
            out_second,
            sync,
            phase,
            threads,
            lora[layer, OUT],
            segments,
            u,
        )

        while True:
            index = take(sync, phase)
            if index >= groups:
                break
            low, high = part(index, groups, rows)
            for t in range(low, high):
                _norm_row(
                    hidden[t],
                    norms[layer, 1],
                    eps,
                    x[t],
                    xq[t if quantized else 0],
                    quantized,
                    gate_second,
                    temp,
                )
            finish(sync, phase)
        phase = complete(sync, phase, groups)
        if adapted:
            phase = lora_down(lora[layer, GATE_UP], segments, x_at, ldx, u, sync, phase)
        phase = _gate_up(
            matrices[layer, GATE_UP], shape[GATE_UP_HALF], inner, in_at, ldi, gate_second, rows, sync, phase,
            threads, lora[layer, GATE_UP], segments, u, gate, act, actq, quantized, down_second, temp,
        )  # fmt: skip
        if adapted:
            phase = lora_down(lora[layer, DOWN], segments, act_at, lda, u, sync, phase)
        phase = _add_to(
            hidden,
            matrices[layer, DOWN],
            mid_at,
            ldm,
            down_second,
            sync,
            phase,
            threads,
            lora[layer, DOWN],
            segments,
            u,
        )

    wanted = logit_rows.size
    groups = min(wanted, 4 * threads)
    while True:
        index = take(sync, phase)
        if index >= groups:
            break
        low, high = part(index, groups, wanted)
        for t in range(low, high):
            row = hidden[logit_rows[t]]
            _norm_row(row, final_norm, eps, x[t], xq[t if quantized else 0], quantized, head_second, temp)
            logits[t] = 0
        finish(sync, phase)
    phase = complete(sync, phase, groups)
    _add_to(logits[:wanted], head, in_at, ldi, head_second, sync, phase, threads, lora[0, 0], segments[:0], u)
