"""Noticing that the world has changed: the Page-Hinkley test on the size of residuals."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np


@dataclass(frozen=True)
class PageHinkley:
    """Alarm when residuals have grown for long enough.

    A residual's size is divided by a running mean of the sizes before it (fading with ``fading``), so the
    test needs no scale. The cumulative sum of what exceeds 1 + ``drift`` is compared with its own minimum
    (Page 1954, Hinkley 1971): an alarm is a rise of ``threshold``. Sizes, not signs, because a change of
    coefficients makes errors of either sign. ``reset`` says what is forgotten at an alarm: the arm, or
    all arms, which also lets arms win that had looked bad before.
    """

    threshold: float = 20.0
    drift: float = 0.3
    fading: float = 0.02
    burn_in: int = 30
    reset: Literal["arm", "all"] = "arm"

    def __post_init__(self) -> None:
        for name in ("threshold", "drift"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be finite and above 0, got {value}")
        if not 0 < self.fading < 1:
            raise ValueError(f"fading must be in (0, 1), got {self.fading}")
        if self.burn_in < 1:
            raise ValueError(f"burn_in must be at least 1, got {self.burn_in}")
        if self.reset not in ("arm", "all"):
            raise ValueError(f"reset must be arm or all, got {self.reset!r}")


class ChangeDetectors:
    """One test a model. ``state`` [n, 4]: residuals seen, mean size, cumulative sum, its minimum."""

    LARGEST = 10.0  # times the mean size: one outlier alone raises no alarm

    def __init__(self, config: PageHinkley, n: int) -> None:
        self.config, self.state = config, np.zeros((n, 4))

    def observe(self, m: int, residual: float) -> bool:
        """Whether this residual raises the alarm of model ``m``, whose test then begins anew."""
        seen, scale, total, low = (float(v) for v in self.state[m])
        size = abs(residual)
        if seen >= self.config.burn_in and scale > 0:
            total += min(size / scale, self.LARGEST) - 1.0 - self.config.drift
            low = min(low, total)
        rate = max(self.config.fading, 1.0 / (seen + 1.0))
        self.state[m] = (seen + 1.0, scale + rate * (size - scale), total, low)
        if total - low <= self.config.threshold:
            return False
        self.state[m] = 0.0
        return True
