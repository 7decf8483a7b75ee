"""Parts that every backbone uses. Features are [batch, channels, rows], masks [batch, 1, rows] of 0 and 1."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Far below any feature, and within the range of float16.
_NEVER = 1e4


class ChannelNorm(nn.Module):
    """Layer normalisation over the channels of each row, eps 1e-5, with gain and bias."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.shape = (dim,)  # a constant of the exported graph
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.transpose(1, 2)
        return F.layer_norm(rows, self.shape, self.weight, self.bias, 1e-5).transpose(1, 2)


class ConvNormReLU(nn.Module):
    """Convolution over three rows without bias, normalisation, ReLU; padded rows come out as zero."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(c_in, c_out, 3, padding=1, bias=False)
        self.norm = ChannelNorm(c_out)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        # One mask, after the norm: the convolution has no bias and the norm sees one row at a time, so that
        # masking in between would change nothing.
        return F.relu(self.norm(self.conv(x))) * mask


def pool(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Halve the rows: maximum of three at every second one, over the valid rows only; and the mask.

    Padded rows hold zero, which would win over negative features, so they are pushed far down first.
    """
    mask_out = mask[:, :, ::2]
    pooled = F.max_pool1d(x + (mask * _NEVER + (-_NEVER)), 3, stride=2, padding=1)
    return pooled * mask_out, mask_out


def keep_or_drop(branch: Tensor, keep: Tensor | None) -> Tensor:
    """Stochastic depth: the branch of a dropped sample is zero, of the others scaled up by 1 / p(keep)."""
    return branch if keep is None else branch * keep[:, None, None]
