"""LinUCB and linear Thompson sampling with feedback that comes late, in parts, or never."""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from .change import PageHinkley
from .ledger import Event, FeedbackError, Ledger
from .ridge import Read
from .snapshots import read_snapshot, write_snapshot
from .state import Decision, Kind, PolicyState
from .statistics import RidgeStats, checked_rows
from .widths import Constant, Width

_RETRIES = 3


@dataclass(frozen=True, slots=True)
class Estimate:
    """``mean``, ``width`` = sqrt(x^T A^-1 x) and ``bonus`` = factor * width, each [..., arms].

    ``version`` counts the changes that it knows of.
    """

    mean: np.ndarray
    width: np.ndarray
    bonus: np.ndarray
    version: int

    @property
    def optimistic(self) -> np.ndarray:
        return self.mean + self.bonus

    @property
    def pessimistic(self) -> np.ndarray:
        return self.mean - self.bonus


class LinearPolicy(PolicyState):
    """A linear contextual bandit; :class:`LinUCB` and :class:`LinTS` say how it scores.

    ``kind`` says what X is, for one request: ``disjoint`` [dim], every arm has its own coefficients;
    ``shared`` [arms, dim], one vector of coefficients; ``hybrid`` [arms, shared_dim + dim], both. ``width``
    is the factor of the bonus, ``lam`` the ridge, ``forget`` the factor by which a new row makes the old ones
    of its model lighter, ``window`` the number of newest rows that a model knows, ``change`` a test that
    resets, ``epsilon`` the share of random choices, ``reward_limit`` a cap of optimism. A ``ledger`` makes it
    survive, a ``snapshot`` shortens the replay.

    A decision enters A when it is made and b when its feedback comes; expiry takes it out of A. A reader
    waits for a writer only when one is at work at that moment or has overtaken it three times.

    Raises ValueError naming the field and its range.
    """

    def __init__(
        self,
        n_arms: int,
        dim: int,
        kind: Kind = "disjoint",
        width: Width | None = None,
        lam: float = 1.0,
        forget: float = 1.0,
        refactor_every: int = 1024,
        *,
        shared_dim: int = 0,
        window: int | None = None,
        change: PageHinkley | None = None,
        epsilon: float = 0.0,
        reward_limit: float | None = None,
        seed: int = 0,
        ledger: Ledger | None = None,
        snapshot: str | Path | None = None,
    ) -> None:
        def check(ok: bool, name: str, allowed: str, value: object) -> None:
            if not ok:
                raise ValueError(f"{name} must be {allowed}, got {value!r}")

        check(type(n_arms) is int and 1 <= n_arms <= 100_000, "n_arms", "in [1, 100000]", n_arms)
        check(type(dim) is int and 1 <= dim <= 4096, "dim", "in [1, 4096]", dim)
        check(kind in ("disjoint", "shared", "hybrid"), "kind", "disjoint, shared or hybrid", kind)
        check((shared_dim > 0) == (kind == "hybrid"), "shared_dim", "above 0 for hybrid, else 0", shared_dim)
        check(math.isfinite(lam) and lam > 0, "lam", "finite and above 0", lam)
        check(0 < forget <= 1, "forget", "in (0, 1]", forget)
        check(refactor_every >= 1, "refactor_every", "at least 1", refactor_every)
        check(window is None or window >= 1, "window", "None or at least 1", window)
        check(window is None or forget == 1, "window", "None when forget is below 1", window)
        check(0 <= epsilon <= 1, "epsilon", "in [0, 1]", epsilon)
        check(
            reward_limit is None or math.isfinite(reward_limit),
            "reward_limit",
            "None or finite",
            reward_limit,
        )
        check(type(seed) is int and seed >= 0, "seed", "a whole number of at least 0", seed)
        self.epsilon, self.seed = epsilon, seed
        self.width: Width = Constant() if width is None else width
        self.reward_limit, self.ledger = reward_limit, ledger
        super().__init__(n_arms, dim, kind, shared_dim, lam, forget, refactor_every, window, change)
        self._lock = threading.RLock()
        # What a replay depends on: a ledger or snapshot of other settings is refused.
        self._settings = json.dumps(
            {
                "n_arms": n_arms, "dim": dim, "kind": kind, "shared_dim": shared_dim, "lam": lam,
                "forget": forget, "window": window, "refactor_every": refactor_every,
                "change": None if change is None else asdict(change),
            },
            sort_keys=True,
        )  # fmt: skip
        known = 0
        if snapshot is not None and Path(snapshot).exists():
            known = read_snapshot(self, snapshot)
        if ledger is not None:
            ledger.claim(self._settings)
            if known > ledger.last:
                raise ValueError(f"snapshot must not be newer than the ledger, got {known} > {ledger.last}")
            for event in ledger.events(known):
                self._apply(event)

    def snapshot(self, path: str | Path) -> Path:
        """Write the whole state to ``path`` in one atomic replace; ``snapshot=path`` begins with it."""
        return write_snapshot(self, path)

    # Reading

    @property
    def waiting(self) -> int:
        """Number of decisions without feedback."""
        return len(self._waiting)

    def estimate(self, X: np.ndarray) -> Estimate:
        """Of one request, or of a batch with a leading axis."""
        return self._estimate(self._features(X, batch=True))[0]

    def _features(self, X: np.ndarray, batch: bool = False) -> np.ndarray:
        X = np.array(X, dtype=np.float64)
        shape = (self.dim,) if self.kind == "disjoint" else (self.n_arms, self.row_dim)
        if X.shape != shape and not (batch and X.ndim == len(shape) + 1 and X.shape[1:] == shape):
            raise ValueError(f"X must have shape {list(shape)}, got {list(X.shape)}")
        if not np.isfinite(X).all():
            raise ValueError("X must be finite, got NaN or infinity")
        return X

    def _estimate(self, X: np.ndarray, covariance: bool = False) -> tuple[Estimate, np.ndarray | None]:
        for _ in range(_RETRIES):
            version = self._version
            if version & 1:
                break
            found, logdet = self._read(X, covariance), self._models.logdet.copy()
            if self._version == version:
                return self._finish(found, logdet, version), found.covariance
        with self._lock:
            version = self._version
            found, logdet = self._read(X, covariance), self._models.logdet.copy()
        return self._finish(found, logdet, version), found.covariance

    def _finish(self, found: Read, logdet: np.ndarray, version: int) -> Estimate:
        width = np.sqrt(np.maximum(found.variance, 0.0))
        dim = self.dim if self.kind != "hybrid" else self.shared_dim + self.n_arms * self.dim
        return Estimate(found.mean, width, self.width.factor(logdet, dim, self.lam) * width, version // 2)

    def stats(self, arm: int = 0) -> RidgeStats:
        """Sums of an arm's model (of the one model when the kind is shared)."""
        with self._lock:
            return self._models.stats(self._model(arm))

    def coefficients(self) -> np.ndarray:
        """A copy of theta [models, dim]."""
        with self._lock:
            return np.array(self._models.theta)

    # Choosing

    def _score(
        self, estimate: Estimate, covariance: np.ndarray | None, cost: np.ndarray | float, legal: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Scores [arms], and probabilities of being best when the scores are random."""
        raise NotImplementedError

    _needs_covariance = False

    def _rng(self, stream: int) -> np.random.Generator:
        # A function of seed and number of the choice: nothing to save, and a replay needs no draws.
        return np.random.Generator(
            np.random.Philox(key=self.seed, counter=self._choices << 64 | stream << 128)
        )

    def select(
        self,
        X: np.ndarray,
        mask: np.ndarray | None = None,
        cost: np.ndarray | float | None = None,
        decision_id: str | None = None,
    ) -> Decision:
        """Choose an arm for one request and remember the choice until :meth:`settle`.

        ``mask`` [arms]: True where an arm may be chosen; ``cost`` [arms] is subtracted from the scores and
        must not be in the reward too. With a ``decision_id`` of your own (a request's), asking again gives
        the same decision. Equal scores are decided by a seeded draw.
        """
        X = self._features(X)
        if decision_id is not None:
            if not 1 <= len(decision_id) <= 128:
                raise ValueError(f"decision_id must have 1 to 128 characters, got {len(decision_id)}")
            if (known := self._waiting.get(decision_id)) is not None:
                return known.decision
            if (end := self._end_of(decision_id)) is not None:
                raise FeedbackError("expired" if end == "expired" else "finished", decision_id)
        legal = self._legal(mask)
        price = 0.0 if cost is None else self._cost(cost)
        estimate, covariance = self._estimate(X, self._needs_covariance)
        scores, chances = self._score(estimate, covariance, price, legal)
        scores = np.where(legal, scores, -np.inf)
        best = np.flatnonzero(scores == scores.max())
        rng = self._rng(0) if self.epsilon > 0 or len(best) > 1 else None
        arm = int(best[0] if len(best) == 1 or rng is None else rng.choice(best))
        if rng is not None and self.epsilon > 0 and rng.random() < self.epsilon:
            arm = int(rng.choice(np.flatnonzero(legal)))
        if chances is None:
            chances = (scores == scores.max()) / len(best)
        propensity = (1 - self.epsilon) * float(chances[arm]) + self.epsilon / int(legal.sum())
        row = X if self.kind == "disjoint" else X[arm]
        event = Event(
            "select", decision_id or os.urandom(16).hex(), arm, row.astype("<f8").tobytes(),
            float(estimate.mean[arm]), propensity=propensity, unix_s=self._now(),
        )  # fmt: skip
        with self._lock:
            if event.decision in self._waiting:  # another thread came first
                return self._waiting[event.decision].decision
            self._record([event])
            return self._waiting[event.decision].decision

    def _legal(self, mask: np.ndarray | None) -> np.ndarray:
        if mask is None:
            return np.ones(self.n_arms, dtype=bool)
        legal = np.asarray(mask)
        if legal.shape != (self.n_arms,) or legal.dtype != np.bool_:
            raise ValueError(f"mask must be bool of shape [{self.n_arms}], got {legal.dtype} {legal.shape}")
        if not legal.any():
            raise ValueError("mask must allow at least one arm, got none")
        return legal

    def _cost(self, cost: np.ndarray | float) -> np.ndarray:
        price = np.asarray(cost, dtype=np.float64)
        if price.shape not in ((), (self.n_arms,)) or not np.isfinite(price).all():
            raise ValueError(f"cost must be finite of shape [{self.n_arms}], got {cost!r}")
        return price

    # Feedback

    def settle(self, decision_id: str, reward: float, final: bool = True, part: str = "") -> bool:
        """Give the reward of a decision; with ``final=False`` a part of it, summed until the final call.

        Safe to repeat: a final reward counts once, and so does a named ``part``. Returns whether it counted.
        Raises FeedbackError for a decision that is unknown or expired.
        """
        return self._settle([decision_id], [reward], final, part)

    def settle_chain(
        self, decision_ids: Sequence[str], reward: float, weights: Sequence[float] | None = None
    ) -> bool:
        """Divide one final reward over the decisions that led to it; all of them, or on an error none.

        ``weights`` (equal shares) must be at least 0 and sum to 1.
        """
        shares = [1 / max(1, len(decision_ids))] * len(decision_ids) if weights is None else list(weights)
        if not decision_ids or len(set(decision_ids)) != len(decision_ids):
            raise ValueError("decision_ids must be at least one, each once")
        if len(shares) != len(decision_ids) or min(shares) < 0 or abs(sum(shares) - 1) > 1e-9:
            raise ValueError(
                f"weights must be {len(decision_ids)} numbers of at least 0 with sum 1, got {shares}"
            )
        return self._settle(decision_ids, [reward * share for share in shares], True, "")

    def _settle(self, ids: Sequence[str], rewards: Sequence[float], final: bool, part: str) -> bool:
        if not all(map(math.isfinite, rewards)):
            raise ValueError("reward must be finite, got NaN or infinity")
        with self._lock:
            events = []
            for name, reward in zip(ids, rewards, strict=True):
                waiting = self._waiting.get(name)
                if waiting is None:
                    end = self._end_of(name)
                    if end != "settled":
                        kind = "unknown" if end is None else end
                        self.counters[kind] += 1
                        raise FeedbackError(kind, name)
                    self.counters["repeated"] += 1
                elif part and part in waiting.parts:
                    self.counters["repeated"] += 1
                else:
                    kind = "settle" if final else "part"
                    events.append(Event(kind, name, value=float(reward), part=part, unix_s=self._now()))
            if events:
                self._record(events)
            return bool(events)

    def expire(self) -> int:
        """End the decisions older than the ledger's ``timeout_s``; returns how many."""
        if self.ledger is None or self.ledger.timeout_s is None:
            raise ValueError("expire needs a ledger with timeout_s, got none")
        now, reward = self._now(), self.ledger.on_timeout
        with self._lock:
            old = [n for n, w in self._waiting.items() if now - w.unix_s > self.ledger.timeout_s]
            if reward is None:
                events = [Event("expire", name, unix_s=now) for name in old]
            else:
                events = [Event("settle", name, value=reward, part="timeout", unix_s=now) for name in old]
            if events:
                self._record(events)
        return len(old)

    def _end_of(self, decision_id: str) -> str | None:
        end = self._ended.get(decision_id)
        return self.ledger.end_of(decision_id) if end is None and self.ledger is not None else end

    def _now(self) -> float:
        return 0.0 if self.ledger is None else self.ledger.clock.unix()

    # Learning without decisions

    def update(
        self, arm: int, X: np.ndarray, y: np.ndarray | float, w: np.ndarray | float | None = None
    ) -> None:
        """Rows X [row_dim] or [n, row_dim] of an arm with rewards and weights that are known already."""
        self._model(arm)
        rows, rewards, weights = checked_rows(X, y, w, self.row_dim)
        table = np.column_stack([rows, rewards, weights]).astype("<f8")
        with self._lock:
            self._record([Event("update", arm=arm, blob=table.tobytes(), unix_s=self._now())])

    def merge(self, stats: RidgeStats, arm: int = 0) -> None:
        """Add what another policy, process or silo has learned of an arm."""
        self._check_stats(stats, arm)
        with self._lock:
            self._record([Event("merge", arm=arm, blob=stats.to_bytes(), unix_s=self._now())])

    def set_stats(self, stats: RidgeStats, arm: int = 0) -> None:
        """Replace an arm's sums; decisions that wait for feedback no longer count towards them."""
        self._check_stats(stats, arm)
        with self._lock:
            self._record([Event("set", arm=arm, blob=stats.to_bytes(), unix_s=self._now())])

    def _check_stats(self, stats: RidgeStats, arm: int) -> None:
        self._model(arm)
        if stats.dim != self.row_dim:
            raise ValueError(f"stats must have dim {self.row_dim}, got {stats.dim}")

    def _record(self, events: list[Event]) -> None:
        if self.ledger is not None:
            self.ledger.append(events)
        for event in events:
            self._apply(event)


class LinUCB(LinearPolicy):
    """The arm with the highest mean + factor * width - cost (Li et al., arXiv 1003.0146)."""

    def _score(
        self, estimate: Estimate, covariance: np.ndarray | None, cost: np.ndarray | float, legal: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray | None]:
        hoped = estimate.optimistic
        if self.reward_limit is not None:
            hoped = np.minimum(hoped, self.reward_limit)
        return hoped - cost, None


class LinTS(LinearPolicy):
    """Thompson sampling: coefficients drawn from N(theta, factor^2 A^-1) (Agrawal and Goyal, 1209.3352).

    Scores are drawn directly, with the covariance that drawn coefficients would give them. The propensity is
    the share of 64 more draws in which the arm is best.
    """

    _needs_covariance = True
    DRAWS = 64

    def _score(
        self, estimate: Estimate, covariance: np.ndarray | None, cost: np.ndarray | float, legal: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray | None]:
        normal = self._rng(1).standard_normal((self.DRAWS + 1, self.n_arms))
        if covariance is None:
            spread = normal * estimate.bonus
        else:
            values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
            root = vectors * np.sqrt(np.maximum(values, 0.0))
            factor = np.divide(
                estimate.bonus, estimate.width, out=np.zeros(self.n_arms), where=estimate.width > 0
            )
            spread = (normal @ root.T) * factor
        scores = np.where(legal, estimate.mean + spread - cost, -np.inf)
        if self.reward_limit is not None:
            scores = np.minimum(scores, self.reward_limit - cost)
        # The draw that decides counts too: the share of the chosen arm is never 0.
        share = np.bincount(scores.argmax(axis=1), minlength=self.n_arms) / (self.DRAWS + 1)
        return scores[0], share
