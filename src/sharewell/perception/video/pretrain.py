"""How the small extractor is trained: which motion does a window of four frames show?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from .decode import Sampling, sample_frames
from .digits import MOTIONS, Action
from .extractor import TorchExtractor
from .small import SMALL_DIM, SMALL_FRAMES, SMALL_PIXELS, MotionNet, wrap_motion_net


@dataclass(frozen=True)
class PretrainConfig:
    """AdamW with a one-cycle learning rate; pictures are mirrored and their brightness varied."""

    epochs: int = 8
    batch: int = 64
    lr: float = 3e-3
    weight_decay: float = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.lr > 0 or not self.weight_decay >= 0:
            raise ValueError(
                f"lr must be positive, weight_decay not negative, got {self.lr}, {self.weight_decay}"
            )


def read_windows(
    videos: Sequence[tuple[Path, Sequence[Action]]],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of all videos: frames uint8 [n, 3, 48, 48], first frame of every window [m], and its class [m]: that of
    the motion at its middle, or the last class for none."""
    frames, starts, classes, total = [], [], [], 0
    for path, actions in videos:
        read = np.stack([f.rgb for f in sample_frames(path, Sampling(4.0, SMALL_PIXELS, SMALL_PIXELS))])
        for first in range(len(read) - SMALL_FRAMES + 1):
            middle = (first + (SMALL_FRAMES - 1) / 2) / 4.0
            running = [MOTIONS.index(a.label) for a in actions if a.start_s <= middle < a.end_s]
            starts.append(total + first)
            classes.append(running[0] if running else len(MOTIONS))
        frames.append(read)
        total += len(read)
    pixels = torch.from_numpy(np.concatenate(frames)).movedim(-1, 1).contiguous()
    return pixels, torch.tensor(starts), torch.tensor(classes)


def train_motion_net(
    videos: Sequence[tuple[Path, Sequence[Action]]],
    config: PretrainConfig | None = None,
    *,
    progress: Callable[[str, float, float], None] = lambda what, done, total: None,
) -> tuple[TorchExtractor, float]:
    """The extractor and the share of the windows that it named rightly in its last epoch of training."""
    config = config or PretrainConfig()
    pixels, starts, classes = read_windows(videos)
    generator = torch.Generator().manual_seed(config.seed)
    net, head = MotionNet(), nn.Linear(SMALL_DIM, len(MOTIONS) + 1)
    for module in (*net.modules(), head):
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_uniform_(module.weight, a=5**0.5, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    parameters = [*net.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
    steps = -(-len(starts) // config.batch) * config.epochs
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, total_steps=steps, pct_start=0.2)
    right = 0
    net.train()
    for epoch in range(config.epochs):
        right = 0
        for chosen in torch.randperm(len(starts), generator=generator).split(config.batch):
            clip = _clips(pixels, starts[chosen], generator)
            scores = head(net(clip))
            loss = F.cross_entropy(scores, classes[chosen], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            right += int((scores.argmax(1) == classes[chosen]).sum())
        progress("extractor", epoch + 1, config.epochs)
    return wrap_motion_net(net.eval()), right / len(starts)


def _clips(pixels: torch.Tensor, starts: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """float32 [n, 3, frames, 48, 48] in [0, 1], mirrored and brightened at random, each clip in one way."""
    clip = pixels[starts[:, None] + torch.arange(SMALL_FRAMES)].movedim(1, 2).float() / 255
    n = len(clip)
    for axis in (3, 4):
        mirrored = torch.rand(n, generator=generator) < 0.5
        clip[mirrored] = clip[mirrored].flip(axis)
    gain = 0.8 + 0.4 * torch.rand(n, 3, 1, 1, 1, generator=generator)
    shift = 0.1 * torch.rand(n, 3, 1, 1, 1, generator=generator) - 0.05
    return (clip * gain + shift).clamp(0, 1)
