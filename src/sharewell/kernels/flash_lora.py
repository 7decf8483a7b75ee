"""Attention whose values have a low-rank part that is never expanded: O = P V + s (P Z) B.

Source: Flash-LoRA-Attention of LRAgent (arXiv 2602.01053). Values are V + s Z B, with Z = x A of width r kept
beside V. Summing Z under the same attention weights and applying B to the sum costs ``context * r + r *
width`` a query instead of ``context * r * width``. Three back ends: two products on the same weights, torch's
fused attention over [V | Z], and Triton with a second accumulator. Where queries are many, forming the values
costs less than any of them on a CPU: a wider product for every query is dearer than one for every token."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

from . import flash_lora_triton

Backend = Literal["auto", "reference", "matmul", "sdpa", "expand", "triton"]
_FEW = 64  # query rows of a key head up to which plain products beat a fused kernel over expanded values


def flash_lora_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v_base: torch.Tensor,
    z: torch.Tensor,
    b: torch.Tensor,
    scale: float,
    mask: torch.Tensor | Literal["causal"] | None = None,
    *,
    attention_scale: float | None = None,
    backend: Backend = "auto",
) -> torch.Tensor:
    """Attention over values ``v_base + scale * z b``.

    ``q [n, heads, t, d]``; ``k, v_base [n, kv_heads, context, d]``; ``z [n, context, rank]``, for all
    heads; ``b [rank, kv_heads * d]`` for all rows of the batch or ``[n, rank, kv_heads * d]``. ``mask``:
    None, "causal" (the queries are the last ``t`` of the context), or bool that broadcasts to ``[n, 1, t,
    context]``, True where a query may look; a query that may look nowhere gets zeros. ``attention_scale``:
    1 / sqrt(d) by default. Backends: "reference" works in float32 or better; "matmul", "sdpa" and "triton"
    (CUDA) in q's dtype. "expand" forms the values, which many queries cost least with: "auto" takes it
    for those, "matmul" for few. Returns ``[n, heads, t, d]``. Raises ValueError naming the shape that
    does not fit, ModuleNotFoundError for "triton" where it is not installed."""
    _check(q, k, v_base, z, b, mask)
    few = q.shape[2] * (q.shape[1] // k.shape[1]) <= _FEW
    if backend == "auto":
        backend = "triton" if q.is_cuda and flash_lora_triton.available() else "matmul" if few else "expand"
    scaling = q.shape[-1] ** -0.5 if attention_scale is None else attention_scale
    if backend == "triton":
        allowed = None if isinstance(mask, str) or mask is None else _expanded(mask, q, k)
        return flash_lora_triton.attend(
            q, k, v_base, z, _batched(b, q.shape[0]), scale, allowed, mask == "causal", scaling
        )
    if backend == "sdpa":
        return _sdpa(q, k, v_base, z, b, scale, mask, scaling)
    if backend == "expand":
        return _fused(
            q, k, v_base + _low_rank_values(z, b, scale, k.shape[1]).to(v_base.dtype), mask, scaling
        )
    if backend not in ("reference", "matmul"):
        raise ValueError(f"backend must be auto, reference, matmul, sdpa, expand or triton, got {backend!r}")
    return _products(q, k, v_base, z, b, scale, mask, scaling, exact=backend == "reference")


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    z: torch.Tensor,
    b: torch.Tensor,
    mask: torch.Tensor | str | None,
) -> None:
    def require(ok: bool, name: str, wanted: str, got: object) -> None:
        if not ok:
            raise ValueError(f"{name} must be {wanted}, got {got}")

    require(q.ndim == 4, "q", "[n, heads, t, d]", tuple(q.shape))
    require(k.ndim == 4 and k.shape[::3] == q.shape[::3], "k", "[n, kv_heads, context, d]", tuple(k.shape))
    require(v.shape == k.shape, "v_base", f"of k's shape {tuple(k.shape)}", tuple(v.shape))
    require(q.shape[1] % k.shape[1] == 0, "heads of q", f"a multiple of {k.shape[1]}", q.shape[1])
    n, kv_heads, context, d = k.shape
    require(z.ndim == 3 and z.shape[:2] == (n, context), "z", f"[{n}, {context}, rank]", tuple(z.shape))
    rank, width = z.shape[2], kv_heads * d
    wanted = f"[{rank}, {width}] or [{n}, {rank}, {width}]"
    require(tuple(b.shape) in ((rank, width), (n, rank, width)), "b", wanted, tuple(b.shape))
    if isinstance(mask, str):
        require(mask == "causal", "mask", "None, 'causal' or a bool tensor", repr(mask))
        require(q.shape[2] <= context, "queries", f"at most the context of {context}", q.shape[2])
    elif mask is not None:
        require(mask.dtype == torch.bool, "mask", "bool", mask.dtype)


def _batched(b: torch.Tensor, n: int) -> torch.Tensor:
    return b if b.ndim == 3 else b[None].expand(n, -1, -1)


def _expanded(mask: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """The mask as ``[n, 1, t, context]``, a view."""
    if mask.ndim > 2 and mask.shape[-3] != 1:
        raise ValueError(f"mask must be the same for all heads, got shape {tuple(mask.shape)}")
    return mask.expand(q.shape[0], 1, q.shape[2], k.shape[2])


def _bottom_right(t: int, context: int, device: torch.device) -> torch.Tensor:
    return torch.ones(t, context, dtype=torch.bool, device=device).tril(context - t)


def _up(mixed: torch.Tensor, b: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """``mixed [n, kv_heads, rows, rank]`` times each key head's part of b: ``[n, kv_heads, rows, d]``."""
    per_head = b.unflatten(-1, (kv_heads, -1)).transpose(-3, -2)  # [(n,) kv_heads, rank, d]
    return mixed @ per_head.to(mixed.dtype)


