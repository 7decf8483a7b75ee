"""Water-filling: the one exact way to pour a budget over channels, for numpy and torch.

Iterative water-filling (Wang 2025, arXiv 2502.15783) lets several users pour at once; that game is
:class:`~sharewell.allocation.InterferenceGame`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


def waterfill(noise: Any, power: Any, mask: Any = None, *, return_level: bool = False) -> Any:
    """Split ``power`` so that sum log(1 + p / noise) is greatest: p = clip(mu - noise, 0, mask).

    ``noise`` [..., N]: effective noise of each channel, positive; infinite for a channel that cannot be used.
    ``power`` [...]: budget, at least 0. ``mask`` [..., N]: most that a channel takes; None is no limit.
    Leading axes are batched and broadcast. Returns p [..., N], with ``return_level`` also mu [...]. Where the
    masks together are below the budget every usable channel gets its mask.

    Exact in O(N log N): sorted breakpoints, no bisection. torch tensors stay torch and have gradients.
    Raises ValueError for NaN, noise that is not positive, and negative power or mask.
    """
    if type(noise).__module__.split(".")[0] == "torch":
        from .waterfilling_torch import waterfill_torch

        return waterfill_torch(noise, power, mask, return_level=return_level)
    n, budget = _real(noise, "noise"), _real(power, "power")
    if n.ndim < 1 or n.shape[-1] < 1:
        raise ValueError(f"noise must have at least one channel on its last axis, got shape {n.shape}")
    if not (n > 0).all():
        raise ValueError("noise must be positive on its last axis (channels), without NaN")
    if not ((budget >= 0) & np.isfinite(budget)).all():
        raise ValueError("power must be finite and at least 0")
    cap = None
    if mask is not None:
        cap = _real(mask, "mask")
        if not (cap >= 0).all():
            raise ValueError("mask must be at least 0 on its last axis (channels), without NaN")
    p, level = fill(n, budget, cap)
    return (p, level) if return_level else p


def project(point: Any, power: Any, mask: Any = None) -> np.ndarray:
    """Euclidean projection of ``point`` [..., N] onto {0 <= p <= mask, sum p = power}.

    Water-filling is this projection of minus the noise, which is why it never moves further than its noise
    does (non-expansive).
    """
    y = _real(point, "point")
    if not np.isfinite(y).all():
        raise ValueError("point must be finite")
    return fill(-y, _real(power, "power"), None if mask is None else _real(mask, "mask"))[0]


@dataclass(frozen=True)
class ReverseFill:
    """``distortion`` and ``rate`` (bits a sample) of each component [..., N]; the water ``level`` [...]."""

    distortion: np.ndarray
    rate: np.ndarray
    level: np.ndarray


def reverse_waterfill(variances: Any, distortion: Any) -> ReverseFill:
    """Bits for independent Gaussian components under a total squared error (Cover, Thomas, theorem 10.3.3).

    ``variances`` [..., N], at least 0; ``distortion`` [...], positive: the sum allowed over the components.
    Each component gets min(level, variance) of it and 1/2 log2(variance / distortion) bits.
    """
    v, total = _real(variances, "variances"), _real(distortion, "distortion")
    if not ((v >= 0) & np.isfinite(v)).all():
        raise ValueError("variances must be finite and at least 0")
    if not (total > 0).all():
        raise ValueError("distortion must be positive")
    # Water over a flat floor, where no component takes more than its variance.
    each, level = fill(np.zeros_like(v), np.minimum(total, v.sum(axis=-1)), v)
    safe = np.where(each > 0, each, 1.0)
    rate = np.where(each > 0, 0.5 * np.log2(np.maximum(v, safe) / safe), 0.0)
    return ReverseFill(each, rate, level)


def _real(value: Any, name: str) -> np.ndarray:
    array = np.asarray(value)
    if np.iscomplexobj(array):
        raise ValueError(f"{name} must be real, got {array.dtype}")
    return array.astype(np.float64)


def fill(n: np.ndarray, power: np.ndarray, cap: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """The operator itself, on any real floor ``n``; inputs are trusted. Returns (p, level)."""
    shape = np.broadcast_shapes(n.shape, (*np.shape(power), 1), () if cap is None else cap.shape)
    n = np.broadcast_to(n, shape)
    power = np.broadcast_to(power, shape[:-1])
    if cap is not None:
        cap = np.broadcast_to(cap, shape)
    # Heights above the lowest floor: a small budget on a high floor must not drown in its rounding.
    floor = (n if cap is None else np.where(cap > 0, n, np.inf)).min(axis=-1)
    floor = np.where(np.isfinite(floor), floor, 0.0)
    with np.errstate(invalid="ignore"):
        above = n - floor[..., None]
        level = _open_level(above, power) if cap is None else _capped_level(above, power, cap)
        p = _poured(level, above, cap)
        # One Newton step removes what the sums have rounded; the level is piecewise linear in the budget.
        free = (p > 0) if cap is None else (p > 0) & (p < cap)
        count = free.sum(axis=-1)
        short = np.where(count > 0, (power - p.sum(axis=-1)) / np.maximum(count, 1), 0.0)
        if cap is not None:
            short = np.where(np.isfinite(level), short, 0.0)
        level = level + short
        p = _poured(level, above, cap)
    return p, level + floor


def _poured(level: np.ndarray, above: np.ndarray, cap: np.ndarray | None) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        p = np.maximum(level[..., None] - above, 0.0)
    p = np.where(np.isfinite(above), p, 0.0)
    return p if cap is None else np.minimum(p, cap)


def _open_level(above: np.ndarray, power: np.ndarray) -> np.ndarray:
    """mu_m = (P + sum of the m lowest floors) / m for the largest m with mu_m > the m-th floor."""
    order = np.sort(above, axis=-1)
    mu = (power[..., None] + np.cumsum(order, axis=-1)) / np.arange(1, above.shape[-1] + 1)
    # Strict: at a tie the channel gets nothing either way. True on a prefix, so its length is the largest m.
    used = (mu > order).sum(axis=-1)
    at = np.maximum(used - 1, 0)[..., None]
    return np.where(used > 0, np.take_along_axis(mu, at, axis=-1)[..., 0], 0.0)


def _capped_level(above: np.ndarray, power: np.ndarray, cap: np.ndarray) -> np.ndarray:
    """Where the piecewise linear water volume reaches the budget: one scan over the 2N sorted breakpoints.

    Infinite where the caps of the usable channels are not above the budget.
    """
    usable = np.isfinite(above)
    height = np.where(usable, cap, 0.0)
    edges = np.concatenate([np.where(usable, above, 0.0), np.where(usable, above, 0.0) + height], axis=-1)
    turn = np.concatenate([np.where(usable, 1, 0), np.where(usable, -1, 0)], axis=-1)
    order = np.argsort(edges, axis=-1, kind="stable")
    edges = np.take_along_axis(edges, order, axis=-1)
    slope = np.cumsum(np.take_along_axis(turn, order, axis=-1), axis=-1)
    step = np.diff(edges, axis=-1)
    rise = np.where(slope[..., :-1] > 0, slope[..., :-1] * step, 0.0)
    volume = np.concatenate([np.zeros((*above.shape[:-1], 1)), np.cumsum(rise, axis=-1)], axis=-1)
    # The last breakpoint that the budget reaches.
    at = np.maximum((volume <= power[..., None]).sum(axis=-1) - 1, 0)[..., None]
    here = np.take_along_axis(edges, at, axis=-1)[..., 0]
    under = np.take_along_axis(volume, at, axis=-1)[..., 0]
    lanes = np.take_along_axis(slope, at, axis=-1)[..., 0]
    level = here + np.where(lanes > 0, (power - under) / np.maximum(lanes, 1), 0.0)
    return np.where(height.sum(axis=-1) <= power, np.inf, level)
