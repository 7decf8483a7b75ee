"""Mean average precision over thresholds of temporal IoU, by the rules of the ActivityNet toolkit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .annotations import Annotation, read_annotations, read_predictions
from .decode import Detection

THUMOS_TIOUS = (0.3, 0.4, 0.5, 0.6, 0.7)
ACTIVITYNET_TIOUS = tuple(float(t) for t in np.linspace(0.5, 0.95, 10))


@dataclass(frozen=True)
class MapResult:
    """``ap[label]`` holds the average precision at each of ``tious``; all in [0, 1].

    ``unknown`` counts predictions whose label does not occur in the ground truth; they are not scored.
    """

    tious: tuple[float, ...]
    ap: Mapping[str, np.ndarray]
    unknown: int = 0

    @property
    def map(self) -> np.ndarray:
        """Mean over the classes, one value per threshold."""
        return np.stack(list(self.ap.values())).mean(axis=0)

    @property
    def average(self) -> float:
        """Mean over classes, then thresholds: the figure that papers print."""
        return float(self.map.mean())


def tiou(segment: np.ndarray, segments: np.ndarray) -> np.ndarray:
    """Temporal IoU of ``segment`` (2,) with ``segments`` [n, 2]."""
    inside = (np.minimum(segment[1], segments[:, 1]) - np.maximum(segment[0], segments[:, 0])).clip(0)
    union = (segments[:, 1] - segments[:, 0]) + (segment[1] - segment[0]) - inside
    with np.errstate(invalid="ignore"):  # 0 / 0 of two empty segments
        return inside.astype(float) / union


def interpolated_ap(precision: np.ndarray, recall: np.ndarray) -> float:
    """Area under the precision-recall curve after precision is made non-increasing (VOC 2010)."""
    precision = np.concatenate(([0.0], precision, [0.0]))
    recall = np.concatenate(([0.0], recall, [1.0]))
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    steps = np.flatnonzero(recall[1:] != recall[:-1]) + 1
    return float(np.sum((recall[steps] - recall[steps - 1]) * precision[steps]))


def average_precision(
    truth: Mapping[str, np.ndarray],
    videos: Sequence[str],
    segments: np.ndarray,
    scores: np.ndarray,
    tious: np.ndarray,
) -> np.ndarray:
    """Of one class. ``truth``: video -> segments [m, 2]; predictions: ``videos``, ``segments`` [n, 2],
    ``scores`` [n]. Returns [thresholds].

    Predictions in order of score (numpy's ``argsort()[::-1]``, so that ties fall as in the toolkit) each take
    the free ground truth of highest IoU, if that reaches the threshold; else they are false positives.
    """
    if len(scores) == 0:
        return np.zeros(len(tious))
    order = scores.argsort()[::-1]
    positives = sum(len(found) for found in truth.values())
    free = {video: np.ones((len(tious), len(found)), bool) for video, found in truth.items()}
    hit = np.zeros((len(tious), len(order)), bool)
    for rank, index in enumerate(order):
        video = videos[int(index)]
        if video not in truth:
            continue
        overlap = tiou(segments[index], truth[video])
        for candidate in overlap.argsort()[::-1]:
            # A threshold is settled once the best free ground truth is found. The IoU of two empty segments
            # is NaN, which is not below any threshold: it matches, as in the toolkit.
            wins = ~hit[:, rank] & ~(overlap[candidate] < tious) & free[video][:, candidate]
            hit[wins, rank] = True
            free[video][wins, candidate] = False
    true = np.cumsum(hit, axis=1).astype(float)
    false = np.cumsum(~hit, axis=1).astype(float)
    recall = true / positives
    precision = true / (true + false)
    return np.array([interpolated_ap(p, r) for p, r in zip(precision, recall, strict=True)])


def mean_average_precision(
    truth: Mapping[str, Sequence[Annotation]],
    predictions: Mapping[str, Sequence[Detection]],
    tious: Sequence[float] = THUMOS_TIOUS,
) -> MapResult:
    """Both by video. Raises ValueError without any ground truth or for thresholds outside (0, 1]."""
    if not len(tious) or not all(0 < t <= 1 for t in tious):
        raise ValueError(f"tious must be thresholds in (0, 1], got {list(tious)}")
    by_class: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for video, items in truth.items():
        for item in items:
            by_class.setdefault(item.label, {}).setdefault(video, []).append((item.start, item.end))
    if not by_class:
        raise ValueError("the ground truth must hold at least one annotation, got none")
    found: dict[str, list[tuple[str, float, float, float]]] = {label: [] for label in by_class}
    unknown = 0
    for video, detections in predictions.items():
        for d in detections:
            if d.label in found:
                found[d.label].append((video, d.start, d.end, d.score))
            else:
                unknown += 1
    thresholds = np.asarray(tious, float)
    ap = {}
    for label in sorted(by_class):
        rows = found[label]
        segments = np.array([row[1:3] for row in rows], float).reshape(-1, 2)
        scores = np.array([row[3] for row in rows], float)
        actual = {video: np.array(items, float) for video, items in by_class[label].items()}
        ap[label] = average_precision(actual, [row[0] for row in rows], segments, scores, thresholds)
    return MapResult(tuple(float(t) for t in tious), ap, unknown)


def evaluate_map(
    gt_json: str | Path,
    pred_json: str | Path,
    tious: Sequence[float] = THUMOS_TIOUS,
    *,
    subset: str | None = None,
) -> MapResult:
    """mAP of a prediction file against the videos of ``subset`` (None: all) of an annotation file.

    Ground truth that repeats within 1e-3 s counts once. Raises AnnotationError for a file that cannot be
    read, ValueError when the subset has no annotations.
    """
    records = read_annotations(gt_json)
    chosen = {
        video: record.annotations
        for video, record in records.items()
        if subset is None or record.subset == subset.lower()
    }
    if not any(chosen.values()):
        raise ValueError(f"subset must name videos with annotations in {Path(gt_json).name}, got {subset!r}")
    return mean_average_precision(chosen, read_predictions(pred_json), tious)


def parse_tious(text: str) -> tuple[float, ...]:
    """``0.3:0.7:0.1`` (first, last, step) or ``0.3,0.5``. Raises ValueError for anything else."""
    try:
        if ":" in text:
            first, last, step = (float(part) for part in text.split(":"))
            values = tuple(float(v) for v in np.round(np.arange(first, last + step / 2, step), 10))
        else:
            values = tuple(float(part) for part in text.split(","))
    except (ValueError, ZeroDivisionError):
        values = ()
    if not values or not all(0 < v <= 1 for v in values):
        raise ValueError(f"tiou must be like 0.3:0.7:0.1 or 0.5,0.75 within (0, 1], got {text!r}")
    return values
