"""Masked diffusion language models from their folders, as plain transformers models, without their remote
code.

LLaDA is a Llama whose attention sees both ways, with other names; Dream is a Qwen2 likewise, whose token of
position i is read at position i - 1.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..models import ModelError
from .dkv import Shift

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LLADA_BLOCK = {
    "attn_norm": "input_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "ff_norm": "post_attention_layernorm",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
}
_LLADA_OUTSIDE = {"wte": "model.embed_tokens", "ln_f": "model.norm", "ff_out": "lm_head"}


@dataclass(frozen=True)
class MaskedDiffusionLM:
    """A model for :func:`~sharewell.kv.denoise`, with the arguments that belong to it."""

    model: PreTrainedModel
    mask_id: int
    eos_id: int | None
    shift: Shift | None


def load_masked_diffusion(
    folder: Path | str, dtype: torch.dtype = torch.float32, mask_id: int | None = None
) -> MaskedDiffusionLM:
    """The model of a LLaDA or Dream folder, or of a Llama-like one whose configuration names
    ``mask_token_id`` (or is given ``mask_id``). Raises ModelError naming what is missing."""
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

    folder = Path(folder)
    try:
        raw = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder / 'config.json'}: {error}") from None
    kind = str(raw.get("model_type", "")).lower()
    mask = mask_id if mask_id is not None else raw.get("mask_token_id")
    if mask is None:
        raise ModelError(f"{folder / 'config.json'}: field 'mask_token_id' is missing; pass mask_id")
    rename: Callable[[str], str]
    if kind == "llada":
        config, rename = LlamaConfig(**_llada_fields(raw, folder)), _llada_name
    elif kind == "dream":
        known = {k: v for k, v in raw.items() if k not in ("model_type", "architectures", "auto_map")}
        config, rename = Qwen2Config(**known), str
    else:
        from transformers import AutoConfig

        config, rename = AutoConfig.from_pretrained(folder), str
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    weights = {rename(name): tensor.to(dtype) for name, tensor in _tensors(folder)}
    if config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    missing, unknown = model.load_state_dict(weights, strict=False)
    missing = [name for name in missing if not (config.tie_word_embeddings and name == "lm_head.weight")]
    if missing or unknown:
        raise ModelError(f"{folder}: weights are missing ({missing[:3]}) or unknown ({list(unknown)[:3]})")
    shift: Shift | None = "un" if kind == "dream" else None
    return MaskedDiffusionLM(model.eval(), int(mask), _first(raw.get("eos_token_id")), shift)


def _first(value: Any) -> int | None:
    if isinstance(value, list):
        value = value[0] if value else None
    return None if value is None else int(value)


def _llada_fields(raw: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    def need(name: str) -> Any:
        if raw.get(name) is None:
            raise ModelError(f"{folder / 'config.json'}: field {name!r} is missing")
        return raw[name]

    for name, wanted in (("block_type", "llama"), ("layer_norm_type", "rms"), ("activation_type", "silu")):
        if raw.get(name, wanted) != wanted:
            raise ModelError(f"{folder / 'config.json'}: {name} must be {wanted}, got {raw[name]!r}")
    return {
        "vocab_size": raw.get("embedding_size") or need("vocab_size"),
        "hidden_size": need("d_model"),
        "intermediate_size": need("mlp_hidden_size"),
        "num_hidden_layers": need("n_layers"),
        "num_attention_heads": need("n_heads"),
        "num_key_value_heads": raw.get("n_kv_heads") or need("n_heads"),
        "max_position_embeddings": need("max_sequence_length"),
        "rms_norm_eps": raw.get("rms_norm_eps", 1e-5),
        "rope_theta": raw.get("rope_theta", 10_000.0),
        "tie_word_embeddings": bool(raw.get("weight_tying", False)),
        "attention_bias": bool(raw.get("include_qkv_bias", False)),
    }


def _llada_name(name: str) -> str:
    parts = name.removeprefix("model.").removeprefix("transformer.").split(".")
    if parts[0] == "blocks" and len(parts) == 4 and parts[2] in _LLADA_BLOCK:
        return f"model.layers.{parts[1]}.{_LLADA_BLOCK[parts[2]]}.{parts[3]}"
    if parts[0] in _LLADA_OUTSIDE and len(parts) == 2:
        return f"{_LLADA_OUTSIDE[parts[0]]}.{parts[1]}"
    return name


def _tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    from safetensors import safe_open

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{folder} has no .safetensors file")
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                yield name, opened.get_tensor(name)
