"""Who updates when, and how old the news is that each update sees."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

# Players that update now, and the age in ticks of what each sees of each other: None when all is fresh, else
# [updating, players, blocks].
Move = tuple[np.ndarray, np.ndarray | None]


class Schedule(Protocol):
    """One call of ``moves`` is one iteration. ``max_delay``: the oldest news, in ticks. ``deterministic``:
    whether a repeated profile means a cycle. ``patience``: ticks after which a player that has not updated
    counts as stalled; None when every player updates in every iteration."""

    @property
    def max_delay(self) -> int: ...

    @property
    def deterministic(self) -> bool: ...

    @property
    def patience(self) -> float | None: ...

    def moves(self, tick: int, players: np.ndarray, total: int, rng: np.random.Generator) -> Iterator[Move]:
        """The moves of iteration ``tick`` of the ``players`` still in the game, out of ``total``."""
        ...


@dataclass(frozen=True)
class Sequential:
    """One after the other, each seeing what those before did (Gauss-Seidel). An iteration is a sweep in
    ``order``, ascending when None."""

    order: tuple[int, ...] | None = None
    max_delay = 0
    deterministic = True
    patience = None

    def moves(self, tick: int, players: np.ndarray, total: int, rng: np.random.Generator) -> Iterator[Move]:
        order = range(total) if self.order is None else self.order
        if sorted(order) != list(range(total)):
            raise ValueError(f"order must name each of the {total} players once, got {self.order}")
        present = set(players.tolist())
        for player in order:
            if player in present:
                yield np.array([player]), None


@dataclass(frozen=True)
class Simultaneous:
    """All at once, each seeing the round before (Jacobi)."""

    max_delay = 0
    deterministic = True
    patience = None

    def moves(self, tick: int, players: np.ndarray, total: int, rng: np.random.Generator) -> Iterator[Move]:
        yield players, None


@dataclass(frozen=True)
class Asynchronous:
    """Each player updates in a tick with probability ``p_update`` (one for all, or one each), on news whose
    age is drawn anew from 0 to ``max_delay`` ticks for every pair of players and each of ``blocks`` equal
    parts of the carriers. News is always something that was really played.

    A player whose own probability is 0 never updates and will be reported as stalled.
    """

    p_update: float | tuple[float, ...] = 0.5
    max_delay: int = 5
    seed: int = 0
    blocks: int = 1
    deterministic = False

    def __post_init__(self) -> None:
        given = self.p_update if isinstance(self.p_update, tuple) else (self.p_update,)
        if not given or not all(0 <= p <= 1 for p in given) or max(given) == 0:
            raise ValueError(f"p_update must be in [0, 1] and not all 0, got {self.p_update}")
        if self.max_delay < 0:
            raise ValueError(f"max_delay must be at least 0, got {self.max_delay}")
        if self.blocks < 1:
            raise ValueError(f"blocks must be at least 1, got {self.blocks}")

    @property
    def patience(self) -> float:
        usual = max(self.p_update) if isinstance(self.p_update, tuple) else self.p_update
        return self.max_delay + 1 / usual

    def moves(self, tick: int, players: np.ndarray, total: int, rng: np.random.Generator) -> Iterator[Move]:
        p: Any = self.p_update
        if isinstance(p, tuple):
            if len(p) != total:
                raise ValueError(
                    f"p_update must have one probability for each of {total} players, got {len(p)}"
                )
            p = np.array(p)[players]
        chosen = players[rng.random(len(players)) < p]
        oldest = min(self.max_delay, tick)
        delays = rng.integers(0, oldest + 1, (len(chosen), total, self.blocks))
        if len(chosen):
            yield chosen, delays


@dataclass(frozen=True)
class DecayingStep:
    """Step a0 / (1 + t)^power: takes zero-mean errors of measurement out of the limit."""

    a0: float = 1.0
    power: float = 0.6

    def __post_init__(self) -> None:
        if not 0 < self.a0 <= 1:
            raise ValueError(f"a0 must be in (0, 1], got {self.a0}")
        if not 0.5 < self.power <= 1:
            raise ValueError(f"power must be in (0.5, 1], got {self.power}")

    def __call__(self, tick: int) -> float:
        return self.a0 / (1 + tick) ** self.power


def schedule_of(name: str, *, max_delay: int = 5, p_update: float = 0.5, seed: int = 0) -> Schedule:
    """``sequential``, ``simultaneous`` or ``asynchronous`` (``async``). Raises ValueError for others."""
    if name == "sequential":
        return Sequential()
    if name == "simultaneous":
        return Simultaneous()
    if name in ("asynchronous", "async"):
        return Asynchronous(p_update, max_delay, seed)
    raise ValueError(f"schedule must be sequential, simultaneous or asynchronous, got {name!r}")


def check_step(step: float | DecayingStep) -> None:
    """Raises ValueError when a constant step is outside (0, 1]."""
    if not isinstance(step, DecayingStep) and not (0 < step <= 1 and math.isfinite(step)):
        raise ValueError(f"step must be in (0, 1] or a DecayingStep, got {step}")
