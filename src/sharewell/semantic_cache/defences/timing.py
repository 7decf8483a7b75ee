"""Hits that are as slow as misses for those who should not learn that there is an entry."""

from __future__ import annotations

import threading
from collections import deque

import numpy as np

from ...simulation import Clock


class TimingEqualiser:
    """Delays a hit on another owner's entry to a draw from the latencies of recent misses.

    Whoever asks then cannot tell by the time whether an answer was stored, so neither probe the threshold nor
    learn what others asked. Owners of an entry are not delayed. Until ``least`` misses are known, hits of
    others are to be answered as misses (:meth:`delay_s` returns None). Raises ValueError for ``least`` or
    ``window`` below 1.
    """

    def __init__(self, clock: Clock, rng: np.random.Generator, window: int = 512, least: int = 20) -> None:
        if least < 1 or window < least:
            raise ValueError(f"least must be in [1, window], got least {least} and window {window}")
        self._clock, self._rng, self._least = clock, rng, least
        self._misses: deque[float] = deque(maxlen=window)
        self._lock = threading.Lock()

    def observe_miss(self, latency_s: float) -> None:
        """Tell the whole latency of a miss, from question to answer. Raises ValueError below 0."""
        if not 0 <= latency_s < float("inf"):
            raise ValueError(f"latency_s must be at least 0 and finite, got {latency_s}")
        with self._lock:
            self._misses.append(latency_s)

    def delay_s(self, asked_by: str, owner: str, elapsed_s: float) -> float | None:
        """Seconds to wait before answering a hit found after ``elapsed_s``; None when too few misses are
        known."""
        if asked_by == owner:
            return 0.0
        with self._lock:
            if len(self._misses) < self._least:
                return None
            drawn = self._misses[int(self._rng.integers(len(self._misses)))]
        return max(0.0, drawn - elapsed_s)

    async def wait(self, asked_by: str, owner: str, started: float) -> bool:
        """Wait as :meth:`delay_s` says since ``started`` (the clock's monotonic time).

        Returns False when the hit has to be answered as a miss.
        """
        delay = self.delay_s(asked_by, owner, self._clock.monotonic() - started)
        if delay is None:
            return False
        if delay > 0:
            await self._clock.sleep_until(self._clock.monotonic() + delay)
        return True
