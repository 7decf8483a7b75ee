"""``sharewell bench``: run a system beside its baseline, print ratios, keep the report."""

from __future__ import annotations

import logging
import sys
import traceback
from pathlib import Path
from typing import Annotated, Literal

import typer

from .discovery import Benchmark, find_benchmark, list_benchmarks
from .machine import cpu_counters, machine_load
from .progress import progress_bars
from .report import Report
from .timing import cpu_seconds

log = logging.getLogger(__name__)


def bench(
    slug: Annotated[
        str | None, typer.Argument(help="System to measure; without it, the list of them.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Measure every system that has a benchmark.")] = False,
    scale: Annotated[
        Literal["smoke", "full"],
        typer.Option(help="smoke: seconds, shows that it runs. full: what is claimed."),
    ] = "smoke",
    seed: Annotated[int, typer.Option(min=0, help="Seed of every random choice.")] = 0,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write the report there (- is standard output)."),
    ] = None,
    plot_file: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw the ratios: .png, .svg or .pdf.")
    ] = None,
) -> None:
    """Measure a system beside its baseline, interleaved, and print how many times better it is.

    At full scale the report is kept in benchmarks/results unless --json says otherwise.

    Example: sharewell bench engine --scale full --plot engine.png
    """
    if slug is not None and every:
        raise typer.BadParameter("give a system or --all, not both", param_hint="SLUG")
    if every and (json_file or plot_file):
        raise typer.BadParameter("one file cannot hold several reports; name a system", param_hint="--all")
    if slug is None and not every:
        if json_file or plot_file:
            raise typer.BadParameter("name the system to measure", param_hint="SLUG")
        _print_list(list_benchmarks())
        return
    if plot_file is not None:
        from .plots import SUFFIXES

        if plot_file.suffix not in SUFFIXES:
            raise typer.BadParameter(
                f"must end in {', '.join(SUFFIXES)}, got {plot_file.name!r}", param_hint="--plot"
            )
    chosen = [find_benchmark(slug)] if slug else [b for b in list_benchmarks() if b.path.is_file()]
    failed = [
        benchmark.system.slug
        for benchmark in chosen
        if not _measure(benchmark, scale, seed, json_file, plot_file)
    ]
    if failed:
        typer.echo(f"error: failed: {', '.join(failed)}", err=True)
        raise typer.Exit(1)


def _measure(
    benchmark: Benchmark,
    scale: Literal["smoke", "full"],
    seed: int,
    json_file: Path | None,
    plot_file: Path | None,
) -> bool:
    start, own = cpu_counters(), cpu_seconds()
    try:
        with progress_bars() as progress:
            report = benchmark.run(scale, seed=seed, progress=progress)
    except Exception:
        traceback.print_exc()  # a fault of the benchmark, not of its user
        return False
    report = report.with_load(machine_load(start, cpu_seconds() - own))
    _write(report, benchmark, json_file)
    if plot_file is not None:
        report.plot(plot_file)
    return True


def _write(report: Report, benchmark: Benchmark, json_file: Path | None) -> None:
    if json_file == Path("-"):
        import json

        from rich.console import Console

        report.print(Console(stderr=True))
        json.dump(report.to_dict(), sys.stdout, indent=2)
        sys.stdout.write("\n")
        return
    report.print()
    if json_file is None and report.scale == "full":
        json_file = benchmark.result_path(report.scale)
    if json_file is not None:
        typer.echo(f"report: {report.save(json_file)}", err=True)


def _print_list(benchmarks: list[Benchmark]) -> None:
    from rich.console import Console
    from rich.table import Table

    from .table import claim_text, number

    table = Table("slug", "room", "claim", "last full run")
    for benchmark in benchmarks:
        kept = benchmark.result_path("full")
        if not benchmark.path.is_file():
            last = "no benchmark"
        elif not kept.is_file():
            last = "-"
        else:
            report = Report.load(kept)
            rows = [row for row in report.rows if row.target is not None]
            shown = [f"{row.metric}: {number(row.ratio)}x" for row in rows if row.ratio is not None]
            missed = [claim_text(row) for row in rows if not row.met]
            last = "\n".join(
                [str(report.environment["date"])[:10], *shown, *(f"missed: {m}" for m in missed)]
            )
        table.add_row(benchmark.system.slug, benchmark.system.room, benchmark.system.claim, last)
    Console().print(table)
    typer.echo("Run one: sharewell bench SLUG --scale smoke")
