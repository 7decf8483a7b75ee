"""What plans that reuse found text have in common: which slots of a pass a segment holds, and reading those.

A *piece* is a run of the pass's tokens that a segment holds. A plan on pieces says for each layer which slots
are computed (:meth:`PiecePlan.chosen`); all others are read from their segments, keys moved by RoPE."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .plans import Call, KVPlan, PlanError, Read

if TYPE_CHECKING:
    from .segments import Segment


class RelayDeclined(PlanError):
    """The prompt is better computed in full; the message says why."""


@dataclass(frozen=True)
class Piece:
    """``length`` tokens of ``segment`` from ``offset`` on, at the positions ``start ...`` of a prompt. Raises
    ValueError for a run that the segment does not have."""

    segment: Segment
    start: int
    offset: int
    length: int

    def __post_init__(self) -> None:
        if self.start < 0 or self.length < 1 or not 0 <= self.offset <= len(self.segment) - self.length:
            raise ValueError(
                f"a piece must be a run of the segment's {len(self.segment)} tokens at a position from 0 on, "
                f"got offset {self.offset}, length {self.length}, start {self.start}"
            )


class PiecePlan(KVPlan):
    """Base of plans that read pieces. ``pieces`` may be a function, which is asked as each pass begins; what
    earlier passes computed already is left alone, and the last token of a pass is always computed."""

    def __init__(self, pieces: Iterable[Piece] | Callable[[], Iterable[Piece]], *, move: bool = True) -> None:
        self._given = pieces if callable(pieces) else list(pieces)
        self._move = move
        self.pieces: list[Piece] = []
        self.n_layers = 0
        self.damaged: list[int] = []  # ids of segments that held NaN or infinite values

    def begin(self, call: Call) -> None:
        given = self._given() if callable(self._given) else self._given
        self.pieces, self.n_layers = list(given), call.n_layers
        positions = call.positions.cpu()
        self.owner = torch.full((len(call),), -1, dtype=torch.int64)  # which piece holds a slot
        self.token = torch.zeros(len(call), dtype=torch.int64)  # and which token of its segment
        for i, piece in enumerate(self.pieces):
            inside = (positions >= piece.start) & (positions < piece.start + piece.length)
            inside &= self.owner < 0
            inside[-1] = False
            self.owner[inside] = i
            self.token[inside] = positions[inside] - piece.start + piece.offset
        self.shared = self.owner >= 0
        self.first_position = int(positions[0])
        self._mask: torch.Tensor | None = None
        self._slots: torch.Tensor | None = None
        self._reads: list[tuple[torch.Tensor, Read]] = []

    @abstractmethod
    def chosen(self, layer: int) -> torch.Tensor:
        """Bool ``[slots]``: computed at ``layer``. The slots of no piece must be among them."""

    def active(self, layer: int) -> torch.Tensor | None:
        mask = self.chosen(layer)
        if self._mask is None or not torch.equal(mask, self._mask):
            self._mask, self._slots = mask, mask.nonzero().flatten()
            self._reads = []
            for i, piece in enumerate(self.pieces):
                slots = (~mask & (self.owner == i)).nonzero().flatten()
                if len(slots):
                    read = Read(piece.segment, self.token[slots], move=self._move, transform=self._checked(i))
                    self._reads.append((slots, read))
        return self._slots

    def read(self, layer: int) -> Iterable[tuple[torch.Tensor, Read]]:
        return self._reads

    def _checked(self, i: int) -> Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
        def check(k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            if not bool(torch.isfinite(k).all() & torch.isfinite(v).all()):
                self.damaged.append(self.pieces[i].segment.id)
                raise RelayDeclined(f"segment {self.damaged[-1]} holds NaN or infinite values")
            return k, v

        return check

    def read_values(self, layer: int, i: int, slots: torch.Tensor) -> torch.Tensor:
        """The stored values ``[len(slots), kv_heads * head_dim]`` of slots of piece ``i``, float32."""
        _, v = self.pieces[i].segment.read(layer, self.token[slots])
        return v.flatten(1).float()
