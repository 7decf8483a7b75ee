"""How far above its mean an arm may be hoped: the factor of the width in an upper confidence bound."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np


class Width(Protocol):
    def factor(self, logdet: np.ndarray, dim: int, lam: float) -> np.ndarray | float:
        """From the log determinants of the regularised grams [models] and their dimension."""
        ...


@dataclass(frozen=True)
class Constant:
    """The same factor always (LinUCB's alpha; Li et al., arXiv 1003.0146, Alg. 1)."""

    alpha: float = 0.5

    def __post_init__(self) -> None:
        if not (math.isfinite(self.alpha) and self.alpha >= 0):
            raise ValueError(f"alpha must be finite and at least 0, got {self.alpha}")

    def factor(self, logdet: np.ndarray, dim: int, lam: float) -> float:
        return self.alpha


@dataclass(frozen=True)
class Radius:
    """The radius within which the true coefficients lie, at all times, with probability 1 - ``delta``.

    ``noise``: the rewards' noise is sub-Gaussian with this deviation; ``norm``: the coefficients are no
    longer than this. Abbasi-Yadkori et al., Improved Algorithms for Linear Stochastic Bandits (2011), Thm 2.
    """

    noise: float = 0.1
    norm: float = 1.0
    delta: float = 0.05

    def __post_init__(self) -> None:
        for name in ("noise", "norm"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be finite and at least 0, got {value}")
        if not 0 < self.delta < 1:
            raise ValueError(f"delta must be in (0, 1), got {self.delta}")

    def factor(self, logdet: np.ndarray, dim: int, lam: float) -> np.ndarray:
        information = np.maximum(np.asarray(logdet) - dim * math.log(lam), 0.0)
        return self.noise * np.sqrt(2 * math.log(1 / self.delta) + information) + math.sqrt(lam) * self.norm
