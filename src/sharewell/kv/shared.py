"""Free blocks that several processes take from: prefill and decode workers over one pool (semi-PD, arXiv
2504.19867)."""

from __future__ import annotations

import fcntl
import mmap
import os
import tempfile
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from .allocators import BlocksTaken, LRUAllocator


class SharedAllocator(LRUAllocator):
    """An LRUAllocator whose arrays lie in memory shared between processes; every take and give is atomic.

    Create it in one process and hand it to others (it pickles as a reference), where each has a BlockManager
    of its own; its prefixes are found only by the manager that published them, and are lost when another
    process takes their blocks. The memory is a file that is also the lock, so a killed process leaves no lock
    behind: the next one to come repairs what it had half done, and :meth:`reap` returns what it held.

    The creator's :meth:`close`, garbage collection or exit removes the file; who has it open can go on.
    """

    shared = True

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks must be at least 1, got {num_blocks}")
        fast = Path("/dev/shm")  # not written to a disk
        fd, path = tempfile.mkstemp(".blocks", "sharewell-", fast if os.access(fast, os.W_OK) else None)
        os.truncate(fd, 4 * self._words_all(num_blocks))
        os.close(fd)
        self._remove = weakref.finalize(self, _remove, path, os.getpid())
        self._attach(path, num_blocks)
        self._next[num_blocks] = self._previous[num_blocks] = num_blocks

    @classmethod
    def _words_all(cls, num_blocks: int) -> int:
        return 1 + cls.words(num_blocks) + 2 * num_blocks

    def _attach(self, path: str, num_blocks: int) -> None:
        fd = os.open(path, os.O_RDWR)
        self._fd = fd
        self._close_fd = weakref.finalize(self, os.close, fd)
        self._path, self._pid, self._mutex = path, os.getpid(), threading.Lock()
        self._words = memoryview(mmap.mmap(fd, 4 * self._words_all(num_blocks))).cast("i")
        lists_end = 1 + self.words(num_blocks)
        self._lay_out(self._words[1:lists_end], num_blocks)
        self._owner = self._words[lists_end : lists_end + num_blocks]  # process id, 0 for free: the truth
        self._turn = self._words[lists_end + num_blocks :]  # grows whenever a block's content is given up
        self._kept: dict[int, int] = {}  # cached blocks that this process gave back, with their turn

    def __getstate__(self) -> dict[str, object]:
        return {"path": self._path, "num_blocks": self._n}

    def __setstate__(self, state: dict[str, object]) -> None:
        self._attach(str(state["path"]), int(str(state["num_blocks"])))

    def bind(self, num_blocks: int) -> None:
        """Check the size; what others hold stays theirs. Raises ValueError for another size."""
        if num_blocks != self._n:
            raise ValueError(f"num_blocks must be {self._n} as in the shared allocator, got {num_blocks}")

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Exclude all other threads and processes. A set first word tells that the last one died inside."""
        with self._mutex:
            if os.getpid() != self._pid:
                raise RuntimeError(
                    "a SharedAllocator does not survive fork: pass it to a spawned process instead"
                )
            fcntl.flock(self._fd, fcntl.LOCK_EX)
            try:
                if self._words[0]:
                    self._rebuild()
                yield
            finally:
                fcntl.flock(self._fd, fcntl.LOCK_UN)

    def _rebuild(self) -> None:
        """Lay the list anew from the owners; the order of age is lost, nothing else."""
        self._words[0] = 1
        end = self._n
        self._next[end] = self._previous[end] = end
        self._counts[0], self._counts[1], self._counts[2] = end, 0, 0
        super().give((), [block for block in range(end) if self._owner[block] == 0])
        self._words[0] = 0

    @property
    def num_free(self) -> int:
        """Free blocks at this moment; another process may take them in the next."""
        with self._locked():
            return self._count_free()

    def take(self, n: int, after: int = -1, revive: Sequence[int] = ()) -> list[int]:
        with self._locked():
            kept, turn, owner = self._kept, self._turn, self._owner
            gone = [block for block in revive if owner[block] or kept.get(block) != turn[block]]
            if gone:
                for block in gone:
                    kept.pop(block, None)
                raise BlocksTaken(gone)
            self._check_room(n + len(revive))
            self._words[0] = 1
            blocks = self._take(n, revive)
            for block in blocks:
                owner[block] = self._pid
                turn[block] = (turn[block] + 1) & 0x7FFFFFFF
                kept.pop(block, None)
            for block in revive:
                owner[block] = self._pid
                del kept[block]
            self._words[0] = 0
            return blocks

    def give(self, plain: Sequence[int], cached: Sequence[int]) -> None:
        with self._locked():
            self._words[0] = 1
            for block in (*plain, *cached):
                assert self._owner[block] == self._pid, f"block {block} is not this process's to give"
                self._owner[block] = 0
            for block in cached:
                self._kept[block] = self._turn[block]
            super().give(plain, cached)
            self._words[0] = 0

    def reap(self, pid: int) -> int:
        """Return all blocks of a process that has ended, without content; how many there were.

        Raises ValueError for this process's own id.
        """
        if pid == self._pid:
            raise ValueError(f"pid must be another process, got this one ({pid})")
        with self._locked():
            self._words[0] = 1
            left = [block for block in range(self._n) if self._owner[block] == pid]
            for block in left:
                self._owner[block] = 0
            super().give(left, ())
            self._words[0] = 0
        return len(left)

    def close(self) -> None:
        """Remove the file, if this process created it; processes that have it open may go on."""
        if hasattr(self, "_remove"):
            self._remove()

    def free_blocks(self) -> list[int]:
        with self._locked():
            blocks = super().free_blocks()
            assert all(
                (self._owner[b] == 0) == (b in free) for free in [set(blocks)] for b in range(self._n)
            ), "owners differ"
            return blocks


def _remove(path: str, creator: int) -> None:
    if os.getpid() == creator:
        Path(path).unlink(missing_ok=True)
