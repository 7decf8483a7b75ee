"""Register-tiled matrix products that numba alone cannot express.

Each is a numba intrinsic that writes LLVM IR with its loops unrolled at compile time, so no compiler is
needed on the user's machine. Tensors are passed as addresses (int64); weights are packed so that the 16
lanes of a vector are 16 output features (see :mod:`sharewell.kernels.packing`), hence no horizontal sums
and, because every output is accumulated over k in one fixed order, results do not depend on how many rows
share a call.

The float tiles compile for any CPU: bfloat16 weights are widened to float32 in registers, which on Intel's
server cores is twice as fast as their bfloat16 dot product. The integer tiles need AVX512-VNNI
(``available()`` says); they take activations quantised by :func:`sharewell.kernels.vectors.quantize_row`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic as _intrinsic

# Intrinsics are called by numba's typing pass, not as the Python functions they are written as.
intrinsic: Any = _intrinsic

_F32 = ir.FloatType()
_I8, _I16, _I32, _I64 = (ir.IntType(n) for n in (8, 16, 32, 64))
_VF = ir.VectorType(_F32, 16)
_VI = ir.VectorType(_I32, 16)
_VH = ir.VectorType(ir.HalfType(), 16)

Q4_RECORD = 1280  # bytes of one group of 32 columns of a panel of 64 features: q, d, m
Q8_RECORD = 2176  # q, d
# One group of 32 quantised activations: int8 q, float32 d and d * sum(q), int32 -128 * sum(q), 4 bytes
# unused.
X_RECORD = 48
# How far ahead of its use a tile asks for its weights: without that a core waits for memory and multiplies in
# turns (60 instead of 116 GFLOP/s for 12 rows of bfloat16 whose weights are in no cache).
AHEAD = 8192


def available() -> bool:
    """True where the integer tiles can run: an x86-64 CPU with AVX512-VNNI and AVX512-BW."""
    features = llvm.get_host_cpu_features()
    return bool(features.get("avx512vnni") and features.get("avx512bw"))


def _int(value: int) -> ir.Constant:
    return ir.Constant(_I64, value)


def _floats(value: float) -> ir.Constant:
    return ir.Constant(_VF, [value] * 16)


def _ints(value: int) -> ir.Constant:
    return ir.Constant(_VI, [value] * 16)


def _load(b: Any, base: Any, offset: Any, kind: ir.Type, align: int) -> Any:
    value = b.load(b.inttoptr(b.add(base, offset), kind.as_pointer()))
    value.align = align
    return value


def _store(b: Any, value: Any, base: Any, offset: Any) -> None:
    b.store(value, b.inttoptr(b.add(base, offset), value.type.as_pointer())).align = 4


def _prefetch(b: Any, base: Any, offset: Any, lines: int) -> None:
    """Ask for ``lines`` cache lines from ``AHEAD`` bytes behind ``offset`` on, into the second level."""
    level, read, data = (ir.Constant(_I32, value) for value in (2, 0, 1))
    for line in range(lines):
        at = b.inttoptr(b.add(base, b.add(offset, _int(AHEAD + 64 * line))), _I8.as_pointer())
        _call(b, "llvm.prefetch.p0", ir.VoidType(), [at, read, level, data])


def _splat(b: Any, scalar: Any, kind: ir.VectorType) -> Any:
    undefined = ir.Constant(kind, ir.Undefined)
    first = b.insert_element(undefined, scalar, ir.Constant(_I32, 0))
    return b.shuffle_vector(first, undefined, _ints(0))


def _spread(b: Any, base: Any, offset: Any, scalar: ir.Type, kind: ir.VectorType) -> Any:
    """One number of memory in every lane."""
    return _splat(b, _load(b, base, offset, scalar, 4), kind)


def _call(b: Any, name: str, result: ir.Type, arguments: Sequence[Any]) -> Any:
    signature = ir.FunctionType(result, [a.type for a in arguments])
    return b.call(cgutils.get_or_insert_function(b.module, signature, name), arguments)


def _fma(b: Any, x: Any, y: Any, z: Any) -> Any:
    return _call(b, "llvm.fma.v16f32", _VF, [x, y, z])


def _dot_bytes(b: Any, acc: Any, unsigned: Any, signed: Any) -> Any:
    """acc + the dot product of each lane's four unsigned and four signed bytes, in int32."""
    return _call(b, "llvm.x86.avx512.vpdpbusd.512", _VI, [acc, unsigned, signed])


