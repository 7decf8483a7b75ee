"""The collision audit on a cache with all-MiniLM-L6-v2: attack, controls, defences, timing, transfer.

Found texts and the second embedder are kept in the user's cache folder and taken from there again, so a run
that was stopped goes on where it was; delete ``audit/`` there to search anew.
"""

from __future__ import annotations

import hashlib
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from sharewell.bench import Progress, Report, Row, environment
from sharewell.models import SentenceTransformersFolder, Tokenizer, cache_root, load_embedder, resolve_model
from sharewell.semantic_cache import CategoryPolicy, Classification, SemanticCache
from sharewell.semantic_cache.audit import (
    AttackLog,
    AuditConfig,
    Canary,
    CollisionAudit,
    GradientProposer,
    Rate,
    SearchConfig,
    View,
    canaries,
    pair,
    probe_cache,
    shipped_questions,
)
from sharewell.semantic_cache.audit.arsenal import benign_pairs
from sharewell.semantic_cache.defences import SaltedEmbedder, TimingEqualiser, default_defences
from sharewell.semantic_cache.defences.calibrate import hit_loss
from sharewell.simulation import WallClock

TAU, SHIPPED_TAU = 0.80, 0.90
WALL_BUDGET_S = 540.0  # the last stages begin only before
PLAN: dict[str, dict[str, Any]] = {
    "full": {
        "pairs": 50, "adaptive": 20, "short": 3, "ppl": 4, "transfer": 3, "tight": 4, "shipped": 4,
        "controls": 1000, "probes": 400, "swaps": 200, "tune": 200, "budget_s": 3600.0,
        "questions": 64,
        "sets": ("none", "default", "scope", "crop", "second", "crop+second", "rarity", "answer"),
        "search": AuditConfig().search,
    },
    "smoke": {
        "pairs": 2, "adaptive": 1, "short": 1, "ppl": 0, "transfer": 0, "tight": 0, "shipped": 0,
        "controls": 32, "probes": 12, "swaps": 12, "tune": 0, "budget_s": 60.0,
        "questions": 4, "sets": ("none", "default", "scope", "crop+second"),
        "search": SearchConfig(suffix_lengths=(16,), batch=16, steps=10),
    },
}  # fmt: skip


def one_category(text: str, embedding: object) -> Classification:
    """All questions under one rule, so that the threshold is what is stated."""
    return Classification("default")


def new_cache(
    embedder: Any, threshold: float, path: Path | None = None, defences: Sequence[Any] = ()
) -> SemanticCache:
    policies = {"default": CategoryPolicy(threshold, quota=1.0)}
    return SemanticCache(path, embedder, policies, one_category, defences=list(defences))


def sign_test(proposer: GradientProposer, embedder: Any, swaps: int, seed: int) -> tuple[int, int, float]:
    """(wins, losses, one-sided p) of the gradient's best word against a random word at the same position,
    both scored as text on the deployed embedder; ties are left out."""
    from scipy.stats import binomtest

    rng = np.random.default_rng([seed, 3])
    wins = losses = 0
    found = pair(canaries(), shipped_questions(), 50, seed)
    for i in range(swaps):
        canary, victim = found[i % len(found)]
        words = [proposer.vocabulary[int(k)] for k in rng.integers(len(proposer.vocabulary), size=10)]
        source = canary.prompt.split()
        view = View((*source, *words), (*[-1] * len(source), *range(len(words))))
        scores = proposer.scores([view], len(words), victim.question, [1.0])
        place = int(rng.integers(len(words)))
        texts = []
        for word in (
            proposer.vocabulary[int(scores[place].argmax())],
            proposer.vocabulary[int(rng.integers(len(proposer.vocabulary)))],
        ):
            texts.append(" ".join([canary.prompt, *words[:place], word, *words[place + 1 :]]))
        vectors = embedder.embed([victim.question, *texts])
        ours, other = float(vectors[1] @ vectors[0]), float(vectors[2] @ vectors[0])
        wins, losses = wins + (ours > other), losses + (ours < other)
    p = float(binomtest(wins, max(1, wins + losses), 0.5, alternative="greater").pvalue)
    return wins, losses, p


def smollm_perplexity() -> Any:
    """log perplexity of texts under SmolLM2-135M-Instruct, in bfloat16: it only ranks."""
    import torch

    from sharewell.models import load_transformers

    folder = resolve_model("smollm2", progress=False)
    model, tokenizer = load_transformers(folder), Tokenizer(folder)
    model.bfloat16()

    def score(texts: Sequence[str]) -> np.ndarray:
        rows = [tokenizer.encode(text) for text in texts]
        width = max(map(len, rows))
        ids = torch.tensor([r + [0] * (width - len(r)) for r in rows])
        mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows])
        with torch.inference_mode():
            logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
            each = torch.nn.functional.cross_entropy(
                logits.transpose(1, 2), ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100), reduction="none"
            )
        return (each.sum(dim=1) / mask[:, 1:].sum(dim=1).clamp(min=1)).double().numpy()

    return score


