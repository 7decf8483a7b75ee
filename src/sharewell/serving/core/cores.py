"""One budget of cores for all our processes, and a watch on what other processes take from it.

Threads that fight for a core run many times slower than fewer threads would, so the engine gets the cores this
process may really use (affinity and cgroup quota), every pool waits passively, and the server says when others compete.
"""

from __future__ import annotations

import math
import os
import time
from pathlib import Path


def usable_cores(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Cores that this process may use: its affinity, bounded by the cgroup's CPU quota; at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota(cgroup)
    return max(1, min(cores, math.floor(quota) if quota >= 1 else 1))


def _quota(root: Path) -> float:
    """Cores of the cgroup's quota (version 2, then 1); infinite without one."""
    try:
        limit, period = (root / "cpu.max").read_text().split()
        return math.inf if limit == "max" else int(limit) / int(period)
    except (OSError, ValueError):
        pass
    try:
        limit = int((root / "cpu/cpu.cfs_quota_us").read_text())
        return limit / int((root / "cpu/cpu.cfs_period_us").read_text()) if limit > 0 else math.inf
    except (OSError, ValueError):
        return math.inf


def thread_environment(threads: int) -> dict[str, str]:
    """Environment of a process that may use ``threads`` cores: every thread pool of that size, waiting passively."""
    n = str(threads)
    return {
        "OMP_NUM_THREADS": n,
        "MKL_NUM_THREADS": n,
        "NUMBA_NUM_THREADS": n,
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": "0",
        "KMP_BLOCKTIME": "0",
    }


class CompetitionMonitor:
    """Cores that processes outside ``pids`` used, smoothed over the samples (Linux; 0 elsewhere)."""

    def __init__(self, pids: tuple[int, ...]) -> None:
        self._pids = pids
        self._last: tuple[float, float, float] | None = None
        self.cores = 0.0

    def sample(self) -> float:
        """Read the counters; cores used by others since the last call, averaged with what was known."""
        try:
            busy, ours = _busy_seconds(), sum(_process_seconds(p) for p in self._pids)
        except (OSError, ValueError, IndexError):
            return 0.0
        now = time.monotonic()
        if self._last is not None and now > self._last[0]:
            span = now - self._last[0]
            others = max(0.0, (busy - self._last[1]) - (ours - self._last[2])) / span
            self.cores += (others - self.cores) * 0.5
        self._last = (now, busy, ours)
        return self.cores


def _busy_seconds() -> float:
    fields = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    idle = fields[3] + fields[4]
    return (sum(fields[:8]) - idle) / os.sysconf("SC_CLK_TCK")


def _process_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
