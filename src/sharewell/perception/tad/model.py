"""Embedding, stem and pyramid, neck, and the heads that all levels share."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .attention import AttentionBlock, PoolBlock
from .config import BACKBONES, Backbone, LiquidTADConfig, require
from .decay import FrozenDecay, SharedDecay
from .layers import ChannelNorm, ConvNormReLU
from .liquid import LiquidBlock


@dataclass(frozen=True)
class LevelOutput:
    """Of one level: ``logits`` [batch, n_cls, rows], ``offsets`` [batch, 2, rows] in strides of the level to
    the start and the end (at least 0), ``mask`` [batch, 1, rows]."""

    logits: Tensor
    offsets: Tensor
    mask: Tensor


class Pyramid(nn.Module):
    """``arch[1]`` blocks at stride 1, then ``arch[2]`` blocks that halve the rows; one output per level."""

    def __init__(self, config: LiquidTADConfig, backbone: Backbone) -> None:
        super().__init__()
        stem, branch = config.arch[1], config.arch[2]
        strides = [1] * stem + [2] * branch
        self.stem = stem
        self.decay: SharedDecay | FrozenDecay | None = None
        blocks: list[nn.Module] = []
        if backbone == "liquid":
            levels = [0] * stem + list(range(1, branch + 1))
            steps = [2.0**level if config.physical_time else 1.0 for level in levels]
            decay = SharedDecay(
                config.dim,
                len(strides),
                config.decay_sharing,
                steps=steps,
                rho_init=config.rho_init,
                learned=config.decay_learned,
            )
            if config.relaxation:
                self.decay = decay
            blocks = [
                LiquidBlock(
                    config.dim,
                    stride,
                    decay,
                    block=index,
                    kernel_size=config.kernel_size,
                    relaxation=config.relaxation,
                )
                for index, stride in enumerate(strides)
            ]
        elif backbone == "actionformer":
            blocks = [AttentionBlock(config.dim, config.heads, config.window, stride) for stride in strides]
        else:
            blocks = [PoolBlock(stride) for stride in strides]
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, mask: Tensor, keep: Tensor | None) -> list[tuple[Tensor, Tensor]]:
        levels = []
        for index, block in enumerate(self.blocks):
            if index >= self.stem:
                levels.append((x, mask))
            x, mask = block(x, mask, None if keep is None else keep[index])
        return [*levels, (x, mask)]


class Head(nn.Module):
    """Two convolutions with normalisation and ReLU, one to the outputs; the same weights at every level."""

    def __init__(self, dim: int, outputs: int) -> None:
        super().__init__()
        self.trunk = nn.ModuleList(ConvNormReLU(dim, dim) for _ in range(2))
        self.out = nn.Conv1d(dim, outputs, 3, padding=1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for layer in self.trunk:
            x = layer(x, mask)
        return self.out(x)


class TADModel(nn.Module):
    """A one-stage detector over feature rows: every row of every level scores the classes and regresses the
    distances to the start and the end of the action around it.

    ``backbone``: "liquid" (LiquidTAD, arXiv 2604.18274), "actionformer" (arXiv 2202.07925) or "maxpool".
    Weights are drawn from ``seed``. Embedding, neck, heads, losses and decoding are the same for all three.
    """

    def __init__(self, config: LiquidTADConfig, backbone: Backbone = "liquid", *, seed: int = 0) -> None:
        super().__init__()
        require(backbone in BACKBONES, "backbone", " | ".join(BACKBONES), backbone)
        self.config = config
        self.backbone: Backbone = backbone
        dim = config.dim
        widths = [config.c_in] + [dim] * config.arch[0]
        self.embedding = nn.ModuleList(ConvNormReLU(a, b) for a, b in pairwise(widths))
        self.pyramid = Pyramid(config, backbone)
        self.neck = nn.ModuleList(ChannelNorm(dim) for _ in range(config.levels))
        self.classify = Head(dim, config.n_cls)
        self.regress = Head(dim, 2)
        self.scales = nn.Parameter(torch.ones(config.levels))
        self._initialise(torch.Generator().manual_seed(seed))

    def _initialise(self, generator: torch.Generator) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv1d):
                nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5), generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        # Nearly every point is background: start there, or the first steps are spent on it.
        assert self.classify.out.bias is not None
        nn.init.constant_(self.classify.out.bias, -math.log(99))

    def draw_keep(self, batch: int, generator: torch.Generator) -> Tensor | None:
        """Stochastic depth of one step: [blocks, batch], 0 where a sample skips a block, else 1 / p(keep)."""
        p = self.config.drop_path
        blocks = len(self.pyramid.blocks)
        if p == 0 or blocks == 0:
            return None
        kept = torch.rand(blocks, batch, generator=generator) >= p
        return kept.float() / (1 - p)

    def forward(self, features: Tensor, mask: Tensor, keep: Tensor | None = None) -> list[LevelOutput]:
        """``features`` [batch, c_in, rows], rows a multiple of the last stride; ``mask`` [batch, 1, rows].

        Raises ValueError for another width or number of rows.
        """
        _, width, rows = features.shape
        last = self.config.strides[-1]
        if width != self.config.c_in:
            raise ValueError(f"features must be {self.config.c_in} wide, got {width}")
        if rows % last:
            raise ValueError(f"rows must be a multiple of {last}, the last stride, got {rows}")
        return [LevelOutput(*level) for level in self.levels(features, mask, keep)]

    def levels(
        self, features: Tensor, mask: Tensor, keep: Tensor | None = None
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """:meth:`forward` without checks, as plain tuples (logits, offsets, mask)."""
        x = features * mask
        for layer in self.embedding:
            x = layer(x, mask)
        out = []
        pyramid = self.pyramid(x, mask, keep)
        for level, ((y, level_mask), norm) in enumerate(zip(pyramid, self.neck, strict=True)):
            y = norm(y) * level_mask
            logits = self.classify(y, level_mask) * level_mask
            offsets = F.relu(self.regress(y, level_mask) * self.scales[level]) * level_mask
            out.append((logits, offsets, level_mask))
        return out

    @torch.no_grad()
    def infer(self, features: Tensor, mask: Tensor) -> list[LevelOutput]:
        """:meth:`forward` in evaluation mode and without gradients, on the model's own device."""
        was_training = self.training
        self.eval()
        try:
            return self(features.to(self.scales), mask.to(self.scales))
        finally:
            self.train(was_training)

    def frozen(self) -> TADModel:
        """A copy for deployment: evaluation mode, decay factors computed once."""
        twin = copy.deepcopy(self).eval().requires_grad_(False)
        if isinstance(twin.pyramid.decay, SharedDecay):
            frozen = FrozenDecay.of(twin.pyramid.decay)
            twin.pyramid.decay = frozen
            for block in twin.pyramid.blocks:
                assert isinstance(block, LiquidBlock)
                block.share(frozen)
        return twin
