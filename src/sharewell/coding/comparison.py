"""What a tiling buys: the same text, the same coder, other places where phrases may be looked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from . import text_block
from .phrases import book_sizes, choose_phrases
from .quasicryth import Buffer
from .tiling import PHRASE_LENGTHS, Arm
from .tokens import BYTE_WORDS, tokenize

DEEP = 13  # words from which on a phrase is called deep


@dataclass(frozen=True)
class ABRow:
    """One arm: bytes of the whole stream and of its parts, events, and phrases used from 13 words on."""

    arm: str
    total_bytes: int
    text_bytes: int
    phrase_bytes: int
    word_bytes: int
    events: int
    deep_phrases: int


def ab_test(
    data: Buffer, arms: Sequence[str | Arm], *, same_book: bool = True, longest: int = PHRASE_LENGTHS[-1]
) -> list[ABRow]:
    """The arms (see ``Arm.parse``) on one block of text, in their order.

    same_book: every arm lays the same dictionary, chosen by frequency, and stores of it what it uses (the
    paper's comparison); else the dictionary is pruned by each arm's own use. longest: words of the longest
    phrase allowed. Raises ValueError for data that are no text."""
    raw = np.frombuffer(bytearray(data), np.uint8)
    tokens = tokenize(raw)
    if tokens is None:
        raise ValueError("data must be text, got more kinds of white space than text has")
    eligible = np.bincount(tokens.words, minlength=tokens.n_words) >= 2
    eligible[:BYTE_WORDS] = True
    sizes = tuple(
        size if length <= longest else 0
        for size, length in zip(book_sizes(len(tokens.words)), PHRASE_LENGTHS, strict=True)
    )
    book = choose_phrases(tokens.words, eligible, sizes)
    empty = choose_phrases(tokens.words, eligible, (0,) * len(PHRASE_LENGTHS))
    rows = []
    for arm in [Arm.parse(a) if isinstance(a, str) else a for a in arms]:
        layout = text_block.prune(
            tokens, empty if arm.tiling == "none" else book, arm, passes=0 if same_book else 2
        )
        coded = text_block.encode(layout, 2 * len(raw) + 4096)
        if coded is None:
            raise ValueError("data must be text, got what does not get smaller")
        stream, sizes_of = coded
        chosen = layout.events[layout.events >= 0]
        deep = int((layout.book.levels[chosen] >= PHRASE_LENGTHS.index(DEEP)).sum())
        events = int((layout.events != -1).sum())
        rows.append(
            ABRow(str(arm), len(stream), sizes_of.text, sizes_of.phrases, sizes_of.words, events, deep)
        )
    return rows
