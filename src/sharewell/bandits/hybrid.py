"""Hybrid models: coefficients that all arms share beside those of each arm (arXiv 1003.0146, Alg. 2)."""

from __future__ import annotations

import math

import numpy as np

from .ridge import Read, Sums, factor


class HybridModels(Sums):
    """Row of arm k: [z, x] with ``shared`` features z and own features x; mean = z.beta + x.theta_k.

    Equal to one ridge regression over (beta, theta_1, ..., theta_n), by its Schur complement: a row costs a
    factorization of the own block and of the shared one, never of the whole.
    """

    ARRAYS = (*Sums.ARRAYS, "inverse", "cross", "own", "blocks", "base", "beta")

    def __init__(self, n: int, dim: int, shared: int, lam: float) -> None:
        super().__init__(n, shared + dim)
        self.n, self.dim, self.shared, self.lam = n, dim, shared, lam
        self.inverse = np.repeat(np.eye(dim)[None] / lam, n, axis=0)  # of an arm's own block
        self.cross = np.zeros((n, dim, shared))  # inverse times the block that couples own and shared
        self.own = np.zeros((n, dim))  # inverse times the own moment
        self.blocks = np.full(n, dim * math.log(lam))  # log determinants of the own blocks
        self.base = np.eye(shared) / lam  # inverse of the shared Schur complement
        self.beta = np.zeros(shared)
        self._logdet = (n * dim + shared) * math.log(lam)

    @property
    def logdet(self) -> np.ndarray:
        """Of the whole regression, the same for every arm."""
        return np.full(self.n, self._logdet)

    @property
    def theta(self) -> np.ndarray:
        """Own coefficients [n, dim]."""
        return self.own - self.cross @ self.beta

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        super().restore(arrays)
        schur = -float(np.linalg.slogdet(self.base)[1])
        self._logdet = float(self.blocks.sum()) + schur

    def read(self, X: np.ndarray, covariance: bool) -> Read:
        """Rows ``X`` [..., n, shared + dim]: results [..., n]."""
        z, x = X[..., : self.shared], X[..., self.shared :]
        left = z - np.einsum("...nd,nds->...ns", x, self.cross)
        mean = left @ self.beta + (x * self.own).sum(axis=-1)
        turned = left @ self.base
        own = (np.einsum("...nd,nde->...ne", x, self.inverse) * x).sum(axis=-1)
        joint = None
        if covariance:
            joint = np.matmul(turned, np.swapaxes(left, -1, -2)) + own[..., None] * np.eye(self.n)
        return Read(mean, (turned * left).sum(axis=-1) + own, joint)

    def add_design(self, m: int, x: np.ndarray, weight: float) -> None:
        self.gram[m] += weight * np.multiply.outer(x, x)
        self.refactor(m)

    def add_designs(self, m: int, X: np.ndarray, w: np.ndarray) -> None:
        self.gram[m] += (X * w[:, None]).T @ X
        self.refactor(m)

    def add_reward(self, m: int, x: np.ndarray, weight: float, y: float) -> None:
        self.add_rewards(m, x[None], np.array([weight]), np.array([y]))

    def add_rewards(self, m: int, X: np.ndarray, w: np.ndarray, y: np.ndarray) -> None:
        self.moment[m] += X.T @ (w * y)
        self.count[m] += w.sum()
        self.square[m] += w @ (y * y)
        self.refactor(m)

    def refactor(self, m: int) -> None:
        s = self.shared
        own = self.gram[m, s:, s:] + self.lam * np.eye(self.dim)
        self.inverse[m], self.blocks[m] = factor(own, self.lam)
        self.cross[m] = self.inverse[m] @ self.gram[m, s:, :s]
        self.own[m] = self.inverse[m] @ self.moment[m, s:]
        self._join()

    def _join(self) -> None:
        s = self.shared
        coupled = np.einsum("nds,ndt->st", self.gram[:, s:, :s], self.cross)
        schur = self.gram[:, :s, :s].sum(axis=0) - coupled + self.lam * np.eye(s)
        self.base, logdet = factor((schur + schur.T) / 2, self.lam)
        pulled = np.einsum("nds,nd->s", self.gram[:, s:, :s], self.own)
        self.beta = self.base @ (self.moment[:, :s].sum(axis=0) - pulled)
        self._logdet = logdet + float(self.blocks.sum())
