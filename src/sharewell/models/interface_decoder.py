"""Any causal transformers model on paged keys and values, through transformers' attention interface.

The model's own code runs once over the packed tokens of all sequences; where it would attend, it calls an
attention function of ours. What cannot work that way (recurrent or convolutional layers, sliding windows,
attention written into the layer itself) is found out when the model is loaded, by comparing it with itself.
"""

from __future__ import annotations

import inspect
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .checkpoint import load_transformers
from .config import ModelConfig, ModelError

if TYPE_CHECKING:
    from .decoder import Attend
    from .lora import LoraAdapter

NAME = "sharewell_paged"
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.05}
# What an attention function is told and may ignore: the causal mask and dropout are the pages' business.
_HARMLESS = ("dropout", "is_causal", "position_ids", "use_cache", "output_attentions", "cache_position")


@dataclass
class _Pass:
    """One forward pass: attention calls are counted, so the model's layers need no numbers."""

    attend: Attend
    calls: int = 0
    refused: set[str] = field(default_factory=set)


_current: ContextVar[_Pass] = ContextVar(NAME)


def _attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **options: Any
) -> tuple[torch.Tensor, None]:
    """transformers' attention function: query ``[1, heads, T, d]`` to output ``[1, T, heads, d]``."""
    state = _current.get()
    scaling = options.pop("scaling", None)
    for name, given in options.items():
        if given is not None and given is not False and name not in _HARMLESS:
            if isinstance(given, torch.Tensor | int | float):
                state.refused.add(name)
    if getattr(module, "is_causal", True) is False:
        state.refused.add("attention that is not causal")
    q, k, v = (t[0].transpose(0, 1).contiguous() for t in (query, key, value))
    out = state.attend(state.calls, q, k, v, scaling)
    state.calls += 1
    return out[None], None


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, lambda *args, **options: None)


class InterfaceDecoder:
    """A causal transformers model that runs whole over packed tokens:
    :class:`~sharewell.models.WholeDecoder`.

    ``config`` has the sizes of keys and values that the model really computes. Raises ModelError naming the
    class and the reason when the model cannot run this way.
    """

    def __init__(self, model: Any, config: ModelConfig) -> None:
        name = self._name = type(model).__name__
        if getattr(model.config, "is_encoder_decoder", False):
            raise ModelError(f"{name} cannot be served: it is an encoder-decoder model")
        self.model = model
        self.dtype = next(model.parameters()).dtype
        self.device = next(model.parameters()).device
        accepted = inspect.signature(model.forward).parameters
        self._accepts = {n for n in ("position_ids", "logits_to_keep") if n in accepted}
        expected = self._stock_logits()
        _register()
        try:
            model.set_attn_implementation(NAME)
        except (ValueError, AttributeError) as error:
            raise ModelError(f"{name} cannot be served: it has no attention interface ({error})") from None
        self.config = self._checked(config, expected)

    @classmethod
    def from_folder(
        cls, folder: Path | str, dtype: torch.dtype = torch.float32, device: str = "cpu"
    ) -> InterfaceDecoder:
        """Load ``folder`` with transformers. Raises ModelError."""
        config = ModelConfig.from_folder(folder)
        try:
            model = load_transformers(folder, dtype)
        except (ValueError, KeyError, OSError, ImportError) as error:
            raise ModelError(f"{folder}: transformers cannot load {config.architecture}: {error}") from None
        return cls(model.to(device), config)  # pyright: ignore[reportArgumentType]

    def run(
        self, token_ids: torch.Tensor, positions: torch.Tensor, attend: Attend, logit_rows: torch.Tensor
    ) -> torch.Tensor:
        """Float32 logits ``[R, vocab]`` of ``logit_rows``; attention is ``attend(layer, q, k, v, scale)``."""
        return self._pass(_Pass(attend), token_ids, positions, logit_rows)

    def load_adapter(self, slot: int, adapter: LoraAdapter | None) -> None:
        """Adapters need a Llama-like model: ValueError for any but None."""
        if adapter is not None:
            raise ValueError(f"adapter {adapter.name!r} cannot be used: {self._name} runs its own code")

    def _pass(
        self, state: _Pass, token_ids: torch.Tensor, positions: torch.Tensor, logit_rows: torch.Tensor
    ) -> torch.Tensor:
        options: dict[str, Any] = {"position_ids": positions[None].to(self.device)}
        if "logits_to_keep" in self._accepts:
            options["logits_to_keep"] = logit_rows.to(self.device)
        token = _current.set(state)
        try:
            logits = self.model(input_ids=token_ids[None].to(self.device), use_cache=False, **options).logits[
                0
            ]
        finally:
            _current.reset(token)
        if "logits_to_keep" not in self._accepts:
            logits = logits[logit_rows.to(self.device)]
        return logits.float()

    def _samples(self) -> list[torch.Tensor]:
        """Two short texts of different length."""
        vocab = int(self.model.get_input_embeddings().weight.shape[0])
        return [(torch.arange(n) * 7 + n) % vocab for n in (5, 8)]

    @torch.inference_mode()
    def _stock_logits(self) -> torch.Tensor:
        """What the model itself gives for the samples, each alone."""
        ids = [s[None].to(self.device) for s in self._samples()]
        return torch.cat([self.model(input_ids=i, use_cache=False).logits[0] for i in ids]).float()

    @torch.inference_mode()
    def _checked(self, config: ModelConfig, expected: torch.Tensor) -> ModelConfig:
        """Run both samples packed and compare; the config with the sizes seen."""
        if "position_ids" not in self._accepts:
            raise ModelError(f"{self._name} cannot be served: its forward takes no position_ids")
        samples = self._samples()
        shapes: set[tuple[int, ...]] = set()
        bounds = [0, len(samples[0]), len(samples[0]) + len(samples[1])]

        def attend(
            layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None
        ) -> torch.Tensor:
            shapes.add((*k.shape[1:], *v.shape[1:]))
            outs = []
            for first, end in pairwise(bounds):
                query, key, value = (t[first:end].transpose(0, 1)[None] for t in (q, k, v))
                out = torch.nn.functional.scaled_dot_product_attention(
                    query, key, value, is_causal=True, scale=scale, enable_gqa=True
                )
                outs.append(out[0].transpose(0, 1))
            return torch.cat(outs)

        state = _Pass(attend)
        positions = torch.cat([torch.arange(len(s)) for s in samples])
        logits = self._pass(state, torch.cat(samples), positions, torch.arange(bounds[-1]))
        if not state.calls:
            raise ModelError(f"{self._name} cannot be served: no layer uses the attention interface")
        if state.refused:
            raise ModelError(
                f"{self._name} cannot be served: its attention uses {', '.join(sorted(state.refused))}"
            )
        if len(shapes) > 1 or any(s[:2] != s[2:] for s in shapes):
            raise ModelError(f"{self._name} cannot be served: its keys and values differ in shape")
        error = float((logits - expected).abs().max() / expected.abs().max().clamp(min=1e-6))
        if not error < _TOLERANCE.get(self.dtype, 1e-3):
            raise ModelError(
                f"{self._name} cannot be served: packed tokens change its logits by {error:.2g} of "
                "the largest (layers that are not attention mix tokens)"
            )
        heads, dim = next(iter(shapes))[:2]
        return replace(config, n_layers=state.calls, n_kv_heads=heads, head_dim=dim, sliding_window=None)
