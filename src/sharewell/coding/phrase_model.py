"""The adaptive model of a text as events (words and phrases), their case and the white space between them.

One function, :func:`run`, encodes and decodes: both directions take the same steps on the same state. An
event is first sought among what followed the same context before: the longest match of at least four words,
then what came after the last three, two and one words; only if none of these candidates is right is it
coded by class and adaptive frequency. Candidates replace the global move-to-front cache and the LZ77 step
of Tacconelli 2026 (2603.14999); case and white space are predicted from the words on both sides, and from
the column."""

from __future__ import annotations

import numpy as np

from .entropy_coder import (
    ENCODING,
    code_adaptive,
    code_mixed3,
    code_mixed4,
    code_number,
    code_symbol,
    code_tree,
    lean,
)
from .model_state import (
    CLASSES,
    FLAG_CELLS,
    FLAG_WEIGHTS,
    FLAGS,
    FOLLOW1,
    FOLLOW2,
    FOLLOW3,
    FOLLOW_MASK,
    LEVELS,
    MATCH_MASK,
    MATCHES,
    NUMBERS,
    OFFERED,
    PLACES,
    STARTS,
    TABLES,
    WORDS,
)
from .spacing import code_case, code_space, kind_of
from .spelling import code_word
from .tokens import BYTE_WORDS, CAPITALIZED, MAX_RUN, PLAIN, UPPER

_BYTE, _WORD, _ESCAPE, _PHRASE = 0, 1, 2, 3  # classes of events; _PHRASE + level
_NEAREST = 4  # words that a match must have
_CONFIDENCE = 20  # a candidate: id + 1 in the low bits, confidence above
_ID = (1 << _CONFIDENCE) - 1
_SLOTS1, _SLOTS2, _SLOTS3 = 7, 3, 3
OK, FORGED, FULL = 0, 1, 2
# Within FLAG_CELLS: of one candidate, by its place, by its context and by what happened last; then of all
# together, by the first of them, what happened last, the last word and the last two words.
_BY_CONTEXT, _BY_PAST = 4096, 40960
_ANY, _ANY_PAST, _ANY_WORD, _ANY_PAIR = 50176, 52224, 56320, 57344


@lean
def _offer(cells, state, base, slots, order, n):
    """Add the candidates of one list that are not there yet to the ``n`` that are. Returns their number."""
    for j in range(slots):
        slot = np.int64(cells[base + j])
        if slot == 0:
            break
        candidate = (slot & _ID) - 1
        fresh = True
        for r in range(n):
            if state[OFFERED + r] == candidate:
                fresh = False
                break
        if fresh:
            state[OFFERED + n] = candidate
            state[PLACES + n] = (order * 8 + j) * 16 + (slot >> _CONFIDENCE)
            n += 1
    return n


@lean
def _choose(io, buf, cells, state, first, n, t1, h2, h3, past, symbol):
    """Which of the candidates ``first`` to ``n`` it is, or -1: first whether it is any of them, as most
    events that are none would else have to reject them all; the last is not asked for."""
    flags, weights = state[FLAG_CELLS], state[FLAG_WEIGHTS]
    known = np.int64(0)
    if io[ENCODING]:
        for k in range(first, n):
            if state[OFFERED + k] == symbol:
                known = 1
    top = state[PLACES + first]
    state[0] = flags + _ANY + (top << 2 | (past & 3))
    state[1] = flags + _ANY_WORD + (((t1 * 0x3C6EF372 + 7) * 0x9E3779B1 >> 11) & 0x3FF)
    state[2] = flags + _ANY_PAIR + ((h2 >> 30) & 0x1FFF)
    state[3] = flags + _ANY_PAST + (past << 4 | (n - first))
    at = weights + (FLAGS << 10) + ((past & 3) * 16 + (n - first)) * 4
    if not code_mixed4(io, buf, cells, state, at, known, 250):
        return np.int64(-1)
    for k in range(first, n - 1):
        candidate, place = state[OFFERED + k], state[PLACES + k]
        order = place >> 7
        context = t1
        if order == 3:
            context = h3 >> 30
        elif order == 2:
            context = h2 >> 30
        state[0] = flags + ((place << 2) | min(k, 3))
        state[1] = (
            flags
            + _BY_CONTEXT
            + (((context + ((place >> 4) & 7) * 0x3C6EF372 + order * 0x2545F491) * 0x9E3779B1 >> 11) & 0x7FFF)
        )
        state[2] = flags + _BY_PAST + ((place >> 4 << 8) | past)
        if code_mixed3(io, buf, cells, state, weights + place * FLAGS, np.int64(candidate == symbol), 250):
            return candidate
    return state[OFFERED + n - 1]


