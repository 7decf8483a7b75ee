"""The fixed-point engine: best responses in any order, with old news, until nobody wants to move.

:func:`run` works for any object with ``best_response``. It tells convergence from a cycle, bounds the error
when the game certifies it, notices players that have fallen silent, and can be stopped and resumed exactly.
"""

from __future__ import annotations

import json
from collections import deque
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from .archive import DamagedFile, read_arrays, write_arrays
from .schedules import Asynchronous, DecayingStep, Schedule, Sequential, Simultaneous, check_step, schedule_of

_CYCLE_MEMORY_BYTES = 64 << 20
_LONGEST_CYCLE = 64
_KNOWN = {kind.__name__: kind for kind in (Sequential, Simultaneous, Asynchronous)}


class Game(Protocol):
    """Players 0..Q-1 whose actions are the rows of a profile [players, ...].

    A game may also have ``start() -> profile``, ``certificate() -> Certificate``, and
    ``best_responses(views, players) -> [len(players), ...]`` that answers for many players at once, where
    ``views`` is one profile for all of them or one each ([len(players), players, ...]).
    """

    def best_response(self, profile: np.ndarray, player: int, /) -> np.ndarray:
        """What ``player`` does when the others play ``profile``; its own row is not looked at."""
        ...


@dataclass(frozen=True)
class StalledUser:
    """A player that should have updated long ago; ``since`` is the tick of its last update, -1 for never."""

    player: int
    since: int


@dataclass(frozen=True)
class Result:
    """Where the iterations ended.

    ``p``: the profile. ``iterations``: sweeps, rounds or ticks. ``residual``: greatest 2-norm by which a
    player would still move. ``cause``: why it did not converge ("" when it did). ``history``: for each
    iteration the greatest move that an updating player wanted. ``error_bound``: certified distance to the
    equilibrium in the certificate's norm, None without one. ``stalled``: players that fell silent.
    """

    p: np.ndarray
    iterations: int
    residual: float
    converged: bool
    cause: str
    history: np.ndarray
    error_bound: float | None
    stalled: tuple[StalledUser, ...] = field(default=())


