"""Sizes and shares of the cache."""

from __future__ import annotations

from dataclasses import dataclass

from .index import GRAPH_FROM


@dataclass(frozen=True)
class CacheSettings:
    """``capacity``: entries in all; ``neighbours``: candidates a lookup considers; ``poll_s``: how often
    other processes' entries are fetched, expired ones removed and counters written; ``max_response_bytes``:
    longer answers are not stored; ``min_response_chars``: nor are shorter ones; ``recall_share`` of the
    lookups on a graph are answered exactly as well, ``recheck_share`` of the semantic hits by the model as
    well. Raises ValueError naming the field and its range.
    """

    capacity: int = 100_000
    neighbours: int = 4
    poll_s: float = 1.0
    max_response_bytes: int = 256 << 10
    min_response_chars: int = 1
    recall_share: float = 0.01
    recheck_share: float = 0.01
    graph_from: int = GRAPH_FROM
    background: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("capacity", "neighbours", "max_response_bytes", "graph_from"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("recall_share", "recheck_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        for name in ("poll_s", "min_response_chars"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
