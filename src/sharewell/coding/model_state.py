"""The adaptive state of the text model: two flat arrays, and where in them each part is."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .entropy_coder import HALF, rebuild_frequencies
from .spelling import LETTER_MASK, LETTER_WEIGHT_CELLS, LETTER_WEIGHTS, LETTERS
from .tiling import PHRASE_LENGTHS
from .tokens import BYTE_WORDS

LEVELS = len(PHRASE_LENGTHS)
MAX_EVENTS = (1 << 20) - 2  # ids of words and phrases together
FLAGS = 3  # inputs of a candidate's flag
SPACES = 5
CASES = 4

# The adaptive state is one array of int32 cells and one of int64 fields that say where in it each part
# begins: a handful of arrays passes from function to function for nothing, two dozen would cost more than
# the coding.
FLAG_CELLS, FLAG_WEIGHTS = 19, 20
MARK_CELLS, MARK_MASK, SPACE_WEIGHTS, CASE_WEIGHTS = 21, 22, 23, 24
CLASSES, FOLLOW1, FOLLOW2, FOLLOW3, FOLLOW_MASK = 25, 26, 27, 28, 29
MATCHES, MATCH_MASK, HISTORY, WORDS = 30, 31, 32, 33
STARTS = 34  # [LEVELS + 1]: where the phrases of each level begin
SITES = 64  # [8] scratch
OFFERED, PLACES = 72, 88  # [16] each, scratch: the candidates of an event, and where in the lists they are
TABLES = 104  # base, size, total of the frequency tables: words, then the phrases of each level
FIELDS = TABLES + 3 * (LEVELS + 1)
NUMBERS = 65536 + 2048  # within CLASSES: steps between first words, 160 cells a level


class Model(NamedTuple):
    """All adaptive state. Sizes follow the number of tokens, so that small blocks stay cheap."""

    cells: np.ndarray  # int32
    state: np.ndarray  # int64


def new_model(n_tokens: int, n_book: int, n_phrases: np.ndarray) -> Model:
    """Fresh state for ``n_tokens`` (history included), ``n_book`` words and ``n_phrases`` per level."""
    bits = min(22, max(10, int(n_tokens).bit_length() - 1))
    n_words = BYTE_WORDS + n_book
    third = 65536 * 3 // 10
    parts = (  # field, cells, initial value, field of the mask
        (LETTERS, 1 << min(19, max(13, bits - 1)), HALF, LETTER_MASK),
        (LETTER_WEIGHTS, LETTER_WEIGHT_CELLS, third, 0),
        (FLAG_CELLS, 1 << 16, HALF, 0),
        (FLAG_WEIGHTS, (FLAGS << 10) + (4 << 6), 24000, 0),
        (MARK_CELLS, 1 << min(22, bits + 1), HALF, MARK_MASK),
        (SPACE_WEIGHTS, SPACES << 8, third, 0),
        (CASE_WEIGHTS, CASES << 8, third, 0),
        (CLASSES, NUMBERS + 160 * LEVELS, HALF, 0),
        (FOLLOW1, (n_words + 2) * 8, 0, 0),
        (FOLLOW2, 4 << min(20, bits - 2), 0, 0),
        (FOLLOW3, 4 << min(20, bits - 2), 0, FOLLOW_MASK),
        (MATCHES, 1 << min(20, bits - 1), 0, MATCH_MASK),
        (HISTORY, n_words + 1, 0, 0),
    )
    sizes = [1 << max(0, int(n) - 1).bit_length() for n in (n_book, *n_phrases)]
    cells = np.zeros(sum(n for _, n, _, _ in parts) + sum(2 * n + 1 for n in sizes), np.int32)
    state = np.zeros(FIELDS, np.int64)
    at = 0
    for field, n, value, mask in parts:
        state[field] = at
        if value:
            cells[at : at + n] = value
        if mask:
            state[mask] = n - 1
        at += n
    for table, n in enumerate(sizes):
        state[TABLES + 3 * table : TABLES + 3 * table + 2] = at, n
        at += 2 * n + 1
    state[WORDS] = n_words
    state[STARTS + 1 : STARTS + 1 + LEVELS] = np.cumsum(n_phrases)
    return Model(cells, state)


def set_prior(m: Model, table: int, at: int, n: int, weight: int) -> None:
    """Give symbols ``at..at+n`` of a frequency table (0 words, 1.. phrases by level) the same starting
    count."""
    base = int(m.state[TABLES + 3 * table])
    m.cells[base + at : base + at + n] = weight


def start_frequencies(m: Model) -> None:
    """Build the tables once their starting counts are set."""
    for table in range(LEVELS + 1):
        rebuild_frequencies(m.cells, m.state[TABLES:], table)
