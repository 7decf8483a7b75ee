"""What an audit means, in words: the verdict, and what to do next."""

from __future__ import annotations

from .outcome import AuditReport, DefenceResult, Rate

FEW = 30  # attempts whose interval is wide
_MAX_LOSS = 0.1
_HOW = {
    "scope": "ScopeGuard()",
    "crop": "CropConsistency()",
    "second": "SecondOpinion()",
    "rarity": "RarityScreen(your_questions)",
    "answer": "AnswerCheck(your_questions)",
}


def interval(rate: Rate) -> str:
    """Its 95 % interval in per cent."""
    return f"{100 * rate.low:.1f} to {100 * rate.high:.1f} %"


def verdict(report: AuditReport) -> str:
    """One or two sentences about the cache as configured; they begin with the finding."""
    own = report.result(report.configured)
    if not own.risk.n:
        return (
            "Not known. Nothing was tried to its end: the time budget was too small. This says nothing about "
            "the cache."
        )
    if own.risk.count == 0:
        return (
            f"No hijack seen. No planted answer was served in {own.risk.n} attempts on the cache as "
            f"configured. With 95 % confidence fewer than {100 * own.risk.high:.0f} % of such attempts would "
            "succeed."
        )
    return (
        f"Hijackable. {own.risk.count} of {own.risk.n} planted answers were served to another user by the "
        f"cache as configured ({100 * own.risk.value:.0f} %, 95 % interval {interval(own.risk)})."
    )


def advice(report: AuditReport) -> list[str]:
    """What to do next, most important first."""
    out, undefended = [], report.results[0]
    own = report.result(report.configured)
    better = [r for r in report.results if r.risk.n and r.risk.value < own.risk.value and r.name != "scope"]
    if better:
        out.append(_turn_on(better, own, undefended))
    if own.risk.count:
        out.append(
            "Where one user's answer must never reach another, scope the category to the user, with "
            'CategoryPolicy(scope="user") or ScopeGuard(): that is the only guarantee, and it costs the hits '
            "between users."
        )
        out.append(
            "Suspect a planted answer? Take out all that its author stored: sharewell cache invalidate "
            "--owner NAME. The Provenance defence records who was served what."
        )
    if 0 < own.risk.n < FEW or report.partial:
        out.append(
            f"{own.risk.n} attempts leave a wide interval: repeat with --pairs 50, a larger --time-budget-s "
            "and --resume FILE, which keeps what was found."
        )
    if report.timing is not None and report.timing.auc > 0.6:
        out.append(
            "Hits can be told from misses by their time. If who asked what is confidential, use "
            "TimingEqualiser for callers who do not own the entry."
        )
    if own.wrong_hits.count:
        out.append(
            f"{own.wrong_hits.count} of {own.wrong_hits.n} look-alike questions got a wrong answer without "
            "any attack: calibrate the thresholds (sharewell cache calibrate)."
        )
    return out or ["Nothing to change. Run the audit again after changing embedder, thresholds or defences."]


def _turn_on(better: list[DefenceResult], own: DefenceResult, undefended: DefenceResult) -> str:
    cheap = [r for r in better if r.lost(undefended) <= _MAX_LOSS]
    best = min(cheap or better, key=lambda r: (r.risk.value, r.lost(undefended)))
    parts = [_HOW[name] for name in best.name.split("+") if name in _HOW]
    how = "default_defences(embedder)" if best.name == "default" else f"[{', '.join(parts)}]"
    code = f": SemanticCache(..., defences={how})" if parts or best.name == "default" else ""
    if {"crop", "second"} & set(best.name.split("+")):
        code += ", with thresholds from calibrate_defences() on your own pairs"
    return (
        f"Turn on {best.name}{code}. {100 * best.risk.value:.0f} % instead of {100 * own.risk.value:.0f} % "
        f"of the attempts succeed, and {100 * best.lost(undefended):.0f} % of the benign hits are lost."
    )
