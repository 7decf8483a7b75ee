"""Attention of packed queries over a space: grouped heads, masks by position, built once for each set of
queries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from .plans import LowRank
    from .spaces import KVSpace, Rows


@dataclass(frozen=True)
class Group:
    """Queries that attend in one call of a kernel: rows ``first ... end - 1`` of the packed queries are the
    same number of each of ``count`` sequences from ``sequence`` on, which all have ``context`` places.

    ``mask``: None for all places, "causal" when the queries are all places in order, or bool ``[t,
    context]``."""

    first: int
    end: int
    sequence: int
    count: int
    context: int
    mask: torch.Tensor | str | None


def groups_of(rows: Rows, space: KVSpace, causal: bool, window: int | None) -> list[Group]:
    """The groups of packed queries ``rows``, sorted by sequence."""
    if not len(rows):
        return []
    if rows.block is not None:
        count, first, end = rows.block
        contexts = {space.context(s) for s in range(count)}
        if len(contexts) == 1 and (count == 1 or all(space.holes(s) is None for s in range(count))):
            context = contexts.pop()
            mask = _mask(rows.places[: end - first], first, end, context, space.holes(0), causal, window)
            return [Group(0, len(rows), 0, count, context, mask)]
    sequences, counts = rows.sequences.unique_consecutive(return_counts=True)
    groups, at = [], 0
    for s, n in zip(sequences.tolist(), counts.tolist(), strict=True):
        places, context = rows.places[at : at + n], space.context(s)
        first, end = int(places[0]), int(places[-1]) + 1
        unbroken = n == end - first
        mask = _mask(places, first if unbroken else -1, end, context, space.holes(s), causal, window)
        groups.append(Group(at, at + n, s, 1, context, mask))
        at += n
    return groups


def _mask(
    places: torch.Tensor,
    first: int,
    end: int,
    context: int,
    holes: torch.Tensor | None,
    causal: bool,
    window: int | None,
) -> torch.Tensor | str | None:
    """``first`` is -1 when ``places`` are not ``first ... end - 1``."""
    bounded = causal and window is not None and context > window
    if holes is None and not bounded:
        if not causal or (len(places) == 1 and end == context):
            return None
        if first == 0 and end == context:
            return "causal"
    keys = torch.arange(context, device=places.device)
    mask = (
        keys[None] <= places[:, None]
        if causal
        else torch.ones_like(keys[None] + places[:, None], dtype=torch.bool)
    )
    if bounded:
        assert window is not None
        mask = mask & (keys[None] > places[:, None] - window)
    return mask if holes is None else mask & holes[None]


def attend(
    q: torch.Tensor,
    groups: list[Group],
    space: KVSpace,
    layer: int,
    *,
    eager: bool,
    low: LowRank | None,
    mass: bool,
    scale: float | None = None,
    others_only: torch.Tensor | None = None,
) -> tuple[torch.Tensor, list[torch.Tensor] | None]:
    """Packed ``q [T, heads, d]`` to ``[T, heads, d]``, and the attention that each place of each group's
    sequences received (float32 ``[context]`` each) when ``mass`` asks for it; with ``others_only``, the
    places of the queries, without what each gave itself."""
    out = q if len(groups) == 1 else torch.empty_like(q)
    masses: list[torch.Tensor] = []
    for g in groups:
        k, v = space.keys_values(layer, g.sequence, g.count, g.context)
        rows = q[g.first : g.end].view(g.count, -1, *q.shape[1:])
        if eager or mass or low is not None:
            z = space.low_rank(layer, g.sequence, g.count, g.context) if low is not None else None
            o, p = _eager(rows, k, v, g.mask, scale, low, z)
            if mass:
                masses += _received(p, None if others_only is None else others_only[g.first : g.end])
        else:
            o = _sdpa(rows, k, v, g.mask, scale)
        if len(groups) == 1:
            return o.reshape(q.shape), masses if mass else None
        out[g.first : g.end] = o.reshape(-1, *q.shape[1:])
    return out, masses if mass else None


def received(
    q: torch.Tensor, k: torch.Tensor, places: torch.Tensor, *, to_self: bool, scale: float
) -> torch.Tensor:
    """Attention that each key got, float32 ``[context]``: queries ``q [t, heads, d]`` at ``places`` over the
    keys ``k [context, kv_heads, d]`` of places 0, 1, ... up to their own."""
    mask = torch.arange(len(k), device=k.device)[None] <= places[:, None]
    keys = k.transpose(0, 1)[None]
    _, p = _eager(q[None], keys, keys, mask, scale, None, None)
    return _received(p, None if to_self else places)[0]


def _received(p: torch.Tensor, own: torch.Tensor | None) -> list[torch.Tensor]:
    """Sums of ``p [n, kv heads, group, t, context]`` over queries and heads: ``[context]`` for each of n."""
    mass = p.float().sum((1, 2, 3))
    if own is not None:
        own = own.view(len(p), -1)
        at = own[:, None, None, :, None].expand(*p.shape[:4], 1)
        mass = mass.scatter_add(1, own, -p.gather(-1, at)[..., 0].float().sum((1, 2)))
    return list(mass)


def _sdpa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | str | None, scale: float | None
) -> torch.Tensor:
    """``q [n, t, heads, d]`` over ``k, v [n, kv heads, context, d]`` to ``[n, t, heads, d]``."""
    n, t, heads, dim = q.shape
    kv_heads = k.shape[1]
    if mask == "causal":
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k, v, is_causal=True, scale=scale, enable_gqa=kv_heads != heads
        )
        return out.transpose(1, 2)
    # A group's heads become rows: torch's grouped mode is many times slower for few queries in bfloat16.
    group = heads // kv_heads
    folded = q.view(n, t, kv_heads, group, dim).permute(0, 2, 3, 1, 4).reshape(n, kv_heads, group * t, dim)
    rows = mask.repeat(group, 1) if isinstance(mask, torch.Tensor) else None
    out = F.scaled_dot_product_attention(folded, k, v, attn_mask=rows, scale=scale)
    return out.view(n, kv_heads, group, t, dim).permute(0, 3, 1, 2, 4).reshape(n, t, heads, dim)


def _eager(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | str | None,
    scale: float | None,
    low: LowRank | None,
    z: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference: explicit softmax in float32 or better. Also returns P ``[n, kv heads, group, t,
    context]``."""
    n, t, heads, dim = q.shape
    kv_heads, context = k.shape[1], k.shape[2]
    exact = torch.promote_types(q.dtype, torch.float32)
    grouped = q.view(n, t, kv_heads, heads // kv_heads, dim).permute(0, 2, 3, 1, 4).to(exact)
    scores = grouped @ k.to(exact).transpose(-1, -2)[:, :, None] * (dim**-0.5 if scale is None else scale)
    if isinstance(mask, str):
        mask = torch.ones(t, context, dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    p = scores.softmax(-1)
    out = p @ v.to(exact)[:, :, None]
    if low is not None:
        assert z is not None
        b = low.b.to(q.device, exact).view(-1, kv_heads, dim).transpose(0, 1)  # [kv heads, rank, d]
        out = out + low.scale * (p @ z.to(exact)[:, None, None]) @ b[None, :, None]
    return out.permute(0, 3, 1, 2, 4).reshape(n, t, heads, dim).to(q.dtype), p
