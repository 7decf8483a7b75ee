"""What a detector costs: parameters and multiply-adds, by fvcore's convention."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .attention import CHUNK, WindowedAttention
from .layers import ChannelNorm
from .liquid import LiquidBlock
from .model import TADModel

NORM_COST = 5  # operations an element that fvcore counts for a layer normalisation with gain and bias


@dataclass(frozen=True)
class Cost:
    """Parameters, and operations for one recording. A multiply-add counts once, which is what this
    literature calls a FLOP; activations, softmax and pooling are free, as in fvcore.

    ``attention``: the two products of windowed attention, counted as they are computed (whole chunks).
    """

    parameters: int
    convolutions: int
    norms: int
    attention: int

    @property
    def macs(self) -> int:
        """Convolutions and norms: the figure to compare with published ones."""
        return self.convolutions + self.norms

    @property
    def total(self) -> int:
        """With the products of attention."""
        return self.macs + self.attention


def count_cost(model: TADModel, rows: int) -> Cost:
    """Cost of ``model`` on ``rows`` feature rows (a multiple of the last stride), batch of one.

    Nothing is computed: shapes pass through a copy without storage.
    """
    twin = copy.deepcopy(model).to("meta").eval()
    counted = {"convolutions": 0, "norms": 0, "attention": 0}

    def convolution(module: Any, _: Any, out: torch.Tensor) -> None:
        counted["convolutions"] += out.shape[0] * out.shape[2] * module.weight.numel()

    def norm(_: Any, __: Any, out: torch.Tensor) -> None:
        counted["norms"] += NORM_COST * out.numel()

    def attention(module: WindowedAttention, _: Any, out: torch.Tensor) -> None:
        chunks = -(-out.shape[2] // CHUNK)
        span = CHUNK + module.window - 1
        counted["attention"] += 2 * chunks * CHUNK * span * out.shape[0] * out.shape[1]

    def smoothing(module: LiquidBlock, _: Any, out: tuple[torch.Tensor, torch.Tensor]) -> None:
        if module.kernel_size and module.relaxation:
            counted["convolutions"] += out[0].numel() * (2 * module.kernel_size - 1)

    hooks = {nn.Conv1d: convolution, ChannelNorm: norm, WindowedAttention: attention, LiquidBlock: smoothing}
    for module in twin.modules():
        hook: Any = hooks.get(type(module))
        if hook is not None:
            module.register_forward_hook(hook)
    with torch.no_grad():
        twin(torch.empty(1, model.config.c_in, rows, device="meta"), torch.empty(1, 1, rows, device="meta"))
    return Cost(sum(p.numel() for p in model.parameters()), **counted)
