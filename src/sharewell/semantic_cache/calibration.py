"""Thresholds with a certificate: how often is a hit wrong, at most.

A threshold is proposed on one half of the judged candidates and certified on the other, walking down from the
strictest one that has enough of them and stopping at the first that fails (fixed-sequence testing), so that
looking at many thresholds costs no confidence. Where the candidates just below are wrong too often by
themselves, it goes no lower.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

STEP = 0.005
WINDOW, MOST_IN_WINDOW = 20, 0.2
UNDER_LOAD = 1.5  # times the wrong hits that are allowed otherwise, on average and in the window


@dataclass(frozen=True)
class Judged:
    """One candidate hit: its cosine, and whether its answer was right for the question."""

    category: str
    similarity: float
    right: bool


@dataclass(frozen=True)
class Calibration:
    """``threshold`` is None when nothing could be certified: the category stays exact-only. ``hits`` and
    ``wrong`` count the certifying half at the threshold, ``bound`` is the upper bound of the wrong share.
    ``floor``: the threshold that is certified for ``UNDER_LOAD`` times as many wrong hits."""

    category: str
    threshold: float | None
    hits: int
    wrong: int
    bound: float
    reason: str = ""
    floor: float | None = None


def upper_bound(wrong: int, n: int, confidence: float = 0.95) -> float:
    """Clopper-Pearson (1934): with ``confidence`` the share behind ``wrong`` of ``n`` is at most this."""
    from scipy.stats import beta

    if not 0 <= wrong <= n:
        raise ValueError(f"wrong must be in [0, {n}], got {wrong}")
    if wrong == n:
        return 1.0
    return float(beta.ppf(confidence, wrong + 1, n - wrong))


def lower_bound(wrong: int, n: int, confidence: float = 0.95) -> float:
    """The other side: at least this."""
    return 1.0 - upper_bound(n - wrong, n, confidence)


def least_hits(max_wrong: float, confidence: float = 0.95) -> int:
    """How many candidates without an error the bound needs: 149 for 2 %."""
    return int(np.ceil(np.log(1 - confidence) / np.log(1 - max_wrong)))


def choose_threshold(
    judged: Sequence[Judged],
    max_wrong: float,
    *,
    confidence: float = 0.95,
    most_in_window: float = MOST_IN_WINDOW,
    rng: np.random.Generator | None = None,
) -> Calibration:
    """The smallest threshold that is certified to be wrong in at most ``max_wrong`` of its hits.

    It stays above where ``WINDOW`` neighbouring candidates are wrong in more than ``most_in_window``.

    ``judged`` are candidates of one category, as traffic brings them. Raises ValueError for more than one
    category, or a ``max_wrong`` outside (0, 1).
    """
    if not 0 < max_wrong < 1:
        raise ValueError(f"max_wrong must be in (0, 1), got {max_wrong}")
    names = {j.category for j in judged}
    if len(names) > 1:
        raise ValueError(f"judged must be of one category, got {sorted(names)}")
    name, needed = next(iter(names), ""), least_hits(max_wrong, confidence)
    near = np.array([j.similarity for j in judged], np.float64)
    wrong = np.array([not j.right for j in judged], bool)
    half = (rng or np.random.default_rng(0)).permutation(len(near)) % 2 == 0
    lowest = _bad_end(near[half], wrong[half], most_in_window)
    grid = np.arange(1 - STEP, max(0.3, lowest), -STEP)
    proposed = [
        t for t in grid
        if (n := int((half & (near >= t)).sum()))
        and upper_bound(int((half & (near >= t) & wrong).sum()), n, confidence) <= max_wrong
    ]  # fmt: skip
    if not proposed:
        return Calibration(
            name, None, int(half.sum()), int((half & wrong).sum()), 1.0,
            f"no threshold keeps wrong hits at {max_wrong:.1%}; {needed} right ones are needed at least",
        )  # fmt: skip
    best: Calibration | None = None
    for t in grid:
        if t < min(proposed) - 1e-9:
            break
        passed = ~half & (near >= t)
        n, bad = int(passed.sum()), int((passed & wrong).sum())
        # Without new candidates there is no evidence that a lower threshold would be as good.
        if n < needed or (best is not None and n == best.hits):
            continue
        bound = upper_bound(bad, n, confidence)
        if bound > max_wrong:
            reason = "" if best else f"the other half is wrong in up to {bound:.1%}"
            return best or Calibration(name, None, n, bad, bound, reason)
        best = Calibration(name, round(float(t), 4), n, bad, bound)
    return best or Calibration(name, None, 0, 0, 1.0, f"fewer than {needed} candidates to certify with")


def _bad_end(near: NDArray[np.float64], wrong: NDArray[np.bool_], most: float) -> float:
    """The similarity below which the next ``WINDOW`` candidates are wrong too often by themselves: good ones
    above must not pay for them, however much the average allows. 0 when there is none."""
    order = np.argsort(-near, kind="stable")
    bad = np.concatenate([[0], np.cumsum(wrong[order])])
    if len(order) < WINDOW:
        return 0.0
    over = np.flatnonzero(bad[WINDOW:] - bad[:-WINDOW] > most * WINDOW)
    return float(near[order[over[0]]]) if len(over) else 0.0


def calibrations(
    judged: Iterable[Judged], max_wrong: Mapping[str, float], *, confidence: float = 0.95, seed: int = 0
) -> dict[str, Calibration]:
    """One :class:`Calibration` a category that ``max_wrong`` names and candidates exist for."""
    kinds: dict[str, list[Judged]] = {}
    for one in judged:
        if one.category in max_wrong:
            kinds.setdefault(one.category, []).append(one)
    out = {}
    for name, found in kinds.items():
        base, loaded = (
            choose_threshold(
                found,
                min(0.5, more * max_wrong[name]),
                confidence=confidence,
                most_in_window=more * MOST_IN_WINDOW,
                rng=np.random.default_rng(seed),
            )
            for more in (1.0, UNDER_LOAD)
        )
        out[name] = replace(base, floor=loaded.threshold if base.threshold is not None else None)
    return out
