"""Detections while the features arrive: windows that overlap by the network's receptive field, so that every
score is that of the whole recording, and soft-NMS on groups of candidates that nothing to come can touch.

Gaussian soft-NMS only lowers scores, so a candidate below the score that is asked for can neither be reported
nor lower another that is: it is dropped at once. What remains lies in groups around the actions. A group is
settled when ``guard_s`` seconds of silence have been evaluated behind its end.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np

from ..tad.decode import (
    Candidates,
    Detection,
    FeatureMeta,
    candidates,
    check_features,
    suppress,
    to_detections,
)
from ..tad.nms import iou_1d
from ..tad.windows import Detector, Window, receptive_field
from .features import FeatureGrid


@dataclass(frozen=True)
class StreamConfig:
    """``min_score``: of what is reported. ``core``: rows that are evaluated at a time (rounded up to the last
    stride of the model). ``lookahead``: rows behind the core that an evaluation waits for; None: the whole
    receptive field, which makes every score exact; fewer: sooner, and no longer exact. ``guard_s``: silence
    behind a group before it is settled (infinite: settle all at the end). ``patience_s``: a group longer than
    this is settled although it still grows, which bounds memory and delay."""

    min_score: float = 0.2
    core: int = 2048
    lookahead: int | None = None
    guard_s: float = math.inf
    patience_s: float = math.inf

    def __post_init__(self) -> None:
        if not 0 < self.min_score < 1:
            raise ValueError(f"min_score must be in (0, 1), got {self.min_score}")
        if not 1 <= self.core <= 1_000_000:
            raise ValueError(f"core must be in [1, 1000000] rows, got {self.core}")
        if self.lookahead is not None and not 0 <= self.lookahead <= 1_000_000:
            raise ValueError(f"lookahead must be None or in [0, 1000000] rows, got {self.lookahead}")
        for name in ("guard_s", "patience_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")


class StreamDetector:
    """Feed rows with :meth:`push`, end with :meth:`finish`; both return the detections that are settled by
    then, in order of their group's time. Holds one window of rows and the open candidates."""

    def __init__(self, model: Detector, grid: FeatureGrid, config: StreamConfig | None = None) -> None:
        self.model, self.grid, self.config = model, grid, config or StreamConfig()
        shape = model.config
        last = shape.strides[-1]
        self.edge = shape.padded(receptive_field(shape, model.backbone))
        ahead = self.edge if self.config.lookahead is None else min(self.edge, self.config.lookahead)
        self.ahead = -(-ahead // last) * last
        self.core = shape.padded(self.config.core)
        floor = max(self.config.min_score, shape.decode.min_score)
        self.decode = dataclasses.replace(
            shape.decode, min_score=floor, nms_min_score=floor, max_detections=1_000_000
        )
        self.rows = np.zeros((0, shape.c_in), np.float32)
        self.base = 0  # row number of rows[0]
        self.evaluated = 0  # rows whose outputs are known
        self.open = _empty()
        self.settled = _empty()  # not older than patience_s; still lowers what comes late

    @property
    def window_s(self) -> float:
        """Seconds that go through the network together."""
        return (self.edge + self.core + self.ahead) * self.grid.step_s

    @property
    def overlap_s(self) -> float:
        """Seconds of a window that the windows beside it see as well."""
        return (self.edge + self.ahead) * self.grid.step_s

    @property
    def latency_s(self) -> float:
        """Longest time from the end of an action, and of those that overlap it, to its report; the computing
        itself is not counted."""
        waiting = (self.core + self.ahead) * self.grid.step_s + self.grid.num_frames / self.grid.fps
        return waiting + self.config.guard_s

    @property
    def seen(self) -> int:
        """Rows so far."""
        return self.base + len(self.rows)

    def push(self, rows: np.ndarray) -> list[Detection]:
        """``rows``: [n, c_in]. Raises ValueError for another width, or values that are not finite."""
        check_features(rows, self.model.config.c_in)
        self.rows = np.concatenate([self.rows, np.asarray(rows, np.float32)])
        found: list[Detection] = []
        while self.seen >= self.evaluated + self.core + self.ahead:
            self._evaluate(self.evaluated + self.core, self.evaluated + self.core + self.ahead)
            found += self._settle(self.evaluated, None)
        return found

    def finish(self, duration_s: float | None = None) -> list[Detection]:
        """The rest. ``duration_s`` of the recording bounds the segments (None: what the rows cover)."""
        while self.evaluated < self.seen:
            core_end = min(self.seen, self.evaluated + self.core)
            self._evaluate(core_end, min(self.seen, core_end + self.ahead))
        return self._settle(math.inf, duration_s)

    def _evaluate(self, core_end: int, end: int) -> None:
        start = max(0, self.evaluated - self.edge)
        # The rows in memory are numbered from `base`, a multiple of the last stride, as every core start is.
        plan = Window(
            start - self.base,
            end - self.base,
            self.evaluated - self.base,
            core_end - self.base,
            self.model.config.padded(end - start),
        )
        found = candidates(plan.run(self.model, self.rows), self.decode, self.evaluated)[0]
        self.open = _join(self.open, found)
        self.evaluated = core_end
        keep = max(0, self.evaluated - self.edge)
        self.rows, self.base = self.rows[keep - self.base :], keep

    def _settle(self, horizon: float, duration_s: float | None) -> list[Detection]:
        """Suppress the groups that end ``guard_s`` before the row ``horizon``."""
        guard = self.config.guard_s / self.grid.step_s
        patience = self.config.patience_s / self.grid.step_s
        done = np.zeros(len(self.open.scores), bool)
        out: list[Detection] = []
        for group in _groups(self.open.segments):
            start, end = self.open.segments[group, 0].min(), self.open.segments[group, 1].max()
            if horizon < math.inf and end + guard > horizon and start + patience > horizon:
                continue
            done[group] = True
            out += self._suppress(_take(self.open, group), duration_s)
        self.open = _take(self.open, ~done)
        recent = self.settled.segments[:, 1] > self.evaluated - max(self.edge, min(patience, 8 * self.edge))
        self.settled = _take(self.settled, recent)
        return out

    def _suppress(self, group: Candidates, duration_s: float | None) -> list[Detection]:
        scores = group.scores.copy()
        for segment, cls in zip(self.settled.segments, self.settled.classes, strict=True):
            overlap = iou_1d(segment, group.segments)
            same = np.ones(len(scores), bool) if self.decode.class_agnostic else group.classes == cls
            scores *= np.where(same, np.exp(-(overlap**2) / self.decode.nms_sigma), 1.0)
        left = suppress(Candidates(group.segments, scores, group.classes), self.decode)
        left = _take(left, left.scores > self.decode.nms_min_score)
        if math.isfinite(self.config.guard_s):  # else everything is settled at the end, at once
            self.settled = _join(self.settled, left)
        meta = FeatureMeta(self.grid.fps, self.grid.stride, self.grid.num_frames, duration_s)
        return sorted(
            to_detections(left, meta, self.seen, self.model.config.names), key=lambda d: (d.start, d.end)
        )


def _empty() -> Candidates:
    return Candidates(np.zeros((0, 2)), np.zeros(0), np.zeros(0, np.int64))


def _join(a: Candidates, b: Candidates) -> Candidates:
    return Candidates(
        np.concatenate([a.segments, b.segments]),
        np.concatenate([a.scores, b.scores]),
        np.concatenate([a.classes, b.classes]),
    )


def _take(a: Candidates, which: np.ndarray) -> Candidates:
    return Candidates(a.segments[which], a.scores[which], a.classes[which])


def _groups(segments: np.ndarray) -> list[np.ndarray]:
    """Indices of the segments [n, 2] whose union has no gap, group by group in order of time."""
    if not len(segments):
        return []
    order = np.argsort(segments[:, 0], kind="stable")
    reach = np.maximum.accumulate(segments[order, 1])
    breaks = np.flatnonzero(segments[order, 0][1:] > reach[:-1]) + 1
    # Within a group the order of arrival is kept: ties in soft-NMS then fall as they do over the whole.
    return [np.sort(part) for part in np.split(order, breaks)]
