"""Whether the time of an answer says that it was stored, and how well the threshold can be learnt from it.

Source: the validator of arXiv 2601.23088 (log latency of hits and of misses as two normals).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CALIBRATION_PROBES = 20
THRESHOLD_QUERIES = 6  # log2(50), rounded up


@dataclass(frozen=True)
class TimingLeak:
    """``auc`` of telling hit from miss (0.5 is chance), with the probes it rests on.

    ``hit_s`` and ``miss_s`` are medians. ``threshold_error`` is the distance of the threshold that six
    queries found from the true one, None when it was not tried.
    """

    auc: float
    probes: int
    hit_s: float
    miss_s: float
    threshold_error: float | None = None
    threshold_queries: int = 0


@dataclass(frozen=True)
class LatencyModel:
    """Two normals of log latency."""

    hit_mean: float
    hit_std: float
    miss_mean: float
    miss_std: float

    @classmethod
    def fit(cls, hits: Sequence[float], misses: Sequence[float]) -> LatencyModel:
        """From seconds. Raises ValueError for fewer than two of either or a latency that is not above 0."""
        if len(hits) < 2 or len(misses) < 2 or min(*hits, *misses) <= 0:
            raise ValueError("latencies must be at least two hits and two misses above 0 s")
        a, b = np.log(hits), np.log(misses)
        # equal latencies would give a width of 0
        return cls(float(a.mean()), max(float(a.std()), 1e-3), float(b.mean()), max(float(b.std()), 1e-3))

    def log_ratio(self, latency_s: float) -> float:
        """log p(latency | hit) - log p(latency | miss)."""
        x = math.log(max(latency_s, 1e-9))
        hit = -math.log(self.hit_std) - 0.5 * ((x - self.hit_mean) / self.hit_std) ** 2
        miss = -math.log(self.miss_std) - 0.5 * ((x - self.miss_mean) / self.miss_std) ** 2
        return hit - miss


def auc(positive: Sequence[float], negative: Sequence[float]) -> float:
    """Chance that a positive's score is above a negative's, ties half (Mann-Whitney).

    Raises ValueError when either is empty.
    """
    if not len(positive) or not len(negative):
        raise ValueError("positive and negative must not be empty")
    a = np.asarray(positive, float)
    b = np.sort(np.asarray(negative, float))
    below, upto = np.searchsorted(b, a, "left"), np.searchsorted(b, a, "right")
    return float((below + upto).mean() / (2 * len(b)))


def timing_leak(
    ask_hit: Callable[[], float], ask_miss: Callable[[], float], probes: int, rng: np.random.Generator
) -> tuple[TimingLeak, LatencyModel]:
    """Ask ``probes`` questions, hits and misses in random order after 20 of each for calibration.

    The callables ask as an outsider and return seconds. Raises ValueError for fewer than 4 probes.
    """
    if probes < 4:
        raise ValueError(f"probes must be at least 4, got {probes}")
    hits, misses = _interleaved(ask_hit, ask_miss, 2 * CALIBRATION_PROBES, rng)
    model = LatencyModel.fit(hits, misses)
    hits, misses = _interleaved(ask_hit, ask_miss, probes, rng)
    score = auc([model.log_ratio(t) for t in hits], [model.log_ratio(t) for t in misses])
    leak = TimingLeak(score, len(hits) + len(misses), float(np.median(hits)), float(np.median(misses)))
    return leak, model


def learn_threshold(
    similarities: NDArray[np.float64], ask: Callable[[int], float], model: LatencyModel
) -> tuple[float, int]:
    """(threshold, queries): bisection over probes ordered by similarity to a stored question.

    ``ask(i)`` asks probe i and returns seconds. Raises ValueError for no probes.
    """
    if not len(similarities):
        raise ValueError("similarities must not be empty")
    order = np.argsort(similarities)
    low, high, queries = -1, len(order), 0  # below low all miss, from high on all hit
    while high - low > 1 and queries < THRESHOLD_QUERIES:
        middle = (low + high) // 2
        queries += 1
        if model.log_ratio(ask(int(order[middle]))) > 0:
            high = middle
        else:
            low = middle
    edges = [float(similarities[order[max(low, 0)]]), float(similarities[order[min(high, len(order) - 1)]])]
    return sum(edges) / 2, queries


def _interleaved(
    ask_hit: Callable[[], float], ask_miss: Callable[[], float], probes: int, rng: np.random.Generator
) -> tuple[list[float], list[float]]:
    hits: list[float] = []
    misses: list[float] = []
    for is_hit in rng.permutation(np.arange(probes) % 2 == 0):
        if is_hit:
            hits.append(ask_hit())
        else:
            misses.append(ask_miss())
    return hits, misses
