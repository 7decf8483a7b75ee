"""What training minimises: focal loss over the points, distance-IoU loss over the positive ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .model import LevelOutput
from .targets import Targets


def focal_loss(logits: Tensor, targets: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Sigmoid focal loss of every element (Lin et al., arXiv 1708.02002, eq. 5); targets in [0, 1]."""
    p = logits.sigmoid()
    cross_entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    missed = p * (1 - targets) + (1 - p) * targets
    weight = alpha * targets + (1 - alpha) * (1 - targets)
    return weight * missed**gamma * cross_entropy


def diou_loss_1d(offsets: Tensor, targets: Tensor, eps: float = 1e-8) -> Tensor:
    """``1 - IoU + (distance of the centres / length of what encloses both)^2`` (Zheng et al., arXiv
    1911.08287, in one dimension). Both [n, 2]: non-negative distances from one point to start and end."""
    left, right = offsets.unbind(-1)
    left_true, right_true = targets.unbind(-1)
    inside = torch.minimum(left, left_true) + torch.minimum(right, right_true)
    union = (left + right) + (left_true + right_true) - inside
    enclosing = torch.maximum(left, left_true) + torch.maximum(right, right_true)
    centres = 0.5 * (right - left - right_true + left_true)
    return 1 - inside / union.clamp(min=eps) + (centres / enclosing.clamp(min=eps)) ** 2


@dataclass(frozen=True)
class LossSums:
    """Sums over a batch, and the number of positive points; divide by a normaliser."""

    classification: Tensor
    regression: Tensor
    positives: Tensor


def loss_sums(levels: Sequence[LevelOutput], targets: Targets, label_smoothing: float = 0.0) -> LossSums:
    """Focal loss summed over the valid points, DIoU over the positive ones. In float32 whatever the
    precision of the network; gradients reach both heads even without a positive point."""
    logits = torch.cat([level.logits for level in levels], dim=2).float().transpose(1, 2)
    offsets = torch.cat([level.offsets for level in levels], dim=2).float().transpose(1, 2)
    valid = torch.cat([level.mask for level in levels], dim=2)[:, 0] > 0
    classes = targets.classes.to(logits.device)
    positive = targets.positive.to(logits.device) & valid
    smooth = classes * (1 - label_smoothing) + label_smoothing / (classes.shape[-1] + 1)
    classification = focal_loss(logits[valid], smooth[valid]).sum()
    wanted = targets.offsets.to(logits.device)[positive]
    regression = diou_loss_1d(offsets[positive], wanted).sum() + offsets.sum() * 0
    return LossSums(classification, regression, positive.sum())
