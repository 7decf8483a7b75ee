"""The entropy coder against what was put in, and its length against the information that was put in."""

from __future__ import annotations

import math
import zlib

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sharewell.coding import entropy_coder as ec


def both_ways(work, items, size: int) -> tuple[list[int], int]:
    """Encode ``items`` by ``work(io, buf, item)``, decode as many, and say how long the stream was."""
    buf = np.zeros(size, np.uint8)
    io = ec.new_encoder()
    coded = work()
    for item in items:
        coded(io, buf, item)
    end = int(ec.finish(io, buf))
    assert not io[ec.OVERFLOW]
    data = buf[:end].copy()
    io = ec.new_decoder(data)
    coded = work()
    return [int(coded(io, data, 0)) for _ in items], end


@given(st.lists(st.tuples(st.integers(1, 65535), st.booleans()), max_size=400))
@settings(max_examples=50)
def test_bits_of_any_probability_come_back(bits: list[tuple[int, bool]]):
    buf = np.zeros(4096, np.uint8)
    io = ec.new_encoder()
    for p, bit in bits:
        ec.code_bit(io, buf, p, int(bit))
    end = int(ec.finish(io, buf))
    io = ec.new_decoder(buf[:end].copy())
    assert [bool(ec.code_bit(io, buf[:end], p, 0)) for p, _ in bits] == [bit for _, bit in bits]
    information = sum(-math.log2(p / 65536 if bit else 1 - p / 65536) for p, bit in bits)
    assert 8 * end <= information + 24 + 1e-4 * len(bits)


@given(st.lists(st.integers(0, 2**32 - 2), max_size=60))
@settings(max_examples=50)
def test_numbers_come_back(numbers: list[int]):
    def work():
        cells = np.full(160, ec.HALF, np.int32)
        return lambda io, buf, x: ec.code_number(io, buf, cells, 0, x)

    assert both_ways(work, numbers, 4096)[0] == numbers


@given(st.lists(st.integers(0, 36), min_size=1, max_size=300), st.integers(1, 1 << 19))
@settings(max_examples=50)
def test_symbols_by_frequency_come_back(symbols: list[int], increment: int):
    def work():
        cells = np.zeros(2 * 64 + 1, np.int32)
        cells[:37] = 1
        tables = np.array([0, 64, 0], np.int64)
        ec.rebuild_frequencies(cells, tables, 0)
        return lambda io, buf, x: ec.code_symbol(io, buf, cells, tables, 0, x, increment)

    assert both_ways(work, symbols, 4096)[0] == symbols


def test_a_skewed_source_takes_little_more_than_its_entropy():
    rng = np.random.default_rng(1)
    p = 1 / np.arange(1, 33)
    p /= p.sum()
    symbols = rng.choice(32, 20_000, p=p).tolist()

    def by_table():
        cells = np.zeros(65, np.int32)
        cells[:32] = 1
        tables = np.array([0, 32, 0], np.int64)
        ec.rebuild_frequencies(cells, tables, 0)
        return lambda io, buf, x: ec.code_symbol(io, buf, cells, tables, 0, x, 24)

    def by_tree():
        cells = np.full(32, ec.HALF, np.int32)
        return lambda io, buf, x: ec.code_tree(io, buf, cells, 0, 5, x, 255)

    bound = len(symbols) * float(-(p * np.log2(p)).sum()) / 8
    for work in (by_table, by_tree):
        out, size = both_ways(work, symbols, 1 << 16)
        assert out == symbols
        assert 0.98 * bound < size < 1.02 * bound


def test_mixing_is_as_good_as_the_best_of_its_inputs():
    rng = np.random.default_rng(2)
    context = rng.integers(0, 2, 20_000)
    bits = np.where(rng.random(20_000) < 0.02, 1 - context, context)  # only the first input knows

    def work():
        cells = np.full(64, ec.HALF, np.int32)
        cells[32:35] = 20_000
        state = np.zeros(16, np.int64)

        def code(io, buf, item):
            number, bit = item if isinstance(item, tuple) else (code.n, 0)
            code.n += 1
            state[:3] = int(context[number]), 4 + number % 3, 10
            return ec.code_mixed3(io, buf, cells, state, 32, bit, 250)

        code.n = 0
        return code

    items = list(enumerate(bits.tolist()))
    out, size = both_ways(work, items, 1 << 16)
    assert out == bits.tolist()
    entropy = -(0.02 * math.log2(0.02) + 0.98 * math.log2(0.98)) * len(bits) / 8
    assert size < 1.15 * entropy


def test_a_full_buffer_is_reported_and_not_written_past():
    buf = np.zeros(10, np.uint8)
    io = ec.new_encoder()
    for _ in range(1000):
        ec.code_bit(io, buf, 32768, 1)
        ec.code_bit(io, buf, 32768, 0)
    ec.finish(io, buf)
    assert io[ec.OVERFLOW] == 1


def test_reading_past_the_end_yields_symbols_of_the_alphabet():
    io = ec.new_decoder(np.zeros(0, np.uint8))
    cells = np.full(160, ec.HALF, np.int32)
    empty = np.zeros(0, np.uint8)
    assert all(0 <= ec.code_number(io, empty, cells, 0, 0) < 2**32 - 1 for _ in range(100))


def test_tables_of_the_mixer_are_fixed():
    # they are part of the format: exactly rounded on every machine
    assert (int(ec._SQUASH[2048]), int(ec._SQUASH[2048 + 256]), int(ec._SQUASH[0])) == (32768, 47911, 24)
    assert zlib.crc32(ec._SQUASH.astype("<i4").tobytes()) == 480297610
    assert np.all(np.diff(ec._SQUASH) >= 0) and np.all(np.diff(ec._STRETCH) >= 0)
