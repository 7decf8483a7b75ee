"""One block of text as a self-contained stream: its words, its phrases, and the text in terms of them."""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt

import numpy as np

from . import entropy_coder as coder
from .model_state import LEVELS, MAX_EVENTS, Model, new_model, set_prior, start_frequencies
from .phrase_model import FULL, OK, code_book, run
from .phrases import Phrases, book_sizes, choose_phrases, keep_phrases, lay_phrases
from .spelling import code_sorted_words
from .tiling import PHRASE_LENGTHS, Arm, arm_positions
from .tokens import BYTE_WORDS, MAX_RUN, MAX_SPACES, Tokens

_SPACES = b" \t\n\r"
_LENGTHS = np.array(PHRASE_LENGTHS, np.int64)


class ForgedStream(ValueError):
    """A stream that no encoder writes."""


@dataclass(frozen=True)
class Layout:
    """How a block is laid out in words and phrases, before it is coded."""

    tokens: Tokens
    book: Phrases  # words as in tokens
    events: np.ndarray  # int32 [n]: phrase, -2 a word, -1 inside a phrase


@dataclass(frozen=True)
class Sizes:
    """Bytes that the parts of a stream took."""

    header: int
    words: int
    phrases: int
    text: int


def lay_out(tokens: Tokens, arm: Arm, passes: int = 2, counts: np.ndarray | None = None) -> Layout:
    """Choose phrases and lay them where ``arm`` allows; ``passes``: how often phrases that are hardly used
    are dropped and the text laid out again."""
    words = tokens.words
    if counts is None:
        counts = np.bincount(words, minlength=tokens.n_words)
    eligible = counts >= 2
    eligible[:BYTE_WORDS] = True
    sizes = book_sizes(len(words)) if arm.tiling != "none" else (0,) * LEVELS
    return prune(tokens, choose_phrases(words, eligible, sizes), arm, passes)


def prune(tokens: Tokens, book: Phrases, arm: Arm, passes: int) -> Layout:
    """Lay out a given dictionary, dropping what is used less than twice, ``passes`` times; never-used phrases
    always go."""
    marks = arm_positions(arm, len(tokens.words))
    events = lay_phrases(tokens.words, marks, book)
    for turn in range(passes + 1):
        uses = np.bincount(events[events >= 0], minlength=book.n)
        keep = uses >= (2 if turn < passes else 1)
        if keep.all():
            break
        if turn == passes:
            renumber = np.cumsum(keep) - 1
            book = keep_phrases(book, keep)
            events[events >= 0] = renumber[events[events >= 0]]
        else:
            book = keep_phrases(book, keep)
            events = lay_phrases(tokens.words, marks, book)
    return Layout(tokens, book, events)


def _classes(uses: np.ndarray) -> np.ndarray:
    """Two classes for each doubling."""
    return np.floor(2 * np.log2(np.maximum(uses, 1))).astype(np.int64)


def _weight(kind: int) -> int:
    """Starting count of a class: 8 * 2^(3/8 class), in integers."""
    return isqrt(isqrt(isqrt(1 << (3 * kind + 24))))


def _writable(data: bytes) -> np.ndarray:
    return np.frombuffer(bytearray(data), np.uint8)  # read-only arrays would compile every kernel once more


class _Header:
    """The numbers at the start, in both directions."""

    def __init__(self, io: np.ndarray, buf: np.ndarray) -> None:
        self.io, self.buf, self.cells = io, buf, np.full(1200, coder.HALF, np.int32)

    def number(self, kind: int, value: int = 0) -> int:
        return int(coder.code_number(self.io, self.buf, self.cells, kind * 160, value))


def _code_classes(header: _Header, kinds: np.ndarray | None, most: int) -> list[tuple[int, int]]:
    """(class, size) of descending classes."""
    if kinds is not None:
        values, sizes = np.unique(kinds, return_counts=True)
        pairs = [(int(v), int(s)) for v, s in zip(values[::-1], sizes[::-1], strict=True)]
    else:
        pairs = []
    n = header.number(0, len(pairs))
    if n > 64:
        raise ForgedStream("more than 64 classes")
    out = []
    left = most
    for i in range(n):
        kind = header.number(1, pairs[i][0] if kinds is not None else 0)
        size = header.number(2, pairs[i][1] if kinds is not None else 0)
        left -= size
        if kind > 80 or left < 0:
            raise ForgedStream("a class or its size is out of range")
        out.append((kind, size))
    return out


def _reorder(book: Phrases, order: np.ndarray) -> Phrases:
    lengths = _LENGTHS[book.levels[order]]
    starts = np.zeros(len(order) + 1, np.int64)
    np.cumsum(lengths, out=starts[1:])
    source = np.repeat(book.starts[order] - starts[:-1], lengths) + np.arange(starts[-1])
    return Phrases(starts, book.words[source].astype(np.int32), book.levels[order])


