"""A Llama-, Qwen- or Mistral-like transformers model taken apart: fallback off the fused path, and oracle.

Runs the model's own modules, so it works in any dtype and on CUDA.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .checkpoint import load_transformers
from .config import FUSABLE, ModelConfig, ModelError
from .interface_decoder import InterfaceDecoder
from .rope import rotate

if TYPE_CHECKING:
    from .lora import LoraAdapter


def load_stock_decoder(
    folder: Path | str, dtype: torch.dtype = torch.float32, device: str = "cpu", max_adapters: int = 0
) -> StockDecoder | InterfaceDecoder:
    """The decoder that runs transformers' own code for ``folder``: layer by layer for a Llama-like model,
    which adapters need, whole for any other. Raises ModelError for a model that neither can run."""
    config = ModelConfig.from_folder(folder)
    if config.architecture in FUSABLE and not config.mixed_attention:
        return StockDecoder.from_folder(folder, dtype, device, max_adapters)
    return InterfaceDecoder.from_folder(folder, dtype, device)


# Whose layers are those of a Llama-like decoder, whatever the fused decoder knows.
TAKEN_APART = (*FUSABLE, "GemmaForCausalLM")
_NEEDED = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")


class StockDecoder:
    """The :class:`~sharewell.models.Decoder` interface over a transformers model's own layers.

    Raises ModelError naming the class and what is missing when the layers are not those of a Llama-like
    decoder.
    """

    def __init__(self, model: Any, config: ModelConfig, max_adapters: int = 0) -> None:
        inner = getattr(model, "model", None)
        layers = getattr(inner, "layers", None)
        name = type(model).__name__
        if config.architecture not in TAKEN_APART:
            raise ModelError(
                f"{name} cannot be taken apart: it is not Llama-, Qwen2/3-, Mistral- or Gemma-like"
            )
        if inner is None or not layers or not hasattr(inner, "rotary_emb") or not hasattr(inner, "norm"):
            raise ModelError(
                f"{name} cannot be taken apart: model.layers, model.norm or model.rotary_emb is missing"
            )
        missing = [part for part in _NEEDED if not hasattr(layers[0], part)]
        if missing:
            raise ModelError(f"{name} cannot be taken apart: its layers lack {', '.join(missing)}")
        if config.mixed_attention:
            raise ModelError(f"{name} cannot be taken apart: its layers mix kinds of attention")
        self.model, self.config = model, config
        self.dtype = next(model.parameters()).dtype
        self.device = next(model.parameters()).device
        self._layers = layers
        self._tables: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        self._lora: list[dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]] | None] = [
            None
        ] * max_adapters

    @classmethod
    def from_folder(
        cls,
        folder: Path | str,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        max_adapters: int = 0,
    ) -> StockDecoder:
        """Load ``folder`` (either weight form) into transformers modules."""
        model = load_transformers(folder, dtype).to(device)  # pyright: ignore[reportArgumentType]
        return cls(model, ModelConfig.from_folder(folder), max_adapters)

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        return self.model.model.embed_tokens(token_ids.to(self.device))

    def _project(
        self, layer: int, parent: Any, part: str, x: torch.Tensor, slots: torch.Tensor | None
    ) -> torch.Tensor:
        y = getattr(parent, part)(x)
        if slots is None:
            return y
        for slot in slots.unique().tolist():
            pair = (self._lora[slot] or {}).get((layer, part)) if slot >= 0 else None
            if pair is not None:
                rows = (slots == slot).nonzero().flatten().to(x.device)
                y = y.index_add(0, rows, x[rows] @ pair[0].T @ pair[1].T)
        return y

    def qkv(
        self, layer: int, h: torch.Tensor, positions: torch.Tensor, adapter_slots: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x, attention = self.attn_in(layer, h), self._layers[layer].self_attn
        q, k, v = (
            self._project(layer, attention, p, x, adapter_slots).view(len(h), -1, self.config.head_dim)
            for p in ("q_proj", "k_proj", "v_proj")
        )
        if hasattr(attention, "q_norm"):
            q, k = attention.q_norm(q), attention.k_norm(k)
        cos, sin = self._rotation(positions)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def queries(
        self, layer: int, h: torch.Tensor, positions: torch.Tensor, adapter_slots: torch.Tensor | None = None
    ) -> torch.Tensor:
        x, attention = self.attn_in(layer, h), self._layers[layer].self_attn
        q = self._project(layer, attention, "q_proj", x, adapter_slots).view(len(h), -1, self.config.head_dim)
        if hasattr(attention, "q_norm"):
            q = attention.q_norm(q)
        return rotate(q, *self._rotation(positions))

    def attn_in(self, layer: int, h: torch.Tensor) -> torch.Tensor:
        return self._layers[layer].input_layernorm(h)

    def _rotation(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of ``positions``, computed once for all layers that pass the same tensor."""
        if self._tables is None or self._tables[0] is not positions:
            where = positions[None].to(self.device)
            like = torch.empty(0, dtype=torch.float32, device=self.device)
            cos, sin = self.model.model.rotary_emb(like, where)
            half = self.config.head_dim // 2
            self._tables = positions, cos[0, :, :half], sin[0, :, :half]
        return self._tables[1:]

    def attn_out(
        self, layer: int, h: torch.Tensor, o: torch.Tensor, adapter_slots: torch.Tensor | None = None
    ) -> torch.Tensor:
        return h + self._project(
            layer, self._layers[layer].self_attn, "o_proj", o.reshape(len(h), -1), adapter_slots
        )

    def mlp(self, layer: int, h: torch.Tensor, adapter_slots: torch.Tensor | None = None) -> torch.Tensor:
        block = self._layers[layer]
        x = block.post_attention_layernorm(h)
        if adapter_slots is None:
            return h + block.mlp(x)
        gate, up = (self._project(layer, block.mlp, p, x, adapter_slots) for p in ("gate_proj", "up_proj"))
        return h + self._project(layer, block.mlp, "down_proj", block.mlp.act_fn(gate) * up, adapter_slots)

    def head(self, h: torch.Tensor) -> torch.Tensor:
        logits = self.model.lm_head(self.model.model.norm(h))
        return logits if logits.dtype == torch.float64 else logits.float()

    def load_adapter(self, slot: int, adapter: LoraAdapter | None) -> None:
        if not 0 <= slot < len(self._lora):
            raise ValueError(f"slot must be in [0, {len(self._lora)}), got {slot}")
        self._lora[slot] = adapter and {
            key: (a.to(self.device, self.dtype), (b * adapter.scale).to(self.device, self.dtype))
            for key, (a, b) in adapter.targets.items()
        }
