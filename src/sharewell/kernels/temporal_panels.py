"""The workspace of the temporal GEMM, and the packing of operand blocks into its panels.

Two panels of A, two of B, the tile and its accumulator lie in one allocation whose pages are all touched when
it is made: what the product takes is taken before it starts.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from .temporal_operands import Operand
from .temporal_plan import ALIGN, ITEM_BYTES, ROW_PAD, Chunk, GemmPlan, Step


class Workspace:
    """``capacity`` bytes, aligned to 64; :meth:`carve` hands out pieces of them from the start again."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._memory = np.empty(capacity, np.uint8)
        self._memory.fill(0)  # touch every page now: peak memory does not depend on what is multiplied
        self._start = -self._memory.ctypes.data % ALIGN

    def carve(self, shapes: list[tuple[tuple[int, ...], str]]) -> tuple[list[np.ndarray], int]:
        """Arrays of these shapes and types, and the bytes they take. Asserts that they fit."""
        at, out = self._start, []
        for shape, kind in shapes:
            count = int(np.prod(shape)) * ITEM_BYTES[kind]
            out.append(self._memory[at : at + count].view(kind).reshape(shape))
            at += -(-count // ALIGN) * ALIGN
        assert at <= self.capacity or not any(a.size for a in out), (at, self.capacity)
        return out, at


def _widen(target: np.ndarray, block: np.ndarray, element: str) -> None:
    """Copy with conversion, without a temporary of the block's size; bfloat16 bits become floats."""
    if element != "bfloat16":
        np.copyto(target, block, casting="unsafe")
    elif target.dtype == np.float32:
        np.left_shift(block, 16, out=target.view(np.uint32), dtype=np.uint32, casting="unsafe")
    else:
        np.copyto(target, (block.astype(np.uint32) << 16).view(np.float32))


def pack_a(panel: np.ndarray, block: np.ndarray, element: str) -> np.ndarray:
    """Rows ``[m, k]`` at the start of flat ``panel``, 64 bytes between them, k padded to even with zeros for
    int16 pairs; returns them."""
    m, k = block.shape
    padded = k + k % 2 if panel.dtype == np.int16 else k
    width = padded + ROW_PAD // panel.itemsize
    target = panel[: m * width].reshape(m, width)[:, :padded]
    _widen(target[:, :k], block, element)
    if padded > k:
        target[:, k] = 0
    return target


def pack_rows(panel: np.ndarray, block: np.ndarray, element: str) -> np.ndarray:
    """Contiguous rows ``[k, n]`` at the start of flat ``panel``, for BLAS; returns them."""
    target = panel[: block.size].reshape(block.shape)
    _widen(target, block, element)
    return target


def pack_b(panel: np.ndarray, block: np.ndarray, element: str, lanes: int) -> np.ndarray:
    """Panels ``[n / lanes, k, lanes]`` of a block ``[k, n]``, columns padded with zeros; int16:
    ``[n / lanes, k / 2, lanes, 2]``."""
    k, n = block.shape
    count, whole, rest = -(-n // lanes), n // lanes, n % lanes
    step = 2 if panel.dtype == np.int16 else 1
    depth = -(-k // step)
    target = panel[: count * depth * lanes * step].reshape(count, depth, lanes, step)
    for s in range(step):
        rows = block[s::step]
        here = target[:, : len(rows), :, s]
        if whole:
            _widen(
                here[:whole].transpose(1, 0, 2),
                rows[:, : whole * lanes].reshape(len(rows), whole, lanes),
                element,
            )
        if rest:
            _widen(here[whole, :, :rest], rows[:, whole * lanes :], element)
            here[whole, :, rest:] = 0
        if len(rows) < depth:
            target[:, depth - 1, :, s] = 0
    return target


@dataclass
class Slots:
    """Two panels of one operand and what they hold. Of two, the one not used last is filled next: with one
    step of look-ahead it is never the one that is being computed on."""

    panels: list[np.ndarray]
    keys: list[tuple[int, int] | None]
    views: list[np.ndarray]
    last: int = 1

    @classmethod
    def of(cls, panels: list[np.ndarray]) -> Slots:
        return cls(panels, [None, None], list(panels))

    def get(self, key: tuple[int, int], pack: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        if key in self.keys:
            self.last = self.keys.index(key)
        else:
            self.last = 1 - self.last
            self.keys[self.last] = None  # while it is being filled it holds nothing
            self.views[self.last] = pack(self.panels[self.last])
            self.keys[self.last] = key
        return self.views[self.last]


class Packer:
    """Reads and packs the panels of one step after another; counts the bytes read."""

    def __init__(
        self, plan: GemmPlan, a: Operand, b: Operand, slots_a: Slots, slots_b: Slots, plain: bool
    ) -> None:
        self.bytes_a = self.bytes_b = 0
        self._plan, self._a, self._b = plan, a, b
        self._slots_a, self._slots_b, self._plain = slots_a, slots_b, plain
        self._chunks = plan.chunks()
        # Worst cases of |sum of products|, where values decide whether int32 suffices.
        self._largest: dict[str, dict[tuple[int, int], int]] = {"A": {}, "B": {}}
        self._bound: dict[tuple[int, int], int] = {}

    def step(self, step: Step) -> tuple[np.ndarray, np.ndarray]:
        """Panels of A and B for ``step``. Raises what reading raises; OverflowError where int32 could
        overflow."""
        chunk = self._chunks[step.c]
        a = self._slots_a.get((step.i, step.c), lambda panel: self._pack_a(panel, step, chunk))
        b = self._slots_b.get((step.c, step.j), lambda panel: self._pack_b(panel, step, chunk))
        if self._plan.types.checked:
            self._check(step, chunk)
        return a, b

    def _pack_a(self, panel: np.ndarray, step: Step, chunk: Chunk) -> np.ndarray:
        block = self._a.read(step.i0, step.i1, chunk.start, chunk.stop)
        self.bytes_a += block.size * ITEM_BYTES[self._plan.types.a]
        if self._plan.types.checked:
            self._largest["A"][step.i, step.c] = _largest(block)
        return pack_a(panel, block, self._plan.types.a)

    def _pack_b(self, panel: np.ndarray, step: Step, chunk: Chunk) -> np.ndarray:
        block = self._b.read(chunk.start, chunk.stop, step.j0, step.j1)
        self.bytes_b += block.size * ITEM_BYTES[self._plan.types.b]
        if self._plan.types.checked:
            self._largest["B"][step.c, step.j] = _largest(block)
        if self._plain:
            return pack_rows(panel, block, self._plan.types.b)
        return pack_b(panel, block, self._plan.types.b, self._plan.types.lanes)

    def _check(self, step: Step, chunk: Chunk) -> None:
        tile = (step.i, step.j)
        largest = self._largest["A"][step.i, step.c] * self._largest["B"][step.c, step.j]
        bound = (0 if step.opens else self._bound.get(tile, 0)) + (chunk.stop - chunk.start) * largest
        self._bound[tile] = bound
        if bound >= 1 << 31:
            raise OverflowError(
                f"rows {step.i0}..{step.i1} times columns {step.j0}..{step.j1} could reach {bound}, "
                f"more than int32 "
                "holds: use dtype_acc='int64' or 'auto'"
            )


def _largest(block: np.ndarray) -> int:
    return max(int(block.max()), -int(block.min()))


class Prefetcher:
    """Packs one step ahead in a thread. Iterate over it; :meth:`done` after each step lets it reuse what that
    freed.

    ``ready`` of ``asked`` steps were packed by the time they were wanted. What reading raises comes out of
    the iteration; :meth:`close` joins the thread, and always must be called.
    """

    def __init__(self, steps: Iterator[Step], packer: Packer) -> None:
        self.ready = self.asked = 0
        self._packed: queue.SimpleQueue = queue.SimpleQueue()
        self._credits = threading.Semaphore(2)  # step s may be packed once step s - 2 is computed
        self._stop = False
        self._thread = threading.Thread(
            target=self._run, args=(steps, packer), name="temporal-gemm-prefetch", daemon=True
        )
        self._thread.start()

    def _run(self, steps: Iterator[Step], packer: Packer) -> None:
        try:
            for step in steps:
                self._credits.acquire()
                if self._stop:
                    return
                self._packed.put((step, *packer.step(step)))
            self._packed.put(None)
        except BaseException as error:  # handed to the caller, whatever it is
            self._packed.put(error)

    def __iter__(self) -> Iterator[tuple[Step, np.ndarray, np.ndarray]]:
        while True:
            self.asked += 1
            self.ready += not self._packed.empty()
            item = self._packed.get()
            if item is None:
                self.asked -= 1
                return
            if isinstance(item, BaseException):
                raise item
            yield item

    def done(self) -> None:
        self._credits.release()

    def close(self) -> None:
        self._stop = True
        self._credits.release()
        self._thread.join()