def _ordered_phrases(book: Phrases, remap: np.ndarray, kinds: np.ndarray) -> tuple[Phrases, np.ndarray]:
    """By level, class (the most used first), then words, in the new ids; and the old number of each."""
    words = remap[book.words]
    order: list[int] = []
    for level, length in enumerate(PHRASE_LENGTHS):
        entries = np.flatnonzero(book.levels == level)
        rows = words[book.starts[entries][:, None] + np.arange(length)].astype(">i4")
        keys = [(-int(kind), row.tobytes()) for kind, row in zip(kinds[entries], rows, strict=True)]
        order += entries[sorted(range(len(keys)), key=keys.__getitem__)].tolist()
    chosen = np.array(order, np.int64)
    return _reorder(Phrases(book.starts, words, book.levels), chosen), chosen


def _start_model(
    n_tokens: int, classes: list[tuple[int, int]], phrase_classes: list[list[tuple[int, int]]]
) -> tuple[Model, np.ndarray, np.ndarray]:
    """The model with its prior, and of the phrases: levels, and bounds of the classes."""
    numbers = np.array([sum(size for _, size in of_level) for of_level in phrase_classes], np.int64)
    model = new_model(n_tokens, sum(size for _, size in classes), numbers)
    for table, pairs in enumerate([classes, *phrase_classes]):
        at = 0
        for kind, size in pairs:
            set_prior(model, table, at, size, _weight(kind))
            at += size
    start_frequencies(model)
    levels = np.repeat(np.arange(LEVELS, dtype=np.uint8), numbers)
    sizes = [size for of_level in phrase_classes for _, size in of_level]
    return model, levels, np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


def _code_spaces(
    header: _Header, arena: np.ndarray | None, offsets: np.ndarray | None, most: int
) -> tuple[np.ndarray, np.ndarray]:
    """The white-space strings from the fourth on; the first three are "", " " and a line feed."""
    n = header.number(4, 0 if offsets is None else len(offsets) - 1)
    if not 3 <= n <= MAX_SPACES:
        raise ForgedStream("number of white-space strings is out of range")
    strings = [b"", b" ", b"\n"]
    for k in range(3, n):
        given = b"" if arena is None or offsets is None else arena[offsets[k] : offsets[k + 1]].tobytes()
        length = header.number(5, len(given))
        most -= length
        if most < 0:
            raise ForgedStream("white-space strings are longer than the block")
        out = bytearray()
        symbol = 0
        for i in range(length):
            wanted = _SPACES.index(given[i]) if given else 0
            symbol = int(
                coder.code_tree(header.io, header.buf, header.cells, 1024 + symbol * 4, 2, wanted, 60)
            )
            out.append(_SPACES[symbol])
        strings.append(bytes(out))
    lengths = np.array([0, *map(len, strings)], np.int64)
    return _writable(b"".join(strings)), np.cumsum(lengths)


def encode(layout: Layout, capacity: int) -> tuple[bytes, Sizes] | None:
    """The stream; None when it would be longer than ``capacity`` bytes."""
    tokens, book, events = layout.tokens, layout.book, layout.events
    n, words = len(tokens.words), tokens.words
    alone = np.bincount(words[events == -2], minlength=tokens.n_words)
    counts = np.bincount(words, minlength=tokens.n_words)
    in_book = np.bincount(book.words, minlength=tokens.n_words)
    member = counts >= 2
    member[:BYTE_WORDS] = False
    chosen = np.flatnonzero(member)
    kinds = _classes(alone[chosen] + in_book[chosen])
    given, starts = tokens.arena.tobytes(), tokens.offsets.tolist()
    keys = [
        (-kind, given[starts[w] : starts[w + 1]])
        for kind, w in zip(kinds.tolist(), (chosen - BYTE_WORDS).tolist(), strict=True)
    ]
    order = np.array(sorted(range(len(keys)), key=keys.__getitem__), np.int64)
    names = [keys[i][1] for i in order.tolist()]
    chosen, kinds = chosen[order], kinds[order]
    n_book, n_words = len(chosen), BYTE_WORDS + len(chosen)
    if n_words + 1 + book.n > MAX_EVENTS:
        return None
    remap = np.full(tokens.n_words, n_words, np.int32)
    remap[:BYTE_WORDS] = np.arange(BYTE_WORDS)
    remap[chosen] = BYTE_WORDS + np.arange(n_book)
    phrase_kinds = _classes(np.bincount(events[events >= 0], minlength=book.n))
    sorted_book, phrase_order = _ordered_phrases(book, remap, phrase_kinds)
    place = np.empty(book.n + 1, np.int64)
    place[phrase_order] = np.arange(book.n)

    io, buf = coder.new_encoder(), np.empty(capacity + 64, np.uint8)
    header = _Header(io, buf)
    header.number(3, n)
    classes = _code_classes(header, kinds, n)
    spaces_of = _code_spaces(header, tokens.space_arena, tokens.space_offsets, len(tokens.space_arena))
    sorted_kinds = phrase_kinds[phrase_order]
    phrase_classes = [_code_classes(header, sorted_kinds[sorted_book.levels == v], n) for v in range(LEVELS)]
    after_header = int(io[coder.POSITION])
    first = len(sorted_book.words)
    m, levels, bounds = _start_model(first + n, classes, phrase_classes)
    arena = _writable(b"".join(names))
    offsets = np.concatenate([[0], np.cumsum([len(name) for name in names])]).astype(np.int64)
    _code_names(io, buf, m, classes, arena, offsets)
    after_words = int(io[coder.POSITION])
    history = np.empty(first + n, np.int32)
    history[:first] = sorted_book.words
    code_book(io, buf, m.cells, m.state, history, levels, _LENGTHS, bounds)
    after_phrases = int(io[coder.POSITION])
    history[first:] = remap[words]
    at_event = np.empty(first + n, np.int32)
    at_event[:first] = history[:first]
    text_events = at_event[first:]
    text_events[:] = events  # -1 inside a phrase stays
    text_events[events == -2] = history[first:][events == -2]
    text_events[events >= 0] = n_words + 1 + place[events[events >= 0]]
    escapes = (words[history[first:] == n_words] - BYTE_WORDS).astype(np.int32)
    run(
        io, buf, m.cells, m.state, np.zeros(MAX_RUN + 1, np.uint8), history, at_event, tokens.spaces,
        tokens.cases, first, escapes, tokens.arena, tokens.offsets, _casable(arena, offsets), arena, offsets,
        sorted_book.starts, sorted_book.words, levels, spaces_of[0], spaces_of[1], np.empty(0, np.uint8),
    )  # fmt: skip
    size = int(coder.finish(io, buf))
    if io[coder.OVERFLOW] or size > capacity:
        return None
    parts = (after_header, after_words, after_phrases, size)
    return buf[:size].tobytes(), Sizes(*np.diff((0, *parts)).tolist())


