"""The report as one self-contained page."""

from __future__ import annotations

from pathlib import Path

from .outcome import AuditReport, Rate, digest

_TEMPLATE = Path(__file__).parent / "data" / "report.html.j2"


def render(report: AuditReport, *, reveal: bool = False) -> str:
    """HTML without scripts and without anything from elsewhere; every text is escaped."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["percent"] = lambda x: f"{100 * x:.1f} %"
    environment.filters["interval"] = _interval
    template = environment.from_string(_TEMPLATE.read_text("utf-8"))
    own = report.result(report.configured)
    return template.render(
        report=report,
        own=own,
        undefended=report.results[0],
        verdict=_verdict(report),
        advice=_advice(report),
        shown=(lambda text: text) if reveal else digest,
        reveal=reveal,
    )


def _interval(rate: Rate) -> str:
    return f"{100 * rate.low:.1f} to {100 * rate.high:.1f} %"


def _verdict(report: AuditReport) -> str:
    own = report.result(report.configured)
    if not own.risk.n:
        return "Nothing was tried: the time budget was too small. This says nothing about the cache."
    if own.risk.count == 0:
        return (
            f"No planted answer was served in {own.risk.n} attempts on the cache as configured. With 95 % "
            f"confidence fewer than {100 * own.risk.high:.0f} % of such attempts would succeed."
        )
    return (
        f"{own.risk.count} of {own.risk.n} planted answers were served to another user by the cache as "
        f"configured ({100 * own.risk.value:.0f} %, 95 % interval {_interval(own.risk)})."
    )


def _advice(report: AuditReport) -> list[str]:
    out, undefended = [], report.results[0]
    own = report.result(report.configured)
    better = [
        r for r in report.results if r.risk.n and r.risk.value < own.risk.value and r.lost(undefended) <= 0.1
    ]
    if better:
        best = min(better, key=lambda r: (r.risk.value, r.lost(undefended)))
        out.append(
            f"Turn on {best.name}: {100 * best.risk.value:.0f} % instead of {100 * own.risk.value:.0f} % of "
            f"the attempts succeed, for {100 * best.lost(undefended):.0f} % of the benign hits."
        )
    if own.risk.count:
        out.append(
            "Where one user's answer must never reach another, scope the category to the user: that is the "
            "only guarantee, and it costs the hits between users."
        )
    if report.timing is not None and report.timing.auc > 0.6:
        out.append(
            "Hits can be told from misses by their time. If who asked what is confidential, use the timing "
            "equaliser for callers who do not own the entry."
        )
    if own.wrong_hits.count:
        out.append(
            f"{own.wrong_hits.count} of {own.wrong_hits.n} look-alike questions got a wrong answer without "
            "any attack: calibrate the thresholds."
        )
    return out or ["Nothing to change. Run the audit again after changing embedder, thresholds or defences."]
