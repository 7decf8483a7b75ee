"""Users who pour power over the same carriers and disturb each other: the game, its rates and certificate."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from .archive import read_arrays
from .certificate import Certificate, certify
from .fixedpoint import Result, run
from .schedules import DecayingStep, Schedule
from .waterfilling import fill


class InterferenceGame:
    """Q users on N carriers; each maximises its own rate against what the others do.

    ``H`` [Q, Q, N]: power gain at receiver q from transmitter r. ``noise`` [Q, N], positive. ``power`` [Q]:
    budgets. ``mask`` [Q, N]: most that a user may send on a carrier. Rate of q, in bits a channel use:
    sum_k log2(1 + H[q,q,k] p[q,k] / (noise[q,k] + sum_{r != q} H[q,r,k] p[r,k])).

    Raises ValueError naming the argument and axis; a user whose direct gains are all zero is an error unless
    ``allow_silent`` (then it sends nothing). Yu, Ginis, Cioffi 2002; Wang 2025, arXiv 2502.15783.
    """

    def __init__(
        self, H: Any, noise: Any, power: Any, mask: Any = None, *, allow_silent: bool = False
    ) -> None:
        self.H, self.noise, self.power = (
            _checked(value, name) for value, name in ((H, "H"), (noise, "noise"), (power, "power"))
        )
        if self.H.ndim != 3 or self.H.shape[0] != self.H.shape[1] or 0 in self.H.shape:
            raise ValueError(
                f"H must be [receivers, transmitters, carriers], square in users, got {self.H.shape}"
            )
        users, _, carriers = self.H.shape
        if self.noise.shape != (users, carriers):
            raise ValueError(f"noise must be [users, carriers] = {(users, carriers)}, got {self.noise.shape}")
        if self.power.shape != (users,):
            raise ValueError(f"power must be [users] = {(users,)}, got {self.power.shape}")
        if not (self.noise > 0).all():
            raise ValueError(
                f"noise must be positive; user {int(np.argmin(self.noise.min(axis=1)))} has none"
            )
        self.mask = None
        if mask is not None:
            self.mask = _checked(mask, "mask", infinite=True)
            if self.mask.shape != (users, carriers):
                raise ValueError(
                    f"mask must be [users, carriers] = {(users, carriers)}, got {self.mask.shape}"
                )
        direct = np.einsum("qqk->qk", self.H)
        silent = np.flatnonzero(~(direct > 0).any(axis=1))
        if len(silent) and not allow_silent:
            raise ValueError(
                f"H: the direct gains of user {silent[0]} are all zero (carriers); see allow_silent"
            )
        with np.errstate(divide="ignore"):
            inverse = np.where(direct > 0, 1 / np.where(direct > 0, direct, 1.0), np.inf)
        if not np.isfinite(inverse[direct > 0]).all():
            raise ValueError("H: a direct gain is too small to divide by (carriers)")
        self._alone = np.where(direct > 0, self.noise * np.where(direct > 0, inverse, 0.0), np.inf)
        # What reaches q of a unit sent by r, in units of q's own signal: [Q, Q, N], zero diagonal.
        self._cross = self.H * np.where(direct > 0, inverse, 0.0)[:, None, :]
        self._cross[np.arange(users), np.arange(users)] = 0.0
        if not np.isfinite(self._cross).all():
            raise ValueError("H: a cross gain overflows against its direct gain (carriers)")

    @property
    def users(self) -> int:
        return len(self.power)

    def start(self) -> np.ndarray:
        """Silence: everybody's first update then sees only noise."""
        return np.zeros(self.noise.shape)

    def effective_noise(self, p: np.ndarray, q: int | None = None) -> np.ndarray:
        """Noise plus interference over the own gain: [N] for user ``q``, [Q, N] for all; infinite where the
        own gain is 0."""
        if q is None:
            return self._alone + np.einsum("qrk,rk->qk", self._cross, p)
        return self._alone[q] + np.einsum("rk,rk->k", self._cross[q], p)

    def best_response(self, p: np.ndarray, q: int) -> np.ndarray:
        """The exact optimum [N] of user ``q`` against ``p`` [Q, N], by water-filling."""
        cap = None if self.mask is None else self.mask[q]
        return fill(self.effective_noise(p, q), self.power[q], cap)[0]

    def best_responses(self, p: np.ndarray, users: np.ndarray) -> np.ndarray:
        """[len(users), N]: one shared profile [Q, N], or one for each user [len(users), Q, N]."""
        every = len(users) == self.users
        cross = self._cross if every else self._cross[users]
        if p.ndim == 2:
            n = self._alone[users] + np.einsum("qrk,rk->qk", cross, p)
        else:
            n = self._alone[users] + np.einsum("qrk,qrk->qk", cross, p)
        return fill(n, self.power[users], None if self.mask is None else self.mask[users])[0]

    def rates(self, p: np.ndarray) -> np.ndarray:
        """[Q], bits a channel use; in the log domain, so that no ratio overflows."""
        p = np.asarray(p, np.float64)
        direct = np.einsum("qqk->qk", self.H)
        heard = self.noise + np.einsum("qrk,rk->qk", self.H, p) - direct * p
        # The own signal was added and taken away again: never below the noise, whatever that rounded.
        heard = np.maximum(heard, self.noise)
        with np.errstate(divide="ignore"):
            ratio = np.log(direct) + np.log(p) - np.log(heard)
        return np.logaddexp(0.0, ratio).sum(axis=1) / np.log(2)

    def certificate(self, shrink: bool = False) -> Certificate:
        """Whether updates will converge, before any has run.

        Carriers count where a user can send at all; with ``shrink`` only where it may want to send under
        some feasible interference, which can turn a failing certificate into a passing one. Then the promise
        holds after ``burn_in`` rounds, from feasible starts.
        """
        return self._certificates[int(shrink)]

    @cached_property
    def _certificates(self) -> tuple[Certificate, Certificate]:
        able = np.isfinite(self._alone)
        if self.mask is not None:
            able &= self.mask > 0
        able &= (self.power > 0)[:, None]
        wanted, rounds = self._wanted(able)
        return self._certify(able, 0), self._certify(wanted, rounds)

    def _wanted(self, able: np.ndarray) -> tuple[np.ndarray, int]:
        """Carriers that some feasible play of the others makes a user use, and the rounds until it binds."""
        most = np.where(able, self.power[:, None], 0.0)
        if self.mask is not None:
            most = np.minimum(most, self.mask)
        rounds = 0
        for _ in range(2 * self.users + 8):
            loudest = self._alone + np.einsum("qrk,rk->qk", self._cross, most)
            # The level rises with the noise, so this is the highest that it can be.
            _, level = fill(loudest, self.power, self.mask)
            usable = np.isfinite(self._alone)
            headroom = level[:, None] - np.where(usable, self._alone, 0.0)
            tighter = np.minimum(most, np.where(usable, np.maximum(headroom, 0.0), 0.0))
            # A relative slack keeps carriers that only rounding would drop.
            dropped = (most > 0) & (tighter <= 1e-12 * self.power[:, None])
            tighter[dropped] = 0.0
            if not dropped.any() and np.allclose(tighter, most, rtol=1e-6, atol=0):
                break
            most, rounds = tighter, rounds + 1
        return most > 0, rounds

    def _certify(self, active: np.ndarray, rounds: int) -> Certificate:
        both = active[:, None, :] & active[None, :, :]
        cross = np.where(both, self._cross, 0.0)
        mirror = cross.transpose(1, 0, 2)
        symmetric = bool(np.allclose(cross, mirror, rtol=1e-9, atol=0.0))
        # The maximum of the ratios over the carriers, not the ratio of maxima.
        return certify(cross.max(axis=2), symmetric=symmetric, burn_in=rounds)

    def solve(
        self,
        schedule: Schedule | str = "sequential",
        tol: float = 1e-9,
        max_iter: int = 10_000,
        step: float | DecayingStep = 1.0,
        *,
        start: np.ndarray | None = None,
    ) -> Result:
        """Iterate to a Nash equilibrium; see ``fixedpoint.run``."""
        return run(self, schedule, tol, step, start=start, max_iter=max_iter)

    @classmethod
    def load(cls, path: str | Path, *, allow_silent: bool = False) -> InterferenceGame:
        """A game from an ``.npz`` with ``H``, ``noise``, ``power`` and optionally ``mask``."""
        arrays: Mapping[str, np.ndarray] = read_arrays(path, ("H", "noise", "power"), ("mask",), signed=False)
        return cls(
            arrays["H"], arrays["noise"], arrays["power"], arrays.get("mask"), allow_silent=allow_silent
        )


