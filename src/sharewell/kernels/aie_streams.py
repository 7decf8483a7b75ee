"""The streams of the Tempus design, word by word and cycle by cycle: does it run, and does every cycle move a
word?

Readers of A (each word goes to all splits at once) and of B, a cascade of cores in every split, and one
writer that takes the tiles of the splits in turn, joined by bounded FIFOs (arXiv 2605.00536, dataflow
section). A core fills its tile of B, then takes A four rows at a time and passes on the partial sums of those
rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit


@dataclass(frozen=True)
class StreamShape:
    """Words a core takes and gives in one iteration, and the depths of the FIFOs in words.

    ``groups`` row groups of ``a_words`` words of A and ``c_words`` words of C each; ``b_words`` of B before
    them (the next tile of B loads while this one is used). Raises ValueError for a number below 1.
    """

    splits: int = 2
    cascade: int = 8
    iterations: int = 4
    groups: int = 4
    a_words: int = 4
    b_words: int = 16
    c_words: int = 2
    fifo_depth: int = 16
    c_depth: int = 8192

    def __post_init__(self) -> None:
        for name, value in self.__dict__.items():
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")

    @classmethod
    def of_tile(cls, dim_a: int, dim_ab: int, dim_b: int, item_bytes: int = 2, **more: int) -> StreamShape:
        """The words of a tile DIM_A x DIM_AB x DIM_B (multiples of 4) of elements of 2 or 4 bytes."""
        if min(dim_a, dim_ab, dim_b) < 4 or dim_a % 4 or dim_ab % 4 or dim_b % 4 or item_bytes not in (2, 4):
            raise ValueError(
                f"DIM must be multiples of 4 and item_bytes 2 or 4, "
                f"got {dim_a} x {dim_ab} x {dim_b}, {item_bytes}"
            )
        per_word = 16 // item_bytes
        return cls(
            groups=dim_a // 4,
            a_words=-(-4 * dim_ab // per_word),
            b_words=-(-dim_ab * dim_b // per_word),
            c_words=-(-4 * dim_b // per_word),
            **more,
        )

    @property
    def tile_words(self) -> int:
        """Words of one split's tile of C."""
        return self.groups * self.c_words

    @property
    def period(self) -> int:
        """Cycles of one iteration when the busiest stream moves a word in every cycle (initiation interval
        1): A, B, or the writer, which takes one word a cycle from all splits together."""
        return max(self.groups * self.a_words, self.b_words, self.splits * self.tile_words)


@dataclass(frozen=True)
class StreamRun:
    """``cycles`` in all; ``finished`` the cycle in which the writer had all tiles of each iteration.
    ``deadlock`` says who waits for whom, None when it ran to the end."""

    cycles: int
    finished: tuple[int, ...]
    deadlock: str | None

    def steady_period(self) -> float:
        """Cycles per iteration between the second and the last iteration. Raises ValueError below three of
        them."""
        if len(self.finished) < 3:
            raise ValueError(f"iterations must be at least 3 for a steady state, got {len(self.finished)}")
        return (self.finished[-1] - self.finished[1]) / (len(self.finished) - 2)


