"""Detections as JSON, CSV and a picture of the timeline."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .detect import VideoDetector, VideoResult
from .features import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURE_SUFFIXES = (".png", ".svg", ".pdf")


def to_document(result: VideoResult, detector: VideoDetector) -> dict[str, Any]:
    """JSON values: what was found (``results`` as in ActivityNet's prediction files), in what, by what, and
    what went wrong."""
    settings, stats = detector.extractor.settings, result.stats
    name = Path(result.source).stem or result.source
    return {
        "version": "sharewell-detect-1",
        "video": result.source,
        "duration_s": round(result.duration_s, 3),
        "complete": result.complete,
        "error": result.error,
        "detector": detector.name,
        "about": detector.about,
        "demonstration": detector.demonstration,
        "extractor": settings.to_json(),
        "frames": {
            "decoded": stats.decoded,
            "sampled": stats.sampled,
            "damaged": stats.damaged,
            "backwards": stats.backwards,
            "without_time": stats.without_time,
            "longest_gap_s": round(stats.longest_gap_s, 3),
        },
        "results": {
            name: [
                {
                    "label": d.label,
                    "segment": [round(d.start, 3), round(d.end, 3)],
                    "score": round(d.score, 6),
                }
                for d in result.detections
            ]
        },
    }


def write_json(result: VideoResult, detector: VideoDetector, path: Path) -> None:
    document = to_document(result, detector)
    write_atomically(path, (json.dumps(document, indent=2, allow_nan=False) + "\n").encode())


def write_csv(result: VideoResult, path: Path) -> None:
    """Columns start, end (seconds), label, score."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["start", "end", "label", "score"])
    rows.writerows([f"{d.start:.3f}", f"{d.end:.3f}", d.label, f"{d.score:.4f}"] for d in result.detections)
    write_atomically(path, text.getvalue().encode())


def write_timeline(result: VideoResult, detector: VideoDetector, path: Path) -> None:
    """One line a label, one bar a detection, darker for a higher score. PNG, SVG or PDF by the suffix."""
    if path.suffix.lower() not in PICTURE_SUFFIXES:
        raise ValueError(f"the timeline must end in {', '.join(PICTURE_SUFFIXES)}, got {path.name}")
    out = io.BytesIO()
    draw_timeline(result, detector).savefig(out, format=path.suffix.lower()[1:], dpi=120)
    write_atomically(path, out.getvalue())


def draw_timeline(result: VideoResult, detector: VideoDetector) -> Figure:
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    labels = [name for name in detector.model.config.names if any(d.label == name for d in result.detections)]
    figure = Figure(figsize=(11, 1.6 + 0.42 * max(1, len(labels))), layout="constrained")
    axes = figure.add_subplot()
    colours = colormaps["tab10"]
    for row, label in enumerate(labels):
        for d in (d for d in result.detections if d.label == label):
            axes.barh(
                row,
                d.end - d.start,
                left=d.start,
                height=0.62,
                color=colours(row % 10),
                alpha=0.25 + 0.75 * d.score,
            )
            if d.end - d.start > 0.045 * max(result.duration_s, 1e-9):
                middle = (d.start + d.end) / 2
                axes.text(middle, row, f"{d.score:.2f}", ha="center", va="center", fontsize=7)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4 if labels else 0.5, -0.6)
    axes.set_xlim(0, max(result.duration_s, 1e-3))
    axes.xaxis.set_major_formatter(lambda s, _: _clock(s))
    axes.grid(axis="x", alpha=0.3)
    title = f"{Path(result.source).name}: {len(result.detections)} detections in {_clock(result.duration_s)}"
    if not result.complete:
        title += " (damaged: incomplete)"
    axes.set_title(title, fontsize=10, loc="left")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    return figure


def _clock(seconds: float) -> str:
    """63.5 -> 1:03.5; 3723 -> 1:02:03"""
    tenths = round(max(0.0, seconds) * 10)
    hours, rest = divmod(tenths, 36_000)
    minutes, rest = divmod(rest, 600)
    text = f"{hours}:{minutes:02d}:" if hours else f"{minutes}:"
    return text + (f"{rest / 10:04.1f}" if rest % 10 else f"{rest // 10:02d}")
