"""dKV-Cache: which positions of a masked diffusion language model a denoising step computes, and which it
reads.

Attention is bidirectional, so no position's keys and values are ever final; but they change most in the step
in which the position turns from [MASK] into a token, and hardly after the next one. Hence the delay: what was
decided in step t is computed once more in step t + 1, with its token, and is read from then on (dKV-Cache,
arXiv 2505.15781, section 3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from .plans import KVPlan

if TYPE_CHECKING:
    import torch

Variant = Literal["none", "decode", "greedy", "prefill", "pd", "block"]
Shift = Literal["un", "un_right", "right"]
VARIANTS = ("none", "decode", "greedy", "prefill", "pd", "block")
SHIFTS = ("un", "un_right", "right")


@dataclass(frozen=True)
class DKVConfig:
    """What is kept between denoising steps.

    ``variant``: "none" computes everything in every step. "decode" keeps decided positions. "greedy" also
    keeps the undecided ones but for a ``window`` around those that come next; their order must be known, so
    it needs random remasking. "prefill" keeps the prompt alone, "pd" the prompt for good and decided
    positions as "decode" does. "block" is the block-wise cache that others use (Fast-dLLM, arXiv 2505.22618):
    all but the current block, computed anew when a block begins.

    ``refresh``: every so many steps everything is computed (the prompt never, for "prefill" and "pd");
    default 8, for "greedy" 2. ``delay``: steps between the decision and the keys and values that are kept; 0
    is what the paper argues against. ``shift``: for models that read the token of position i at position i -
    1 (Dream), which positions count as settled: "un" those whose successor is decided, "right" those decided
    themselves, "un_right" both. Raises ValueError naming the field.
    """

    variant: Variant = "decode"
    refresh: int | None = None
    window: int = 4
    shift: Shift | None = None
    delay: int = 1

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {self.variant!r}")
        if self.refresh is not None and self.refresh < 1:
            raise ValueError(f"refresh must be at least 1, got {self.refresh}")
        if self.window < 0:
            raise ValueError(f"window must be at least 0, got {self.window}")
        if self.shift is not None and self.shift not in SHIFTS:
            raise ValueError(f"shift must be None or one of {', '.join(SHIFTS)}, got {self.shift!r}")
        if self.delay not in (0, 1):
            raise ValueError(f"delay must be 0 or 1, got {self.delay}")

    @property
    def interval(self) -> int:
        """Steps from one refresh to the next."""
        return self.refresh or (2 if self.variant == "greedy" else 8)


class Bidirectional(KVPlan):
    """Every token of a pass sees every token of its sequence: those of the pass, and what the space kept."""

    mask = "full"


@dataclass(frozen=True)
class DenoisingState:
    """What is known before a step; all tensors bool ``[B, L]``, ``False`` behind the end of a shorter row.

    ``step`` counts from the beginning of the block, ``first`` is True in the very first step. ``decided``: by
    the last step (the prompt included), ``before``: by the one before it. ``block``: the current block.
    ``coming``: what this step will decide, where the order is known.
    """

    step: int
    first: bool
    exists: torch.Tensor
    prompt: torch.Tensor
    decided: torch.Tensor
    before: torch.Tensor
    block: torch.Tensor
    coming: torch.Tensor | None = None


def computed_positions(config: DKVConfig, state: DenoisingState) -> torch.Tensor:
    """Positions whose queries, keys and values the step computes: bool ``[B, L]``. Those of all others are
    read."""
    everything = state.exists
    if state.first or config.variant == "none":
        return everything
    if config.variant == "block":
        return everything if state.step == 0 else _with_predictors(config, state.block)
    anew = everything if config.variant in ("decode", "greedy") else everything & ~state.prompt
    if config.variant == "prefill" or state.step % config.interval == 0:
        return anew
    if config.variant == "greedy":
        return _greedy(config, state)
    if (
        state.step <= config.delay and state.step
    ):  # what the step before the block's first decided is not known
        return anew
    return anew & ~settled(config.shift, state.before if config.delay else state.decided)


def settled(shift: Shift | None, decided: torch.Tensor) -> torch.Tensor:
    """Positions that need no computing any more once ``decided`` ones are: those that are decided and, in a
    shifted model, that no undecided position is read at."""
    if shift in (None, "right"):
        return decided
    following = decided.clone()
    following[:, :-1] = decided[:, 1:]  # behind the last there is nothing to read
    return following & decided if shift == "un_right" else following


def predictors(config: DKVConfig, positions: torch.Tensor) -> torch.Tensor:
    """Where the tokens of ``positions`` are read: bool ``[B, L]``."""
    if config.shift is None:
        return positions
    at = positions.new_zeros(positions.shape)
    at[:, :-1] = positions[:, 1:]
    return at


def _with_predictors(config: DKVConfig, positions: torch.Tensor) -> torch.Tensor:
    return positions | predictors(config, positions)


def _greedy(config: DKVConfig, state: DenoisingState) -> torch.Tensor:
    import torch

    assert state.coming is not None
    chosen = _with_predictors(config, state.coming) | (state.decided & ~state.before)
    free = state.exists & ~state.decided & ~state.coming
    out = chosen.clone()
    for row in range(len(out)):
        coming = state.coming[row].nonzero().flatten().tolist()
        open_ = free[row].nonzero().flatten().tolist()
        near = nearest(coming, open_, config.window)
        if near:
            out[row, torch.tensor(near, device=out.device)] = True
    return out


def nearest(targets: list[int], free: list[int], count: int) -> list[int]:
    """``count`` of the ``free`` positions nearest to ``targets``, taken to the left and to the right in
    turns."""
    left = set(free)
    picked: list[int] = []
    reach = 1
    longest = max(free, default=0) + max(targets, default=0) + 1
    while len(picked) < count and left and reach <= longest:
        for target in targets:
            for position in (target - reach, target + reach):
                if position in left and len(picked) < count:
                    left.discard(position)
                    picked.append(position)
        reach += 1
    return picked
