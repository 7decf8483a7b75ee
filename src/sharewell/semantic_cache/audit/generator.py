"""Discrete search for a suffix that moves a prompt's key onto another question's key.

Source: "From Similarity to Vulnerability: Key Collision Attack on LLM Semantic Caching" (Zhang et al., 2026,
arXiv 2601.23088), whose search is greedy coordinate gradient (Zou et al., 2023, arXiv 2307.15043).
Differences: a candidate may change several positions at once while that still helps, some candidates drop or
add a word (a length is the most words, not the exact number), and all candidates of a step are scored as
text, in batches, by the deployed embedder.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ...models import Embedder
from .gradients import Proposer, View


@dataclass(frozen=True)
class SearchConfig:
    """How the search runs: suffix lengths in words, steps per length, candidates a step, words kept per
    position.

    ``patience`` steps without progress end a length. ``shortlist`` candidates a step, the nearest, are given
    to the penalties, which cost more than the similarity.
    """

    suffix_lengths: tuple[int, ...] = (10, 20, 40)
    steps: int = 200
    batch: int = 32
    top_k: int = 64
    patience: int = 12
    shortlist: int = 6

    def __post_init__(self) -> None:
        object.__setattr__(self, "suffix_lengths", tuple(self.suffix_lengths))
        lengths = self.suffix_lengths
        if not lengths or not all(type(n) is int and 1 <= n <= 200 for n in lengths):
            raise ValueError(f"suffix_lengths must be whole numbers in [1, 200], got {lengths!r}")
        for name in ("steps", "batch", "top_k", "patience", "shortlist"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")


class Penalty(Protocol):
    """Something else that the attacker wants small: perplexity, or the distance to passing a defence."""

    weight: float

    def __call__(self, texts: Sequence[str], victim: str) -> NDArray[np.float64]:
        """[n], at least 0."""
        ...

    def passed(self, values: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Which of these values need no further work."""
        ...

    def views(self, source_words: int, suffix_words: int) -> Sequence[Sequence[int]]:
        """Word indices of the parts of the text whose similarity to the victim lowers this penalty."""
        ...


@dataclass(frozen=True)
class Collision:
    """The best text found: ``similarity`` of its key to the victim's, and whether that and every penalty
    suffice.

    ``history`` holds the best similarity after each step.
    """

    text: str
    suffix: tuple[str, ...]
    similarity: float
    penalties: tuple[float, ...]
    reached: bool
    steps: int
    scored: int
    history: tuple[float, ...] = field(default=(), repr=False)


