"""Rotary position embedding tables, with the scalings that Llama-, Qwen- and Mistral-like checkpoints use."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch


def inverse_frequencies(
    head_dim: int, theta: float, scaling: Mapping[str, Any] | None = None
) -> torch.Tensor:
    """Angular frequencies float64 ``[head_dim / 2]`` (RoPE, arXiv 2104.09864; "llama3" and "linear"
    scalings).

    Raises ValueError for a scaling type that is not one of default, linear, llama3.
    """
    base = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    kind = (scaling or {}).get("rope_type") or (scaling or {}).get("type") or "default"
    if scaling is None or kind == "default":
        return base
    factor = float(scaling["factor"])
    if kind == "linear":
        return base / factor
    if kind != "llama3":
        raise ValueError(f"rope scaling type must be default, linear or llama3, got {kind!r}")
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    original = float(scaling["original_max_position_embeddings"])
    wavelength = 2 * math.pi / base
    smooth = ((original / wavelength - low) / (high - low)).clamp(0, 1)
    return base / factor * (1 - smooth) + base * smooth


def rope_tables(inverse: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines float32 ``[length, head_dim / 2]`` of every position below ``length``."""
    # float32 angles, as transformers computes them: at position 8,000 float64 would differ by 5e-4.
    angles = torch.arange(length, dtype=torch.float32)[:, None] * inverse.float()[None]
    return angles.cos().contiguous(), angles.sin().contiguous()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate ``x [T, heads, head_dim]`` in float32 (float64 for float64 x) by ``cos, sin [T, head_dim / 2]``;
    returns x's dtype."""
    a, b = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, -1)
    c, s = cos[:, None], sin[:, None]
    return torch.cat([a * c - b * s, b * c + a * s], -1).to(x.dtype)
