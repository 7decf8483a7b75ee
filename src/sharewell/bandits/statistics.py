"""Sufficient statistics of ridge regression: a commutative monoid, so that sharing is adding."""

from __future__ import annotations

import math
import struct
import zlib
from dataclasses import dataclass

import numpy as np

_HEAD = struct.Struct("<4sI")
_MAGIC = b"RST1"
MAX_DIM = 4096


@dataclass(frozen=True, eq=False)
class RidgeStats:
    """Sums over rows (x, y) of weight w, in float64 and without the ridge.

    ``gram`` [dim, dim] is the sum of w x x^T, ``moment`` [dim] that of w x y, ``count`` that of w and
    ``square`` that of w y^2. Raises ValueError for shapes that disagree and numbers that are not finite.
    """

    gram: np.ndarray
    moment: np.ndarray
    count: float = 0.0
    square: float = 0.0

    def __post_init__(self) -> None:
        gram = np.array(self.gram, dtype=np.float64)
        moment = np.array(self.moment, dtype=np.float64)
        if moment.ndim != 1 or not 1 <= len(moment) <= MAX_DIM:
            raise ValueError(f"moment must have shape [dim], dim in [1, {MAX_DIM}], got {moment.shape}")
        if gram.shape != (len(moment), len(moment)):
            raise ValueError(f"gram must have shape [{len(moment)}, {len(moment)}], got {gram.shape}")
        sums = (float(self.count), float(self.square))
        if not (np.isfinite(gram).all() and np.isfinite(moment).all() and all(map(math.isfinite, sums))):
            raise ValueError("gram, moment, count and square must be finite, got NaN or infinity")
        for array in (gram, moment):
            array.flags.writeable = False
        object.__setattr__(self, "gram", gram)
        object.__setattr__(self, "moment", moment)
        object.__setattr__(self, "count", sums[0])
        object.__setattr__(self, "square", sums[1])

    @classmethod
    def zeros(cls, dim: int) -> RidgeStats:
        """Of no rows."""
        return cls(np.zeros((dim, dim)), np.zeros(dim))

    @property
    def dim(self) -> int:
        return len(self.moment)

    def add(self, x: np.ndarray, y: float, weight: float = 1.0) -> RidgeStats:
        """With one more row ``x`` [dim]."""
        return self.add_batch(np.asarray(x)[None], np.array([y]), np.array([weight]))

    def add_batch(self, X: np.ndarray, y: np.ndarray, weights: np.ndarray | None = None) -> RidgeStats:
        """With rows ``X`` [n, dim], rewards ``y`` [n] and ``weights`` [n] of at least 0 (ones)."""
        X, y, w = checked_rows(X, y, weights, self.dim)
        weighted = X * w[:, None]
        gram = weighted.T @ X
        return RidgeStats(
            self.gram + (gram + gram.T) / 2,
            self.moment + weighted.T @ y,
            self.count + float(w.sum()),
            self.square + float(w @ (y * y)),
        )

    def __add__(self, other: RidgeStats) -> RidgeStats:
        return self._combined(other, 1.0)

    def __sub__(self, other: RidgeStats) -> RidgeStats:
        return self._combined(other, -1.0)

    def _combined(self, other: RidgeStats, sign: float) -> RidgeStats:
        if other.dim != self.dim:
            raise ValueError(f"dim must be the same, got {self.dim} and {other.dim}")
        return RidgeStats(
            self.gram + sign * other.gram,
            self.moment + sign * other.moment,
            self.count + sign * other.count,
            self.square + sign * other.square,
        )

    def scale(self, factor: float) -> RidgeStats:
        """Every weight times ``factor`` (of at least 0): forgetting."""
        if not (math.isfinite(factor) and factor >= 0):
            raise ValueError(f"factor must be finite and at least 0, got {factor}")
        return RidgeStats(self.gram * factor, self.moment * factor, self.count * factor, self.square * factor)

    def noisy(self, sigma: float, rng: np.random.Generator) -> RidgeStats:
        """With Gaussian noise of deviation ``sigma`` on the moment and, symmetrically, on the gram.

        The gram may lose its positive eigenvalues; :func:`positive` restores them where it is factored.
        """
        if not (math.isfinite(sigma) and sigma >= 0):
            raise ValueError(f"sigma must be finite and at least 0, got {sigma}")
        upper = np.triu(rng.normal(0.0, sigma, self.gram.shape))
        noise = upper + np.triu(upper, 1).T
        moment = self.moment + rng.normal(0.0, sigma, self.dim)
        return RidgeStats(self.gram + noise, moment, self.count, self.square)

    def solve(self, lam: float = 1.0) -> np.ndarray:
        """Ridge coefficients [dim] under the penalty ``lam`` > 0."""
        return np.linalg.solve(positive(self.gram + lam * np.eye(self.dim), lam * 1e-3), self.moment)

    def to_bytes(self) -> bytes:
        """Little-endian float64 behind a header, with a CRC at the end."""
        numbers = np.concatenate([self.gram.ravel(), self.moment, [self.count, self.square]])
        body = _HEAD.pack(_MAGIC, self.dim) + numbers.astype("<f8").tobytes()
        return body + struct.pack("<I", zlib.crc32(body))

    @classmethod
    def from_bytes(cls, data: bytes) -> RidgeStats:
        """Inverse of :meth:`to_bytes`. Raises ValueError for anything else."""
        if len(data) < _HEAD.size + 4:
            raise ValueError(f"data must be a RidgeStats message, got {len(data)} bytes")
        magic, dim = _HEAD.unpack_from(data)
        expected = _HEAD.size + 8 * (dim * dim + dim + 2) + 4
        if magic != _MAGIC or not 1 <= dim <= MAX_DIM or len(data) != expected:
            raise ValueError("data must be a RidgeStats message, got another format or length")
        if zlib.crc32(data[:-4]) != struct.unpack("<I", data[-4:])[0]:
            raise ValueError("data must be a whole RidgeStats message: its checksum is wrong")
        numbers = np.frombuffer(data[_HEAD.size : -4], dtype="<f8").astype(np.float64)
        gram, moment = numbers[: dim * dim].reshape(dim, dim), numbers[dim * dim : -2]
        return cls(gram, moment, float(numbers[-2]), float(numbers[-1]))


def checked_rows(
    X: np.ndarray, y: np.ndarray | float, weights: np.ndarray | float | None, dim: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``X`` [n, dim], ``y`` [n] and weights [n] in float64; ValueError naming what is wrong with them."""
    X = np.array(X, dtype=np.float64, ndmin=2)
    y = np.array(y, dtype=np.float64, ndmin=1)
    w = np.ones(len(y)) if weights is None else np.array(weights, dtype=np.float64, ndmin=1)
    if X.ndim != 2 or X.shape[1] != dim:
        raise ValueError(f"X must have shape [n, {dim}], got {X.shape}")
    if y.shape != (len(X),) or w.shape != (len(X),):
        raise ValueError(f"y and weights must have shape [{len(X)}], got {y.shape} and {w.shape}")
    for name, array in (("X", X), ("y", y), ("weights", w)):
        if not np.isfinite(array).all():
            raise ValueError(f"{name} must be finite, got NaN or infinity")
    if (w < 0).any():
        raise ValueError(f"weights must be at least 0, got {w.min()}")
    return X, y, w


def positive(matrix: np.ndarray, floor: float) -> np.ndarray:
    """``matrix``, or, when an eigenvalue is below ``floor``, the same with all of them shifted up to it."""
    low = float(np.linalg.eigvalsh(matrix)[0])
    return matrix if low >= floor else matrix + (floor - low) * np.eye(len(matrix))
