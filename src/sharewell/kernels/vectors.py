"""Vector functions of the decoder step: softmax, SiLU, quantised activations, single numbers by address.

Lengths are multiples of 16 floats and at least 16; tensors are passed as addresses (int64).
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types

from .simd import (
    _F32,
    _I8,
    _I16,
    _I32,
    _I64,
    _VF,
    _VI,
    X_RECORD,
    _call,
    _floats,
    _fma,
    _int,
    _ints,
    _load,
    _loop,
    _splat,
    _store,
    intrinsic,
)


def _sum(b: Any, vector: Any) -> Any:
    """Sum of the lanes, as a tree."""
    signature = ir.FunctionType(_F32, [_F32, _VF])
    name = "llvm.vector.reduce.fadd.v16f32"
    found = b.module.globals.get(name) or ir.Function(b.module, signature, name)
    return b.call(found, [ir.Constant(_F32, 0.0), vector], fastmath=("reassoc",))


def _exp(b: Any, x: Any) -> Any:
    """exp of 16 floats to about 2 units in the last place: 2^n * p(f), Taylor to degree 7 on |f| <= ln 2 /
    2.
    """
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
def exp_shifted(typingctx, address, n, shift):
    """In place exp(v - shift) over ``n`` floats; returns their sum (float32)."""

    def codegen(context, b, signature, args):
        address, n, shift = args
        shift = _splat(b, shift, _VF)

        def body(i, total):
            at = b.shl(i, _int(6))
            value = _exp(b, b.fsub(_load(b, address, at, _VF, 4), shift))
            _store(b, value, address, at)
            return [b.fadd(total[0], value)]

        (total,) = _loop(b, b.lshr(n, _int(4)), body, [_floats(0.0)])
        return _sum(b, total)

    return types.float32(types.int64, types.int64, types.float32), codegen


@intrinsic
def maximum(typingctx, address, n):
    """The largest of ``n`` floats; NaN counts as missing."""

    def codegen(context, b, signature, args):
        address, n = args

        def body(i, best):
            value = _load(b, address, b.shl(i, _int(6)), _VF, 4)
            return [_call(b, "llvm.maxnum.v16f32", _VF, [best[0], value])]

        (best,) = _loop(b, b.lshr(n, _int(4)), body, [_floats(-3.0e38)])
        return _call(b, "llvm.vector.reduce.fmax.v16f32", _F32, [best])

    return types.float32(types.int64, types.int64), codegen


@intrinsic
def silu_product(typingctx, gate, up, n):
    """In place gate = gate * sigmoid(gate) * up over ``n`` floats."""

    def codegen(context, b, signature, args):
        gate, up, n = args

        def body(i, carried):
            at = b.shl(i, _int(6))
            g = _load(b, gate, at, _VF, 4)
            denominator = b.fadd(_floats(1.0), _exp(b, b.fsub(_floats(0.0), g)))
            _store(b, b.fmul(b.fdiv(g, denominator), _load(b, up, at, _VF, 4)), gate, at)
            return []

        _loop(b, b.lshr(n, _int(4)), body, [])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def scale_floats(typingctx, address, n, factor):
    """In place multiply ``n`` floats by ``factor``."""

    def codegen(context, b, signature, args):
        address, n, factor = args
        factor = _splat(b, factor, _VF)

        def body(i, carried):
            at = b.shl(i, _int(6))
            _store(b, b.fmul(_load(b, address, at, _VF, 4), factor), address, at)
            return []

        _loop(b, b.lshr(n, _int(4)), body, [])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32), codegen


@intrinsic
def quantize_row(typingctx, source, target, groups):
    """``groups`` >= 1 groups of 32 floats to records of int8: q = round(x / d), d = max |x| / 127 of the
    group.

    A record is X_RECORD bytes: q, then d and d * sum(q) in float32, then -128 * sum(q) in int32. NaN and
    infinity make d NaN or infinite, so they are not lost.
    """
    bytes16 = ir.VectorType(_I8, 16)

    def codegen(context, b, signature, args):
        source, target, groups = args

        def body(i, carried):
            at, record = b.shl(i, _int(7)), b.mul(i, _int(X_RECORD))
            values = [_load(b, source, b.add(at, _int(64 * h)), _VF, 4) for h in (0, 1)]
            # As integers, the bit patterns of non-negative floats are ordered, NaN above infinity.
            bits = [b.and_(b.bitcast(v, _VI), _ints(0x7FFFFFFF)) for v in values]
            larger = b.select(b.icmp_unsigned(">", bits[0], bits[1]), bits[0], bits[1])
            most = b.bitcast(_call(b, "llvm.vector.reduce.umax.v16i32", _I32, [larger]), _F32)
            tiny = b.fcmp_ordered("<", most, ir.Constant(_F32, 2.0**-100))
            zero = ir.Constant(_F32, 0.0)
            inverse = b.select(tiny, zero, b.fdiv(ir.Constant(_F32, 127.0), most))
            scale = b.select(tiny, zero, b.fdiv(most, ir.Constant(_F32, 127.0)))
            factor = _splat(b, inverse, _VF)
            whole = []
            for h, value in enumerate(values):
                rounded = _call(b, "llvm.rint.v16f32", _VF, [b.fmul(value, factor)])
                whole.append(b.fptosi(rounded, _VI))
                _store(b, b.trunc(whole[h], bytes16), target, b.add(record, _int(16 * h)))
            total = _call(b, "llvm.vector.reduce.add.v16i32", _I32, [b.add(whole[0], whole[1])])
            _store(b, scale, target, b.add(record, _int(32)))
            _store(b, b.fmul(scale, b.sitofp(total, _F32)), target, b.add(record, _int(36)))
            _store(b, b.mul(total, ir.Constant(_I32, -128)), target, b.add(record, _int(40)))
            return []

        _loop(b, groups, body, [])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def subtract_quantized(typingctx, values, records, groups):
    """In place values - d q of the records that :func:`quantize_row` made of them: what rounding left out."""

    def codegen(context, b, signature, args):
        values, records, groups = args

        def body(i, carried):
            at, record = b.shl(i, _int(7)), b.mul(i, _int(X_RECORD))
            scale = _splat(b, _load(b, records, b.add(record, _int(32)), _F32, 4), _VF)
            for h in (0, 1):
                q = _load(b, records, b.add(record, _int(16 * h)), ir.VectorType(_I8, 16), 4)
                here = b.add(at, _int(64 * h))
                value = _load(b, values, here, _VF, 4)
                left = _fma(b, b.fsub(_floats(-0.0), b.sitofp(q, _VF)), scale, value)
                _store(b, left, values, here)
            return []

        _loop(b, groups, body, [])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def address(typingctx, array):
    """Address of the first element of ``array`` as int64 (``ctypes.data`` is unsigned; unsigned + signed is
    float).
    """

    def codegen(context, b, signature, args):
        data = context.make_array(signature.args[0])(context, b, args[0]).data
        return b.ptrtoint(data, _I64)

    return types.int64(array), codegen


@intrinsic
def load_f32(typingctx, address):
    """The float32 at ``address``."""

    def codegen(context, b, signature, args):
        return _load(b, args[0], _int(0), _F32, 4)

    return types.float32(types.int64), codegen


@intrinsic
def load_bf16(typingctx, address):
    """The bfloat16 at ``address`` as float32."""

    def codegen(context, b, signature, args):
        bits = b.zext(_load(b, args[0], _int(0), _I16, 2), _I32)
        return b.bitcast(b.shl(bits, ir.Constant(_I32, 16)), _F32)

    return types.float32(types.int64), codegen


@intrinsic
def load_f16(typingctx, address):
    """The float16 at ``address`` as float32."""

    def codegen(context, b, signature, args):
        half = _load(b, args[0], _int(0), ir.VectorType(ir.HalfType(), 1), 2)
        return b.extract_element(b.fpext(half, ir.VectorType(_F32, 1)), ir.Constant(_I32, 0))

    return types.float32(types.int64), codegen


@intrinsic
def load_u8(typingctx, address):
    """The byte at ``address``."""

    def codegen(context, b, signature, args):
        return b.zext(_load(b, args[0], _int(0), _I8, 1), _I64)

    return types.int64(types.int64), codegen
