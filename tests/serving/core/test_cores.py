"""The core budget: affinity and cgroup quotas, and the watch on other processes."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sharewell.serving.core.cores import CompetitionMonitor, _quota, thread_environment, usable_cores


def group(root: Path, path: str, **files: str) -> None:
    folder = root / path.lstrip("/")
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


@pytest.mark.parametrize(
    ("line", "path", "files", "cores"),
    [
        ("0::/a/b", "/a/b", {"cpu__max": "150000 100000\n"}, 1.5),
        ("0::/a/b", "/a", {"cpu__max": "300000 100000\n"}, 3.0),  # the parent's quota binds, too
        ("0::/a/b", "/a/b", {"cpu__max": "max 100000\n"}, math.inf),
        ("0::/of/the/host", "/", {"cpu__max": "200000 100000\n"}, 2.0),
        ("4:cpu,cpuacct:/x", "/cpu/x", {"cpu__cfs_quota_us": "250000", "cpu__cfs_period_us": "100000"}, 2.5),
        ("4:cpu:/x", "/cpu", {"cpu__cfs_quota_us": "-1", "cpu__cfs_period_us": "100000"}, math.inf),
        ("7:memory:/x", "/x", {"cpu__max": "nonsense"}, math.inf),
    ],
)
def test_the_smallest_quota_of_the_cgroups_counts(
    tmp_path: Path, line: str, path: str, files: dict[str, str], cores: float
) -> None:
    group(tmp_path, path, **files)
    (tmp_path / "membership").write_text(line + "\n")
    assert _quota(tmp_path, tmp_path / "membership") == cores


def test_usable_cores_are_at_least_one_and_at_most_the_affinity(tmp_path: Path) -> None:
    mine = len(os.sched_getaffinity(0))
    assert usable_cores(tmp_path, tmp_path / "none") == mine
    group(tmp_path, "/", cpu__max="10000 100000")
    assert usable_cores(tmp_path, tmp_path / "none") == 1
    group(tmp_path, "/", cpu__max="99900000 100000")
    assert usable_cores(tmp_path, tmp_path / "none") == mine
    one = f"import os; os.sched_setaffinity(0, {{{min(os.sched_getaffinity(0))}}}); "
    code = one + "from sharewell.serving.core.cores import usable_cores; print(usable_cores())"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "1\n"
    )


def test_every_thread_pool_gets_the_budget_and_waits_passively() -> None:
    environment = thread_environment(3)
    assert {environment[n] for n in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")} == {"3"}
    assert environment["OMP_WAIT_POLICY"] == "PASSIVE"


def test_a_competing_process_is_seen_and_our_own_work_is_not() -> None:
    rival = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        watching, counting_it_as_ours = (
            CompetitionMonitor((os.getpid(),)),
            CompetitionMonitor((os.getpid(), rival.pid)),
        )
        for monitor in (watching, counting_it_as_ours):
            monitor.sample()
        deadline = time.monotonic() + 30
        while watching.cores - counting_it_as_ours.cores < 0.1 and time.monotonic() < deadline:
            sum(range(100_000))
            for monitor in (watching, counting_it_as_ours):
                monitor.sample()
        assert watching.cores - counting_it_as_ours.cores >= 0.1
        known = watching.cores
        assert watching.sample() == known, "too soon to measure"
    finally:
        rival.kill()
        rival.wait()
    assert CompetitionMonitor((rival.pid,)).sample() == 0.0