def _code_names(
    io: np.ndarray, buf: np.ndarray, m: Model, classes: list, arena: np.ndarray, offsets: np.ndarray
) -> None:
    prefixes = np.full(16 * 32, coder.HALF, np.int32)
    at = 0
    for _, size in classes:
        if code_sorted_words(io, buf, m.cells, m.state, prefixes, arena, offsets, at, at + size):
            raise ForgedStream("word list")
        at += size


def _casable(arena: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """uint8 by word id: whether a word is all small letters, so that a case flag can change it."""
    out = np.zeros(BYTE_WORDS + len(offsets) - 1, np.uint8)
    out[97:123] = 1
    if len(arena):
        small = np.add.reduceat((arena >= 97) & (arena <= 122), offsets[:-1], dtype=np.int64)
        large = np.add.reduceat((arena >= 65) & (arena <= 90), offsets[:-1], dtype=np.int64)
        out[BYTE_WORDS:] = (small > 0) & (large == 0)
    return out


def decode(data: bytes, size: int) -> bytes:
    """The block of exactly ``size`` bytes. Raises ForgedStream for anything else. Takes memory in
    proportion to ``size``, whatever the stream says."""
    buf = _writable(data)
    io = coder.new_decoder(buf)
    header = _Header(io, buf)
    n = header.number(3)
    if n > size:
        raise ForgedStream("more words than bytes")
    classes = _code_classes(header, None, n)
    space_arena, space_offsets = _code_spaces(header, None, None, size)
    phrase_classes = [_code_classes(header, None, n) for _ in range(LEVELS)]
    first = sum(
        length * sum(s for _, s in pairs)
        for length, pairs in zip(PHRASE_LENGTHS, phrase_classes, strict=True)
    )
    n_book = sum(s for _, s in classes)
    n_words = BYTE_WORDS + n_book
    if first > n or n_words + 1 + sum(s for pairs in phrase_classes for _, s in pairs) > MAX_EVENTS:
        raise ForgedStream("dictionary is larger than the text")
    m, levels, bounds = _start_model(first + n, classes, phrase_classes)
    arena, offsets = np.empty(size, np.uint8), np.zeros(n_book + 1, np.int64)
    _code_names(io, buf, m, classes, arena, offsets)
    arena = arena[: offsets[-1]]
    history = np.zeros(first + n, np.int32)
    if code_book(io, buf, m.cells, m.state, history, levels, _LENGTHS, bounds) != OK:
        raise ForgedStream("phrases")
    at_event = np.full(first + n, -1, np.int32)
    at_event[:first] = history[:first]
    starts = np.concatenate([[0], np.cumsum(_LENGTHS[levels])]).astype(np.int64)
    out = np.empty(size, np.uint8)
    status, written = run(
        io, buf, m.cells, m.state, np.zeros(MAX_RUN + 1, np.uint8), history, at_event, np.zeros(n, np.uint16),
        np.zeros(n, np.uint8), first, np.empty(0, np.int32), np.empty(0, np.uint8), np.zeros(1, np.int64),
        _casable(arena, offsets), arena, offsets, starts, history[:first].copy(), levels, space_arena,
        space_offsets, out,
    )  # fmt: skip
    if status != OK or written != size:
        raise ForgedStream("text is longer than stated" if status == FULL else "text")
    return out.tobytes()
