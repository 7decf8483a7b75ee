"""The block manager against a plain model, over each allocator: nothing leaks, nothing is given twice, and
what a sequence reads through its table is what it wrote."""

from __future__ import annotations

import pickle
from collections import Counter
from typing import Any, ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from hypothesis.stateful import run_state_machine_as_test as run

from sharewell.kv import (
    Allocator,
    BlockManager,
    LRUAllocator,
    OutOfBlocks,
    RunAllocator,
    SharedAllocator,
    block_hashes,
)

BLOCKS, SIZE = 12, 4
tokens_of = st.lists(st.integers(0, 1), min_size=1, max_size=3 * SIZE)  # two tokens: prefixes meet often


class Machine(RuleBasedStateMachine):
    """``held`` are the tokens of every sequence, ``memory`` what the pages hold: for each slot the whole text
    up to it, as keys and values depend on. Counts, hits and refusals are recomputed from these two dicts."""

    operations: ClassVar[int] = 0

    def make(self) -> Allocator:
        return LRUAllocator()

    @initialize()
    def start(self) -> None:
        self.allocator = self.make()
        self.blocks = BlockManager(BLOCKS, SIZE, self.allocator)
        self.held: dict[int, tuple[bytes, list[int]]] = {}
        self.tables: dict[int, list[int]] = {}
        self.memory: dict[tuple[int, int], Any] = {}
        self.published: dict[bytes, int] = {}
        self.claims: dict[bytes, int] = {}
        self.rival: list[int] = []  # blocks that another process holds
        self.lost: set[int] = set()  # blocks that were cached when another process took them
        self.n = 0

    # What the model says

    def references(self) -> Counter[int]:
        return Counter(block for table in self.tables.values() for block in table)

    def free(self) -> int:
        return BLOCKS - len(self.references()) - len(self.rival)

    def written(self, sequence: int, start: int) -> None:
        salt, tokens = self.held[sequence]
        for p in range(start, len(tokens)):
            self.memory[self.tables[sequence][p // SIZE], p % SIZE] = (salt, tuple(tokens[: p + 1]))

    def reused(self, blocks: list[int]) -> None:
        """Blocks that got a new purpose are published no more."""
        taken = set(blocks)
        assert len(taken) == len(blocks) and not taken & set(self.rival)
        self.published = {h: b for h, b in self.published.items() if b not in taken}
        self.lost -= taken

    def pick(self, number: int) -> int:
        return sorted(self.held)[number % len(self.held)]

    def count(self) -> None:
        type(self).operations += 1

    # Operations

    @rule(
        number=st.integers(0, 99), cut=st.integers(0, 40), more=tokens_of, salt=st.sampled_from([b"a", b"b"])
    )
    def allocate(self, number: int, cut: int, more: list[int], salt: bytes) -> None:
        self.count()
        past = self.held[self.pick(number)][1][:cut] if self.held else []
        tokens = past + more
        hashes = block_hashes(tokens, SIZE, salt=salt)
        before = self.references()
        while True:
            found: list[int] = []
            for block_hash in hashes[: (len(tokens) - 1) // SIZE]:
                if block_hash not in self.published:
                    break
                found.append(self.published[block_hash])
            gone = self.lost & set(found)
            if not gone:
                break
            self.published = {h: b for h, b in self.published.items() if b not in gone}
            self.lost -= gone
        needed = -(-len(tokens) // SIZE)
        sequence, self.n = self.n, self.n + 1
        wanted = needed - len(found) + sum(block not in before for block in found)
        if wanted > self.free():
            with pytest.raises(OutOfBlocks):
                self.blocks.allocate(sequence, len(tokens), hashes, tokens)
            return
        got = self.blocks.allocate(sequence, len(tokens), hashes, tokens)
        assert got.cached_tokens == len(found) * SIZE and got.table[: len(found)] == found
        new = got.table[len(found) :]
        assert len(got.table) == needed and not set(new) & (before.keys() | set(found))
        self.reused(new)
        self.held[sequence], self.tables[sequence] = (salt, tokens), list(got.table)
        self.written(sequence, got.cached_tokens)

    @precondition(lambda self: self.held)
    @rule(number=st.integers(0, 99), more=tokens_of)
    def append(self, number: int, more: list[int]) -> None:
        self.count()
        sequence = self.pick(number)
        salt, tokens = self.held[sequence]
        table, references = self.tables[sequence], self.references()
        partial = len(tokens) % SIZE != 0
        copied = partial and references[table[-1]] > 1
        wanted = -(-(len(tokens) + len(more)) // SIZE) - len(table) + copied
        if wanted > self.free():
            with pytest.raises(OutOfBlocks):
                self.blocks.append(sequence, len(more))
            return
        copies = self.blocks.append(sequence, len(more))
        after = list(self.blocks.table(sequence))
        assert [source for source, _ in copies] == ([table[-1]] if copied else [])
        for source, destination in copies:
            for offset in range(SIZE):
                self.memory[destination, offset] = self.memory.get((source, offset))
        kept = table[:-1] if copied else table
        assert after[: len(kept)] == kept and not set(after[len(kept) :]) & references.keys()
        self.reused(after[len(kept) :])
        if partial and not copied:  # a fork that ended inside a published block writes over it
            self.published = {h: b for h, b in self.published.items() if b != table[-1]}
        self.held[sequence], self.tables[sequence] = (salt, tokens + more), after
        self.written(sequence, len(tokens))

    @precondition(lambda self: self.held)
    @rule(number=st.integers(0, 99), cut=st.integers(0, 40))
    def fork(self, number: int, cut: int) -> None:
        self.count()
        parent = self.pick(number)
        salt, tokens = self.held[parent]
        length = min(cut, len(tokens))
        child, self.n = self.n, self.n + 1
        self.blocks.fork(parent, child, length)
        self.held[child] = salt, tokens[:length]
        self.tables[child] = self.tables[parent][: -(-length // SIZE)]

    @precondition(lambda self: self.held)
    @rule(number=st.integers(0, 99), most=st.integers(1, 9))
    def publish(self, number: int, most: int) -> None:
        self.count()
        sequence = self.pick(number)
        salt, tokens = self.held[sequence]
        for i, block_hash in enumerate(block_hashes(tokens, SIZE, salt=salt)[:most]):
            self.blocks.publish(sequence, i, block_hash, tokens[i * SIZE : (i + 1) * SIZE])
            self.claims.pop(block_hash, None)
            block = self.tables[sequence][i]
            if block not in self.published.values():
                self.published.setdefault(block_hash, block)

    @precondition(lambda self: self.held)
    @rule(number=st.integers(0, 99))
    def claim(self, number: int) -> None:
        self.count()
        sequence = self.pick(number)
        salt, tokens = self.held[sequence]
        hashes = block_hashes(tokens, SIZE, salt=salt)
        self.blocks.claim(sequence, hashes)
        for block_hash in hashes:
            if block_hash not in self.published:
                self.claims.setdefault(block_hash, sequence)
        assert [self.blocks.claimant(h) for h in hashes] == [self.claims.get(h) for h in hashes]

    @precondition(lambda self: self.held)
    @rule(number=st.integers(0, 99))
    def release(self, number: int) -> None:
        self.count()
        sequence = self.pick(number)
        self.blocks.free(sequence)
        del self.held[sequence], self.tables[sequence]
        self.claims = {h: s for h, s in self.claims.items() if s != sequence}
        with pytest.raises(KeyError):
            self.blocks.free(sequence)

    @invariant()
    def agrees(self) -> None:
        blocks, references = self.blocks, self.references()
        blocks.check_integrity()
        assert {s: blocks.table(s) for s in self.tables} == self.tables
        assert blocks.num_free == self.free() and blocks.num_used == BLOCKS - self.free()
        assert blocks.num_shared == sum(n > 1 for n in references.values())
        assert blocks.num_cached == sum(b not in references for b in self.published.values())
        assert dict(blocks.index) == self.published
        for sequence, (salt, tokens) in self.held.items():
            table = self.tables[sequence]
            assert blocks.length(sequence) == len(tokens)
            for p in range(len(tokens)):
                assert self.memory[table[p // SIZE], p % SIZE] == (salt, tuple(tokens[: p + 1]))

    def teardown(self) -> None:
        if hasattr(self, "blocks"):
            for sequence in list(self.held):
                self.blocks.free(sequence)
            self.blocks.check_integrity()
            assert self.blocks.num_free == BLOCKS - len(self.rival)


class RunMachine(Machine):
    def make(self) -> Allocator:
        return RunAllocator(group_blocks=3)


class SharedMachine(Machine):
    """With a rival that takes from the same blocks."""

    def make(self) -> Allocator:
        allocator = SharedAllocator(BLOCKS)
        self.other: SharedAllocator = pickle.loads(pickle.dumps(allocator))  # noqa: S301
        return allocator

    @rule(n=st.integers(1, 4))
    def rival_takes(self, n: int) -> None:
        self.count()
        if n > self.free():
            with pytest.raises(OutOfBlocks):
                self.other.take(n)
            return
        taken = self.other.take(n)
        assert not set(taken) & (self.references().keys() | set(self.rival))
        self.rival += taken
        self.lost |= set(taken) & set(self.published.values())

    @precondition(lambda self: self.rival)
    @rule(n=st.integers(1, 4), cached=st.booleans())
    def rival_gives(self, n: int, cached: bool) -> None:
        self.count()
        given, self.rival = self.rival[:n], self.rival[n:]
        self.other.give(() if cached else given, given if cached else ())

    def teardown(self) -> None:
        super().teardown()
        if hasattr(self, "allocator"):
            assert isinstance(self.allocator, SharedAllocator)
            self.allocator.close()


@pytest.mark.parametrize("machine", [Machine, RunMachine, SharedMachine])
def test_random_operations_agree_with_the_model(machine: type[Machine]) -> None:
    machine.operations = 0
    run(
        machine,
        settings=settings(max_examples=110, stateful_step_count=50),
    )
    assert machine.operations >= 3334  # three of them: 10,000 in all


def test_a_prefix_is_shared_up_to_the_last_token_which_is_always_computed() -> None:
    blocks = BlockManager(8, SIZE)
    tokens = list(range(8))
    hashes = block_hashes(tokens, SIZE, salt=b"")
    blocks.allocate(0, 8, hashes, tokens)
    for i in range(2):
        blocks.publish(0, i, hashes[i], tokens[i * SIZE : (i + 1) * SIZE])
    assert blocks.allocate(1, 8, hashes, tokens).cached_tokens == 4
    assert blocks.allocate(2, 9, hashes, [*tokens, 8]).cached_tokens == 8
    assert blocks.num_shared == 2 and blocks.hit_rate == 12 / 25


def test_an_equal_hash_of_other_tokens_is_no_hit() -> None:
    blocks = BlockManager(8, SIZE)
    blocks.allocate(0, 4)
    blocks.publish(0, 0, b"collision", [1, 2, 3, 4])
    assert blocks.allocate(1, 5, [b"collision"], [1, 2, 3, 5, 6]).cached_tokens == 0
    assert blocks.allocate(2, 5, [b"collision"], [1, 2, 3, 4, 6]).cached_tokens == 4


def test_without_sharing_nothing_is_found_or_published() -> None:
    blocks = BlockManager(8, SIZE, prefix_sharing=False)
    blocks.allocate(0, 4)
    blocks.publish(0, 0, b"h", [1, 2, 3, 4])
    blocks.free(0)
    assert blocks.allocate(1, 5, [b"h"], [1, 2, 3, 4, 5]).cached_tokens == 0
    assert blocks.num_cached == 0 and blocks.match([b"h"]) == 0


def test_the_beginning_of_a_freed_text_lives_longest() -> None:
    blocks = BlockManager(4, SIZE)
    tokens = list(range(16))
    hashes = block_hashes(tokens, SIZE, salt=b"")
    blocks.allocate(0, 16)
    for i in range(4):
        blocks.publish(0, i, hashes[i], tokens[i * SIZE : (i + 1) * SIZE])
    blocks.free(0)
    for n in range(1, 4):
        blocks.allocate(n, SIZE)
        assert blocks.match(hashes) == 4 - n


def test_a_fork_that_ends_inside_a_published_block_does_not_spoil_it() -> None:
    blocks = BlockManager(8, SIZE)
    blocks.allocate(0, 4)
    blocks.publish(0, 0, b"h", [1, 2, 3, 4])
    blocks.fork(0, 1, 2)
    blocks.free(0)
    assert blocks.append(1) == []  # alone by now: writes in place
    assert blocks.match([b"h"]) == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: BlockManager(0, 4), "num_blocks and block_size must be at least 1, got 0 and 4"),
        (lambda: BlockManager(4, 0), "num_blocks and block_size must be at least 1, got 4 and 0"),
    ],
)
def test_impossible_sizes_are_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_bad_calls_change_nothing() -> None:
    blocks = BlockManager(4, SIZE)
    blocks.allocate(0, 6)
    for call, message in (
        (lambda: blocks.allocate(0, 4), "sequence 0 exists"),
        (lambda: blocks.fork(0, 0), "sequence 0 exists"),
        (lambda: blocks.fork(0, 1, 7), r"n_tokens must be in \[0, 6\], got 7"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(KeyError):
        blocks.append(7)
    with pytest.raises(OutOfBlocks, match="3 blocks wanted, 2 free"):
        blocks.allocate(1, 12)
    with pytest.raises(OutOfBlocks):
        blocks.append(0, 11)
    blocks.check_integrity()
    assert blocks.num_free == 2 and blocks.length(0) == 6


def test_a_million_blocks_take_little_memory() -> None:
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    blocks = BlockManager(1_000_000, 16)
    blocks.allocate(0, 160)
    assert blocks.num_free == 999_990
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB
