"""The discrete-event kernel: events in order of (time, sequence), handled one by one."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Generic, TypeVar

Event = TypeVar("Event")


class EventLoop(Generic[Event]):
    """A heap of events and the current time in seconds; equal times keep the order of scheduling."""

    def __init__(self, start: float = 0.0) -> None:
        self.now = start
        self._heap: list[tuple[float, int, Event]] = []
        self._sequence = 0

    def __len__(self) -> int:
        return len(self._heap)

    def schedule(self, t: float, event: Event) -> None:
        """Let ``event`` happen at ``t``. Raises ValueError when that is in the past."""
        if not t >= self.now:
            raise ValueError(f"t must be at least now ({self.now}), got {t}")
        heapq.heappush(self._heap, (t, self._sequence, event))
        self._sequence += 1

    def run(self, handle: Callable[[float, Event], None], until: float = float("inf")) -> int:
        """Handle events up to and including ``until`` (handlers may schedule more); returns how many."""
        handled = 0
        while self._heap and self._heap[0][0] <= until:
            self.now, _, event = heapq.heappop(self._heap)
            handle(self.now, event)
            handled += 1
        if until != float("inf"):
            self.now = max(self.now, until)
        return handled
