"""Moving keys: a key rotated to one position becomes the key of another by one more rotation.

RoPE (arXiv 2104.09864) turns the pair (x_i, x_{i+d/2}) by angle position * frequency_i, so R(to) R(-from)
takes a stored key to its new place without its token. In float32 and with the model's own angles: models
compute position * frequency in float32, which at position 32,000 is up to 0.002 off, and only the difference
of those same angles undoes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..models import TAKEN_APART, inverse_frequencies
from .plans import UnsupportedModel

# Frequencies that change with the length of the text: a moved key would need the whole text's length.
_LENGTH_DEPENDENT = ("dynamic", "longrope")
# Families of transformers that rotate in halves by one rotary module.
_HALVES = (*TAKEN_APART, "PhiForCausalLM", "Phi3ForCausalLM")


@dataclass(frozen=True)
class RopeSpec:
    """How a model rotates: ``inverse`` float32 ``[rotated / 2]`` frequencies; the first ``2 * len(inverse)``
    elements of a head are rotated, in halves (Llama, Qwen, Gemma) or ``interleaved`` pairs (GPT-J)."""

    inverse: torch.Tensor
    interleaved: bool = False
    kind: str = "default"

    def angles(self, positions: torch.Tensor) -> torch.Tensor:
        """Float64 ``[n, rotated / 2]``: the float32 angles that the model itself uses."""
        return (positions.to(torch.float32)[:, None] * self.inverse.to(positions.device)).double()


def rope_of(model: Any) -> RopeSpec:
    """The rotation of a decoder (its own ``rope``, if it has that), or of a transformers model.

    Raises UnsupportedModel for frequencies that depend on the length (dynamic NTK, longrope), several rotary
    bases, no RoPE at all, or a family of which it is not known which elements make a pair."""
    own = getattr(model, "rope", None)
    if isinstance(own, RopeSpec):
        return own
    hf = model if hasattr(getattr(model, "config", None), "to_dict") else getattr(model, "model", None)
    name = type(hf if hf is not None else model).__name__
    if hf is None:  # a decoder without modules of its own: the fused one
        config = getattr(model, "config", None)
        if config is None or not getattr(config, "fusable", False):
            raise UnsupportedModel(f"{name}: keys cannot be moved: how it rotates is not known")
        scaling = config.rope_scaling or {}
        inverse = inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        return RopeSpec(inverse.float(), kind=scaling.get("rope_type") or scaling.get("type") or "default")
    if name not in _HALVES:
        raise UnsupportedModel(f"{name}: keys cannot be moved: it is none of {', '.join(_HALVES)}")
    rotary = hf.model.rotary_emb
    if rotary.rope_type in _LENGTH_DEPENDENT:
        raise UnsupportedModel(
            f"{name}: keys cannot be moved: rope type {rotary.rope_type!r} depends on the text's length"
        )
    return RopeSpec(rotary.inv_freq.detach().float(), kind=rotary.rope_type)


@dataclass(frozen=True)
class Turn:
    """The rotation of n keys from their positions to others; ``cos, sin`` float64 ``[n, rotated / 2]``, None
    where nothing moves."""

    cos: torch.Tensor | None
    sin: torch.Tensor | None
    interleaved: bool = False

    def __call__(self, k: torch.Tensor) -> torch.Tensor:
        """``k [n, kv_heads, head_dim]`` rotated, in float32 (float64 for float64 keys); k's dtype is kept."""
        if self.cos is None or self.sin is None:
            return k
        exact = torch.promote_types(k.dtype, torch.float32)
        cos, sin = self.cos.to(k.device, exact)[:, None], self.sin.to(k.device, exact)[:, None]
        rotated = 2 * self.cos.shape[-1]
        x = k[..., :rotated].to(exact)
        if self.interleaved:
            a, b = x[..., ::2], x[..., 1::2]
            y = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
        else:
            a, b = x.chunk(2, -1)
            y = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
        if rotated == k.shape[-1]:
            return y.to(k.dtype)
        return torch.cat([y.to(k.dtype), k[..., rotated:]], -1)


def turn_between(from_positions: torch.Tensor, to_positions: torch.Tensor, rope: RopeSpec) -> Turn:
    """The rotation that takes keys from ``from_positions`` to ``to_positions`` (int64 ``[n]``)."""
    if not len(from_positions) or bool((from_positions == to_positions).all()):
        return Turn(None, None)
    turn = rope.angles(to_positions) - rope.angles(from_positions)
    return Turn(turn.cos(), turn.sin(), rope.interleaved)


def move_keys(
    k: torch.Tensor, from_positions: torch.Tensor, to_positions: torch.Tensor, rope: RopeSpec
) -> torch.Tensor:
    """Keys ``k [n, kv_heads, head_dim]`` rotated from ``from_positions`` to ``to_positions`` (int64 ``[n]``),
    in float32 (float64 for float64 keys); k's dtype is kept. Values need no move."""
    return turn_between(from_positions, to_positions, rope)(k)
