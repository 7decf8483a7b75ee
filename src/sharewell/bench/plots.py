"""A report as a picture: one bar per row, on a logarithmic axis of ratios."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from .table import number

if TYPE_CHECKING:
    from .report import Report

SUFFIXES = (".png", ".svg", ".pdf")


def plot_report(report: Report, path: Path) -> Path:
    """Draw the rows that have a ratio; the line at 1 is the baseline, whiskers are quartiles of paired runs.

    Raises ValueError for a suffix that is not an image, or a report in which no row has a baseline.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"plot must end in one of {', '.join(SUFFIXES)}, got {path.name!r}")
    rows = [
        row for row in report.rows if row.ratio is not None and math.isfinite(row.ratio) and row.ratio > 0
    ]
    if not rows:
        raise ValueError("plot needs at least one row with a baseline, got none")
    # A figure of its own instead of pyplot: no global state, no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    figure = Figure(figsize=(8, 1.1 + 0.45 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    places = range(len(rows))[::-1]
    ratios = [float(row.ratio or 0) for row in rows]
    axes.barh(
        places,
        [r - 1 for r in ratios],
        left=1,
        height=0.6,
        color=["#2a7f62" if r >= 1 else "#b5523b" for r in ratios],
    )
    for place, row, value in zip(places, rows, ratios, strict=True):
        low, high = row.ratio_spread or (value, value)
        axes.plot([low, high], [place, place], color="black", linewidth=1)
        if row.target is not None:
            axes.plot(
                [row.target] * 2, [place - 0.36, place + 0.36], color="black", linewidth=1, linestyle=":"
            )
        axes.annotate(f" {number(value)}x", (max(high, value, 1), place), va="center", ha="left", fontsize=9)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    edges = [1, *ratios, *(row.target for row in rows if row.target)]
    axes.set_xlim(min(edges) / 1.3, max(edges) * 1.6)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}x"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks(list(places), [f"{row.metric}\nvs {row.baseline_name}" for row in rows], fontsize=8)
    axes.set_xlabel("times better than the baseline (dotted: what the claim needs)", fontsize=9)
    machine = report.environment
    axes.set_title(
        f"{report.slug}: {machine['cpu_model']}, {machine['cores']} cores", fontsize=10, loc="left"
    )
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)
    return path
