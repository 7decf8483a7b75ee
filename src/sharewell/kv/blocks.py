"""Who owns which page: reference counts, prefix sharing, copy on write. No tensors here.

One manager serves the engine, the simulator and tests. A block is *used* (referenced by a sequence),
*cached* (free, but its content can still be shared) or plainly free. A full block is published under the
hash of everything up to and including it; a sequence whose prompt starts with published blocks takes
references instead of computing them.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .allocators import Allocator, BlocksTaken, LRUAllocator, integers
from .prefix import PrefixIndex


@dataclass(frozen=True)
class Allocation:
    """What a new sequence got: ``cached_tokens`` whose keys and values are there already, and its blocks in
    order."""

    cached_tokens: int
    table: list[int]


class BlockManager:
    """Blocks ``0 .. num_blocks - 1`` of ``block_size`` tokens. Raises ValueError for sizes below 1.

    Calls either succeed or raise OutOfBlocks with nothing changed; an unknown sequence is a KeyError. Over an
    allocator that other processes take from, too, ``num_free`` and ``num_used`` speak of all of them, and a
    cached block may have been lost to another process: that is noticed when somebody wants it.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        allocator: Allocator | None = None,
        prefix_sharing: bool = True,
    ) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(
                f"num_blocks and block_size must be at least 1, got {num_blocks} and {block_size}"
            )
        self.num_blocks, self.block_size, self.prefix_sharing = num_blocks, block_size, prefix_sharing
        self._allocator = allocator or LRUAllocator()
        self._allocator.bind(num_blocks)
        self._references = integers(num_blocks)
        self._content = integers(num_blocks * block_size)  # tokens of published blocks, compared on every hit
        self._hash_of: dict[int, bytes] = {}
        self.index = PrefixIndex()
        self._tables: dict[int, list[int]] = {}
        self._lengths: dict[int, int] = {}
        self._claims: dict[bytes, int] = {}
        self._claimed_by: dict[int, list[bytes]] = {}
        self._cached = self._shared = 0
        self.queried_tokens = 0
        self.hit_tokens = 0

    # What there is

    @property
    def num_free(self) -> int:
        """Blocks that an allocation may take, cached ones included."""
        return self._allocator.num_free

    @property
    def num_used(self) -> int:
        return self.num_blocks - self._allocator.num_free

    @property
    def num_cached(self) -> int:
        """Published blocks that nobody references."""
        return self._cached

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
        self,
        sequence: int,
        n_tokens: int,
        prefix: Sequence[bytes] = (),
        tokens: Sequence[int] | None = None,
    ) -> Allocation:
        """Give a new sequence room for ``n_tokens``, sharing the leading blocks of ``prefix`` that are
        present.

        ``tokens`` (at least those of ``prefix``) are compared with what the shared blocks hold, so equal
        hashes of different tokens are no hit. At least one token is always left to compute. Raises
        OutOfBlocks, ValueError for a sequence that exists.
        """
        if sequence in self._tables:
            raise ValueError(f"sequence {sequence} exists")
        needed = -(-n_tokens // self.block_size)
        while True:
            found = self._find(n_tokens, prefix, tokens)
            revive = [block for block in found if not self._references[block]]
            try:
                new = self._take(needed - len(found), found[-1] if found else -1, revive)
                break
            except BlocksTaken as lost:
                self._unpublish(lost.blocks)
                self._cached -= len(lost.blocks)
        references = self._references
        self._cached -= len(revive)
        for block in found:
            self._shared += references[block] == 1
            references[block] += 1
        table = found + new
        self._tables[sequence], self._lengths[sequence] = table, n_tokens
        self.queried_tokens += n_tokens
        self.hit_tokens += len(found) * self.block_size
        return Allocation(len(found) * self.block_size, table)

    def _find(self, n_tokens: int, prefix: Sequence[bytes], tokens: Sequence[int] | None) -> list[int]:
        """The blocks that a sequence of ``n_tokens`` can share, in order."""
        found: list[int] = []
        if not self.prefix_sharing:
            return found
        size = self.block_size
        for i, block_hash in enumerate(prefix[: max(0, (n_tokens - 1) // size)]):
            block = self.index.get(block_hash)
            if block is None:
                break
            if tokens is not None:
                held = self._content[block * size : (block + 1) * size].tolist()
                if held != list(tokens[i * size : (i + 1) * size]):
                    break
            found.append(block)
        return found

    def append(self, sequence: int, n_tokens: int = 1) -> list[tuple[int, int]]:
        """Make room for ``n_tokens`` more. Returns (source, destination) blocks to copy before writing: the
        last block of a forked sequence is shared until one of them writes. Raises OutOfBlocks."""
        length, table, size = self._lengths[sequence], self._tables[sequence], self.block_size
        partial = length % size != 0  # new tokens are written into the last block
        copy = partial and n_tokens > 0 and self._references[table[-1]] > 1
        extra = -(-(length + n_tokens) // size) - len(table)
        copies = []
        if copy or extra:
            kept = table[:-1] if copy else table
            new = self._take(copy + extra, kept[-1] if kept else -1)
            if copy:
                copies.append((table[-1], new[0]))
                self._release(table[-1:])
                del table[-1]
            table += new
        if partial and not copy and table[length // size] in self._hash_of:
            # a fork that ended inside a published block, and is alone by now, writes into it
            self._unpublish([table[length // size]])
        self._lengths[sequence] = length + n_tokens
        return copies

    def fork(self, parent: int, child: int, n_tokens: int | None = None, first_block: int = 0) -> None:
        """``child`` shares the blocks of the first ``n_tokens`` (default all) of ``parent``, those before
        ``first_block`` left out. Raises ValueError for a child that exists or more tokens than the parent
        has."""
        if child in self._tables:
            raise ValueError(f"sequence {child} exists")
        length = self._lengths[parent] if n_tokens is None else n_tokens
        if not 0 <= length <= self._lengths[parent]:
            raise ValueError(f"n_tokens must be in [0, {self._lengths[parent]}], got {n_tokens}")
        table = self._tables[parent][first_block : -(-length // self.block_size)]
        for block in table:
            self._shared += self._references[block] == 1
            self._references[block] += 1
        self._tables[child] = table
        self._lengths[child] = max(0, length - first_block * self.block_size)

    def publish(self, sequence: int, i: int, block_hash: bytes, tokens: Sequence[int]) -> None:
        """Block ``i`` of the sequence is full and computed: others may share it under ``block_hash``."""
        if not self.prefix_sharing:
            return
        # not always this sequence: one with a scored prompt computes all
        owner = self._claims.pop(block_hash, None)
        if owner is not None:
            self._claimed_by[owner].remove(block_hash)
        block = self._tables[sequence][i]
        if block in self._hash_of or not self.index.add(block_hash, block):
            return
        self._hash_of[block] = block_hash
        start = block * self.block_size
        self._content[start : start + self.block_size] = memoryview(array("i", tokens))

    def free(self, sequence: int) -> None:
        """Return the sequence's blocks, the last first, so that the beginnings, which others share, live
        longest."""
        self._release(reversed(self._tables.pop(sequence)))
        del self._lengths[sequence]
        for block_hash in self._claimed_by.pop(sequence, ()):
            del self._claims[block_hash]

    # Blocks that somebody is computing right now

    def claim(self, sequence: int, hashes: Sequence[bytes]) -> None:
        """Announce that ``sequence`` computes these blocks; the claim ends when it publishes or frees
        them."""
        mine = self._claimed_by.setdefault(sequence, [])
        for block_hash in hashes:
            if block_hash not in self._claims and block_hash not in self.index:
                self._claims[block_hash] = sequence
                mine.append(block_hash)

    def claimant(self, block_hash: bytes) -> int | None:
        """The sequence that is computing this block, or None."""
        return self._claims.get(block_hash)

    # Blocks

    def _take(self, n: int, after: int, revive: Sequence[int] = ()) -> list[int]:
        """``n`` blocks without content behind block ``after``, and the cached blocks ``revive``."""
        if not n and not revive:
            return []
        blocks = self._allocator.take(n, after, revive)
        stale = [block for block in blocks if block in self._hash_of]
        self._unpublish(stale)
        self._cached -= len(stale)
        for block in blocks:
            self._references[block] = 1
        return blocks

    def _release(self, blocks: Iterable[int]) -> None:
        references, plain, cached = self._references, [], []
        for block in blocks:
            count = references[block] = references[block] - 1
            if count == 0:
                (cached if block in self._hash_of else plain).append(block)
            elif count == 1:
                self._shared -= 1
        if plain or cached:
            self._allocator.give(plain, cached)
            self._cached += len(cached)

    def _unpublish(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            self.index.remove(self._hash_of.pop(block))

    def check_integrity(self) -> None:
        """Recount everything from the tables; AssertionError names what is wrong. For tests and debugging:
        O(blocks)."""
        counts = [0] * self.num_blocks
        for table in self._tables.values():
            for block in table:
                counts[block] += 1
        assert counts == self._references.tolist(), "reference counts differ from the tables"
        free, unused = set(self._allocator.free_blocks()), {b for b, count in enumerate(counts) if not count}
        assert free <= unused if self._allocator.shared else free == unused, "free blocks differ"
        assert self._shared == sum(c > 1 for c in counts), "shared count differs"
        assert self._cached == sum(not counts[b] for b in self._hash_of), "cached count differs"
        assert dict(self.index) == {h: b for b, h in self._hash_of.items()}, "index and blocks differ"
        for sequence, table in self._tables.items():
            assert len(table) == -(-self._lengths[sequence] // self.block_size), (
                f"table of {sequence} has a wrong size"
            )
        claims = {h: s for s, hashes in self._claimed_by.items() for h in hashes}
        assert self._claims == claims and not claims.keys() & dict(self.index).keys(), "claims differ"
