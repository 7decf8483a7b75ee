"""White space between words, and the case of a word, predicted from the words on both sides.

A bit is predicted by several hashed contexts, mixed; what came after the same words before counts as much
as the column, at which lines tend to be broken, and as what the longest match says."""

from __future__ import annotations

import numpy as np

from .entropy_coder import code_mixed4, code_mixed5, lean
from .model_state import CASE_WEIGHTS, CASES, HISTORY, MARK_CELLS, MARK_MASK, SITES, SPACE_WEIGHTS, SPACES
from .tokens import BYTE_WORDS, CAPITALIZED, PLAIN, UPPER


@lean
def kind_of(word):
    """0 a word of letters, 1 a digit, 2 a full stop or the like, 3 another byte."""
    if word >= BYTE_WORDS or 97 <= word <= 122 or word >= 128:
        return 0
    if 48 <= word <= 57:
        return 1
    if word == 46 or word == 33 or word == 63 or word == 58:
        return 2
    return 3


@lean
def _site(state, k, h):
    state[SITES + k] = (h * 0x5851F42D4C957F2D >> 17) ^ k


@lean
def _space_bit(io, buf, cells, state, weights, node, bit):
    start, mask = state[MARK_CELLS], state[MARK_MASK]
    for k in range(SPACES):
        state[k] = start + (((state[SITES + k] + (node >> 4) * 0x9E3779) ^ (node & 15)) & mask)
    return code_mixed5(io, buf, cells, state, weights, np.int64(bit), 250)


@lean
def _case_bit(io, buf, cells, state, weights, node, bit):
    start, mask = state[MARK_CELLS], state[MARK_MASK]
    for k in range(CASES):
        state[k] = start + (((state[SITES + k] + (node >> 4) * 0x9E3779) ^ (node & 15)) & mask)
    return code_mixed4(io, buf, cells, state, weights, np.int64(bit), 250)


@lean
def code_space(
    io, buf, cells, state, bits, t1, whole, word, length, column, last, line, guess, guess_length, symbol
):
    """White space between the words ``t1`` and ``word`` (of ``length`` bytes). ``column``: of the end of
    t1; ``whole``: t1 was not cut off at its greatest length; ``last``: the space before t1, ``line``: the
    last one with a line feed; ``guess``: what a match predicts."""
    k1, k2 = kind_of(t1), kind_of(word)
    _site(state, 0, (t1 * 0x100000 + word) * 64 + 5)
    _site(state, 1, ((guess + 1) * 16 + min(guess_length, 15)) * 64 + 4)
    _site(state, 2, (min(column + length, 127) * 16 + k2 * 4 + k1) * 64 + 3)
    _site(state, 3, ((line * 256 + word) * 16 + min(column, 15)) * 64 + 6)
    _site(state, 4, (t1 * 4 + k2) * 64 + 1)
    matched = 0 if guess < 0 else 1 + min(guess_length >> 3, 2)
    base = state[SPACE_WEIGHTS] + matched * 16 * SPACES
    if not (whole and k1 == 0 and k2 == 0):  # two words of letters are never without space between them
        if not _space_bit(io, buf, cells, state, base, 0, symbol != 0):
            return 0
    if not _space_bit(io, buf, cells, state, base + SPACES, 1, symbol != 1):
        return 1
    node = 1
    for place in range(bits - 1, -1, -1):
        at = base + (2 + min(bits - 1 - place, 13)) * SPACES
        bit = _space_bit(io, buf, cells, state, at, node + 2, (symbol >> place) & 1)
        node = (node << 1) | bit
    return node - (1 << bits)


@lean
def code_case(io, buf, cells, state, t1, word, slot, space, before, guess, guess_length, symbol):
    """The case of ``word`` after ``t1`` and ``space``; ``slot``: its place in the history; ``before``: the
    case of the word before; ``guess``: what a match predicts, or -1."""
    past = np.int64(cells[state[HISTORY] + slot])
    _site(state, 0, ((word * 4 + (kind_of(t1) == 2) * 2 + (space > 1)) * 16 + past) * 64 + 33)
    _site(state, 1, ((past * 4 + before) * 4 + kind_of(t1)) * 512 + min(space, 3) * 64 + 35)
    _site(state, 2, (((guess + 1) * 16 + min(guess_length, 15)) * 16 + past) * 64 + 36)
    _site(state, 3, (t1 * 0x100000 + word) * 64 + 37)
    base = state[CASE_WEIGHTS] + (0 if guess < 0 else 1 + min(guess_length >> 3, 2)) * 2 * CASES
    out = PLAIN
    if _case_bit(io, buf, cells, state, base, 0, symbol != PLAIN):
        out = CAPITALIZED
        if _case_bit(io, buf, cells, state, base + CASES, 1, symbol == UPPER):
            out = UPPER
    cells[state[HISTORY] + slot] = (past * 3 + out) % 9
    return out
