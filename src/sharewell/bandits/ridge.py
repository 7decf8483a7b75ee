"""Ridge regressions in batched arrays, kept factored while rows come and go."""

from __future__ import annotations

import logging
import math
from typing import NamedTuple

import numpy as np

from .statistics import RidgeStats, positive

_log = logging.getLogger(__name__)
_CHECK_EVERY = 64  # rank-one steps between two looks at the residual of an inverse
_RESIDUAL = 1e-6


class Read(NamedTuple):
    """What a row promises. ``covariance`` [..., arms, arms] is that of scores which share coefficients."""

    mean: np.ndarray
    variance: np.ndarray
    covariance: np.ndarray | None


def factor(matrix: np.ndarray, lam: float) -> tuple[np.ndarray, float]:
    """Inverse and log determinant; a matrix that is not positive definite is shifted first, and logged."""
    try:
        root = np.linalg.cholesky(matrix)
    except np.linalg.LinAlgError:
        _log.warning("a gram matrix of dimension %d lost its positive eigenvalues: shifted", len(matrix))
        root = np.linalg.cholesky(positive(matrix, lam * 1e-3))
    inverse_root = np.linalg.inv(root)
    inverse = inverse_root.T @ inverse_root
    return (inverse + inverse.T) / 2, 2 * float(np.log(np.diagonal(root)).sum())


class Sums:
    """The plain sums of ``n`` regressions, from which a subclass keeps factors: :meth:`refactor` makes them
    anew. ``ARRAYS`` names what a snapshot holds.
    """

    ARRAYS: tuple[str, ...] = ("gram", "moment", "count", "square")

    def __init__(self, n: int, width: int) -> None:
        self.gram, self.moment = np.zeros((n, width, width)), np.zeros((n, width))
        self.count, self.square = np.zeros(n), np.zeros(n)

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        for name in self.ARRAYS:
            getattr(self, name)[...] = arrays[name]

    def decay(self, m: int, keep: float) -> None:
        """Weights of all rows times ``keep``. The ridge stays whole, so A never becomes singular."""
        for array in (self.gram, self.moment, self.count, self.square):
            array[m] *= keep
        self.refactor(m)

    def stats(self, m: int) -> RidgeStats:
        return RidgeStats(self.gram[m], self.moment[m], float(self.count[m]), float(self.square[m]))

    def replace(self, m: int, stats: RidgeStats) -> None:
        self.gram[m], self.moment[m] = stats.gram, stats.moment
        self.count[m], self.square[m] = stats.count, stats.square
        self.refactor(m)

    def refactor(self, m: int) -> None:
        raise NotImplementedError


