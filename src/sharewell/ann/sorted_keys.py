"""A sorted array of (distance, node) pairs as 64-bit keys, with insertion by shifting eight keys at a time.

A key is the distance, as a whole number of the same order, above the node's number and one bit that says
whether the node was expanded: comparing keys compares distances, and equal distances by node. An array of
keys is given by the address of its first key; eight keys of :data:`LEAST` stand before that.
"""

# The intrinsics' outer functions are called by numba's typing pass, not as Python.
# pyright: reportArgumentType=false, reportCallIssue=false
from __future__ import annotations

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

GUARDS = 8  # keys of LEAST before the first: they end every insertion
LEAST = -(2**63)
EXPANDED = 1
_I1, _I8, _I32, _I64 = (ir.IntType(n) for n in (1, 8, 32, 64))
_F32 = ir.FloatType()
_KEYS = ir.VectorType(_I64, GUARDS)
_MASK = ir.VectorType(_I1, GUARDS)


def _flipped(b, bits):  # noqa: ANN001, ANN202
    """Of the bits of a float, the whole number of the same order; its own inverse."""
    sign = b.ashr(bits, ir.Constant(_I32, 31))
    return b.xor(bits, b.and_(sign, ir.Constant(_I32, 0x7FFFFFFF)))


@intrinsic
def key_of(typingctx, distance, node):  # noqa: ANN001, ANN201
    """The key of a node that is not expanded. NaN counts as infinitely far."""

    def codegen(context, b, signature, args):  # noqa: ANN001, ANN202
        distance, node = args
        known = b.fcmp_ordered("ord", distance, distance)
        distance = b.select(known, distance, ir.Constant(_F32, float("inf")))
        high = b.shl(b.sext(_flipped(b, b.bitcast(distance, _I32)), _I64), ir.Constant(_I64, 32))
        return b.or_(high, b.shl(b.zext(node, _I64), ir.Constant(_I64, 1)))

    return types.int64(types.float32, types.int32), codegen


@intrinsic
def key_distance(typingctx, key):  # noqa: ANN001, ANN201
    """The distance in a key."""

    def codegen(context, b, signature, args):  # noqa: ANN001, ANN202
        return b.bitcast(_flipped(b, b.trunc(b.ashr(args[0], ir.Constant(_I64, 32)), _I32)), _F32)

    return types.float32(types.int64), codegen


@intrinsic
def key_node(typingctx, key):  # noqa: ANN001, ANN201
    """The node in a key."""

    def codegen(context, b, signature, args):  # noqa: ANN001, ANN202
        return b.lshr(b.trunc(args[0], _I32), ir.Constant(_I32, 1))

    return types.int32(types.int64), codegen


@intrinsic
def load_key(typingctx, keys, at):  # noqa: ANN001, ANN201
    """The key at a place of the array."""

    def codegen(context, b, signature, args):  # noqa: ANN001, ANN202
        place = b.add(args[0], b.shl(args[1], ir.Constant(_I64, 3)))
        return b.load(b.inttoptr(place, _I64.as_pointer()))

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def store_key(typingctx, keys, at, key):  # noqa: ANN001, ANN201
    """Put a key at a place of the array."""

    def codegen(context, b, signature, args):  # noqa: ANN001, ANN202
        place = b.add(args[0], b.shl(args[1], ir.Constant(_I64, 3)))
        b.store(args[2], b.inttoptr(place, _I64.as_pointer()))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def insert_key(typingctx, keys, n, key):  # noqa: ANN001, ANN201
    """Insert into the first ``n`` keys, ascending; the place it got. What stood at place ``n`` is lost."""

    def codegen(context, b, signature, args):  # noqa: ANN001, ANN202
        keys, n, key = args
        undefined = ir.Constant(_KEYS, ir.Undefined)
        zeros = ir.Constant(ir.VectorType(_I32, GUARDS), [0] * GUARDS)
        wanted = b.shuffle_vector(b.insert_element(undefined, key, ir.Constant(_I32, 0)), undefined, zeros)
        kind = ir.FunctionType(ir.VoidType(), [_KEYS, _KEYS.as_pointer(), _I32, _MASK])
        store = cgutils.get_or_insert_function(b.module, kind, "llvm.masked.store.v8i64.p0")
        start = b.block
        loop, done = b.append_basic_block("shift"), b.append_basic_block("shifted")
        b.branch(loop)
        b.position_at_end(loop)
        end = b.phi(_I64)
        end.add_incoming(n, start)
        first = b.sub(end, ir.Constant(_I64, GUARDS))
        at = b.add(keys, b.shl(first, ir.Constant(_I64, 3)))
        block = b.load(b.inttoptr(at, _KEYS.as_pointer()))
        block.align = 8
        above = b.icmp_signed(">", block, wanted)
        moved = b.inttoptr(b.add(at, ir.Constant(_I64, 8)), _KEYS.as_pointer())
        b.call(store, [block, moved, ir.Constant(_I32, 8), above])
        bits = b.bitcast(above, _I8)
        end.add_incoming(first, loop)
        b.cbranch(b.icmp_unsigned("==", bits, ir.Constant(_I8, 255)), loop, done)
        b.position_at_end(done)
        place = b.sub(end, b.zext(b.ctpop(bits), _I64))
        b.store(key, b.inttoptr(b.add(keys, b.shl(place, ir.Constant(_I64, 3))), _I64.as_pointer()))
        return place

    return types.int64(types.int64, types.int64, types.int64), codegen
