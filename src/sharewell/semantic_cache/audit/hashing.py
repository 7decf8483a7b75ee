"""The distance to a victim's key in caches that hash their keys with random hyperplanes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ...models import Embedder


class LocalityHash:
    """``|| tanh(a R e(x)) - tanh(a R e(victim)) ||^2 / (4 bits)`` with R random [bits, d] (arXiv 2601.23088):
    about the share of hash bits that differ. A penalty of the search, passed at ``most`` and below.
    """

    def __init__(
        self,
        embedder: Embedder,
        rng: np.random.Generator,
        bits: int = 256,
        sharpness: float = 10.0,
        most: float = 0.0,
        weight: float = 1.0,
    ) -> None:
        if bits < 1 or sharpness <= 0 or not 0 <= most <= 1 or weight < 0:
            raise ValueError(
                f"bits must be at least 1, sharpness above 0, most in [0, 1] and weight at least 0; got "
                f"{bits}, {sharpness}, {most}, {weight}"
            )
        self._embed, self.weight = embedder.embed, weight
        self._planes = rng.standard_normal((bits, embedder.dim)).astype(np.float32)
        self._sharpness, self._most = sharpness, most

    def __call__(self, texts: Sequence[str], victim: str) -> NDArray[np.float64]:
        """[n] in [0, 1]."""
        soft = np.tanh(self._sharpness * self._embed([victim, *texts]) @ self._planes.T).astype(np.float64)
        return ((soft[1:] - soft[0]) ** 2).mean(axis=1) / 4

    def bits(self, texts: Sequence[str]) -> NDArray[np.bool_]:
        """The hash itself, [n, bits]."""
        return self._embed(texts) @ self._planes.T > 0

    def passed(self, values: NDArray[np.float64]) -> NDArray[np.bool_]:
        """At most ``most`` of the bits differ."""
        return values <= self._most

    def views(self, source_words: int, suffix_words: int) -> Sequence[Sequence[int]]:
        """None: the cosine proposes."""
        return ()