@lean
def _learn(table, base, slots, symbol):
    """Move ``symbol`` up in a list of candidates, or put it in."""
    for j in range(slots):
        slot = np.int64(table[base + j])
        if (slot & _ID) == symbol + 1:
            confidence = min((slot >> _CONFIDENCE) + 1, 15)
            slot = (confidence << _CONFIDENCE) | (symbol + 1)
            while j > 0 and (table[base + j - 1] >> _CONFIDENCE) <= confidence:
                table[base + j] = table[base + j - 1]
                j -= 1
            table[base + j] = slot
            return
    # a new one comes in behind the last candidate that was right before, and wears that one down
    j = slots - 1
    while j > 0 and (table[base + j - 1] >> _CONFIDENCE) == 0:
        table[base + j] = table[base + j - 1]
        j -= 1
    table[base + j] = symbol + 1
    if j > 0:
        table[base + j - 1] -= 1 << _CONFIDENCE


@lean
def _bucket(table, start, mask, h):
    """Start of the bucket of ``h`` in a checked table, emptied when it belonged to another context."""
    base = start + (((h >> 6) & mask) & ~3)
    check = np.int32(((h >> 40) & 0x3FFFFFFF) | 1)
    if table[base] != check:
        table[base] = check
        table[base + 1] = 0
        table[base + 2] = 0
        table[base + 3] = 0
    return base


@lean
def _code_class(io, buf, cells, base, kind):
    """The class of an event that no candidate was: the usual ones by one to three decisions. 19 cells."""
    if code_adaptive(io, buf, cells, base + 16, np.int64(kind == _WORD), 200):
        return np.int64(_WORD)
    if code_adaptive(io, buf, cells, base + 17, np.int64(kind == _BYTE), 200):
        return np.int64(_BYTE)
    if code_adaptive(io, buf, cells, base + 18, np.int64(kind == _ESCAPE), 200):
        return np.int64(_ESCAPE)
    return np.int64(code_tree(io, buf, cells, base, 4, kind, 200))


