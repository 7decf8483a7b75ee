"""One pool of blocks between real processes, one of which is killed."""

from __future__ import annotations

import json
import mmap
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sharewell.kv import BlockManager, BlocksTaken, SharedAllocator

# A worker: random sequences over the shared blocks. `holders` has one word a block, in which whoever holds
# the block writes its id: if a block were given out twice, one of the two would find the other's id there.
WORKER = """
import json, mmap, os, pickle, random, sys
from sharewell.kv import BlockManager, OutOfBlocks
allocator = pickle.loads(sys.stdin.buffer.read(int(sys.argv[1])))
path, seed, rounds, num_blocks = sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5])
me = os.getpid()
with open(path, "r+b") as file:
    holders = memoryview(mmap.mmap(file.fileno(), 0)).cast("i")
rng = random.Random(seed)
blocks = BlockManager(num_blocks, 4, allocator)
live, refused = {}, 0
def hold(new):
    for block in new:
        assert holders[block] == 0, f"block {block} is also {holders[block]}'s"
        holders[block] = me
for i in range(rounds):
    try:
        if rng.random() < 0.5 or not live:
            live[i] = list(blocks.allocate(i, rng.randint(1, 20)).table)
            hold(live[i])
        elif rng.random() < 0.5:
            sequence = rng.choice(sorted(live))
            had = len(live[sequence])
            blocks.append(sequence, rng.randint(1, 9))
            live[sequence] = list(blocks.table(sequence))
            hold(live[sequence][had:])
        else:
            sequence = rng.choice(sorted(live))
            for block in live.pop(sequence):
                assert holders[block] == me, f"block {block} was taken by {holders[block]}"
                holders[block] = 0
            blocks.free(sequence)
    except OutOfBlocks:
        refused += 1
    if i % 50 == 0:
        print(i, flush=True)
for sequence, table in live.items():
    for block in table:
        assert holders[block] == me
        holders[block] = 0
    blocks.free(sequence)
blocks.check_integrity()
print(json.dumps({"refused": refused}), flush=True)
"""


def worker(
    allocator: SharedAllocator, holders: Path, seed: int, rounds: int, num_blocks: int
) -> subprocess.Popen[bytes]:
    data = pickle.dumps(allocator)
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER, str(len(data)), str(holders), str(seed), str(rounds), str(num_blocks)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin is not None
    process.stdin.write(data)
    process.stdin.close()
    return process


def test_processes_share_blocks_and_a_killed_one_loses_none(tmp_path: Path) -> None:
    n = 64
    allocator = SharedAllocator(n)
    holders = tmp_path / "holders"
    holders.write_bytes(bytes(4 * n))
    workers = [worker(allocator, holders, seed, 3000, n) for seed in (1, 2)]
    victim = worker(allocator, holders, 3, 10**9, n)
    assert victim.stdout is not None
    for line in victim.stdout:
        if int(line) >= 1000:
            break
    victim.kill()
    victim.wait()
    victim.stdout.close()
    with holders.open("r+b") as file:
        words = memoryview(mmap.mmap(file.fileno(), 0)).cast("i")
    held = allocator.reap(victim.pid)
    for block in range(n):  # the dead process takes no notice of its marks any more
        if words[block] == victim.pid:
            words[block] = 0
    for process in workers:
        assert process.stdout is not None
        with process:
            # a worker may meet a mark of the victim between the reap and its removal: none may fail otherwise
            last = process.stdout.read().splitlines()[-1]
        assert process.returncode == 0 and json.loads(last)["refused"] >= 0
    assert held >= 0 and allocator.num_free == n
    assert sorted(allocator.free_blocks()) == list(range(n))
    allocator.close()


@pytest.mark.parametrize("steps", [0, 1, 2, 4])
@pytest.mark.parametrize("call", ["take", "give"])
def test_a_process_killed_in_the_middle_of_a_change_leaves_no_lock_and_no_broken_list(
    call: str, steps: int
) -> None:
    allocator = SharedAllocator(32)
    mine = allocator.take(8)
    code = f"""
import os, pickle, signal, sys
from sharewell.kv import LRUAllocator
allocator = pickle.loads(sys.stdin.buffer.read())
blocks = allocator.take(20)
allocator.give(blocks[:2], blocks[2:5])
class Dying:
    def __init__(self, words, left): self.words, self.left = words, left
    def __getitem__(self, i): return self.words[i]
    def __setitem__(self, i, value):
        if not self.left: os.kill(os.getpid(), signal.SIGKILL)
        self.left -= 1
        self.words[i] = value
allocator._next = Dying(allocator._next, {steps})
allocator.take(9) if {call!r} == "take" else allocator.give(blocks[5:9], blocks[9:])
"""
    process = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(allocator), check=False)
    assert process.returncode == -signal.SIGKILL
    owners = [p for p in set(allocator._owner) if p not in (0, os.getpid())]
    for pid in owners:
        allocator.reap(pid)
    assert sorted(allocator.free_blocks()) == sorted(set(range(32)) - set(mine))
    assert sorted(allocator.take(24) + mine) == list(range(32))
    allocator.close()


def test_a_prefix_lost_to_another_process_is_computed_anew() -> None:
    allocator = SharedAllocator(8)
    other: SharedAllocator = pickle.loads(pickle.dumps(allocator))  # noqa: S301
    blocks = BlockManager(8, 4, allocator)
    tokens, hashes = list(range(16)), [b"a", b"b", b"c", b"d"]
    blocks.allocate(0, 16)
    for i in range(4):
        blocks.publish(0, i, hashes[i], tokens[i * 4 : (i + 1) * 4])
    blocks.free(0)
    assert blocks.match(hashes) == 4
    other.give(other.take(6), ())  # two of the four: the last ones
    assert blocks.match(hashes) == 4, "it cannot know yet"
    assert blocks.allocate(1, 16, hashes, tokens).cached_tokens == 8
    assert blocks.match(hashes) == 2 and blocks.num_cached == 0
    blocks.check_integrity()
    allocator.close()


def test_revival_of_a_lost_block_names_it_and_changes_nothing() -> None:
    allocator = SharedAllocator(3)
    other: SharedAllocator = pickle.loads(pickle.dumps(allocator))  # noqa: S301
    a, b, c = allocator.take(3)
    allocator.give([], [a, b, c])
    (taken,) = other.take(1)
    with pytest.raises(BlocksTaken) as lost:
        allocator.take(0, -1, [a, b, c])
    assert lost.value.blocks == [taken] and allocator.num_free == 2
    allocator.close()


def test_another_size_this_process_and_a_fork_are_refused() -> None:
    allocator = SharedAllocator(4)
    with pytest.raises(ValueError, match="num_blocks must be 4 as in the shared allocator, got 5"):
        BlockManager(5, 4, allocator)
    with pytest.raises(ValueError, match=f"pid must be another process, got this one \\({os.getpid()}\\)"):
        allocator.reap(os.getpid())
    pid = os.fork()
    if not pid:
        try:
            allocator.take(1)
        except RuntimeError:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    assert allocator.num_free == 4
    allocator.close()


def test_the_file_goes_with_its_creator() -> None:
    allocator = SharedAllocator(4)
    path = Path(allocator._path)
    other: SharedAllocator = pickle.loads(pickle.dumps(allocator))  # noqa: S301
    other.close()
    assert path.exists(), "only the creator removes it"
    allocator.close()
    assert not path.exists() and other.take(1) == [0], "who has it open can go on"