@njit(cache=True)
def _simulate(splits, cascade, iterations, groups, a_words, b_words, c_words, fifo_depth, c_depth):
    """Word counts only: a FIFO is the difference of what went in and out. Returns (cycles, finished, writer's
    split, words in C FIFOs, room in A FIFOs) at the end; finished is -1 where an iteration never ended."""
    tile, a_tile = groups * c_words, groups * a_words
    a_sent = np.zeros(cascade, np.int64)  # broadcast: the same count went into every split's FIFO
    a_taken = np.zeros((splits, cascade), np.int64)
    b_sent = np.zeros((splits, cascade), np.int64)
    b_taken = np.zeros((splits, cascade), np.int64)
    given = np.zeros((splits, cascade), np.int64)  # words of partial sums passed on, or into the C FIFO
    drained = np.zeros(splits, np.int64)
    finished = np.full(iterations, -1, np.int64)
    turn = 0  # the writer takes tile after tile, split after split
    written = 0
    cycle = 0
    while written < iterations * splits * tile:
        moved = False
        # Everyone decides on what there was when the cycle began.
        a_sent0, a_taken0, b_sent0 = a_sent.copy(), a_taken.copy(), b_sent.copy()
        b_taken0, given0, drained0 = b_taken.copy(), given.copy(), drained.copy()
        for j in range(cascade):
            room = a_sent0[j] < iterations * a_tile
            for s in range(splits):
                if a_sent0[j] - a_taken0[s, j] >= fifo_depth:
                    room = False
            if room:
                a_sent[j] += 1
                moved = True
        for s in range(splits):
            for j in range(cascade):
                if b_sent0[s, j] < iterations * b_words and b_sent0[s, j] - b_taken0[s, j] < fifo_depth:
                    b_sent[s, j] += 1
                    moved = True
                done = given0[s, j] // tile  # iterations this core has finished
                # B fills one of two buffers: at most one iteration ahead of the one being computed.
                if b_taken0[s, j] < b_sent0[s, j] and b_taken0[s, j] < (done + 2) * b_words:
                    b_taken[s, j] += 1
                    moved = True
                # A fills one of two buffers of four rows.
                group = given0[s, j] // c_words
                if a_taken0[s, j] < a_sent0[j] and a_taken0[s, j] < (group + 2) * a_words:
                    a_taken[s, j] += 1
                    moved = True
                # Partial sums of a row group: all its A and the tile's B are there, a word comes down the
                # cascade, and the one below has room for it (a register; the last core's FIFO).
                ready = given0[s, j] < iterations * tile
                ready = ready and a_taken0[s, j] >= (group + 1) * a_words
                ready = ready and b_taken0[s, j] >= (done + 1) * b_words
                if j > 0:
                    ready = ready and given0[s, j - 1] > given0[s, j]
                if j + 1 < cascade:
                    ready = ready and given0[s, j] - given0[s, j + 1] < 2
                else:
                    ready = ready and given0[s, j] - drained0[s] < c_depth
                if ready:
                    given[s, j] += 1
                    moved = True
        if drained0[turn] < given0[turn, cascade - 1]:
            drained[turn] += 1
            written += 1
            moved = True
            if drained[turn] % tile == 0:
                if turn == splits - 1:
                    finished[drained[turn] // tile - 1] = cycle + 1
                turn = (turn + 1) % splits
        if not moved:
            break
        cycle += 1
    return cycle, finished, turn, given[:, cascade - 1] - drained, a_sent, a_taken


def simulate_streams(shape: StreamShape) -> StreamRun:
    """Run until every tile is written or nobody can move. A broadcast word needs room in all splits, so a
    split whose results nobody takes holds up the others: with a C FIFO of at least one tile that cannot last.
    """
    out = _simulate(*shape.__dict__.values())
    cycles, finished, turn, waiting, a_sent, a_taken = out
    if (finished >= 0).all():
        return StreamRun(int(cycles), tuple(int(f) for f in finished), None)
    blocked = [s for s in range(shape.splits) if waiting[s] >= shape.c_depth]
    full = sorted(
        {
            s
            for s in range(shape.splits)
            for j in range(shape.cascade)
            if a_sent[j] - a_taken[s, j] >= shape.fifo_depth
        }
    )
    reason = (
        f"deadlock after {cycles} cycles: the writer waits for split {turn}, which waits for "
        f"words of A; the broadcast of A "
        f"waits for room in the A FIFO of split {', '.join(map(str, full))}; the C FIFO of split "
        f"{', '.join(map(str, blocked))} is full ({shape.c_depth} words, a tile has {shape.tile_words})"
    )
    return StreamRun(int(cycles), tuple(int(f) for f in finished if f >= 0), reason)
