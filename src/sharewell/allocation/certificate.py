"""When best responses are a contraction: what an interaction matrix promises before anything has run."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Certificate:
    """What is known beforehand about the best responses of a game.

    ``S[q, r]`` bounds how far player q's response moves when player r moves by one (2-norm). Sufficient, not
    necessary: many games with ``rho >= 1`` converge all the same.

    ``rho``: spectral radius of S. Below 1 the equilibrium is unique and every schedule converges to it, also
    with bounded delays (Scutari, Palomar, Barbarossa 2008, arXiv 0801.2480). ``row``, ``column``: largest row
    and column sum, which a player can check alone (below 1 they imply ``rho < 1``). ``factor``: contraction
    per simultaneous round in ``max_q ||p_q||_2 / weights_q``; equal to rho unless S is reducible, and below 1
    whenever rho is. ``burn_in``: rounds after which that holds (above 0 when carriers that nobody will use
    were left out). ``symmetric``: the game has a potential, so sequential updates converge whatever rho is.
    """

    rho: float
    row: float
    column: float
    symmetric: bool
    factor: float
    weights: np.ndarray  # [players], positive, greatest 1
    burn_in: int = 0

    @property
    def unique(self) -> bool:
        """Whether exactly one equilibrium is certain."""
        return self.rho < 1

    @property
    def guaranteed(self) -> tuple[str, ...]:
        """Schedules that are certain to converge from any start."""
        if self.rho < 1:
            return ("sequential", "simultaneous", "asynchronous")
        return ("sequential",) if self.symmetric else ()

    def norm(self, moves: np.ndarray) -> float:
        """``max_q ||moves_q||_2 / weights_q`` of an array [players, ...]."""
        lengths = np.sqrt(np.square(moves).reshape(len(self.weights), -1).sum(axis=1))
        return float((lengths / self.weights).max(initial=0.0))

    def error_bound(self, residual: np.ndarray) -> float | None:
        """How far from the equilibrium a profile is at most, in that norm, given its ``residual`` (response
        minus profile, [players, ...]). None when the certificate promises nothing.

        For a contraction T with factor c: ``||p - p*|| <= ||T(p) - p|| / (1 - c)``. As the greatest weight
        is 1, this also bounds every player's own 2-norm.
        """
        return self.norm(residual) / (1 - self.factor) if self.factor < 1 else None

    def noise_bound(self, error: np.ndarray) -> float | None:
        """How far from the equilibrium the rounds end at most when every response is computed from effective
        noise that is wrong by at most ``error`` ([players, carriers]). None without a promise."""
        return self.error_bound(error)

    def rounds(self, accuracy: float, first_move: float) -> int | None:
        """Simultaneous rounds that certainly reach ``accuracy``, given the norm of the first move; None
        without a promise. Raises ValueError for an accuracy or move that is not positive."""
        if not accuracy > 0:
            raise ValueError(f"accuracy must be positive, got {accuracy}")
        if not first_move >= 0:
            raise ValueError(f"first_move must be at least 0, got {first_move}")
        if self.factor >= 1:
            return None
        if first_move <= accuracy * (1 - self.factor):
            return self.burn_in
        if self.factor == 0:
            return self.burn_in + 1
        return self.burn_in + math.ceil(
            math.log(accuracy * (1 - self.factor) / first_move) / math.log(self.factor)
        )


def certify(interaction: np.ndarray, *, symmetric: bool = False, burn_in: int = 0) -> Certificate:
    """The certificate of an interaction matrix [players, players]: not negative, zero diagonal.

    For irreducible matrices the weights are the Perron vector w (S w = rho w). A reducible one may have zeros
    there, which make no norm; then w = (I - S/t)^-1 1 for a t a little above rho serves, as S w = t (w - 1).
    Raises ValueError for another matrix.
    """
    S = np.asarray(interaction, np.float64)
    if S.ndim != 2 or S.shape[0] != S.shape[1] or not len(S):
        raise ValueError(f"interaction must be a square matrix, got shape {S.shape}")
    if not (np.isfinite(S).all() and (S >= 0).all() and not S.diagonal().any()):
        raise ValueError("interaction must be finite and not negative, with a zero diagonal")
    values, vectors = np.linalg.eig(S)
    rho = float(np.abs(values).max())
    w = np.abs(np.real(vectors[:, int(np.argmax(np.real(values)))]))
    factor = math.inf
    if w.max() > 0 and w.min() > 1e-9 * w.max():
        w /= w.max()
        factor = float((S @ w / w).max())
    if not factor <= rho * (1 + 1e-9) + 1e-12:
        t = rho + 0.01 * (1 - rho) if rho < 1 else rho * 1.01
        w = np.linalg.solve(np.eye(len(S)) - S / t, np.ones(len(S)))
        w /= w.max()
        factor = float((S @ w / w).max())
    return Certificate(
        rho, float(S.sum(axis=1).max()), float(S.sum(axis=0).max()), symmetric, factor, w, burn_in
    )
