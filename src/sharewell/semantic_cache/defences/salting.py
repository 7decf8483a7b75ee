"""A secret template around every text before it is embedded. Weak alone: most attacks survive it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ...models import Embedder


class SaltedEmbedder:
    """An embedder whose texts stand inside ``template``, e.g. ``"amber canyon: {text}"``; keep it secret.

    Its ``id`` changes with the template, so a cache refuses to mix both: rotating the salt means embedding
    again. Raises ValueError for a template without exactly one ``{text}``.
    """

    def __init__(self, embedder: Embedder, template: str) -> None:
        if template.count("{text}") != 1:
            raise ValueError("template must hold {text} exactly once")
        self._embedder = embedder
        self._before, self._after = template.split("{text}")
        self.dim, self.max_tokens = embedder.dim, embedder.max_tokens
        digest = hashlib.sha256(template.encode()).hexdigest()[:8]
        self.id = f"{embedder.id}-salt-{digest}"

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """As the inner embedder, of the salted texts."""
        return self._embedder.embed(self._salted(texts))

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """As the inner embedder, the salt included."""
        return self._embedder.count_tokens(self._salted(texts))

    def decode(self, ids: Sequence[int]) -> str:
        """As the inner embedder."""
        return self._embedder.decode(ids)

    def _salted(self, texts: Sequence[str]) -> list[str]:
        if isinstance(texts, str) or not all(isinstance(t, str) for t in texts):
            raise TypeError("texts must be a sequence of strings")
        return [self._before + text + self._after for text in texts]
