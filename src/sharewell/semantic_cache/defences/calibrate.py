"""Thresholds of defences from benign pairs, within a budget of hits that may be lost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...models import Embedder
from ..base import Context, Defence, Entry, Query
from ..policy import CategoryPolicy
from .scored import ScoredDefence

Embed = Callable[[Sequence[str]], NDArray[np.float32]]


@dataclass(frozen=True)
class BenignPair:
    """A stored question and a later wording of it that its answer fits."""

    stored: str
    asked: str


@dataclass(frozen=True)
class Calibration:
    """What was set and what it costs: benign hits at the threshold, and the share of them that is lost."""

    hits: int
    loss: float
    thresholds: dict[str, tuple[float, ...]]


def calibrate_defences(
    embedder: Embedder,
    benign_pairs: Sequence[BenignPair],
    defences: Sequence[ScoredDefence],
    *,
    threshold: float,
    max_hit_loss: float = 0.1,
) -> Calibration:
    """Raise the thresholds of ``defences`` together as far as at most ``max_hit_loss`` of the benign hits are
    lost, and set them.

    All scores get the same quantile of their own benign distribution, the greatest for which the combination
    stays within the budget. A yes-or-no score (slots) has no quantiles and is left as it is. What it costs
    comes first, but the others keep at least half of the budget: then the loss may exceed it by that half.
    Pairs below ``threshold``, the cache's, are no hits and do not count. Raises ValueError for a budget
    outside [0, 1), a threshold outside (0, 1] or fewer than 20 benign hits.
    """
    if not 0 <= max_hit_loss < 1:
        raise ValueError(f"max_hit_loss must be in [0, 1), got {max_hit_loss}")
    hits = _hits(embedder, benign_pairs, threshold)
    if len(hits) < 20:
        raise ValueError(f"benign_pairs must give at least 20 hits at threshold {threshold}, got {len(hits)}")
    scores = [
        np.array([defence.scores(query, entry, context) for query, entry, context in hits])
        for defence in defences
    ]
    free = [
        [len(np.unique(column)) > 2 for column in np.atleast_2d(table.T)] for table in scores
    ]  # a yes-or-no score has no quantiles

    def at(quantile: float) -> list[tuple[float, ...]]:
        return [
            tuple(
                float(np.quantile(table[:, j], quantile, method="lower")) if is_free else old
                for j, (is_free, old) in enumerate(zip(kinds, defence.thresholds, strict=True))
            )
            for defence, table, kinds in zip(defences, scores, free, strict=True)
        ]

    def lost(chosen: Sequence[tuple[float, ...]]) -> float:
        refused = np.zeros(len(hits), bool)
        for table, limits in zip(scores, chosen, strict=True):
            refused |= (table < np.array(limits)).any(axis=1)
        return float(refused.mean())

    grid = [i / 200 for i in range(int(200 * max_hit_loss) + 1)]
    fixed = lost(at(0.0))  # the least of every free score loses nothing
    allowed = max(max_hit_loss, fixed + max_hit_loss / 2) if fixed else max_hit_loss
    best = max((q for q in grid if lost(at(q)) <= allowed), default=0.0)
    chosen = at(best)
    for defence, limits in zip(defences, chosen, strict=True):
        defence.thresholds = limits
    return Calibration(
        len(hits),
        lost(chosen),
        {d.name: d.thresholds for d in defences},
    )


def hit_loss(
    embedder: Embedder,
    benign_pairs: Sequence[BenignPair],
    defences: Sequence[Defence],
    *,
    threshold: float,
) -> tuple[int, int]:
    """(benign hits at ``threshold``, of them refused by a defence)."""
    hits = _hits(embedder, benign_pairs, threshold)
    lost = sum(any(not d.accept(*hit).ok for d in defences) for hit in hits)
    return len(hits), lost


def _hits(
    embedder: Embedder, pairs: Sequence[BenignPair], threshold: float
) -> list[tuple[Query, Entry, Context]]:
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must be in (0, 1], got {threshold}")
    texts = list(dict.fromkeys(t for pair in pairs for t in (pair.stored, pair.asked)))
    vectors = dict(zip(texts, embedder.embed(texts), strict=True)) if texts else {}
    policy, out = CategoryPolicy(threshold), []
    for pair in pairs:
        stored, asked = vectors[pair.stored], vectors[pair.asked]
        similarity = float(np.dot(stored, asked))
        if similarity < threshold:
            continue
        context = Context(embedder.embed, policy, 0.0, similarity, threshold)
        entry = Entry(0, "calibration", "stored", "default", pair.stored, stored, "", 0.0)
        out.append((Query(pair.asked, "calibration", "asked", "default", asked), entry, context))
    return out
