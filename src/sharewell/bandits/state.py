"""The statistics of a policy, and what each event of the journal does to them.

Nothing here reads a clock or draws a number: the same events in the same order give the same arrays to the
last bit, which is what a replay after a crash rests on.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from .change import ChangeDetectors, PageHinkley
from .hybrid import HybridModels
from .ledger import Event
from .ridge import Read, RidgeModels
from .statistics import RidgeStats

Kind = Literal["disjoint", "shared", "hybrid"]
_REMEMBERED = 100_000  # ends of decisions that are kept in memory


@dataclass(frozen=True, slots=True)
class Decision:
    """What was chosen for which row ``x``, with which probability, by which version of the statistics."""

    id: str
    arm: int
    x: np.ndarray
    mean: float
    propensity: float
    version: int


@dataclass(slots=True)
class Waiting:
    """A decision without its end. ``step``: how often its model had been decayed when it was made."""

    decision: Decision
    step: int
    unix_s: float
    in_window: bool = True
    partial: float = 0.0
    parts: set[str] = field(default_factory=set)


class PolicyState:
    """Models, decisions that wait, rows in the window, and ends; :meth:`_apply` is the only way to change
    them. ``_version`` is odd while it is at work."""

    def __init__(
        self,
        n_arms: int,
        dim: int,
        kind: Kind,
        shared_dim: int,
        lam: float,
        forget: float,
        refactor_every: int,
        window: int | None,
        change: PageHinkley | None,
    ) -> None:
        self.n_arms, self.dim, self.kind, self.lam, self.forget = n_arms, dim, kind, lam, forget
        self.shared_dim, self.window, self.change = shared_dim, window, change
        self.row_dim = shared_dim + dim
        self.counters: Counter[str] = Counter()  # settled, repeated, expired, changes
        models = 1 if kind == "shared" else n_arms
        if kind == "hybrid":
            self._models: Any = HybridModels(n_arms, dim, shared_dim, lam)
        else:
            self._models = RidgeModels(models, dim, lam, refactor_every)
        self._decays = np.zeros(models, dtype=np.int64)
        self._detectors = None if change is None else ChangeDetectors(change, models)
        self._rows: list[deque[list[Any]]] = [deque() for _ in range(models)]  # [x, weight, y or None, id]
        self._waiting: dict[str, Waiting] = {}
        self._ended: OrderedDict[str, str] = OrderedDict()
        self._version = 0  # odd while a writer is at work
        self._choices = 0

    @property
    def version(self) -> int:
        """Number of changes so far."""
        return self._version // 2

    def _model(self, arm: int) -> int:
        if not (isinstance(arm, int | np.integer) and 0 <= arm < self.n_arms):
            raise ValueError(f"arm must be in [0, {self.n_arms - 1}], got {arm!r}")
        return 0 if self.kind == "shared" else int(arm)

    def _read(self, X: np.ndarray, covariance: bool) -> Read:
        models = self._models
        if self.kind == "disjoint":
            return models.read_each(X)
        return models.read_one(X, covariance) if self.kind == "shared" else models.read(X, covariance)

    def _apply(self, event: Event) -> None:
        self._version += 1
        try:
            getattr(self, f"_do_{event.kind}")(event)
        finally:
            self._version += 1

    def _do_select(self, event: Event) -> None:
        m, x = self._model(event.arm), event.rows(self.row_dim)[0]
        self._choices += 1
        decision = Decision(event.decision, event.arm, x, event.value, event.propensity, self.version)
        self._enter(m, x, 1.0, None, event.decision)
        self._waiting[event.decision] = Waiting(decision, int(self._decays[m]), event.unix_s)

    def _enter(self, m: int, x: np.ndarray, weight: float, y: float | None, name: str) -> None:
        """A row into A, with what forgetting and the window ask for."""
        if self.forget < 1:
            self._models.decay(m, self.forget)
            self._decays[m] += 1
        self._models.add_design(m, x, weight)
        if y is not None:
            self._models.add_reward(m, x, weight, y)
        if self.window is None:
            return
        rows = self._rows[m]
        rows.append([x, weight, y, name])
        if len(rows) > self.window:
            x, weight, y, name = rows.popleft()
            self._models.add_design(m, x, -weight)
            if y is not None:
                self._models.add_reward(m, x, -weight, y)
            elif name in self._waiting:
                self._waiting[name].in_window = False

    def _do_part(self, event: Event) -> None:
        waiting = self._waiting[event.decision]
        waiting.partial += event.value
        if event.part:
            waiting.parts.add(event.part)

    def _do_settle(self, event: Event) -> None:
        waiting = self._leave(event, "expired" if event.part == "timeout" else "settled")
        decision = waiting.decision
        m, reward = self._model(decision.arm), waiting.partial + event.value
        if waiting.in_window:
            self._models.add_reward(m, decision.x, self._weight(m, waiting), reward)
            for row in self._rows[m]:
                if row[3] == decision.id:
                    row[2] = reward
        self._watch(m, reward - decision.mean)

    def _do_expire(self, event: Event) -> None:
        waiting = self._leave(event, "expired")
        m = self._model(waiting.decision.arm)
        if waiting.in_window:
            self._models.add_design(m, waiting.decision.x, -self._weight(m, waiting))
            self._rows[m] = deque(row for row in self._rows[m] if row[3] != event.decision)

    def _leave(self, event: Event, end: str) -> Waiting:
        self.counters[end] += 1
        self._ended[event.decision] = end
        if len(self._ended) > _REMEMBERED:
            self._ended.popitem(last=False)
        return self._waiting.pop(event.decision)

    def _weight(self, m: int, waiting: Waiting) -> float:
        """What forgetting has left of a row's weight since it was chosen."""
        return 1.0 if self.forget == 1 else self.forget ** (int(self._decays[m]) - waiting.step)

    def _do_update(self, event: Event) -> None:
        m, table = self._model(event.arm), event.rows(self.row_dim + 2)
        X, y, w = table[:, :-2], table[:, -2], table[:, -1]
        if len(X) > 1 and self.forget == 1 and self.window is None and self._detectors is None:
            self._models.add_designs(m, X, w)
            self._models.add_rewards(m, X, w, y)
            return
        for x, reward, weight in zip(X, y, w, strict=True):
            x = np.ascontiguousarray(x)
            expected = 0.0
            if self._detectors is not None:
                full = x if self.kind == "disjoint" else np.tile(x, (self.n_arms, 1))
                expected = float(self._read(full, False).mean[event.arm])
            self._enter(m, x, float(weight), float(reward), "")
            self._watch(m, float(reward) - expected)

    def _watch(self, m: int, residual: float) -> None:
        if self._detectors is None or not self._detectors.observe(m, residual):
            return
        self.counters["changes"] += 1
        everything = self._detectors.config.reset == "all"
        for model in range(len(self._rows)) if everything else (m,):
            self._detectors.state[model] = 0.0
            self._rows[model].clear()
            gram = np.zeros((self.row_dim, self.row_dim))
            for waiting in self._waiting.values():  # their rewards are still to come, and after the change
                if self._model(waiting.decision.arm) == model and waiting.in_window:
                    gram += self._weight(model, waiting) * np.multiply.outer(
                        waiting.decision.x, waiting.decision.x
                    )
                    if self.window is not None:
                        self._rows[model].append([waiting.decision.x, 1.0, None, waiting.decision.id])
            self._models.replace(model, RidgeStats(gram, np.zeros(self.row_dim)))

    def _do_merge(self, event: Event) -> None:
        m = self._model(event.arm)
        self._models.replace(m, self._models.stats(m) + RidgeStats.from_bytes(event.blob))

    def _do_set(self, event: Event) -> None:
        m = self._model(event.arm)
        self._rows[m].clear()
        for waiting in self._waiting.values():
            if self._model(waiting.decision.arm) == m:
                waiting.in_window = False
        self._models.replace(m, RidgeStats.from_bytes(event.blob))
