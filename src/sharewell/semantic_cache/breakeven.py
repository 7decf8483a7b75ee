"""When a cache costs more than it saves: per category, measured, with a bound (arXiv 2510.26835).

It pays when ``h * (T - t_fetch) > t_search``: the hit share ``h`` must exceed ``h* = t_search / (T -
t_fetch)``, with ``T`` the time of an answer, ``t_search`` what every lookup costs (embedding included) and
``t_fetch`` what a hit costs on top.
"""

from __future__ import annotations

import random
import threading
from dataclasses import dataclass, field

from .calibration import lower_bound, upper_bound

LEAST_LOOKUPS = 500
LEAST_RETESTS = 100
RETEST = 0.01


@dataclass
class _Meter:
    lookups: int = 0
    hits: int = 0
    search_s: float = 0.0
    fetch_s: float = 0.0
    answers: int = 0
    answer_s: float = 0.0
    bypassed: bool = False
    cost: tuple[float, float, float] | None = field(default=None)


@dataclass(frozen=True)
class BreakEven:
    """``needed`` is h*, None before anything was measured; ``hit_share`` since the last switch."""

    needed: float | None
    hit_share: float
    lookups: int
    bypassed: bool


class BreakEvenSwitch:
    """Turns a category's semantic tier off when the 95 % upper bound of its hit share is below h*, and on
    again when the lower bound of the re-tested 1 % is above it."""

    def __init__(
        self, rng: random.Random, *, least_lookups: int = LEAST_LOOKUPS, retest: float = RETEST
    ) -> None:
        if least_lookups < 1 or not 0 <= retest <= 1:
            raise ValueError(
                f"least_lookups must be at least 1 and retest in [0, 1], got {least_lookups}, {retest}"
            )
        self._rng, self._least, self._retest = rng, least_lookups, retest
        self._meters: dict[str, _Meter] = {}
        self._lock = threading.Lock()

    def bypass(self, category: str) -> bool:
        """Shall this lookup be left out? False for the share that re-tests."""
        meter = self._meters.get(category)
        return meter is not None and meter.bypassed and self._rng.random() >= self._retest

    def bypassed(self, category: str) -> bool:
        """Is the category switched off?"""
        meter = self._meters.get(category)
        return meter is not None and meter.bypassed

    def looked(self, category: str, hit: bool, search_s: float, fetch_s: float) -> None:
        """Count one semantic lookup."""
        with self._lock:
            meter = self._meters.setdefault(category, _Meter())
            meter.lookups += 1
            meter.hits += hit
            meter.search_s += search_s
            meter.fetch_s += fetch_s
            least = LEAST_RETESTS if meter.bypassed else self._least
            if meter.lookups >= least and meter.lookups % 50 == 0:
                self._decide(meter)

    def answered(self, category: str, seconds: float) -> None:
        """Count what one computed answer took."""
        if seconds > 0:
            with self._lock:
                meter = self._meters.setdefault(category, _Meter())
                meter.answers += 1
                meter.answer_s += seconds

    def _decide(self, meter: _Meter) -> None:
        needed = _needed(meter)
        if needed is None:
            return
        if meter.bypassed:
            switch = lower_bound(meter.hits, meter.lookups) > needed
        else:
            switch = upper_bound(meter.hits, meter.lookups) < needed
        if switch:
            meter.bypassed = not meter.bypassed
        if switch or meter.lookups >= 20 * self._least:  # a new window: traffic changes
            meter.cost = (
                meter.search_s / meter.lookups,
                meter.fetch_s / max(1, meter.hits),
                meter.answer_s / max(1, meter.answers),
            )
            meter.lookups = meter.hits = 0
            meter.search_s = meter.fetch_s = 0.0

    def state(self, category: str) -> BreakEven:
        """How it stands."""
        with self._lock:
            meter = self._meters.get(category, _Meter())
            return BreakEven(
                _needed(meter), meter.hits / max(1, meter.lookups), meter.lookups, meter.bypassed
            )


def break_even_share(search_s: float, fetch_s: float, answer_s: float) -> float:
    """h*, at most 1: the hit share from which on a cache saves time."""
    return 1.0 if answer_s <= fetch_s else min(1.0, search_s / (answer_s - fetch_s))


def _needed(meter: _Meter) -> float | None:
    if not meter.answers:
        return None
    if not meter.lookups:
        return break_even_share(*meter.cost) if meter.cost else None
    search_s, answer_s = meter.search_s / meter.lookups, meter.answer_s / meter.answers
    fetch_s = meter.fetch_s / meter.hits if meter.hits else 0.0
    return break_even_share(search_s, fetch_s, answer_s)
