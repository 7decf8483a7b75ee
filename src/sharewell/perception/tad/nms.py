"""Soft non-maximum suppression and voting in one dimension."""

from __future__ import annotations

import numpy as np


def iou_1d(segment: np.ndarray, segments: np.ndarray) -> np.ndarray:
    """Intersection over union of ``segment`` (2,) with each of ``segments`` [n, 2]; 0 of empty ones."""
    left = np.maximum(segment[0], segments[:, 0])
    right = np.minimum(segment[1], segments[:, 1])
    inside = np.maximum(right - left, 0)
    union = (segments[:, 1] - segments[:, 0]) + (segment[1] - segment[0]) - inside
    return np.divide(inside, union, out=np.zeros_like(inside), where=union > 0)


def soft_nms_1d(
    segments: np.ndarray,
    scores: np.ndarray,
    *,
    sigma: float = 0.5,
    min_score: float = 1e-3,
    max_out: int = 200,
) -> tuple[np.ndarray, np.ndarray]:
    """Gaussian soft-NMS (Bodla et al., arXiv 1704.04503, eq. 4): take the best, scale all others by
    ``exp(-iou^2 / sigma)``, and again.

    ``segments`` [n, 2], ``scores`` [n]. Returns the indices taken, best first, and their scores after decay.
    Ties go to the earlier start, then to the smaller index. It stops at ``max_out`` or when nothing is left
    above ``min_score``. Raises ValueError for wrong shapes or a NaN.
    """
    segments = np.asarray(segments, np.float64)
    left = np.array(scores, np.float64)
    if segments.ndim != 2 or segments.shape[1] != 2 or left.shape != (len(segments),):
        raise ValueError(f"segments must be [n, 2] with n scores, got {segments.shape} and {left.shape}")
    if np.isnan(segments).any() or np.isnan(left).any():
        raise ValueError("segments and scores must be numbers, got NaN")
    # Sorted by start, what overlaps a segment is one slice: hours of video cost no more per segment taken.
    order = np.argsort(segments[:, 0], kind="stable")
    segments, left = segments[order], left[order]
    starts = segments[:, 0]
    longest = float((segments[:, 1] - starts).max(initial=0.0))
    taken: list[int] = []
    kept: list[float] = []
    while len(left) and len(taken) < max_out:
        best = int(left.argmax())
        if left[best] <= min_score:
            break
        taken.append(int(order[best]))
        kept.append(float(left[best]))
        first = np.searchsorted(starts, starts[best] - longest, "left")
        last = np.searchsorted(starts, segments[best, 1], "right")
        left[first:last] *= np.exp(-(iou_1d(segments[best], segments[first:last]) ** 2) / sigma)
        left[best] = -np.inf
    return np.array(taken, np.int64), np.array(kept)


def vote(chosen: np.ndarray, segments: np.ndarray, scores: np.ndarray, threshold: float) -> np.ndarray:
    """Each chosen segment becomes the mean of all segments with IoU of at least ``threshold`` with it,
    weighted by score times IoU. Shapes [m, 2], [n, 2], [n]; returns [m, 2]."""
    out = np.array(chosen, np.float64)
    for row, segment in enumerate(out.copy()):
        iou = iou_1d(segment, segments)
        weight = np.where(iou >= threshold, scores * iou, 0.0)
        if weight.sum() > 0:
            out[row] = (weight[:, None] * segments).sum(axis=0) / weight.sum()
    return out
