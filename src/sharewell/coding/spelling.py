"""How words that no dictionary holds are spelled, and how a sorted word list is stored.

A letter is predicted from the one, two, three and four letters before it, mixed; a sorted list stores of each
word only what differs from the word before it. Words here are runs of two bytes and more of ASCII letters and
bytes from 128 up (see ``tokens``)."""

from __future__ import annotations

import numpy as np
from numba import njit

from .entropy_coder import ENCODING, code_mixed5, code_tree, lean
from .tokens import MAX_RUN

END, CAPITAL, HIGH = 0, 27, 28  # beside 1..26, the small letters
_INPUTS = 5
LETTERS, LETTER_MASK, LETTER_WEIGHTS = 16, 17, 18  # fields of the state: where the cells are
LETTER_WEIGHT_CELLS = 6 * 32 * _INPUTS


@lean
def code_word(io, buf, cells, state, word, known, length):
    """One word in ``word`` (uint8 [MAX_RUN]), whose first ``known`` bytes both sides have. Encoding:
    ``length`` is given. Returns the length; -1 for what no encoder writes.

    ``state``: int64, see ``phrase_model``; its first 16 fields are scratch."""
    letters, weights = state[LETTERS], state[LETTER_WEIGHTS]
    mask = state[LETTER_MASK] & ~31
    encoding = io[ENCODING]
    c1 = c2 = c3 = c4 = np.int64(0)
    whole = np.int64(17)
    for i in range(known):
        c4, c3, c2, c1 = c3, c2, c1, np.int64(word[i])
        whole = (whole + c1) * 0x2F0B4C47
    i = known
    while True:
        if i == MAX_RUN:
            return i
        base0 = letters + (((c1 + 1) * 0x1E35A7BD) & mask)
        base1 = letters + (((c1 + 1 + (c2 << 8)) * 0x2C1B3C6D >> 3) & mask)
        base2 = letters + (((c1 + 2 + (c2 << 8) + (c3 << 16)) * 0x297A2D39 >> 5) & mask)
        base3 = letters + (((c1 + 3 + (c2 << 8) + (c3 << 16) + (c4 << 24)) * 0x1B56C4E9 >> 7) & mask)
        base4 = letters + (((whole >> 9) * 0x27D4EB2F >> 3) & mask)
        symbol = END
        byte = np.int64(0)
        if encoding and i < length:
            byte = np.int64(word[i])
            if 97 <= byte <= 122:
                symbol = byte - 96
            elif byte >= 128:
                symbol = HIGH
            else:
                symbol = CAPITAL
        node = 1
        chosen = min(i, 5) * 32 * _INPUTS
        for place in range(4, -1, -1):
            state[0], state[1], state[2], state[3], state[4] = (
                base0 + node,
                base1 + node,
                base2 + node,
                base3 + node,
                base4 + node,
            )
            at = weights + chosen + node * _INPUTS
            bit = code_mixed5(io, buf, cells, state, at, (symbol >> place) & 1, 200)
            node = (node << 1) | bit
        symbol = node - 32
        if symbol == END:
            return i if i >= 2 else -1
        if symbol <= 26:
            byte = 96 + symbol
        elif symbol == CAPITAL:
            byte = 65 + code_tree(io, buf, cells, letters, 5, byte - 65, 100)
            if byte > 90:
                return -1
        elif symbol == HIGH:
            byte = 128 + code_tree(
                io, buf, cells, letters + (((c1 + 77) * 0x1E35A7BD) & mask & ~127), 7, byte - 128, 100
            )
        else:
            return -1
        word[i] = byte
        c4, c3, c2, c1 = c3, c2, c1, byte
        whole = (whole + c1) * 0x2F0B4C47
        i += 1


@njit(cache=True)
def code_sorted_words(io, buf, cells, state, prefixes, arena, offsets, first, last):
    """Words ``first..last`` of a list in byte order. Decoding fills ``arena`` and ``offsets``, of which
    those up to ``first`` must be there; returns -1 for what no encoder writes or what does not fit, else
    0."""
    word = np.zeros(MAX_RUN + 1, np.uint8)
    length = 0
    common = 0
    encoding = io[ENCODING]
    for k in range(first, last):
        size = 0
        if encoding:
            start = offsets[k]
            size = offsets[k + 1] - start
            shared = 0
            while shared < min(length, size, 31) and word[shared] == arena[start + shared]:
                shared += 1
        else:
            shared = 0
        shared = code_tree(io, buf, prefixes, common * 32, 5, shared, 60)
        if shared > length:
            return -1
        common = min(shared, 15)
        if encoding:
            for i in range(size):
                word[i] = arena[start + i]
        size = code_word(io, buf, cells, state, word, shared, size)
        if size < 0:
            return -1
        if not encoding:
            if offsets[k] + size > arena.size:
                return -1
            for i in range(size):
                arena[offsets[k] + i] = word[i]
            offsets[k + 1] = offsets[k] + size
        length = size
    return 0
