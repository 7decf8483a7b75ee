"""Replaying questions with known truth: through the real cache, and through a quick model of it for grids."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from benchmarks.semantic_cache.questions import CATEGORIES, SHARES, Request, examples
from sharewell.bench import Progress
from sharewell.models import Embedder
from sharewell.semantic_cache import (
    CacheSettings,
    Calibration,
    Cascade,
    CategoryPolicy,
    CentroidClassifier,
    Context,
    Defence,
    Entry,
    Judged,
    RuleClassifier,
    SemanticCache,
    SlotVerifier,
    upper_bound,
)
from sharewell.semantic_cache.calibration import calibrations
from sharewell.semantic_cache.slots import disagreement
from sharewell.simulation import VirtualClock

DAY_S = 86_400.0
TTL_S = {"code": 30 * DAY_S, "reference": 7 * DAY_S, "chat": DAY_S, "live": 60.0, "sensitive": DAY_S}
LEAST_HITS = 100
ALLOWED = 0.02  # wrong hits
ROUNDS = 4


class Remembered:
    """An embedder that computes every text once, in batches, beforehand."""

    def __init__(self, embedder: Embedder) -> None:
        self._inner, self._known = embedder, dict[str, np.ndarray]()
        self.id, self.dim, self.max_tokens = embedder.id, embedder.dim, embedder.max_tokens

    def learn(self, texts: Sequence[str], progress: Progress) -> None:
        new = [t for t in dict.fromkeys(texts) if t not in self._known]
        for first in range(0, len(new), 256):
            part = new[first : first + 256]
            self._known.update(zip(part, self._inner.embed(part), strict=True))
            progress("embedding questions", min(first + 256, len(new)), len(new))

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        self.learn(texts, lambda *_: None)
        return np.stack([self._known[t] for t in texts])

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        return self._inner.count_tokens(texts)

    def decode(self, ids: Sequence[int]) -> str:
        return self._inner.decode(ids)


@dataclass
class Outcome:
    """Counts of one category or of all. ``wrong``: semantic hits of another intent; ``stale``: hits (of any
    tier) whose answer had changed meanwhile."""

    asked: int = 0
    exact: int = 0
    semantic: int = 0
    wrong: int = 0
    stale: int = 0

    @property
    def hits(self) -> int:
        return self.exact + self.semantic

    @property
    def wrong_share(self) -> float:
        return self.wrong / max(1, self.semantic)

    @property
    def untrue_share(self) -> float:
        """Of all hits, those whose answer was not true when it was given."""
        return (self.wrong + self.stale) / max(1, self.hits)

    def __add__(self, other: Outcome) -> Outcome:
        return Outcome(*(getattr(self, f) + getattr(other, f) for f in self.__dataclass_fields__))


@dataclass
class Replayed:
    by_category: dict[str, Outcome]
    decisions: list[tuple[str, str]] = field(default_factory=list)  # (true category, tier or "")

    @property
    def all(self) -> Outcome:
        total = Outcome()
        for outcome in self.by_category.values():
            total = total + outcome
        return total


def policies(
    thresholds: Mapping[str, float | None], floors: Mapping[str, float | None] | None = None
) -> dict[str, CategoryPolicy]:
    """The categories' policies with calibrated thresholds; None is exact only. What is unclear is exact
    only. With ``floors`` load may push the thresholds down to these, and double the lifetimes."""
    out = {}
    for name in CATEGORIES:
        strict = name in ("live", "sensitive")
        load = 0.0 if strict or floors is None else 1.0
        policy = CategoryPolicy(
            ttl_s=TTL_S[name], quota=SHARES[name] * 0.9, strict=strict, load_delta=load * 0.01, load_beta=load
        )
        out[name] = policy.calibrated(thresholds.get(name), None if floors is None else floors.get(name))
    return out | {"default": CategoryPolicy(quota=0.1, strict=True, semantic=False)}


def classifier(embedder: Remembered) -> Cascade:
    """As shipped: the rules, then the nearest centroid, of 50 examples a category of the calibration half."""
    examples_of = {name: examples(name, 50) for name in CATEGORIES}
    return Cascade(RuleClassifier(), CentroidClassifier(embedder, examples_of))


def replay(
    requests: Sequence[Request],
    embedder: Remembered,
    rules: Mapping[str, CategoryPolicy],
    classify: Callable,
    progress: Progress,
    *,
    defences: Sequence[Defence] | None = None,
    always_store: bool = False,
    judged: list[Judged] | None = None,
    each: Callable[[SemanticCache, Request, bool], None] | None = None,
    name: str = "replay",
) -> Replayed:
    """Every request through the engine; a miss is answered rightly and stored."""
    clock = VirtualClock()
    settings = CacheSettings(background=False, poll_s=60.0)
    out = Replayed({c: Outcome() for c in CATEGORIES})
    with SemanticCache(
        None,
        embedder,
        rules,
        classify,
        defences=[SlotVerifier()] if defences is None else defences,
        settings=settings,
        clock=clock,
    ) as cache:
        for i, request in enumerate(requests):
            clock.advance(max(0.0, request.at_s - clock.monotonic()))
            found = cache.lookup(request.text)
            count = out.by_category[request.category]
            count.asked += 1
            out.decisions.append((request.category, found.tier))
            if found.hit:
                right = found.meta["intent"] == request.intent
                count.exact += found.tier == "exact"
                count.semantic += found.tier == "semantic"
                count.wrong += found.tier == "semantic" and not right
                count.stale += right and found.meta["truth"] != request.truth
                if judged is not None and found.tier == "semantic":
                    judged.append(Judged(found.category, found.similarity, right))
            if each is not None:
                each(cache, request, found.hit)
            if not found.hit or always_store:
                meta = {"intent": request.intent, "truth": request.truth}
                cache.put(request.text, request.truth, meta=meta, looked=found)
            if i % 500 == 0:
                progress(name, i, len(requests))
    return out


class Model:
    """The same decisions without the engine, for one threshold and lifetime over everything: fast enough for
    a grid. Neighbours within 0.5 of every text are found once, by matrix products."""

    def __init__(self, requests: Sequence[Request], embedder: Remembered, *, verifier: bool) -> None:
        self.requests, self.verifier = requests, verifier
        self.texts = list(dict.fromkeys(r.text for r in requests))
        self.row = {t: i for i, t in enumerate(self.texts)}
        vectors = embedder.embed(self.texts)
        self.near: list[list[tuple[float, int]]] = []
        for first in range(0, len(self.texts), 512):
            scores = vectors[first : first + 512] @ vectors.T
            for i, row in enumerate(scores):
                ids = np.flatnonzero(row >= 0.6)
                order = ids[np.argsort(-row[ids])][:200]
                self.near.append([(float(row[j]), int(j)) for j in order if j != first + i])
        self._agree: dict[tuple[int, int], bool] = {}

        self._custom = _customary(self.texts)

    def agrees(self, a: int, b: int) -> bool:
        if not self.verifier:
            return True
        pair = (min(a, b), max(a, b))
        if pair not in self._agree:
            self._agree[pair] = not disagreement(self.texts[a], self.texts[b], self._custom)
        return self._agree[pair]

    def run(self, threshold: float, ttl_s: float, only: str | None = None) -> Outcome:
        """Outcome of all requests, or of one category by itself."""
        stored: dict[int, Request] = {}
        out = Outcome()
        for request in self.requests:
            if only is not None and request.category != only:
                continue
            out.asked += 1
            mine = self.row[request.text]
            held = stored.get(mine)
            if held is not None and request.at_s - held.at_s <= ttl_s:
                out.exact += 1
                out.stale += held.truth != request.truth
                continue
            checked, hit = 0, None
            for similarity, other in self.near[mine]:
                if similarity < threshold or checked == 4:
                    break
                held = stored.get(other)
                if held is None:
                    continue
                checked += 1
                if request.at_s - held.at_s <= ttl_s and self.agrees(mine, other):
                    hit = held
                    break
            if hit is None:
                stored[mine] = request
                continue
            out.semantic += 1
            out.wrong += hit.intent != request.intent
            out.stale += hit.intent == request.intent and hit.truth != request.truth
        return out

    def best(
        self, allowed: float, ttls: Sequence[float], only: str | None = None, *, aged: bool = False
    ) -> tuple[float, float, Outcome]:
        """(threshold, ttl, outcome) with the most hits at a wrong share of at most ``allowed``; threshold 1
        when none keeps it. With ``aged`` outdated answers count as wrong, as a share of all hits."""
        found = [(1.0, ttls[-1], self.run(1.01, ttls[-1], only))]
        for threshold in np.arange(0.7, 1.0, 0.02):
            for ttl_s in ttls:
                outcome = self.run(float(threshold), ttl_s, only)
                wrong = outcome.untrue_share if aged else outcome.wrong_share
                if wrong <= allowed:
                    found.append((float(threshold), ttl_s, outcome))
        return max(found, key=lambda f: f[2].hits)


def _customary(texts: Sequence[str]) -> frozenset[str]:
    """Names that the verifier takes as read when all texts are of one category, as the baseline's are."""
    verifier = SlotVerifier()
    context = Context(lambda _: np.empty((0, 0), np.float32), CategoryPolicy(), 0.0)
    for text in texts:
        verifier.admit(Entry(0, "", "", "any", text, None, "", 0.0), context)
    return verifier.taken_as_read("", "any")