@lean
def code_event(io, buf, cells, state, levels, t1, t2, t3, guess, guess_length, past, symbol):
    """One event: an id below ``n_words`` is a word, ``n_words`` an escape, above it a phrase. ``guess``:
    what the longest match predicts, or -1. ``past``: bits that say how the last events were found. Returns
    (symbol, how it was found)."""
    n_words = state[WORDS]
    n_rejected = 0
    found = np.int64(-1)
    how = 0
    b1 = state[FOLLOW1] + (t1 + 1) * 8
    h2 = ((t1 + 1) * 0x9E3779B97F4A7C1 + (t2 + 1) * 0x2545F4914F6CDD1) * 0x5851F42D4C957F2D
    h2 ^= h2 >> 29 & 0x7FFFFFFFF
    h3 = (h2 + (t3 + 1)) * 0x2127599BF4325C37
    h3 ^= h3 >> 31 & 0x1FFFFFFFF
    h2 &= 0x7FFFFFFFFFFFFFFF
    h3 &= 0x7FFFFFFFFFFFFFFF
    b2 = _bucket(cells, state[FOLLOW2], state[FOLLOW_MASK], h2)
    b3 = _bucket(cells, state[FOLLOW3], state[FOLLOW_MASK], h3)
    if guess >= 0:
        flags = state[FLAG_CELLS]
        state[0] = flags + min(guess_length, 31) * 4
        state[1] = flags + _BY_CONTEXT + (((t1 * 0x3C6EF372 + 99) * 0x9E3779B1 >> 11) & 0x7FFF)
        state[2] = flags + _BY_PAST + (27 << 8) + (past << 3 | min(guess_length >> 2, 7))
        weights = state[FLAG_WEIGHTS] + min(guess_length, 15) * FLAGS
        if code_mixed3(io, buf, cells, state, weights, np.int64(guess == symbol), 250):
            found = guess
            how = 3
        else:
            state[OFFERED] = guess
            n_rejected = 1
    if found < 0:
        n = _offer(cells, state, b3 + 1, _SLOTS3, 3, n_rejected)
        n = _offer(cells, state, b2 + 1, _SLOTS2, 2, n)
        n = _offer(cells, state, b1, _SLOTS1, 1, n)
        if n > n_rejected:
            found = _choose(io, buf, cells, state, n_rejected, n, t1, h2, h3, past, symbol)
            if found >= 0:
                for k in range(n_rejected, n):
                    if state[OFFERED + k] == found:
                        how = 1 if state[PLACES + k] < 256 else 2
    if found < 0:
        how = 0
        kind = np.int64(_WORD)
        index = np.int64(0)
        if io[ENCODING]:
            if symbol < BYTE_WORDS:
                kind = np.int64(_BYTE)
            elif symbol == n_words:
                kind = np.int64(_ESCAPE)
            elif symbol > n_words:
                kind = np.int64(_PHRASE + levels[symbol - n_words - 1])
                index = symbol - n_words - 1
            else:
                index = symbol - BYTE_WORDS
        kind = _code_class(
            io, buf, cells, state[CLASSES] + 65536 + (kind_of(t1) * 16 + (past & 15)) * 32, kind
        )
        if kind == _BYTE:
            found = code_tree(
                io, buf, cells, state[CLASSES] + (t1 if 0 <= t1 < BYTE_WORDS else 0) * 256, 8, symbol, 200
            )
        elif kind == _ESCAPE:
            found = np.int64(n_words)
        elif kind == _WORD:
            if state[TABLES + 2] == 0:
                return np.int64(-1), 0
            found = BYTE_WORDS + code_symbol(io, buf, cells, state[TABLES:], 0, index, 24)
        else:
            table = kind - _PHRASE + 1
            if table > LEVELS or state[TABLES + 3 * table + 2] == 0:
                return np.int64(-1), 0
            first = state[STARTS + table - 1]
            found = (
                n_words + 1 + first + code_symbol(io, buf, cells, state[TABLES:], table, index - first, 24)
            )
    _learn(cells, b3 + 1, _SLOTS3, found)
    _learn(cells, b2 + 1, _SLOTS2, found)
    _learn(cells, b1, _SLOTS1, found)
    return found, how


@lean
def _remember(cells, state, words, at):
    """Enter the four words that end at ``at``; returns the place where the same four ended before, or -1."""
    if at < 3:
        return np.int64(-1)
    h = np.int64(0)
    for i in range(at - 3, at + 1):
        h = (h + words[i] + 1) * 0x5851F42D4C957F2D
        h ^= h >> 30
    slot = state[MATCHES] + ((h >> 20) & state[MATCH_MASK])
    before = np.int64(cells[slot]) - 1
    cells[slot] = at + 1
    return before


@lean
def _match_length(words, a, b):
    n = 0
    while n < 32 and a - n >= 0 and words[a - n] == words[b - n]:
        n += 1
    return n


