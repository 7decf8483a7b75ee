"""Annotation and prediction files in ActivityNet's JSON."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .decode import Detection


@dataclass(frozen=True)
class Annotation:
    """One labelled segment, in seconds."""

    start: float
    end: float
    label: str


@dataclass(frozen=True)
class VideoRecord:
    """One entry of the database. ``fps`` is None where the file does not say."""

    video_id: str
    subset: str
    duration_s: float | None
    fps: float | None
    annotations: tuple[Annotation, ...]


class AnnotationError(ValueError):
    """An annotation file that cannot be used; the message names the file, the video and the line."""


class _Lines:
    """Finds the line of a video's entry, to name it in errors."""

    def __init__(self, path: Path, text: str) -> None:
        self.path, self.text = path, text

    def at(self, video_id: str) -> str:
        place = self.text.find(json.dumps(video_id) + ":")
        if place < 0:
            place = self.text.find(json.dumps(video_id))
        return f"{self.path.name}:{self.text.count(chr(10), 0, max(place, 0)) + 1}: video {video_id}"

    def fail(self, video_id: str, what: str) -> AnnotationError:
        return AnnotationError(f"{self.at(video_id)}: {what}")


def _load_json(path: str | Path, key: str) -> tuple[Path, str, Mapping[str, Any]]:
    path = Path(path)
    text = path.read_text(encoding="utf-8")
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise AnnotationError(f"{path.name}:{error.lineno}: no valid JSON: {error.msg}") from None
    inside = document.get(key) if isinstance(document, dict) else None
    if not isinstance(inside, dict):
        raise AnnotationError(f'{path.name}:1: must be an object with "{key}": {{video: ...}}')
    return path, text, inside


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if np.isfinite(number) else None


def _ends(segment: object) -> tuple[float, float] | None:
    numbers = [_number(value) for value in segment] if isinstance(segment, list | tuple) else []
    if len(numbers) != 2 or numbers[0] is None or numbers[1] is None:
        return None
    return numbers[0], numbers[1]


def read_annotations(path: str | Path, *, tolerance_s: float = 1e-3) -> dict[str, VideoRecord]:
    """Read ``{"database": {id: {"subset", "duration", "fps", "annotations": [{"label", "segment"}]}}}``.

    Annotations of a video that repeat another within ``tolerance_s`` at both ends and the label are read
    once; overlapping ones stay. Raises AnnotationError naming file, line and video for a segment that does
    not end after it starts, starts before 0 or after the duration, or is not two numbers.
    """
    file, text, database = _load_json(path, "database")
    lines = _Lines(file, text)
    out = {}
    for video_id, entry in database.items():
        if not isinstance(entry, dict):
            raise lines.fail(video_id, "must be an object")
        duration, fps, frames = (
            _positive(entry, name, video_id, lines) for name in ("duration", "fps", "frame")
        )
        if fps is None and frames is not None and duration is not None:
            fps = frames / duration  # OpenTAD's files count frames instead
        subset = str(entry.get("subset", "")).lower()
        found: list[Annotation] = []
        items = entry.get("annotations", [])
        if not isinstance(items, list):
            raise lines.fail(video_id, "annotations must be a list")
        for item in items:
            annotation = _annotation(item, video_id, duration, lines)
            if not any(_same(annotation, other, tolerance_s) for other in found):
                found.append(annotation)
        out[video_id] = VideoRecord(video_id, subset, duration, fps, tuple(found))
    return out


def _positive(entry: Mapping[str, Any], name: str, video_id: str, lines: _Lines) -> float | None:
    if entry.get(name) is None:
        return None
    value = _number(entry[name])
    if value is None or value <= 0:
        raise lines.fail(video_id, f"{name} must be a positive number, got {entry[name]!r}")
    return value


def _annotation(item: object, video_id: str, duration: float | None, lines: _Lines) -> Annotation:
    if not isinstance(item, dict) or not isinstance(item.get("label"), str) or not item["label"]:
        raise lines.fail(video_id, f"an annotation needs a label and a segment, got {item!r}")
    segment = item.get("segment")
    ends = _ends(segment)
    if ends is None:
        raise lines.fail(video_id, f"segment must be [start, end] in seconds, got {segment!r}")
    start, end = ends
    if end <= start or start < 0:
        raise lines.fail(video_id, f"a segment must end after it starts, at 0 or later, got {segment!r}")
    if duration is not None and start >= duration:
        raise lines.fail(video_id, f"segment {segment!r} starts after the video ends at {duration} s")
    return Annotation(start, end, item["label"])


