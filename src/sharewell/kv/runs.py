"""Free space as runs of consecutive blocks, so that a sequence's pages lie together and move in few copies.

After the block groups of FastSwitch (Shen et al., 2024, arXiv 2411.18424), with prefix caching added: a run
of cached blocks has an age, and of the runs that fit, the one whose cached blocks were used longest ago is
taken."""

from __future__ import annotations

from collections.abc import Sequence

from .allocators import OutOfBlocks, integers

_BINS = 32  # bin k lists the plain segments of 2**(k-1) .. 2**k - 1 blocks
_SCAN = 64  # at most so many segments are looked at for one run
_USED = -1


class RunAllocator:
    """Hands out consecutive blocks; tables stay per block, so no reader of them changes.

    A sequence grows in place when the next block is free. A new run starts up to ``group_blocks`` behind the
    sequence before it in the largest free run, leaving that one room to grow; when only such rooms are left
    they are halved.

    The free blocks are *segments*: plain ones (no content, coalesced with their neighbours, listed by size)
    and cached ones (given back together, listed by age, given up from their end so that prefixes live
    longest). A run may span several segments. A segment's first and last block name each other, so all steps
    are O(1) but for the bounded scan."""

    shared = False

    def __init__(self, group_blocks: int = 60) -> None:
        if group_blocks < 0:
            raise ValueError(f"group_blocks must be at least 0, got {group_blocks}")
        self._group = group_blocks
        self.bind(0)

    def bind(self, num_blocks: int) -> None:
        self._n = self._free = num_blocks
        self._epoch = 0
        self._stamp = integers(
            num_blocks, "q"
        )  # _USED, 0 for plain, else the epoch in which it was given back
        self._other = integers(num_blocks)
        self._next, self._previous = integers(num_blocks + _BINS), integers(num_blocks + _BINS)
        self._oldest = (
            num_blocks  # sentinel of the cached segments in order of age; bin k's sentinel is _oldest + k
        )
        for sentinel in range(num_blocks, num_blocks + _BINS):
            self._next[sentinel] = self._previous[sentinel] = sentinel
        self._bins = 0  # bit k: bin k is not empty
        if num_blocks:
            self._add_plain(0, num_blocks - 1)

    @property
    def num_free(self) -> int:
        return self._free

    def take(self, n: int, after: int = -1, revive: Sequence[int] = ()) -> list[int]:
        if n + len(revive) > self._free:
            raise OutOfBlocks(f"{n + len(revive)} blocks wanted, {self._free} free")
        for block in revive:
            self._carve(self._start_of(block), block, block)
        blocks: list[int] = []
        while len(blocks) < n:
            segment, first, last = self._find(n - len(blocks), after)
            after = last
            blocks += range(first, last + 1)
            while segment <= last:
                end = self._other[segment]
                self._carve(segment, max(first, segment), min(last, end))
                segment = end + 1
        return blocks

    def give(self, plain: Sequence[int], cached: Sequence[int]) -> None:
        for first, last in _runs(plain):
            stamp = self._stamp
            for block in range(first, last + 1):
                stamp[block] = 0
            if first and stamp[first - 1] == 0:
                self._remove_plain(before := self._other[first - 1])
                first = before
            if last + 1 < self._n and stamp[last + 1] == 0:
                self._remove_plain(last + 1)
                last = self._other[last + 1]
            self._add_plain(first, last)
        if cached:
            self._epoch += 1
        for first, last in _runs(cached):
            for block in range(first, last + 1):
                self._stamp[block] = self._epoch
            self._add_cached(first, last, self._previous[self._oldest])
        self._free += len(plain) + len(cached)

    # Which run

    def _find(self, n: int, after: int) -> tuple[int, int, int]:
        """A run of at most ``n`` blocks, and the segment in which it starts: (segment, first, last)."""
        following = after + 1
        if after >= 0 and following < self._n and self._may_grow_into(following):
            return following, following, min(self._other[following], after + n)
        plain = self._largest_plain(n)
        if plain is not None:
            start, end = plain
            length = end - start + 1
            if length >= n:
                grows = start > 0 and self._stamp[start - 1] == _USED
                first = start + (min((length - n) // 2, self._group) if grows else 0)
                return start, first, first + n - 1
        found = self._oldest_cached(n)
        if found is None:
            assert plain is not None, "free blocks are in no segment"
            return plain[0], plain[0], plain[1]
        _, first, last = found
        if plain is not None and last - first < min(n - 1, plain[1] - plain[0]):
            return plain[0], plain[0], plain[1]
        return found

    def _may_grow_into(self, block: int) -> bool:
        """Plain blocks, or cached ones of the older half: a hot prefix is worth more than growing in
        place."""
        stamp = self._stamp[block]
        if stamp <= 0:
            return stamp == 0
        return 2 * stamp <= self._epoch + self._stamp[self._next[self._oldest]]

    def _largest_plain(self, n: int) -> tuple[int, int] | None:
        """A segment of the highest bin, one of at least ``n`` blocks if there is one among the first."""
        if not self._bins:
            return None
        sentinel = self._oldest + self._bins.bit_length() - 1
        at = best = self._next[sentinel]
        for _ in range(_SCAN):
            if at == sentinel:
                break
            length = self._other[at] - at + 1
            if length >= n:
                return at, self._other[at]
            if length > self._other[best] - best + 1:
                best = at
            at = self._next[at]
        return best, self._other[best]

    def _oldest_cached(self, n: int) -> tuple[int, int, int] | None:
        """Of the runs of ``n`` blocks around old cached segments the one whose newest block is oldest; else
        the longest."""
        best, best_newest, best_length = None, 0, 0
        at = self._next[self._oldest]
        for _ in range(_SCAN):
            if at == self._oldest or (best_length == n and self._stamp[at] >= best_newest):
                break
            segment, first, last, newest = self._grown(at, n)
            length = last - first + 1
            if length > best_length or (length == best_length and newest < best_newest):
                best, best_newest, best_length = (segment, first, last), newest, length
            at = self._next[at]
        return best

    def _grown(self, segment: int, n: int) -> tuple[int, int, int, int]:
        """The run of up to ``n`` blocks that ends with ``segment``, or goes on behind it when the space
        before it is too short: (segment of its start, first, last, newest stamp)."""
        stamp, other = self._stamp, self._other
        last, newest = other[segment], stamp[segment]
        first = max(segment, last - n + 1)
        while last - first + 1 < n and segment > 0 and stamp[segment - 1] != _USED:
            segment = other[segment - 1]
            newest = max(newest, stamp[segment])
            first = max(segment, last - n + 1)
        while last - first + 1 < n and last + 1 < self._n and stamp[last + 1] != _USED:
            newest = max(newest, stamp[last + 1])
            last = min(other[last + 1], first + n - 1)
        return segment, first, last, newest

    # Segments

    def _start_of(self, block: int) -> int:
        """The start of the cached segment around ``block``; prefixes are revived from their start, so
        near."""
        stamp = self._stamp[block]
        while block > 0 and self._stamp[block - 1] == stamp:
            block -= 1
        return block

    def _carve(self, start: int, first: int, last: int) -> None:
        """Take ``first .. last`` out of the segment at ``start``; what is left of it keeps its age."""
        end, stamp = self._other[start], self._stamp[start]
        if stamp == 0:
            self._remove_plain(start)
            if start < first:
                self._add_plain(start, first - 1)
            if last < end:
                self._add_plain(last + 1, end)
        else:
            before = self._previous[start]
            self._unlink(start)
            if last < end:
                self._add_cached(last + 1, end, before)
            if start < first:
                self._add_cached(start, first - 1, before)
        for block in range(first, last + 1):
            self._stamp[block] = _USED
        self._free -= last - first + 1

    def _add_plain(self, start: int, end: int) -> None:
        self._other[start], self._other[end] = end, start
        size_bin = (end - start + 1).bit_length()
        self._bins |= 1 << size_bin
        self._link(start, self._oldest + size_bin)

    def _remove_plain(self, start: int) -> None:
        self._unlink(start)
        size_bin = (self._other[start] - start + 1).bit_length()
        sentinel = self._oldest + size_bin
        if self._next[sentinel] == sentinel:
            self._bins &= ~(1 << size_bin)

    def _add_cached(self, start: int, end: int, before: int) -> None:
        self._other[start], self._other[end] = end, start
        self._link(start, before)

    def _link(self, start: int, before: int) -> None:
        behind = self._next[before]
        self._next[start], self._previous[start] = behind, before
        self._next[before] = self._previous[behind] = start

    def _unlink(self, start: int) -> None:
        before, behind = self._previous[start], self._next[start]
        self._next[before] = behind
        self._previous[behind] = before

    def free_blocks(self) -> list[int]:
        blocks: list[int] = []
        age = 0
        for sentinel in range(self._oldest, self._oldest + _BINS):
            at = self._next[sentinel]
            is_plain = sentinel != self._oldest
            assert not is_plain or bool(self._bins >> (sentinel - self._oldest) & 1) == (at != sentinel), (
                "wrong bin bit"
            )
            while at != sentinel:
                end = self._other[at]
                length, stamps = end - at + 1, set(self._stamp[at : end + 1])
                assert self._other[end] == at and len(stamps) == 1, f"segment at {at} is broken"
                stamp = stamps.pop()
                assert (stamp == 0) == is_plain, f"segment at {at} is in the wrong list"
                assert end + 1 == self._n or self._stamp[end + 1] != stamp, (
                    f"segment at {at} is not coalesced"
                )
                if is_plain:
                    assert self._oldest + length.bit_length() == sentinel, (
                        f"segment at {at} is in the wrong bin"
                    )
                else:
                    assert stamp >= age, "cached segments are out of order"
                    age = stamp
                blocks += range(at, end + 1)
                at = self._next[at]
        assert len(blocks) == self._free == sum(s != _USED for s in self._stamp), "free count differs"
        return blocks


def _runs(blocks: Sequence[int]) -> list[tuple[int, int]]:
    """Blocks in any order as ascending runs (first, last)."""
    runs: list[tuple[int, int]] = []
    for block in sorted(blocks):
        if runs and runs[-1][1] == block - 1:
            runs[-1] = runs[-1][0], block
        else:
            runs.append((block, block))
    return runs
