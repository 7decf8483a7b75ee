"""The real embedder for tests that ask about the same texts again and again."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from sharewell.models import Embedder, load_embedder


class KnownTexts:
    """``embedder``, which embeds each text once."""

    def __init__(self, embedder: Embedder) -> None:
        self._embedder = embedder
        self._known: dict[str, NDArray[np.float32]] = {}
        self.id, self.dim, self.max_tokens = embedder.id, embedder.dim, embedder.max_tokens
        self.count_tokens, self.decode = embedder.count_tokens, embedder.decode

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        new = [t for t in dict.fromkeys(texts) if t not in self._known]
        if new:
            self._known.update(zip(new, self._embedder.embed(new), strict=True))
        return np.stack([self._known[t] for t in texts]) if texts else np.zeros((0, self.dim), np.float32)


@pytest.fixture(scope="session")
def known_minilm() -> KnownTexts:
    """all-MiniLM-L6-v2 as it ships, one for the whole test run."""
    return KnownTexts(load_embedder("minilm"))
