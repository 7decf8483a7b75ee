"""Time as a thing that is passed in, so that one policy runs on a wall clock, in a simulator and in a
test."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from collections.abc import Callable
from typing import Protocol


class Clock(Protocol):
    """Seconds. ``monotonic`` for durations and deadlines, ``unix`` for what must survive a restart."""

    def monotonic(self) -> float: ...

    def unix(self) -> float: ...

    async def sleep_until(self, t: float) -> None:
        """Return when ``monotonic()`` has reached ``t``."""
        ...


class WallClock:
    """The machine's own time."""

    def monotonic(self) -> float:
        return time.monotonic()

    def unix(self) -> float:
        return time.time()

    async def sleep_until(self, t: float) -> None:
        await asyncio.sleep(max(0.0, t - time.monotonic()))


class VirtualClock:
    """Time that moves only when :meth:`advance` is called; sleepers and callbacks run in (time, order of
    asking)."""

    def __init__(self, start: float = 0.0, unix_start: float = 0.0) -> None:
        self._now, self._offset = start, unix_start - start
        self._order = itertools.count()
        self._due: list[tuple[float, int, Callable[[], None]]] = []

    def monotonic(self) -> float:
        return self._now

    def unix(self) -> float:
        return self._now + self._offset

    def call_at(self, t: float, callback: Callable[[], None]) -> None:
        """Run ``callback`` when time reaches ``t`` (at the next advance when that is past)."""
        heapq.heappush(self._due, (max(t, self._now), next(self._order), callback))

    async def sleep_until(self, t: float) -> None:
        if t <= self._now:
            return
        woken = asyncio.get_running_loop().create_future()
        self.call_at(t, lambda: None if woken.done() else woken.set_result(None))
        await woken

    def advance(self, seconds: float) -> None:
        """Move time on, running what falls due in order; each callback sees its own time as now."""
        if seconds < 0:
            raise ValueError(f"seconds must be at least 0, got {seconds}")
        end = self._now + seconds
        while self._due and self._due[0][0] <= end:
            self._now, _, callback = heapq.heappop(self._due)
            callback()
        self._now = end
