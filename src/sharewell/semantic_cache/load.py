"""How busy a model is, smoothed: when it is overloaded, more alike is alike enough."""

from __future__ import annotations

import math
import threading

from ..simulation import Clock

SMOOTHING_S = 30.0


def load_of(queue: float, target: float) -> float:
    """Equation 6 of the card: ``clip((queue - target) / target, 0, 1)`` of a queue length or a latency.

    Raises ValueError for a target that is not above 0.
    """
    if not target > 0:
        raise ValueError(f"target must be above 0, got {target}")
    return min(1.0, max(0.0, (queue - target) / target))


class LoadGauge:
    """Load in [0, 1] of each model, an exponential average over ``smoothing_s``."""

    def __init__(self, clock: Clock, smoothing_s: float = SMOOTHING_S) -> None:
        if not smoothing_s > 0:
            raise ValueError(f"smoothing_s must be above 0, got {smoothing_s}")
        self._clock, self._smoothing_s = clock, smoothing_s
        self._at: dict[str, tuple[float, float, float]] = {}  # average, last value, when
        self._lock = threading.Lock()

    def set(self, model: str, value: float) -> None:
        """``model``'s load is ``value`` from now on. Raises ValueError outside [0, 1]."""
        if not 0 <= value <= 1:
            raise ValueError(f"value must be a load in [0, 1], got {value}")
        with self._lock:
            self._at[model] = (self._average(model), value, self._clock.monotonic())

    def get(self, model: str) -> float:
        """The smoothed load; 0 for a model that nobody reported."""
        with self._lock:
            return self._average(model)

    def _average(self, model: str) -> float:
        if model not in self._at:
            return 0.0
        average, value, since = self._at[model]
        share = math.exp(-max(0.0, self._clock.monotonic() - since) / self._smoothing_s)
        return average * share + value * (1 - share)
