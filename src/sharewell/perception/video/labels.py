"""From the table that people keep (video, start, end, label) to annotations that training reads."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..tad.annotations import AnnotationError, VideoRecord, locate, read_label_csv
from .features import ExtractedFolder


@dataclass(frozen=True)
class LabelReport:
    """What was written and what was changed on the way, so that nothing happens in silence."""

    document: dict[str, Any]
    videos: Mapping[str, int]  # per subset
    actions: Mapping[str, int]  # per label
    clipped: tuple[str, ...]  # actions that ended after their video
    negatives: tuple[str, ...]  # videos without an action
    unlabelled: tuple[str, ...]  # features whose video the table does not name: left out


def convert_labels(table: Path, features: Path, *, test_share: float = 0.25, seed: int = 0) -> LabelReport:
    """``table``: CSV with the columns video, start, end, label (seconds) and optionally subset. ``features``:
    folder of ``sharewell tad extract``, which knows the durations.

    Videos without a subset are dealt to ``train`` and ``test`` by a hash of name and ``seed``, ``test_share``
    of them to test, at least one each. A row with a video alone says that nothing happens in it. Overlapping
    actions stay. Raises AnnotationError naming file, line and video for an empty or reversed action, one that
    starts after the end of its video, or a video without features.
    """
    if not 0 <= test_share < 1:
        raise ValueError(f"test_share must be in [0, 1), got {test_share}")
    folder = ExtractedFolder(features)
    settings = folder.settings()
    if settings is None:
        raise ValueError(f"{features} has no features.json: run sharewell tad extract first")
    known = dict(folder.records())
    records = read_label_csv(table)
    if not records:
        raise AnnotationError(f"{table.name}:1: names no video")
    database: dict[str, Any] = {}
    clipped: list[str] = []
    for video, record in records.items():
        # People write file names; features are called by the name without its ending.
        stem = video if video in known else Path(video).stem
        if stem not in known:
            raise AnnotationError(f"{locate(table, video)}: no features {stem}.npy in {features}")
        if stem in database:
            raise AnnotationError(f"{locate(table, video)}: the table names {stem} in two ways")
        duration = float(known[stem]["duration_s"])
        database[stem] = {
            "subset": record.subset,
            "duration": duration,
            "fps": settings.grid.fps,
            "annotations": _within(record, duration, table, video, clipped),
        }
    _deal({k: v for k, v in database.items() if not v["subset"]}, test_share, seed)
    return LabelReport(
        {"version": "sharewell", "database": database},
        Counter(entry["subset"] for entry in database.values()),
        Counter(a["label"] for entry in database.values() for a in entry["annotations"]),
        tuple(clipped),
        tuple(name for name, entry in database.items() if not entry["annotations"]),
        tuple(sorted(set(known) - set(database))),
    )


def _within(
    record: VideoRecord, duration: float, table: Path, video: str, clipped: list[str]
) -> list[dict[str, Any]]:
    out = []
    for action in record.annotations:
        if action.start >= duration:
            raise AnnotationError(
                f"{locate(table, video)}: {action.label} starts at {action.start:g} s, "
                f"the video ends at {duration:.2f} s"
            )
        end = min(action.end, duration)
        if end < action.end:
            clipped.append(f"{video}: {action.label} {action.start:g}-{action.end:g} s")
        out.append({"label": action.label, "segment": [action.start, end]})
    return out


def _deal(entries: Mapping[str, dict[str, Any]], test_share: float, seed: int) -> None:
    """Subsets that depend on the names alone: a new video moves no other but at the border."""

    def lot(name: str) -> bytes:
        return hashlib.sha256(f"{seed}:{name}".encode()).digest()

    names = sorted(entries, key=lot)
    test = round(test_share * len(names))
    if test_share > 0 and len(names) > 1:
        test = min(max(test, 1), len(names) - 1)
    for number, name in enumerate(names):
        entries[name]["subset"] = "test" if number < test else "train"
