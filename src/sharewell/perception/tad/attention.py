"""The ActionFormer block (arXiv 2202.07925): attention within a window, computed in chunks, and an MLP."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .layers import ChannelNorm, keep_or_drop, pool

CHUNK = 32  # queries that share one block of keys


def windowed_attention(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor, window: int, chunk: int = CHUNK
) -> Tensor:
    """Softmax attention of each row to the ``window`` rows around it; linear in the rows.

    ``q, k, v``: [batch, heads, rows, head_dim]; ``valid``: bool [batch, rows], False keys are never looked
    at. Queries go in chunks, each with the ``chunk + window - 1`` keys that its members can see.
    """
    batch, heads, rows, width = q.shape
    side = window // 2
    blocks = -(-rows // chunk)
    total = blocks * chunk
    q = F.pad(q * (1 / math.sqrt(width)), (0, 0, 0, total - rows)).reshape(batch, heads, blocks, chunk, width)
    extra = (0, 0, side, side + total - rows)
    span = chunk + 2 * side
    k = F.pad(k, extra).unfold(2, span, chunk)  # [batch, heads, blocks, head_dim, span]
    v = F.pad(v, extra).unfold(2, span, chunk)
    seen = F.pad(valid, (side, side + total - rows)).unfold(1, span, chunk)  # [batch, blocks, span]
    offset = torch.arange(span, device=q.device)[None] - torch.arange(chunk, device=q.device)[:, None]
    band = (offset >= 0) & (offset <= 2 * side)
    visible = band & seen[:, None, :, None, :]
    scores = (q @ k).masked_fill(~visible, -1e4)
    out = scores.softmax(-1) @ v.transpose(-1, -2)
    return out.reshape(batch, heads, total, width)[:, :, :rows]


class WindowedAttention(nn.Module):
    """Queries, keys and values from depthwise convolutions over three rows (stride 1 or 2)."""

    def __init__(self, dim: int, heads: int, window: int, stride: int) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.convs = nn.ModuleList(
            nn.Conv1d(dim, dim, 3, stride=stride, padding=1, groups=dim, bias=False) for _ in range(3)
        )
        self.norms = nn.ModuleList(ChannelNorm(dim) for _ in range(3))
        self.maps = nn.ModuleList(nn.Conv1d(dim, dim, 1) for _ in range(3))
        self.out = nn.Conv1d(dim, dim, 1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        parts = []
        for conv, norm, project in zip(self.convs, self.norms, self.maps, strict=True):
            y = project(norm(conv(x)) * mask)
            parts.append(y.unflatten(1, (self.heads, -1)).transpose(2, 3))
        q, k, v = parts
        y = windowed_attention(q, k, v, mask[:, 0] > 0, self.window)
        return self.out(y.transpose(2, 3).flatten(1, 2)) * mask


class AttentionBlock(nn.Module):
    """Pre-norm attention and MLP (4x, GELU), scaled per channel from 1e-4 on; stride 2 pools the skip."""

    def __init__(self, dim: int, heads: int, window: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.norm1, self.norm2 = ChannelNorm(dim), ChannelNorm(dim)
        self.attention = WindowedAttention(dim, heads, window, stride)
        self.expand, self.contract = nn.Conv1d(dim, 4 * dim, 1), nn.Conv1d(4 * dim, dim, 1)
        self.scale1 = nn.Parameter(torch.full((dim, 1), 1e-4))
        self.scale2 = nn.Parameter(torch.full((dim, 1), 1e-4))

    def forward(self, x: Tensor, mask: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As :meth:`LiquidBlock.forward`; ``keep`` is 0 or 1 / p(keep) for each sample."""
        skip, mask_out = pool(x, mask) if self.stride == 2 else (x, mask)
        y = self.attention(self.norm1(x) * mask, mask_out)
        x = skip + keep_or_drop(self.scale1 * y, keep)
        y = self.contract(F.gelu(self.expand(self.norm2(x))))
        return (x + keep_or_drop(self.scale2 * y, keep)) * mask_out, mask_out


class PoolBlock(nn.Module):
    """No computation but the pooling: what the heads do without a backbone (TemporalMaxer, 2303.09055)."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor, mask: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return pool(x, mask) if self.stride == 2 else (x, mask)
