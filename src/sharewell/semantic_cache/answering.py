"""The way of a question: exact tier, category, vector, neighbours, defences (arXiv 2510.26835)."""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..models import Embedder
from ..simulation import Clock, WallClock
from .base import Context, Defence, Entry, Query, Verdict
from .breakeven import BreakEvenSwitch
from .categories import Classification, Classifier, default_classifier
from .documents import Documents
from .figures import EVERYTHING, Figures
from .flight import SingleFlight
from .index import Found
from .load import LoadGauge
from .lookup import Lookup
from .namespace import Namespace, Request
from .policy import DEFAULT, DEFAULT_POLICIES, CategoryPolicy, checked_policies
from .settings import CacheSettings

log = logging.getLogger(__name__)


def default_defences_of(embedder: Embedder | None) -> tuple[Defence, ...]:
    """See :func:`.defences.default_defences`."""
    from .defences import default_defences  # built on this module's neighbours

    return tuple(default_defences(embedder))


class Answering:
    """What looks up; :class:`SemanticCache` is this and what stores. See there for the arguments."""

    def __init__(
        self,
        path: Path | str | None = None,
        embedder: Embedder | None = None,
        policies: Mapping[str, CategoryPolicy] = DEFAULT_POLICIES,
        classifier: Classifier | None = None,
        *,
        defences: Sequence[Defence] | None = None,
        settings: CacheSettings | None = None,
        clock: Clock | None = None,
        reembed: bool = False,
    ) -> None:
        self.settings = settings or CacheSettings()
        self.clock: Clock = clock or WallClock()
        self.embedder = embedder
        self.policies = checked_policies(policies)
        self._own_defences = defences is None
        self.defences: tuple[Defence, ...] = (
            default_defences_of(embedder) if defences is None else tuple(defences)
        )
        self._own_classifier = classifier is None
        self.classifier: Classifier = classifier or default_classifier(embedder)
        self.figures, self.flight = Figures(), SingleFlight()
        self.load = LoadGauge(self.clock)
        self._rng = random.Random(self.settings.seed)
        self.switch = BreakEvenSwitch(self._rng)
        self.path = None if path is None else Path(path)
        self.documents = Documents(
            self.path, embedder, self.policies, self.settings, self.clock, self.figures, reembed=reembed
        )
        self.index = self.documents.index
        self._recall = [0, 0]
        self._lock = threading.Lock()

    # Looking up

    def lookup(
        self,
        request: Request | str,
        *,
        namespace: Namespace | None = None,
        semantic: bool = True,
        max_age_s: float | None = None,
    ) -> Lookup:
        """The answer to ``request`` within ``namespace``, or a miss. ``semantic=False``: the exact tier only;
        ``max_age_s``: no older answers (as of the Cache-Control header)."""
        request = Request(request) if isinstance(request, str) else request
        namespace = namespace or Namespace()
        self.documents.maintain()
        found = self._classified(request.text, None)
        policy = self._policy(found) if found else self.policies[DEFAULT]
        if found and not policy.enabled:
            self.figures.add(found.category, "bypassed")
            return Lookup("bypass", "the category is switched off", found.category, policy)
        hit = self._exact(request, namespace, max_age_s)
        if hit is not None:
            return hit
        category = found.category if found else DEFAULT
        if not semantic or self.embedder is None or not self._worth_embedding(found):
            self.figures.add(category, "misses")
            return Lookup("miss", "not in the exact tier", category, policy)
        start = self.clock.monotonic()
        embedding, why = self._embed(request.text)
        embedded = self.clock.monotonic()
        if embedding is None:
            self.figures.add(category, "misses")
            return Lookup("miss", why, category, policy, timings={"embed_s": embedded - start})
        if found is None:
            found = self._classified(request.text, embedding) or Classification(DEFAULT)
            policy = self._policy(found)
        return self._near(request, namespace, found.category, policy, embedding, max_age_s, start, embedded)

    def _near(
        self, request: Request, namespace: Namespace, category: str, policy: CategoryPolicy,
        embedding: NDArray[np.float32], max_age_s: float | None, start: float, embedded: float,
    ) -> Lookup:  # fmt: skip
        load = self.load.get(namespace.model)
        threshold, ttl_s = policy.threshold_at(load), policy.ttl_at(load)
        if not policy.enabled:
            return Lookup("bypass", "the category is switched off", category, policy, embedding=embedding)
        # at a threshold of 1 only the very same text may answer; that is the exact tier
        if not policy.semantic or threshold >= 1 or self.switch.bypass(category):
            self.figures.add(category, "misses")
            return Lookup("miss", "exact tier only", category, policy, embedding=embedding)
        partitions = self._partitions(namespace, policy)
        found = self.index.near(partitions, category, embedding, self.settings.neighbours)
        self._watch_recall(partitions, category, embedding, found)
        searched = self.clock.monotonic()
        query = Query(request.text, partitions[0], namespace.owner, category, embedding)
        reason = "nothing near" if not found or found[0].similarity < threshold else ""
        hit: Lookup | None = None
        for one in found:
            if one.similarity < threshold:
                break
            hit, reason = self._candidate(query, one, policy, partitions, threshold, ttl_s, max_age_s)
            if hit is not None:
                break
        done = self.clock.monotonic()
        timings = {"embed_s": embedded - start, "search_s": searched - embedded, "fetch_s": done - searched}
        self.switch.looked(category, hit is not None, searched - start, (done - searched) if hit else 0.0)
        if hit is not None:
            return replace(hit, timings=timings, embedding=embedding)
        self.figures.add(category, "misses")
        nearest = found[0].similarity if found else 0.0
        return Lookup(
            "miss", reason, category, policy, similarity=nearest, timings=timings, embedding=embedding
        )

    def _candidate(
        self, query: Query, one: Found, policy: CategoryPolicy, partitions: Sequence[str], threshold: float,
        ttl_s: float, max_age_s: float | None,
    ) -> tuple[Lookup | None, str]:  # fmt: skip
        now = self.clock.unix()
        age_s = max(0.0, now - one.created)
        if age_s > ttl_s or (max_age_s is not None and age_s > max_age_s):
            return None, "too old"
        row = self.documents.row(one.id)
        # the file is the truth: another process may have removed it, or it was another namespace's
        if row is None or row[0].partition not in partitions or row[0].category != query.category:
            return None, "gone"
        entry, expires, cost_s = row
        if policy.scope == "user" and entry.owner != query.owner:
            return None, "of another owner"
        if now >= expires and now >= entry.created:
            return None, "too old"
        context = self._context(policy, now, one.similarity, threshold)
        refused = self._refusal(query.category, lambda defence: defence.accept(query, entry, context))
        if refused:
            return None, refused
        return self._hit("semantic", entry, policy, one.similarity, age_s, cost_s), "near enough"

    def _exact(self, request: Request, namespace: Namespace, max_age_s: float | None) -> Lookup | None:
        for partition in namespace.visible():
            entry_id = self.index.exact(request.key(partition))
            row = self.documents.row(entry_id)
            if row is None:
                continue
            entry, expires, cost_s = row
            now, policy = self.clock.unix(), self.policies.get(row[0].category, self.policies[DEFAULT])
            age_s = max(0.0, now - entry.created)
            ttl_s = policy.ttl_at(self.load.get(namespace.model))
            fresh = age_s <= ttl_s and (now < expires or now < entry.created)
            young = max_age_s is None or age_s <= max_age_s
            if entry.partition == partition and fresh and young:
                return self._hit("exact", entry, policy, 1.0, age_s, cost_s)
        return None

    def _hit(
        self, tier: str, entry: Entry, policy: CategoryPolicy, similarity: float, age_s: float, cost_s: float
    ) -> Lookup:
        self.documents.touch(entry.id)
        self.figures.add(entry.category, f"{tier}_hits")
        self.figures.add(entry.category, "saved_s", cost_s)
        return Lookup(
            "hit", tier, entry.category, policy, tier, entry.response, similarity, age_s, entry.id,
            entry.text, entry.meta, cost_s,
        )  # fmt: skip

    def _refusal(self, category: str, ask: Callable[[Defence], Verdict]) -> str:
        """The first refusal in words, "" when every defence agrees. An exception is a refusal."""
        for defence in self.defences:
            try:
                verdict = ask(defence)
            except Exception as error:  # fail closed, whatever a plug-in raises
                log.warning("defence %s failed: %s", defence.name, error)
                self.figures.add(EVERYTHING, f"defence_errors:{defence.name}")
                return f"{defence.name} failed"
            if not verdict.ok:
                self.figures.add(category, f"refused:{defence.name}")
                return f"refused by {defence.name}" + (f": {verdict.reason}" if verdict.reason else "")
        return ""

    def _context(self, policy: CategoryPolicy, now: float, similarity: float, threshold: float) -> Context:
        embedder = self.embedder
        assert embedder is not None
        return Context(embedder.embed, policy, now, similarity, threshold)

    def _partitions(self, namespace: Namespace, policy: CategoryPolicy) -> tuple[str, ...]:
        own = namespace.partition("tenant" if policy.scope == "global" else policy.scope)
        return (own, namespace.partition("global")) if policy.scope == "global" else (own,)

    def _classified(self, text: str, embedding: NDArray[np.float32] | None) -> Classification | None:
        try:
            return self.classifier(text, embedding)
        except Exception as error:  # a classifier of the caller's must not stop requests
            log.warning("the classifier failed: %s", error)
            self.figures.add(EVERYTHING, "classifier_errors")
            return Classification(DEFAULT)

    def _policy(self, found: Classification) -> CategoryPolicy:
        policy = self.policies.get(found.category, self.policies[DEFAULT])
        if found.runner_up is None or found.runner_up not in self.policies:
            return policy
        return policy.stricter(self.policies[found.runner_up])

    def _worth_embedding(self, found: Classification | None) -> bool:
        """False when no category that this could be has its semantic tier on."""
        names = [found.category] if found else list(self.policies)
        on = [
            n for n in names if (p := self.policies.get(n)) and p.enabled and p.semantic and p.threshold < 1
        ]
        if not on:
            return False
        return not all(self.switch.bypassed(n) for n in on) or self._rng.random() < 0.01

    def _embed(self, text: str) -> tuple[NDArray[np.float32] | None, str]:
        assert self.embedder is not None
        try:
            # every token has a character at least
            if len(text) >= self.embedder.max_tokens:
                if self.embedder.count_tokens([text])[0] > self.embedder.max_tokens:
                    return None, "too long to be embedded whole"
            vector = np.asarray(self.embedder.embed([text])[0], np.float32)
            if vector.shape != (self.embedder.dim,) or not np.isfinite(vector).all():
                raise ValueError(
                    f"the embedder gave {vector.shape}, not ({self.embedder.dim},) finite numbers"
                )
            return vector, ""
        except Exception as error:  # an embedder may be a remote service: anything can happen
            log.warning("the embedder failed: %s", error)
            self.figures.add(EVERYTHING, "embedder_errors")
            return None, "the embedder failed"

    def _watch_recall(
        self, partitions: Sequence[str], category: str, embedding: NDArray[np.float32], found: list[Found]
    ) -> None:
        graph = any(self.index.is_graph(p, category) for p in partitions)
        if not graph or self._rng.random() >= self.settings.recall_share:
            return
        truth = {
            f.id
            for f in self.index.near(partitions, category, embedding, self.settings.neighbours, exact=True)
        }
        with self._lock:
            self._recall[0] += len(truth)
            self._recall[1] += len(truth & {f.id for f in found})
