"""GPTCache 0.1.44 with sqlite and faiss: what it answers to the same pairs, and how many lookups a second.

Its own evaluation turns an L2 distance into a score; here each hit's distance is kept, so that every
threshold can be read off one run.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def available() -> bool:
    """Is GPTCache installed, with what its sqlite and faiss stores need?"""
    try:
        import cachetools  # noqa: F401
        import faiss  # noqa: F401
        import gptcache  # noqa: F401
        import sqlalchemy  # noqa: F401
    except ImportError:
        return False
    return True


class Peer:
    """One GPTCache. ``embed`` maps a text to float32 ``[dim]``; ``threshold`` is a cosine."""

    def __init__(self, folder: Path, embed: Callable[[str], np.ndarray], dim: int, threshold: float) -> None:
        from gptcache import Cache, Config
        from gptcache.manager import CacheBase, VectorBase, get_data_manager
        from gptcache.processor.pre import get_prompt
        from gptcache.similarity_evaluation.distance import SearchDistanceEvaluation

        os.environ.setdefault("GPTCACHE_LOG_LEVEL", "ERROR")
        self.cache = Cache()
        rows = CacheBase("sqlite", sql_url=f"sqlite:///{folder / 'gptcache.db'}")
        vectors = VectorBase("faiss", dimension=dim, index_path=str(folder / "gptcache.index"), top_k=4)
        self.cache.init(
            pre_embedding_func=get_prompt,
            embedding_func=lambda text, **_: embed(text),
            data_manager=get_data_manager(rows, vectors, max_size=1_000_000),
            similarity_evaluation=SearchDistanceEvaluation(),
            config=Config(similarity_threshold=self.score(threshold), log_time_func=None),
        )

    @staticmethod
    def score(cosine: float) -> float:
        """Its threshold for a cosine: squared distances run from 0 to 4, and 2 - 2 cos is one of them."""
        return 1 - (2 - 2 * cosine) / 4

    def put(self, question: str, answer: str) -> None:
        from gptcache.adapter.api import put

        put(question, answer, cache_obj=self.cache)

    def get(self, question: str) -> Any:
        from gptcache.adapter.api import get

        return get(question, cache_obj=self.cache)


def answers(peer: Peer, questions: Sequence[str]) -> list[Any]:
    """What it answers to each."""
    return [peer.get(q) for q in questions]
