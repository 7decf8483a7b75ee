"""Put the committed full report into the pages: the plot and table of which-compressor.md, and the table
of tilings of quasicryth.md.

    python -m benchmarks.coding.docs_compressors
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from benchmarks.docs_table import place
from sharewell.bench import Report

ROOT = Path(__file__).parents[2]


def draw(table: dict[str, Any]) -> None:
    """Ratio against speed, a column a corpus."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "sharewell"  # the same drawing gives the same file
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(table), figsize=(3.4 * len(table), 7), sharey="col")
    for column, (label, methods) in enumerate(table.items()):
        size = size_of(label)
        for row, direction in enumerate(("compress", "decompress")):
            axis = axes[row][column]
            for name, figures in methods.items():
                ours = name.startswith("quasicryth")
                x, y = figures[f"{direction}_MB_per_s"], size / figures["bytes"]
                axis.scatter(
                    x, y, color="#0b7a75" if ours else "#888888", marker="D" if ours else "o", zorder=3
                )
                short = name.replace("quasicryth, ", "").replace("12 Fibonacci tilings", "12 Fibonacci")
                axis.annotate(short, (x, y), xytext=(4, 3), textcoords="offset points", fontsize=7)
            axis.set_xscale("log")
            axis.margins(x=0.25, y=0.12)
            axis.grid(alpha=0.3)
            axis.set_xlabel(f"{direction}, MB/s of CPU", fontsize=8)
            axis.tick_params(labelsize=7)
            if row == 0:
                axis.set_title(label, fontsize=9)
        axes[0][column].set_ylabel("ratio" if column == 0 else "", fontsize=8)
    axes[1][0].set_ylabel("ratio", fontsize=8)
    figure.tight_layout()
    figure.savefig(ROOT / "docs/coding/which-compressor.svg", metadata={"Date": None})


def size_of(label: str) -> float:
    """Bytes in a label such as ``bible-kjv, 3.0 MB``."""
    found = re.search(r"([\d.]+) MB", label)
    if found is None:
        raise ValueError(f"label must end in its size, got {label!r}")
    return float(found[1]) * 1e6


def compressors(table: dict[str, Any]) -> str:
    """Bytes, ratio and MB/s of every method on every text."""
    lines = [
        "![Ratio against speed, one column a text](which-compressor.svg)",
        "",
        "| text | method | bytes | ratio | compress, MB/s | decompress, MB/s |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for label, methods in table.items():
        for name, f in sorted(methods.items(), key=lambda item: item[1]["bytes"]):
            speeds = f"{f['compress_MB_per_s']:.2f} | {f['decompress_MB_per_s']:.1f}"
            ratio = size_of(label) / f["bytes"]
            lines.append(f"| {label} | {name} | {f['bytes']:,.0f} | {ratio:.2f} | {speeds} |")
    return "\n".join(lines)


def tilings(comparisons: dict[str, Any]) -> str:
    """Bytes of every arm, a column a text."""
    arms = dict.fromkeys(row["arm"] for rows in comparisons.values() for row in rows)
    lines = ["| arm | " + " | ".join(comparisons) + " |", "|---|" + "---:|" * len(comparisons)]
    for arm in arms:
        cells = []
        for rows in comparisons.values():
            total = next((row["total_bytes"] for row in rows if row["arm"] == arm), None)
            cells.append("-" if total is None else f"{total:,}")
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    extra = Report.load(ROOT / "benchmarks/results/quasicryth-full.json").extra
    draw(extra["table"])
    for name, slug, table in (
        ("which-compressor", "which-compressor", compressors(extra["table"])),
        ("quasicryth", "tilings", tilings(extra["tilings"])),
    ):
        path = ROOT / f"docs/coding/{name}.md"
        path.write_text(place(path.read_text(encoding="utf-8"), slug, table), encoding="utf-8")


if __name__ == "__main__":
    main()
