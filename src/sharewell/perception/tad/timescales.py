"""What the decay rates learned: how long each level remembers, in seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from .decay import SharedDecay
from .model import TADModel


@dataclass(frozen=True)
class TimeConstants:
    """Of one block: ``seconds`` [dim], the time over which a channel forgets to 1/e, at stride ``stride``."""

    block: int
    stride: int
    seconds: np.ndarray


def time_constants(model: TADModel, row_s: float) -> list[TimeConstants]:
    """Of every block; ``row_s`` is the time between two feature rows in seconds.

    One step of a block at stride s spans ``s row_s`` seconds and divides by ``exp(lambda dt)``, so the time
    constant is ``s row_s / (lambda dt)``. Raises ValueError for a backbone without decay.
    """
    decay = model.pyramid.decay
    if not isinstance(decay, SharedDecay):
        raise ValueError(f"time constants need a liquid backbone with relaxation, got {model.backbone}")
    if row_s <= 0:
        raise ValueError(f"row_s must be positive, got {row_s}")
    stem = model.config.arch[1]
    out = []
    with torch.no_grad():
        for block, step in enumerate(decay.steps):
            stride = 2 ** max(0, block - stem + 1)
            rates = decay.rates(block).double().cpu().numpy()
            out.append(TimeConstants(block, stride, stride * row_s / (rates * step)))
    return out


def plot_time_constants(constants: Sequence[TimeConstants], path: str | Path) -> Path:
    """Draw the spread over the channels of each block to an image (suffix decides). Needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.boxplot(
        [c.seconds for c in constants],
        tick_labels=[f"{c.block}\nstride {c.stride}" for c in constants],
        whis=(0, 100),
    )
    axes.set_yscale("log")
    axes.set_xlabel("block")
    axes.set_ylabel("time constant (s), all channels")
    axes.grid(axis="y", alpha=0.3)
    path = Path(path)
    figure.savefig(path, dpi=150)
    return path