def calibrated(
    requests: Sequence[Request],
    embedder: Remembered,
    classify: Callable,
    progress: Progress,
    *,
    verifier: bool,
    max_wrong: float = ALLOWED,
    seed: int = 0,
) -> tuple[dict[str, float | None], dict[str, Calibration]]:
    """Thresholds of each category from the calibration half, and what they rest on.

    What is stored depends on the thresholds: the more is answered, the less is stored, and a question whose
    own answer was never stored meets another's. So a first round proposes thresholds from everything stored,
    and the certificate comes from a replay under the very thresholds it is for, raised until it holds. Each
    of these rounds gets its share of the 5 % that a certificate may fail.
    """
    defences: list[Defence] = [SlotVerifier()] if verifier else []
    rules = {n: replace(p, threshold=0.6, semantic=True) for n, p in policies({}).items()}
    rules["default"] = replace(rules["default"], semantic=False)
    limits: dict[str, float] = dict.fromkeys(CATEGORIES, max_wrong)
    found: dict[str, Calibration] = {}
    floors: dict[str, float] = {}
    for number in range(1 + ROUNDS):
        judged: list[Judged] = []
        replay(
            requests, embedder, rules, classify, progress, defences=defences, always_store=number == 0,
            judged=judged, name=f"calibration, round {number}",
        )  # fmt: skip
        confidence = 0.95 if number == 0 else 1 - 0.05 / ROUNDS
        raised = False
        for name, result in calibrations(judged, limits, confidence=confidence, seed=seed).items():
            if not rules[name].semantic:
                continue
            found[name], held, lowest = result, rules[name].threshold, result.threshold
            if number == 0:
                start = result.floor or lowest
                rules[name] = replace(rules[name], threshold=start or 1.0, semantic=start is not None)
                raised = True
                continue
            if result.floor is not None:
                floors[name] = min(floors.get(name, 1.0), result.floor)
            wanted = min(0.99, held + 0.05) if lowest is None else lowest
            if wanted > held + 0.006 and number < ROUNDS:
                # half way, since under a higher threshold more is stored and less goes wrong
                rules[name] = replace(rules[name], threshold=(held + wanted) / 2)
                raised = True
        if not raised:
            break
    found = {n: replace(c, floor=floors.get(n)) for n, c in found.items()}
    return {c: found[c].threshold if c in found else None for c in CATEGORIES}, found


def table(outcomes: Mapping[str, Outcome]) -> dict[str, dict[str, float]]:
    """As JSON, with the upper bound of the wrong share."""
    groups = defaultdict(Outcome, outcomes)
    return {
        name: {
            "asked": o.asked, "exact": o.exact, "semantic": o.semantic, "wrong": o.wrong, "stale": o.stale,
            "wrong_share": o.wrong_share,
            "wrong_bound": upper_bound(o.wrong, o.semantic) if o.semantic else 1.0,
        }
        for name, o in groups.items()
    }  # fmt: skip
