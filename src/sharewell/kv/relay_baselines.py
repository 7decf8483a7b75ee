"""What RelayCaching is measured against, on the same engine: other choices of which reused tokens to
compute."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from .plans import Call
from .relay_pieces import Piece, PiecePlan
from .rope import RopeSpec, turn_between

Pieces = Iterable[Piece] | Callable[[], Iterable[Piece]]


class DirectReusePlan(PiecePlan):
    """Moved keys, nothing computed anew; ``move`` False leaves the keys where they were."""

    def chosen(self, layer: int) -> torch.Tensor:
        return ~self.shared


class EpicPlan(PiecePlan):
    """The first ``first`` tokens of each piece are computed in every layer (EPIC, arXiv 2410.15332)."""

    def __init__(self, pieces: Pieces, first: int = 16) -> None:
        super().__init__(pieces)
        self.first = first

    def begin(self, call: Call) -> None:
        super().begin(call)
        self._picked = ~self.shared
        for i in range(len(self.pieces)):
            mine = (self.owner == i).nonzero().flatten()
            self._picked[self.pick(mine)] = True

    def pick(self, slots: torch.Tensor) -> torch.Tensor:
        """Of a piece's slots, those that are computed."""
        return slots[: self.first]

    def chosen(self, layer: int) -> torch.Tensor:
        return self._picked


class TailPlan(EpicPlan):
    """The last tokens of each piece instead."""

    def pick(self, slots: torch.Tensor) -> torch.Tensor:
        return slots[max(0, len(slots) - self.first) :]


class CacheBlendPlan(PiecePlan):
    """All tokens up to layer 1, then the ``ratio`` of the pieces' tokens whose keys and values differ most
    there in every later layer (CacheBlend, arXiv 2405.16444)."""

    def __init__(self, pieces: Pieces, rope: RopeSpec, ratio: float = 0.15) -> None:
        super().__init__(pieces)
        if not 0 <= ratio <= 1:
            raise ValueError(f"ratio must be in [0, 1], got {ratio}")
        self.rope, self.ratio = rope, ratio

    def begin(self, call: Call) -> None:
        super().begin(call)
        self._positions, self._picked = call.positions.cpu(), ~self.shared

    def chosen(self, layer: int) -> torch.Tensor:
        return torch.ones_like(self.shared) if layer <= 1 else self._picked

    def observe(self, layer: int, slots: Any, k: Any, v: Any, mass: Any = None) -> None:
        if layer != 1:
            return
        difference = torch.zeros(len(self.shared))
        for i, piece in enumerate(self.pieces):
            mine = (self.owner == i).nonzero().flatten()
            old_k, old_v = piece.segment.read(layer, self.token[mine])
            turn = turn_between(piece.segment.positions[self.token[mine]], self._positions[mine], self.rope)
            difference[mine] = (k[mine] - turn(old_k)).float().square().flatten(1).sum(-1)
            difference[mine] += (v[mine] - old_v).float().square().flatten(1).sum(-1)
        n = round(self.ratio * int(self.shared.sum()))
        self._picked[difference.topk(n).indices] = True
