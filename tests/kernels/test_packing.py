from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sharewell.kernels import (
    PAD,
    PackedMatrix,
    pack_dense,
    pack_int4,
    pack_int8,
    quantize_int4,
    quantize_int8,
    unpack,
)
from sharewell.kernels.gemm import read_row


def _packed(format: str, n: int, k: int, seed: int = 0) -> tuple[PackedMatrix, torch.Tensor]:
    """A random matrix in ``format``, and the float32 matrix it stands for, computed without unpacking."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator)
    if format == "float32":
        return pack_dense(weight, "float32"), weight
    if format == "bfloat16":
        return pack_dense(weight, "bfloat16"), weight.bfloat16().float()
    if format == "int8":
        q, d = quantize_int8(weight)
        return pack_int8(q, d), q.float() * d.float().repeat_interleave(32, 1)
    q, d, m = quantize_int4(weight)
    return pack_int4(q, d, m), q.float() * d.float().repeat_interleave(32, 1) + m.float().repeat_interleave(
        32, 1
    )


@pytest.mark.parametrize("format", ["float32", "bfloat16", "int8", "int4"])
@given(n=st.integers(1, 150), groups=st.integers(1, 5))
def test_packing_and_unpacking_give_the_matrix_back_exactly(format: str, n: int, groups: int) -> None:
    packed, expected = _packed(format, n, 32 * groups, seed=n)
    assert packed.n_padded % PAD == 0
    assert packed.n_padded - packed.n < PAD
    assert torch.equal(unpack(packed), expected)


@pytest.mark.parametrize("format", ["float32", "bfloat16", "int8", "int4"])
def test_one_row_read_out_of_a_packed_matrix_is_that_row(format: str) -> None:
    packed, expected = _packed(format, 131, 96)
    out = np.zeros(96, np.float32)
    for row in (0, 17, 63, 64, 130):
        read_row(np.array(packed.row(), np.int64), row, out)
        assert np.array_equal(out, expected[row].numpy())
    assert torch.equal(packed.rows(torch.tensor([130, 0, 64])), expected[[130, 0, 64]])


def test_int8_rounds_to_nearest_within_half_a_step() -> None:
    weight = torch.randn(40, 64, generator=torch.Generator().manual_seed(1))
    q, d = quantize_int8(weight)
    step = d.float().repeat_interleave(32, 1)
    # The scale is rounded to float16 after the largest value fixed it: at most 2^-11 of 127 steps more.
    assert ((q.float() * step - weight).abs() <= step * (0.5 + 127 / 2048)).all()
    assert q.min() >= -127


def test_int4_covers_each_group_from_its_least_to_its_largest_value() -> None:
    weight = torch.randn(40, 64, generator=torch.Generator().manual_seed(2))
    q, d, m = quantize_int4(weight)
    step = d.float().repeat_interleave(32, 1)
    value = q.float() * step + m.float().repeat_interleave(32, 1)
    assert ((value - weight).abs() <= step * 0.5 + weight.abs().max() / 1024).all()
    assert int(q.min()) == 0
    assert int(q.max()) == 15


def test_a_group_of_zeros_stays_zero() -> None:
    weight = torch.zeros(3, 32)
    assert torch.equal(unpack(pack_int8(*quantize_int8(weight))), weight)
    assert torch.equal(unpack(pack_int4(*quantize_int4(weight))), weight)


def test_widths_that_do_not_fit_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="k must be even for bfloat16 tiles, got 33"):
        pack_dense(torch.zeros(4, 33), "bfloat16")
    with pytest.raises(ValueError, match="k must be a multiple of 32 for group-quantised weights, got 48"):
        quantize_int4(torch.zeros(4, 48))
    with pytest.raises(ValueError, match="k must be a multiple of 32"):
        pack_int8(torch.zeros(4, 48, dtype=torch.int8), torch.zeros(4, 1))
