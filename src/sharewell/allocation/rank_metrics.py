"""How good an order of results is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence


def ndcg(ranked: Sequence[str], gains: Mapping[str, float], k: int = 10) -> float:
    """nDCG@k with linear gains; 1 when nothing has a gain."""
    ideal = sorted(gains.values(), reverse=True)[:k]
    best = sum(g / math.log2(r + 2) for r, g in enumerate(ideal))
    got = sum(gains.get(item, 0.0) / math.log2(r + 2) for r, item in enumerate(ranked[:k]))
    return got / best if best > 0 else 1.0


def reciprocal_rank(ranked: Sequence[str], wanted: str) -> float:
    """1 / rank of ``wanted``, 0 when it is not there; its mean over queries is the MRR."""
    return 1.0 / (ranked.index(wanted) + 1) if wanted in ranked else 0.0


def list_distance(ranked: Sequence[str], reference: Sequence[str]) -> float:
    """Positional distance per shared item: mean of |rank - rank in ``reference``|; 0 when none is shared."""
    place = {item: r for r, item in enumerate(reference)}
    shared = [abs(r - place[item]) for r, item in enumerate(ranked) if item in place]
    return sum(shared) / len(shared) if shared else 0.0