@lean
def code_book(io, buf, cells, state, words, levels, lengths, bounds):
    """The dictionary's phrases as text that both sides read first. ``words`` and ``starts`` of the entries
    follow from ``levels``; each class ``bounds[k]..bounds[k+1]`` is sorted, so that first words are stored
    as steps. Returns OK or FORGED."""
    n_words = state[WORDS]
    at = 0
    k = 0
    for c in range(bounds.size - 1):
        first = np.int64(0)
        for _ in range(bounds[c], bounds[c + 1]):
            length = lengths[levels[k]]
            base = state[CLASSES] + NUMBERS + levels[k] * 160
            first += code_number(io, buf, cells, base, np.int64(words[at]) - first)
            if first >= n_words:
                return FORGED
            words[at] = first
            t1, t2, t3 = first, np.int64(-1), np.int64(-1)
            past = 0
            _remember(cells, state, words, at)
            pointer, matched = np.int64(-1), 0
            for i in range(1, length):
                guess = np.int64(-1)
                if pointer >= 0:
                    guess = np.int64(words[pointer])
                symbol, how = code_event(
                    io, buf, cells, state, levels, t1, t2, t3, guess, matched, past, np.int64(words[at + i])
                )
                if symbol < 0 or symbol >= n_words:
                    return FORGED
                words[at + i] = symbol
                past = ((past << 2) | how) & 255
                t3, t2, t1 = t2, t1, symbol
                if pointer >= 0 and words[pointer] == symbol:
                    pointer += 1
                    matched += 1
                else:
                    pointer = -1
                before = _remember(cells, state, words, at + i)
                if pointer < 0 and before >= 0:
                    matched = _match_length(words, before, at + i)
                    if matched >= min(_NEAREST, i + 1):
                        pointer = before + 1
            at += length
            k += 1
    return OK


