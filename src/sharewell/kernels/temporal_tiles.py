"""Micro-kernels of the temporal GEMM: packed panels times packed panels, on the calling thread, without the
GIL.

A panel is row-major ``[m, k]``; B is cut into panels of 256 bytes of columns (64 of four bytes, 32 of eight),
each ``[k, columns]``; 16-bit integers are packed in pairs along k. Every output element is one chain of fused
multiply-adds (or wrapping integer ones) over k, in order, so how rows and columns are grouped never shows in
the result.
"""

# The intrinsics' outer functions are called by numba's typing pass, not as Python.
# pyright: reportArgumentType=false, reportCallIssue=false
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import njit
from numba.core import types
from numba.extending import intrinsic

from .simd import _call, _int, _load, _loop, _rows, _store, tile_f32

_features = llvm.get_host_cpu_features()
WIDE = bool(_features.get("avx512f"))  # 32 vector registers: four vectors by six rows; else one by four
PAIRS = bool(_features.get("avx512bw"))  # multiply-add of 16-bit pairs
DEPTH = 256  # k of a B panel that stays in the inner caches while all rows pass over it

_F64 = ir.DoubleType()
_KINDS: dict[int, tuple[ir.Type, int]] = {0: (_F64, 8), 1: (ir.IntType(32), 16), 2: (ir.IntType(64), 8)}
_PAIR = 3  # int16 pairs into int32


def _broadcast(b: Any, scalar: Any, lanes: int) -> Any:
    undefined = ir.Constant(ir.VectorType(scalar.type, lanes), ir.Undefined)
    first = b.insert_element(undefined, scalar, ir.Constant(ir.IntType(32), 0))
    return b.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes))


@intrinsic(prefer_literal=True)
def _tile(typingctx, KIND, NB, ROWS, w, x, ldx, k, out, ldo):  # noqa: ANN001, ANN201, N803
    """out[t, lanes n + lane] += sum_k w[k, n, lane] x[t, k]: the twin of ``tile_f32`` for KIND 0 float64, 1
    int32, 2 int64, 3 int16 pairs into int32 (``k`` counts pairs). Addresses and strides in bytes; k >= 1."""
    kind, nb, rows = KIND.literal_value, NB.literal_value, ROWS.literal_value

    def codegen(context, b, signature, args):  # noqa: ANN001, ANN202
        _, _, _, w, x, ldx, k, out, ldo = args
        scalar, lanes = _KINDS[1 if kind == _PAIR else kind]
        vector = ir.VectorType(scalar, lanes)
        size = 8 if lanes == 8 else 4
        x_rows, out_rows = _rows(b, x, ldx, rows), _rows(b, out, ldo, rows)

        def step(acc: Any, weight: Any, value: Any) -> Any:
            if kind == 0:
                return _call(b, "llvm.fma.v8f64", vector, [weight, value, acc])
            if kind == _PAIR:
                shorts = ir.VectorType(ir.IntType(16), 32)
                pair = [b.bitcast(weight, shorts), b.bitcast(value, shorts)]
                return b.add(acc, _call(b, "llvm.x86.avx512.pmaddw.d.512", vector, pair))
            return b.add(acc, b.mul(weight, value))

        def body(i, accs):  # noqa: ANN001, ANN202
            weights = [_load(b, w, b.add(b.mul(i, _int(256)), _int(64 * n)), vector, 64) for n in range(nb)]
            new = []
            for t in range(rows):
                value = _broadcast(b, _load(b, x_rows[t], b.mul(i, _int(size)), scalar, size), lanes)
                new += [step(accs[t * nb + n], weights[n], value) for n in range(nb)]
            return new

        accs = [_load(b, out_rows[t], _int(64 * n), vector, size) for t in range(rows) for n in range(nb)]
        for j, acc in enumerate(_loop(b, k, body, accs)):
            _store(b, acc, out_rows[j // nb], _int(64 * (j % nb)))
        return context.get_dummy_value()

    return types.void(KIND, NB, ROWS, *[types.int64] * 6), codegen


# One function a kind: numba needs the kind as a literal, and compiles only what is used. (a, lda): rows of A;
# (b, ldb): first panel of B and bytes to the next; k in steps (pairs for int16); out, ldo.


@njit(nogil=True, cache=True)
def multiply_f32(a, lda, b, ldb, k, panels, rows, out, ldo):
    for start in range(0, k, DEPTH):
        depth = min(DEPTH, k - start)
        for p in range(panels):
            w, x, o, t = b + p * ldb + start * 256, a + start * 4, out + p * 256, 0
            if WIDE:
                while t + 6 <= rows:
                    tile_f32(4, 6, 1, 256, 0, w, 64, x + t * lda, lda, depth, o + t * ldo, ldo)
                    t += 6
                while t + 2 <= rows:
                    tile_f32(4, 2, 1, 256, 0, w, 64, x + t * lda, lda, depth, o + t * ldo, ldo)
                    t += 2
                if t < rows:
                    tile_f32(4, 1, 1, 256, 0, w, 64, x + t * lda, lda, depth, o + t * ldo, ldo)
            else:
                for n in range(0, 256, 64):
                    t = 0
                    while t + 4 <= rows:
                        tile_f32(1, 4, 1, 256, 0, w + n, 64, x + t * lda, lda, depth, o + n + t * ldo, ldo)
                        t += 4
                    while t < rows:
                        tile_f32(1, 1, 1, 256, 0, w + n, 64, x + t * lda, lda, depth, o + n + t * ldo, ldo)
                        t += 1


def _multiplier(kind: int, size: int) -> Callable[..., None]:
    """The function of ``kind`` (see ``_tile``); an element of A, or a pair of them, has ``size`` bytes."""

    @njit(nogil=True, cache=True)
    def multiply(a, lda, b, ldb, k, panels, rows, out, ldo):
        for start in range(0, k, DEPTH):
            depth = min(DEPTH, k - start)
            for p in range(panels):
                w, x, o, t = b + p * ldb + start * 256, a + start * size, out + p * 256, 0
                if WIDE:
                    while t + 6 <= rows:
                        _tile(kind, 4, 6, w, x + t * lda, lda, depth, o + t * ldo, ldo)
                        t += 6
                    while t < rows:
                        _tile(kind, 4, 1, w, x + t * lda, lda, depth, o + t * ldo, ldo)
                        t += 1
                else:
                    for n in range(0, 256, 64):
                        for t in range(rows):
                            _tile(kind, 1, 1, w + n, x + t * lda, lda, depth, o + n + t * ldo, ldo)

    return multiply


MULTIPLY: dict[str, Callable[..., None]] = {
    "float32": multiply_f32,
    "float64": _multiplier(0, 8),
    "int32": _multiplier(1, 4),
    "int64": _multiplier(2, 8),
    "int16": _multiplier(_PAIR, 4),
}
