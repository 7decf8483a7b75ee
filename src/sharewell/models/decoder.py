"""The layer-wise decoder interface: what every plan over keys and values, and every runner, needs of a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch

    from .config import ModelConfig
    from .lora import LoraAdapter


@runtime_checkable
class Decoder(Protocol):
    """A causal decoder taken apart, on packed tokens: shapes have one token axis T and no padding.

    One layer is ``q, k, v = qkv(l, h, positions)``; attention over any keys and values; ``h = attn_out(l, h, o)``;
    ``h = mlp(l, h)``. Norms and residual additions are inside these. ``h`` is ``[T, hidden]`` in ``dtype``; q
    ``[T, heads, head_dim]``; k, v ``[T, kv_heads, head_dim]``, q and k already rotated to ``positions`` (int64 ``[T]``)
    and q not yet scaled. ``adapter_slots`` (int32 ``[T]``, -1 for none) choose LoRA weights per token.
    """

    config: ModelConfig
    dtype: torch.dtype
    device: torch.device

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor: ...

    def qkv(
        self, layer: int, h: torch.Tensor, positions: torch.Tensor, adapter_slots: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]: ...

    def attn_out(
        self, layer: int, h: torch.Tensor, o: torch.Tensor, adapter_slots: torch.Tensor | None = None
    ) -> torch.Tensor: ...

    def mlp(self, layer: int, h: torch.Tensor, adapter_slots: torch.Tensor | None = None) -> torch.Tensor: ...

    def head(self, h: torch.Tensor) -> torch.Tensor:
        """Final norm and projection: float32 logits ``[T, vocab]``."""
        ...

    def load_adapter(self, slot: int, adapter: LoraAdapter | None) -> None:
        """Put ``adapter`` into ``slot``; None empties it."""
        ...
