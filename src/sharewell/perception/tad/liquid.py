"""The relaxation block: each channel of each row relaxes towards a gated target, all rows at once."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .decay import FrozenDecay, SharedDecay
from .layers import ChannelNorm, keep_or_drop, pool


def relax(x: Tensor, target: Tensor, a: Tensor) -> Tensor:
    """``a x + (1 - a) S``: what ``dx/dt = -lambda (x - S)`` gives after dt when S is held constant, with
    ``a = exp(-lambda dt)``."""
    return a * x + (1 - a) * target


def smoothing_kernel(a: Tensor, size: int) -> Tensor:
    """Two-sided exponential ``a^|k|``, ``|k| < size``, summing to 1 per channel: [dim, 1, 2 size - 1]."""
    distance = torch.arange(-(size - 1), size, device=a.device, dtype=a.dtype).abs()
    kernel = a[:, None] ** distance
    return (kernel / kernel.sum(dim=1, keepdim=True))[:, None]


class LiquidBlock(nn.Module):
    """``y = a x + (1 - a) S``, ``S = sigmoid(W_g z + b_g) * tanh(W_s z + b_s)``, ``z = DWConv3(LN(x))``.

    stride 2 pools ``x`` first. ``decay(block)`` gives the factors ``a`` of this block, float [dim]; its
    parameters belong to whoever owns it. In training a sample may be dropped (``keep`` is 0): then ``a = 1``,
    the block is the identity on (pooled) ``x``. ``kernel_size`` K > 0
    smooths S over the rows with ``a^|k|``, |k| < K, which equals the recurrence ``h_t = a h_{t-1} + (1 - a)
    S_t`` run in both directions. Without ``relaxation`` the block adds S to x (an ablation).
    """

    def __init__(
        self,
        dim: int,
        stride: int,
        decay: SharedDecay | FrozenDecay,
        *,
        block: int = 0,
        kernel_size: int = 0,
        relaxation: bool = True,
    ) -> None:
        super().__init__()
        if stride not in (1, 2):
            raise ValueError(f"stride must be 1 or 2, got {stride}")
        self.stride = stride
        self.kernel_size = kernel_size
        self.relaxation = relaxation
        self.block = block
        self.kernel: Tensor | None
        self.register_buffer("kernel", None, persistent=False)
        self.share(decay)
        self.norm = ChannelNorm(dim)
        self.depthwise = nn.Conv1d(dim, dim, 3, padding=1, groups=dim, bias=False)
        self.gate = nn.Conv1d(dim, dim, 1)
        self.state = nn.Conv1d(dim, dim, 1)

    def share(self, decay: SharedDecay | FrozenDecay) -> None:
        """Take the factors from ``decay`` from now on; from frozen ones the kernel is made once."""
        self._decay = (decay,)  # in a tuple: shared by all blocks, so no block registers it as its own
        if self.kernel_size and isinstance(decay, FrozenDecay):
            self.kernel = smoothing_kernel(decay(self.block), self.kernel_size)

    def forward(self, x: Tensor, mask: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """[batch, dim, rows], mask, and ``keep`` [batch], 0 for a dropped sample; returns (y, mask)."""
        if self.stride == 2:
            x, mask = pool(x, mask)
        z = self.depthwise(self.norm(x) * mask)
        target = torch.sigmoid(self.gate(z)) * torch.tanh(self.state(z))
        if not self.relaxation:
            return (x + keep_or_drop(target, keep)) * mask, mask
        a = self._decay[0](self.block)
        if self.kernel_size:
            kernel = self.kernel if self.kernel is not None else smoothing_kernel(a, self.kernel_size)
            target = F.conv1d(target * mask, kernel, padding=self.kernel_size - 1, groups=len(a))
        a = a[:, None]
        if keep is not None:
            a = torch.where(keep[:, None, None] > 0, a, torch.ones_like(a))
        return relax(x, target, a) * mask, mask
