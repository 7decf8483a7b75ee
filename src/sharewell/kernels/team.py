"""How the few threads of one compiled step share its work: phases, items and waiting.

A phase is over when its items are done, not when every thread has come by: a thread that the machine holds up
delays the others only while it has an item in hand, and catches up by passing over phases that are over. A
thread that waits spins for the time of an item, then offers its core to others, then sleeps.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba.core import types

from .compile import compiled
from .simd import _I32, _I64, _call, intrinsic
from .vectors import address

UNIT = 32  # output features of the smallest work item
SPINS = 400  # pauses before a waiting thread offers its core: tens of microseconds
YIELDS = 200  # offers before it sleeps
NAP_US = 20  # one sleep, in microseconds (the kernel adds about 50)


@intrinsic
def load_i64(typingctx, address):
    """The int64 at ``address``, read atomically (acquire)."""

    def codegen(context, b, signature, args):
        return b.load_atomic(b.inttoptr(args[0], _I64.as_pointer()), "acquire", 8)

    return types.int64(types.int64), codegen


@intrinsic
def fetch_add(typingctx, address, value):
    """Atomically add ``value`` to the int64 at ``address``; returns what was there before."""

    def codegen(context, b, signature, args):
        return b.atomic_rmw("add", b.inttoptr(args[0], _I64.as_pointer()), args[1], "acq_rel")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def pause(typingctx):
    """Tell the core that this is a waiting loop (x86; elsewhere nothing)."""

    def codegen(context, b, signature, args):
        if "x86" in b.module.triple:
            _call(b, "llvm.x86.sse2.pause", ir.VoidType(), [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def yield_core(typingctx):
    """Give the core to another thread (``sched_yield``)."""

    def codegen(context, b, signature, args):
        _call(b, "sched_yield", _I32, [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def nap(typingctx, microseconds):
    """Sleep (``usleep``)."""

    def codegen(context, b, signature, args):
        _call(b, "usleep", _I32, [b.trunc(args[0], _I32)])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@compiled()
def take(sync, phase):
    """The next item of ``phase`` that no thread has taken; the number of its items or more: none is left."""
    return fetch_add(address(sync) + 16 * phase, 1)


@compiled()
def finish(sync, phase):
    """An item of ``phase`` is done."""
    fetch_add(address(sync) + 16 * phase + 8, 1)


@compiled()
def complete(sync, phase, items):
    """Wait until all ``items`` of ``phase`` are done; the number of the next phase."""
    done = address(sync) + 16 * phase + 8
    waits = 0
    while load_i64(done) < items:
        waits += 1
        if waits < SPINS:
            pause()
        elif waits < SPINS + YIELDS:
            yield_core()
        else:
            nap(NAP_US)
    return phase + 1


@compiled()
def part(index, items, rows):
    """First row and row behind the last of item ``index`` when ``rows`` rows are cut into ``items``."""
    return rows * index // items, rows * (index + 1) // items


@compiled()
def work_item(index, units, threads):
    """Work item ``index`` over ``units`` units: (first unit, number), pairs first and singles last so that
    ``threads`` threads end together; number 0 when there is nothing left."""
    singles = units % 2 + (2 if units >= 4 and (units // 2) % threads else 0)
    pairs = (units - singles) // 2
    if index < pairs:
        return 2 * index, 2
    first = 2 * pairs + (index - pairs)
    return first, 1 if first < units else 0


@compiled()
def work_items(units, threads):
    """How many work items :func:`work_item` makes of ``units`` units."""
    singles = units % 2 + (2 if units >= 4 and (units // 2) % threads else 0)
    return (units - singles) // 2 + singles


def sync_words(phases: int) -> np.ndarray:
    """Counters of a step with ``phases`` phases. Each step needs new ones: a late thread may read the old."""
    return np.zeros(2 * phases, np.int64)
