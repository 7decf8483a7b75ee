"""Puts the committed figures of a benchmark into its docs page: ``python -m benchmarks.docs_table engine``.

The page ``docs/<room>/<slug>.md`` holds ``<!-- table: <slug> -->`` and ``<!-- end -->``; what stands between
them is replaced. Nobody types figures, so a page never says what no benchmark printed."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from sharewell.bench import Report, Row, find_benchmark
from sharewell.bench.table import number


def _figure(value: float, unit: str, spread: tuple[float, float] | None) -> str:
    quartiles = (
        "" if spread is None or spread[0] == spread[1] else f" [{number(spread[0])}, {number(spread[1])}]"
    )
    return f"{number(value)}{quartiles} {unit}"


def _line(row: Row) -> str:
    ratio = "-" if row.ratio is None else f"{number(row.ratio)}x"
    if row.target is not None and row.met:
        ratio = f"**{ratio}**"
    needs = "" if row.target is None else f"{number(row.target)}x: {'met' if row.met else 'not met'}"
    baseline = row.note if row.baseline is None else _figure(row.baseline, row.unit, row.baseline_spread)
    cells = (
        row.metric,
        _figure(row.ours, row.unit, row.ours_spread),
        row.baseline_name,
        baseline,
        ratio,
        needs,
    )
    return "| " + " | ".join(cell.replace("|", "\\|") or " " for cell in cells) + " |"


def not_run(slug: str) -> str:
    """What a page says before its benchmark has run at full scale."""
    return f"No full run is recorded yet: `sharewell bench {slug} --scale full` prints the table."


def markdown(report: Report) -> str:
    """A table of all rows, then the machine in one line."""
    head = [
        "| measured | ours | against | theirs | times better | claim needs |",
        "|---|---:|---|---:|---:|---|",
    ]
    machine = report.environment
    where = f"{machine['cpu_model']}, {machine['cores']} cores, {str(machine['date'])[:10]}"
    foot = f"Medians, quartiles in brackets, seed {report.seed}; {where}, commit {machine['commit']}."
    return "\n".join([*head, *map(_line, report.rows), "", foot])


def place(page: str, slug: str, table: str) -> str:
    """``page`` with ``table`` between its markers. Raises ValueError when it has none."""
    start, end = f"<!-- table: {slug} -->", "<!-- end -->"
    found = re.search(re.escape(start) + ".*?" + re.escape(end), page, re.DOTALL)
    if found is None:
        raise ValueError(f"the page has no {start} ... {end}")
    return page[: found.start()] + f"{start}\n{table}\n{end}" + page[found.end() :]


def main(slugs: list[str]) -> None:
    """Rewrite the pages of ``slugs``."""
    for slug in slugs:
        benchmark = find_benchmark(slug)
        page: Path = benchmark.root / "docs" / benchmark.system.room / f"{slug}.md"
        table = markdown(Report.load(benchmark.result_path("full")))
        page.write_text(place(page.read_text("utf-8"), slug, table), "utf-8")
        print(page.relative_to(benchmark.root))


if __name__ == "__main__":
    main(sys.argv[1:])
