"""A report as a table on the terminal."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from .report import Report, Row


def number(x: float) -> str:
    """Three significant digits, whole from 1,000 up: what a spread of some percent can carry."""
    if x == 0 or not math.isfinite(x):
        return "0" if x == 0 else "inf"
    if abs(x) >= 1000:
        return f"{x:,.0f}"
    return f"{x:.{max(0, 2 - math.floor(math.log10(abs(x))))}f}"


def _with_spread(value: float, pair: tuple[float, float] | None) -> str:
    return (
        number(value)
        if pair is None or pair[0] == pair[1]
        else f"{number(value)} [{number(pair[0])}, {number(pair[1])}]"
    )


def ratio_text(row: Row) -> Text:
    """The ratio, green where ours wins or reaches its target, red where not."""
    if row.ratio is None:
        return Text("-")
    text = _with_spread(row.ratio, row.ratio_spread) + "x"
    good = row.met if row.met is not None else row.ratio >= 1
    return Text(text, style="green" if good else "red")


def claim_text(row: Row) -> str:
    """What the row answers, and whether it does."""
    if row.target is None:
        return row.claim
    return f"{row.claim} (needs {number(row.target)}x: {'met' if row.met else 'NOT met'})".strip()


def print_report(report: Report, console: Console | None = None) -> None:
    """Print ``report``; medians with quartiles in brackets."""
    console = console or Console()
    table = Table(title=f"{report.slug} ({report.scale}, seed {report.seed})", title_justify="left")
    table.add_column("metric")
    for heading in ("ours", "baseline", "ratio"):
        table.add_column(heading, justify="right", no_wrap=heading == "ratio")
    for heading in ("against", "claim", "note"):
        table.add_column(heading)
    for row in report.rows:
        table.add_row(
            f"{row.metric}, {row.unit} ({row.better} is better)",
            _with_spread(row.ours, row.ours_spread),
            "-" if row.baseline is None else _with_spread(row.baseline, row.baseline_spread),
            ratio_text(row),
            row.baseline_name or "-",
            claim_text(row),
            row.note,
        )
    console.print(table)
    machine = report.environment
    load = machine.get("load", {})
    disturbed = f", others used {load['other_cores']:.2f} cores" if "other_cores" in load else ""
    console.print(
        f"Ratio: how many times better ours is. {machine['cpu_model']}, {machine['cores']} cores, "
        f"Python {machine['python']}, {machine['date']}, commit {machine['commit'] or '-'}{disturbed}",
        style="dim",
        highlight=False,
    )