def _products(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    z: torch.Tensor,
    b: torch.Tensor,
    scale: float,
    mask: torch.Tensor | str | None,
    scaling: float,
    exact: bool,
) -> torch.Tensor:
    """Explicit weights, and two products with them."""
    n, heads, t, d = q.shape
    kv_heads, context = k.shape[1], k.shape[2]
    work = torch.promote_types(q.dtype, torch.float32) if exact else q.dtype
    rows = (q.to(work) * scaling).reshape(n, kv_heads, -1, d)  # a key head's query heads, one behind another
    scores = (rows @ k.to(work).transpose(-1, -2)).to(torch.promote_types(work, torch.float32))
    if isinstance(mask, str):
        mask = None if t == 1 else _bottom_right(t, context, q.device)
    if mask is None:
        p = scores.softmax(-1)
    else:
        allowed = _expanded(mask, q, k)[:, :, None]
        grouped = scores.view(n, kv_heads, -1, t, context).masked_fill(~allowed, float("-inf"))
        p = grouped.softmax(-1).masked_fill(~allowed.any(-1, keepdim=True), 0.0).view_as(scores)
    p = p.to(work)
    low = (p.reshape(n, -1, context) @ z.to(work)).view(n, kv_heads, -1, z.shape[-1])
    out = p @ v.to(work) + scale * _up(low, b, kv_heads)
    return out.view(n, heads, t, d).to(q.dtype)


def _sdpa(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    z: torch.Tensor,
    b: torch.Tensor,
    scale: float,
    mask: torch.Tensor | str | None,
    scaling: float,
) -> torch.Tensor:
    """torch's fused attention over [V | Z]. Queries and keys get as many zeros, which leaves their products
    as they are: with unequal widths torch leaves its fused kernel and is many times slower."""
    n, heads, t, d = q.shape
    kv_heads, context, rank = k.shape[1], k.shape[2], z.shape[2]
    wide = d + rank + -(d + rank) % 8

    def padded(x: torch.Tensor) -> torch.Tensor:
        return F.pad(x, (0, wide - d))

    both = v.new_empty(n, kv_heads, context, wide)
    both[..., :d] = v
    both[..., d : d + rank] = z[:, None]
    both[..., d + rank :] = 0
    out = _fused(padded(q), padded(k), both, mask, scaling).view(n, kv_heads, -1, wide)
    result = out[..., :d] + scale * _up(out[..., d : d + rank], b, kv_heads)
    return result.view(n, heads, t, d)


def _low_rank_values(z: torch.Tensor, b: torch.Tensor, scale: float, kv_heads: int) -> torch.Tensor:
    """``scale * z b`` as ``[n, kv_heads, context, d]``."""
    return scale * (z.to(b.dtype) @ b).unflatten(-1, (kv_heads, -1)).transpose(1, 2)


def _fused(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | str | None, scaling: float
) -> torch.Tensor:
    """torch's fused attention of equal widths, ``[n, heads, t, width]``; zeros for a query that may look
    nowhere."""
    n, heads, t, width = q.shape
    kv_heads, context = k.shape[1], k.shape[2]
    group = heads // kv_heads
    if mask == "causal" and t == context:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=group > 1)
    else:
        if not isinstance(mask, str):
            allowed = mask
        else:
            allowed = None if t == 1 else _bottom_right(t, context, q.device)
        if allowed is not None:
            allowed = _expanded(allowed, q, k)
            nowhere = ~allowed.any(-1, keepdim=True)
            empty = bool(nowhere.any())
            if group > 1:
                allowed = allowed.repeat(1, 1, group, 1)
        else:
            nowhere, empty = None, False
        rows = q.reshape(n, kv_heads, group * t, width)
        out = F.scaled_dot_product_attention(rows, k, v, attn_mask=allowed, scale=scaling)
        if empty and nowhere is not None:
            out = out.masked_fill(nowhere.repeat(1, 1, group, 1), 0.0)
    return out.reshape(n, heads, t, width)
