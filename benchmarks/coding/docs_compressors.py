"""Draw docs/coding/which-compressor.svg from the committed full report: ratio against speed, a panel a corpus.

python -m benchmarks.coding.plot_compressors
"""

from __future__ import annotations

import re
from pathlib import Path

from sharewell.bench import Report

ROOT = Path(__file__).parents[2]


def main() -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "sharewell"  # the same drawing gives the same file
    import matplotlib.pyplot as plt

    table = Report.load(ROOT / "benchmarks/results/quasicryth-full.json").extra["table"]
    figure, axes = plt.subplots(2, len(table), figsize=(3.4 * len(table), 7), sharey="col")
    for column, (label, methods) in enumerate(table.items()):
        size = float(re.search(r"([\d.]+) MB", label)[1]) * 1e6  # type: ignore[index]
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


if __name__ == "__main__":
    main()
