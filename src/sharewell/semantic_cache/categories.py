"""Which kind of question: rules that need no model first, then the nearest centroid, with the right to say "I
do not know"."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..models import Embedder
from .policy import DEFAULT


@dataclass(frozen=True)
class Classification:
    """``category``, and ``runner_up`` when it could as well be that one: then the stricter policy of both
    holds."""

    category: str
    runner_up: str | None = None


class Classifier(Protocol):
    """Any callable of this form. ``embedding`` is None where none was computed; answer None then to ask for
    it, or what needs none."""

    def __call__(self, text: str, embedding: NDArray[np.float32] | None, /) -> Classification | None: ...


_CODE = re.compile(
    r"```|\bdef \w+\(|\bclass \w+|#include\b|\bSELECT\b.+\bFROM\b|=>|\bimport \w+|[;{}]\s*$|\w+\(\w*\)"
    r"|\b(?!(?:Node|Vue|Next|Nuxt|Express|Three|D3)\.js)[\w/-]+\.(?:py|js|ts|rs|go|c|cpp|h|java|rb|sh|sql|toml|yaml|yml|json)\b|Traceback|\w+Error\b",
    re.MULTILINE,
)
_NOW = re.compile(
    r"\b(?:now|today|tonight|currently|current|latest|live|at the moment|right now"
    r"|this (?:morning|week|hour))\b"
    r"|\byesterday\b|\btomorrow\b",
    re.IGNORECASE,
)
_MOVING = re.compile(
    r"\b(?:price|stock|share|trading|weather|temperature|score|news|exchange rate|rate|traffic"
    r"|forecast|worth)\b"
    r"|\bhow much (?:is|does)\b|\b[A-Z]{2,5}\b",
)
_SENSITIVE = re.compile(
    r"\b(?:dose|dosage|symptoms?|diagnos\w+|medication|medicine|prescri\w+|pregnan\w+|side effects?|tablets?"
    r"|lawyer|lawsuit|legal(?:ly)?|contract|visa|custody|divorce|liab\w+|my (?:doctor|health))\b",
    re.IGNORECASE,
)


class RuleClassifier:
    """Code, live data and medical or legal questions by what they look like. None when no rule fires."""

    def __call__(self, text: str, embedding: NDArray[np.float32] | None) -> Classification | None:
        found = [
            category
            for category, fires in (
                ("live", bool(_NOW.search(text) and _MOVING.search(text))),
                ("sensitive", bool(_SENSITIVE.search(text))),
                ("code", bool(_CODE.search(text))),
            )
            if fires
        ]
        return Classification(found[0], found[1] if len(found) > 1 else None) if found else None


class CentroidClassifier:
    """The category whose examples' centre is nearest, from at most some fifty examples each.

    Nearest where distances are measured in what varies little within a category (Fisher 1936; the shared
    covariance is shrunk towards a multiple of the identity by ``shrink``, since examples are few): by the
    cosine alone ``capital of Peru`` is as near to weather in cities as to capitals. Below ``reject`` (cosine
    to the centre of its category) it is "default"; when the second category's share of the posterior is at
    least ``doubt``, both are named. ``reject=None`` takes the 2nd percentile of the examples' own cosines.
    Raises ValueError for categories without examples, or for ``shrink`` or ``doubt`` outside (0, 1].
    """

    def __init__(
        self,
        embedder: Embedder,
        examples: Mapping[str, Sequence[str]],
        *,
        reject: float | None = None,
        doubt: float = 0.2,
        shrink: float = 0.5,
    ) -> None:
        empty = [name for name, texts in examples.items() if not texts]
        if empty or len(examples) < 2:
            raise ValueError(f"examples must hold texts of two or more categories, got none for {empty}")
        for name, value in (("doubt", doubt), ("shrink", shrink)):
            if not 0 < value <= 1:
                raise ValueError(f"{name} must be in (0, 1], got {value}")
        self.names, self.doubt = tuple(examples), doubt
        centres, within, own = [], [], []
        for texts in examples.values():
            vectors = embedder.embed(list(texts)).astype(np.float64)
            total = vectors.sum(axis=0)
            centres.append(total / len(texts))
            within.append(vectors - centres[-1])
            if len(texts) > 1:  # each example's cosine to the centre of the others
                others = total - vectors
                others /= np.maximum(np.linalg.norm(others, axis=1, keepdims=True), 1e-12)
                own += (vectors * others).sum(axis=1).tolist()
        centre, spread = np.stack(centres), np.concatenate(within)
        self.centroids = _unit(centre).astype(np.float32)
        covariance = spread.T @ spread / len(spread)
        variance = max(float(np.trace(covariance)) / len(covariance), 1e-9)
        mixed = (1 - shrink) * covariance + shrink * variance * np.eye(len(covariance))
        slopes = np.linalg.solve(mixed, centre.T).T
        self._slopes = slopes.astype(np.float32)
        self._offsets = (-0.5 * (slopes * centre).sum(axis=1)).astype(np.float32)
        self.reject = float(np.percentile(own, 2)) if reject is None and own else reject or 0.0

    def __call__(self, text: str, embedding: NDArray[np.float32] | None) -> Classification | None:
        if embedding is None:
            return None
        scores = self._slopes @ embedding + self._offsets
        order = np.argsort(-scores)
        best, second = int(order[0]), int(order[1])
        if float(self.centroids[best] @ embedding) < self.reject:
            return Classification(DEFAULT)
        posterior = np.exp(scores - scores[best])
        close = posterior[second] / posterior.sum() >= self.doubt
        return Classification(self.names[best], self.names[second] if close else None)


def _unit(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


class Cascade:
    """Classifiers asked in turn; the first that knows decides, and nobody knowing means "default"."""

    def __init__(self, *classifiers: Classifier) -> None:
        self.classifiers = classifiers

    def __call__(self, text: str, embedding: NDArray[np.float32] | None) -> Classification | None:
        for classifier in self.classifiers:
            found = classifier(text, embedding)
            if found is not None:
                return found
        return None if embedding is None else Classification(DEFAULT)


@cache
def shipped_examples() -> dict[str, tuple[str, ...]]:
    """A few questions of each shipped category, enough to begin with."""
    path = Path(__file__).parent / "data" / "categories.json"
    return {name: tuple(texts) for name, texts in json.loads(path.read_text("utf-8")).items()}


def default_classifier(embedder: Embedder | None) -> Classifier:
    """The rules, and with an embedder the shipped examples behind them."""
    if embedder is None:
        return RuleClassifier()
    return Cascade(RuleClassifier(), CentroidClassifier(embedder, shipped_examples()))
