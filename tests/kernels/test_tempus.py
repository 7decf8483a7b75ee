"""The temporal GEMM against exact integer products and float64, its plan against what it moves, its memory
against a limit, and what is left after every kind of interruption."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

import sharewell.cli
from sharewell.kernels.cli import parse_bytes
from sharewell.kernels.temporal_gemm import TemporalGemm, measure_rates
from sharewell.kernels.temporal_linear import TemporalLinear
from sharewell.kernels.temporal_operands import Fetch, open_safetensors
from sharewell.kernels.temporal_plan import (
    MachineRates,
    TemporalGemmConfig,
    WorkspaceTooSmall,
    chunk_count,
    chunks,
    resolve_types,
    segments,
)
from sharewell.kernels.temporal_resume import ResumeError, TileBitmap
from sharewell.kernels.temporal_triton import triton, triton_gemm

KIB, MIB = 1 << 10, 1 << 20
INTEGERS = ("int8", "uint8", "int16", "uint16", "int32")
FLOATS = ("float16", "float32", "float64")


def matrix(rng: np.random.Generator, shape: tuple[int, int], dtype: str) -> np.ndarray:
    if dtype in FLOATS:
        return rng.standard_normal(shape).astype(dtype)
    info = np.iinfo(dtype)
    low, high = max(info.min, -(1 << 30)), min(info.max, 1 << 30)
    return rng.integers(low, high, shape, endpoint=True).astype(dtype)


def assert_product(c: np.ndarray, a: np.ndarray, b: np.ndarray, result_eps: float | None = None) -> None:
    """Integers exactly; floats within 2 K eps of sum |a b|, plus the rounding of a narrower result."""
    if a.dtype.kind in "iu":
        assert np.array_equal(c, a.astype(np.int64) @ b.astype(np.int64))
        return
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    magnitude = np.abs(wide_a) @ np.abs(wide_b)
    eps = np.finfo(np.float64 if np.float64 in (a.dtype, b.dtype) else np.float32).eps
    bound = (2 * a.shape[1] * eps + (result_eps or np.finfo(c.dtype).eps)) * magnitude + 1e-7 * (
        c.dtype == np.float16
    )
    assert (np.abs(c - wide_a @ wide_b) <= bound).all()


def config(workspace: int = 8 * MIB, **more: Any) -> TemporalGemmConfig:
    return TemporalGemmConfig(workspace_bytes=workspace, **more)


# The product


def test_200_random_products_are_exact_and_stay_within_their_workspace() -> None:
    rng = np.random.default_rng(7)
    edges = [1, 2, 3, 5, 6, 7, 31, 63, 64, 65, 97, 127, 128, 129]
    for number in range(200):
        m, n = (int(rng.choice(edges)) if rng.random() < 0.6 else int(rng.integers(1, 200)) for _ in range(2))
        k = int(rng.choice([1, 2, 3, 7, 64, 511, 512, 513, 1024, 1031, 1537, int(rng.integers(1, 1700))]))
        dtype = str(rng.choice([*INTEGERS, *FLOATS]))
        order = str(rng.choice(["auto", "C"]))
        workspace = int(rng.choice([48 * KIB, 300 * KIB, 8 * MIB]))
        a, b = matrix(rng, (m, k), dtype), matrix(rng, (k, n), dtype)
        if number % 3 == 1:
            a, b = np.asfortranarray(a), matrix(rng, (n, k), dtype).T
        elif number % 3 == 2:
            a, b = matrix(rng, (2 * m, 3 * k), dtype)[::2, ::-3], matrix(rng, (k, 2 * n), dtype)[::-1, 1::2]
        gemm = TemporalGemm(config(workspace, order=order, cascade=int(rng.choice([1, 3, 8]))))  # type: ignore[arg-type]
        assert_product(gemm(a, b), a, b)
        assert gemm.stats is not None
        assert gemm.stats.peak_workspace <= workspace


def test_a_wide_flat_product_is_exact() -> None:
    rng = np.random.default_rng(1)
    a, b = matrix(rng, (8, 4096), "int8"), matrix(rng, (4096, 4096), "int8")
    assert np.array_equal(
        TemporalGemm()(a, b), (a.astype(np.float64) @ b.astype(np.float64)).astype(np.int64)
    )
    a, b = matrix(rng, (8, 4096), "float32"), matrix(rng, (4096, 4096), "float32")
    assert_product(TemporalGemm()(a, b), a, b)


@pytest.mark.parametrize("shape", [(3, 5), (0, 5), (3, 0), (0, 0)])
def test_a_sum_of_nothing_is_zero_plus_the_bias(shape: tuple[int, int]) -> None:
    m, n = shape
    bias = np.arange(n, dtype=np.float32)
    c = TemporalGemm()(np.ones((m, 0), np.float32), np.ones((0, n), np.float32), bias=bias)
    assert c.shape == shape
    assert np.array_equal(c, np.broadcast_to(bias, shape))


def test_the_bits_do_not_depend_on_threads_tile_order_workspace_or_prefetch() -> None:
    rng = np.random.default_rng(2)
    a, b = matrix(rng, (101, 2100), "float32"), matrix(rng, (2100, 150), "float32")
    expected = TemporalGemm()(a, b)
    assert_product(expected, a, b)
    variants = [
        *(config(order=order, tile=(17, 64, 600)) for order in "ABC"),
        *(config(threads=threads, splits=splits) for threads, splits in ((2, 1), (3, 2), (2, 5))),
        config(tile=(6, 64, 30)),
        config(tile=(101, 150, 2100)),
        config(64 * KIB),
        config(prefetch=True, tile=(12, 70, 300)),
        config(prefetch=False, threads=2, tile=(50, 128, 1100), order="B"),
    ]
    for cfg in variants:
        assert np.array_equal(TemporalGemm(cfg)(a, b), expected), cfg
    # A single row or column comes out as it does inside the whole.
    assert np.array_equal(TemporalGemm()(a[40:41], b), expected[40:41])
    assert np.array_equal(TemporalGemm()(a, b[:, 77:78]), expected[:, 77:78])


def test_blas_on_packed_panels_agrees_and_refuses_integers() -> None:
    rng = np.random.default_rng(3)
    for dtype in FLOATS:
        a, b = matrix(rng, (70, 900), dtype), matrix(rng, (900, 90), dtype)
        assert_product(TemporalGemm(config(256 * KIB, engine="blas"))(a, b), a, b)
    with pytest.raises(TypeError, match="engine 'blas' takes floats, got int8"):
        TemporalGemm(config(engine="blas"))(np.ones((2, 2), np.int8), np.ones((2, 2), np.int8))


def test_nan_and_infinity_come_out_where_numpy_puts_them() -> None:
    rng = np.random.default_rng(4)
    a, b = matrix(rng, (20, 70), "float32"), matrix(rng, (70, 67), "float32")
    a[3, 5], a[4, 6], b[7, 8], b[9, 10], b[6, 11] = np.nan, np.inf, -np.inf, np.nan, 0
    with np.errstate(invalid="ignore"):
        expected, c = a @ b, TemporalGemm()(a, b)
    for test in (np.isnan, np.isposinf, np.isneginf):
        assert np.array_equal(test(c), test(expected))
    assert np.isnan(c[4, 11])  # infinity times zero


def test_a_float16_result_overflows_to_infinity() -> None:
    a = np.full((2, 100), 100, np.float16)
    assert np.isposinf(TemporalGemm()(a, a.T)).all()
    out = np.empty((2, 2), np.float32)
    assert (TemporalGemm()(a, a.T, out) == 1e6).all()


def test_torch_tensors_of_every_float_type_and_their_mixture() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(33, 600, generator=generator), torch.randn(70, 600, generator=generator)
    for left, right in itertools.product((torch.bfloat16, torch.float32, torch.float16), repeat=2):
        x, y = a.to(left), b.to(right).t()
        c = TemporalGemm(config(100 * KIB))(x, y)
        assert c.dtype == (left if left == right else torch.float32)
        torch.testing.assert_close(c.double(), x.double() @ y.double(), rtol=1e-2, atol=0.3)
        if c.dtype == torch.float32:
            torch.testing.assert_close(c.double(), x.double() @ y.double(), rtol=1e-4, atol=1e-3)
    x = a.to(torch.bfloat16)
    assert torch.equal(TemporalGemm()(x, x.t()), TemporalGemm()(x.float(), x.float().t()).to(torch.bfloat16))


def test_bias_and_epilogue_apply_to_finished_tiles_once() -> None:
    rng = np.random.default_rng(5)
    a, b, bias = (
        matrix(rng, (40, 1300), "int8"),
        matrix(rng, (1300, 130), "int8"),
        np.arange(130, dtype=np.int32),
    )
    expected = np.maximum(a.astype(np.int64) @ b.astype(np.int64) + bias, 0)

    def relu_in_place(tile: np.ndarray) -> None:
        np.maximum(tile, 0, out=tile)

    for epilogue in (relu_in_place, lambda tile: np.maximum(tile, 0)):
        for order in "ABC":
            cfg = config(tile=(16, 64, 650), order=order)
            assert np.array_equal(TemporalGemm(cfg)(a, b, bias=bias, epilogue=epilogue), expected)
    with pytest.raises(ValueError, match="epilogue must return shape"):
        TemporalGemm()(a, b, epilogue=lambda tile: tile[:1])


def test_an_output_may_be_a_callable_or_an_array_of_any_strides() -> None:
    rng = np.random.default_rng(6)
    a, b = matrix(rng, (50, 40), "float32"), matrix(rng, (40, 90), "float32")
    expected = TemporalGemm()(a, b)
    got = np.zeros_like(expected)

    def store(i0: int, i1: int, j0: int, j1: int, block: np.ndarray) -> None:
        got[i0:i1, j0:j1] += block

    TemporalGemm(config(tile=(13, 17, 512)))(a, b, store)
    assert np.array_equal(got, expected)
    strided = np.zeros((180, 100), np.float32)[::2, ::2].T
    assert TemporalGemm()(a, b, strided) is strided
    assert np.array_equal(strided, expected)


def test_progress_counts_finished_tiles() -> None:
    seen: list[tuple[str, float, float]] = []
    a = np.ones((10, 3), np.float32)
    TemporalGemm(config(tile=(4, 5, 512)))(a, a.T, progress=lambda *said: seen.append(said))
    assert seen == [("gemm", done, 6) for done in range(1, 7)]


# The plan


@pytest.mark.parametrize("order", ["A", "B", "C"])
@pytest.mark.parametrize("shape", [(90, 200, 2100), (17, 64, 600), (200, 30, 1700), (30, 200, 100)])
def test_the_plan_moves_exactly_what_the_run_moves(order: Any, shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    rng = np.random.default_rng(8)
    a, b = matrix(rng, (m, k), "float32"), matrix(rng, (k, n), "float32")
    for tile in (
        (17, 64, 600),
        (50, 100, 1100),
        (200, 200, 2200),
        *([(20, 64, 300)] if order == "C" else []),
    ):
        gemm = TemporalGemm(config(order=order, tile=tile))
        plan = gemm.plan(m, n, k)
        assert_product(gemm(a, b), a, b)
        assert gemm.stats is not None
        counted = (gemm.stats.bytes_a, gemm.stats.bytes_b, gemm.stats.bytes_c, gemm.stats.steps)
        assert counted == (plan.bytes_a, plan.bytes_b, plan.bytes_c, plan.iterations)


def test_every_doubling_of_the_tile_halves_the_operand_traffic() -> None:
    moved = []
    for dim in (4, 8, 16, 32, 64, 128):
        plan = TemporalGemm(config(tile=(dim, dim, 512), order="C")).plan(512, 512, 512)
        assert plan.iterations == (512 // dim) ** 2
        # A is read once a column of tiles where it does not stay; here its panel stays for a row of tiles.
        assert plan.bytes_a == 512 * 512 * 4
        moved.append(plan.bytes_b)
    assert [a / b for a, b in itertools.pairwise(moved)] == [2.0] * 5


def test_a_tight_workspace_reads_more_and_a_wide_one_reads_once() -> None:
    tight, wide = (TemporalGemm(config(w)).plan(1000, 1000, 1000) for w in (200 * KIB, 64 * MIB))
    assert wide.bytes_moved == 3 * 1000 * 1000 * 4
    assert tight.bytes_moved > 2 * wide.bytes_moved
    assert tight.predicted_s > wide.predicted_s


def test_the_order_follows_the_shape() -> None:
    # A long thin product: A passes once in any order that the model may choose.
    plan = TemporalGemm(config()).plan(30_000, 64, 30_000, "int8")
    assert plan.bytes_a == 30_000 * 30_000
    assert plan.workspace_bytes <= 8 * MIB
    assert plan.types.accumulator == "int32"
    with pytest.raises(ValueError, match="use order C"):
        TemporalGemm(config(order="A", tile=(6, 64, 512)))(
            np.ones((9, 2048), np.float16), np.ones((2048, 200), np.float16)
        )


@given(st.integers(1, 40_000), st.integers(1, 40), st.integers(2, 9000))
def test_chunks_cover_k_once_and_never_cut_a_segment_unevenly(k: int, cascade: int, k_t: int) -> None:
    cut = segments(k, cascade)
    assert len(cut) <= cascade
    made = chunks(k, cascade, k_t)
    parts = [(c.start + offset, length, ends) for c in made for offset, length, ends, _ in c.parts]
    assert parts[0][0] == 0
    assert all(a + length == b for (a, length, _), (b, _, _) in itertools.pairwise(parts))
    assert parts[-1][0] + parts[-1][1] == k
    assert [start + length for start, length, ends in parts if ends] == [stop for _, stop in cut]
    assert all(c.stop - c.start <= max(k_t, 2) for c in made)
    assert chunk_count(cut, k_t) == len(made)


@given(
    st.integers(1, 3000),
    st.integers(1, 3000),
    st.integers(1, 6000),
    st.sampled_from(["float32", "int8", "float64"]),
)
@settings(max_examples=40)
def test_a_plan_fits_its_workspace_or_says_what_would(m: int, n: int, k: int, dtype: str) -> None:
    try:
        plan = TemporalGemm(config(40 * KIB)).plan(m, n, k, dtype)
        assert plan.workspace_bytes <= 40 * KIB
    except WorkspaceTooSmall as error:
        assert (
            TemporalGemm(config(error.needed_bytes)).plan(m, n, k, dtype).workspace_bytes
            <= error.needed_bytes
        )


def test_too_small_a_workspace_names_the_bytes_that_suffice() -> None:
    a = np.ones((50, 50), np.float32)
    with pytest.raises(
        WorkspaceTooSmall, match=r"workspace_bytes must be at least \d+ for a product 50x50 @ 50x50"
    ) as e:
        TemporalGemm(config(1000))(a, a)
    assert (TemporalGemm(config(e.value.needed_bytes))(a, a) == 50).all()
    with pytest.raises(WorkspaceTooSmall):
        TemporalGemm(config(e.value.needed_bytes - 1))(a, a)


def test_predicted_seconds_follow_measured_rates() -> None:
    rates = measure_rates()
    assert rates.flops_per_s > 1e8
    assert rates.bytes_per_s > 1e7
    slow = TemporalGemm(rates=MachineRates(rates.flops_per_s / 2, rates.bytes_per_s / 2)).plan(512, 512, 512)
    assert slow.predicted_s > TemporalGemm(rates=rates).plan(512, 512, 512).predicted_s > 0


# Types and overflow


def test_accumulators_hold_every_value_the_types_can_take() -> None:
    assert resolve_types("int8", "int8", 131_071).accumulator == "int32"
    assert resolve_types("int8", "int8", 131_072).accumulator == "int64"
    assert resolve_types("uint8", "uint8", 33_025).accumulator == "int32"
    assert resolve_types("uint8", "uint8", 33_026).accumulator == "int64"
    assert resolve_types("int16", "int16", 2).accumulator == "int64"
    k = 1000
    a = np.full((3, k), -128, np.int8)
    assert (TemporalGemm()(a, a.T) == 128 * 128 * k).all()
    b = np.full((3, k), 255, np.uint8)
    assert (TemporalGemm()(b, b.T) == 255 * 255 * k).all()
    c = np.full((3, k), -(1 << 15), np.int16)
    assert (TemporalGemm()(c, c.T) == (1 << 30) * k).all()


def test_int32_is_refused_only_where_the_values_could_overflow_it() -> None:
    small = np.full((3, 1001), 100, np.int16)
    gemm = TemporalGemm(config(dtype_acc="int32", tile=(2, 2, 512)))
    c = gemm(small, small.T)
    assert c.dtype == np.int32
    assert (c == 100 * 100 * 1001).all()
    large = np.full((3, 1001), -(1 << 15), np.int16)
    for k in (2, 1001):
        with pytest.raises(
            OverflowError, match=r"could reach \d+, more than int32 holds: use dtype_acc='int64'"
        ):
            gemm(large[:, :k], large[:, :k].T)
    assert (gemm(large[:, :1], large[:, :1].T) == 1 << 30).all()


@pytest.mark.parametrize(
    ("a", "b", "error", "message"),
    [
        (np.ones((2, 3)), np.ones((2, 3)), ValueError, r"equal, got shapes \(2, 3\) and \(2, 3\)"),
        (
            np.ones((2, 2, 3)),
            np.ones((3, 2)),
            ValueError,
            r"A must have 2 dimensions .* got shape \(2, 2, 3\)",
        ),
        (np.ones(3), np.ones((3, 2)), ValueError, "A must have 2 dimensions"),
        (np.ones((2, 3)), np.ones((3, 2), complex), TypeError, "B: dtype must be one of .* got complex128"),
        (
            np.ones((2, 3), np.int8),
            np.ones((3, 2)),
            TypeError,
            "both be integers or both floats, got int8 and float64",
        ),
        (np.ones((2, 3), np.uint64), np.ones((3, 2), np.uint64), TypeError, "got uint64"),
        (np.ones((2, 3), bool), np.ones((3, 2), bool), TypeError, "got bool"),
        (np.ones((2, 3), ">f4"), np.ones((3, 2), "f4"), TypeError, "native byte order"),
        ([[1.0]], np.ones((1, 2)), TypeError, "A must be an ndarray, .* got list"),
    ],
)
def test_what_cannot_be_multiplied_is_named(a: Any, b: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TemporalGemm()(a, b)


def test_outputs_that_cannot_hold_the_result_are_named() -> None:
    a = np.ones((2, 3), np.float32)
    gemm = TemporalGemm()
    with pytest.raises(ValueError, match=r"out must have shape \(2, 2\), got \(2, 3\)"):
        gemm(a, a.T, np.ones((2, 3), np.float32))
    with pytest.raises(ValueError, match="out must hold float32, got int32"):
        gemm(a, a.T, np.ones((2, 2), np.int32))
    locked = np.ones((2, 2), np.float32)
    locked.flags.writeable = False
    with pytest.raises(ValueError, match="out must be writeable"):
        gemm(a, a.T, locked)
    square = np.ones((3, 3), np.float32)
    with pytest.raises(ValueError, match="out must not share memory with B"):
        gemm(np.ones((3, 3), np.float32), square, square.T)
    with pytest.raises(ValueError, match=r"bias must have shape \(2,\), got \(3,\)"):
        gemm(a, a.T, bias=np.ones(3, np.float32))
    with pytest.raises(ValueError, match="out must be a memory-mapped file when resume is given"):
        gemm(a, a.T, np.ones((2, 2), np.float32), resume="x")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("tile", (1, 2), "tile must be None or three positive whole numbers"),
        ("tile", (0, 2, 3), "tile must be"),
        ("splits", 0, r"splits must be in \[1, 64\], got 0"),
        ("cascade", 0, r"cascade must be in \[1, 1024\]"),
        ("threads", -1, r"threads must be in \[1, 1024\]"),
        ("workspace_bytes", 0, "workspace_bytes must be a positive whole number, got 0"),
        ("dtype_acc", "int8", "dtype_acc must be one of auto, float32"),
        ("order", "D", "order must be auto, A, B or C, got 'D'"),
        ("engine", "mkl", "engine must be numba or blas"),
        ("prefetch", "no", "prefetch must be"),
        ("programs", 0, "programs must be in"),
    ],
)
def test_settings_out_of_range_are_named(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TemporalGemmConfig(**{field: value})


# Memory

MEMORY = """
import json, resource, sys
import numpy as np
from sharewell.kernels.temporal_gemm import TemporalGemm
from sharewell.kernels.temporal_plan import TemporalGemmConfig