def tuned_twin(steps: int, seed: int) -> tuple[SentenceTransformersFolder, float]:
    """Another embedder: MiniLM after ``steps`` of contrastive training, and its mean cosine to the
    original."""
    import torch

    twin = SentenceTransformersFolder(resolve_model("minilm-torch"))
    twin.id = f"minilm-tuned-{steps}-{seed}"
    kept = cache_root().parent / "audit" / f"{twin.id}.pt"
    tokenizer = Tokenizer(resolve_model("minilm-torch"))
    tokenizer.backend.no_padding()
    tokenizer.backend.no_truncation()
    questions = shipped_questions()
    texts = [q.question for q in questions]
    before = twin.embed(texts)
    if kept.exists():
        twin.model.load_state_dict(torch.load(kept, weights_only=True))
        return twin, float((before * twin.embed(texts)).sum(axis=1).mean())
    twin.model.requires_grad_(True)
    table = twin.model.get_input_embeddings()
    optimizer = torch.optim.AdamW(twin.model.parameters(), lr=1e-4)
    rng = np.random.default_rng([seed, 5])

    def embed(batch: Sequence[str]) -> torch.Tensor:
        rows = [tokenizer.encode(t, add_special_tokens=True) for t in batch]
        width = max(map(len, rows))
        ids = torch.tensor([r + [0] * (width - len(r)) for r in rows])
        mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows])
        return twin.embed_from_inputs(table(ids), mask)

    for _ in range(steps):
        chosen = rng.choice(len(questions), 8, replace=False)
        a = embed([questions[i].question for i in chosen])
        b = embed([questions[i].paraphrases[int(rng.integers(2))] for i in chosen])
        loss = torch.nn.functional.cross_entropy(a @ b.T / 0.05, torch.arange(len(chosen)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    twin.model.requires_grad_(False)
    kept.parent.mkdir(parents=True, exist_ok=True)
    torch.save(twin.model.state_dict(), kept)
    return twin, float((before * twin.embed(texts)).sum(axis=1).mean())


def store_ms(embedder: Any, questions: Sequence[Any], defences: Sequence[Any]) -> float:
    """Median milliseconds of storing an answer."""
    took = []
    with new_cache(embedder, TAU, defences=defences) as cache:
        for question in questions:
            start = time.perf_counter()
            cache.put(question.question, "an answer")
            took.append(time.perf_counter() - start)
    return 1e3 * float(np.median(took))


def folder_digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def run(scale: str, *, seed: int, progress: Progress) -> Report:
    from scipy.stats import binom

    plan, began = PLAN[scale], time.perf_counter()
    embedder = load_embedder("minilm")
    questions = shipped_questions()[: plan["questions"]]
    proposer = GradientProposer.from_folder(resolve_model("minilm-torch", progress=False))
    log = AttackLog(cache_root().parent / "audit" / f"bench-{seed}.jsonl" if scale == "full" else None)
    base = AuditConfig(
        pairs=plan["pairs"], adaptive_pairs=0, controls=plan["controls"], timing_probes=0, seed=seed,
        time_budget_s=plan["budget_s"],
        search=plan["search"],
    )  # fmt: skip
    steps = iter(range(1, 20))
    rows: list[Row] = []
    extra: dict[str, Any] = {}

    def tell(what: str) -> None:
        progress(what, next(steps), 10)

    def within(what: str, wanted: int) -> bool:
        """Whether there is time left for a stage; says so when there is none."""
        if wanted and time.perf_counter() - began > WALL_BUDGET_S:
            extra.setdefault("not run within the time budget", []).append(what)
            return False
        return bool(wanted)

    def rate_row(
        metric: str, rate: Rate, bar: float, better: Any, claim: str, name: str = "the bar", note: str = "",
        target: float | None = 1.0, unit: str = "of pairs",
    ) -> None:  # fmt: skip
        """A rate beside its bar. Of a rate that should be low and is 0, the upper end of its interval: no
        number of attempts shows that it is 0."""
        extra[metric] = rate.to_dict()
        unseen = better == "lower" and rate.count == 0 and bar > 0
        shown = f"{metric} (none of {rate.n} seen; upper bound)" if unseen else f"{metric} (n = {rate.n})"
        said = f"{rate.count} of {rate.n}" + (f"; {note}" if note else "")
        rows.append(
            Row(
                shown, rate.high if unseen else rate.value, bar, unit, better, name, claim,
                ours_spread=None if unseen else (rate.low, rate.high), target=target if rate.n else None,
                note=said, samples=max(1, rate.n),
            )
        )  # fmt: skip

    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch) / "audited"
        home.mkdir()
        with new_cache(embedder, TAU, home / "cache.sqlite") as cache:
            for i in range(20):
                cache.put(f"unrelated stored note number {i}", "an answer")
        before = folder_digest(home)
        tell("attack")
        audit = CollisionAudit(
            home / "cache.sqlite", embedder, proposer, base, log=log,
            policies={"default": CategoryPolicy(TAU, quota=1.0)}, classifier=one_category,
        )  # fmt: skip
        first = audit.run(victims=questions, defences=plan["sets"])
        same = folder_digest(home) == before
        none, scope = first.result("none"), first.result("scope")
        rate_row(
            f"hijack rate, no defence, tau {TAU:.2f}, lambda 0", none.hijacked, 0.80, "higher",
            "the generator collides keys as the paper says", "80 % (the paper: 86.9 %)",
        )  # fmt: skip
        rate_row("hijack rate, random suffixes", first.control, 0.02, "lower", "an honest control")
        rate_row(
            "hijack rate, exact tier only", first.exact_tier, 0.0, "lower", "no collision without locality"
        )
        rate_row(
            "hijack rate across users, scope defence", scope.hijacked, 0.0, "lower", "isolation guarantees"
        )
        rows.append(
            Row(
                "same-user hits with the scope defence", scope.same_owner_hits.count,
                none.same_owner_hits.count, "hits", "higher", "without it",
                "isolation costs the owner nothing", target=1.0,
            )
        )  # fmt: skip
        plain_rate = max(none.hijacked.value, 1e-9)
        singles = [name for name in plan["sets"] if name not in ("none", "default", "scope", "crop+second")]
        for name in singles:
            result = first.result(name)
            rate_row(
                f"hijack rate, {name}, unaware attacker", result.hijacked, plain_rate,
                "lower", "", "no defence", f"benign hits lost {result.lost(none):.3f}", target=None,
            )  # fmt: skip

        tell("adaptive attack")
        audit.cache = new_cache(embedder, TAU, defences=default_defences(embedder))
        audit.config = replace(base, adaptive_pairs=plan["adaptive"], controls=0)
        second = audit.run(victims=questions, defences=("none", "crop+second"))
        both, plain = second.result("crop+second"), second.result("none")
        shipped = second.result(second.configured)
        for name, result, bar, target in (
            ("crop+second", both, 0.15, 1.0), ("shipped defaults", shipped, plain_rate, None)
        ):  # fmt: skip
            against = "the bar" if target else "no defence"
            rate_row(
                f"hijack rate, {name}, unaware attacker", result.hijacked, bar, "lower",
                "the defence holds", against, target=target,
            )  # fmt: skip
            rate_row(
                f"hijack rate, {name}, adaptive attacker", result.hijacked_adaptive, bar, "lower",
                "it holds against an attacker who optimises against it", against, target=target,
            )  # fmt: skip
            hits = Rate(plain.benign_hits.count - result.benign_hits.count, plain.benign_hits.count)
            rate_row(
                f"benign hits lost at tau {TAU:.2f}, {name}", hits, 0.10, "lower",
                "at most 10 % of the benign hits are lost", unit="of hits",
            )  # fmt: skip
            rows += [
                Row(
                    f"added time on a candidate hit, {name}",
                    max(0.0, result.candidate_ms - plain.candidate_ms), 30.0, "ms", "lower", "the bar",
                    "at most 30 ms", target=1.0,
                ),
                Row(
                    f"time of the checks on a miss, {name}", result.miss_ms, max(plain.miss_ms, 0.001), "ms",
                    "lower", "no defence", "a miss costs nothing",
                    note=f"difference {result.miss_ms - plain.miss_ms:.4f} ms",
                ),
                Row(
                    f"look-alike questions answered wrongly, {name}", result.wrong_hits.count,
                    plain.wrong_hits.count, "hits", "lower", "no defence", "",
                    note=f"of {result.wrong_hits.n}, without any attack",
                ),
            ]  # fmt: skip
        asked, lost = hit_loss(
            embedder, benign_pairs(questions), default_defences(embedder), threshold=0.88
        ) if len(questions) == 64 else (0, 0)  # fmt: skip
        rate_row(
            "benign hits lost at tau 0.88, shipped defaults", Rate(lost, asked), 0.10, "lower",
            "the least shared threshold that ships", unit="of hits",
        )  # fmt: skip
        added, without = (
            store_ms(embedder, questions, default_defences(embedder)),
            store_ms(embedder, questions, []),
        )
        rows.append(
            Row(
                "time to store an answer, shipped defaults", added, without, "ms", "lower", "no defence",
                "the parts of the text are embedded", samples=len(questions),
            )
        )  # fmt: skip
        tell("gradient check")
        wins, losses, p = sign_test(proposer, embedder, plan["swaps"], seed)
        extra["sign test"] = {"wins": wins, "losses": losses, "p": p}
        rows.append(
            Row(
                "gradient's swap beats a random one", wins / max(1, wins + losses), 0.5, "of swaps", "higher",
                "chance", "the gradient points the right way (sign test)",
                target=float(2 * (1 + binom.isf(0.01, max(1, wins + losses), 0.5)) / max(1, wins + losses)),
                note=f"{wins} of {wins + losses}, p = {p:.1e}", samples=plan["swaps"],
            )
        )  # fmt: skip

        tell("timing")
        clock = WallClock()
        with new_cache(embedder, TAU) as cache:
            open_leak = probe_cache(cache, clock, plan["probes"], seed)
        with new_cache(embedder, TAU) as cache:
            equaliser = TimingEqualiser(clock, np.random.default_rng([seed, 9]))
            closed = probe_cache(cache, clock, plan["probes"], seed, equaliser)
        extra["timing"] = {"open": vars(open_leak.leak), "closed": vars(closed.leak)}
        learnt = open_leak.leak
        rows += [
            Row(
                "hit told from miss by time, AUC", open_leak.leak.auc, 0.95, "AUC", "higher", "the bar",
                "the leak is real", target=1.0, samples=plan["probes"],
            ),
            Row(
                "threshold learnt from times, error", learnt.threshold_error or 0.0, 0.02, "of cosine",
                "lower", "the bar", "six timed questions (log2(50), rounded up) learn it", target=1.0,
                note=f"{learnt.threshold_queries} questions asked",
            ),
            Row(
                "the same with the timing equaliser, AUC", closed.leak.auc, 0.60, "AUC", "lower", "the bar",
                "the equaliser closes it", target=1.0, samples=plan["probes"],
                note=f"saved latency of outsiders {closed.outsider_saved:.2f} of a miss, "
                f"without it {open_leak.outsider_saved:.2f}",
            ),
            Row(
                "saved latency that owners keep with the equaliser", closed.owner_saved,
                open_leak.owner_saved, "of a miss", "higher", "without it", "owners keep 90 %", target=0.9,
            ),
        ]  # fmt: skip
        rows.append(
            Row(
                "audited files unchanged", float(same and folder_digest(home) == before), 1.0,
                "1 = every byte", "higher", "the bar", "the audit works on a copy", target=1.0,
            )
        )  # fmt: skip

        salted = SaltedEmbedder(embedder, "amber canyon protocol: {text} (filed under quiet harbour)")
        texts = [p for p in none.pairs if not p.adaptive and p.collided]
        survived = _collided(salted, [(p.text, p.victim) for p in texts], TAU)
        rate_row(
            "keys that still collide under a secret salt", survived, 1.0, "lower", "", "no salt",
            note="threshold kept at 0.80", target=None,
        )  # fmt: skip
        audit.cache = new_cache(embedder, TAU)
        if within("perplexity", plan["ppl"]):
            tell("perplexity")
            audit.config = replace(
                base, pairs=plan["ppl"], lambda_ppl=0.05, controls=0,
                search=SearchConfig(suffix_lengths=(16, 32), batch=24, shortlist=3),
            )  # fmt: skip
            audit._log_perplexity = smollm_perplexity()
            fluent = audit.run(victims=questions[: plan["ppl"]], defences=("none",)).result("none")
            fewer = Rate(sum(p.served for p in none.pairs[: plan["ppl"]]), plan["ppl"])
            rate_row(
                "hijack rate, no defence, lambda 0 on the pairs of lambda 0.05", fewer,
                max(1e-9, fluent.hijacked.value), "higher", "lambda 0 is at least as high",
                "lambda 0.05 (SmolLM2)", f"lambda 0.05: {fluent.hijacked.count} of {fluent.hijacked.n}",
            )  # fmt: skip
        if within("transfer", plan["transfer"]):
            tell("transfer")
            extra["transfer"] = transfer(embedder, texts, plan, seed, log, base, rate_row)
        if within("tight threshold", plan["tight"]):
            tell("tight threshold")
            audit.config = replace(
                base, pairs=plan["tight"], threshold=SHIPPED_TAU, controls=0,
                search=SearchConfig(suffix_lengths=(16, 32), batch=24, steps=60),
            )  # fmt: skip
            tight = audit.run(victims=questions[: plan["tight"]], defences=("none",))
            rate_row(
                f"hijack rate, no defence, tau {SHIPPED_TAU:.2f}, the shipped default",
                tight.result("none").hijacked, plain_rate, "lower", "", f"tau {TAU:.2f}", target=None,
            )  # fmt: skip
        if within("as shipped", plan["shipped"]):
            tell("as shipped")
            whole = SemanticCache(None, embedder, defences=default_defences(embedder))
            config = replace(
                base, pairs=plan["shipped"], adaptive_pairs=plan["shipped"], controls=0,
                search=SearchConfig(suffix_lengths=(16, 32), batch=24, steps=60),
            )  # fmt: skip
            found = CollisionAudit(whole, embedder, proposer, config, log=log).run(
                victims=questions[: plan["shipped"]], defences=("none",)
            )
            bare, own = found.result("none"), found.result(found.configured)
            rate_row(
                "hijack rate, shipped categories and thresholds, no defence", bare.hijacked, plain_rate,
                "lower", "", f"tau {TAU:.2f}, one category", target=None,
            )  # fmt: skip
            rate_row(
                "hijack rate, everything as shipped, adaptive attacker", own.hijacked_adaptive, plain_rate,
                "lower", "", f"tau {TAU:.2f}, no defence",
                f"unaware {own.hijacked.count} of {own.hijacked.n}", target=None,
            )  # fmt: skip
        if within("shortest sources", plan["short"]):
            tell("shortest sources")
            short = [Canary(f"Say {c.answer.lower()}", c.answer) for c in canaries()]
            audit.config = replace(base, pairs=plan["short"], adaptive_pairs=plan["short"], controls=0)
            audit._log_perplexity = None
            third = audit.run(short, questions, ("none", "crop+second"))
            result = third.result("crop+second")
            rate_row(
                "hijack rate, crop+second, adaptive, two-word source", result.hijacked_adaptive,
                0.15, "lower", "stress: the source is as short as it can be", note="undefended "
                f"{third.result('none').hijacked.count} of {third.result('none').hijacked.n}", target=None,
            )  # fmt: skip
    extra["calibrated"] = "thresholds from the even-numbered shipped questions, benign hits from the others"
    extra["spent_s"] = time.perf_counter() - began
    assert all(math.isfinite(row.ours) for row in rows)
    name: Any = scale
    return Report("cache-collision-audit", name, tuple(rows), environment(), seed, extra)


def _collided(embedder: Any, texts: Sequence[tuple[str, str]], threshold: float) -> Rate:
    if not texts:
        return Rate(0, 0)
    a, b = embedder.embed([t for t, _ in texts]), embedder.embed([v for _, v in texts])
    return Rate(int(((a * b).sum(axis=1) >= threshold).sum()), len(texts))


def transfer(
    embedder: Any, texts: Sequence[Any], plan: dict[str, Any], seed: int, log: AttackLog, base: AuditConfig,
    rate_row: Any,
) -> dict[str, Any]:  # fmt: skip
    """Texts found on one embedder, tried on the other, at tau 0.80 for both."""
    twin, alike = tuned_twin(plan["tune"], seed)
    tokenizer = Tokenizer(resolve_model("minilm-torch"))
    with new_cache(twin, TAU) as cache:
        config = replace(base, pairs=plan["transfer"], controls=0)
        surrogate = CollisionAudit(
            cache, twin, GradientProposer(twin, tokenizer), config, mode="surrogate", log=log
        )
        found = surrogate.run(victims=shipped_questions()[: plan["transfer"]], defences=("none",)).result(
            "none"
        )
    pairs = [(p.text, p.victim) for p in found.pairs if not p.adaptive]
    forth = _collided(embedder, pairs, TAU)
    back = _collided(twin, [(p.text, p.victim) for p in texts], TAU)
    rate_row(
        "transfer: found on the tuned MiniLM, tried on the deployed", forth, 1.0, "higher", "",
        "all", f"on the tuned one itself {found.hijacked.count} of {found.hijacked.n}", target=None,
    )  # fmt: skip
    rate_row(
        "transfer: found on the deployed, tried on the tuned MiniLM", back, 1.0, "higher", "", "all",
        f"{plan['tune']} training steps, mean cosine of both embedders {alike:.2f}",
        target=None,
    )  # fmt: skip
    return {"mean cosine": alike, "to deployed": forth.to_dict(), "to tuned": back.to_dict()}