class RidgeModels(Sums):
    """``n`` regressions of dimension ``dim`` under the penalty ``lam``.

    ``gram`` [n, dim, dim] and ``moment`` [n, dim] are the plain sums; ``inverse`` is that of gram + lam I,
    ``theta`` [n, dim] the coefficients, ``logdet`` [n]. A row costs O(dim^2) (Sherman-Morrison).
    """

    ARRAYS = (*Sums.ARRAYS, "inverse", "theta", "logdet", "steps")

    def __init__(self, n: int, dim: int, lam: float, refactor_every: int) -> None:
        super().__init__(n, dim)
        self.n, self.dim, self.lam, self.refactor_every = n, dim, lam, refactor_every
        self.inverse = np.repeat(np.eye(dim)[None] / lam, n, axis=0)
        self.theta = np.zeros((n, dim))
        self.logdet = np.full(n, dim * math.log(lam))
        self.steps = np.zeros(n, dtype=np.int64)  # rank-one steps since the last factorization
        self._all = self.inverse.reshape(n * dim, dim)

    # Reading

    def read_each(self, X: np.ndarray) -> Read:
        """One context ``X`` [dim] or many [batch, dim], every model: results [..., n]."""
        if X.ndim == 1:
            z = (self._all @ X).reshape(self.n, self.dim)
            return Read(self.theta @ X, z @ X, None)
        z = np.matmul(X[None], self.inverse)  # [n, batch, dim]
        return Read(X @ self.theta.T, np.einsum("nbd,bd->bn", z, X), None)

    def read_one(self, X: np.ndarray, covariance: bool) -> Read:
        """Rows ``X`` [..., arms, dim] of the first model: results [..., arms]."""
        z = X @ self.inverse[0]
        cross = np.matmul(z, np.swapaxes(X, -1, -2)) if covariance else None
        return Read(X @ self.theta[0], (z * X).sum(axis=-1), cross)

    # Writing

    def add_design(self, m: int, x: np.ndarray, weight: float) -> None:
        """Add ``weight`` x x^T to a gram; a negative weight takes a row away."""
        inverse = self.inverse[m]
        z = inverse @ x
        growth = 1.0 + weight * float(x @ z)
        scaled = x * math.sqrt(abs(weight))
        # Outer products of a vector with itself are symmetric to the last bit, and so the inverse stays.
        row = np.multiply.outer(scaled, scaled)
        self.gram[m] += row if weight >= 0 else -row
        if growth < 1e-6:  # what is taken away was nearly all that was known in its direction
            self.refactor(m)
            return
        turned = z * math.sqrt(abs(weight) / growth)
        step = np.multiply.outer(turned, turned)
        if weight >= 0:
            inverse -= step
        else:
            inverse += step
        self.logdet[m] += math.log(growth)
        self.steps[m] += 1
        steps = int(self.steps[m])
        if steps >= self.refactor_every or (steps % _CHECK_EVERY == 0 and self._residual(m, x) > _RESIDUAL):
            self.refactor(m)
        else:
            self.theta[m] = inverse @ self.moment[m]

    def _residual(self, m: int, x: np.ndarray) -> float:
        z = self.inverse[m] @ x
        return abs(float(x @ (self.gram[m] @ z) + self.lam * (x @ z) - x @ x))

    def add_designs(self, m: int, X: np.ndarray, w: np.ndarray) -> None:
        """Many rows: Woodbury while they are fewer than half the dimension, else a factorization."""
        scaled = X * np.sqrt(w)[:, None]
        gram = scaled.T @ scaled
        self.gram[m] += (gram + gram.T) / 2
        if 2 * len(X) >= self.dim or self.steps[m] + len(X) >= self.refactor_every:
            self.refactor(m)
            return
        z = scaled @ self.inverse[m]
        inner = np.eye(len(X)) + z @ scaled.T
        root = np.linalg.cholesky((inner + inner.T) / 2)
        half = np.linalg.solve(root, z)
        step = half.T @ half
        self.inverse[m] -= (step + step.T) / 2
        self.logdet[m] += 2 * float(np.log(np.diagonal(root)).sum())
        self.steps[m] += len(X)
        self.theta[m] = self.inverse[m] @ self.moment[m]

    def add_reward(self, m: int, x: np.ndarray, weight: float, y: float) -> None:
        """Add ``weight`` y x to a moment."""
        self.moment[m] += (weight * y) * x
        self.count[m] += weight
        self.square[m] += weight * y * y
        self.theta[m] = self.inverse[m] @ self.moment[m]

    def add_rewards(self, m: int, X: np.ndarray, w: np.ndarray, y: np.ndarray) -> None:
        self.moment[m] += X.T @ (w * y)
        self.count[m] += w.sum()
        self.square[m] += w @ (y * y)
        self.theta[m] = self.inverse[m] @ self.moment[m]

    def refactor(self, m: int) -> None:
        """The inverse anew from the gram."""
        regular = self.gram[m] + self.lam * np.eye(self.dim)
        self.inverse[m], self.logdet[m] = factor(regular, self.lam)
        self.theta[m] = self.inverse[m] @ self.moment[m]
        self.steps[m] = 0
