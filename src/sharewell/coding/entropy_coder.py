"""The room's one entropy coder: an adaptive binary and multi-symbol range coder in integer arithmetic.

Every routine runs in both directions: with ``io[ENCODING]`` set it writes the symbol it is given, else it
reads one and returns it, so that a model written once is encoder and decoder and cannot drift apart. No
float takes part: a rounding that differs between two machines would make a stream undecodable. Reading past
the end yields zeros and never fails; who decodes hostile bytes gets wrong symbols, each within its
alphabet, and a checksum above this layer says so.

Range coder: Martin 1979, with the carry propagation of LZMA, on a 48-bit window. Mixing of predictions in the
logistic domain: Mahoney 2005 (PAQ6). Adaptive counts in a Fenwick tree: Fenwick 1994.
"""

from __future__ import annotations

from decimal import Decimal, localcontext

import numpy as np
from numba import njit

# For functions that allocate nothing: without numba's reference counts, which it makes for every array
# argument of every call and which took more time than the coding.
lean = njit(cache=True, error_model="numpy", _nrt=False)  # pyright: ignore[reportCallIssue]

# Fields of the coder's state, an int64 array.
LOW, RANGE, CACHE, PENDING, POSITION, ENCODING, OVERFLOW, CODE, LIMIT = range(9)
STATE_FIELDS = 9

_WIDTH = 48
_TOP = 1 << (_WIDTH - 8)
_FULL = 1 << _WIDTH
_MASK_LOW = _TOP - 1
MAX_TOTAL = 1 << 22  # of a frequency table: the range keeps 18 bits of precision above it
HALF = np.int32((1 << 21) << 8)  # an adaptive probability of one half that has seen nothing

