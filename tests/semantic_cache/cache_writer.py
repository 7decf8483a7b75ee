"""A process that writes into a cache file as fast as it can and says what was acknowledged, line by line.

``python cache_writer.py FILE NAME``
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import numpy as np

from sharewell.semantic_cache import CacheSettings, CategoryPolicy, Classification, SemanticCache

DIM = 16
POLICIES = {
    "any": CategoryPolicy(threshold=0.999, ttl_s=1e6, quota=0.9),
    "default": CategoryPolicy(quota=0.1),
}


class Numbered:
    """A vector for every text, by its hash."""

    id, dim, max_tokens = "numbered", DIM, 1000

    def embed(self, texts) -> np.ndarray:
        rows = [np.random.default_rng(list(t.encode())).standard_normal(DIM) for t in texts]
        return np.stack([row / np.linalg.norm(row) for row in rows]).astype(np.float32)

    def count_tokens(self, texts) -> list[int]:
        return [1 for _ in texts]

    def decode(self, ids) -> str:
        return ""


def opened(path: Path) -> SemanticCache:
    return SemanticCache(
        path, Numbered(), POLICIES, lambda *_: Classification("any"), settings=CacheSettings(poll_s=0.05)
    )


def answer(text: str) -> str:
    return f"the answer to {text} " + "x" * (len(text) * 37 % 2000)


def main() -> None:
    path, name = Path(sys.argv[1]), sys.argv[2]
    with opened(path) as cache:
        for number in itertools.count():
            text = f"{name} asks {number}"
            looked = cache.lookup(text)
            if cache.put(text, answer(text), looked=looked):
                print(text, flush=True)
            if number % 50 == 49:
                cache.invalidate(text=f"{name} asks {number - 20}")


if __name__ == "__main__":
    main()
