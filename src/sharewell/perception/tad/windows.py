"""Long recordings in windows: which rows go through the network together, and which outputs count."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from .config import Backbone, LiquidTADConfig
from .model import LevelOutput


class Detector(Protocol):
    """What runs windows: a TADModel, or the same network in another runtime."""

    config: LiquidTADConfig
    backbone: Backbone

    def infer(self, features: Tensor, mask: Tensor) -> list[LevelOutput]:
        """As TADModel.forward in evaluation mode, without gradients; float32 in, any device out."""
        ...


def as_tensor(rows: np.ndarray | Tensor) -> Tensor:
    """A tensor of its own memory: arrays mapped from disk may not be written to."""
    return rows if isinstance(rows, Tensor) else torch.from_numpy(np.array(rows))


def receptive_field(config: LiquidTADConfig, backbone: str = "liquid") -> int:
    """How many rows to each side an output can depend on, the widest level counted.

    A convolution of three rows at stride s reaches s rows; so does the pooling that leads from s to 2 s.
    """
    per_block = {
        "liquid": 1 + max(0, config.kernel_size - 1),
        "actionformer": 1 + config.window // 2,
        "maxpool": 0,
    }
    reach = config.arch[0] + config.arch[1] * per_block[backbone]
    for level in range(1, config.levels):
        stride = 2**level
        # ActionFormer's queries come from a convolution at the stride before, its attention works after.
        reach += stride // 2 + per_block[backbone] * stride
    return reach + 3 * config.strides[-1]  # the heads


@dataclass(frozen=True)
class Window:
    """Rows ``[start, end)`` of a recording go in, outputs for ``[core_start, core_end)`` come out."""

    start: int
    end: int
    core_start: int
    core_end: int
    padded: int

    def run(self, model: Detector, feats: np.ndarray | Tensor) -> list[LevelOutput]:
        """The levels' outputs within the core, batch of one. Evaluation, without gradients."""
        rows = as_tensor(feats[self.start : self.end])
        x = torch.zeros(1, model.config.c_in, self.padded)
        x[0, :, : self.end - self.start] = rows.T
        mask = torch.zeros(1, 1, self.padded)
        mask[:, :, : self.end - self.start] = 1
        return [self._core(level, 2**depth) for depth, level in enumerate(model.infer(x, mask))]

    def _core(self, level: LevelOutput, stride: int) -> LevelOutput:
        first = (self.core_start - self.start) // stride
        last = -(-(self.core_end - self.start) // stride)
        cut = slice(first, last)
        return LevelOutput(level.logits[:, :, cut], level.offsets[:, :, cut], level.mask[:, :, cut])


def window_plan(model: Detector, rows: int, window: int | None) -> Iterator[Window]:
    """Windows of at most ``window`` rows whose cores cover ``rows`` without gap or overlap.

    Starts are multiples of the last stride, so that the points of every level are those of the whole.
    Raises ValueError when a window could not hold its own edges.
    """
    config = model.config
    last = config.strides[-1]
    if window is None or rows <= window:
        yield Window(0, rows, 0, rows, config.padded(rows))
        return
    edge = config.padded(receptive_field(config, model.backbone))
    core = window // last * last - 2 * edge
    if core < last:
        raise ValueError(f"window must be at least {2 * edge + last} rows for this model, got {window}")
    for core_start in range(0, rows, core):
        core_end = min(rows, core_start + core)
        start, end = max(0, core_start - edge), min(rows, core_end + edge)
        yield Window(start, end, core_start, core_end, config.padded(end - start))