class NoisyGame:
    """A game whose users measure their interference with an error, uniform in [-amplitude, amplitude]."""

    def __init__(self, game: InterferenceGame, amplitude: float, rng: np.random.Generator) -> None:
        if not amplitude >= 0:
            raise ValueError(f"amplitude must be at least 0, got {amplitude}")
        self.game, self.amplitude, self._rng = game, amplitude, rng

    def start(self) -> np.ndarray:
        return self.game.start()

    def best_response(self, p: np.ndarray, q: int) -> np.ndarray:
        return self.best_responses(p, np.array([q]))[0]

    def best_responses(self, p: np.ndarray, users: np.ndarray) -> np.ndarray:
        game = self.game
        cross = game._cross[users]
        pattern = "qrk,rk->qk" if p.ndim == 2 else "qrk,qrk->qk"
        n = game._alone[users] + np.einsum(pattern, cross, p)
        n = n + self._rng.uniform(-self.amplitude, self.amplitude, n.shape)
        return fill(n, game.power[users], None if game.mask is None else game.mask[users])[0]


def _checked(value: Any, name: str, *, infinite: bool = False) -> np.ndarray:
    array = np.asarray(value)
    if np.iscomplexobj(array) or array.dtype.kind not in "fiub":
        raise ValueError(f"{name} must be real numbers, got {array.dtype}; power gains, not amplitudes")
    array = array.astype(np.float64)
    bad = np.isnan(array) if infinite else ~np.isfinite(array)
    for wrong, what in ((bad, "NaN" if infinite else "finite"), (array < 0, "negative")):
        if wrong.any():
            place = tuple(int(i) for i in np.argwhere(wrong)[0])
            rule = "finite" if what == "finite" else f"free of {what} values"
            raise ValueError(f"{name} must be {rule}, got {array[place]} at {place}")
    return array
