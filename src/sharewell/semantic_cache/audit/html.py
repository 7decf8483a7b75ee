"""The report as one self-contained page."""

from __future__ import annotations

from pathlib import Path

from .outcome import AuditReport, digest
from .verdict import advice, interval, verdict

_TEMPLATE = Path(__file__).parent / "data" / "report.html.j2"


def render(report: AuditReport, *, reveal: bool = False) -> str:
    """HTML without scripts and without anything from elsewhere; every text is escaped."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["percent"] = lambda x: f"{100 * x:.1f} %"
    environment.filters["interval"] = interval
    template = environment.from_string(_TEMPLATE.read_text("utf-8"))
    own = report.result(report.configured)
    unaware = {(p.victim, p.text) for p in own.pairs if not p.adaptive}
    return template.render(
        report=report,
        own=own,
        # without defences the adaptive attacker's text is the other's
        attempts=[p for p in own.pairs if not p.adaptive or (p.victim, p.text) not in unaware],
        undefended=report.results[0],
        verdict=verdict(report),
        advice=advice(report),
        shown=(lambda text: text) if reveal else digest,
        reveal=reveal,
    )
