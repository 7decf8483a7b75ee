"""How to train: the settings, the learning rate of each step, and what decays."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from .config import require
from .evaluate import THUMOS_TIOUS
from .model import TADModel

Precision = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class TrainConfig:
    """How to train. ``batch_size`` counts over all processes. The learning rate rises linearly for
    ``warmup_epochs`` and falls as a cosine for ``epochs``, step by step.

    ``precision``: "bfloat16" and "float16" compute the network in mixed precision (float16 needs CUDA).
    ``eval_every``: epochs between evaluations on ``val`` (0: only after the last). ``tious``: of the mAP.
    """

    lr: float = 1e-4
    weight_decay: float = 0.05
    epochs: int = 30
    warmup_epochs: int = 5
    batch_size: int = 2
    clip_norm: float = 1.0
    ema_decay: float = 0.999
    precision: Precision = "float32"
    seed: int = 0
    eval_every: int = 0
    tious: tuple[float, ...] = THUMOS_TIOUS

    def __post_init__(self) -> None:
        object.__setattr__(self, "tious", tuple(self.tious))
        require(self.lr > 0, "lr", "positive", self.lr)
        require(self.weight_decay >= 0, "weight_decay", "at least 0", self.weight_decay)
        require(self.epochs >= 1, "epochs", "at least 1", self.epochs)
        require(self.warmup_epochs >= 0, "warmup_epochs", "at least 0", self.warmup_epochs)
        require(self.batch_size >= 1, "batch_size", "at least 1", self.batch_size)
        require(self.clip_norm > 0, "clip_norm", "positive", self.clip_norm)
        require(0 <= self.ema_decay < 1, "ema_decay", "in [0, 1)", self.ema_decay)
        known = ("float32", "bfloat16", "float16")
        require(self.precision in known, "precision", " | ".join(known), self.precision)
        require(self.seed >= 0, "seed", "at least 0", self.seed)
        require(self.eval_every >= 0, "eval_every", "at least 0", self.eval_every)

    @property
    def total_epochs(self) -> int:
        return self.warmup_epochs + self.epochs


def learning_rate(config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """Of a step (from 0): linear from nearly 0 to ``lr``, then half a cosine down to nearly 0."""
    warmup, total = config.warmup_epochs * steps_per_epoch, config.total_epochs * steps_per_epoch
    floor = 1e-8
    if step < warmup:
        return floor + (config.lr - floor) * step / warmup
    share = (step - warmup) / max(1, total - warmup)
    return floor + (config.lr - floor) * 0.5 * (1 + math.cos(math.pi * share))


def make_optimizer(model: TADModel, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW; only the weights of convolutions decay, not gains, biases, scales or decay rates."""
    decayed = {id(m.weight) for m in model.modules() if isinstance(m, nn.Conv1d)}
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if id(p) in decayed], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if id(p) not in decayed], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr)
