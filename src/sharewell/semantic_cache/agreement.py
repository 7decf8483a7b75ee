"""Do two answers say the same? What re-answered hits are judged by."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from .slots import disagreement

LEAST_COSINE = 0.85
SHORT_WORDS = 40


def answers_agree(
    one: str,
    other: str,
    embed: Callable[[Sequence[str]], NDArray[np.float32]],
    *,
    least: float = LEAST_COSINE,
) -> bool:
    """True for answers that are equal but for space and case, or whose cosine is at least ``least`` and, when
    both are short, whose numbers, negations, names and identifiers agree as well. ``embed`` maps texts to
    float32 ``[n, dim]`` of unit norm. An estimate: long answers to one question may differ in detail."""
    a, b = " ".join(one.split()), " ".join(other.split())
    if a.casefold() == b.casefold():
        return True
    if not a or not b:
        return False
    if max(len(a.split()), len(b.split())) <= SHORT_WORDS and disagreement(a, b):
        return False
    first, second = embed([a, b])
    return float(first @ second) >= least
