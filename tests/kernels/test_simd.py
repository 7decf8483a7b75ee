from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numba import njit

from sharewell.kernels.simd import X_RECORD
from sharewell.kernels.team import (
    complete,
    fetch_add,
    finish,
    part,
    sync_words,
    take,
    work_item,
    work_items,
)
from sharewell.kernels.vectors import (
    address,
    exp_shifted,
    load_bf16,
    load_f16,
    load_f32,
    load_u8,
    maximum,
    quantize_row,
    scale_floats,
    silu_product,
)


@njit
def _exp(values: np.ndarray, shift: np.float32) -> np.float32:
    return exp_shifted(address(values), values.size, shift)


@njit
def _maximum(values: np.ndarray) -> np.float32:
    return maximum(address(values), values.size)


@njit
def _silu(gate: np.ndarray, up: np.ndarray) -> None:
    silu_product(address(gate), address(up), gate.size)


@njit
def _scale(values: np.ndarray, factor: np.float32) -> None:
    scale_floats(address(values), values.size, factor)


@njit
def _quantize(values: np.ndarray, records: np.ndarray) -> None:
    quantize_row(address(values), address(records), values.size // 32)


@njit
def _loads(f32: np.ndarray, f16: np.ndarray, u16: np.ndarray, u8: np.ndarray) -> tuple:
    # numba knows no float16: its bits come as uint16
    return load_f32(address(f32)), load_f16(address(f16)), load_bf16(address(u16)), load_u8(address(u8))


def _floats(seed: int, n: int, spread: float = 10.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, spread, n).astype(np.float32)


def test_exp_is_right_to_a_few_units_in_the_last_place_and_sums_what_it_wrote() -> None:
    values = _floats(0, 160)
    expected = np.exp((values - np.float32(20)).astype(np.float64))
    total = _exp(values, np.float32(20))
    assert np.max(np.abs(values / expected - 1)) < 5e-7
    assert total == pytest.approx(values.astype(np.float64).sum(), rel=1e-6)


def test_exp_of_far_values_neither_overflows_nor_turns_negative() -> None:
    values = np.array([-3e38, -1000, -87, 0, 88, 1000, 3e38, 1e-30] * 2, np.float32)
    _exp(values, np.float32(0))
    assert np.isfinite(values).all()
    assert (values >= 0).all()
    assert values[3] == 1


def test_maximum_passes_over_nan() -> None:
    values = _floats(1, 64)
    values[5] = np.nan
    assert _maximum(values) == np.nanmax(values)


def test_silu_product_and_scaling_equal_numpy() -> None:
    gate, up = _floats(2, 96, 5), _floats(3, 96)
    expected = gate.astype(np.float64) / (1 + np.exp(-gate.astype(np.float64))) * up
    _silu(gate, up)
    assert np.allclose(gate, expected, rtol=2e-6, atol=1e-6)
    values = _floats(4, 48)
    expected = values * np.float32(0.3)
    _scale(values, np.float32(0.3))
    assert np.array_equal(values, expected)


def test_single_numbers_are_read_by_address() -> None:
    f32, f16 = np.array([1.25], np.float32), np.array([-0.375], np.float16).view(np.uint16)
    bf16, u8 = np.array([0x40490000], np.uint32).view(np.uint16)[1:], np.array([200], np.uint8)
    assert _loads(f32, f16, bf16, u8) == (1.25, -0.375, 3.140625, 200)


def _records(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    records = np.zeros((values.size // 32, X_RECORD), np.uint8)
    _quantize(values, records)
    q = records[:, :32].view(np.int8)
    d, s = records[:, 32:36].copy().view(np.float32)[:, 0], records[:, 36:40].copy().view(np.float32)[:, 0]
    return q, d, s, records[:, 40:44].copy().view(np.int32)[:, 0]


@given(st.integers(0, 2**32 - 1), st.floats(1e-6, 1e6))
def test_quantised_activations_equal_their_definition(seed: int, spread: float) -> None:
    values = _floats(seed, 96, spread)
    q, d, s, c = _records(values)
    groups = values.reshape(-1, 32)
    most = np.abs(groups).max(1)
    assert np.array_equal(d, most / np.float32(127))
    assert np.array_equal(q, np.rint(groups * (np.float32(127) / most)[:, None]).astype(np.int8))
    total = q.astype(np.int32).sum(1)
    assert np.array_equal(s, d * total.astype(np.float32))
    assert np.array_equal(c, -128 * total)


def test_a_group_of_zeros_is_zero_and_nan_is_not_lost() -> None:
    values = np.zeros(96, np.float32)
    values[40], values[70] = np.nan, np.inf
    q, d, s, _ = _records(values)
    assert (q[0] == 0).all()
    assert d[0] == s[0] == 0
    assert np.isnan(d[1])
    assert not np.isfinite(d[2])


@given(units=st.integers(0, 200), threads=st.integers(1, 9))
def test_work_items_cover_every_unit_once(units: int, threads: int) -> None:
    seen: list[int] = []
    index = 0
    while (item := work_item(index, units, threads))[1]:
        assert item[0] % 2 == 0 or item[1] == 1
        seen.extend(range(item[0], item[0] + item[1]))
        index += 1
    assert seen == list(range(units))
    assert index == work_items(units, threads)


@given(rows=st.integers(1, 300), items=st.integers(1, 40))
def test_parts_cover_every_row_once(rows: int, items: int) -> None:
    bounds = [part(i, items, rows) for i in range(items)]
    assert [r for low, high in bounds for r in range(low, high)] == list(range(rows))


@njit(nogil=True)
def _rounds(sync: np.ndarray, cells: np.ndarray, rounds: int) -> int:
    """In each phase every cell grows by one; counts the cells that an item finds in another phase's state."""
    wrong, phase = 0, 0
    for turn in range(rounds):
        while True:
            index = take(sync, phase)
            if index >= cells.size:
                break
            wrong += cells[index] != turn
            for other in range(cells.size):
                wrong += cells[other] < turn or cells[other] > turn + 1
            cells[index] += 1
            finish(sync, phase)
        phase = complete(sync, phase, cells.size)
    return wrong


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_no_phase_begins_before_the_last_is_over_with_more_threads_than_cores(threads: int) -> None:
    sync, cells = sync_words(200), np.zeros(7, np.int64)
    wrong = [-1] * threads

    def work(i: int) -> None:
        wrong[i] = _rounds(sync, cells, 200)

    team = [threading.Thread(target=work, args=(i,)) for i in range(threads)]
    for t in team:
        t.start()
    for t in team:
        t.join()
    assert wrong == [0] * threads
    assert (cells == 200).all()


def test_a_thread_that_comes_when_all_is_over_passes_through() -> None:
    sync, cells = sync_words(50), np.zeros(7, np.int64)
    assert _rounds(sync, cells, 50) == 0
    assert _rounds(sync, cells, 50) == 0
    assert (cells == 50).all()


@njit(nogil=True)
def _take_all(sync: np.ndarray, taken: np.ndarray) -> None:
    while True:
        index = take(sync, 1)
        if index >= taken.size:
            break
        fetch_add(address(taken) + 8 * index, 1)


def test_items_of_a_phase_are_taken_once_each_by_many_threads() -> None:
    sync, taken = sync_words(3), np.zeros(20_000, np.int64)
    team = [threading.Thread(target=_take_all, args=(sync, taken)) for _ in range(4)]
    for t in team:
        t.start()
    for t in team:
        t.join()
    assert (taken == 1).all()
    assert sync[2] == taken.size + 4
