"""The record of the machine: cores are those that may be used, load is that of others, nothing names the
host."""

from __future__ import annotations

import getpass
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sharewell.bench import cpu_counters, cpu_seconds, environment, machine_load, usable_cores
from sharewell.bench.machine import CpuCounters


def test_environment_is_json_and_complete():
    record = json.loads(json.dumps(environment()))
    assert record["cores"] == usable_cores()
    assert record["python"] == platform.python_version()
    assert record["cpu_model"]
    assert record["memory_bytes"] > 0
    assert "numpy" in record["versions"] and "sharewell" in record["versions"]
    assert record["date"].endswith("+00:00")


def test_environment_names_neither_host_nor_user():
    text = json.dumps(environment())
    assert platform.node() not in text
    assert f'"{getpass.getuser()}"' not in text


def test_environment_imports_nothing_heavy():
    code = "import sys\nfrom sharewell.bench import environment\n"
    code += "environment()\nassert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="affinity exists on Linux only")
def test_affinity_bounds_the_cores():
    code = "import os\nos.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    code += "from sharewell.bench import usable_cores\nprint(usable_cores())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu.max": "100000 100000"}, 1),
        ({"cpu.max": "max 100000"}, None),
        ({"cpu.max": "not a number"}, None),
        ({"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({"unified/cpu.max": "10000 100000"}, 1),
        ({}, None),
    ],
)
def test_quota_of_the_cgroup_bounds_the_cores(tmp_path: Path, files: dict[str, str], quota: int | None):
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    unbounded = usable_cores(Path("/nowhere"))
    assert usable_cores(tmp_path) == (unbounded if quota is None else min(quota, unbounded))


def test_counters_are_read_from_the_kernels_line(tmp_path: Path):
    tick = os.sysconf("SC_CLK_TCK")
    stat = tmp_path / "stat"
    stat.write_text(f"cpu  {3 * tick} {tick} {2 * tick} 999 888 {tick} {tick} {5 * tick} 0 0\ncpu0 1 2 3\n")
    read = cpu_counters(stat)
    assert read is not None and (read.busy_s, read.stolen_s) == (8.0, 5.0)
    assert cpu_counters(tmp_path / "absent") is None


@pytest.mark.skipif(cpu_counters() is None, reason="the kernel has no counters")
def test_load_tells_others_from_the_measured_work():
    start, own = cpu_counters(), cpu_seconds()
    end = time.process_time() + 0.4
    while time.process_time() < end:
        pass
    used = cpu_seconds() - own
    with_own, without = machine_load(start, used), machine_load(start, 0.0)
    assert with_own["wall_s"] >= 0.4
    # What is not said to be ours is taken for that of others.
    assert without["other_cores"] - with_own["other_cores"] == pytest.approx(
        used / without["wall_s"], abs=0.1
    )


def test_load_is_empty_without_counters():
    assert machine_load(None) == {}
    assert machine_load(CpuCounters(time.monotonic() + 3600, 0.0, 0.0)) == {}