def status(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name + ":"))

folder, dtype = sys.argv[1], sys.argv[3]
side, width, limit = (int(sys.argv[i]) for i in (2, 4, 5))
a = np.memmap(folder + "/a", dtype, "r", shape=(side, side))
b = np.memmap(folder + "/b", dtype, "r", shape=(side, width))
result = "int32" if dtype == "int8" else dtype
c = np.memmap(folder + "/c", result, "w+", shape=(side, width))
warm = np.ones((8, 8), dtype)
TemporalGemm(TemporalGemmConfig(workspace_bytes=1 << 20, prefetch=True))(warm, warm)
peak = [0]
before = status("RssAnon")
if limit:
    resource.setrlimit(resource.RLIMIT_DATA, (status("VmData") + limit,) * 2)
gemm = TemporalGemm(TemporalGemmConfig(workspace_bytes=8 << 20))
gemm(a, b, c, progress=lambda *_: peak.__setitem__(0, max(peak[0], status("RssAnon"))))
refused = False
try:
    np.fromfile(folder + "/a", dtype)
except MemoryError:
    refused = True
print(json.dumps({"extra": peak[0] - before, "refused": refused, "workspace": gemm.stats.peak_workspace}))
"""


def measured_memory(folder: Path, side: int, dtype: str, width: int, limit: int = 0) -> dict[str, Any]:
    command = [sys.executable, "-c", MEMORY, str(folder), str(side), dtype, str(width), str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_extra_memory_is_the_same_for_256_and_1024_and_a_file_of_100_megabytes(tmp_path: Path) -> None:
    rng = np.random.default_rng(9)
    extra = {}
    for side in (256, 1024):
        a, b = matrix(rng, (side, side), "float32"), matrix(rng, (side, side), "float32")
        a.tofile(tmp_path / "a")
        b.tofile(tmp_path / "b")
        said = measured_memory(tmp_path, side, "float32", side)
        assert_product(np.fromfile(tmp_path / "c", np.float32).reshape(side, side), a, b)
        extra[side] = said["extra"]
    side, width = 10_000, 64
    with (tmp_path / "a").open("wb") as file:
        file.truncate(side * side)  # zeros that take no disk, but rows to check
    big = np.memmap(tmp_path / "a", np.int8, "r+", shape=(side, side))
    rows = [0, 1, 4999, 5000, 9998, 9999]
    big[rows] = matrix(rng, (len(rows), side), "int8")
    big.flush()
    b = matrix(rng, (side, width), "int8")
    b.tofile(tmp_path / "b")
    said = measured_memory(tmp_path, side, "int8", width, limit=48 * MIB)
    assert said["refused"]  # loading A is more than this process may have
    c = np.fromfile(tmp_path / "c", np.int32).reshape(side, width)
    assert np.array_equal(c[rows], big[rows].astype(np.int64) @ b.astype(np.int64))
    assert not c[2:4999].any()
    extra[side] = said["extra"]
    assert said["workspace"] <= 8 * MIB
    assert max(extra.values()) - min(extra.values()) <= MIB, extra
    assert max(extra.values()) <= 10 * MIB, extra


# Files, callables, faults


def test_memory_mapped_operands_and_output(tmp_path: Path) -> None:
    rng = np.random.default_rng(10)
    a, b = matrix(rng, (300, 700), "float32"), matrix(rng, (700, 200), "float32")
    np.save(tmp_path / "a.npy", a)
    np.save(tmp_path / "b.npy", b)
    left, right = (np.load(tmp_path / name, mmap_mode="r") for name in ("a.npy", "b.npy"))
    out = np.lib.format.open_memmap(tmp_path / "c.npy", "w+", "float32", (300, 200))
    gemm = TemporalGemm(config(200 * KIB))
    gemm(left, right, out)
    assert np.array_equal(np.load(tmp_path / "c.npy"), TemporalGemm()(a, b))
    assert gemm.stats is not None
    assert gemm.stats.overlap is not None  # read in the prefetch thread


def test_safetensors_matrices_and_slices_larger_than_the_workspace(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    path = tmp_path / "w.safetensors"
    w = {
        t: torch.randn(300, 500, generator=generator).to(getattr(torch, t))
        for t in ("float32", "bfloat16", "float16")
    }
    w["vector"] = torch.randn(500)
    save_file(w, path)
    x = torch.randn(20, 500, generator=generator)
    for name in ("float32", "bfloat16", "float16"):
        expected = TemporalGemm()(x, w[name].t())
        gemm = TemporalGemm(config(96 * KIB))
        assert torch.equal(gemm(x, open_safetensors(path, name).T), expected)
        with safe_open(str(path), "pt") as file:
            y = TemporalGemm(config(96 * KIB))(file.get_slice(name), x.t().contiguous())
        assert torch.equal(y.t(), expected)
    with pytest.raises(ValueError, match=r"w.safetensors has no tensor 'q'; it has bfloat16"):
        open_safetensors(path, "q")
    with pytest.raises(ValueError, match="'vector' must have 2 dimensions"):
        open_safetensors(path, "vector")


@given(data=st.data())
@settings(max_examples=60)
def test_a_damaged_safetensors_header_is_refused_or_read_inside_the_file(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("st") / "w.safetensors"
    save_file({"w": torch.arange(12.0).reshape(3, 4)}, path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, 71))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        operand = open_safetensors(path, "w")
    except ValueError:
        return
    rows, columns = operand.shape
    assert operand.read(0, rows, 0, columns).shape == (rows, columns)


def test_a_fetch_that_returns_something_else_is_named() -> None:
    a = np.ones((4, 6), np.float32)
    for wrong, message in (
        (
            lambda *_: np.ones((1, 1), np.float32),
            r"must return float32 of shape \(4, 6\), got float32 of shape \(1, 1\)",
        ),
        (lambda i0, i1, j0, j1: np.ones((i1 - i0, j1 - j0)), "must return float32 .* got float64"),
    ):
        with pytest.raises(ValueError, match=message):
            TemporalGemm()(Fetch(wrong, (4, 6), "float32"), a.T)
    with pytest.raises(ValueError, match="shape must be two whole numbers"):
        Fetch(lambda *_: None, (4, -1), "float32")


class Source:
    """A matrix behind a callable that counts what it gives and fails on demand."""

    def __init__(self, array: np.ndarray, fail_after: int | None = None) -> None:
        self.array, self.fail_after, self.calls = array, fail_after, 0

    def __call__(self, i0: int, i1: int, j0: int, j1: int) -> np.ndarray:
        self.calls += 1
        if self.fail_after is not None and self.calls > self.fail_after:
            raise OSError("the disk is gone")
        return self.array[i0:i1, j0:j1]


def prefetch_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("temporal-gemm")]


def resumable(
    tmp_path: Path, a: np.ndarray, b: np.ndarray, fail_after: int | None, mode: str
) -> tuple[Source, Any]:
    source = Source(a, fail_after)
    out = np.memmap(tmp_path / "c", np.float32, mode, shape=(len(a), b.shape[1]))  # type: ignore[call-overload]
    gemm = TemporalGemm(config(tile=(10, 64, 512), order="C"))
    gemm(Fetch(source, a.shape, a.dtype, key="a-1"), b, out, resume=tmp_path / "c.resume")
    return source, gemm.stats


def test_a_failed_fetch_leaves_a_resume_index_from_which_a_rerun_goes_on(tmp_path: Path) -> None:
    rng = np.random.default_rng(11)
    a, b = matrix(rng, (200, 1024), "float32"), matrix(rng, (1024, 60), "float32")
    expected = TemporalGemm()(a, b)
    with pytest.raises(OSError, match="the disk is gone"):
        resumable(tmp_path, a, b, fail_after=31, mode="w+")
    assert prefetch_threads() == []
    assert (tmp_path / "c.resume").exists()
    source, stats = resumable(tmp_path, a, b, None, "r+")
    assert 5 <= stats.tiles_resumed <= 19
    assert source.calls == (20 - stats.tiles_resumed) * 2  # two chunks of K for each tile that was missing
    assert np.array_equal(np.fromfile(tmp_path / "c", np.float32).reshape(expected.shape), expected)
    assert not (tmp_path / "c.resume").exists()


def test_a_done_tile_that_was_changed_is_computed_again(tmp_path: Path) -> None:
    rng = np.random.default_rng(12)
    a, b = matrix(rng, (200, 1024), "float32"), matrix(rng, (1024, 60), "float32")
    with pytest.raises(OSError):
        resumable(tmp_path, a, b, fail_after=30, mode="w+")
    content = bytearray((tmp_path / "c").read_bytes())
    content[101] ^= 4
    (tmp_path / "c").write_bytes(content)
    _, stats = resumable(tmp_path, a, b, None, "r+")
    assert stats.tiles_resumed >= 5
    assert np.array_equal(np.fromfile(tmp_path / "c", np.float32).reshape(200, 60), TemporalGemm()(a, b))


def test_a_resume_index_of_another_product_is_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(13)
    a, b = matrix(rng, (200, 1024), "float32"), matrix(rng, (1024, 60), "float32")
    with pytest.raises(OSError):
        resumable(tmp_path, a, b, fail_after=30, mode="w+")
    with pytest.raises(ResumeError, match=r"c.resume belongs to another product"):
        resumable(tmp_path, a, b + 1, None, "r+")
    with pytest.raises(ValueError, match="key must be given to Fetch"):
        out = np.memmap(tmp_path / "c", np.float32, "r+", shape=(200, 60))
        TemporalGemm()(Fetch(Source(a), a.shape, a.dtype), b, out, resume=tmp_path / "c.resume")


KILLED = """
import os, signal, sys
import numpy as np
from sharewell.kernels.temporal_gemm import TemporalGemm
from sharewell.kernels.temporal_plan import TemporalGemmConfig
folder = sys.argv[1]
a, b = np.load(folder + "/a.npy", mmap_mode="r"), np.load(folder + "/b.npy", mmap_mode="r")
out = np.memmap(folder + "/c", np.float32, sys.argv[2], shape=(a.shape[0], b.shape[1]))
gemm = TemporalGemm(TemporalGemmConfig(tile=(3, 64, 512), order="C"))
def progress(what, done, total):
    if sys.argv[2] == "w+" and done == 50:
        os.kill(os.getpid(), signal.SIGKILL)
