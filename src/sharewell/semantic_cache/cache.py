"""The engine: looks up, stores, forgets, and asks the policies at every turn (arXiv 2510.26835)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from ..models import Embedder
from .answering import Answering, default_defences_of
from .base import Defence, Entry, Query, Verdict
from .calibration import Calibration, Judged, calibrations, lower_bound
from .categories import Classification, default_classifier
from .figures import EVERYTHING, by_category
from .lookup import Lookup
from .namespace import Namespace, Request
from .policy import DEFAULT, CategoryPolicy
from .store import StoreError

LEAST_JUDGED, LOOKED_OFTEN = 20, 0.999


class SemanticCache(Answering):
    """Answers that were given before: to the same request, and to the same question in other words.

    ``embedder`` None leaves the exact tier only. ``defences`` None takes :func:`default_defences`; give
    a list of your own to replace them. ``path`` None keeps everything in memory. Several
    processes may open one file. Faults of embedder or file make misses, never exceptions, once the cache is
    open. Safe to use from many threads.

    Raises ValueError for bad policies or settings, CacheVersionError for a file of another embedder (unless
    ``reembed``: then its texts are embedded again).
    """

    # Storing

    def put(
        self,
        request: Request | str,
        response: str,
        *,
        namespace: Namespace | None = None,
        cost_s: float = 0.0,
        answer_text: str = "",
        semantic: bool = True,
        curated: bool = False,
        meta: Mapping[str, Any] | None = None,
        looked: Lookup | None = None,
    ) -> int:
        """Store a complete answer; its id, or 0 when it is not stored (off, too long, no file).

        ``cost_s``: what the answer took; ``looked``: the miss, so that nothing is computed twice;
        ``semantic=False``: for the exact tier only; ``curated``: shared by all in categories of scope
        "global" (whose other answers stay within their tenant). Never give an answer that a fault cut off.
        """
        request = Request(request) if isinstance(request, str) else request
        namespace = namespace or Namespace()
        embedding = looked.embedding if looked is not None else None
        if looked is not None:
            category, policy = looked.category, looked.policy
        else:
            found = self._classified(request.text, None)
            if self.embedder is not None and semantic:
                embedding, _ = self._embed(request.text)
                found = found or self._classified(request.text, embedding)
            found = found or Classification(DEFAULT)
            category, policy = found.category, self._policy(found)
        if category not in self.policies:
            category = DEFAULT
        self.switch.answered(category, cost_s)
        size = len(response.encode("utf-8", "replace"))
        if not policy.enabled or size > self.settings.max_response_bytes:
            return 0
        if len(answer_text or response) < self.settings.min_response_chars:
            return 0
        scope = policy.scope if policy.scope != "global" or curated else "tenant"
        now = self.clock.unix()
        entry = Entry(
            0, namespace.partition(scope), namespace.owner, category, request.text,
            embedding if semantic and policy.semantic else None, response, now, None, answer_text, meta or {},
        )  # fmt: skip
        life_s = policy.ttl_s * (1.0 if policy.strict else 1 + policy.load_beta)
        key = request.key(entry.partition)
        return self.documents.add(self._admitted(entry, policy), key, life_s, cost_s)

    def _admitted(self, entry: Entry, policy: CategoryPolicy) -> Entry:
        """``entry`` with the defences' crops, or without its embedding when one of them refuses it."""
        if entry.embedding is None or self.embedder is None:
            return entry
        context, crops = self._context(policy, entry.created, 1.0, policy.threshold), []

        def ask(defence: Defence) -> Verdict:
            verdict = defence.admit(entry, context)
            if verdict.crops is not None:
                crops.append(np.asarray(verdict.crops, np.float32).reshape(-1, self.index.dim))
            return verdict

        if self._refusal(entry.category, ask):
            return replace(entry, embedding=None)
        return replace(entry, crops=np.concatenate(crops) if crops else None)

    # Looking after it

    def maintain(self, *, force: bool = False) -> None:
        """Fetch what other processes wrote, remove what is over, write counters; at most every ``poll_s``.
        The lookups call it; call it yourself where there are none."""
        self.documents.maintain(force=force)

    def attach(self, embedder: Embedder) -> None:
        """Turn the semantic tier on in a cache that was opened without an embedder.

        Raises CacheVersionError for a file of another embedder.
        """
        if self.embedder is not None:
            raise ValueError("the cache has an embedder already")
        self.documents.attach(embedder)
        if self._own_classifier:
            self.classifier = default_classifier(embedder)
        if self._own_defences:
            self.defences = default_defences_of(embedder)
        self.embedder = embedder

    @property
    def fault(self) -> str:
        """What is wrong with the file, "" when nothing is."""
        return self.documents.fault

    def invalidate(
        self,
        *,
        text: str | None = None,
        similar: float | None = None,
        namespace: Namespace | None = None,
        owner: str | None = None,
        category: str | None = None,
        older_than_s: float | None = None,
        key: bytes | None = None,
    ) -> int:
        """Remove every entry that meets all conditions given; how many. ``similar``: also entries within this
        cosine of ``text``. Other processes stop serving them at once, since every hit reads its row.

        Raises ValueError without a condition, or for ``similar`` without text and embedder; StoreError.
        """
        conditions = (text, namespace, owner, category, older_than_s, key)
        if all(c is None for c in conditions):
            raise ValueError("give at least one of text, namespace, owner, category, older_than_s and key")
        if similar is not None and (text is None or self.embedder is None or not 0 < similar <= 1):
            raise ValueError(
                f"similar must be a cosine in (0, 1], with a text and an embedder; got {similar}"
            )
        store = self.documents.store
        if store is None:
            raise StoreError(self.fault or "the cache is closed")
        before = None if older_than_s is None else self.clock.unix() - older_than_s
        partitions = namespace.visible() if namespace else None
        wanted = store.matching(
            text=None if similar is not None else text, partitions=partitions, owner=owner, category=category,
            created_before=before, key=key,
        )  # fmt: skip
        if similar is not None and text is not None:
            vector, why = self._embed(text)
            if vector is None:
                raise ValueError(f"text cannot be compared: {why}")
            rows = [r for r in store.some(wanted) if r[4]]
            wanted = [r[0] for r in rows if float(np.frombuffer(r[4] or b"", np.float32) @ vector) >= similar]
        return self.documents.remove(wanted)

    # Calibration

    def judge(self, looked: Lookup, right: bool) -> None:
        """Say whether a semantic hit (or the nearest candidate of a miss) was right: what
        :meth:`recalibrate` goes by."""
        self.figures.add(looked.category, "judged")
        if not right:
            self.figures.add(looked.category, "wrong")
        judged = Judged(looked.category, looked.similarity, right)
        self.documents.attempt("write", lambda store: store.judge([judged]))

    def calibrate(
        self, pairs: Iterable[tuple[str, str, bool]], *, category: str | None = None, apply: bool = True
    ) -> dict[str, Calibration]:
        """Thresholds from pairs (question, cached question, same answer?): what the defences let through
        counts.

        The pairs should be what traffic brings: for each question its nearest stored one. A category that
        cannot be certified is set to exact-only. Raises ValueError without an embedder or pairs.
        """
        given = list(pairs)
        if self.embedder is None or not given:
            raise ValueError("pairs must not be empty, and the cache needs an embedder")
        judged = []
        for question, cached, same in given:
            a, b = self.embedder.embed([question, cached])
            found = self._classified(question, a) or Classification(DEFAULT)
            name = category or found.category
            query = Query(question, "", "", name, a)
            entry = Entry(0, "", "", name, cached, b, "", self.clock.unix())
            context = self._context(self.policies[DEFAULT], self.clock.unix(), float(a @ b), 0.0)
            if not self._refusal(name, lambda d, q=query, e=entry, c=context: d.accept(q, e, c)):
                judged.append(Judged(name, float(a @ b), bool(same)))
        return self._apply(judged, apply)

    def recalibrate(self) -> dict[str, Calibration]:
        """Thresholds from what was judged while serving."""
        if self.documents.store is None:
            raise StoreError(self.fault or "the cache is closed")
        return self._apply(self.documents.store.judged(), True)

    def follow(self, category: str) -> Calibration | None:
        """Move one category's threshold by what was judged while serving, by the rule of :meth:`recalibrate`;
        what holds now, or None when it stays.

        Where there is too little to certify anything, nothing moves, unless hits at the present threshold
        are known to be wrong too often (lower bound at 99.9 %, since it is asked again and again): then the
        category falls back to its exact tier.
        """
        policy, store = self.policies.get(category), self.documents.store
        if policy is None or store is None or not policy.semantic:
            return None
        try:
            judged = [j for j in store.judged() if j.category == category]
        except StoreError as error:
            self.documents.failed("read", error)
            return None
        result = calibrations(judged, {category: policy.max_wrong}, seed=self.settings.seed).get(category)
        served = [j for j in judged if j.similarity >= policy.threshold]
        if result is None or result.threshold == policy.threshold:
            return None
        if result.threshold is None and (
            len(served) < LEAST_JUDGED
            or lower_bound(sum(not j.right for j in served), len(served), LOOKED_OFTEN) <= policy.max_wrong
        ):
            return None
        return self._apply(judged, True)[category]

    def _apply(self, judged: list[Judged], apply: bool) -> dict[str, Calibration]:
        wanted = {name: policy.max_wrong for name, policy in self.policies.items()}
        found = calibrations(judged, wanted, seed=self.settings.seed)
        for name, result in found.items() if apply else ():
            policy = self.policies[name]
            new = policy.calibrated(result.threshold, result.floor)
            self.policies[name] = new
            self.documents.attempt("write", lambda store, n=name, p=new: store.save_policy(n, p))
        return found

    # Convenience

    def get_or_call(
        self,
        request: Request | str,
        call: Callable[[], str],
        *,
        namespace: Namespace | None = None,
        semantic: bool = True,
        same: Callable[[str, str], bool] | None = None,
    ) -> Lookup:
        """The cached answer, or what ``call()`` returns, stored; a Lookup either way, with the answer in
        ``response``. Equal questions that come at once share one call. ``same`` judges the share of the hits
        that is re-answered. What ``call`` raises goes through, and nothing is stored.
        """
        request = Request(request) if isinstance(request, str) else request
        namespace = namespace or Namespace()
        found = self.lookup(request, namespace=namespace, semantic=semantic)
        if found.hit:
            recheck = found.tier == "semantic" and same is not None
            if recheck and self._rng.random() < self.settings.recheck_share and same is not None:
                self.judge(found, same(found.response, call()))
            return found
        flight = (namespace, request)
        waiting = self.flight.board(flight)
        if waiting is not None:
            shared = waiting.result()
            if shared is not None:
                return replace(found, response=shared)
            return replace(found, response=call())
        answer: str | None = None
        try:
            start = self.clock.monotonic()
            answer = call()
            took_s = self.clock.monotonic() - start
            self.put(request, answer, namespace=namespace, cost_s=took_s, semantic=semantic, looked=found)
        finally:
            self.flight.land(flight, answer)
        return replace(found, response=answer)

    def set_load(self, model: str, value: float) -> None:
        """How busy a model is, in [0, 1] (see :func:`load_of`)."""
        self.load.set(model, value)

    def recall(self) -> tuple[float | None, int]:
        """(share of the true neighbours that the graphs found, neighbours looked at); None before any."""
        checked, found = self._recall
        return (found / checked if checked else None), checked

    def report(self) -> dict[str, Any]:
        """Figures of all processes that use the file, per category, as JSON values."""
        self.maintain(force=True)
        counters, held = self.figures.totals(), {}
        store = self.documents.store
        if store is not None:
            try:
                counters, held = store.counters(), store.held()
            except StoreError as error:
                self.documents.failed("read", error)
        table = by_category(counters, held, self.policies)
        for name, row in table.items():
            state = self.switch.state(name)
            row["break_even"] = state.needed
            row["switched_off"] = state.bypassed
        recall, checked = self.recall()
        return {
            "entries": sum(held.values()),
            "capacity": self.settings.capacity,
            "categories": table,
            "recall": recall,
            "recall_checked": checked,
            "shared_flights": self.flight.shared,
            "errors": {name: int(v) for (c, name), v in counters.items() if c == EVERYTHING},
            "fault": self.fault,
        }

    def close(self) -> None:
        """Write what is pending and close the file."""
        self.documents.close()

    def __enter__(self) -> SemanticCache:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