# How far an adaptive probability moves towards the bit, by the number of bits it has seen: 1 / (n + 1.6).
_RATE = np.array([65536 * 10 // (10 * n + 16) for n in range(256)], np.int64)


def _logistic_tables() -> tuple[np.ndarray, np.ndarray]:
    """``squash[x + 2048]`` = 65536 / (1 + e^(-x/256)) and its inverse over 4,096 steps, exactly rounded.

    Decimal's exp is correctly rounded by its specification, so that the tables are the same everywhere.
    """
    squash = np.empty(4096, np.int64)
    before = 0
    with localcontext() as context:
        context.prec = 24
        for knot in range(129):
            exact = Decimal(65536) / (1 + (Decimal(2048 - 32 * knot) / 256).exp())
            value = int(exact.to_integral_value())
            if knot:
                steps = np.arange(32)
                squash[32 * (knot - 1) : 32 * knot] = before + (value - before) * steps // 32
            before = value
    np.clip(squash, 24, 65536 - 24, out=squash)
    stretch = np.searchsorted(squash, np.arange(4096) * 16 + 8).astype(np.int64) - 2048
    # 8 KiB each: both stay in the first-level cache beside the model's state
    return squash.astype(np.uint16), np.clip(stretch, -2047, 2047).astype(np.int16)


_SQUASH, _STRETCH = _logistic_tables()


def new_encoder() -> np.ndarray:
    """State of a coder that writes."""
    io = np.zeros(STATE_FIELDS, np.int64)
    io[RANGE], io[ENCODING], io[CACHE] = _FULL - 1, 1, -1
    return io


def new_decoder(data: np.ndarray) -> np.ndarray:
    """State of a coder that reads ``data`` (uint8)."""
    io = np.zeros(STATE_FIELDS, np.int64)
    io[RANGE], io[LIMIT] = _FULL - 1, len(data)
    head = bytes(data[:6]) + bytes(6)
    io[CODE], io[POSITION] = int.from_bytes(head[:6], "big"), 6
    return io


@lean
def _put(io, buf, byte):
    if io[POSITION] < buf.size:
        buf[io[POSITION]] = byte
        io[POSITION] += 1
    else:
        io[OVERFLOW] = 1


@lean
def _shift_low(io, buf):
    low = io[LOW]
    if low < (255 << 40) or low >= _FULL:
        carry = low >> _WIDTH
        if io[CACHE] >= 0:
            _put(io, buf, (io[CACHE] + carry) & 255)
        while io[PENDING] > 0:
            _put(io, buf, (255 + carry) & 255)
            io[PENDING] -= 1
        io[CACHE] = (low >> 40) & 255
    else:
        io[PENDING] += 1
    io[LOW] = (low & _MASK_LOW) << 8


@lean
def _next_byte(io, buf):
    at = io[POSITION]
    io[POSITION] = at + 1
    if at < io[LIMIT]:
        return np.int64(buf[at])
    return np.int64(0)


@lean
def finish(io, buf):
    """End an encoding: write the number in the final range that has the most trailing zeros. Returns the
    length in bytes; zeros at the end are not stored, as reading past the end yields them."""
    low, top = io[LOW], io[LOW] + io[RANGE] - 1
    for shift in range(_WIDTH, -1, -1):
        value = (top >> shift) << shift
        if value >= low:
            break
    io[LOW] = value
    for _ in range(7):
        _shift_low(io, buf)
    end = io[POSITION]
    while end > 0 and buf[end - 1] == 0:
        end -= 1
    return end


@lean
def code_bit(io, buf, p, bit):
    """One binary decision; ``p`` in [1, 65535] is 65,536 times the probability of a 1."""
    span = io[RANGE]
    bound = (span >> 16) * p
    if io[ENCODING]:
        if bit:
            span = bound
        else:
            io[LOW] += bound
            span -= bound
        while span < _TOP:
            span <<= 8
            _shift_low(io, buf)
    else:
        code = io[CODE]
        if code < bound:
            bit = 1
            span = bound
        else:
            bit = 0
            code -= bound
            span -= bound
        while span < _TOP:
            span <<= 8
            code = (code << 8) | _next_byte(io, buf)
        io[CODE] = code
    io[RANGE] = span
    return bit


@lean
def code_adaptive(io, buf, cells, at, bit, limit):
    """A binary decision by an adaptive probability: 22 bits of probability, 8 bits of count (up to ``limit``)
    in ``cells[at]``. The larger the limit, the slower it forgets."""
    cell = np.int64(cells[at])
    p, n = cell >> 8, cell & 255
    p16 = min(max(p >> 6, 24), 65536 - 24)
    bit = code_bit(io, buf, p16, bit)
    p += (((bit << 22) - p) * _RATE[n]) >> 16
    cells[at] = (p << 8) | min(n + 1, limit)
    return bit


@lean
def code_tree(io, buf, cells, base, bits, symbol, limit):
    """A symbol of ``bits`` bits by a binary tree of adaptive probabilities at ``cells[base:base +
    2**bits]``."""
    node = 1
    for place in range(bits - 1, -1, -1):
        node = (node << 1) | code_adaptive(io, buf, cells, base + node, (symbol >> place) & 1, limit)
    return node - (1 << bits)


@lean
def code_number(io, buf, cells, base, value):
    """A number in [0, 2**32 - 1): bit count by an adaptive tree (32 cells at ``base``), then the two bits
    below the first adaptively (128 more cells), the rest plainly. Takes 160 cells."""
    value = max(value, 0)  # decoding ignores what it is given
    bits = 0
    while (value + 1) >> (bits + 1):
        bits += 1
    bits = code_tree(io, buf, cells, base, 5, bits, 60)
    out = 1
    for place in range(bits - 1, -1, -1):
        bit = ((value + 1) >> place) & 1
        if place >= bits - 2:
            bit = code_adaptive(io, buf, cells, base + 32 + bits * 4 + out, bit, 60)
        else:
            bit = code_bit(io, buf, 32768, bit)
        out = (out << 1) | bit
    return out - 1


def _mixer(n):
    """A binary decision by ``n`` adaptive probabilities, ``cells[state[i]]`` for i < n, mixed in the
    logistic domain with the weights ``cells[weights : weights + n]`` (65,536 is 1), which learn online.
    ``state[8 : 8 + n]`` is scratch. Compiled for each ``n``, so that its loops are unrolled."""

    @lean
    def code_mixed(io, buf, cells, state, weights, bit, limit):
        dot = np.int64(0)
        for i in range(n):
            s = np.int64(_STRETCH[np.int64(cells[state[i]]) >> 18])
            state[8 + i] = s
            dot += s * np.int64(cells[weights + i])
        dot >>= 16
        dot = min(max(dot, -2047), 2047)
        p = np.int64(_SQUASH[dot + 2048])
        bit = code_bit(io, buf, p, bit)
        error = (bit << 16) - p
        goal = bit << 22
        for i in range(n):
            cells[weights + i] += (state[8 + i] * error + (1 << 16)) >> 17
            at = state[i]
            cell = np.int64(cells[at])
            q, count = cell >> 8, cell & 255
            q += ((goal - q) * _RATE[count]) >> 16
            cells[at] = (q << 8) | min(count + 1, limit)
        return bit

    return code_mixed


code_mixed3, code_mixed4, code_mixed5 = _mixer(3), _mixer(4), _mixer(5)


# A frequency table over ``size`` (a power of two) symbols is ``cells[base : base + size]``, the counts, and a
# Fenwick tree behind them; ``tables`` (int64) holds base, size and total of each.


@lean
def rebuild_frequencies(cells, tables, table):
    """Fenwick tree and total from the counts."""
    base, size = tables[3 * table], tables[3 * table + 1]
    tree = base + size
    total = np.int64(0)
    for i in range(size):
        cells[tree + 1 + i] = cells[base + i]
        total += cells[base + i]
    for i in range(1, size + 1):
        parent = i + (i & -i)
        if parent <= size:
            cells[tree + parent] += cells[tree + i]
    tables[3 * table + 2] = total


@lean
def code_symbol(io, buf, cells, tables, table, symbol, increment):
    """A symbol by adaptive counts. At least one count must be positive; only symbols with one can be
    coded."""
    base, size, total = tables[3 * table], tables[3 * table + 1], tables[3 * table + 2]
    tree = base + size
    unit = io[RANGE] // total
    below = np.int64(0)
    if io[ENCODING]:
        i = symbol
        while i > 0:
            below += cells[tree + i]
            i &= i - 1
        io[LOW] += unit * below
        span = unit * np.int64(cells[base + symbol])
        while span < _TOP:
            span <<= 8
            _shift_low(io, buf)
        io[RANGE] = span
    else:
        target = min(io[CODE] // unit, total - 1)
        at = np.int64(0)
        step = size
        while step:
            following = at + step
            if following <= size and below + cells[tree + following] <= target:
                at = following
                below += cells[tree + following]
            step >>= 1
        symbol = at
        span = max(unit * np.int64(cells[base + symbol]), 1)
        code = io[CODE] - unit * below
        while span < _TOP:
            span <<= 8
            code = (code << 8) | _next_byte(io, buf)
        # only a forged stream leaves the range; clamping keeps what follows within bounds
        io[CODE] = min(code, span - 1)
        io[RANGE] = span
    cells[base + symbol] += increment
    i = symbol + 1
    while i <= size:
        cells[tree + i] += increment
        i += i & -i
    total += increment
    tables[3 * table + 2] = total
    if total > MAX_TOTAL:
        for i in range(size):
            cells[base + i] -= cells[base + i] >> 1
        rebuild_frequencies(cells, tables, table)
    return symbol
