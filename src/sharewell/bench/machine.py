"""The record of the machine that a figure was measured on."""

from __future__ import annotations

import math
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("numpy", "torch", "numba", "transformers", "tokenizers", "llguidance", "onnxruntime", "fastapi")
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
CPU_FLAGS = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_tile",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "bf16",
    "sve",
)


def usable_cores(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Cores that this process may use: its affinity, bounded by the CPU quota of its cgroups; at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = min((_quota(folder) for folder in _own_cgroups(cgroup)), default=math.inf)
    return max(1, cores if quota >= cores else math.floor(quota))


def _own_cgroups(root: Path) -> list[Path]:
    """The mounts and every folder from this process's own cgroup up: each level may hold a quota."""
    folders = [root, root / "cpu", root / "unified"]
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return folders
    for line in lines:
        _, controllers, path = line.split(":", 2)
        inside = Path(path.lstrip("/"))
        for level in (inside, *inside.parents):
            if controllers == "":
                folders += [root / level, root / "unified" / level]
            elif "cpu" in controllers.split(","):
                folders.append(root / "cpu" / level)
    return folders


def _quota(folder: Path) -> float:
    """Cores of one cgroup's quota (version 2, then 1); infinite without one."""
    try:
        limit, period = (folder / "cpu.max").read_text().split()
        return math.inf if limit == "max" else int(limit) / int(period)
    except (OSError, ValueError):
        pass
    try:
        limit = int((folder / "cpu.cfs_quota_us").read_text())
        return limit / int((folder / "cpu.cfs_period_us").read_text()) if limit > 0 else math.inf
    except (OSError, ValueError):
        return math.inf


@dataclass(frozen=True)
class CpuCounters:
    """The machine's CPU seconds since boot (all cores together), and when they were read."""

    at_s: float
    busy_s: float
    stolen_s: float


def cpu_counters(stat: Path = Path("/proc/stat")) -> CpuCounters | None:
    """Read the kernel's counters; None where there are none (not Linux)."""
    try:
        fields = [int(x) for x in stat.read_text().split("\n", 1)[0].split()[1:9]]
    except (OSError, ValueError):
        return None
    tick = os.sysconf("SC_CLK_TCK")
    user, nice, system, _idle, _wait, irq, soft_irq, stolen = fields
    return CpuCounters(time.monotonic(), (user + nice + system + irq + soft_irq) / tick, stolen / tick)


def machine_load(start: CpuCounters | None, own_cpu_s: float = 0.0) -> dict[str, float]:
    """How disturbed the machine was since ``start``: cores kept busy by others, or stolen by the hypervisor.

    ``own_cpu_s``: CPU seconds that the measured work took in that time. Empty without the kernel's counters.
    """
    now = cpu_counters()
    if start is None or now is None or now.at_s <= start.at_s:
        return {}
    seconds = now.at_s - start.at_s
    others = max(0.0, now.busy_s - start.busy_s - own_cpu_s)
    return {
        "wall_s": round(seconds, 3),
        "other_cores": round(others / seconds, 4),
        "stolen_cores": round((now.stolen_s - start.stolen_s) / seconds, 4),
    }


def environment(packages: Sequence[str] = PACKAGES) -> dict[str, Any]:
    """The machine, versions and date as JSON values, without host or user name; imports no package."""
    import psutil

    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "cpu_model": _cpu_model(),
        "cpu_flags": _cpu_flags(),
        "cores": usable_cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpu": _gpu(),
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: version for name in ("sharewell", *packages) if (version := _version(name))},
        "threads": {name: os.environ[name] for name in THREAD_VARIABLES if name in os.environ},
        "load_average": [round(x, 2) for x in os.getloadavg()],
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_info() -> dict[str, str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0].splitlines()
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def _cpu_model() -> str:
    info = _cpu_info()
    return info.get("model name") or info.get("Processor") or platform.processor() or platform.machine()


def _cpu_flags() -> list[str]:
    info = _cpu_info()
    flags = set((info.get("flags") or info.get("Features") or "").split())
    return [flag for flag in CPU_FLAGS if flag in flags]


def _gpu() -> str | None:
    return _output(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], None)


def _commit() -> str | None:
    """Short commit of the source tree, with ``-dirty`` when files differ from it; None outside a checkout."""
    folder = Path(__file__).parent
    commit = _output(["git", "rev-parse", "--short=12", "HEAD"], folder)
    if commit is None:
        return None
    return commit + (
        "-dirty" if _output(["git", "status", "--porcelain", "--untracked-files=no"], folder) else ""
    )


def _output(command: list[str], folder: Path | None) -> str | None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
