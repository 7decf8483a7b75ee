"""What an attacker minimises beside the distance: perplexity, and the distance to passing the defences."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from ...models import Embedder
from ..base import Context, Defence, Entry, Query
from ..defences import CropConsistency
from ..policy import CategoryPolicy

ATTACKER, VICTIM = "sharewell-audit-attacker", "sharewell-audit-victim"


class Perplexity:
    """``weight * log PPL`` (lambda of arXiv 2601.23088, 0.05), which ranks candidates as text and never ends
    a search.

    ``log_perplexity`` maps texts to natural logarithms, [n].
    """

    def __init__(
        self, log_perplexity: Callable[[Sequence[str]], NDArray[np.float64]], weight: float = 0.05
    ) -> None:
        if weight < 0:
            raise ValueError(f"weight must be at least 0, got {weight}")
        self.weight, self._log_perplexity = weight, log_perplexity

    def __call__(self, texts: Sequence[str], victim: str) -> NDArray[np.float64]:
        """[n] log perplexities."""
        return self._log_perplexity(texts)

    def passed(self, values: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Always."""
        return np.ones(len(values), bool)

    def views(self, source_words: int, suffix_words: int) -> Sequence[Sequence[int]]:
        """None: the cosine proposes, perplexity only ranks."""
        return ()


class PassDefences:
    """The adaptive attacker: knows the defences and their thresholds, and pays for what is missing to pass.

    The value is the sum over defences of how far the margin (``Verdict.score``) is below 0; a refusal without
    a score counts 1. The gradient also pulls the parts that crop consistency looks at towards the victim.
    """

    def __init__(
        self,
        defences: Sequence[Defence],
        embedder: Embedder,
        threshold: float,
        answer: str,
        weight: float = 1.0,
    ) -> None:
        self.defences, self.weight = tuple(defences), weight
        self._embed = _Remembering(embedder)
        self._threshold, self._answer = threshold, answer
        self._policy = CategoryPolicy(threshold)

    def __call__(self, texts: Sequence[str], victim: str) -> NDArray[np.float64]:
        """[n], 0 where every defence accepts."""
        embedded = self._embed([victim, *texts])
        query = Query(victim, "audit", VICTIM, "default", embedded[0])
        out = np.zeros(len(texts))
        for i, text in enumerate(texts):
            similarity = float(np.dot(embedded[0], embedded[i + 1]))
            context = Context(self._embed, self._policy, 0.0, similarity, self._threshold)
            out[i] = sum(
                self._missing(defence, query, text, embedded[i + 1], context) for defence in self.defences
            )
        return out

    def _missing(
        self, defence: Defence, query: Query, text: str, vector: NDArray[np.float32], context: Context
    ) -> float:
        kept = Entry(
            0, "audit", ATTACKER, "default", text, vector, self._answer, 0.0, answer_text=self._answer
        )
        admitted = defence.admit(kept, context)
        total = 0.0 if admitted.ok else _short(admitted.score)
        if admitted.crops is not None:
            kept = Entry(
                0, "audit", ATTACKER, "default", text, vector, self._answer, 0.0, admitted.crops, self._answer
            )
        verdict = defence.accept(query, kept, context)
        return total + (0.0 if verdict.ok else _short(verdict.score))

    def passed(self, values: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Where nothing is missing."""
        return values <= 0

    def views(self, source_words: int, suffix_words: int) -> Sequence[Sequence[int]]:
        """First half, last half and first two thirds, when crops are compared."""
        if not any(isinstance(d, CropConsistency) for d in self.defences):
            return ()
        n = source_words + suffix_words
        half = max(1, (n + 1) // 2)
        return (range(half), range(n - half, n), range(max(1, round(n * 2 / 3))))


class _Remembering:
    """``embedder.embed`` that keeps the newest vectors: candidates of one step share most of their parts."""

    def __init__(self, embedder: Embedder, capacity: int = 20_000) -> None:
        self._embedder, self._capacity = embedder, capacity
        self._known: dict[str, NDArray[np.float32]] = {}

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float32]:
        new = [t for t in dict.fromkeys(texts) if t not in self._known]
        if new:
            if len(self._known) + len(new) > self._capacity:
                self._known = {t: self._known[t] for t in texts if t in self._known}
            self._known.update(zip(new, self._embedder.embed(new), strict=True))
        return np.stack([self._known[t] for t in texts])


def _short(score: float | None) -> float:
    return 1.0 if score is None else max(1e-3, -score)


def victim_words(victim: str, longest: int) -> list[tuple[str, ...]]:
    """Suffixes that an attacker tries first who has seen the defences: the question's own words, once, twice
    and three times."""
    words = tuple(victim.split())
    return [s for k in (1, 2, 3) if len(s := words * k) <= max(longest, len(words))]
