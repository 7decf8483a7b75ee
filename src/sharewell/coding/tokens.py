"""Text as words: what a word is, which case it is in, which white space follows it.

A token is a maximal run of ASCII letters and bytes from 128 up, or one other byte; the white space after it
(space, tab, line feed, carriage return) belongs to it. Case and white space are taken off, so that ``The``
at the start of a line and ``the`` inside one are the same word. Runs of more than 255 bytes are split:
nothing is ever lost. Follows Tacconelli 2026 (2603.14999), which keeps the white space in the word;
splitting it off is ours."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit

MAX_RUN = 255  # bytes of a word, and of the white space behind it
BYTE_WORDS = 256  # ids below this are the words of one byte
PLAIN, CAPITALIZED, UPPER = 0, 1, 2
MAX_SPACES = 1 << 15  # distinct white-space strings


@dataclass(frozen=True)
class Tokens:
    """The words of a block. Ids under 256 are single bytes, others in the order of first appearance."""

    words: np.ndarray  # int32 [n]
    spaces: np.ndarray  # uint16 [n], which white space follows
    cases: np.ndarray  # uint8 [n]
    arena: np.ndarray  # uint8: the distinct words' bytes one after another
    offsets: np.ndarray  # int64 [distinct + 1] into arena
    space_arena: np.ndarray  # uint8: the distinct white-space strings
    space_offsets: np.ndarray  # int64 [distinct + 1]

    @property
    def n_words(self) -> int:
        """Number of ids, the 256 single bytes included."""
        return BYTE_WORDS + len(self.offsets) - 1


def byte_classes() -> np.ndarray:
    """uint8 [256]: 0 other, 1 letter (ASCII letters and bytes from 128 up), 2 white space."""
    table = np.zeros(256, np.uint8)
    table[128:] = 1
    for byte in b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ":
        table[byte] = 1
    for byte in b" \t\n\r":
        table[byte] = 2
    return table


CLASSES = byte_classes()


@njit(cache=True)
def count_tokens(raw, classes):
    """(tokens, tokens that are words of two bytes and more)."""
    n, i, tokens, words = raw.size, 0, 0, 0
    while i < n:
        j = i + 1
        if classes[raw[i]] == 1:
            while j < n and classes[raw[j]] == 1 and j - i < MAX_RUN:
                j += 1
            if j - i > 1:
                words += 1
        i = j
        while j < n and classes[raw[j]] == 2 and j - i < MAX_RUN:
            j += 1
        i = j
        tokens += 1
    return tokens, words


@njit(cache=True)
def _case_of(raw, start, end):
    """The case flag under which lower-casing can be undone exactly; else PLAIN, and the word stays as it
    is."""
    upper = lower = first = 0
    for i in range(start, end):
        b = raw[i]
        if 65 <= b <= 90:
            upper += 1
            if i == start:
                first = 1
        elif 97 <= b <= 122:
            lower += 1
    if first and upper == 1:
        return CAPITALIZED
    if upper > 1 and lower == 0:
        return UPPER
    return PLAIN


@njit(cache=True)
def _intern(table, hashes, h, offsets, n, arena, scratch, length):
    """(slot in table, id or -1): open addressing, compared by hash, then by bytes."""
    mask = table.size - 1
    slot = (h ^ (h >> 29)) & mask
    while table[slot] >= 0:
        k = table[slot]
        if hashes[k] == h and offsets[k + 1] - offsets[k] == length:
            same = True
            start = offsets[k]
            for i in range(length):
                if arena[start + i] != scratch[i]:
                    same = False
                    break
            if same:
                return slot, k
        slot = (slot + 1) & mask
    return slot, -1


@njit(cache=True)
def _grown(table, hashes, n):
    out = np.full(table.size * 2, -1, np.int32)
    mask = out.size - 1
    for k in range(n):
        h = hashes[k]
        slot = (h ^ (h >> 29)) & mask
        while out[slot] >= 0:
            slot = (slot + 1) & mask
        out[slot] = k
    return out


@njit(cache=True)
def _longer(array, size):
    out = np.empty(size, array.dtype)
    out[: array.size] = array
    return out


@njit(cache=True)
def scan(raw, classes, n_tokens):
    """The arrays of :class:`Tokens`; None-like empty arrays when there are too many white-space strings."""
    words = np.empty(n_tokens, np.int32)
    spaces = np.empty(n_tokens, np.uint16)
    cases = np.empty(n_tokens, np.uint8)
    table, hashes = np.full(1 << 12, -1, np.int32), np.empty(1 << 11, np.int64)
    offsets, arena, n = np.zeros((1 << 11) + 1, np.int64), np.empty(1 << 14, np.uint8), 0
    s_table, s_hashes = np.full(1 << 16, -1, np.int32), np.empty(MAX_SPACES, np.int64)
    s_offsets, s_arena, s_n = np.zeros(MAX_SPACES + 1, np.int64), np.empty(1 << 14, np.uint8), 0
    scratch = np.empty(MAX_RUN + 1, np.uint8)
    # "", " " and "\n" are always there: the model treats them apart
    for fixed in range(3):
        h = np.int64(0)
        length = 0 if fixed == 0 else 1
        if fixed:
            scratch[0] = 32 if fixed == 1 else 10
            h = (h * 0x2545F491 + scratch[0] + 1) * 0x9E3779B1
        slot, _ = _intern(s_table, s_hashes, h, s_offsets, s_n, s_arena, scratch, length)
        s_table[slot], s_hashes[s_n] = s_n, h
        for i in range(length):
            s_arena[s_offsets[s_n] + i] = scratch[i]
        s_offsets[s_n + 1] = s_offsets[s_n] + length
        s_n += 1
    i, t = 0, 0
    while i < raw.size:
        j = i + 1
        if classes[raw[i]] == 1:
            while j < raw.size and classes[raw[j]] == 1 and j - i < MAX_RUN:
                j += 1
        length = j - i
        case = _case_of(raw, i, j)
        h = np.int64(0)
        for k in range(length):
            b = raw[i + k]
            if case != PLAIN and 65 <= b <= 90:
                b += 32
            scratch[k] = b
            h = (h * 0x2545F491 + b + 1) * 0x9E3779B1
            h ^= h >> 31
        if length == 1:
            words[t] = scratch[0]
        else:
            slot, k = _intern(table, hashes, h, offsets, n, arena, scratch, length)
            if k < 0:
                k = n
                if n == hashes.size:
                    hashes, offsets = _longer(hashes, 2 * n), _longer(offsets, 2 * n + 1)
                while offsets[n] + length > arena.size:
                    arena = _longer(arena, 2 * arena.size)
                table[slot], hashes[n] = n, h
                for m in range(length):
                    arena[offsets[n] + m] = scratch[m]
                offsets[n + 1] = offsets[n] + length
                n += 1
                if 2 * n > table.size:
                    table = _grown(table, hashes, n)
            words[t] = BYTE_WORDS + k
        cases[t] = case
        i = j
        h = np.int64(0)
        while j < raw.size and classes[raw[j]] == 2 and j - i < MAX_RUN:
            scratch[j - i] = raw[j]
            h = (h * 0x2545F491 + raw[j] + 1) * 0x9E3779B1
            j += 1
        length = j - i
        if length == 0:
            spaces[t] = 0
        elif length == 1 and raw[i] == 32:
            spaces[t] = 1
        else:
            slot, k = _intern(s_table, s_hashes, h, s_offsets, s_n, s_arena, scratch, length)
            if k < 0:
                if s_n == MAX_SPACES:
                    return words[:0], spaces, cases, arena, offsets, s_arena, s_offsets
                k = s_n
                while s_offsets[s_n] + length > s_arena.size:
                    s_arena = _longer(s_arena, 2 * s_arena.size)
                s_table[slot], s_hashes[s_n] = s_n, h
                for m in range(length):
                    s_arena[s_offsets[s_n] + m] = scratch[m]
                s_offsets[s_n + 1] = s_offsets[s_n] + length
                s_n += 1
            spaces[t] = k
        i = j
        t += 1
    return (
        words,
        spaces,
        cases,
        arena[: offsets[n]].copy(),
        offsets[: n + 1].copy(),
        s_arena[: s_offsets[s_n]].copy(),
        s_offsets[: s_n + 1].copy(),
    )


def tokenize(raw: np.ndarray) -> Tokens | None:
    """The tokens of ``raw`` (uint8); None for a block that has too many kinds of white space to be text."""
    n_tokens, _ = count_tokens(raw, CLASSES)
    parts = scan(raw, CLASSES, n_tokens)
    return None if len(parts[0]) < n_tokens else Tokens(*parts)
