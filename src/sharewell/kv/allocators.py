"""Which free block to use next: the policy of :class:`~sharewell.kv.BlockManager`.

State lives in flat int32 arrays over any buffer, so a million blocks cost megabytes, untouched pages cost nothing, and
the same arrays can lie in shared memory.
"""

from __future__ import annotations

from typing import Protocol


class OutOfBlocks(RuntimeError):
    """Fewer free blocks than asked for; nothing was changed."""


class Allocator(Protocol):
    """Owner of the free blocks. A freed block may keep content that somebody wants again (``reclaim``)."""

    @property
    def num_free(self) -> int: ...

    def reset(self, num_blocks: int) -> None:
        """Start with blocks 0 .. num_blocks - 1, all free."""
        ...

    def take(self, n: int) -> list[int]:
        """Remove n free blocks, the least useful first. Raises OutOfBlocks."""
        ...

    def give(self, block: int) -> None:
        """Return a block; it is now the most recently freed."""
        ...

    def reclaim(self, block: int) -> None:
        """Remove this very block from the free ones, because its content is used again."""
        ...


def int_array(n: int) -> memoryview:
    """n zeroed int32 that take memory only where they are touched."""
    return memoryview(bytearray(4 * n)).cast("i")


class LRUAllocator:
    """Never-used blocks first, then those freed longest ago: a doubly linked list in two arrays, O(1) each way."""

    def __init__(self) -> None:
        self.reset(0)

    def reset(self, num_blocks: int) -> None:
        self._n = num_blocks
        self._fresh = 0  # blocks from here on were never used and are in no list
        self._next, self._previous = int_array(num_blocks + 1), int_array(num_blocks + 1)
        self._next[num_blocks] = self._previous[num_blocks] = num_blocks  # the sentinel: an empty ring
        self._listed = 0

    @property
    def num_free(self) -> int:
        return self._listed + self._n - self._fresh

    def take(self, n: int) -> list[int]:
        if n > self.num_free:
            raise OutOfBlocks(f"{n} blocks wanted, {self.num_free} free")
        new = min(n, self._n - self._fresh)
        blocks = list(range(self._fresh, self._fresh + new))
        self._fresh += new
        for _ in range(n - new):
            oldest = self._next[self._n]
            self.reclaim(oldest)
            blocks.append(oldest)
        return blocks

    def give(self, block: int) -> None:
        end, last = self._n, self._previous[self._n]
        self._next[last] = self._previous[end] = block
        self._previous[block], self._next[block] = last, end
        self._listed += 1

    def reclaim(self, block: int) -> None:
        before, behind = self._previous[block], self._next[block]
        self._next[before], self._previous[behind] = behind, before
        self._listed -= 1