gemm(a, b, out, resume=folder + "/c.resume", progress=progress)
print(gemm.stats.tiles_resumed)
"""


def test_a_killed_process_is_continued_with_the_same_bits(tmp_path: Path) -> None:
    rng = np.random.default_rng(14)
    a, b = matrix(rng, (210, 600), "float32"), matrix(rng, (600, 60), "float32")
    np.save(tmp_path / "a.npy", a)
    np.save(tmp_path / "b.npy", b)
    first = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), "w+"], timeout=120, check=False)
    assert first.returncode == -signal.SIGKILL
    command = [sys.executable, "-c", KILLED, str(tmp_path), "r+"]
    second = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert second.returncode == 0, second.stderr
    assert 45 <= int(second.stdout) <= 50
    assert np.array_equal(np.fromfile(tmp_path / "c", np.float32).reshape(210, 60), TemporalGemm()(a, b))


def test_ctrl_c_joins_all_threads() -> None:
    array = np.ones((600, 500), np.float32)

    def fetch(i0: int, i1: int, j0: int, j1: int) -> np.ndarray:
        if i0 >= 300:
            os.kill(os.getpid(), signal.SIGINT)  # as the terminal does
            threading.Event().wait(0.3)
        return array[i0:i1, j0:j1]

    gemm = TemporalGemm(config(tile=(20, 64, 512), threads=3))
    with pytest.raises(KeyboardInterrupt):
        gemm(Fetch(fetch, (600, 500), "float32"), np.ones((500, 100), np.float32))
    assert prefetch_threads() == []
    assert (gemm(array, array.T) == 500).all()  # and the workspace is as good as new


@given(tiles=st.integers(0, 70), digest=st.binary(min_size=32, max_size=32), data=st.data())
@settings(max_examples=150)
def test_a_flipped_or_cut_byte_of_a_resume_file_is_detected(
    tiles: int, digest: bytes, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("resume") / "c.resume"
    bitmap = TileBitmap(path, digest, tiles)
    for tile in data.draw(st.sets(st.integers(0, tiles - 1))) if tiles else ():
        bitmap.mark(tile, data.draw(st.integers(0, 2**32 - 1)))
    bitmap.save()
    again = TileBitmap.open(path, digest, tiles)
    assert again.to_bytes() == bitmap.to_bytes()
    assert [again.done(t) for t in range(tiles)] == [bitmap.done(t) for t in range(tiles)]
    content = bytearray(path.read_bytes())
    where = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[where] ^= data.draw(st.integers(1, 255))
    else:
        content = content[:where]
    path.write_bytes(content)
    with pytest.raises(ResumeError, match="is damaged"):
        TileBitmap.open(path, digest, tiles)


@given(st.binary(max_size=200))
def test_any_bytes_are_refused_as_a_resume_file(content: bytes) -> None:
    from sharewell.kernels.temporal_resume import _parse

    with pytest.raises(ResumeError):
        _parse(content, "x")


def test_double_buffering_finds_panels_ready_and_none_are_without_it() -> None:
    a = np.ones((600, 600), np.float32)
    for prefetch, expected in ((True, float), (False, type(None))):
        gemm = TemporalGemm(config(tile=(60, 128, 512), prefetch=prefetch))
        gemm(a, a)
        assert gemm.stats is not None
        assert type(gemm.stats.overlap) is expected


# The layer


def test_a_streamed_layer_equals_the_layer_and_its_gradients(tmp_path: Path) -> None:
    torch.manual_seed(0)  # noqa: TID251
    linear = torch.nn.Linear(300, 170)
    x = torch.randn(2, 5, 300, requires_grad=True)
    y = linear(x)
    (grad_x, grad_bias) = torch.autograd.grad(y.square().sum(), (x, linear.bias))
    save_file({"w": linear.weight.detach(), "b": linear.bias.detach()}, tmp_path / "l.safetensors")
    cfg = config(64 * KIB)
    for layer in (
        TemporalLinear.from_linear(linear, cfg),
        TemporalLinear.from_safetensors(tmp_path / "l.safetensors", "w", "b", cfg),
        TemporalLinear(
            Fetch(Source(linear.weight.detach().numpy()), (170, 300), "float32"), linear.bias, cfg
        ),
    ):
        streamed = layer(x)
        torch.testing.assert_close(streamed, y, rtol=1e-5, atol=1e-5)
        assert layer.bias is not None
        ours = torch.autograd.grad(streamed.square().sum(), (x, layer.bias))
        torch.testing.assert_close(ours, (grad_x, grad_bias), rtol=1e-4, atol=1e-3)
        assert [name for name, _ in layer.named_parameters()] == ["bias"]
    with pytest.raises(ValueError, match=r"x must have shape \[..., 300\], got \(4, 3\)"):
        TemporalLinear.from_linear(linear)(torch.ones(4, 3))
    with pytest.raises(ValueError, match=r"bias must have shape \(170,\)"):
        TemporalLinear(linear.weight, torch.ones(3))
    with pytest.raises(TypeError, match="weight must hold floats, got int8"):
        TemporalLinear(np.ones((3, 3), np.int8))


# CUDA

INTERPRETED = """
import torch
from sharewell.kernels.temporal_triton import triton_gemm
generator = torch.Generator().manual_seed(0)
for dtype in (torch.float32, torch.float16, torch.int8):
    for m, n, k in ((33, 50, 70), (64, 64, 1100), (1, 1, 1), (35, 33, 0)):
        a, b = (20 * torch.randn(s, generator=generator).clamp(-5, 5) for s in ((m, k), (n, k)))
        a, b = a.to(dtype), b.to(dtype).t()
        bias = torch.arange(n).to(torch.int32 if dtype == torch.int8 else dtype)
        c = triton_gemm(a, b, bias=bias, programs=3, tile=(32, 32, 32))
        assert torch.equal(c, triton_gemm(a, b, bias=bias, programs=1, tile=(32, 32, 32)))
        exact = a.double() @ b.double() + bias
        bound = 0 if dtype == torch.int8 else 2e-3 * (a.double().abs() @ b.double().abs() + bias.abs())
        assert ((c.double() - exact).abs() <= bound).all(), (dtype, m, n, k)
