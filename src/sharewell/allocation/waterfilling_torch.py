"""Water-filling on torch tensors, with the exact gradient of the active set."""

from __future__ import annotations

from typing import Any

import torch


def _poured(level: torch.Tensor, above: torch.Tensor, cap: torch.Tensor | None) -> torch.Tensor:
    p = (level[..., None] - above).clamp_min(0.0)
    p = torch.where(above.isfinite(), p, 0.0)
    return p if cap is None else torch.minimum(p, cap)


def _level(above: torch.Tensor, power: torch.Tensor, cap: torch.Tensor | None) -> torch.Tensor:
    """As ``waterfilling.fill``: the water level over the sorted breakpoints."""
    if cap is None:
        order = above.sort(dim=-1).values
        counts = torch.arange(1, above.shape[-1] + 1, device=above.device, dtype=above.dtype)
        mu = (power[..., None] + order.cumsum(-1)) / counts
        used = (mu > order).sum(-1)
        mu_at = mu.gather(-1, (used - 1).clamp_min(0)[..., None])[..., 0]
        return torch.where(used > 0, mu_at, torch.zeros_like(mu_at))
    usable = above.isfinite()
    height = torch.where(usable, cap, 0.0)
    low = torch.where(usable, above, 0.0)
    edges, order = torch.cat([low, low + height], -1).sort(dim=-1, stable=True)
    turn = torch.cat([usable.long(), -usable.long()], -1).gather(-1, order)
    slope = turn.cumsum(-1)
    rise = torch.where(slope[..., :-1] > 0, slope[..., :-1] * edges.diff(dim=-1), 0.0)
    volume = torch.cat([torch.zeros_like(edges[..., :1]), rise.cumsum(-1)], -1)
    at = ((volume <= power[..., None]).sum(-1) - 1).clamp_min(0)[..., None]
    here, under, lanes = (x.gather(-1, at)[..., 0] for x in (edges, volume, slope))
    level = here + torch.where(lanes > 0, (power - under) / lanes.clamp_min(1), 0.0)
    return torch.where(height.sum(-1) <= power, torch.full_like(level, torch.inf), level)


class _Waterfill(torch.autograd.Function):
    """Forward: sorted breakpoints. Backward: with A the channels strictly between 0 and their cap,
    dp = dmu - dn on A, dp = dcap on capped ones, and dmu = (dP + sum_A dn - sum_capped dcap) / |A|."""

    @staticmethod
    def forward(ctx: Any, n: torch.Tensor, power: torch.Tensor, cap: torch.Tensor | None) -> Any:
        floor = (n if cap is None else torch.where(cap > 0, n, torch.inf)).amin(-1)
        floor = torch.where(floor.isfinite(), floor, 0.0)
        above = n - floor[..., None]
        level = _level(above, power, cap)
        p = _poured(level, above, cap)
        free = (p > 0) if cap is None else (p > 0) & (p < cap)
        count = free.sum(-1)
        short = torch.where((count > 0) & level.isfinite(), (power - p.sum(-1)) / count.clamp_min(1), 0.0)
        level = level + short
        p = _poured(level, above, cap)
        capped = torch.zeros_like(free) if cap is None else (p > 0) & (p >= cap)
        ctx.save_for_backward(free & ~capped, capped)
        ctx.has_cap = cap is not None
        return p, level + floor

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        grad_p, grad_level = grads
        free, capped = ctx.saved_tensors
        count = free.sum(-1)
        inside = torch.where(free, grad_p, 0.0)
        share = torch.where(count > 0, (inside.sum(-1) + grad_level) / count.clamp_min(1), 0.0)
        grad_n = torch.where(free, share[..., None], 0.0) - inside
        grad_cap = torch.where(capped, grad_p - share[..., None], 0.0) if ctx.has_cap else None
        return grad_n, share, grad_cap


def waterfill_torch(noise: torch.Tensor, power: Any, mask: Any, *, return_level: bool) -> Any:
    """See ``waterfill``; runs on the tensor's device, in float64 unless the noise is float32 or less."""
    if noise.is_complex():
        raise ValueError(f"noise must be real, got {noise.dtype}")
    if not noise.is_floating_point():
        noise = noise.double()
    power = torch.as_tensor(power, dtype=noise.dtype, device=noise.device)
    if noise.dim() < 1 or noise.shape[-1] < 1:
        raise ValueError(
            f"noise must have at least one channel on its last axis, got shape {tuple(noise.shape)}"
        )
    if not bool((noise > 0).all()):
        raise ValueError("noise must be positive on its last axis (channels), without NaN")
    if not bool(((power >= 0) & power.isfinite()).all()):
        raise ValueError("power must be finite and at least 0")
    cap = None
    if mask is not None:
        cap = torch.as_tensor(mask, dtype=noise.dtype, device=noise.device)
        if not bool((cap >= 0).all()):
            raise ValueError("mask must be at least 0 on its last axis (channels), without NaN")
    shape = torch.broadcast_shapes(noise.shape, (*power.shape, 1), () if cap is None else cap.shape)
    noise, power = noise.expand(shape), power.expand(shape[:-1])
    cap = None if cap is None else cap.expand(shape)
    p, level = _Waterfill.apply(noise, power, cap)  # pyright: ignore[reportGeneralTypeIssues]
    return (p, level) if return_level else p
