"""The collision audit on a cache with all-MiniLM-L6-v2: attack, controls, defences, timing, transfer.

Found texts are kept in the user's cache folder and taken from there again, so a run that was stopped goes on
where it was; delete ``audit/`` there to search anew.
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
from sharewell.semantic_cache.defences import SaltedEmbedder, TimingEqualiser
from sharewell.simulation import WallClock

TAU, SHIPPED_TAU = 0.80, 0.90
CPU_BUDGET_S, WALL_BUDGET_S = 780.0, 400.0  # the last stages begin only before both
PLAN: dict[str, dict[str, Any]] = {
    "full": {
        "pairs": 28, "adaptive": 15, "short": 4, "ppl": 2, "transfer": 4, "shipped": 4, "controls": 1000,
        "probes": 400, "swaps": 200, "tune": 200, "budget_s": 3600.0,
        "questions": 64, "sets": ("none", "scope", "crop", "second", "crop+second", "rarity", "answer"),
        "search": AuditConfig().search,
    },
    "smoke": {
        "pairs": 2, "adaptive": 1, "short": 1, "ppl": 0, "transfer": 0, "shipped": 0, "controls": 32,
        "probes": 12, "swaps": 12, "tune": 0, "budget_s": 60.0,
        "questions": 4, "sets": ("none", "scope", "crop+second"),
        "search": SearchConfig(suffix_lengths=(16,), batch=16, steps=10),
    },
}  # fmt: skip


def one_category(text: str, embedding: object) -> Classification:
    """All questions under one rule, so that the threshold is what is stated."""
    return Classification("default")


def new_cache(embedder: Any, threshold: float, path: Path | None = None) -> SemanticCache:
    policies = {"default": CategoryPolicy(threshold, quota=1.0)}
    return SemanticCache(path, embedder, policies, one_category, defences=[])


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
    """log perplexity of texts under SmolLM2-135M-Instruct, float32."""
    import torch

    from sharewell.models import load_transformers

    folder = resolve_model("smollm2", progress=False)
    model, tokenizer = load_transformers(folder), Tokenizer(folder)

    def score(texts: Sequence[str]) -> np.ndarray:
        out = []
        with torch.inference_mode():
            for text in texts:
                ids = torch.tensor([tokenizer.encode(text)])
                logits = model(input_ids=ids).logits[0, :-1].float()
                out.append(float(torch.nn.functional.cross_entropy(logits, ids[0, 1:])))
        return np.array(out)

    return score


def tuned_twin(steps: int, seed: int) -> tuple[SentenceTransformersFolder, float]:
    """Another embedder: MiniLM after ``steps`` of contrastive training, and its mean cosine to the
    original."""
    import torch

    twin = SentenceTransformersFolder(resolve_model("minilm-torch"))
    tokenizer = Tokenizer(resolve_model("minilm-torch"))
    tokenizer.backend.no_padding()
    tokenizer.backend.no_truncation()
    questions = shipped_questions()
    texts = [q.question for q in questions]
    before = twin.embed(texts)
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
    twin.id = f"minilm-tuned-{steps}-{seed}"
    return twin, float((before * twin.embed(texts)).sum(axis=1).mean())


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
        if wanted and (time.process_time() > CPU_BUDGET_S or time.perf_counter() - began > WALL_BUDGET_S):
            extra.setdefault("not run within the time budget", []).append(what)
            return False
        return bool(wanted)

    def rate_row(
        metric: str, rate: Rate, bar: float, better: Any, claim: str, name: str = "the bar", note: str = ""
    ) -> None:
        extra[metric] = rate.to_dict()
        said = f"{rate.count} of {rate.n}" + (f"; {note}" if note else "")
        rows.append(
            Row(
                f"{metric} (n = {rate.n})", rate.value, bar, "of pairs", better, name, claim,
                ours_spread=(rate.low, rate.high), target=1.0 if rate.n else None, note=said,
                samples=max(1, rate.n),
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
        singles = [name for name in plan["sets"] if name not in ("none", "scope", "crop+second")]
        for name in singles:
            result = first.result(name)
            rate_row(
                f"hijack rate, {name}, unaware attacker", result.hijacked, max(none.hijacked.value, 1e-9),
                "lower", "", "no defence", f"benign hits lost {result.lost(none):.3f}",
            )  # fmt: skip
            rows[-1] = replace(rows[-1], target=None)

        tell("adaptive attack")
        audit.cache = new_cache(embedder, TAU)  # without defences of its own, which would be attacked as well
        audit.config = replace(base, adaptive_pairs=plan["adaptive"], controls=0)
        second = audit.run(victims=questions, defences=("none", "crop+second"))
        both, plain = second.result("crop+second"), second.result("none")
        rate_row(
            "hijack rate, crop+second, unaware attacker", both.hijacked, 0.15, "lower", "the defence holds"
        )
        rate_row(
            "hijack rate, crop+second, adaptive attacker", both.hijacked_adaptive, 0.15, "lower",
            "it holds against an attacker who optimises against it",
        )  # fmt: skip
        extra_ms = max(0.0, both.candidate_ms - plain.candidate_ms)
        rows.append(
            Row(
                "benign paraphrase hits kept, crop+second", both.benign_hits.count, plain.benign_hits.count,
                "hits", "higher", "no defence", "at most 10 % of the benign hits are lost", target=0.9,
                samples=both.benign_hits.n,
            )
        )  # fmt: skip
        rows.append(
            Row(
                "added time on a candidate hit, crop+second", extra_ms,
                30.0, "ms", "lower", "the bar", "at most 30 ms", target=1.0,
            )
        )  # fmt: skip
        added = max(0.0, both.miss_ms - plain.miss_ms)
        rows.append(
            Row(
                "added time on a miss, crop+second", added, 0.05, "ms", "lower",
                "noise of the clock", "a miss costs nothing", target=1.0,
            )
        )  # fmt: skip
        rows.append(
            Row(
                "look-alike questions answered wrongly, crop+second", both.wrong_hits.count,
                plain.wrong_hits.count, "hits", "lower", "no defence", "",
                note=f"of {both.wrong_hits.n}, without any attack",
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
                note=f"threshold learnt to {learnt.threshold_error:.3f} in {learnt.threshold_queries} asks",
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
            note="threshold kept at 0.80",
        )  # fmt: skip
        rows[-1] = replace(rows[-1], target=None)
        if within("perplexity", plan["ppl"]):
            tell("perplexity")
            audit.config = replace(
                base, pairs=plan["ppl"], lambda_ppl=0.05, controls=0,
                search=SearchConfig(suffix_lengths=(16, 32), batch=24, shortlist=3),
            )  # fmt: skip
            audit._log_perplexity = smollm_perplexity()
            fluent = audit.run(victims=questions[:12], defences=("none",)).result("none")
            rate_row(
                "hijack rate, lambda 0.05 (SmolLM2 perplexity)", fluent.hijacked,
                max(1e-9, none.hijacked.value), "lower", "lambda 0 is at least as high", "lambda 0",
            )  # fmt: skip
        if within("shortest sources", plan["short"]):
            tell("shortest sources")
            short = [Canary(f"Say {c.answer.lower()}", c.answer) for c in canaries()]
            audit.config = replace(base, pairs=plan["short"], adaptive_pairs=plan["short"], controls=0)
            third = audit.run(short, questions, ("none", "crop+second"))
            result = third.result("crop+second")
            rate_row(
                "hijack rate, crop+second, adaptive, two-word source", result.hijacked_adaptive,
                0.15, "lower",
                "stress: the source is as short as it can be", note="undefended "
                f"{third.result('none').hijacked.count} of {third.result('none').hijacked.n}",
            )  # fmt: skip
            rows[-1] = replace(rows[-1], target=None)
        if within("transfer", plan["transfer"]):
            tell("transfer")
            extra["transfer"] = transfer(embedder, texts, plan, seed, log, base, rate_row)
            rows[-2:] = [replace(row, target=None) for row in rows[-2:]]
        if within("shipped threshold", plan["shipped"]):
            tell("shipped threshold")
            audit.config = replace(
                base, pairs=plan["shipped"], threshold=SHIPPED_TAU, controls=0,
                search=SearchConfig(suffix_lengths=(16, 32), batch=24, steps=60),
            )  # fmt: skip
            shipped = audit.run(victims=questions[:12], defences=("none",))
            rate_row(
                f"hijack rate, no defence, shipped threshold {SHIPPED_TAU:.2f}",
                shipped.result("none").hijacked, max(none.hijacked.value, 1e-9), "lower", "", "tau 0.80",
            )  # fmt: skip
            rows[-1] = replace(rows[-1], target=None)
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
        found = surrogate.run(victims=shipped_questions()[:12], defences=("none",)).result("none")
    pairs = [(p.text, p.victim) for p in found.pairs if not p.adaptive]
    forth = _collided(embedder, pairs, TAU)
    back = _collided(twin, [(p.text, p.victim) for p in texts], TAU)
    rate_row(
        "transfer: found on the tuned MiniLM, tried on the deployed", forth, 1.0, "higher", "",
        "all", f"on the tuned one itself {found.hijacked.count} of {found.hijacked.n}",
    )  # fmt: skip
    rate_row(
        "transfer: found on the deployed, tried on the tuned MiniLM", back, 1.0, "higher", "", "all",
        f"{plan['tune']} training steps, mean cosine of both embedders {alike:.2f}",
    )  # fmt: skip
    return {"mean cosine": alike, "to deployed": forth.to_dict(), "to tuned": back.to_dict()}