def _loop(b: Any, count: Any, body: Callable[[Any, list[Any]], list[Any]], carried: list[Any]) -> list[Any]:
    """``for i in range(count): carried = body(i, carried)`` with the carried values kept in registers;
    count >= 1.
    """
    before = b.block
    head, end = b.function.append_basic_block("tile"), b.function.append_basic_block("tile.end")
    b.branch(head)
    b.position_at_end(head)
    i = b.phi(_I64)
    i.add_incoming(_int(0), before)
    phis = []
    for value in carried:
        phi = b.phi(value.type)
        phi.add_incoming(value, before)
        phis.append(phi)
    new = body(i, phis)
    following = b.add(i, _int(1))
    i.add_incoming(following, b.block)
    for phi, value in zip(phis, new, strict=True):
        phi.add_incoming(value, b.block)
    b.cbranch(b.icmp_signed("<", following, count), head, end)
    b.position_at_end(end)
    return new


def _rows(b: Any, base: Any, stride: Any, n: int) -> list[Any]:
    return [b.add(base, b.mul(stride, _int(i))) for i in range(n)]


def _open(b: Any, out: Any, ldo: Any, nb: int, rows: int, accumulate: bool) -> tuple[list[Any], list[Any]]:
    out_rows = _rows(b, out, ldo, rows)
    if not accumulate:
        return out_rows, [_floats(0.0)] * (nb * rows)
    return out_rows, [_load(b, out_rows[t], _int(64 * n), _VF, 4) for t in range(rows) for n in range(nb)]


