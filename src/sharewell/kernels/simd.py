"""Building blocks that numba alone cannot express: register-tiled matrix products, a vector exponential, atomics.

Each is a numba intrinsic that writes LLVM IR with its loops unrolled at compile time, so no compiler is needed
on the user's machine. Tensors are passed as addresses (int64); weights are packed so that the 16 lanes of a
vector are 16 output features (see :mod:`sharewell.kernels.packing`), hence no horizontal sums and, because
every output is accumulated over k in one fixed order, results do not depend on how many rows share a call.

The bfloat16 tiles need AVX512-BF16 (``available()`` says); the float32 tile compiles for any CPU.
"""

# The intrinsics' outer functions are called by numba's typing pass, not as Python.
# pyright: reportArgumentType=false, reportCallIssue=false
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

_F32 = ir.FloatType()
_I8, _I16, _I32, _I64 = (ir.IntType(n) for n in (8, 16, 32, 64))


class _BFloat(ir.Type):
    """LLVM's bfloat, which llvmlite does not name."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


_VF = ir.VectorType(_F32, 16)
_VI = ir.VectorType(_I32, 16)
_VB = ir.VectorType(_BFloat(), 32)

Q4_RECORD = 1280  # bytes of one group of 32 columns of a panel of 64 features: q, d, m
Q8_RECORD = 2176  # q, d


def available() -> bool:
    """True where the bfloat16 tiles can run: an x86-64 CPU with AVX512-BF16 and AVX512-BW."""
    features = llvm.get_host_cpu_features()
    return bool(features.get("avx512bf16") and features.get("avx512bw"))


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


def _splat(b: Any, scalar: Any, kind: ir.VectorType) -> Any:
    undefined = ir.Constant(kind, ir.Undefined)
    first = b.insert_element(undefined, scalar, ir.Constant(_I32, 0))
    return b.shuffle_vector(first, undefined, _ints(0))


def _call(b: Any, name: str, result: ir.Type, arguments: Sequence[Any]) -> Any:
    signature = ir.FunctionType(result, [a.type for a in arguments])
    return b.call(cgutils.get_or_insert_function(b.module, signature, name), arguments)


def _fma(b: Any, x: Any, y: Any, z: Any) -> Any:
    return _call(b, "llvm.fma.v16f32", _VF, [x, y, z])


def _dot_bf16(b: Any, acc: Any, x: Any, y: Any) -> Any:
    return _call(b, "llvm.x86.avx512bf16.dpbf16ps.512", _VF, [acc, x, y])


def _loop(b: Any, count: Any, body: Callable[[Any, list[Any]], list[Any]], carried: list[Any]) -> list[Any]:
    """``for i in range(count): carried = body(i, carried)`` with the carried values kept in registers; count >= 1."""
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


def _broadcast_pair(b: Any, row: Any, offset: Any) -> Any:
    """Two neighbouring bfloat16 of one activation row in every lane."""
    return b.bitcast(_splat(b, _load(b, row, offset, _I32, 4), _VI), _VB)


def _open(b: Any, out: Any, ldo: Any, nb: int, rows: int, accumulate: bool) -> tuple[list[Any], list[Any]]:
    out_rows = _rows(b, out, ldo, rows)
    if not accumulate:
        return out_rows, [_floats(0.0)] * (nb * rows)
    return out_rows, [_load(b, out_rows[t], _int(64 * n), _VF, 4) for t in range(rows) for n in range(nb)]


def _close(b: Any, accs: list[Any], out_rows: list[Any], nb: int) -> None:
    for j, acc in enumerate(accs):
        _store(b, acc, out_rows[j // nb], _int(64 * (j % nb)))


@intrinsic(prefer_literal=True)
def tile_f32(typingctx, NB, ROWS, ACC, STEP, w, w_stride, x, ldx, k, out, ldo):  # noqa: ANN001, ANN201, N803
    """out[t, 16 n + lane] (+)= sum_k w[n, k, lane] x[t, k] in float32.

    ``w``: NB blocks of 16 features, ``w_stride`` bytes apart, the next k STEP bytes on; ``x``: ROWS rows, ``ldx``
    bytes apart; ``k`` >= 1; ``out``: float32, rows ``ldo`` bytes apart. NB, ROWS, ACC (add to what is there) and
    STEP are literals.
    """
    nb, rows, accumulate = NB.literal_value, ROWS.literal_value, bool(ACC.literal_value)
    step = STEP.literal_value

    def codegen(context, b, signature, args):  # noqa: ANN001, ANN202
        _, _, _, _, w, w_stride, x, ldx, k, out, ldo = args
        blocks, x_rows = _rows(b, w, w_stride, nb), _rows(b, x, ldx, rows)
        out_rows, accs = _open(b, out, ldo, nb, rows, accumulate)

        def body(i, accs):  # noqa: ANN001, ANN202
            weights = [_load(b, block, b.mul(i, _int(step)), _VF, 64) for block in blocks]
            new = []
            for t in range(rows):
                value = _splat(b, _load(b, x_rows[t], b.shl(i, _int(2)), _F32, 4), _VF)
                new += [_fma(b, weights[n], value, accs[t * nb + n]) for n in range(nb)]
            return new

        _close(b, _loop(b, k, body, accs), out_rows, nb)
        return context.get_dummy_value()

    return types.void(NB, ROWS, ACC, STEP, *[types.int64] * 7), codegen


@intrinsic(prefer_literal=True)
def tile_bf16(typingctx, NB, ROWS, ACC, STEP, w, w_stride, x, ldx, k, out, ldo):  # noqa: ANN001, ANN201, N803
    """As :func:`tile_f32` with bfloat16 operands: pairs along k are neighbours, ``k`` even; float32 sums."""
    nb, rows, accumulate = NB.literal_value, ROWS.literal_value, bool(ACC.literal_value)
    step = STEP.literal_value

    def codegen(context, b, signature, args):  # noqa: ANN001, ANN202
        _, _, _, _, w, w_stride, x, ldx, k, out, ldo = args
        blocks, x_rows = _rows(b, w, w_stride, nb), _rows(b, x, ldx, rows)
        out_rows, accs = _open(b, out, ldo, nb, rows, accumulate)

        def body(i, accs):  # noqa: ANN001, ANN202
            weights = [b.bitcast(_load(b, block, b.mul(i, _int(step)), _VI, 64), _VB) for block in blocks]
            new = []
            for t in range(rows):
                pair = _broadcast_pair(b, x_rows[t], b.shl(i, _int(2)))
                new += [_dot_bf16(b, accs[t * nb + n], weights[n], pair) for n in range(nb)]
            return new

        _close(b, _loop(b, b.lshr(k, _int(1)), body, accs), out_rows, nb)
        return context.get_dummy_value()

    return types.void(NB, ROWS, ACC, STEP, *[types.int64] * 7), codegen


def _half_floats(b: Any, base: Any, offset: Any) -> Any:
    """Sixteen float16 as float32."""
    return b.fpext(_load(b, base, offset, ir.VectorType(ir.HalfType(), 16), 32), _VF)


@intrinsic(prefer_literal=True)
def tile_q4(typingctx, NB, ROWS, w, first, x, ldx, xs, ldxs, k, out, ldo):  # noqa: ANN001, ANN201, N803
    """out[t, 16 n + lane] += sum_k weight[n, k, lane] x[t, k] with 4-bit weights in groups of 32 along k: d q + m.

    ``w``: a panel of 64 features, one record a group: q as ``[4 octets, 4 blocks, 16]`` uint32 (pair p of an octet at
    bits 4p and 16 + 4p), then d and m as float16 ``[4, 16]``; ``first``: the panel's block to begin with; ``xs``: float32
    sums of x over each group. 0x4300 | q is the bfloat16 of 128 + q, exactly, which saves a conversion; -128 d goes
    with m.
    """
    nb, rows = NB.literal_value, ROWS.literal_value

    def codegen(context, b, signature, args):  # noqa: ANN001, ANN202
        _, _, w, first, x, ldx, xs, ldxs, k, out, ldo = args
        blocks = _rows(b, b.add(w, b.shl(first, _int(6))), _int(64), nb)
        halves = _rows(b, b.add(w, b.shl(first, _int(5))), _int(32), nb)
        x_rows, sum_rows = _rows(b, x, ldx, rows), _rows(b, xs, ldxs, rows)
        out_rows, accs = _open(b, out, ldo, nb, rows, True)

        def body(i, accs):  # noqa: ANN001, ANN202
            record = b.mul(i, _int(Q4_RECORD))
            partial = [_floats(0.0)] * (nb * rows)
            for octet in range(4):
                raw = [_load(b, block, b.add(record, _int(256 * octet)), _VI, 64) for block in blocks]
                for pair in range(4):
                    weights = []
                    for value in raw:
                        nibbles = b.and_(b.lshr(value, _ints(4 * pair)), _ints(0x000F000F))
                        weights.append(b.bitcast(b.or_(nibbles, _ints(0x43004300)), _VB))
                    at_x = b.add(b.mul(i, _int(64)), _int(16 * octet + 4 * pair))
                    for t in range(rows):
                        values = _broadcast_pair(b, x_rows[t], at_x)
                        for n in range(nb):
                            partial[t * nb + n] = _dot_bf16(b, partial[t * nb + n], weights[n], values)
            scale = [_half_floats(b, half, b.add(record, _int(1024))) for half in halves]
            minimum = [_half_floats(b, half, b.add(record, _int(1152))) for half in halves]
            offset = [_fma(b, scale[n], _floats(-128.0), minimum[n]) for n in range(nb)]
            new = []
            for t in range(rows):
                total = _splat(b, _load(b, sum_rows[t], b.mul(i, _int(4)), _F32, 4), _VF)
                for n in range(nb):
                    j = t * nb + n
                    new.append(_fma(b, partial[j], scale[n], _fma(b, total, offset[n], accs[j])))
            return new

        _close(b, _loop(b, b.lshr(k, _int(5)), body, accs), out_rows, nb)
        return context.get_dummy_value()

    return types.void(NB, ROWS, *[types.int64] * 9), codegen


@intrinsic(prefer_literal=True)
def tile_q8(typingctx, NB, ROWS, w, first, x, ldx, k, out, ldo):  # noqa: ANN001, ANN201, N803
    """As :func:`tile_q4` with int8 weights d q: records of ``[16 pairs, 4 blocks, 16, 2]`` int8, then d float16
    ``[4, 16]``. Every int8 is exact in bfloat16."""
    nb, rows = NB.literal_value, ROWS.literal_value
    bytes32, floats32 = ir.VectorType(_I8, 32), ir.VectorType(_F32, 32)

    def codegen(context, b, signature, args):  # noqa: ANN001, ANN202
        _, _, w, first, x, ldx, k, out, ldo = args
        blocks = _rows(b, b.add(w, b.shl(first, _int(5))), _int(32), nb)
        x_rows = _rows(b, x, ldx, rows)
        out_rows, accs = _open(b, out, ldo, nb, rows, True)

        def body(i, accs):  # noqa: ANN001, ANN202
            record = b.mul(i, _int(Q8_RECORD))

            def pair(j, partial):  # noqa: ANN001, ANN202
                weights = []
                for block in blocks:
                    raw = _load(b, block, b.add(record, b.shl(j, _int(7))), bytes32, 32)
                    weights.append(b.fptrunc(b.sitofp(raw, floats32), _VB))
                at_x = b.add(b.shl(i, _int(6)), b.shl(j, _int(2)))
                new = []
                for t in range(rows):
                    values = _broadcast_pair(b, x_rows[t], at_x)
                    new += [_dot_bf16(b, partial[t * nb + n], weights[n], values) for n in range(nb)]
                return new

            partial = _loop(b, _int(16), pair, [_floats(0.0)] * (nb * rows))
            scale = [_half_floats(b, block, b.add(record, _int(2048))) for block in blocks]
            return [_fma(b, partial[j], scale[j % nb], accs[j]) for j in range(nb * rows)]

        _close(b, _loop(b, b.lshr(k, _int(5)), body, accs), out_rows, nb)
        return context.get_dummy_value()

    return types.void(NB, ROWS, *[types.int64] * 7), codegen


def _exp(b: Any, x: Any) -> Any:
    """exp of 16 floats to about 2 units in the last place: 2^n * p(f), Taylor to degree 7 on |f| <= ln 2 / 2."""
    x = _call(b, "llvm.maxnum.v16f32", _VF, [x, _floats(-87.0)])
    x = _call(b, "llvm.minnum.v16f32", _VF, [x, _floats(88.0)])
    n = _call(b, "llvm.rint.v16f32", _VF, [b.fmul(x, _floats(1.4426950408889634))])
    f = _fma(b, n, _floats(-0.693359375), x)
    f = _fma(b, n, _floats(2.12194440e-4), f)
    p = _floats(1 / 5040)
    for c in (1 / 720, 1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0):
        p = _fma(b, p, f, _floats(c))
    bits = b.add(b.bitcast(p, _VI), b.shl(b.fptosi(n, _VI), _ints(23)))
    return b.bitcast(bits, _VF)


@intrinsic
def exp_shifted(typingctx, address, n, shift):  # noqa: ANN001, ANN201
    """In place exp(v - shift) over ``n`` floats (a multiple of 16, >= 16); returns their sum (float32)."""

    def codegen(context, b, signature, args):  # noqa: ANN001, ANN202
        address, n, shift = args
        shift = _splat(b, shift, _VF)

        def body(i, total):  # noqa: ANN001, ANN202
            at = b.shl(i, _int(6))
            value = _exp(b, b.fsub(_load(b, address, at, _VF, 4), shift))
            _store(b, value, address, at)
            return [b.fadd(total[0], value)]

        (total,) = _loop(b, b.lshr(n, _int(4)), body, [_floats(0.0)])
        return _call(b, "llvm.vector.reduce.fadd.v16f32", _F32, [ir.Constant(_F32, 0.0), total])

    return types.float32(types.int64, types.int64, types.float32), codegen


@intrinsic
def maximum(typingctx, address, n):  # noqa: ANN001, ANN201
    """The largest of ``n`` floats (a multiple of 16, >= 16)."""

    def codegen(context, b, signature, args):  # noqa: ANN001, ANN202
        address, n = args

        def body(i, best):  # noqa: ANN001, ANN202
            value = _load(b, address, b.shl(i, _int(6)), _VF, 4)
            return [_call(b, "llvm.maxnum.v16f32", _VF, [best[0], value])]

        (best,) = _loop(b, b.lshr(n, _int(4)), body, [_floats(-3.0e38)])
        return _call(b, "llvm.vector.reduce.fmax.v16f32", _F32, [best])

    return types.float32(types.int64, types.int64), codegen


@intrinsic
def silu_product(typingctx, gate, up, n):  # noqa: ANN001, ANN201
    """In place gate = gate * sigmoid(gate) * up over ``n`` floats (a multiple of 16, >= 16)."""

    def codegen(context, b, signature, args):  # noqa: ANN001, ANN202
        gate, up, n = args

        def body(i, carried):  # noqa: ANN001, ANN202
            at = b.shl(i, _int(6))
            g = _load(b, gate, at, _VF, 4)
            denominator = b.fadd(_floats(1.0), _exp(b, b.fsub(_floats(0.0), g)))
            _store(b, b.fmul(b.fdiv(g, denominator), _load(b, up, at, _VF, 4)), gate, at)
            return []

        _loop(b, b.lshr(n, _int(4)), body, [])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def scale_floats(typingctx, address, n, factor):  # noqa: ANN001, ANN201
    """In place multiply ``n`` floats (a multiple of 16, >= 16) by ``factor``."""

    def codegen(context, b, signature, args):  # noqa: ANN001, ANN202
        address, n, factor = args
        factor = _splat(b, factor, _VF)

        def body(i, carried):  # noqa: ANN001, ANN202
            at = b.shl(i, _int(6))
            _store(b, b.fmul(_load(b, address, at, _VF, 4), factor), address, at)
            return []

        _loop(b, b.lshr(n, _int(4)), body, [])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32), codegen


@intrinsic
def narrow_bf16(typingctx, source, target, n):  # noqa: ANN001, ANN201
    """Round ``n`` floats (a multiple of 16, >= 16) to bfloat16, to nearest even; NaN stays NaN."""

    def codegen(context, b, signature, args):  # noqa: ANN001, ANN202
        source, target, n = args

        def body(i, carried):  # noqa: ANN001, ANN202
            value = _load(b, source, b.shl(i, _int(6)), _VF, 4)
            _store(b, b.fptrunc(value, ir.VectorType(_BFloat(), 16)), target, b.shl(i, _int(5)))
            return []

        _loop(b, b.lshr(n, _int(4)), body, [])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def group_sums(typingctx, source, target, groups):  # noqa: ANN001, ANN201
    """Sums of each 32 bfloat16 at ``source`` as float32 at ``target``; groups >= 1."""

    def codegen(context, b, signature, args):  # noqa: ANN001, ANN202
        source, target, groups = args
        ones = b.bitcast(_ints(0x3F803F80), _VB)

        def body(i, carried):  # noqa: ANN001, ANN202
            values = b.bitcast(_load(b, source, b.shl(i, _int(6)), _VI, 4), _VB)
            total = _dot_bf16(b, _floats(0.0), values, ones)
            total = _call(b, "llvm.vector.reduce.fadd.v16f32", _F32, [ir.Constant(_F32, 0.0), total])
            _store(b, total, target, b.shl(i, _int(2)))
            return []

        _loop(b, groups, body, [])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def address(typingctx, array):  # noqa: ANN001, ANN201
    """Address of the first element of ``array`` as int64 (``ctypes.data`` is unsigned, and unsigned + signed is float)."""

    def codegen(context, b, signature, args):  # noqa: ANN001, ANN202
        data = context.make_array(signature.args[0])(context, b, args[0]).data
        return b.ptrtoint(data, _I64)

    return types.int64(array), codegen


@intrinsic
def load_i64(typingctx, address):  # noqa: ANN001, ANN201
    """The int64 at ``address``, read atomically (acquire)."""

    def codegen(context, b, signature, args):  # noqa: ANN001, ANN202
        return b.load_atomic(b.inttoptr(args[0], _I64.as_pointer()), "acquire", 8)

    return types.int64(types.int64), codegen


@intrinsic
def fetch_add(typingctx, address, value):  # noqa: ANN001, ANN201
    """Atomically add ``value`` to the int64 at ``address``; returns what was there before."""

    def codegen(context, b, signature, args):  # noqa: ANN001, ANN202
        return b.atomic_rmw("add", b.inttoptr(args[0], _I64.as_pointer()), args[1], "acq_rel")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def pause(typingctx):  # noqa: ANN001, ANN201
    """Tell the core that this is a waiting loop."""

    def codegen(context, b, signature, args):  # noqa: ANN001, ANN202
        _call(b, "llvm.x86.sse2.pause", ir.VoidType(), [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def yield_core(typingctx):  # noqa: ANN001, ANN201
    """Give the core to another thread (``sched_yield``)."""

    def codegen(context, b, signature, args):  # noqa: ANN001, ANN202
        _call(b, "sched_yield", _I32, [])
        return context.get_dummy_value()

    return types.void(), codegen
