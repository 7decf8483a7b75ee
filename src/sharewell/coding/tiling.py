"""Cut-and-project tilings of a line of words, their hierarchy, and where each level may look for a phrase.

Source: Tacconelli 2026 (2603.14999) for the tilings and their deflation; the coverage limits follow from the
Fibonacci substitution and are tested exactly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numba import njit

PHRASE_LENGTHS = (2, 3, 5, 8, 13, 21, 34, 55, 89, 144)  # words; Fibonacci numbers
GOLDEN = (math.sqrt(5) - 1) / 2
_OTHERS = (
    math.sqrt(58) - 7,
    62 * (99 - math.sqrt(5)) / 9796,
    math.sqrt(13) - 3,
    0.502,
    0.619,
    0.617,
    0.616,
    0.620,
    0.614,
    0.621,
    0.622,
    0.612,
)
TILINGS = ("fibonacci", "multi", "period5", "none", "all")
_PERIOD5 = (1, 1, 0, 1, 0)  # L L S L S: eight words


@dataclass(frozen=True)
class Arm:
    """One arm of a comparison: which tilings, and how many of them. ``fib:12``, ``p5:1``, ``multi``, ``all``.

    Raises ValueError for an unknown tiling or a number out of its range.
    """

    tiling: str
    number: int = 1

    def __post_init__(self) -> None:
        if self.tiling not in TILINGS:
            raise ValueError(f"tiling must be one of {', '.join(TILINGS)}, got {self.tiling!r}")
        most = {"fibonacci": 64, "period5": 8, "multi": 64}.get(self.tiling, 1)
        if not 1 <= self.number <= most:
            raise ValueError(f"number of {self.tiling} tilings must be in [1, {most}], got {self.number}")

    @classmethod
    def parse(cls, text: str) -> Arm:
        """``name[:number]``; ``fib`` and ``p5`` are short for fibonacci and period5."""
        name, _, number = text.strip().partition(":")
        name = {"fib": "fibonacci", "p5": "period5"}.get(name, name)
        if number and not number.isdigit():
            raise ValueError(f"arm must look like fib:12, p5:8, multi, none or all, got {text!r}")
        return cls(name, int(number) if number else {"fibonacci": 12, "multi": 36}.get(name, 1))

    def __str__(self) -> str:
        return self.tiling if self.tiling in ("none", "all") else f"{self.tiling}:{self.number}"


@njit(cache=True)
def cut_and_project(alpha, phase, n_words):
    """(start of each tile [tiles], whether it is long): tile k is long (two words) iff
    floor((k+1) alpha + phase) - floor(k alpha + phase) = 1; two short ones in a row merge to a long one. What
    sticks out at the end is cut off."""
    starts, long = np.empty(n_words, np.int32), np.empty(n_words, np.uint8)
    n, at, k = 0, 0, 0
    before = np.floor(phase)
    while at < n_words:
        k += 1
        following = np.floor(k * alpha + phase)
        is_long = following - before == 1
        before = following
        if not is_long and n and not long[n - 1]:
            long[n - 1] = 1
            at += 1
            continue
        if is_long and at + 2 > n_words:
            break
        starts[n], long[n] = at, is_long
        n += 1
        at += 2 if is_long else 1
    return starts[:n], long[:n]


@njit(cache=True)
def periodic(pattern, shift, n_words):
    """Tiles that repeat ``pattern`` (1 long, 0 short) from word ``shift`` on; single words before it are
    short."""
    starts, long = np.empty(n_words, np.int32), np.empty(n_words, np.uint8)
    n, at, k = 0, 0, 0
    while at < n_words:
        is_long = 0
        if at >= shift:
            is_long = pattern[k % pattern.size]
            k += 1
        if is_long and at + 2 > n_words:
            break
        starts[n], long[n] = at, is_long
        n += 1
        at += 2 if is_long else 1
    return starts[:n], long[:n]


@njit(cache=True)
def mark_hierarchy(starts, long, n_words, lengths, marks):
    """Set bit m of ``marks[i]`` where a long tile of level m that spans ``lengths[m]`` words starts at word
    i.

    Deflation: a neighbouring pair (long, short) becomes long on the next level, any other tile short. Tiles
    whose span is another one (after merged short tiles) are passed over. ``starts`` and ``long`` are used
    up."""
    n = starts.size
    for level in range(lengths.size):
        any_long = False
        for i in range(n):
            if long[i]:
                end = starts[i + 1] if i + 1 < n else n_words
                if end - starts[i] == lengths[level]:
                    marks[starts[i]] |= 1 << level
                    any_long = True
        if not any_long and level:
            break
        i = kept = 0
        while i < n:
            starts[kept] = starts[i]
            if long[i] and i + 1 < n and not long[i + 1]:
                long[kept] = 1
                i += 2
            else:
                long[kept] = 0
                i += 1
            kept += 1
        n = kept


_LENGTHS = np.array(PHRASE_LENGTHS, np.int32)


def positions(alpha: float, phase: float, n_words: int) -> np.ndarray:
    """uint16 [n_words]: bit m is set where the tiling (alpha, phase) may look for a phrase of
    ``PHRASE_LENGTHS[m]`` words. Raises ValueError for an alpha outside (0, 1) or a negative ``n_words``."""
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must be in (0, 1), got {alpha}")
    if n_words < 0:
        raise ValueError(f"n_words must be at least 0, got {n_words}")
    marks = np.zeros(n_words, np.uint16)
    mark_hierarchy(*cut_and_project(alpha, phase, n_words), n_words, _LENGTHS, marks)
    return marks


def period5_positions(shift: int, n_words: int) -> np.ndarray:
    """As :func:`positions`, of the tiling with period L L S L S that starts at word ``shift``."""
    marks = np.zeros(n_words, np.uint16)
    tiles = periodic(np.array(_PERIOD5, np.uint8), shift, n_words)
    mark_hierarchy(*tiles, n_words, _LENGTHS, marks)
    return marks


def arm_positions(arm: Arm, n_words: int) -> np.ndarray:
    """uint16 [n_words]: the union over all tilings of ``arm``; for ``all`` every bit, for ``none`` no bit.

    The bit of two words is of no consequence: bigrams are looked up at every word that is left over."""
    if arm.tiling == "all":
        return np.full(n_words, (1 << len(PHRASE_LENGTHS)) - 1, np.uint16)
    marks = np.zeros(n_words, np.uint16)
    if arm.tiling == "period5":
        for shift in range(arm.number):
            marks |= period5_positions(shift, n_words)
    elif arm.tiling != "none":
        for alpha, phase in tilings(arm):
            mark_hierarchy(*cut_and_project(alpha, phase, n_words), n_words, _LENGTHS, marks)
    return marks


def tilings(arm: Arm) -> list[tuple[float, float]]:
    """(alpha, phase) of the arm's cut-and-project tilings: golden ones with phases frac(i / phi), then, for
    ``multi``, 24 of other slopes."""
    golden = [(GOLDEN, i * GOLDEN % 1) for i in range(arm.number)]
    if arm.tiling == "fibonacci":
        return golden
    others = [(alpha, phase) for alpha in _OTHERS for phase in (0.0, 0.5)]
    return (golden[:12] + others + golden[12:])[: arm.number]


def coverage(marks: np.ndarray) -> dict[int, float]:
    """Share of the words inside long tiles, by span in words (of one tiling, whose tiles do not overlap)."""
    return {
        length: length * int(np.count_nonzero(marks & (1 << level))) / max(1, len(marks))
        for level, length in enumerate(PHRASE_LENGTHS)
    }
