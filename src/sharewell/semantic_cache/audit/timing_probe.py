"""The timing probe on a cache: asks as an outsider, with or without the equaliser, and as the owner."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ...simulation import Clock
from ..cache import SemanticCache
from ..defences import TimingEqualiser
from ..namespace import Namespace
from .sources import shipped_questions
from .timing import LatencyModel, TimingLeak, learn_threshold, timing_leak

UPSTREAM_MEDIAN_S, UPSTREAM_SIGMA = 0.06, 0.35
_FILLERS = "lamp river seven quiet garden stone window paper cloud ladder"
_OWNER, _OUTSIDER = "sharewell-audit-owner", "sharewell-audit-outsider"


@dataclass(frozen=True)
class TimingResult:
    """``leak`` as an outsider sees it; medians in seconds of hits of owner and outsider and of misses.

    ``owner_saved`` and ``outsider_saved`` are the shares of a miss's time that a hit saves them.
    """

    leak: TimingLeak
    owner_hit_s: float

    @property
    def owner_saved(self) -> float:
        return 1 - self.owner_hit_s / self.leak.miss_s

    @property
    def outsider_saved(self) -> float:
        return 1 - self.leak.hit_s / self.leak.miss_s


def probe_cache(
    cache: SemanticCache,
    clock: Clock,
    probes: int,
    seed: int,
    equaliser: TimingEqualiser | None = None,
    upstream_median_s: float = UPSTREAM_MEDIAN_S,
) -> TimingResult:
    """Half the ``probes`` repeat a question that another user stored, half are new, in random order.

    A miss waits for a modelled answer: log-normal, median ``upstream_median_s``, sigma 0.35. The cache, which
    is written to, must be a copy. Raises ValueError for fewer than 4 probes.
    """
    rng = np.random.default_rng([seed, 77])
    questions = shipped_questions()
    stored = [q.question for q in questions[:8]]
    for text in stored:
        cache.put(text, "an answer", namespace=Namespace(owner=_OWNER))
    fresh = iter(range(1 << 60))
    with asyncio.Runner() as runner:

        def ask(text: str, who: str) -> float:
            start = clock.monotonic()
            found = cache.lookup(text, namespace=Namespace(owner=who))
            served = found.hit
            if served and equaliser is not None:
                served = runner.run(equaliser.wait(who, _OWNER, start))
            if not served:
                upstream_s = upstream_median_s * float(np.exp(UPSTREAM_SIGMA * rng.standard_normal()))
                runner.run(clock.sleep_until(clock.monotonic() + upstream_s))
            took = clock.monotonic() - start
            if not found.hit and equaliser is not None:
                equaliser.observe_miss(took)
            return max(took, 1e-9)

        def known() -> float:
            return ask(stored[int(rng.integers(len(stored)))], _OUTSIDER)

        def new() -> float:
            # as long as the stored ones, so that length does not tell
            nonce = " ".join(f"{int(w):05x}" for w in rng.integers(1 << 20, size=6))
            return ask(f"What is {next(fresh)} {nonce}?", _OUTSIDER)

        for _ in range(24 if equaliser is not None else 0):
            new()
        leak, model = timing_leak(known, new, probes, rng)
        owner = [ask(stored[i % len(stored)], _OWNER) for i in range(20)]
        if equaliser is None and cache.embedder is not None:
            leak = replace(leak, **_learnt(cache, model, ask))
    return TimingResult(leak, float(np.median(owner)))


def _learnt(cache: SemanticCache, model: LatencyModel, ask: Callable[[str, str], float]) -> dict[str, Any]:
    """How near six timed questions come to the threshold: wordings at growing distance from a stored one."""
    assert cache.embedder is not None
    base = shipped_questions()[0].question
    words = base.rstrip("?").split()
    fillers = _FILLERS.split()
    probes = [" ".join([*words, *fillers[:k]]) for k in range(len(fillers) + 1)]
    probes += [" ".join([*words[:-j], *fillers[:k]]) for j in (1, 2) for k in range(6)]
    probes = [p for p in dict.fromkeys(probes) if p != base]
    vectors = cache.embedder.embed([base, *probes])
    near = (vectors[1:] @ vectors[0]).astype(np.float64)
    threshold = cache.lookup(base, namespace=Namespace(owner=_OUTSIDER)).policy.threshold
    found, queries = learn_threshold(near, lambda i: ask(probes[i], _OUTSIDER), model)
    return {"threshold_error": abs(found - threshold), "threshold_queries": queries}
