"""The decoder interfaces: what plans over keys and values, and runners, need of a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from .config import ModelConfig
    from .lora import LoraAdapter

    # (layer, q [T, heads, d], k [T, kv heads, d], v likewise, scale or None for 1 / sqrt(d)) -> [T, heads,
    # d]: keeps the new keys and values and attends to all that each token may see.
    Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, float | None], torch.Tensor]


@runtime_checkable
class Decoder(Protocol):
    """A causal decoder taken apart, on packed tokens: shapes have one token axis T and no padding.

    One layer is ``q, k, v = qkv(l, h, positions)``; attention over any keys and values; ``h = attn_out(l,
    h, o)``; ``h = mlp(l, h)``. Norms and residual additions are inside these. ``h`` is ``[T, hidden]`` in
    ``dtype``; q ``[T, heads, head_dim]``; k, v ``[T, kv_heads, head_dim]``, q and k already rotated to
    ``positions`` (int64 ``[T]``) and q not yet scaled. ``adapter_slots`` (int32 ``[T]``, -1 for none)
    choose LoRA weights per token.
    """

    config: ModelConfig
    dtype: torch.dtype
    device: torch.device

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor: ...

    def qkv(
        self, layer: int, h: torch.Tensor, positions: torch.Tensor, adapter_slots: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]: ...

    def queries(
        self, layer: int, h: torch.Tensor, positions: torch.Tensor, adapter_slots: torch.Tensor | None = None
    ) -> torch.Tensor:
        """q of :meth:`qkv` alone, for a layer that reads the keys and values of another."""
        ...

    def attn_in(self, layer: int, h: torch.Tensor) -> torch.Tensor:
        """What the projections of q, k and v see: ``h`` after the layer's first norm."""
        ...

    def attn_out(
        self, layer: int, h: torch.Tensor, o: torch.Tensor, adapter_slots: torch.Tensor | None = None
    ) -> torch.Tensor: ...

    def mlp(self, layer: int, h: torch.Tensor, adapter_slots: torch.Tensor | None = None) -> torch.Tensor: ...

    def head(self, h: torch.Tensor) -> torch.Tensor:
        """Final norm and projection: float32 logits ``[T, vocab]`` (float64 for a float64 model)."""
        ...

    def load_adapter(self, slot: int, adapter: LoraAdapter | None) -> None:
        """Put ``adapter`` into ``slot``; None empties it."""
        ...


@runtime_checkable
class WholeDecoder(Protocol):
    """A causal model that runs through its own code, on packed tokens, and leaves only attention to
    others.
    """

    config: ModelConfig
    dtype: torch.dtype
    device: torch.device

    def run(
        self, token_ids: torch.Tensor, positions: torch.Tensor, attend: Attend, logit_rows: torch.Tensor
    ) -> torch.Tensor:
        """Float32 logits ``[R, vocab]`` of ``logit_rows``; ``attend`` is called once a layer, in order."""
        ...

    def load_adapter(self, slot: int, adapter: LoraAdapter | None) -> None:
        """Put ``adapter`` into ``slot``; None empties it."""
        ...
