"""A linear layer whose weight stays on disk or in CPU memory and is streamed through a fixed workspace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from .temporal_gemm import TemporalGemm
from .temporal_operands import as_operand, map_tensor, open_safetensors, transposed
from .temporal_plan import TemporalGemmConfig


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: TemporalLinear) -> torch.Tensor:  # type: ignore[override]
        ctx.layer = layer
        return layer.gemm(x, layer.weight_t)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return ctx.layer.gemm(grad, ctx.layer.weight), None


class TemporalLinear(nn.Module):
    """``y = x W^T + bias`` for ``x [..., in]``, W ``[out, in]`` read block by block on every call.

    The weight is frozen; gradients flow to ``x`` and to the bias. ``W`` is any operand of
    :class:`~sharewell.kernels.TemporalGemm`: a CPU tensor, an array, a memory-mapped file, a tensor of a
    safetensors file. Raises ValueError or TypeError naming shapes and dtypes.
    """

    def __init__(
        self, weight: Any, bias: torch.Tensor | None = None, cfg: TemporalGemmConfig | None = None
    ) -> None:
        super().__init__()
        self.gemm = TemporalGemm(cfg)
        if isinstance(weight, torch.Tensor):
            weight = weight.detach()
        self.weight = as_operand(weight, "weight")
        self.out_features, self.in_features = self.weight.shape
        if "int" in self.weight.element:
            raise TypeError(f"weight must hold floats, got {self.weight.element}")
        self.weight_t = transposed(self.weight)
        if bias is not None and tuple(bias.shape) != (self.out_features,):
            raise ValueError(f"bias must have shape ({self.out_features},), got {tuple(bias.shape)}")
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    @classmethod
    def from_linear(cls, linear: nn.Linear, cfg: TemporalGemmConfig | None = None) -> TemporalLinear:
        """The same layer on the same weight memory."""
        return cls(linear.weight, linear.bias, cfg)

    @classmethod
    def from_safetensors(
        cls, path: str | Path, weight: str, bias: str | None = None, cfg: TemporalGemmConfig | None = None
    ) -> TemporalLinear:
        """Tensor ``weight [out, in]`` of a safetensors file, memory-mapped; ``bias`` is loaded."""
        loaded = None
        if bias is not None:
            array, element = map_tensor(path, bias)
            loaded = torch.from_numpy(array.copy())
            loaded = loaded.view(torch.bfloat16) if element == "bfloat16" else loaded
        return cls(open_safetensors(path, weight), loaded, cfg)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1] != self.in_features:
            raise ValueError(f"x must have shape [..., {self.in_features}], got {tuple(x.shape)}")
        flat = x.reshape(-1, self.in_features)
        y = _Product.apply(flat, self).to(x.dtype)  # type: ignore[union-attr]
        if self.bias is not None:
            y = y + self.bias.to(x.dtype)
        return y.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, streamed={self.weight.element}"