def _close(b: Any, accs: list[Any], out_rows: list[Any], nb: int) -> None:
    for j, acc in enumerate(accs):
        _store(b, acc, out_rows[j // nb], _int(64 * (j % nb)))


@intrinsic(prefer_literal=True)
def tile_f32(typingctx, NB, ROWS, ACC, STEP, STREAM, w, w_stride, x, ldx, k, out, ldo):
    """out[t, 16 n + lane] (+)= sum_k w[n, k, lane] x[t, k] in float32.

    ``w``: NB blocks of 16 features, ``w_stride`` bytes apart, the next k STEP bytes on; ``x``: ROWS rows,
    ``ldx`` bytes apart; ``k`` >= 1; ``out``: float32, rows ``ldo`` bytes apart. NB, ROWS, ACC (add to what is
    there), STEP and STREAM (the weights come from memory, the blocks side by side: ask for them ahead) are
    literals.
    """
    nb, rows, accumulate = NB.literal_value, ROWS.literal_value, bool(ACC.literal_value)
    step, stream = STEP.literal_value, bool(STREAM.literal_value)

    def codegen(context, b, signature, args):
        _, _, _, _, _, w, w_stride, x, ldx, k, out, ldo = args
        blocks, x_rows = _rows(b, w, w_stride, nb), _rows(b, x, ldx, rows)
        out_rows, accs = _open(b, out, ldo, nb, rows, accumulate)

        def body(i, accs):
            at = b.mul(i, _int(step))
            _prefetch(b, w, at, nb if stream else 0)
            weights = [_load(b, block, at, _VF, 64) for block in blocks]
            new = []
            for t in range(rows):
                value = _spread(b, x_rows[t], b.shl(i, _int(2)), _F32, _VF)
                new += [_fma(b, weights[n], value, accs[t * nb + n]) for n in range(nb)]
            return new

        _close(b, _loop(b, k, body, accs), out_rows, nb)
        return context.get_dummy_value()

    return types.void(NB, ROWS, ACC, STEP, STREAM, *[types.int64] * 7), codegen


@intrinsic(prefer_literal=True)
def tile_bf16(typingctx, NB, ROWS, ACC, STEP, STREAM, SPLIT, w, w_stride, x, ldx, k, out, ldo):
    """As :func:`tile_f32` with bfloat16 weights, two neighbours of k side by side and the next two STEP
    bytes on; ``k`` even. With SPLIT, even and odd k have sums of their own: twice the independent work when
    tiles are small.
    """
    nb, rows, accumulate = NB.literal_value, ROWS.literal_value, bool(ACC.literal_value)
    step, stream, split = STEP.literal_value, bool(STREAM.literal_value), bool(SPLIT.literal_value)

    def codegen(context, b, signature, args):
        _, _, _, _, _, _, w, w_stride, x, ldx, k, out, ldo = args
        blocks, x_rows = _rows(b, w, w_stride, nb), _rows(b, x, ldx, rows)
        out_rows, accs = _open(b, out, ldo, nb, rows, accumulate)
        count = nb * rows

        def body(i, accs):
            at = b.mul(i, _int(step))
            _prefetch(b, w, at, nb if stream else 0)
            raw = [_load(b, block, at, _VI, 64) for block in blocks]
            sums = list(accs)
            for half in (0, 1):
                if half:
                    weights = [b.bitcast(b.and_(r, _ints(0xFFFF0000)), _VF) for r in raw]
                else:
                    weights = [b.bitcast(b.shl(r, _ints(16)), _VF) for r in raw]
                first = count if split and half else 0
                for t in range(rows):
                    value = _spread(b, x_rows[t], b.add(b.shl(i, _int(3)), _int(4 * half)), _F32, _VF)
                    for n in range(nb):
                        at = first + t * nb + n
                        sums[at] = _fma(b, weights[n], value, sums[at])
            return sums

        sums = _loop(b, b.lshr(k, _int(1)), body, accs + [_floats(0.0)] * (count if split else 0))
        if split:
            sums = [b.fadd(even, odd) for even, odd in zip(sums[:count], sums[count:], strict=True)]
        _close(b, sums, out_rows, nb)
        return context.get_dummy_value()

    return types.void(NB, ROWS, ACC, STEP, STREAM, SPLIT, *[types.int64] * 7), codegen


def _half_floats(b: Any, base: Any, offset: Any) -> Any:
    """Sixteen float16 as float32."""
    return b.fpext(_load(b, base, offset, _VH, 32), _VF)


@intrinsic(prefer_literal=True)
def tile_q4(typingctx, NB, ROWS, w, first, x, ldx, k, out, ldo):
    """out[t, 16 n + lane] += sum_k weight[n, k, lane] x[t, k] with 4-bit weights d q + m in groups of 32
    along k.

    ``w``: a panel of 64 features, one record a group: q as ``[4, 4 blocks, 16 lanes, 4]`` bytes (column 4 j
    + i of the group in the low half of byte [j, .., i], column 16 + 4 j + i in the high half), then d and m
    as float16 ``[4, 16]``; ``first``: the panel's block to begin with; ``x``: rows of quantised
    activations. The products of a group are exact integers.
    """
    nb, rows = NB.literal_value, ROWS.literal_value

    def codegen(context, b, signature, args):
        _, _, w, first, x, ldx, k, out, ldo = args
        blocks = _rows(b, b.add(w, b.shl(first, _int(6))), _int(64), nb)
        halves = _rows(b, b.add(w, b.shl(first, _int(5))), _int(32), nb)
        x_rows = _rows(b, x, ldx, rows)
        out_rows, accs = _open(b, out, ldo, nb, rows, True)

        def body(i, accs):
            record, at_x = b.mul(i, _int(Q4_RECORD)), b.mul(i, _int(X_RECORD))
            sums = [_ints(0)] * (nb * rows)
            for j in range(4):
                _prefetch(b, blocks[0], b.add(record, _int(256 * j)), nb)
                raw = [_load(b, block, b.add(record, _int(256 * j)), _VI, 64) for block in blocks]
                for half in (0, 1):
                    shifted = [b.lshr(r, _ints(4)) for r in raw] if half else raw
                    nibbles = [b.and_(s, _ints(0x0F0F0F0F)) for s in shifted]
                    for t in range(rows):
                        value = _spread(b, x_rows[t], b.add(at_x, _int(16 * half + 4 * j)), _I32, _VI)
                        for n in range(nb):
                            sums[t * nb + n] = _dot_bytes(b, sums[t * nb + n], nibbles[n], value)
            for part in (1024, 1152):
                _prefetch(b, halves[0], b.add(record, _int(part)), nb // 2)
            scale = [_half_floats(b, half, b.add(record, _int(1024))) for half in halves]
            minimum = [_half_floats(b, half, b.add(record, _int(1152))) for half in halves]
            new = []
            for t in range(rows):
                x_scale = _spread(b, x_rows[t], b.add(at_x, _int(32)), _F32, _VF)
                x_sum = _spread(b, x_rows[t], b.add(at_x, _int(36)), _F32, _VF)
                for n in range(nb):
                    j = t * nb + n
                    acc = _fma(b, minimum[n], x_sum, accs[j])
                    new.append(_fma(b, b.sitofp(sums[j], _VF), b.fmul(scale[n], x_scale), acc))
            return new

        _close(b, _loop(b, b.lshr(k, _int(5)), body, accs), out_rows, nb)
        return context.get_dummy_value()

    return types.void(NB, ROWS, *[types.int64] * 7), codegen


@intrinsic(prefer_literal=True)
def tile_q8(typingctx, NB, ROWS, w, first, x, ldx, k, out, ldo):
    """As :func:`tile_q4` with int8 weights d q: records of q + 128 as ``[8, 4 blocks, 16 lanes, 4]`` bytes,
    then d as float16 ``[4, 16]``. The activations' records bring -128 sum(q), which takes the offset out
    again."""
    nb, rows = NB.literal_value, ROWS.literal_value

    def codegen(context, b, signature, args):
        _, _, w, first, x, ldx, k, out, ldo = args
        blocks = _rows(b, b.add(w, b.shl(first, _int(6))), _int(64), nb)
        halves = _rows(b, b.add(w, b.shl(first, _int(5))), _int(32), nb)
        x_rows = _rows(b, x, ldx, rows)
        out_rows, accs = _open(b, out, ldo, nb, rows, True)

        def body(i, accs):
            record, at_x = b.mul(i, _int(Q8_RECORD)), b.mul(i, _int(X_RECORD))
            sums = []
            for t in range(rows):
                sums += [_spread(b, x_rows[t], b.add(at_x, _int(40)), _I32, _VI)] * nb
            for j in range(8):
                _prefetch(b, blocks[0], b.add(record, _int(256 * j)), nb)
                octets = [_load(b, block, b.add(record, _int(256 * j)), _VI, 64) for block in blocks]
                for t in range(rows):
                    value = _spread(b, x_rows[t], b.add(at_x, _int(4 * j)), _I32, _VI)
                    for n in range(nb):
                        sums[t * nb + n] = _dot_bytes(b, sums[t * nb + n], octets[n], value)
            _prefetch(b, halves[0], b.add(record, _int(2048)), nb // 2)
            scale = [_half_floats(b, half, b.add(record, _int(2048))) for half in halves]
            new = []
            for t in range(rows):
                x_scale = _spread(b, x_rows[t], b.add(at_x, _int(32)), _F32, _VF)
                for n in range(nb):
                    j = t * nb + n
                    new.append(_fma(b, b.sitofp(sums[j], _VF), b.fmul(scale[n], x_scale), accs[j]))
            return new

        _close(b, _loop(b, b.lshr(k, _int(5)), body, accs), out_rows, nb)
        return context.get_dummy_value()

    return types.void(NB, ROWS, *[types.int64] * 7), codegen