@lean
def run(
    io,
    buf,
    cells,
    state,
    spelled,  # uint8 [MAX_RUN + 1] scratch
    words,  # int32 [history + n]: the book's words, then the text's
    at_event,  # int32 [history + n]: the event that starts at a word, or -1
    spaces,  # uint16 [n]
    cases,  # uint8 [n]
    first,  # where the text begins
    escapes,  # encoding: int32, the spelled words in order, ids into given_*
    given_arena,
    given_offsets,
    casable,  # uint8 [n_words]: whether a word has cases
    arena,  # uint8: the book's words, [offsets[i] .. offsets[i + 1]] is word 256 + i
    offsets,
    phrase_starts,
    phrase_words,
    phrase_levels,
    space_arena,
    space_offsets,
    out,  # uint8: what is decoded
):
    """Code the text. Encoding reads words, at_event, spaces and cases; decoding fills them, and ``out``.
    Returns (status, bytes in out)."""
    n, n_words = words.size, state[WORDS]
    encoding = io[ENCODING]
    bits = 1
    while (1 << bits) < space_offsets.size - 1:
        bits += 1
    t1 = t2 = t3 = np.int64(-1)
    previous = np.int64(0)  # the last word, for white space and case
    past = 0
    pointer, matched = np.int64(-1), 0
    column = np.int64(0)
    space = last = np.int64(0)
    line = np.int64(2)
    case = 0
    before_length = 0
    n_escapes = 0
    size = 0  # of out
    at = np.int64(first)
    while at < n:
        guess = np.int64(-1)
        if pointer >= 0:
            guess = np.int64(at_event[pointer])
        symbol, how = code_event(
            io, buf, cells, state, phrase_levels, t1, t2, t3, guess, matched, past, np.int64(at_event[at])
        )
        if symbol < 0:
            return FORGED, size
        past = ((past << 2) | how) & 255
        step = 1
        start = np.int64(0)
        if symbol > n_words:
            start = phrase_starts[symbol - n_words - 1]
            step = phrase_starts[symbol - n_words] - start
            if at + step > n:
                return FORGED, size
        at_event[at] = symbol
        for i in range(step):
            word = symbol if symbol <= n_words else np.int64(phrase_words[start + i])
            length = 1
            if word == n_words:
                if encoding:
                    source = given_offsets[escapes[n_escapes]]
                    length = given_offsets[escapes[n_escapes] + 1] - source
                    for j in range(length):
                        spelled[j] = given_arena[source + j]
                length = code_word(io, buf, cells, state, spelled, 0, length)
                if length < 0:
                    return FORGED, size
                n_escapes += 1
            elif word >= BYTE_WORDS:
                length = offsets[word - BYTE_WORDS + 1] - offsets[word - BYTE_WORDS]
            follows = pointer >= 0 and pointer > first
            # the white space before this word, now that both its neighbours are known
            if at > first:
                guess = np.int64(spaces[pointer - 1 - first]) if follows else np.int64(-1)
                space = code_space(
                    io,
                    buf,
                    cells,
                    state,
                    bits,
                    previous,
                    before_length < MAX_RUN,
                    word,
                    length,
                    column,
                    last,
                    line,
                    guess,
                    matched,
                    np.int64(spaces[at - 1 - first]),
                )
                if space >= space_offsets.size - 1:
                    return FORGED, size
                spaces[at - 1 - first] = space
                for j in range(space_offsets[space], space_offsets[space + 1]):
                    byte = space_arena[j]
                    column += 1
                    if byte == 10:
                        column = np.int64(0)
                        line = space
                    if not encoding:
                        if size >= out.size:
                            return FULL, size
                        out[size] = byte
                        size += 1
                last = space
            is_casable = 0
            if word == n_words:
                for j in range(length):
                    if 65 <= spelled[j] <= 90:
                        is_casable = 0
                        break
                    if 97 <= spelled[j] <= 122:
                        is_casable = 1
            else:
                is_casable = casable[word]
            before, case = case, PLAIN
            if is_casable:
                guess = np.int64(-1)
                if pointer >= first and words[pointer] == word:
                    guess = np.int64(cases[pointer - first])
                case = code_case(
                    io,
                    buf,
                    cells,
                    state,
                    previous,
                    word,
                    word,
                    space,
                    before,
                    guess,
                    matched,
                    cases[at - first],
                )
            cases[at - first] = case
            words[at] = word
            if not encoding:
                if size + length > out.size:
                    return FULL, size
                for j in range(length):
                    if word < BYTE_WORDS:
                        byte = np.int64(word)
                    elif word == n_words:
                        byte = np.int64(spelled[j])
                    else:
                        byte = np.int64(arena[offsets[word - BYTE_WORDS] + j])
                    if 97 <= byte <= 122 and (case == UPPER or (case == CAPITALIZED and j == 0)):
                        byte -= 32
                    out[size] = byte
                    size += 1
            column += length
            before_length = length
            previous = word
            t3, t2, t1 = t2, t1, word
            if pointer >= 0 and words[pointer] == word:
                pointer += 1
                matched += 1
            else:
                pointer = np.int64(-1)
            recalled = _remember(cells, state, words, at)
            if pointer < 0 and recalled >= 0:
                matched = _match_length(words, recalled, at)
                if matched >= _NEAREST:
                    pointer = recalled + 1
            at += 1
    if n > first:
        guess = np.int64(-1)
        space = code_space(
            io,
            buf,
            cells,
            state,
            bits,
            previous,
            True,
            10,
            0,
            column,
            last,
            line,
            guess,
            0,
            np.int64(spaces[n - 1 - first]),
        )
        if space >= space_offsets.size - 1:
            return FORGED, size
        spaces[n - 1 - first] = space
        if not encoding:
            for j in range(space_offsets[space], space_offsets[space + 1]):
                if size >= out.size:
                    return FULL, size
                out[size] = space_arena[j]
                size += 1
    return OK, size
