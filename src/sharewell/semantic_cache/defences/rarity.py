"""Texts that are unlike the traffic are not stored for others."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from ..base import Context, Entry, Query, Verdict

_ORDER = 4


class CharacterModel:
    """Character n-grams up to order 4 with Witten-Bell smoothing; :meth:`bits` is the mean of bits a
    character."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._counts: list[Counter[str]] = [Counter() for _ in range(_ORDER)]
        self._followers: list[Counter[str]] = [Counter() for _ in range(_ORDER)]
        self._totals: list[Counter[str]] = [Counter() for _ in range(_ORDER)]
        for text in texts:
            padded = _pad(text)
            for i in range(_ORDER - 1, len(padded)):
                for n in range(_ORDER):
                    gram = padded[i - n : i + 1]
                    if not self._counts[n][gram]:
                        self._followers[n][gram[:-1]] += 1
                    self._counts[n][gram] += 1
                    self._totals[n][gram[:-1]] += 1
        if not self._counts[0]:
            raise ValueError("texts must not be empty")

    def bits(self, text: str) -> float:
        """Mean of ``-log2 p`` a character; 0 of the empty text."""
        padded = _pad(text)
        total = 0.0
        for i in range(_ORDER - 1, len(padded)):
            p = 1 / 256
            for n in range(_ORDER):
                gram = padded[i - n : i + 1]
                seen, kinds = self._totals[n][gram[:-1]], self._followers[n][gram[:-1]]
                if seen:
                    p = (self._counts[n][gram] + kinds * p) / (seen + kinds)
            total -= math.log2(p)
        return total / max(1, len(padded) - _ORDER + 1)


class RarityScreen:
    """Refuses at admission what is rarer than ``percentile`` of ``benign`` texts (leave-one-fifth-out).

    ``model`` maps a text to its rarity; without one a :class:`CharacterModel` of ``benign`` is used. Weak
    alone, and no defence at all when the attacker optimises against the very same model. Raises ValueError
    for fewer than 20 benign texts.
    """

    name = "rarity"

    def __init__(
        self,
        benign: Sequence[str],
        percentile: float = 99.5,
        model: Callable[[str], float] | None = None,
    ) -> None:
        if len(benign) < 20:
            raise ValueError(f"benign must have at least 20 texts, got {len(benign)}")
        if not 50 <= percentile <= 100:
            raise ValueError(f"percentile must be in [50, 100], got {percentile}")
        if model is None:
            # texts of the model's own training set look too common, so each fifth is scored by the rest
            held = [
                CharacterModel(t for i, t in enumerate(benign) if i % 5 != k).bits(text)
                for k in range(5)
                for text in benign[k::5]
            ]
            model = CharacterModel(benign).bits
        else:
            held = [model(text) for text in benign]
        self.rarity = model
        self.threshold = float(np.percentile(held, percentile))

    def admit(self, entry: Entry, context: Context) -> Verdict:
        """Refuse a text above the threshold; ``score`` is the margin."""
        margin = self.threshold - self.rarity(entry.text)
        return Verdict(margin >= 0, "" if margin >= 0 else "rarity: unlike the traffic", margin)

    def accept(self, query: Query, entry: Entry, context: Context) -> Verdict:
        """Everything that was admitted."""
        return Verdict(True)


def _pad(text: str) -> str:
    return "\n" * (_ORDER - 1) + text.casefold() + "\n"
