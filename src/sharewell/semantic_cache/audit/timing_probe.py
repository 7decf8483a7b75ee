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
_FILLERS = ("please", "now", "exactly", "today", "maybe", "always", "garden", "window", "paper", "stone")
_OWNER, _OUTSIDER = "sharewell-audit-owner", "sharewell-audit-outsider"
LADDER = 50  # questions that the bisection chooses from
_LOWEST = 0.5  # no threshold in use is below


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
    """Half the ``probes`` reword a question that another user stored, half are new, in random order.

    Rewordings and not repetitions, because a repetition is found without embedding it: its time says little
    about that of a semantic hit, by which the threshold is learnt. A question of which no rewording is served
    is repeated. A miss waits for a modelled answer: log-normal, median ``upstream_median_s``, sigma 0.35. The
    cache, which is written to, must be a copy. Raises ValueError for fewer than 4 probes.
    """
    rng = np.random.default_rng([seed, 77])
    questions = shipped_questions()
    stored = [q.question for q in questions[:8]]
    for text in stored:
        cache.put(text, "an answer", namespace=Namespace(owner=_OWNER))
    reworded = [_reworded(cache, text) for text in stored]
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
            return ask(reworded[int(rng.integers(len(reworded)))], _OUTSIDER)

        def new() -> float:
            # as long as the stored ones, so that length does not tell
            nonce = " ".join(f"{int(w):05x}" for w in rng.integers(1 << 20, size=6))
            return ask(f"What is {next(fresh)} {nonce}?", _OUTSIDER)

        for _ in range(24 if equaliser is not None else 0):
            new()
        leak, model = timing_leak(known, new, probes, rng)
        owner = [ask(reworded[i % len(reworded)], _OWNER) for i in range(20)]
        # the longest gives the most steps
        base = max((a for a, b in zip(stored, reworded, strict=True) if a != b), key=len, default=None)
        if equaliser is None and base is not None:
            leak = replace(leak, **_learnt(cache, base, model, ask))
    return TimingResult(leak, float(np.median(owner)))


def _reworded(cache: SemanticCache, text: str) -> str:
    """``text`` with a change that no embedder minds, which the outsider is served; ``text`` when there is
    none."""
    start = text.rstrip("?")
    for changed in (f"{start}, please?", f"{text} Thanks.", start, text.lower()):
        if cache.lookup(changed, namespace=Namespace(owner=_OUTSIDER)).tier == "semantic":
            return changed
    return text


def _ladder(base: str) -> list[str]:
    """Texts at growing distance from ``base``: words left out at one end, other words added at the other."""
    words = base.rstrip("?").split()
    made = []
    for left_out in range(max(1, len(words) - 2)):
        kept = words[: len(words) - left_out], words[left_out:]
        for first in range(0, len(_FILLERS), 2):
            for added in range(4):
                more = _FILLERS[first : first + added]
                made += [" ".join([*kept[0], *more]), " ".join([*more, *kept[1]])]
    return [text for text in dict.fromkeys(made) if text != base]


def _learnt(
    cache: SemanticCache, base: str, model: LatencyModel, ask: Callable[[str, str], float]
) -> dict[str, Any]:
    """How near the timed questions come to the threshold of ``base``.

    The attacker knows the embedder, so he chooses :data:`LADDER` questions with similarities as even as can
    be and bisects them: the logarithm of their number, rounded up, is how many he asks.
    """
    assert cache.embedder is not None
    texts = _ladder(base)
    vectors = cache.embedder.embed([base, *texts])
    near = (vectors[1:] @ vectors[0]).astype(np.float64)
    steps = np.linspace(_LOWEST, 1.0, LADDER)
    chosen = sorted({int(np.abs(near - step).argmin()) for step in steps})
    threshold = cache.lookup(base, namespace=Namespace(owner=_OUTSIDER)).policy.threshold
    found, queries = learn_threshold(near[chosen], lambda i: ask(texts[chosen[i]], _OUTSIDER), model)
    return {"threshold_error": abs(found - threshold), "threshold_queries": queries}
