"""How fast each channel forgets, and how the blocks of the pyramid share that."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .config import DECAY_SHARING, DecaySharing, require

LAMBDA_MIN, LAMBDA_MAX = 1e-3, 20.0


class SharedDecay(nn.Module):
    """Decay rates of all blocks: ``lambda_b = softplus(rho) * exp(delta_b)``, one per channel and positive.

    mode "hierarchical": one ``rho`` in R^dim for all blocks and a scalar ``delta_b`` for each, starting at 0;
    "shared": ``rho`` alone; "none": each block has its own ``rho``. ``steps[b]`` is the time step of block
    b: 1 row of its own level (so one rate means a time constant that grows with the stride), or the stride
    itself for rates in physical time. Source: LiquidTAD (arXiv 2604.18274), form reconstructed from the
    published totals.
    """

    def __init__(
        self,
        dim: int,
        levels: int,
        mode: DecaySharing = "hierarchical",
        *,
        steps: Sequence[float] | None = None,
        rho_init: float = 0.5413,
        learned: bool = True,
    ) -> None:
        super().__init__()
        require(dim >= 1, "dim", "at least 1", dim)
        require(levels >= 0, "levels", "at least 0", levels)
        require(mode in DECAY_SHARING, "mode", " | ".join(DECAY_SHARING), mode)
        self.mode = mode
        self.steps = tuple(float(step) for step in (steps if steps is not None else (1.0,) * levels))
        require(len(self.steps) == levels, "steps", f"{levels} time steps", steps)
        rows = levels if mode == "none" else 1
        self.rho = nn.Parameter(torch.full((rows, dim), rho_init), requires_grad=learned)
        if mode == "hierarchical":
            self.delta = nn.Parameter(torch.zeros(levels), requires_grad=learned)
        else:
            self.register_parameter("delta", None)

    def rates(self, block: int) -> Tensor:
        """``lambda`` of a block: float [dim], in 1 / time step, within [1e-3, 20]."""
        rate = nn.functional.softplus(self.rho[block if self.mode == "none" else 0])
        if self.delta is not None:
            rate = rate * self.delta[block].exp()
        return rate.clamp(LAMBDA_MIN, LAMBDA_MAX)

    def forward(self, block: int) -> Tensor:
        """``a = exp(-lambda * dt)`` of a block: what is kept of the input over one step, float [dim]."""
        return torch.exp(-self.rates(block) * self.steps[block])


class FrozenDecay(nn.Module):
    """The factors ``a`` of every block as constants, for deployment."""

    def __init__(self, factors: Sequence[Tensor]) -> None:
        super().__init__()
        for block, factor in enumerate(factors):
            self.register_buffer(f"a{block}", factor.detach().clone())

    @classmethod
    def of(cls, decay: SharedDecay) -> FrozenDecay:
        with torch.no_grad():
            return cls([decay(block) for block in range(len(decay.steps))])

    def forward(self, block: int) -> Tensor:
        return getattr(self, f"a{block}")