"""


def test_the_cuda_kernel_agrees_under_tritons_interpreter_or_says_what_it_needs() -> None:
    a = torch.ones(2, 2)
    if triton is None:
        with pytest.raises(
            ModuleNotFoundError, match="triton is not installed: it comes with the CUDA builds"
        ):
            triton_gemm(a, a)
        return
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    with pytest.raises(TypeError, match=r"got torch.float64"):
        triton_gemm(a.double(), a.double())
    with pytest.raises(ValueError, match="tile must be three powers of two"):
        triton_gemm(a, a, tile=(3, 16, 16))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_sixteen_programs_give_the_product_on_a_gpu() -> None:
    a, b = torch.randn(1000, 1500, device="cuda"), torch.randn(1500, 900, device="cuda")
    c = triton_gemm(a, b)
    assert torch.equal(c, triton_gemm(a, b, programs=3))
    torch.testing.assert_close(c.double(), a.double() @ b.double(), rtol=1e-4, atol=1e-3)


# The command


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """``sharewell gemm ...``: (exit code, standard output, standard error)."""
    if all(c.name != "gemm" for c in sharewell.cli.COMMANDS):
        entry = sharewell.cli.LazyCommand("gemm", "sharewell.kernels.cli", "app", "Products.", "kernels")
        monkeypatch.setattr(sharewell.cli, "COMMANDS", (*sharewell.cli.COMMANDS, entry))

    def run(*arguments: object) -> tuple[int, str, str]:
        code = sharewell.cli.main(["gemm", *map(str, arguments)])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def test_the_command_plans_runs_resumes_and_measures(command: Any, tmp_path: Path) -> None:
    code, out, _ = command(
        "plan", "--m", 3000, "--n", 64, "--k", 3000, "--dtype", "int8", "--workspace", "1MB", "--json"
    )
    assert code == 0
    assert json.loads(out)["workspace_bytes"] <= 1_000_000
    code, out, _ = command("plan", "--m", 100)
    assert (code, "predicted" in out) == (0, True)
    rng = np.random.default_rng(15)
    a, b = matrix(rng, (300, 200), "int8"), matrix(rng, (200, 100), "int8")
    np.save(tmp_path / "a.npy", a)
    np.save(tmp_path / "b.npy", b)
    np.save(tmp_path / "bt.npy", np.ascontiguousarray(b.T))
    for arguments in (("b.npy",), ("bt.npy", "--transpose-b")):
        name, *more = arguments
        code, out, err = command(
            "run", tmp_path / "a.npy", tmp_path / name, tmp_path / "c.npy", "--json", *more
        )
        assert code == 0, err
        assert json.loads(out)["dtype"] == "int32"
        assert np.array_equal(np.load(tmp_path / "c.npy"), a.astype(np.int64) @ b.astype(np.int64))
    code, out, _ = command("bench", "--m", 64, "--n", 64, "--k", 64, "--repeats", 2, "--json")
    assert code == 0
    assert json.loads(out)["gflops"]["numpy"] > 0


def test_mistakes_on_the_command_line_end_in_one_line(command: Any, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ones((3, 4), np.float32))
    np.save(tmp_path / "i.npy", np.ones((4, 4), np.int8))
    (tmp_path / "bad.npy").write_bytes(b"no array")
    a, c = tmp_path / "a.npy", tmp_path / "c.npy"
    for arguments, message in (
        (("run", a, a, c), "inner dimensions of A and B must be equal"),
        (("run", a, tmp_path / "i.npy", c), "both be integers or both floats"),
        (("run", a, tmp_path / "bad.npy", c), "is no .npy file"),
        (("run", a, tmp_path / "none.npy", c), "none.npy"),
        (("run", a, "x.txt", c), "a matrix must be FILE.npy or FILE.safetensors:NAME"),
        (("run", a, a, tmp_path / "c.bin"), "OUT must be a .npy file"),
        (("plan", "--workspace", "8 parsecs"), "a size must be a number"),
        (("plan", "--workspace", "100"), "workspace_bytes must be at least"),
        (("plan", "--dtype", "complex64"), "got complex64"),
        (("plan", "--dtype", "nonsense"), "nonsense"),
        (("plan", "--m", 0), "--m"),
        (("bench", "--dtype", "int8"), "--dtype must be float32 or float64"),
        (("aie", "--dtype", "int8"), "dtype must be int16 or int32"),
        (("aie", "--m", 7), "DIM_A must divide M"),
    ):
        code, _, err = command(*arguments)
        assert code == 2, (arguments, err)
        assert message in err
        assert err.count("\n") == 1
    assert not c.exists()


@pytest.mark.parametrize(
    ("text", "count"), [("8MiB", 8 << 20), ("64 MB", 64_000_000), ("1.5kb", 1500), ("77", 77)]
)
def test_sizes_are_read_with_their_units(text: str, count: int) -> None:
    assert parse_bytes(text) == count
