"""The audit: attacks a copy of a cache with harmless canaries, before and after each set of defences.

Source: "From Similarity to Vulnerability" (arXiv 2601.23088). A pair is a canary prompt and a victim
question; the attacker stores an answer to the prompt with a suffix, the victim asks the question, and the
pair counts when the canary's answer is served.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
from numpy.typing import NDArray

from ...models import Embedder
from ...simulation import Clock, WallClock
from ..base import Defence
from ..cache import SemanticCache
from ..categories import Classifier, default_classifier
from ..defences import Provenance, ScopeGuard
from ..namespace import Namespace
from ..policy import DEFAULT_POLICIES, CategoryPolicy
from ..store import DocumentStore
from .arsenal import DEFAULT_SETS, build_defences, halves
from .benign import benign_costs
from .config import AuditConfig
from .generator import Collision, CollisionSearch, Penalty
from .gradients import Proposer
from .log import AttackLog
from .outcome import AuditReport, DefenceResult, PairResult, Rate
from .penalties import ATTACKER, VICTIM, PassDefences, Perplexity, victim_words
from .refusal import AuditRefused, copy_cache
from .sources import Canary, Question, canaries, pair, shipped_questions
from .timing import TimingLeak
from .timing_probe import probe_cache

CONFIGURED = "as configured"
Progress = Callable[[str, int, int], None]


class CollisionAudit:
    """Audits ``cache``, an object of this process or a file that the caller owns, through a copy of it.

    ``embedder`` is the deployed one, on which every text is scored. ``proposer`` gives gradients (a twin:
    white box; another model: transfer) or none (``RandomProposer``: black box); ``mode`` names it in the
    report. ``log_perplexity`` maps texts to log perplexities, for ``lambda_ppl`` above 0. ``log`` keeps found
    texts, so that an audit goes on where it stopped. Raises AuditRefused for what may not be audited.
    """

    def __init__(
        self,
        cache: SemanticCache | Path,
        embedder: Embedder,
        proposer: Proposer,
        config: AuditConfig | None = None,
        *,
        mode: str = "white box",
        policies: dict[str, CategoryPolicy] | None = None,
        classifier: Classifier | None = None,
        log: AttackLog | None = None,
        log_perplexity: Callable[[Sequence[str]], NDArray[np.float64]] | None = None,
        clock: Clock | None = None,
        progress: Progress = lambda what, done, total: None,
    ) -> None:
        self.config = config or AuditConfig()
        if not isinstance(cache, SemanticCache | Path):
            raise AuditRefused(
                "only a cache object or a file may be audited (a loopback server through"
                f" loopback_cache_file()), got {type(cache).__name__}"
            )
        if isinstance(cache, SemanticCache):
            if cache.embedder is not None and cache.embedder.id != embedder.id:
                raise ValueError(f"embedder must be the cache's, {cache.embedder.id}, got {embedder.id}")
            policies, classifier = dict(cache.policies), cache.classifier
        if self.config.lambda_ppl and log_perplexity is None:
            raise ValueError("lambda_ppl above 0 needs log_perplexity")
        self.cache, self.embedder, self.proposer, self.mode = cache, embedder, proposer, mode
        self.log = AttackLog() if log is None else log
        self.clock: Clock = clock or WallClock()
        self._policies = policies
        # once, for all the copies: the default one embeds its examples
        self._classifier = classifier or default_classifier(embedder)
        self._log_perplexity, self._progress = log_perplexity, progress
        self._deadline = 0.0

    def run(
        self,
        sources: Sequence[Canary] | None = None,
        victims: Sequence[Question] | None = None,
        defences: Sequence[str] = DEFAULT_SETS,
    ) -> AuditReport:
        """Attack, defend, attack again, and report.

        ``defences`` are sets by name (see ``build_defences``), audited beside the cache's own. Raises
        ValueError for empty victims, too many pairs, unknown defences, or a victim that the cache answers
        already.
        """
        config = self.config
        sources = canaries() if sources is None else sources
        victims = shipped_questions() if victims is None else victims
        pairs = pair(sources, victims, min(config.pairs, len(victims)), config.seed)
        started = self.clock.monotonic()
        self._deadline = started + config.time_budget_s
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sharewell-audit-")))
            base = self._copy(folder)
            first = stack.enter_context(self._open(base, folder, []))
            aims = self._aims(first, pairs)
            typical = median(aims) if aims else 0.8
            sets = self._sets(defences, typical, victims)
            adapting = [name for name, chosen in sets.items() if self._adapts(chosen)]
            plain = self._attack(pairs, aims, None, 1 + len(adapting))
            results = []
            for name, chosen in sets.items():
                cache = stack.enter_context(self._open(base, folder, chosen))
                count, adaptive = self._adaptive_pairs(len(pairs)), None
                if name in adapting:
                    stages = len(adapting) - adapting.index(name)
                    adaptive = self._attack(pairs[:count], aims[:count], cache.defences, stages)
                if adaptive is None or not cache.defences:
                    adaptive = plain[:count]
                results.append(self._score(cache, name, pairs, aims, plain, adaptive, halves(victims)[1]))
                self._progress("defences", len(results), len(sets))
            control = self._control(pairs, aims)
            exact = self._exact_only(base, folder, pairs, plain, stack)
            leak = self._timing(base, folder, typical, stack)
        tried = min(results, key=lambda r: r.hijacked.n).hijacked.n
        partial = tried < len(pairs) or any(
            r.hijacked_adaptive.n < self._adaptive_pairs(len(pairs)) for r in results
        )
        notes = ["Benign hits: wordings of every second question; the others chose the thresholds."]
        if any(aim >= 1 for aim in aims):
            notes.append("Questions of exact-only categories cannot collide and count as not hijacked.")
        if len(pairs) < config.pairs:
            notes.append(f"{len(pairs)} pairs instead of {config.pairs}: there are no more victim questions.")
        if partial:
            notes.append(
                f"The time budget of {config.time_budget_s:g} s ended the audit early; a search that was cut "
                "off does not count as an attempt."
            )
        return AuditReport(
            tuple(results),
            CONFIGURED,
            self.mode,
            typical,
            len(pairs),
            partial,
            control,
            exact,
            leak,
            config.seed,
            self.embedder.id,
            self.clock.monotonic() - started,
            tuple(notes),
        )

    # Copies

    def _copy(self, folder: Path) -> Path:
        cache = self.cache
        if isinstance(cache, Path):
            return copy_cache(cache, folder)
        if cache.path is not None:
            return copy_cache(cache.path, folder)
        store, target = cache.documents.store, folder / "audited-copy.sqlite"
        if store is None:
            raise AuditRefused("the cache is closed")
        copy = DocumentStore(target, self.embedder.id, self.embedder.dim)
        for entry_id, key, *_ in list(store.scan()):
            found = store.read(entry_id)
            if found is not None:
                entry, expires, cost_s = found
                copy.insert(replace(entry, id=0), key, expires, cost_s, self.clock.unix())
        copy.close()
        return target

    def _open(self, base: Path, folder: Path, defences: Sequence[Defence] | None) -> SemanticCache:
        """A cache of its own on a copy of the copy."""
        path = folder / f"{sum(1 for _ in folder.glob('*.sqlite'))}.sqlite"
        shutil.copyfile(base, path)
        opened = SemanticCache(
            path,
            self.embedder,
            DEFAULT_POLICIES if self._policies is None else self._policies,
            self._classifier,
            defences=defences,
            clock=self.clock,
        )
        if opened.fault:
            raise AuditRefused(f"the copy cannot be opened: {opened.fault}")
        if self.config.threshold is not None:
            for name, policy in opened.policies.items():
                if policy.semantic and policy.threshold < 1:
                    opened.policies[name] = replace(policy, threshold=self.config.threshold, floor=None)
        return opened

    def _sets(
        self, specs: Sequence[str], threshold: float, victims: Sequence[Question]
    ) -> dict[str, Sequence[Defence] | None]:
        chosen: dict[str, Sequence[Defence] | None] = {}
        for spec in dict.fromkeys(("none", *specs)):
            chosen[spec] = build_defences(spec, self.embedder, min(threshold, 0.999), halves(victims)[0])
        # a file does not say which defences its cache is opened with: then the default ones count
        chosen[CONFIGURED] = None
        if isinstance(self.cache, SemanticCache):
            # what the audit is served must not stand in the owner's record
            chosen[CONFIGURED] = [
                d.without_records() if isinstance(d, Provenance) else d for d in self.cache.defences
            ]
        return chosen

    def _aims(self, cache: SemanticCache, pairs: Sequence[tuple[Canary, Question]]) -> list[float]:
        """The threshold of each victim's category; 1.0 where the semantic tier is off."""
        aims = []
        for _, victim in pairs:
            found = cache.lookup(victim.question, namespace=Namespace(owner=VICTIM))
            if found.hit:
                raise ValueError(
                    f"victim must not be answered by the cache already, got {victim.question!r:.80}"
                )
            policy = found.policy
            aims.append(policy.threshold if policy.enabled and policy.semantic else 1.0)
        return aims

    # Attacks

    def _stop(self) -> bool:
        return self.clock.monotonic() >= self._deadline

    def _adaptive_pairs(self, pairs: int) -> int:
        asked = self.config.adaptive_pairs
        return pairs if asked is None else min(asked, pairs)

    def _adapts(self, defences: Sequence[Defence] | None) -> bool:
        """Whether there is anything to adapt to that a text could change. None: the defences that a cache has
        by itself."""
        if not self._adaptive_pairs(1):
            return False
        if defences is None:
            return True
        return bool(defences) and not any(
            isinstance(d, ScopeGuard) and d.categories is None for d in defences
        )

    def _attack(
        self,
        pairs: Sequence[tuple[Canary, Question]],
        aims: Sequence[float],
        defences: Sequence[Defence] | None,
        stages: int,
    ) -> list[Collision | None]:
        """The best text for each pair; None where the time was over or there is nothing to collide with.

        This is the first of ``stages`` that still come. Each, and each pair in it, has its share of the time
        that is left, so that one hard pair does not take it all; what it leaves over goes to the next.
        """
        now = self.clock.monotonic()
        stage_end = now + (self._deadline - now) / stages
        config, out = self.config, []
        adaptive = defences is not None
        search_config = config.adaptive_search if adaptive else config.search
        for i, ((canary, victim), aim) in enumerate(zip(pairs, aims, strict=True)):
            target = min(aim + config.margin, 0.999)
            key = AttackLog.key(
                self.embedder.id, self.mode, canary.prompt, victim.question, target, search_config,
                config.lambda_ppl, _signature(defences), config.seed,
            )  # fmt: skip
            found = self.log.get(key)
            if found is None and self.clock.monotonic() < stage_end and aim < 1:
                penalties: list[Penalty] = []
                if config.lambda_ppl and self._log_perplexity is not None:
                    penalties.append(Perplexity(self._log_perplexity, config.lambda_ppl))
                if defences:
                    penalties.append(PassDefences(defences, self.embedder, aim, canary.answer))
                rng = np.random.default_rng([config.seed, i, adaptive])
                now = self.clock.monotonic()
                pair_end = now + (stage_end - now) / (len(pairs) - i)

                def late(end: float = pair_end) -> bool:
                    return self.clock.monotonic() >= end

                search = CollisionSearch(self.embedder, self.proposer, search_config, rng, penalties)
                starts = victim_words(victim.question, max(search_config.suffix_lengths)) if adaptive else ()
                found = search.search(canary.prompt, victim.question, target, stop=late, starts=starts)
                if found.reached or not late():  # a search that was cut off is tried again
                    self.log.put(key, found)
                elif not found.reached:
                    found = None
            out.append(found)
            self._progress("adaptive attack" if adaptive else "attack", i + 1, len(pairs))
        return out

    # Scores

    def _score(
        self,
        cache: SemanticCache,
        name: str,
        pairs: Sequence[tuple[Canary, Question]],
        aims: Sequence[float],
        plain: Sequence[Collision | None],
        adaptive: Sequence[Collision | None],
        benign: Sequence[Question],
    ) -> DefenceResult:
        tried = [
            self._served(cache, canary, victim, aim, found, is_adaptive)
            for is_adaptive, texts in ((False, plain), (True, adaptive))
            for (canary, victim), aim, found in zip(pairs, aims, texts, strict=False)
            if found is not None or aim >= 1
        ]
        rates = [
            Rate(sum(p.served for p in tried if p.adaptive is kind), sum(p.adaptive is kind for p in tried))
            for kind in (False, True)
        ]
        kept, wrong, own, on_hit, on_miss = benign_costs(cache, benign)
        return DefenceResult(
            name, rates[0], rates[1], kept, wrong, own, 1e3 * on_hit, 1e3 * on_miss, tuple(tried)
        )

    def _served(
        self,
        cache: SemanticCache,
        canary: Canary,
        victim: Question,
        aim: float,
        found: Collision | None,
        adaptive: bool,
    ) -> PairResult:
        text = canary.prompt if found is None else found.text
        attacker, asker = Namespace(owner=ATTACKER), Namespace(owner=VICTIM)
        entry = cache.put(text, canary.answer, namespace=attacker, answer_text=canary.answer)
        stored = cache.documents.row(entry or None)
        answer = cache.lookup(victim.question, namespace=asker)
        cache.invalidate(owner=ATTACKER)
        similarity = 0.0 if found is None else found.similarity
        return PairResult(
            canary.prompt,
            victim.question,
            text,
            similarity,
            aim,
            adaptive,
            similarity >= aim,
            stored is not None and stored[0].embedding is not None,
            answer.hit and answer.entry_id == entry and answer.response == canary.answer,
            0 if found is None else found.steps,
            answer.reason,
        )

    def _control(self, pairs: Sequence[tuple[Canary, Question]], aims: Sequence[float]) -> Rate:
        """Random suffixes, as long as the shortest that the search tries."""
        rng = np.random.default_rng([self.config.seed, 1_000_003])
        searcher = CollisionSearch(self.embedder, self.proposer, self.config.search, rng)
        length, count, hits = min(self.config.search.suffix_lengths), self.config.controls, 0
        victims = self.embedder.embed([v.question for _, v in pairs])
        for start in range(0, count, 64):
            if self._stop():
                return Rate(hits, start)
            rows = [i % len(pairs) for i in range(start, min(start + 64, count))]
            texts = [" ".join((pairs[i][0].prompt, *searcher.random_suffix(length))) for i in rows]
            near = (self.embedder.embed(texts) * victims[rows]).sum(axis=1)
            hits += int((near >= np.array([aims[i] for i in rows])).sum())
        return Rate(hits, count)

    def _exact_only(
        self,
        base: Path,
        folder: Path,
        pairs: Sequence[tuple[Canary, Question]],
        plain: Sequence[Collision | None],
        stack: ExitStack,
    ) -> Rate:
        """The same texts against the exact tier alone."""
        cache = stack.enter_context(self._open(base, folder, []))
        for name, policy in cache.policies.items():
            cache.policies[name] = replace(policy, semantic=False)
        served = [
            self._served(cache, canary, victim, 1.0, found, False).served
            for (canary, victim), found in zip(pairs, plain, strict=True)
            if found is not None
        ]
        return Rate(sum(served), len(served))

    def _timing(self, base: Path, folder: Path, threshold: float, stack: ExitStack) -> TimingLeak | None:
        if not self.config.timing_probes or self._stop():
            return None
        cache = stack.enter_context(self._open(base, folder, []))
        return probe_cache(cache, self.clock, self.config.timing_probes, self.config.seed).leak


def _signature(defences: Sequence[Defence] | None) -> str:
    if defences is None:
        return ""
    return repr([(d.name, getattr(d, "thresholds", getattr(d, "threshold", None))) for d in defences])
