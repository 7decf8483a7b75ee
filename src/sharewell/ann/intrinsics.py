"""What the graph kernels need of the machine and numba does not offer: vector distances, prefetch, atomics.

Each is a numba intrinsic that writes LLVM IR. Vectors are passed as addresses of rows that are padded with
zeros to whole blocks of 16 floats and aligned to 64 bytes, so there is no tail, no bounds check and no
wraparound of an index.
"""

# The intrinsics' outer functions are called by numba's typing pass, not as Python.
# pyright: reportArgumentType=false, reportCallIssue=false
from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

LANES = 16  # floats of one block
_I8, _I32, _I64 = (ir.IntType(n) for n in (8, 32, 64))
_F32 = ir.FloatType()
_VECTOR = ir.VectorType(_F32, LANES)
_BYTES = ir.VectorType(_I8, LANES)
_WORDS = ir.VectorType(ir.IntType(16), 32)
_WHOLE = ir.VectorType(_I32, LANES)
_UNROLL = 4  # independent sums: one alone would wait for the latency of every multiplication


def _at(b: Any, address: Any, kind: ir.Type) -> Any:
    return b.inttoptr(address, kind.as_pointer())


def _load_floats(b: Any, address: Any) -> Any:
    value = b.load(_at(b, address, _VECTOR))
    value.align = 64
    return value


def _load_bytes(b: Any, address: Any) -> Any:
    """Sixteen signed bytes as floats."""
    value = b.load(_at(b, address, _BYTES))
    value.align = 16
    return b.sitofp(b.sext(value, ir.VectorType(_I32, LANES)), _VECTOR)


def _fma(b: Any, x: Any, y: Any, z: Any) -> Any:
    kind = ir.FunctionType(_VECTOR, [_VECTOR] * 3)
    return b.call(cgutils.get_or_insert_function(b.module, kind, "llvm.fma.v16f32"), [x, y, z])


def _total(b: Any, vector: Any) -> Any:
    kind = ir.FunctionType(_F32, [_F32, _VECTOR])
    function = cgutils.get_or_insert_function(b.module, kind, "llvm.vector.reduce.fadd.v16f32")
    return b.call(function, [ir.Constant(_F32, 0.0), vector], fastmath=["reassoc"])


def _reduce(b: Any, x: Any, y: Any, blocks: Any, load_x: Any, x_bytes: int, squared: bool) -> Any:
    """Sum over ``blocks`` blocks of (x - y)^2 or x y, in _UNROLL interleaved sums and then one for the
    rest.
    """
    zero = ir.Constant(_VECTOR, [0.0] * LANES)
    sums = [cgutils.alloca_once_value(b, zero) for _ in range(_UNROLL)]
    for s in sums:
        b.store(zero, s)

    def step(block: Any, s: Any) -> None:
        xv = load_x(b, b.add(x, b.mul(block, ir.Constant(_I64, x_bytes))))
        yv = _load_floats(b, b.add(y, b.mul(block, ir.Constant(_I64, 4 * LANES))))
        if squared:
            xv = yv = b.fsub(xv, yv)
        b.store(_fma(b, xv, yv, b.load(s)), s)

    whole = b.lshr(blocks, ir.Constant(_I64, 2))
    with cgutils.for_range(b, whole) as loop:
        first = b.shl(loop.index, ir.Constant(_I64, 2))
        for j, s in enumerate(sums):
            step(b.add(first, ir.Constant(_I64, j)), s)
    done = b.shl(whole, ir.Constant(_I64, 2))
    with cgutils.for_range(b, b.sub(blocks, done)) as loop:
        step(b.add(done, loop.index), sums[0])
    a, c, d, e = (b.load(s) for s in sums)
    return _total(b, b.fadd(b.fadd(a, c), b.fadd(d, e)))


def _distance(load_x: Any, x_bytes: int, squared: bool) -> Any:
    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        x, y, blocks = args
        return _reduce(b, x, y, blocks, load_x, x_bytes, squared)

    return types.float32(types.int64, types.int64, types.int64), codegen


@intrinsic
def squared_distance(typingctx, x, y, blocks):  # noqa: ANN001, ANN201
    """sum (x - y)^2 of two rows of ``blocks`` blocks of floats, given by their addresses."""
    return _distance(_load_floats, 4 * LANES, True)


@intrinsic
def inner_product(typingctx, x, y, blocks):  # noqa: ANN001, ANN201
    """sum x y of two rows of ``blocks`` blocks of floats, given by their addresses."""
    return _distance(_load_floats, 4 * LANES, False)


@intrinsic
def inner_product_int8(typingctx, x, y, blocks):  # noqa: ANN001, ANN201
    """sum x y of a row of signed bytes (aligned to 16 bytes) and one of floats, given by their addresses."""
    return _distance(_load_bytes, LANES, False)


