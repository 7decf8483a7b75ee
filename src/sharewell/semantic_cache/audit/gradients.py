"""The gradient of a text's similarity with respect to the words of its suffix.

A proposal only: every candidate is scored afterwards as text, by the embedder that is deployed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from ...models import DifferentiableEmbedder, Embedder, SentenceTransformersFolder, Tokenizer

if TYPE_CHECKING:
    import torch

_PRINTABLE = re.compile(r"[a-z]{2,20}")


@dataclass(frozen=True)
class View:
    """Words of a text of which ``places[i]`` is the suffix position of word i, or -1."""

    words: tuple[str, ...]
    places: tuple[int, ...]


class Proposer(Protocol):
    """Which words may stand in a suffix, and how promising each is at each of its positions."""

    vocabulary: tuple[str, ...]

    def scores(
        self, views: Sequence[View], length: int, victim: str, weights: Sequence[float]
    ) -> NDArray[np.float32]:
        """float32 [length, words of the vocabulary]: higher lowers the loss more, to first order."""
        ...


def printable_words(embedder: Embedder, size: int) -> tuple[str, ...]:
    """Whole lower-case words among the first ``size`` token ids.

    Only these survive decoding and tokenising again, so what was optimised is what is sent.
    """
    words = (embedder.decode([i]) for i in range(size))
    return tuple(dict.fromkeys(w for w in words if _PRINTABLE.fullmatch(w)))


class GradientProposer:
    """Scores from a differentiable twin of the deployed embedder (GCG, arXiv 2307.15043, step 1).

    The loss is ``sum_v w_v (1 - cos(e(view_v), e(victim)))``; the score of word t at position i is
    ``-g_i . E_t`` with ``g_i`` the gradient at the input embedding and ``E`` the embedding table.
    """

    def __init__(self, twin: SentenceTransformersFolder, tokenizer: Tokenizer) -> None:
        if not isinstance(twin, DifferentiableEmbedder):
            raise ValueError(f"twin must be a DifferentiableEmbedder, got {type(twin).__name__}")
        self.twin, self._tokenizer = twin, tokenizer
        tokenizer.backend.no_padding()  # some folders ask for a fixed width
        tokenizer.backend.no_truncation()
        pieces = (tokenizer.backend.id_to_token(i) for i in range(tokenizer.vocab_size))
        kept = [(i, p) for i, p in enumerate(pieces) if p is not None and _PRINTABLE.fullmatch(p)]
        self.vocabulary = tuple(p for _, p in kept)
        self._rows = np.array([i for i, _ in kept], np.int64)
        frame = tokenizer.encode("", add_special_tokens=True)
        self._start, self._end = frame[:1], frame[1:]
        self._targets: dict[str, torch.Tensor] = {}

    @classmethod
    def from_folder(cls, folder: Path | str) -> GradientProposer:
        """From a sentence-transformers folder. Raises ModelError when it is none."""
        return cls(SentenceTransformersFolder(folder), Tokenizer(folder))

    @cached_property
    def _table(self) -> torch.Tensor:
        return self.twin.model.get_input_embeddings().weight.detach()

    @cached_property
    def _allowed(self) -> torch.Tensor:
        return self._table[self._rows].contiguous()

    def scores(
        self, views: Sequence[View], length: int, victim: str, weights: Sequence[float]
    ) -> NDArray[np.float32]:
        """See :class:`Proposer`."""
        _, gradient = self.loss_and_gradient(views, length, victim, weights)
        return (-(gradient @ self._allowed.T)).numpy()

    def loss_and_gradient(
        self, views: Sequence[View], length: int, victim: str, weights: Sequence[float]
    ) -> tuple[float, torch.Tensor]:
        """The loss of ``views`` and its gradient [length, hidden] at the suffix positions, summed over
        views."""
        import torch

        if victim not in self._targets:
            self._targets[victim] = torch.from_numpy(self.twin.embed([victim]))[0]
        rows, owners = [], []
        for view in views:
            ids, places = list(self._start), [-1] * len(self._start)
            for word, place in zip(view.words, view.places, strict=True):
                pieces = self._tokenizer.encode(word)
                ids += pieces
                places += [place if len(pieces) == 1 else -1] * len(pieces)
            ids, places = ids[: self.twin.max_tokens - 1], places[: self.twin.max_tokens - 1]
            rows.append(ids + self._end)
            owners.append(places + [-1] * len(self._end))
        width = max(map(len, rows))
        padded = torch.tensor([r + [0] * (width - len(r)) for r in rows])
        mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows])
        inputs = self._table[padded].requires_grad_()
        similarity = self.twin.embed_from_inputs(inputs, mask) @ self._targets[victim]
        loss = (torch.tensor(list(weights)) * (1 - similarity)).sum()
        (at_inputs,) = torch.autograd.grad(loss, inputs)
        gradient = torch.zeros(length, at_inputs.shape[-1])
        for row, places in enumerate(owners):
            for column, place in enumerate(places):
                if place >= 0:
                    gradient[place] += at_inputs[row, column]
        return float(loss.detach()), gradient


class RandomProposer:
    """Every word equally promising: the black-box mode, for embedders without gradients."""

    def __init__(self, vocabulary: Sequence[str], rng: np.random.Generator) -> None:
        if not vocabulary:
            raise ValueError("vocabulary must not be empty")
        self.vocabulary, self._rng = tuple(vocabulary), rng

    def scores(
        self, views: Sequence[View], length: int, victim: str, weights: Sequence[float]
    ) -> NDArray[np.float32]:
        """See :class:`Proposer`."""
        return self._rng.random((length, len(self.vocabulary)), np.float32)
