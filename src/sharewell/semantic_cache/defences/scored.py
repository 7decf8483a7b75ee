"""Defences that measure something and compare it with a threshold, so that it can be calibrated."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

from ..base import Context, Entry, Query, Verdict


class ScoredDefence(ABC):
    """Accepts a hit when every score reaches its threshold. ``Verdict.score`` is the smallest margin above
    the thresholds, so 0 is the border.

    Calibration sets :attr:`thresholds`; an adaptive attacker in the audit reads the margins.
    """

    name: str
    score_names: tuple[str, ...]

    def __init__(self, thresholds: Sequence[float]) -> None:
        self.thresholds = tuple(thresholds)

    @property
    def thresholds(self) -> tuple[float, ...]:
        """One for each of :attr:`score_names`."""
        return self._thresholds

    @thresholds.setter
    def thresholds(self, values: Sequence[float]) -> None:
        values = tuple(float(v) for v in values)
        if len(values) != len(self.score_names) or not all(math.isfinite(v) for v in values):
            raise ValueError(f"thresholds must be {len(self.score_names)} finite numbers, got {values}")
        self._thresholds = values

    @abstractmethod
    def scores(self, query: Query, entry: Entry, context: Context) -> tuple[float, ...]:
        """How well ``entry`` fits ``query``: one value, higher is better, for each of ``score_names``."""

    def admit(self, entry: Entry, context: Context) -> Verdict:
        """Admit everything; subclasses keep what they need with the entry."""
        return Verdict(True)

    def accept(self, query: Query, entry: Entry, context: Context) -> Verdict:
        """Accept when no score is below its threshold."""
        margins = [s - t for s, t in zip(self.scores(query, entry, context), self.thresholds, strict=True)]
        worst = min(range(len(margins)), key=margins.__getitem__)
        ok = margins[worst] >= 0  # not a number is no
        return Verdict(ok, "" if ok else f"{self.name}: {self.score_names[worst]}", margins[worst])