class FixedPoint:
    """One run that can be driven step by step. Parameters as of :func:`run`."""

    def __init__(
        self,
        game: Game,
        schedule: Schedule | str = "sequential",
        *,
        start: np.ndarray | None = None,
        tol: float = 1e-9,
        step: float | DecayingStep = 1.0,
        max_iter: int = 10_000,
        seed: int | None = None,
    ) -> None:
        check_step(step)
        if not tol > 0:
            raise ValueError(f"tol must be positive, got {tol}")
        if max_iter < 1:
            raise ValueError(f"max_iter must be at least 1, got {max_iter}")
        if start is None:
            if not hasattr(game, "start"):
                raise ValueError("start must be given: the game has no start() of its own")
            start = game.start()  # pyright: ignore[reportAttributeAccessIssue]
        self.game, self.tol, self.step, self.max_iter = game, tol, step, max_iter
        self.schedule = schedule_of(schedule) if isinstance(schedule, str) else schedule
        self.p = np.array(start, np.float64)
        if self.p.ndim < 1 or not len(self.p) or not np.isfinite(self.p).all():
            raise ValueError("start must be a finite array of one row a player")
        players = len(self.p)
        self.tick = 0
        self.history: list[float] = []
        self._rng = np.random.default_rng(getattr(self.schedule, "seed", 0) if seed is None else seed)
        self._present = np.ones(players, bool)
        self._last_update = np.full(players, -1)
        self._last_move = np.full(players, np.inf)
        self._ring: deque[np.ndarray] = deque([self.p.copy()], maxlen=self.schedule.max_delay + 1)
        room = max(4, min(_LONGEST_CYCLE, _CYCLE_MEMORY_BYTES // max(1, self.p.nbytes)))
        self._past: deque[np.ndarray] = deque(maxlen=room)
        self._period = (0, 0)  # length of a suspected cycle, and for how many iterations it has held

    @property
    def players(self) -> np.ndarray:
        """Those still in the game, ascending."""
        return np.flatnonzero(self._present)

    def leave(self, player: int, keep: Literal["zero", "last"] = "zero") -> None:
        """``player`` disconnects: its row is frozen, at zero or at what it played last."""
        if not 0 <= player < len(self.p):
            raise ValueError(f"player must be in [0, {len(self.p) - 1}], got {player}")
        if keep not in ("zero", "last"):
            raise ValueError(f"keep must be 'zero' or 'last', got {keep!r}")
        self._present[player] = False
        if keep == "zero":
            self.p[player] = 0
        self._restart_watch()

    def join(self, player: int) -> None:
        """``player`` is back in the game."""
        self._present[player] = True
        self._last_update[player] = self.tick
        self._restart_watch()

    def _restart_watch(self) -> None:
        self._last_move[:] = np.inf
        self._past.clear()
        self._period = (0, 0)

    def advance(self) -> float:
        """One iteration; returns the greatest move (2-norm) that an updating player wanted."""
        largest = 0.0
        size = self.step(self.tick) if isinstance(self.step, DecayingStep) else self.step
        for movers, delays in self.schedule.moves(self.tick, self.players, len(self.p), self._rng):
            answers = self._answers(movers, delays)
            wanted = answers - self.p[movers]
            lengths = np.sqrt(np.square(wanted).reshape(len(movers), -1).sum(axis=1))
            # With a full step the answer itself, not a sum that rounds.
            self.p[movers] = answers if size == 1 else self.p[movers] + size * wanted
            self._last_move[movers] = lengths
            self._last_update[movers] = self.tick
            largest = max(largest, float(lengths.max(initial=0.0)))
        self.tick += 1
        if self.schedule.max_delay:
            self._ring.appendleft(self.p.copy())
        self.history.append(largest)
        return largest

    def _answers(self, movers: np.ndarray, delays: np.ndarray | None) -> np.ndarray:
        batched = getattr(self.game, "best_responses", None)
        if delays is None:
            if batched is not None and len(movers) > 1:
                return np.asarray(batched(self.p, movers))
            return np.stack([self.game.best_response(self.p, int(q)) for q in movers])
        views = self._views(delays)
        if batched is not None:
            return np.asarray(batched(views, movers))
        return np.stack(
            [self.game.best_response(view, int(q)) for view, q in zip(views, movers, strict=True)]
        )

    def _views(self, delays: np.ndarray) -> np.ndarray:
        """[movers, players, ...]: what each mover has heard, block by block as old as ``delays`` says."""
        past = np.stack(self._ring)  # newest first
        movers, players, blocks = delays.shape
        row = np.arange(players)
        if blocks == 1 or self.p.ndim == 1:
            return past[delays[:, :, 0], row]
        views = np.empty((movers, *self.p.shape))
        edges = np.linspace(0, self.p.shape[1], blocks + 1).astype(int)
        for b in range(blocks):
            part = slice(edges[b], edges[b + 1])
            views[:, :, part] = past[delays[:, :, b], row, part]
        return views

    def residuals(self) -> np.ndarray:
        """Best response minus profile, [players, ...]; zero for those who have left."""
        out = np.zeros_like(self.p)
        players = self.players
        if len(players):
            out[players] = self._answers(players, None) - self.p[players]
        return out

    def _residual(self) -> float:
        wanted = self.residuals().reshape(len(self.p), -1)
        return float(np.sqrt(np.square(wanted).sum(axis=1)).max())

    def stalled(self) -> tuple[StalledUser, ...]:
        """Players that have not updated for longer than the schedule's patience."""
        patience = self.schedule.patience
        if patience is None:
            return ()
        silent = self._present & (self.tick - 1 - self._last_update > patience)
        return tuple(StalledUser(int(q), int(self._last_update[q])) for q in np.flatnonzero(silent))

    def _cycle(self) -> int:
        """Length of the cycle that the profile is certainly in, 0 when there is none.

        The profile must come back to the last bits for a whole period while the players still want to move:
        a slow spiral towards an equilibrium does not.
        """
        if not self.schedule.deterministic or isinstance(self.step, DecayingStep):
            return 0
        limit = 1e-13 * max(float(np.abs(self.p).max()), 1e-300)
        length = 0
        for back, old in enumerate(reversed(self._past), start=1):
            if back > 1 and np.abs(self.p - old).max() <= limit:
                length = back
                break
        held = self._period[1] + 1 if length and length == self._period[0] else 1
        self._period = (length, held if length else 0)
        self._past.append(self.p.copy())
        return length if length and held > length else 0

    def run(self, iterations: int | None = None) -> Result:
        """Go on until it has converged, cycles, or ``iterations`` more (``max_iter`` in all) are done."""
        end = self.max_iter if iterations is None else min(self.max_iter, self.tick + iterations)
        cause, converged = "iteration limit", False
        while self.tick < end:
            moved = self.advance()
            if self._last_move[self._present].max(initial=0.0) <= self.tol and self._residual() <= self.tol:
                cause, converged = "", True
                break
            if moved > self.tol and (length := self._cycle()):
                cause = f"cycle of length {length}"
                break
        wanted = self.residuals()
        residual = float(np.sqrt(np.square(wanted).reshape(len(self.p), -1).sum(axis=1)).max())
        stalled = self.stalled()
        if not converged and stalled:
            cause = f"stalled users: {', '.join(str(s.player) for s in stalled)}"
        bound = None
        if self._present.all() and hasattr(self.game, "certificate"):
            bound = self.game.certificate().error_bound(wanted)  # pyright: ignore[reportAttributeAccessIssue]
        return Result(
            self.p.copy(), self.tick, residual, converged, cause, np.array(self.history), bound, stalled
        )

    def save(self, path: str | Path) -> Path:
        """Everything that the run needs to go on, as a checksummed ``.npz``."""
        name = type(self.schedule).__name__
        meta = {
            "format": "sharewell-fixedpoint-1",
            "schedule": name,
            "schedule_fields": asdict(self.schedule) if name in _KNOWN else {},  # pyright: ignore
            "step": asdict(self.step) if isinstance(self.step, DecayingStep) else self.step,
            "tol": self.tol,
            "max_iter": self.max_iter,
            "tick": self.tick,
            "period": self._period,
            "rng": self._rng.bit_generator.state,
        }
        return write_arrays(
            path,
            {
                "p": self.p,
                "ring": np.stack(self._ring),
                "past": np.stack(self._past) if self._past else np.empty((0, *self.p.shape)),
                "present": self._present,
                "last_update": self._last_update,
                "last_move": self._last_move,
                "history": np.array(self.history),
                "meta": np.frombuffer(json.dumps(meta).encode(), np.uint8),
            },
        )

    @classmethod
    def load(cls, path: str | Path, game: Game, schedule: Schedule | None = None) -> FixedPoint:
        """A saved run, which goes on bit by bit as it would have. ``schedule`` is needed only for one that is
        not of this room. Raises DamagedFile for a file that is not whole."""
        names = ("p", "ring", "past", "present", "last_update", "last_move", "history", "meta")
        arrays = read_arrays(path, names)
        try:
            meta: dict[str, Any] = json.loads(arrays["meta"].tobytes())
            if meta["format"] != "sharewell-fixedpoint-1":
                raise KeyError("format")
            if schedule is None:
                fields: dict[str, Any] = {
                    k: tuple(v) if isinstance(v, list) else v for k, v in meta["schedule_fields"].items()
                }
                schedule = _KNOWN[meta["schedule"]](**fields)
            step = meta["step"]
            run = cls(
                game,
                schedule,
                start=arrays["p"],
                tol=meta["tol"],
                step=DecayingStep(**step) if isinstance(step, dict) else step,
                max_iter=meta["max_iter"],
            )
            run.tick, run._period = meta["tick"], tuple(meta["period"])
            run._rng.bit_generator.state = meta["rng"]
        except (KeyError, TypeError) as error:
            raise DamagedFile(f"{Path(path).name}: no saved run ({error})") from None
        run.history = arrays["history"].tolist()
        run._present = arrays["present"]
        run._last_update, run._last_move = arrays["last_update"], arrays["last_move"]
        run._ring.clear()
        run._ring.extend(arrays["ring"])
        run._past.extend(arrays["past"])
        return run


def run(
    game: Game,
    schedule: Schedule | str = "sequential",
    tol: float = 1e-9,
    step: float | DecayingStep = 1.0,
    *,
    start: np.ndarray | None = None,
    max_iter: int = 10_000,
    seed: int | None = None,
) -> Result:
    """Play best responses until every player wants to move by at most ``tol`` (2-norm).

    ``schedule``: an object or ``"sequential"``, ``"simultaneous"``, ``"asynchronous"``. ``step`` in (0, 1]:
    players go that part of the way to their response. ``start``: profile [players, ...], the game's own when
    None. ``seed``: of the schedule's draws, its own when None. Raises ValueError for parameters out of range.
    """
    return FixedPoint(game, schedule, start=start, tol=tol, step=step, max_iter=max_iter, seed=seed).run()