def _same(a: Annotation, b: Annotation, tolerance_s: float) -> bool:
    return a.label == b.label and abs(a.start - b.start) <= tolerance_s and abs(a.end - b.end) <= tolerance_s


def read_label_csv(path: str | Path) -> dict[str, VideoRecord]:
    """Read a table with the columns video, start, end, label (seconds) and, if given, subset, fps, duration.

    A video without actions is a row with empty start, end and label. Raises AnnotationError naming file,
    line and video.
    """
    path = Path(path)
    found: dict[str, dict[str, Any]] = {}
    with path.open(encoding="utf-8-sig", newline="") as file:
        table = csv.DictReader(file)
        missing = {"video", "start", "end", "label"} - {str(name).strip() for name in table.fieldnames or ()}
        if missing:
            raise AnnotationError(f"{path.name}:1: columns must include {', '.join(sorted(missing))}")
        for raw in table:
            row = {str(k).strip(): (v or "").strip() for k, v in raw.items() if isinstance(v, str | None)}
            where = f"{path.name}:{table.line_num}: video {row['video'] or '?'}"
            if not row["video"]:
                raise AnnotationError(f"{where}: video must be given")
            entry = found.setdefault(row["video"], {"subset": "", "items": []})
            entry["subset"] = row.get("subset", "").lower() or entry["subset"]
            for name in ("fps", "duration"):
                if row.get(name):
                    value = _number(row[name])
                    if value is None or value <= 0:
                        raise AnnotationError(f"{where}: {name} must be a positive number, got {row[name]!r}")
                    entry[name] = value
            if row["start"] or row["end"] or row["label"]:
                start, end = _number(row["start"]), _number(row["end"])
                if not row["label"] or start is None or end is None or start < 0 or end <= start:
                    raise AnnotationError(
                        f"{where}: a row needs a label and 0 <= start < end, got "
                        f"{row['label']!r} {row['start']!r} {row['end']!r}"
                    )
                item = Annotation(start, end, row["label"])
                if not any(_same(item, other, 1e-3) for other in entry["items"]):
                    entry["items"].append(item)
    return {
        video: VideoRecord(video, e["subset"], e.get("duration"), e.get("fps"), tuple(e["items"]))
        for video, e in found.items()
    }


def read_records(path: str | Path) -> dict[str, VideoRecord]:
    """A ``.csv`` by :func:`read_label_csv`, anything else by :func:`read_annotations`."""
    return read_label_csv(path) if Path(path).suffix.lower() == ".csv" else read_annotations(path)


def locate(path: str | Path, video_id: str) -> str:
    """``file:line: video ID``, for errors that are found after the file was read."""
    path = Path(path)
    text = path.read_text(encoding="utf-8")
    if path.suffix.lower() == ".csv":
        lines = [n for n, line in enumerate(text.splitlines(), 1) if line.startswith(video_id)]
        return f"{path.name}:{lines[0] if lines else 1}: video {video_id}"
    return _Lines(path, text).at(video_id)


def labels_of(records: Iterable[VideoRecord]) -> tuple[str, ...]:
    """All labels that occur, in alphabetical order."""
    return tuple(sorted({a.label for record in records for a in record.annotations}))


def read_predictions(path: str | Path) -> dict[str, list[Detection]]:
    """Read ``{"results": {id: [{"label", "segment", "score"}]}}``. Raises AnnotationError naming file, line
    and video."""
    file, text, results = _load_json(path, "results")
    lines = _Lines(file, text)
    out = {}
    for video_id, items in results.items():
        if not isinstance(items, list):
            raise lines.fail(video_id, "must be a list of predictions")
        found = []
        for item in items:
            known = item if isinstance(item, dict) else {}
            ends, score, label = _ends(known.get("segment")), _number(known.get("score")), known.get("label")
            if ends is None or score is None or not isinstance(label, str):
                raise lines.fail(video_id, f"a prediction needs label, segment and score, got {item!r}")
            start, end = ends
            found.append(Detection(start, end, label, score))
        out[video_id] = found
    return out


def predictions_document(detections: Mapping[str, Sequence[Detection]]) -> dict[str, Any]:
    """The JSON of ActivityNet's submission format."""
    return {
        "version": "VERSION 1.3",
        "external_data": {},
        "results": {
            video_id: [{"label": d.label, "segment": [d.start, d.end], "score": d.score} for d in found]
            for video_id, found in detections.items()
        },
    }


def write_json(path: str | Path, document: Any) -> Path:
    """Write in one atomic replace."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    beside.replace(path)
    return path
