"""Products of any size on one fixed workspace: the same block of memory, used over and over in time.

Source: Tempus, arXiv 2605.00536: one fixed block of cores walks a product of any size instead of growing with
it. This is the software equivalent on a CPU; the split of K, the orders, the resume file and the thresholds
are ours. The CUDA twin is :mod:`sharewell.kernels.temporal_triton`.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..bench import Progress, no_progress
from .temporal_operands import Operand, Result, as_operand
from .temporal_panels import Packer, Prefetcher, Slots, Workspace
from .temporal_plan import (
    ITEM_BYTES,
    ROW_PAD,
    GemmPlan,
    MachineRates,
    Source,
    Step,
    TemporalGemmConfig,
    Types,
    make_plan,
    resolve_types,
)
from .temporal_resume import TileBitmap

Epilogue = Callable[[np.ndarray], np.ndarray | None]
CHECKPOINTS = 64  # of a resumable product


@dataclass(frozen=True)
class GemmStats:
    """What a product did: element bytes read and written, workspace bytes used (at most those configured),
    and the share of steps whose panels were packed by the time they were wanted (None without prefetch)."""

    bytes_a: int
    bytes_b: int
    bytes_c: int
    peak_workspace: int
    overlap: float | None
    steps: int
    tiles_resumed: int = 0

    @property
    def bytes_moved(self) -> int:
        return self.bytes_a + self.bytes_b + self.bytes_c

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "bytes_moved": self.bytes_moved}


def measure_rates(engine: str = "numba") -> MachineRates:
    """Rates of this machine, measured in about 0.2 s: one product out of cache, one copy out of memory."""
    from ..bench import measure

    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((512, 512), np.float32) for _ in range(2))
    big = np.ones(4 << 20, np.float32)
    target = np.empty_like(big)
    gemm = TemporalGemm(TemporalGemmConfig(engine=engine, prefetch=False))  # type: ignore[arg-type]
    gemm(a, b)
    np.copyto(target, big)
    compute = measure(lambda: [gemm(a, b) for _ in range(5)]).wall_s / 5
    copy = measure(lambda: [np.copyto(target, big) for _ in range(5)]).wall_s / 5
    return MachineRates(2 * 512**3 / compute, big.nbytes / copy)


class TemporalGemm:
    """``gemm(A, B)`` = A @ B within ``cfg.workspace_bytes``, allocated here and never more.

    Results do not depend on threads, tile, order or workspace: every element is summed over the cascade
    segments of K in one order (``engine="numba"``). One product at a time: an instance is not for several
    threads at once.
    """

    def __init__(self, cfg: TemporalGemmConfig | None = None, rates: MachineRates | None = None) -> None:
        self.cfg = cfg or TemporalGemmConfig()
        self.rates = rates or MachineRates()
        self.stats: GemmStats | None = None
        self._workspace = Workspace(self.cfg.workspace_bytes)
        self._plans: dict[tuple, GemmPlan] = {}
        # BLAS sums as it likes, so only the panels' depth cuts K.
        self._plan_cfg = replace(self.cfg, cascade=1) if self.cfg.engine == "blas" else self.cfg

    def plan(self, m: int, n: int, k: int, dtype: Any = "float32") -> GemmPlan:
        """What ``[m, k] @ [k, n]`` of in-memory matrices of ``dtype`` would do."""
        name = dtype if isinstance(dtype, str) and dtype == "bfloat16" else np.dtype(dtype).name
        types = self.types(name, name, k)
        return self._plan(m, n, types, k, (Source(), Source()), types.result == types.accumulator)

    def types(self, a: str, b: str, k: int) -> Types:
        """Types that a product of ``a [M, k]`` and ``b [k, N]`` will have (names as "int8", "bfloat16").

        Raises TypeError for what cannot be multiplied.
        """
        pairs = True
        if self.cfg.engine == "numba":
            from .temporal_tiles import PAIRS as pairs  # noqa: N811
        return resolve_types(a, b, k, self.cfg.dtype_acc, self.cfg.engine, pairs)

    def _plan(
        self, m: int, n: int, types: Types, k: int, sources: tuple[Source, Source], may_spill: bool
    ) -> GemmPlan:
        key = (m, n, k, types, sources, may_spill)
        if key not in self._plans:
            if len(self._plans) >= 256:
                self._plans.clear()
            self._plans[key] = make_plan(
                m, n, k, types, self._plan_cfg, sources=sources, may_spill=may_spill, rates=self.rates
            )
        return self._plans[key]

    def __call__(
        self,
        a: Any,
        b: Any,
        out: Any = None,
        *,
        bias: np.ndarray | None = None,
        epilogue: Epilogue | None = None,
        progress: Progress = no_progress,
        resume: str | Path | None = None,
    ) -> Any:
        """``epilogue(A @ B + bias)`` for ``A [M, K]``, ``B [K, N]``; see :func:`as_operand` for what they may
        be.

        ``out``: array, memory-mapped file, torch tensor ``[M, N]`` or ``store(i0, i1, j0, j1, block)``; None
        makes an array (a tensor when A or B is one). ``bias`` ``[N]``. ``epilogue`` changes a finished tile
        ``[m, n]`` of the accumulator's type in place, or returns another of its shape. ``progress("gemm",
        tiles done, tiles)``. ``resume``: a file that remembers which tiles of ``out`` (a memory-mapped file)
        are done; it stays after a failure, the same call then goes on from it, and it is removed at the end.
        It knows operands and settings, not what ``epilogue`` does.

        Raises ValueError or TypeError naming shapes and dtypes, WorkspaceTooSmall, OverflowError where
        ``dtype_acc="int32"`` could overflow, ResumeError; what a ``Fetch`` raises goes through.
        """
        if getattr(getattr(a, "device", None), "type", "cpu") == "cuda":
            from .temporal_triton import triton_gemm

            if out is not None or resume is not None or epilogue is not None:
                raise ValueError("out, epilogue and resume must be None for CUDA tensors")
            return triton_gemm(a, b, bias=bias, programs=self.cfg.programs)
        left, right = as_operand(a, "A"), as_operand(b, "B")
        (m, k), (k_b, n) = left.shape, right.shape
        if k != k_b:
            raise ValueError(f"inner dimensions of A and B must be equal, got shapes {(m, k)} and {(k_b, n)}")
        types = self.types(left.element, right.element, k)
        if bias is not None and (np.ndim(bias) != 1 or len(bias) != n):
            raise ValueError(f"bias must have shape ({n},), got {np.shape(bias)}")
        if out is None:
            out = _new_output(a, b, (m, n), types.result)
        result = Result(out, (m, n), types.result, types.accumulator)
        for name, operand in (("A", left), ("B", right)):
            if result.overlaps(operand):
                raise ValueError(f"out must not share memory with {name}")
        if resume is not None and not result.on_disk:
            raise ValueError("out must be a memory-mapped file when resume is given")
        if m == 0 or n == 0:
            self.stats = GemmStats(0, 0, 0, 0, None, 0)
            return out
        spills = result.can_spill(types.accumulator) and resume is None
        # K = 0 is a sum of nothing: plan for one column of K, and read none of it.
        plan = self._plan(m, n, types, max(1, k), (left.source, right.source), spills)
        run = _Run(self.cfg, self._workspace, plan, left, right, result, bias, epilogue, progress)
        if k == 0:
            self.stats = run.empty()
        else:
            self.stats = run.go(self._open_bitmap(resume, plan, left, right, result, bias))
        return out

    def _open_bitmap(
        self,
        path: str | Path | None,
        plan: GemmPlan,
        a: Operand,
        b: Operand,
        result: Result,
        bias: np.ndarray | None,
    ) -> TileBitmap | None:
        if path is None:
            return None
        known = (plan.m, plan.n, plan.k, plan.types, plan.tile, plan.cascade, self.cfg.engine)
        digest = hashlib.blake2b(repr(known).encode(), digest_size=32)
        for part in (a.fingerprint(), b.fingerprint(), result.identity()):
            digest.update(part)
        digest.update(b"" if bias is None else np.ascontiguousarray(bias).tobytes())
        ni, nj, _ = plan.counts
        return TileBitmap.open(path, digest.digest(), ni * nj)


def _new_output(a: Any, b: Any, shape: tuple[int, int], result: str) -> Any:
    if any(type(x).__module__.split(".")[0] == "torch" for x in (a, b)) or result == "bfloat16":
        import torch

        return torch.empty(shape, dtype=getattr(torch, result))
    return np.empty(shape, result)


class _Run:
    """One product on a workspace."""

    def __init__(
        self,
        cfg: TemporalGemmConfig,
        workspace: Workspace,
        plan: GemmPlan,
        a: Operand,
        b: Operand,
        result: Result,
        bias: np.ndarray | None,
        epilogue: Epilogue | None,
        progress: Progress,
    ) -> None:
        self.cfg, self.plan, self.result, self.progress = cfg, plan, result, progress
        self.epilogue = epilogue
        types = plan.types
        self.bias = None if bias is None else np.asarray(bias).astype(types.accumulator, casting="same_kind")
        (m_t, n_t, k_t), self.blas = plan.tile, cfg.engine == "blas"
        width = n_t if self.blas else -(-n_t // types.lanes) * types.lanes
        depth = -(-k_t // 2) * 2
        rows = m_t * (depth + ROW_PAD // ITEM_BYTES[types.panel])
        panels = [((rows,), types.panel)] * 2 + [((depth * width,), types.panel)] * 2
        pieces, self.used = workspace.carve([*panels, *[((m_t * width,), types.accumulator)] * 2])
        self.tile_flat, self.partial_flat = pieces[4:]
        self.packer = Packer(plan, a, b, Slots.of(pieces[:2]), Slots.of(pieces[2:4]), self.blas)
        self.chunks = plan.chunks()
        slow = a.source.on_disk or b.source.on_disk
        self.prefetch = (slow or cfg.threads > 1) if cfg.prefetch == "auto" else cfg.prefetch
        if not self.blas:
            from .temporal_tiles import MULTIPLY

            self.multiply = MULTIPLY[types.panel]
        self.bytes_c = 0

    def empty(self) -> GemmStats:
        """The product with K = 0: zeros, bias and epilogue."""
        steps = [s for s in self.plan.steps() if s.opens]
        for step in steps:
            tile, _ = self._shapes(step)
            tile.fill(0)
            self._emit(step, tile)
        return GemmStats(0, 0, self.bytes_c, self.used, None, 0)

    def go(self, bitmap: TileBitmap | None) -> GemmStats:
        ni, nj, _ = self.plan.counts
        skip = self._verified(bitmap, nj) if bitmap is not None else set()
        done, total, number = len(skip), ni * nj, 0
        every = max(1, total // CHECKPOINTS)
        steps = (s for s in self.plan.steps() if (s.i, s.j) not in skip)
        prefetcher = Prefetcher(steps, self.packer) if self.prefetch else None
        pool = ThreadPoolExecutor(self.cfg.threads - 1, "temporal-gemm") if self.cfg.threads > 1 else None
        self.partial_flat.fill(0)
        packed: Iterator[tuple[Step, np.ndarray, np.ndarray]] = (
            iter(prefetcher) if prefetcher else ((s, *self.packer.step(s)) for s in steps)
        )
        try:
            for step, a, b in packed:
                tile, partial = self._shapes(step)
                if step.load:
                    self.result.read(step.i0, step.i1, step.j0, step.j1, tile[:, : step.j1 - step.j0])
                    self.bytes_c += self._tile_bytes(step)
                self._compute(step, a, b, tile, partial, pool)
                number += 1
                if step.spill:
                    self.result.write(step.i0, step.i1, step.j0, step.j1, tile[:, : step.j1 - step.j0])
                    self.bytes_c += self._tile_bytes(step)
                elif step.closes:
                    self._emit(step, tile)
                    done += 1
                    if bitmap is not None:
                        bitmap.mark(step.i * nj + step.j, self._check(step))
                        if done % every == 0 and done < total:
                            self._checkpoint(bitmap)
                    self.progress("gemm", done, total)
                if prefetcher:
                    prefetcher.done()
        except BaseException:
            if bitmap is not None:
                with suppress(OSError):  # a full disk must not hide what happened first
                    self._checkpoint(bitmap)
            raise
        finally:
            if prefetcher:
                prefetcher.close()
            if pool:
                pool.shutdown()
        if bitmap is not None:
            self.result.flush()
            bitmap.remove()
        overlap = prefetcher.ready / max(1, prefetcher.asked) if prefetcher else None
        return GemmStats(
            self.packer.bytes_a, self.packer.bytes_b, self.bytes_c, self.used + self.plan.staging_bytes,
            overlap, number, len(skip),
        )  # fmt: skip

    def _tile_bytes(self, step: Step) -> int:
        return (step.i1 - step.i0) * (step.j1 - step.j0) * self.result.item_bytes

    def _shapes(self, step: Step) -> tuple[np.ndarray, np.ndarray]:
        """Tile and accumulator of ``step``: ``[m, columns padded to whole panels]``."""
        m, n = step.i1 - step.i0, step.j1 - step.j0
        lanes = 1 if self.blas else self.plan.types.lanes
        width = -(-n // lanes) * lanes
        return self.tile_flat[: m * width].reshape(m, width), self.partial_flat[: m * width].reshape(m, width)

    def _compute(
        self, step: Step, a: np.ndarray, b: np.ndarray, tile: np.ndarray, partial: np.ndarray, pool: Any
    ) -> None:
        parts = self.chunks[step.c].parts
        if self.blas:
            np.matmul(a, b, out=tile if step.opens else partial)
            if not step.opens:
                np.add(tile, partial, out=tile)
            return
        m, lanes = len(tile), self.plan.types.lanes
        item, per = ITEM_BYTES[self.plan.types.panel], 2 if self.plan.types.panel == "int16" else 1
        columns = tile.shape[1] // lanes
        a_at, b_at, p_at = a.ctypes.data, b.ctypes.data, partial.ctypes.data
        lda, ldb, ldo = a.strides[0], b.shape[1] * 256, partial.shape[1] * partial.itemsize

        def block(r0: int, r1: int, c0: int, c1: int) -> None:
            for offset, length, ends, opens in parts:
                self.multiply(
                    a_at + r0 * lda + offset * item, lda, b_at + c0 * ldb + offset // per * 256, ldb,
                    -(-length // per), c1 - c0, r1 - r0, p_at + r0 * ldo + c0 * 256, ldo,
                )  # fmt: skip
                if ends:
                    total = tile[r0:r1, c0 * lanes : c1 * lanes]
                    here = partial[r0:r1, c0 * lanes : c1 * lanes]
                    if opens:
                        np.copyto(total, here)
                    else:
                        np.add(total, here, out=total)
                    here.fill(0)

        if pool is None:
            block(0, m, 0, columns)
            return
        blocks = list(_blocks(m, columns, self.cfg.threads, self.cfg.splits))
        futures = [pool.submit(block, *item) for item in blocks[1:]]
        block(*blocks[0])
        for future in futures:
            future.result()

    def _emit(self, step: Step, tile: np.ndarray) -> None:
        block = tile[:, : step.j1 - step.j0]
        if self.bias is not None:
            block += self.bias[step.j0 : step.j1]
        if self.epilogue is not None:
            changed = self.epilogue(block)
            if changed is not None:
                if np.shape(changed) != block.shape:
                    raise ValueError(f"epilogue must return shape {block.shape}, got {np.shape(changed)}")
                block = np.asarray(changed, block.dtype)
        self.result.write(step.i0, step.i1, step.j0, step.j1, block)
        self.bytes_c += self._tile_bytes(step)

    def _check(self, step: Step) -> int:
        """CRC-32 of the tile's bytes as they lie in the output."""
        check = 0
        for row in self.result.rows(step.i0, step.i1, step.j0, step.j1):
            check = zlib.crc32(np.ascontiguousarray(row).data, check)
        return check

    def _verified(self, bitmap: TileBitmap, nj: int) -> set[tuple[int, int]]:
        """Tiles that are done and still lie in the output as they were written."""
        firsts = (s for s in self.plan.steps() if s.opens and bitmap.done(s.i * nj + s.j))
        return {(s.i, s.j) for s in firsts if self._check(s) == bitmap.check(s.i * nj + s.j)}

    def _checkpoint(self, bitmap: TileBitmap) -> None:
        self.result.flush()
        bitmap.save()


def _blocks(m: int, columns: int, threads: int, splits: int) -> Iterator[tuple[int, int, int, int]]:
    """(r0, r1, c0, c1): the tile cut into ``splits`` column groups and as many row groups as occupy
    ``threads``."""
    splits = min(splits, columns)
    groups = max(1, min(-(-threads // splits), -(-m // 6)))
    height = -(-m // (6 * groups)) * 6
    for s in range(splits):
        c0, c1 = columns * s // splits, columns * (s + 1) // splits
        for r0 in range(0, m, height):
            yield r0, min(m, r0 + height), c0, c1
