"""From the outputs of the levels to detections in seconds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .config import DecodeConfig, require
from .model import LevelOutput
from .nms import soft_nms_1d, vote
from .windows import Detector, Window, as_tensor, window_plan


@dataclass(frozen=True)
class Detection:
    """``label`` happens from ``start`` to ``end`` (seconds), with ``score`` in (0, 1]."""

    start: float
    end: float
    label: str
    score: float


@dataclass(frozen=True)
class FeatureMeta:
    """Where feature rows lie in time: row i covers the ``num_frames`` frames from ``i * stride`` on.

    ``fps``: frames (or samples) a second; ``stride`` and ``num_frames`` may be fractions after resizing.
    ``duration_s``: of the recording; None: what the rows cover.
    """

    fps: float
    stride: float
    num_frames: float
    duration_s: float | None = None
    video_id: str = ""

    def __post_init__(self) -> None:
        require(self.fps > 0, f"fps of {self.video_id or 'features'}", "positive", self.fps)
        require(self.stride > 0, "stride", "positive", self.stride)
        require(self.num_frames > 0, "num_frames", "positive", self.num_frames)
        ok = self.duration_s is None or self.duration_s > 0
        require(ok, f"duration_s of {self.video_id or 'features'}", "positive", self.duration_s)

    def to_seconds(self, rows: np.ndarray) -> np.ndarray:
        """Time of the centre of a (fractional) row."""
        return (rows * self.stride + 0.5 * self.num_frames) / self.fps

    def to_rows(self, seconds: np.ndarray) -> np.ndarray:
        """Inverse of :meth:`to_seconds`."""
        return seconds * self.fps / self.stride - 0.5 * self.num_frames / self.stride

    def end_s(self, rows: int) -> float:
        """Duration, or what ``rows`` rows cover."""
        if self.duration_s is not None:
            return self.duration_s
        return ((rows - 1) * self.stride + self.num_frames) / self.fps


@dataclass(frozen=True)
class Candidates:
    """Before suppression: ``segments`` [n, 2] in rows, ``scores`` [n], class indices ``classes`` [n]."""

    segments: np.ndarray
    scores: np.ndarray
    classes: np.ndarray


def candidates(levels: Sequence[LevelOutput], config: DecodeConfig, first_row: int = 0) -> list[Candidates]:
    """The points of each sample that score above the floor, at most ``top_k_per_level`` a level.

    Point i of level l stands at row ``first_row + i 2^l``; its segment is ``[t - o_1 2^l, t + o_2 2^l]``.
    """
    batch = levels[0].logits.shape[0]
    out = []
    for sample in range(batch):
        parts = [
            _level_candidates(
                level.logits[sample], level.offsets[sample], level.mask[sample, 0], 2**depth, config
            )
            for depth, level in enumerate(levels)
        ]
        segments, scores, classes = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        out.append(Candidates(segments + first_row, scores, classes))
    return out


def _level_candidates(
    logits: Tensor, offsets: Tensor, mask: Tensor, stride: int, config: DecodeConfig
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    scores = (logits.float().sigmoid() * mask.float()).T  # [rows, n_cls]
    n_cls = scores.shape[1]
    flat = scores.reshape(-1)
    above = torch.nonzero(flat > config.min_score)[:, 0]
    if len(above) > config.top_k_per_level:
        # Stable, so that ties fall the same way on every machine.
        order = torch.sort(flat[above], descending=True, stable=True).indices[: config.top_k_per_level]
        above = above[order]
    point, cls = above // n_cls, above % n_cls
    reach = offsets.double().T[point] * stride  # [n, 2]
    at = point.double() * stride
    segments = torch.stack((at - reach[:, 0], at + reach[:, 1]), dim=1)
    long = (segments[:, 1] - segments[:, 0]) > config.min_length
    segments, cls, kept = segments[long], cls[long], flat[above][long]
    return segments.cpu().numpy(), kept.double().cpu().numpy(), cls.cpu().numpy()


def suppress(found: Candidates, config: DecodeConfig) -> Candidates:
    """Soft-NMS within each class (or over all, ``class_agnostic``), then the best of all classes."""
    groups = (
        [np.arange(len(found.scores))]
        if config.class_agnostic
        else [np.flatnonzero(found.classes == cls) for cls in np.unique(found.classes)]
    )
    segments, scores, classes = [], [], []
    for group in groups:
        index, kept = soft_nms_1d(
            found.segments[group],
            found.scores[group],
            sigma=config.nms_sigma,
            min_score=config.nms_min_score,
            max_out=config.max_detections,
        )
        chosen = found.segments[group][index]
        if config.class_agnostic and config.voting_iou is not None and len(chosen):
            chosen = vote(chosen, found.segments[group], found.scores[group], config.voting_iou)
        segments.append(chosen)
        scores.append(kept)
        classes.append(found.classes[group][index])
    if not segments:
        return found
    every = np.concatenate(scores)
    order = np.argsort(-every, kind="stable")[: config.max_detections]
    return Candidates(np.concatenate(segments)[order], every[order], np.concatenate(classes)[order])


def to_detections(found: Candidates, meta: FeatureMeta, rows: int, names: Sequence[str]) -> list[Detection]:
    """In seconds, clipped to the recording, best first; what is empty after clipping is left out."""
    seconds = np.clip(meta.to_seconds(found.segments), 0.0, meta.end_s(rows))
    return [
        Detection(float(start), float(end), names[int(cls)], float(score))
        for (start, end), cls, score in zip(seconds, found.classes, found.scores, strict=True)
        if end > start
    ]


def check_features(features: np.ndarray | Tensor, width: int, video_id: str = "") -> None:
    """Raises ValueError naming the video for a wrong shape, no rows, or NaN and infinite values."""
    who = f"features of {video_id}" if video_id else "features"
    if features.ndim != 2 or features.shape[1] != width:
        raise ValueError(f"{who} must have shape [rows, {width}], got {tuple(features.shape)}")
    if len(features) == 0:
        raise ValueError(f"{who} must have at least one row, got none")
    # Row by row in blocks: a file mapped from disk is not loaded whole.
    for first in range(0, len(features), 65536):
        part = as_tensor(features[first : first + 65536])
        if not torch.isfinite(part).all():
            bad = first + int(torch.nonzero(~torch.isfinite(part).all(dim=1))[0, 0])
            raise ValueError(f"{who} must be finite, row {bad} holds NaN or infinity")


def predict(
    model: Detector,
    feats: np.ndarray | Tensor,
    meta: FeatureMeta,
    *,
    window: int | None = 8192,
    decode: DecodeConfig | None = None,
) -> list[Detection]:
    """Detections in one recording, best first.

    ``feats``: [rows, c_in], float; a memory-mapped array is read piece by piece. Recordings of more than
    ``window`` rows go through the network in windows that overlap by its receptive field, so that memory
    stays that of one window and the scores stay those of the whole (None: all at once); the limits on
    candidates and detections then count for each window. Raises ValueError naming the video for a wrong
    width, no rows, or values that are not finite.
    """
    config = decode or model.config.decode
    check_features(feats, model.config.c_in, meta.video_id)
    found = [
        _window_candidates(model, feats, plan, config) for plan in window_plan(model, len(feats), window)
    ]
    merged = Candidates(
        *(
            np.concatenate([getattr(part, name) for part in found])
            for name in ("segments", "scores", "classes")
        )
    )
    # The limit is meant for a recording of ordinary length; hours may hold more.
    config = dataclasses.replace(config, max_detections=config.max_detections * len(found))
    return to_detections(suppress(merged, config), meta, len(feats), model.config.names)


def _window_candidates(
    model: Detector, feats: np.ndarray | Tensor, plan: Window, config: DecodeConfig
) -> Candidates:
    levels = plan.run(model, feats)
    return candidates(levels, config, plan.core_start)[0]


def fuse_video_scores(
    detections: Sequence[Detection], class_scores: Mapping[str, float], top: int = 2
) -> list[Detection]:
    """Name class-agnostic detections with the ``top`` classes of a video classifier (ActivityNet's custom):
    each becomes ``top`` detections of score ``sqrt(class * detection)``. Best first."""
    best = sorted(class_scores.items(), key=lambda item: -item[1])[:top]
    named = [
        Detection(d.start, d.end, label, float(np.sqrt(score * d.score)))
        for d in detections
        for label, score in best
    ]
    return sorted(named, key=lambda d: -d.score)
