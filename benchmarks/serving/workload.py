"""Prompts of exact lengths out of a text that comes with Python, the same for every contender."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

Prompt = list[int]


@cache
def _text_ids(tokenizer_json: Path) -> np.ndarray:
    """Token ids of the language reference in :mod:`pydoc_data.topics` (about 190,000 tokens of English)."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    return np.asarray(Tokenizer.from_file(str(tokenizer_json)).encode(text).ids, np.int64)


@dataclass
class Prompts:
    """Random cuts of the text, each beginning elsewhere: a prefix cache finds nothing in them. ``seed``
    fixes all of them."""

    folder: Path
    seed: int

    def __post_init__(self) -> None:
        self._ids = _text_ids(self.folder / "tokenizer.json")
        self._starts = np.random.default_rng(self.seed).permutation(len(self._ids) - 2048)
        self._used = 0

    def take(self, length: int) -> Prompt:
        """The next prompt, of ``length`` tokens."""
        start = int(self._starts[self._used])
        self._used += 1
        return self._ids[start : start + length].tolist()

    def batch(self, lengths: list[int]) -> list[Prompt]:
        """One prompt for each length."""
        return [self.take(n) for n in lengths]


def spaced_lengths(clients: int, low: int, high: int, seed: int) -> list[int]:
    """``clients`` lengths, evenly spaced from ``low`` to ``high`` tokens, in random order."""
    lengths = np.linspace(low, high, clients).round().astype(int)
    return np.random.default_rng(seed).permutation(lengths).tolist()