@intrinsic
def inner_product_int16(typingctx, x, y, blocks):  # noqa: ANN001, ANN201
    """sum x y as int32, of a row of signed bytes and one of int16 (aligned to 32 and 64 bytes), given by
    their addresses; ``blocks`` of 32. The caller sees to it that the sum fits.
    """

    def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
        x, y, blocks = args
        sums = [cgutils.alloca_once(b, _WHOLE) for _ in range(_UNROLL)]
        for s in sums:
            b.store(ir.Constant(_WHOLE, [0] * LANES), s)
        whole_instruction = "+avx512bw" in context.codegen().magic_tuple()[2]

        def step(block: Any, s: Any) -> None:
            xv = b.load(_at(b, b.add(x, b.shl(block, ir.Constant(_I64, 5))), ir.VectorType(_I8, 32)))
            yv = b.load(_at(b, b.add(y, b.shl(block, ir.Constant(_I64, 6))), _WORDS))
            xv.align, yv.align = 32, 64
            b.store(b.add(b.load(s), _pair_products(b, b.sext(xv, _WORDS), yv, whole_instruction)), s)

        whole = b.lshr(blocks, ir.Constant(_I64, 2))
        with cgutils.for_range(b, whole) as loop:
            first = b.shl(loop.index, ir.Constant(_I64, 2))
            for j, s in enumerate(sums):
                step(b.add(first, ir.Constant(_I64, j)), s)
        done = b.shl(whole, ir.Constant(_I64, 2))
        with cgutils.for_range(b, b.sub(blocks, done)) as loop:
            step(b.add(done, loop.index), sums[0])
        a, c, d, e = (b.load(s) for s in sums)
        kind = ir.FunctionType(_I32, [_WHOLE])
        function = cgutils.get_or_insert_function(b.module, kind, "llvm.vector.reduce.add.v16i32")
        return b.call(function, [b.add(b.add(a, c), b.add(d, e))])

    return types.int32(types.int64, types.int64, types.int64), codegen


def _pair_products(b: Any, x: Any, y: Any, whole_instruction: bool) -> Any:
    """x[2i] y[2i] + x[2i + 1] y[2i + 1] of 32 int16 each, as 16 int32."""
    if whole_instruction:
        kind = ir.FunctionType(_WHOLE, [_WORDS, _WORDS])
        name = "llvm.x86.avx512.pmaddw.d.512"
        return b.call(cgutils.get_or_insert_function(b.module, kind, name), [x, y])
    wide = ir.VectorType(_I32, 32)
    products = b.mul(b.sext(x, wide), b.sext(y, wide))
    even, odd = (ir.Constant(_WHOLE, list(range(first, 32, 2))) for first in (0, 1))
    undefined = ir.Constant(wide, ir.Undefined)
    return b.add(b.shuffle_vector(products, undefined, even), b.shuffle_vector(products, undefined, odd))


@intrinsic
def address(typingctx, array):  # noqa: ANN001, ANN201
    """Where the array's data begins."""

    def codegen(context, b, signature, args):  # noqa: ANN001, ANN202
        return b.ptrtoint(context.make_array(signature.args[0])(context, b, args[0]).data, _I64)

    return types.int64(array), codegen


@intrinsic
def pointer(typingctx, at, like):  # noqa: ANN001, ANN201
    """An address as a pointer to values of the type of ``like``."""
    kind = types.CPointer(like)

    def codegen(context, b, signature, args):  # noqa: ANN001, ANN202
        return b.inttoptr(args[0], context.get_value_type(kind))

    return kind(at, like), codegen


@intrinsic
def prefetch(typingctx, at):  # noqa: ANN001, ANN201
    """Ask for the cache line at an address; nothing waits for it."""

    def codegen(context, b, signature, args):  # noqa: ANN001, ANN202
        kind = ir.FunctionType(ir.VoidType(), [_I8.as_pointer(), _I32, _I32, _I32])
        function = cgutils.get_or_insert_function(b.module, kind, "llvm.prefetch.p0")
        read, keep, data = (ir.Constant(_I32, v) for v in (0, 3, 1))
        b.call(function, [_at(b, args[0], _I8), read, keep, data])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def compare_and_swap(typingctx, at, old, new):  # noqa: ANN001, ANN201
    """Atomically set the int32 at an address from ``old`` to ``new``; False when it was not ``old`` (acquire,
    release).
    """

    def codegen(context, b, signature, args):  # noqa: ANN001, ANN202
        result = b.cmpxchg(_at(b, args[0], _I32), args[1], args[2], "acq_rel", "monotonic")
        return b.extract_value(result, 1)

    return types.boolean(types.int64, types.int32, types.int32), codegen


@intrinsic
def store_release(typingctx, at, value):  # noqa: ANN001, ANN201
    """Store an int32; whoever loads it with :func:`load_acquire` sees everything that was written before."""

    def codegen(context, b, signature, args):  # noqa: ANN001, ANN202
        b.store_atomic(args[1], _at(b, args[0], _I32), "release", 4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int32), codegen


@intrinsic
def load_acquire(typingctx, at):  # noqa: ANN001, ANN201
    """Load the int32 at an address; see :func:`store_release`."""

    def codegen(context, b, signature, args):  # noqa: ANN001, ANN202
        return b.load_atomic(_at(b, args[0], _I32), "acquire", 4)

    return types.int32(types.int64), codegen


@intrinsic
def fetch_add(typingctx, at, value):  # noqa: ANN001, ANN201
    """Atomically add to the int32 at an address; what was there before."""

    def codegen(context, b, signature, args):  # noqa: ANN001, ANN202
        return b.atomic_rmw("add", _at(b, args[0], _I32), args[1], "acq_rel")

    return types.int32(types.int64, types.int32), codegen


# A thread that waits for a lock gives its core away: the holder may need it.
yield_core = types.ExternalFunction("sched_yield", types.int32())
