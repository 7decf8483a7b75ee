"""Which free block to use next: the policy of :class:`~sharewell.kv.BlockManager`, and its default.

State lives in flat integer arrays over any buffer, so a million blocks cost megabytes, pages never touched
cost nothing, and the same arrays can lie in shared memory. (Memoryviews rather than numpy: reading one
integer is three times cheaper.)"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol


class OutOfBlocks(RuntimeError):
    """Fewer free blocks than asked for; nothing was changed."""


class BlocksTaken(RuntimeError):
    """Blocks that were to be revived belong to another process by now; nothing was changed."""

    def __init__(self, blocks: Sequence[int]) -> None:
        super().__init__(f"blocks {list(blocks)} were taken by another process")
        self.blocks = list(blocks)


class Allocator(Protocol):
    """Owner of the free blocks. Some of them are *cached*: free, but with content that somebody may want
    again."""

    shared: bool  # other processes take blocks from here, too

    @property
    def num_free(self) -> int: ...

    def bind(self, num_blocks: int) -> None:
        """Own blocks ``0 .. num_blocks - 1``, all free and without content."""
        ...

    def take(self, n: int, after: int = -1, revive: Sequence[int] = ()) -> list[int]:
        """Remove ``n`` free blocks, which lose their content, and the cached blocks ``revive``, which keep
        theirs: one operation, all or nothing. Returns the n blocks, to be used in this order behind block
        ``after`` (-1: first of a sequence). Raises OutOfBlocks or, when ``shared``, BlocksTaken."""
        ...

    def give(self, plain: Sequence[int], cached: Sequence[int]) -> None:
        """Return blocks without and with content, the least worth keeping first."""
        ...

    def free_blocks(self) -> list[int]:
        """All free blocks, after checking the allocator's own structure (AssertionError). O(num_blocks), for
        tests."""
        ...


def integers(n: int, code: Literal["i", "q"] = "i") -> memoryview:
    """n zeroed integers (int32; "q": int64) that take memory only where they are touched."""
    return memoryview(bytearray((8 if code == "q" else 4) * n)).cast(code)


class LRUAllocator:
    """Blocks without content first, then those never used, then cached ones, freed longest ago first. O(1) a
    block.

    A ring through two arrays: the plain blocks lie in front of the cached ones; blocks from ``fresh`` on are
    in no list."""

    shared = False

    def __init__(self) -> None:
        self.bind(0)

    def bind(self, num_blocks: int) -> None:
        self._lay_out(integers(self.words(num_blocks)), num_blocks)
        self._next[num_blocks] = self._previous[num_blocks] = num_blocks  # the sentinel: an empty ring

    @staticmethod
    def words(num_blocks: int) -> int:
        """Length of the int32 array that holds the state."""
        return 3 + 2 * (num_blocks + 1)

    def _lay_out(self, words: memoryview, num_blocks: int) -> None:
        self._n = num_blocks
        self._counts = words[:3]  # fresh (first never-used block), plain, cached
        self._next = words[3 : 4 + num_blocks]
        self._previous = words[4 + num_blocks : 5 + 2 * num_blocks]

    @property
    def num_free(self) -> int:
        return self._count_free()

    def _count_free(self) -> int:
        fresh, plain, cached = self._counts
        return self._n - fresh + plain + cached

    def take(self, n: int, after: int = -1, revive: Sequence[int] = ()) -> list[int]:
        self._check_room(n + len(revive))
        return self._take(n, revive)

    def _check_room(self, n: int) -> None:
        free = self._count_free()
        if n > free:
            raise OutOfBlocks(f"{n} blocks wanted, {free} free")

    def _take(self, n: int, revive: Sequence[int]) -> list[int]:
        counts = self._counts
        for block in revive:
            self._unlink(block)
        counts[2] -= len(revive)
        fresh, plain, _ = counts
        blocks = []
        for _ in range(min(n, plain)):
            blocks.append(self._pop_first())
        counts[1] = plain - len(blocks)
        new = min(n - len(blocks), self._n - fresh)
        blocks += range(fresh, fresh + new)
        counts[0] = fresh + new
        missing = n - len(blocks)
        for _ in range(missing):
            blocks.append(self._pop_first())
        counts[2] -= missing
        return blocks

    def give(self, plain: Sequence[int], cached: Sequence[int]) -> None:
        following, previous, end = self._next, self._previous, self._n
        for block in plain:
            first = following[end]
            following[block], previous[block] = first, end
            previous[first] = following[end] = block
        for block in cached:
            last = previous[end]
            following[block], previous[block] = end, last
            following[last] = previous[end] = block
        self._counts[1] += len(plain)
        self._counts[2] += len(cached)

    def _pop_first(self) -> int:
        first = self._next[self._n]
        self._unlink(first)
        return first

    def _unlink(self, block: int) -> None:
        before, behind = self._previous[block], self._next[block]
        self._next[before] = behind
        self._previous[behind] = before

    def free_blocks(self) -> list[int]:
        fresh, plain, cached = self._counts
        blocks, at, before = [], self._next[self._n], self._n
        while at != self._n:
            assert self._previous[at] == before and at < fresh, f"the ring is broken at block {at}"
            blocks.append(at)
            before, at = at, self._next[at]
        assert len(blocks) == plain + cached, "the ring's length differs from the counts"
        return blocks + list(range(fresh, self._n))
