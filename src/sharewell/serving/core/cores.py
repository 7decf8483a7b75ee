"""One budget of cores for all our processes, and a watch on what other processes take from it.

Threads that fight for a core run many times slower than fewer threads would, so the engine gets the cores
this process may really use (affinity and cgroup quota), every pool waits passively, and the server says when
others compete."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from ...bench import usable_cores
from ...simulation import Clock, WallClock


def thread_environment(threads: int) -> dict[str, str]:
    """Environment of a process that may use ``threads`` cores: every thread pool of that size, waiting
    passively."""
    n = str(threads)
    return {
        "OMP_NUM_THREADS": n,
        "MKL_NUM_THREADS": n,
        "NUMBA_NUM_THREADS": n,
        "OPENBLAS_NUM_THREADS": "1",  # numpy's own pool, which nothing here needs
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": "0",
        "KMP_BLOCKTIME": "0",
    }


@dataclass(frozen=True)
class CoreBudget:
    """Which of the usable cores the engine computes on, and which the API process (with the embedder) runs
    on.

    From ``LARGE`` cores up one is the API process's own; with fewer that would cost the engine more than it
    saves, so both share all of them: the API process and the embedder compute in one thread each, for short
    moments.
    """

    engine: tuple[int, ...]
    api: tuple[int, ...]
    threads: int  # of the engine

    LARGE: ClassVar[int] = 8

    @classmethod
    def of(cls, cores: Sequence[int], usable: int, threads: int | None = None) -> CoreBudget:
        """Split ``cores`` (numbers, as the kernel counts them), of which ``usable`` may be busy at a time.

        ``threads``: what the engine was told to take, instead of all. Raises ValueError for none."""
        if usable < 1 or not cores:
            raise ValueError(f"usable must be at least 1, got {usable} of {len(cores)} cores")
        apart = usable >= cls.LARGE and usable == len(cores) and (threads is None or threads < usable)
        if not apart:
            return cls(tuple(cores), tuple(cores), threads or usable)
        return cls(tuple(cores[:-1]), (cores[-1],), threads or usable - 1)

    @classmethod
    def here(cls, threads: int | None = None) -> CoreBudget:
        """The budget of this process and those that it starts."""
        return cls.of(_affinity(), usable_cores(), threads)


def pin(cores: Sequence[int]) -> None:
    """Keep the calling thread, and those that it starts from now on, on ``cores`` (Linux only)."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)


def _affinity() -> list[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]


class CompetitionMonitor:
    """Cores of ours that processes outside ``pids`` used, smoothed over the samples (Linux; 0 elsewhere).

    ``budget`` says which cores are ours; time that a hypervisor took away counts as used by others."""

    NOTICED_CORES = 0.5  # that others use while we work: from here on it is worth saying
    SAMPLES = 2  # in a row, so that a short burst is not told

    def __init__(
        self, pids: tuple[int, ...], clock: Clock | None = None, budget: CoreBudget | None = None
    ) -> None:
        self._pids, self._clock = pids, clock or WallClock()
        self._budget = budget or CoreBudget.here()
        self._names = {f"cpu{i}" for i in (*self._budget.engine, *self._budget.api)}
        self._last: tuple[float, float, float] | None = None
        self._streak = 0
        self.competing = False
        self.cores = 0.0

    def watch(self, working: bool) -> str | None:
        """Sample; a sentence for the log when competition begins (others compute while we are ``working``) or
        has ended."""
        cores = self.sample()
        begins = working and cores >= self.NOTICED_CORES
        ends = cores < self.NOTICED_CORES / 2
        self._streak = self._streak + 1 if (ends if self.competing else begins) else 0
        if self._streak < self.SAMPLES:
            return None
        self._streak, self.competing = 0, not self.competing
        if not self.competing:
            return "no other process competes for this server's cores any more"
        return (
            f"other processes use {cores:.1f} of the {len(self._names)} cores that this server runs on:"
            " answers come slower until they end"
        )

    def sample(self) -> float:
        """Read the counters; cores used by others since the last call, averaged with what was known.

        Calls within a quarter of a second read nothing: the counters tick a hundred times a second.
        """
        now = self._clock.monotonic()
        if self._last is not None and now - self._last[0] < 0.25:
            return self.cores
        try:
            busy, ours = _busy_seconds(self._names), sum(_process_seconds(p) for p in self._pids)
        except (OSError, ValueError, IndexError):
            return self.cores
        if self._last is not None:
            others = max(0.0, (busy - self._last[1]) - (ours - self._last[2])) / (now - self._last[0])
            self.cores += (others - self.cores) * 0.5
        self._last = (now, busy, ours)
        return self.cores


def _busy_seconds(mine: set[str]) -> float:
    """Busy time, of all processes together, of the cores of these names (``cpu0``)."""
    busy = 0
    for line in Path("/proc/stat").read_text().splitlines():
        name, *rest = line.split()
        if name in mine:
            fields = [int(x) for x in rest[:8]]
            busy += sum(fields) - fields[3] - fields[4]  # without idle and waiting for disks
        elif not name.startswith("cpu"):
            break
    return busy / os.sysconf("SC_CLK_TCK")


def _process_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
