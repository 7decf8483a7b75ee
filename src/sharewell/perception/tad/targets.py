"""Which point of which level answers for which action, and what it should say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import LiquidTADConfig


@dataclass(frozen=True)
class Points:
    """All points of a pyramid: ``at`` [n] in feature rows, ``stride`` [n], ``low`` and ``high`` [n], the
    distances to the farther end that the point answers for."""

    at: Tensor
    stride: Tensor
    low: Tensor
    high: Tensor


def points(config: LiquidTADConfig, rows: int) -> Points:
    """Point i of the level with stride s stands at row ``i s``; level after level."""
    at, stride, low, high = [], [], [], []
    for s, (near, far) in zip(config.strides, config.regression_ranges, strict=True):
        count = rows // s
        at.append(torch.arange(count, dtype=torch.float32) * s)
        for values, value in ((stride, float(s)), (low, near), (high, far)):
            values.append(torch.full((count,), value))
    return Points(*(torch.cat(parts) for parts in (at, stride, low, high)))


@dataclass(frozen=True)
class Targets:
    """``classes`` [n, n_cls], 1 for each class a point stands for; ``offsets`` [n, 2] in strides, defined
    where the point is positive."""

    classes: Tensor
    offsets: Tensor

    @property
    def positive(self) -> Tensor:
        """bool [n]."""
        return self.classes.sum(dim=-1) > 0


def assign(grid: Points, segments: Tensor, labels: Tensor, n_cls: int, center_radius: float = 1.5) -> Targets:
    """Targets of one recording (ActionFormer, arXiv 2202.07925, sec. 3.3).

    ``segments`` [m, 2] in rows, ``labels`` [m]. A point is positive for a segment when it lies inside, within
    ``center_radius`` strides of the middle, and its distance to the farther end is in the level's range (ends
    included). Among several segments the shortest wins; all that are as short within 1e-3 rows give their
    class, the first of them the offsets.
    """
    count = len(grid.at)
    if len(segments) == 0:
        return Targets(torch.zeros(count, n_cls), torch.zeros(count, 2))
    segments = segments.float()
    at = grid.at[:, None]
    left = at - segments[None, :, 0]
    right = segments[None, :, 1] - at
    middle = segments.mean(dim=1)[None]
    reach = grid.stride[:, None] * center_radius
    # Inside the segment and near its middle, in one: the nearer of both bounds on each side.
    near = torch.minimum(
        at - torch.maximum(middle - reach, segments[None, :, 0]),
        torch.minimum(middle + reach, segments[None, :, 1]) - at,
    )
    far = torch.maximum(left, right)
    eligible = (near > 0) & (far >= grid.low[:, None]) & (far <= grid.high[:, None])
    length = (segments[:, 1] - segments[:, 0])[None].expand_as(eligible)
    length = length.masked_fill(~eligible, float("inf"))
    shortest, index = length.min(dim=1)
    tied = (length <= shortest[:, None] + 1e-3) & eligible
    one_hot = torch.nn.functional.one_hot(labels.long(), n_cls).float()
    classes = (tied.float() @ one_hot).clamp(max=1.0)
    chosen = torch.arange(count), index
    offsets = torch.stack((left[chosen], right[chosen]), dim=1) / grid.stride[:, None]
    return Targets(classes, offsets)


def batch_targets(
    config: LiquidTADConfig, rows: int, segments: Sequence[Tensor], labels: Sequence[Tensor]
) -> Targets:
    """Of a padded batch: ``classes`` [batch, n, n_cls], ``offsets`` [batch, n, 2]."""
    grid = points(config, rows)
    found = [
        assign(grid, s, c, config.n_cls, config.center_radius) for s, c in zip(segments, labels, strict=True)
    ]
    return Targets(torch.stack([t.classes for t in found]), torch.stack([t.offsets for t in found]))
