from __future__ import annotations

import numpy as np
import pytest
import torch
from numba import njit

from sharewell.kernels import (
    PackedMatrix,
    available,
    pack_dense,
    pack_int4,
    pack_int8,
    quantize_int4,
    quantize_int8,
    unpack,
)
from sharewell.kernels.gemm import add_product, product
from sharewell.kernels.simd import X_RECORD
from sharewell.kernels.vectors import quantize_row

FORMATS = ["float32", "bfloat16", *(["int8", "int4"] if available() else [])]
ROWS = [1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 16, 25, 61]


@njit
def _quantize(x: int, ldx: int, out: int, ldo: int, rows: int, groups: int) -> None:
    for t in range(rows):
        quantize_row(x + t * ldx, out + t * ldo, groups)


def _matrix(format: str, n: int, k: int) -> PackedMatrix:
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(n))
    if format == "int8":
        return pack_int8(*quantize_int8(weight))
    if format == "int4":
        return pack_int4(*quantize_int4(weight))
    return pack_dense(weight, "float32" if format == "float32" else "bfloat16")


def _operand(format: str, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the product reads for ``x``, and the float64 rows that this stands for."""
    rows, k = x.shape
    if format not in ("int8", "int4"):
        return x, x.double()
    records = torch.zeros(rows, k // 32 * X_RECORD, dtype=torch.uint8)
    _quantize(x.data_ptr(), 4 * k, records.data_ptr(), records.shape[1], rows, k // 32)
    parts = records.view(rows, k // 32, X_RECORD)
    q = parts[..., :32].contiguous().view(torch.int8).double()
    d = parts[..., 32:36].contiguous().view(torch.float32).double()
    return records, (q * d).view(rows, k)


def _multiply(packed: PackedMatrix, operand: torch.Tensor, out: torch.Tensor) -> None:
    row = np.array(packed.row(), np.int64)
    stride = operand.stride(0) * operand.element_size()
    product(row, operand.data_ptr(), stride, len(operand), out.data_ptr(), out.stride(0) * 4)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("n", [70, 192])
def test_products_equal_float64_for_any_number_of_rows(format: str, n: int) -> None:
    k = 160
    packed = _matrix(format, n, k)
    for rows in ROWS:
        x = torch.randn(rows, k, generator=torch.Generator().manual_seed(rows))
        operand, meant = _operand(format, x)
        out = torch.full((rows, packed.n_padded), 3.0)
        _multiply(packed, operand, out)
        expected = meant @ unpack(packed).double().T + 3
        error = (out[:, :n].double() - expected).abs().max() / expected.std()
        assert error < 3e-6, (rows, error)
        assert torch.equal(out[:, n:], torch.full_like(out[:, n:], 3.0))


@pytest.mark.parametrize("format", FORMATS)
def test_a_row_is_bit_equal_alone_and_among_others(format: str) -> None:
    packed = _matrix(format, 128, 96)
    operand, _ = _operand(format, torch.randn(61, 96, generator=torch.Generator().manual_seed(3)))
    together = torch.zeros(61, 128)
    _multiply(packed, operand, together)
    for first, end in [(0, 1), (7, 9), (13, 18), (30, 43), (5, 61)]:
        apart = torch.zeros(end - first, 128)
        _multiply(packed, operand[first:end], apart)
        assert torch.equal(apart, together[first:end])


@pytest.mark.parametrize("format", FORMATS)
def test_single_units_and_pairs_of_units_are_bit_equal(format: str) -> None:
    packed = _matrix(format, 64, 96)
    operand, _ = _operand(format, torch.randn(19, 96, generator=torch.Generator().manual_seed(4)))
    whole, halves = torch.zeros(19, 64), torch.zeros(19, 64)
    row, stride = np.array(packed.row(), np.int64), operand.stride(0) * operand.element_size()
    add_product(row, 0, 4, operand.data_ptr(), stride, 19, whole.data_ptr(), 256)
    for first in (0, 2):
        add_product(row, first, 2, operand.data_ptr(), stride, 19, halves.data_ptr() + 64 * first, 256)
    assert torch.equal(whole, halves)


@pytest.mark.skipif(not available(), reason="needs AVX512-VNNI")
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_int8_activations_cost_less_than_one_percent(format: str) -> None:
    packed = _matrix(format, 256, 576)
    x = torch.randn(32, 576, generator=torch.Generator().manual_seed(5))
    operand, _ = _operand(format, x)
    out = torch.zeros(32, 256)
    _multiply(packed, operand, out)
    expected = x @ unpack(packed).T
    assert (out - expected).pow(2).mean().sqrt() / expected.std() < 0.01
