"""Measuring: interleaved timing, memory, the record of the machine, and the report of a benchmark."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .discovery import Benchmark, find_benchmark, list_benchmarks
    from .machine import cpu_counters, environment, machine_load, usable_cores
    from .memory import PeakMemory
    from .progress import Progress, no_progress, progress_bars
    from .report import PEER_NOT_INSTALLED, Report, Row
    from .timing import Sample, cpu_seconds, interleave, measure, median, spread, values

# Public names and the file that has them: the bench imports nothing heavy until a name needs it.
_HOME = {
    "Benchmark": "discovery",
    "find_benchmark": "discovery",
    "list_benchmarks": "discovery",
    "cpu_counters": "machine",
    "environment": "machine",
    "machine_load": "machine",
    "usable_cores": "machine",
    "PeakMemory": "memory",
    "PEER_NOT_INSTALLED": "report",
    "Progress": "progress",
    "no_progress": "progress",
    "progress_bars": "progress",
    "Report": "report",
    "Row": "report",
    "Sample": "timing",
    "cpu_seconds": "timing",
    "interleave": "timing",
    "measure": "timing",
    "median": "timing",
    "spread": "timing",
    "values": "timing",
}
__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
