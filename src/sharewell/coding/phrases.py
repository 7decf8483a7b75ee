"""Phrases of 2 to 144 words that repeat: finding them, choosing a dictionary, and laying it over the text.

Counting takes two passes per length: a table of small counters over hashes says which phrases may repeat,
and only those are counted exactly; memory stays bounded and a phrase that occurs once costs nothing. Hashes
are 64 bits wide, and no phrase is used before its words have been compared. Source: Tacconelli 2026
(2603.14999)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit

from .tiling import PHRASE_LENGTHS

_MULTIPLIER = np.int64(0x5851F42D4C957F2D)
_EMPTY = -1
# Entries by number of tokens: (below, [2, 3, 5, 8, 13, 21, 34, 55, 89, 144 words]).
BOOK_SIZES = (
    (5_000, (509, 350, 100, 50, 0, 0, 0, 0, 0, 0)),
    (50_000, (509, 500, 200, 100, 50, 0, 0, 0, 0, 0)),
    (200_000, (2000, 1000, 500, 200, 100, 50, 0, 0, 0, 0)),
    (500_000, (4000, 2000, 1000, 500, 300, 100, 50, 0, 0, 0)),
    (2_000_000, (8000, 4000, 2000, 1000, 1000, 500, 200, 100, 50, 0)),
    (10_000_000, (16000, 8000, 4000, 2000, 2000, 1000, 500, 200, 200, 100)),
    (1 << 62, (32000, 32000, 16000, 4000, 4000, 2000, 2000, 1000, 1000, 500)),
)


def book_sizes(n_tokens: int) -> tuple[int, ...]:
    """Most phrases per length for a text of ``n_tokens``."""
    return next(sizes for below, sizes in BOOK_SIZES if n_tokens < below)


@njit(cache=True)
def _mix(h):
    h ^= h >> 32
    h *= np.int64(0x2545F4914F6CDD1D)
    return h ^ ((h >> 29) & 0x7FFFFFFFF)


@njit(cache=True)
def count_phrases(words, eligible, length, sketch, table, counts, firsts, keys):
    """Count the phrases of ``length`` words that occur twice or more, all of whose words are ``eligible``.

    sketch: uint8 [2**k] scratch. table: int32 [2**m]; counts, firsts: int32, keys: int64 [capacity].
    Returns the number of entries; what comes after capacity is full is passed over."""
    n = words.size
    sketch[:] = 0
    table[:] = _EMPTY
    used = 0
    top = np.int64(1)
    for _ in range(length - 1):
        top *= _MULTIPLIER
    for turn in range(2):
        h = np.int64(0)
        run = 0
        for i in range(n):
            w = words[i]
            if not eligible[w]:
                h, run = np.int64(0), 0
                continue
            if run >= length:
                h -= (np.int64(words[i - length]) + 1) * top
            h = h * _MULTIPLIER + w + 1
            run += 1
            if run < length:
                continue
            key = _mix(h)
            cell = (key >> 20) & (sketch.size - 1)
            if turn == 0:
                if sketch[cell] < 2:
                    sketch[cell] += 1
            elif sketch[cell] >= 2:
                slot = key & (table.size - 1)
                while table[slot] >= 0 and keys[table[slot]] != key:
                    slot = (slot + 1) & (table.size - 1)
                k = table[slot]
                if k < 0:
                    if used < keys.size:
                        table[slot] = used
                        keys[used], counts[used], firsts[used] = key, 1, i - length + 1
                        used += 1
                else:
                    counts[k] += 1
    return used


@dataclass(frozen=True)
class Phrases:
    """A dictionary of phrases, one length after the other."""

    starts: np.ndarray  # int64 [entries + 1] into words
    words: np.ndarray  # int32
    levels: np.ndarray  # uint8 [entries], index into PHRASE_LENGTHS

    @property
    def n(self) -> int:
        """Number of phrases."""
        return len(self.levels)


def phrases_of(entries: list[np.ndarray]) -> Phrases:
    """From one int32 array [entries, length] for each length."""
    rows = [
        np.asarray(e, np.int32).reshape(-1, length) for e, length in zip(entries, PHRASE_LENGTHS, strict=True)
    ]
    lengths = np.concatenate(
        [np.full(len(e), length) for e, length in zip(rows, PHRASE_LENGTHS, strict=True)]
    )
    starts = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=starts[1:])
    levels = np.concatenate([np.full(len(e), level, np.uint8) for level, e in enumerate(rows)])
    return Phrases(starts, np.concatenate([e.ravel() for e in rows]).astype(np.int32), levels)


def choose_phrases(
    words: np.ndarray, eligible: np.ndarray, sizes: tuple[int, ...], least: int = 2
) -> Phrases:
    """The most frequent phrases of each length (of equally frequent ones the earliest), at most ``sizes``.

    words: int32 [n]. eligible: bool by word id. ``least``: occurrences that a phrase needs, at least 2."""
    n = len(words)
    bits = max(10, min(24, int(n).bit_length()))
    sketch = np.empty(1 << bits, np.uint8)
    capacity = max(1024, min(n // 3, 1 << 21))
    table = np.empty(1 << (2 * capacity - 1).bit_length(), np.int32)
    counts, firsts = np.empty(capacity, np.int32), np.empty(capacity, np.int32)
    keys = np.empty(capacity, np.int64)
    entries = []
    for length, size in zip(PHRASE_LENGTHS, sizes, strict=True):
        chosen = np.empty(0, np.int64)
        if size and n >= length:
            used = count_phrases(words, eligible, length, sketch, table, counts, firsts, keys)
            good = np.flatnonzero(counts[:used] >= least)
            if len(good) > size:  # the border class is cut by position, so that the choice is deterministic
                order = np.lexsort((firsts[good], -counts[good]))
                good = good[order[:size]]
            chosen = np.sort(firsts[good]).astype(np.int64)
        entries.append(words[chosen[:, None] + np.arange(length)])
    return phrases_of(entries)


@njit(cache=True)
def _hash_words(words, start, length):
    h = np.int64(0)
    for i in range(length):
        h = h * _MULTIPLIER + words[start + i] + 1
    return _mix(h)


@njit(cache=True)
def _lay_level(words, marks, level, length, first, last, book_words, book_starts, cover, events):
    """Greedily, from left to right, place phrases ``first..last`` of one length on words that are still
    free."""
    size = 16
    while size < 4 * (last - first):
        size *= 2
    table = np.full(size, _EMPTY, np.int32)
    for k in range(first, last):
        slot = _hash_words(book_words, book_starts[k], length) & (size - 1)
        while table[slot] >= 0:
            slot = (slot + 1) & (size - 1)
        table[slot] = k
    top = np.int64(1)
    for _ in range(length - 1):
        top *= _MULTIPLIER
    h = np.int64(0)
    free_from = 0
    for i in range(words.size):
        if i >= length:
            h -= (np.int64(words[i - length]) + 1) * top
        h = h * _MULTIPLIER + words[i] + 1
        start = i - length + 1
        if start < free_from or cover[start] or cover[i] or not (marks[start] >> level) & 1:
            continue
        slot = _mix(h) & (size - 1)
        while table[slot] >= 0:
            k = table[slot]
            same = True
            at = book_starts[k]
            for j in range(length):
                if book_words[at + j] != words[start + j]:
                    same = False
                    break
            if same:
                events[start] = k
                for j in range(length):
                    cover[start + j] = 1
                free_from = i + 1
                break
            slot = (slot + 1) & (size - 1)


@njit(cache=True)
def _lay(words, marks, lengths, bounds, book_words, book_starts, bigrams):
    cover = np.zeros(words.size, np.uint8)
    events = np.full(words.size, _EMPTY, np.int32)
    every = np.full(words.size, 1, np.uint16)
    for level in range(lengths.size - 1, -1, -1):
        if bounds[level] == bounds[level + 1] or words.size < lengths[level]:
            continue
        if level == 0 and not bigrams:
            continue
        _lay_level(
            words,
            every if level == 0 else marks,
            level,
            lengths[level],
            bounds[level],
            bounds[level + 1],
            book_words,
            book_starts,
            cover,
            events,
        )
    for i in range(words.size):
        if not cover[i]:
            events[i] = -2
    return events


def lay_phrases(words: np.ndarray, marks: np.ndarray, book: Phrases, bigrams: bool = True) -> np.ndarray:
    """int32 [n]: the phrase that starts at each word; -2 a word on its own, -1 inside a phrase.

    Longest first, never overlapping, and only where ``marks`` (see ``tiling.positions``) allows; pairs of
    words afterwards on all that is left."""
    bounds = np.searchsorted(book.levels, np.arange(len(PHRASE_LENGTHS) + 1))
    return _lay(words, marks, np.array(PHRASE_LENGTHS), bounds, book.words, book.starts, bigrams)


def keep_phrases(book: Phrases, keep: np.ndarray) -> Phrases:
    """The dictionary with only the entries that ``keep`` (bool) names."""
    entries = []
    for level, length in enumerate(PHRASE_LENGTHS):
        chosen = np.flatnonzero(keep & (book.levels == level))
        entries.append(book.words[book.starts[chosen][:, None] + np.arange(length)])
    return phrases_of(entries)