class CollisionSearch:
    """Searches suffixes with ``proposer`` and scores them on ``embedder``, the one that is deployed."""

    def __init__(
        self,
        embedder: Embedder,
        proposer: Proposer,
        config: SearchConfig,
        rng: np.random.Generator,
        penalties: Sequence[Penalty] = (),
    ) -> None:
        self.embedder, self.proposer, self.config = embedder, proposer, config
        self.penalties, self._rng = tuple(penalties), rng
        self._places = {word: i for i, word in enumerate(proposer.vocabulary)}

    def random_suffix(self, length: int) -> tuple[str, ...]:
        """``length`` words drawn from the vocabulary: the control, and where the search begins."""
        words = self.proposer.vocabulary
        return tuple(words[int(i)] for i in self._rng.integers(len(words), size=length))

    def search(
        self,
        source: str,
        victim: str,
        target: float,
        *,
        stop: Callable[[], bool] = lambda: False,
        starts: Sequence[Sequence[str]] = (),
    ) -> Collision:
        """Find a suffix of ``source`` whose text is within ``target`` of ``victim`` and passes every penalty.

        ``starts`` are suffixes that are tried first. ``stop`` is asked before each step and ends the search
        with the best text so far. Raises ValueError for ``target`` outside (0, 1) or empty texts.
        """
        if not 0 < target < 1:
            raise ValueError(f"target must be in (0, 1), got {target}")
        if not source.strip() or not victim.strip():
            raise ValueError("source and victim must not be empty")
        wanted = self.embedder.embed([victim])[0]
        state = _State(self, source, victim, wanted, target)
        if starts:
            state.consider([tuple(s) for s in starts])
        for length in self.config.suffix_lengths:
            if state.done or stop():
                break
            self._one_length(state, length, stop)
        return state.collision()

    def _one_length(self, state: _State, length: int, stop: Callable[[], bool]) -> None:
        config, best = self.config, state.suffix
        # a longer suffix starts from the best shorter one, so that no work is lost
        suffix = best + self.random_suffix(max(0, (length if not best else 1 + length // 4) - len(best)))
        state.longest = max(length, len(suffix))
        state.restart(suffix)
        swaps, idle = max(1, len(suffix) // 2), 0
        for _ in range(config.steps):
            if state.done or idle >= config.patience or stop():
                return
            improved = state.consider(self._candidates(state, swaps))
            idle = 0 if improved else idle + 1
            # many words at once while the suffix is random, one at a time near the end
            swaps = swaps if improved and swaps > 1 else max(1, swaps // 2)
            state.steps += 1
            state.history.append(state.best_similarity)

    def _candidates(self, state: _State, swaps: int) -> list[tuple[str, ...]]:
        suffix, config = state.suffix, self.config
        views, weights = self._views(state.source.split(), suffix)
        scores = self.proposer.scores(views, len(suffix), state.victim, weights)
        scores -= np.array([self._score_of(scores[i], word) for i, word in enumerate(suffix)])[:, None]
        k = min(config.top_k, scores.shape[1])
        top = np.argpartition(-scores, k - 1, axis=1)[:, :k]
        vocabulary, rng, out = self.proposer.vocabulary, self._rng, []

        def word(place: int) -> str:
            return vocabulary[int(top[place, rng.integers(k)])]

        # the most promising single exchanges wherever they are, beside the paper's uniform draw of a position
        kept = np.take_along_axis(scores, top, axis=1)
        first = np.argsort(-kept, axis=None)[: 2 * config.batch]
        for i in range(config.batch):
            words = list(suffix)
            place = int(rng.integers(len(words)))
            if i % 8 == 0 and len(words) > 1:
                del words[place]
            elif i % 8 == 4 and len(words) < state.longest:
                words.insert(place + int(rng.integers(2)), word(place))
            elif i % 4 == 2:
                at, column = divmod(int(first[rng.integers(len(first))]), k)
                words[at] = vocabulary[int(top[at, column])]
            else:
                count = int(rng.integers(1, swaps + 1)) if i % 2 else 1
                for other in rng.permutation(len(suffix))[:count]:
                    words[int(other)] = word(int(other))
            out.append(tuple(words))
        return out

    def _score_of(self, scores: NDArray[np.float32], word: str) -> float:
        place = self._places.get(word)
        return float(scores.mean() if place is None else scores[place])

    def _views(self, source: list[str], suffix: tuple[str, ...]) -> tuple[list[View], list[float]]:
        words = (*source, *suffix)
        places = (*[-1] * len(source), *range(len(suffix)))
        views, weights = [View(words, places)], [1.0]
        for penalty in self.penalties:
            parts = penalty.views(len(source), len(suffix))
            for part in parts:
                views.append(View(tuple(words[i] for i in part), tuple(places[i] for i in part)))
                weights.append(penalty.weight / len(parts))
        return views, weights


class _State:
    """The best suffix of one search."""

    def __init__(
        self,
        search: CollisionSearch,
        source: str,
        victim: str,
        wanted: NDArray[np.float32],
        target: float,
    ) -> None:
        self._search, self.source, self.victim = search, source, victim
        self._wanted, self._target = wanted, target
        self.suffix: tuple[str, ...] = ()
        self._kept: tuple[float, float, tuple[float, ...], tuple[str, ...]] = (math.inf, -1.0, (), ())
        self._loss = math.inf
        self.done, self.steps, self.scored, self.longest = False, 0, 0, 0
        self.history: list[float] = []

    @property
    def best_similarity(self) -> float:
        return self._kept[1]

    def text(self, suffix: Sequence[str]) -> str:
        return " ".join((self.source, *suffix))

    def restart(self, suffix: tuple[str, ...]) -> None:
        """Continue from ``suffix``, whose loss may be above that of the best; the best is kept."""
        self._loss = math.inf
        self.consider([suffix])

    def consider(self, suffixes: Sequence[tuple[str, ...]]) -> bool:
        """Score suffixes as text and take the best of them when it is better than the current one."""
        search = self._search
        texts = [self.text(s) for s in suffixes]
        near = search.embedder.embed(texts) @ self._wanted
        self.scored += len(texts)
        shortfall = np.maximum(0.0, self._target - near.astype(np.float64))
        rows = np.argsort(shortfall - 1e-6 * near, kind="stable")[: search.config.shortlist]
        losses, values = shortfall[rows].copy(), np.zeros((len(rows), len(search.penalties)))
        enough = near[rows] >= self._target
        for column, penalty in enumerate(search.penalties):
            values[:, column] = penalty([texts[i] for i in rows], self.victim)
            losses += penalty.weight * values[:, column]
            enough &= penalty.passed(values[:, column])
        losses -= 1e-3 * near[rows]  # among equals the nearer one
        best = int(np.argmin(np.where(enough, losses - 1e6, losses)))
        row = int(rows[best])
        found = (float(losses[best]), float(near[row]), tuple(values[best].tolist()), suffixes[row])
        if bool(enough[best]) or found[0] < self._kept[0]:
            self._kept = found
        self.done = self.done or bool(enough[best])
        if found[0] >= self._loss - 1e-6:
            return False
        self._loss, self.suffix = found[0], suffixes[row]
        return True

    def collision(self) -> Collision:
        _, similarity, penalties, suffix = self._kept
        return Collision(
            self.text(suffix),
            suffix,
            similarity,
            penalties,
            self.done,
            self.steps,
            self.scored,
            tuple(self.history),
        )
