"""One budget of cores for all our processes, and a watch on what other processes take from it.

Threads that fight for a core run many times slower than fewer threads would, so the engine gets the cores
this process may really use (affinity and cgroup quota), every pool waits passively, and the server says when
others compete."""

from __future__ import annotations

import math
import os
from pathlib import Path, PurePosixPath

from ...simulation import Clock, WallClock


def usable_cores(cgroup: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> int:
    """Cores that this process may use: its affinity, bounded by the CPU quota of its cgroups; at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota(cgroup, membership)
    return max(1, cores if quota >= cores else math.floor(quota))


def _quota(root: Path, membership: Path) -> float:
    """Cores of the smallest quota among the process's cgroup and those above it (version 2 and 1); infinite
    without."""
    try:
        lines = [line.split(":", 2) for line in membership.read_text().splitlines()]
    except OSError:
        lines = []
    best = math.inf
    for _, controllers, path in [*lines, ["0", "", "/"], ["0", "cpu", "/"]]:
        if controllers and "cpu" not in controllers.split(","):
            continue
        # In a container the path may be the host's; then only the mounted root says anything.
        here = PurePosixPath(path.lstrip("/"))
        for group in (here, *here.parents):
            best = min(
                best, _quota_of(root / group) if not controllers else _quota_of_v1(root / "cpu" / group)
            )
    return best


def _quota_of(group: Path) -> float:
    try:
        limit, period = (group / "cpu.max").read_text().split()
        return math.inf if limit == "max" else int(limit) / int(period)
    except (OSError, ValueError):
        return math.inf


def _quota_of_v1(group: Path) -> float:
    try:
        limit = int((group / "cpu.cfs_quota_us").read_text())
        return limit / int((group / "cpu.cfs_period_us").read_text()) if limit > 0 else math.inf
    except (OSError, ValueError, ZeroDivisionError):
        return math.inf


def thread_environment(threads: int) -> dict[str, str]:
    """Environment of a process that may use ``threads`` cores: every thread pool of that size, waiting
    passively."""
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
    """Cores of ours that processes outside ``pids`` used, smoothed over the samples (Linux; 0 elsewhere)."""

    def __init__(self, pids: tuple[int, ...], clock: Clock | None = None) -> None:
        self._pids, self._clock = pids, clock or WallClock()
        self._last: tuple[float, float, float] | None = None
        self.cores = 0.0

    def sample(self) -> float:
        """Read the counters; cores used by others since the last call, averaged with what was known.

        Calls within a quarter of a second read nothing: the counters tick a hundred times a second.
        """
        now = self._clock.monotonic()
        if self._last is not None and now - self._last[0] < 0.25:
            return self.cores
        try:
            busy, ours = _busy_seconds(), sum(_process_seconds(p) for p in self._pids)
        except (OSError, ValueError, IndexError):
            return self.cores
        if self._last is not None:
            others = max(0.0, (busy - self._last[1]) - (ours - self._last[2])) / (now - self._last[0])
            self.cores += (others - self.cores) * 0.5
        self._last = (now, busy, ours)
        return self.cores


def _busy_seconds() -> float:
    """Busy time, of all processes together, of the cores that we may use."""
    mine = {f"cpu{i}" for i in os.sched_getaffinity(0)}
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
