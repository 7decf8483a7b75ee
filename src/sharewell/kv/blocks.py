"""Who owns which page: reference counts, prefix sharing, copy on write. No tensors here.

One manager serves the engine, the simulator and tests. A block is *used* (referenced by a sequence), *cached* (free,
but its content can still be shared) or plainly free. A full block is published under the hash of everything up to
and including it; a sequence whose prompt starts with published blocks takes references instead of computing them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .allocators import Allocator, LRUAllocator, OutOfBlocks, int_array
from .prefix import PrefixIndex


@dataclass(frozen=True)
class Allocation:
    """What a new sequence got: ``cached_tokens`` whose keys and values are there already, and its blocks in order."""

    cached_tokens: int
    table: list[int]


class BlockManager:
    """Blocks ``0 .. num_blocks - 1`` of ``block_size`` tokens. Raises ValueError for sizes below 1.

    Calls either succeed or raise OutOfBlocks with nothing changed; an unknown sequence is a KeyError.
    """

    def __init__(
        self, num_blocks: int, block_size: int, allocator: Allocator | None = None, prefix_sharing: bool = True
    ) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"num_blocks and block_size must be at least 1, got {num_blocks} and {block_size}")
        self.num_blocks, self.block_size, self.prefix_sharing = num_blocks, block_size, prefix_sharing
        self._free = allocator or LRUAllocator()
        self._free.reset(num_blocks)
        self._references = int_array(num_blocks)
        self._content = int_array(num_blocks * block_size)  # tokens of published blocks, compared on every hit
        self._hash_of: dict[int, bytes] = {}
        self.index = PrefixIndex()
        self._tables: dict[int, list[int]] = {}
        self._lengths: dict[int, int] = {}
        self._claims: dict[bytes, int] = {}
        self._claimed_by: dict[int, list[bytes]] = {}
        self._shared = 0
        self.queried_tokens = 0
        self.hit_tokens = 0

    # What there is

    @property
    def num_free(self) -> int:
        """Blocks that an allocation may take, cached ones included."""
        return self._free.num_free

    @property
    def num_used(self) -> int:
        return self.num_blocks - self._free.num_free

    @property
    def num_cached(self) -> int:
        """Published blocks that nobody references."""
        return sum(1 for block in self._hash_of if self._references[block] == 0)

    @property
    def num_shared(self) -> int:
        """Blocks that two or more sequences reference."""
        return self._shared

    @property
    def hit_rate(self) -> float:
        """Share of prompt tokens that were found instead of computed."""
        return self.hit_tokens / self.queried_tokens if self.queried_tokens else 0.0

    def table(self, sequence: int) -> list[int]:
        """The sequence's blocks in order; live, not to be changed by the caller."""
        return self._tables[sequence]

    def length(self, sequence: int) -> int:
        """Tokens that the sequence has room accounted for."""
        return self._lengths[sequence]

    def match(self, hashes: Sequence[bytes]) -> int:
        """Leading blocks that are present; changes nothing."""
        return self.index.match(hashes) if self.prefix_sharing else 0

    # Sequences

    def allocate(
        self, sequence: int, n_tokens: int, prefix: Sequence[bytes] = (), tokens: Sequence[int] | None = None
    ) -> Allocation:
        """Give a new sequence room for ``n_tokens``, sharing the leading blocks of ``prefix`` that are present.

        ``tokens`` (at least those of ``prefix``) are compared with what the shared blocks hold, so equal hashes of
        different tokens are no hit. At least one token is always left to compute. Raises OutOfBlocks, ValueError for a
        sequence that exists.
        """
        if sequence in self._tables:
            raise ValueError(f"sequence {sequence} exists")
        size = self.block_size
        needed = -(-n_tokens // size)
        found: list[int] = []
        if self.prefix_sharing:
            for i, block_hash in enumerate(prefix[: max(0, (n_tokens - 1) // size)]):
                block = self.index.get(block_hash)
                if block is None:
                    break
                if tokens is not None and list(self._content[block * size : (block + 1) * size]) != list(
                    tokens[i * size : (i + 1) * size]
                ):
                    break
                found.append(block)
        revived = sum(1 for block in found if self._references[block] == 0)
        if needed - len(found) + revived > self._free.num_free:
            raise OutOfBlocks(f"{needed - len(found) + revived} blocks wanted, {self._free.num_free} free")
        for block in found:
            self._reference(block)
        table = found + self._take(needed - len(found))
        self._tables[sequence], self._lengths[sequence] = table, n_tokens
        self.queried_tokens += n_tokens
        self.hit_tokens += len(found) * size
        return Allocation(len(found) * size, table)

    def append(self, sequence: int, n_tokens: int = 1) -> list[tuple[int, int]]:
        """Make room for ``n_tokens`` more. Returns (source, destination) blocks to copy before writing: the last block
        of a forked sequence is shared until one of them writes. Raises OutOfBlocks."""
        length, table, size = self._lengths[sequence], self._tables[sequence], self.block_size
        room = len(table) * size - length
        if n_tokens <= room and (not length % size or self._references[table[-1]] == 1):
            self._lengths[sequence] = length + n_tokens
            return []
        last = length // size
        copy = length % size != 0 and self._references[table[last]] > 1
        extra = max(0, -(-(length + n_tokens) // size) - len(table))
        if extra + copy > self._free.num_free:
            raise OutOfBlocks(f"{extra + copy} blocks wanted, {self._free.num_free} free")
        copies = []
        if copy:
            (fresh,) = self._take(1)
            copies.append((table[last], fresh))
            self._release(table[last])
            table[last] = fresh
        table += self._take(extra)
        self._lengths[sequence] = length + n_tokens
        return copies

    def fork(self, parent: int, child: int, n_tokens: int | None = None) -> None:
        """``child`` shares the blocks of the first ``n_tokens`` (default all) of ``parent``."""
        if child in self._tables:
            raise ValueError(f"sequence {child} exists")
        length = self._lengths[parent] if n_tokens is None else n_tokens
        table = self._tables[parent][: -(-length // self.block_size)]
        for block in table:
            self._reference(block)
        self._tables[child], self._lengths[child] = list(table), length

    def publish(self, sequence: int, i: int, block_hash: bytes, tokens: Sequence[int]) -> None:
        """Block ``i`` of the sequence is full and computed: others may share it under ``block_hash``."""
        if not self.prefix_sharing:
            return
        owner = self._claims.pop(block_hash, None)  # not always this sequence: one with a scored prompt computes all
        if owner is not None:
            self._claimed_by[owner].remove(block_hash)
        block = self._tables[sequence][i]
        if block in self._hash_of or not self.index.add(block_hash, block):
            return
        self._hash_of[block] = block_hash
        start = block * self.block_size
        for j, token in enumerate(tokens):
            self._content[start + j] = token

    def free(self, sequence: int) -> None:
        """Return the sequence's blocks, the last first, so that the beginnings, which others share, live longest."""
        for block in reversed(self._tables.pop(sequence)):
            self._release(block)
        del self._lengths[sequence]
        for block_hash in self._claimed_by.pop(sequence, ()):
            del self._claims[block_hash]

    # Blocks that somebody is computing right now

    def claim(self, sequence: int, hashes: Sequence[bytes]) -> None:
        """Announce that ``sequence`` computes these blocks; the claim ends when it publishes or frees them."""
        mine = self._claimed_by.setdefault(sequence, [])
        for block_hash in hashes:
            if block_hash not in self._claims and block_hash not in self.index:
                self._claims[block_hash] = sequence
                mine.append(block_hash)

    def claimant(self, block_hash: bytes) -> int | None:
        """The sequence that is computing this block, or None."""
        return self._claims.get(block_hash)

    # Blocks

    def _reference(self, block: int) -> None:
        count = self._references[block]
        if count == 0:
            self._free.reclaim(block)
        elif count == 1:
            self._shared += 1
        self._references[block] = count + 1

    def _release(self, block: int) -> None:
        count = self._references[block] - 1
        self._references[block] = count
        if count == 0:
            self._free.give(block)
        elif count == 1:
            self._shared -= 1

    def _take(self, n: int) -> list[int]:
        blocks = self._free.take(n) if n > 0 else []
        for block in blocks:
            stale = self._hash_of.pop(block, None)
            if stale is not None:
                self.index.remove(stale)
            self._references[block] = 1
        return blocks

    def check_integrity(self) -> None:
        """Recount everything from the tables; AssertionError names what is wrong. For tests and debugging: O(blocks)."""
        counts = [0] * self.num_blocks
        for table in self._tables.values():
            for block in table:
                counts[block] += 1
        assert counts == list(self._references), "reference counts differ from the tables"
        assert self._free.num_free == counts.count(0), "free count differs"
        assert self._shared == sum(c > 1 for c in counts), "shared count differs"
        assert dict(self.index) == {h: b for b, h in self._hash_of.items()}, "index and blocks differ"
        for sequence, table in self._tables.items():
            assert len(table) == -(-self._lengths[sequence] // self.block_size), f"table of {sequence} has a wrong size"
