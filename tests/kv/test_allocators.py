"""What each allocator promises beyond the protocol: the order of reuse, runs of consecutive blocks, ages."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharewell.kv import Allocator, LRUAllocator, OutOfBlocks, RunAllocator, SharedAllocator

MAKERS = {"lru": lambda n: LRUAllocator(), "runs": lambda n: RunAllocator(), "shared": SharedAllocator}


@pytest.fixture(params=MAKERS)
def make(request: pytest.FixtureRequest):
    made = []

    def maker(num_blocks: int) -> Allocator:
        allocator = MAKERS[request.param](num_blocks)
        allocator.bind(num_blocks)
        made.append(allocator)
        return allocator

    yield maker
    for allocator in made:
        if isinstance(allocator, SharedAllocator):
            allocator.close()


def test_all_blocks_can_be_taken_and_given_back(make) -> None:
    allocator = make(10)
    assert allocator.num_free == 10
    taken = allocator.take(4) + allocator.take(6)
    assert sorted(taken) == list(range(10)) and allocator.num_free == 0
    with pytest.raises(OutOfBlocks, match="1 blocks wanted, 0 free"):
        allocator.take(1)
    allocator.give(taken[:5], taken[5:])
    assert sorted(allocator.free_blocks()) == list(range(10))


def test_a_refused_take_revives_nothing(make) -> None:
    allocator = make(4)
    a, b, c, d = allocator.take(4)
    allocator.give([], [a, b])
    with pytest.raises(OutOfBlocks, match="3 blocks wanted, 2 free"):
        allocator.take(2, -1, [a])
    assert sorted(allocator.free_blocks()) == sorted([a, b])
    assert allocator.take(1, -1, [a]) == [b]
    allocator.give([a, b, c, d], [])
    assert allocator.num_free == 4


def test_blocks_with_content_are_given_up_last(make) -> None:
    allocator = make(6)
    blocks = allocator.take(6)
    cached, plain = blocks[:3], blocks[3:]
    allocator.give([], cached)
    allocator.give(plain, [])
    assert sorted(allocator.take(3)) == sorted(plain)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(MAKERS)), st.integers(0, 2**32))
def test_random_takes_gives_and_revivals_keep_every_block_once(kind: str, seed: int) -> None:
    rng = random.Random(seed)
    n = rng.randint(1, 40)
    allocator = MAKERS[kind](n)
    allocator.bind(n)
    used: set[int] = set()
    cached: set[int] = set()
    for _ in range(80):
        free = n - len(used)
        if rng.random() < 0.5:
            revive = rng.sample(sorted(cached), rng.randint(0, len(cached)))
            wanted = rng.randint(0, 6)
            after = rng.choice(sorted(used)) if used else -1
            if wanted + len(revive) > free:
                with pytest.raises(OutOfBlocks):
                    allocator.take(wanted, after, revive)
            else:
                new = allocator.take(wanted, after, revive)
                assert len(set(new)) == wanted and not set(new) & (used | set(revive))
                used |= {*new, *revive}
                cached -= used
        elif used:
            back = rng.sample(sorted(used), rng.randint(1, len(used)))
            cut = rng.randint(0, len(back))
            allocator.give(back[:cut], back[cut:])
            used -= set(back)
            cached |= set(back[cut:])
        assert sorted(allocator.free_blocks()) == sorted(set(range(n)) - used)
        assert allocator.num_free == n - len(used)
    if isinstance(allocator, SharedAllocator):
        allocator.close()


def test_lru_gives_up_the_longest_unused_content_first() -> None:
    allocator = LRUAllocator()
    allocator.bind(6)
    blocks = allocator.take(6)
    for block in (4, 1, 3):
        allocator.give([], [blocks[block]])
    assert allocator.take(2) == [4, 1]
    allocator.give([], [4])
    assert allocator.take(0, -1, [3]) == [] and allocator.take(1) == [4]


def pieces(blocks: list[int]) -> int:
    return 1 + sum(b != a + 1 for a, b in itertools.pairwise(blocks))


def test_runs_are_consecutive_and_grow_in_place() -> None:
    allocator = RunAllocator(group_blocks=8)
    allocator.bind(64)
    first = allocator.take(5)
    second = allocator.take(5)
    assert pieces(first) == pieces(second) == 1
    grown = allocator.take(3, first[-1])
    assert pieces(first + grown) == 1, "the room behind the first was left for it"


def test_sequences_that_grow_together_stay_in_few_pieces_where_lru_scatters_them() -> None:
    counts = {}
    for name, allocator in (("runs", RunAllocator()), ("lru", LRUAllocator())):
        allocator.bind(1024)
        tables = [allocator.take(4) for _ in range(8)]
        for _ in range(40):
            for table in tables:
                table += allocator.take(1, table[-1])
        counts[name] = sum(map(pieces, tables))
    assert counts["runs"] <= 16 < 200 < counts["lru"]


def test_of_the_runs_that_fit_the_one_unused_longest_is_taken() -> None:
    allocator = RunAllocator()
    allocator.bind(12)
    blocks = allocator.take(12)
    old, middle, young = blocks[4:8], blocks[8:12], blocks[0:4]
    for part in (old, middle, young):
        allocator.give([], part)
    assert sorted(allocator.take(4)) == sorted(old)
    assert sorted(allocator.take(4)) == sorted(middle)


def test_a_cached_run_is_given_up_from_its_end() -> None:
    allocator = RunAllocator()
    allocator.bind(8)
    blocks = allocator.take(8)
    allocator.give([], list(reversed(blocks)))
    assert sorted(allocator.take(3)) == blocks[5:]
    assert allocator.take(0, -1, blocks[:5]) == []


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="group_blocks must be at least 0, got -1"):
        RunAllocator(-1)
    with pytest.raises(ValueError, match="num_blocks must be at least 1, got 0"):
        SharedAllocator(0)
