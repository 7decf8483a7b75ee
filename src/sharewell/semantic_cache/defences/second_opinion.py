"""Another view of both texts must agree: another embedder, or the words themselves."""

from __future__ import annotations

import numpy as np

from ...models import Embedder
from ..base import Context, Entry, Query
from ..slots import disagreement
from .scored import ScoredDefence
from .words import content_words, explained


class SecondOpinion(ScoredDefence):
    """Without ``embedder``: the slots must agree (see :class:`SlotVerifier`; 1 or 0), and ``overlap``, the
    smaller of the shares of content words of each text that have a like word in the other, must suffice. With
    ``embedder``, one with another tokenizer or pooling than the cache's, its similarity as well: a collision
    then has to fool both, at the price of two embeddings a candidate.
    """

    name = "second"

    def __init__(self, embedder: Embedder | None = None, tau: float = 0.7, min_overlap: float = 0.2) -> None:
        self.embedder = embedder
        self.score_names = ("slots", "overlap") + (("similarity",) if embedder else ())
        super().__init__((1.0, min_overlap) + ((tau,) if embedder else ()))

    def scores(self, query: Query, entry: Entry, context: Context) -> tuple[float, ...]:
        """(slots, overlap) and, with an embedder, (similarity)."""
        a, b = query.text, entry.text
        same = not disagreement(a, b)
        asked, kept = content_words(a), content_words(b)
        lexical = (float(same), min(explained(asked, kept), explained(kept, asked)))
        if self.embedder is None:
            return lexical
        vectors = self.embedder.embed([a, b])
        return (*lexical, float(np.dot(vectors[0], vectors[1])))
