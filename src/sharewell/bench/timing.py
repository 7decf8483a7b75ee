"""Timing for a shared machine: contenders take turns, and CPU seconds stand beside wall seconds."""

from __future__ import annotations

import gc
import resource
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import psutil

from .memory import PeakMemory
from .progress import Progress, no_progress


@dataclass(frozen=True)
class Sample:
    """One run of one contender.

    ``cpu_s`` counts user and system time of this process and of its children, living or reaped.
    ``peak_bytes`` is the largest resident memory of all of them (see :class:`PeakMemory`), ``start_bytes``
    what they held before. ``value`` is what the contender returned.
    """

    wall_s: float
    cpu_s: float
    peak_bytes: int
    start_bytes: int = 0
    value: Any = field(default=None, repr=False, compare=False)

    @property
    def growth_bytes(self) -> int:
        """Memory that the run itself took at its peak, in bytes."""
        return max(0, self.peak_bytes - self.start_bytes)


def _own_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _children_cpu_s() -> float:
    """Children: reaped ones exactly, living ones in the kernel's ticks of 10 ms.

    A child that ends in between leaves the living and enters the reaped with all it used, so differences of
    this sum stay right. A grandchild whose parent dies before reaping it is lost.
    """
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    total = usage.ru_utime + usage.ru_stime
    for child in psutil.Process().children(recursive=True):
        try:
            times = child.cpu_times()
        except psutil.Error:
            continue
        total += times.user + times.system
        # What a child has reaped itself: nobody else counts it.
        total += getattr(times, "children_user", 0.0) + getattr(times, "children_system", 0.0)
    return total


def cpu_seconds() -> float:
    """CPU seconds, user and system, that this process and its children have used so far."""
    return _own_cpu_s() + _children_cpu_s()


def measure(run: Callable[[], Any]) -> Sample:
    """Run once and say what it took. Garbage is collected before, so that nobody pays for the one before.

    Looking at children and memory happens outside the timed part.
    """
    gc.collect()
    with PeakMemory() as memory:
        children_before = _children_cpu_s()
        own_before = _own_cpu_s()
        start = time.perf_counter()
        value = run()
        wall_s = time.perf_counter() - start
        own = _own_cpu_s() - own_before
        children = _children_cpu_s() - children_before
    return Sample(wall_s, own + max(0.0, children), memory.peak_bytes, memory.start_bytes, value)


def interleave(
    contenders: Mapping[str, Callable[[], Any]],
    repeats: int = 5,
    warmup: int = 1,
    progress: Progress = no_progress,
) -> dict[str, list[Sample]]:
    """Samples of each contender, taken in turns: A B, B A, A B, ...

    A machine that slows down or is disturbed for a while then disturbs all contenders alike, and the i-th
    samples of all of them may be compared as pairs. Each round starts with another contender, so that none
    always runs after the same one. ``warmup`` rounds are run and thrown away. Raises ValueError for an empty
    mapping, ``repeats`` under 1 or ``warmup`` under 0; what a contender raises goes through.
    """
    if not contenders:
        raise ValueError("contenders must name at least one, got none")
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    if warmup < 0:
        raise ValueError(f"warmup must be at least 0, got {warmup}")
    names = list(contenders)
    samples: dict[str, list[Sample]] = {name: [] for name in names}
    what, total = " vs ".join(names), (warmup + repeats) * len(names)
    for turn in range(warmup + repeats):
        shift = turn % len(names)
        for place, name in enumerate(names[shift:] + names[:shift]):
            sample = measure(contenders[name])
            if turn >= warmup:
                samples[name].append(sample)
            progress(what, turn * len(names) + place + 1, total)
    return samples


def values(
    samples: Iterable[Sample], quantity: Literal["wall_s", "cpu_s", "peak_bytes", "growth_bytes"] = "wall_s"
) -> list[float]:
    """One quantity of every sample, in the order they were taken."""
    return [float(getattr(sample, quantity)) for sample in samples]


def median(numbers: Sequence[float]) -> float:
    """The median. Raises ValueError for no numbers."""
    if len(numbers) == 0:
        raise ValueError("numbers must hold at least one, got none")
    return float(np.median(numbers))


def spread(numbers: Sequence[float]) -> tuple[float, float]:
    """The quartiles (25 %, 75 %), linearly interpolated. Raises ValueError for no numbers."""
    if len(numbers) == 0:
        raise ValueError("numbers must hold at least one, got none")
    low, high = np.percentile(np.asarray(numbers, dtype=np.float64), [25, 75])
    return float(low), float(high)
