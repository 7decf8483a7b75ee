"""LoRA adapters in the peft folder format, read safely and checked against the model they are for."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from .config import ModelConfig

_KEY = re.compile(r"layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)\.lora_(A|B)(?:\.\w+)?\.weight$")


class AdapterError(ValueError):
    """An adapter that cannot be used; the message names the file or tensor and what is wrong."""


@dataclass(frozen=True)
class LoraAdapter:
    """Low-rank updates W + scale B A (arXiv 2106.09685): ``targets[layer, projection] = (A [rank, in], B
    [out, rank])``.
    """

    name: str
    rank: int
    scale: float
    targets: dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]] = field(repr=False)


def load_peft_adapter(folder: Path | str, config: ModelConfig, name: str | None = None) -> LoraAdapter:
    """Read ``adapter_config.json`` and ``adapter_model.safetensors``. Raises AdapterError; nothing is ever
    unpickled.
    """
    folder = Path(folder)
    try:
        settings = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(f"{folder / 'adapter_config.json'} cannot be read: {error}") from None
    if settings.get("peft_type", "LORA") != "LORA":
        raise AdapterError(f"{folder}: peft_type must be LORA, got {settings.get('peft_type')!r}")
    for option in ("use_dora", "alora_invocation_tokens", "modules_to_save", "rank_pattern", "alpha_pattern"):
        if settings.get(option):
            raise AdapterError(f"{folder}: {option} is not supported, got {settings[option]!r}")
    if settings.get("bias", "none") != "none":
        raise AdapterError(f"{folder}: bias must be 'none', got {settings['bias']!r}")
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise AdapterError(
            f"{folder}: r must be a positive integer and lora_alpha a number, got {rank!r} and {alpha!r}"
        )
    path = folder / "adapter_model.safetensors"
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path} cannot be read (only safetensors is accepted): {error}") from None

    found: dict[tuple[int, str], dict[str, torch.Tensor]] = {}
    shapes = config.projection_shapes()
    for key, tensor in tensors.items():
        match = _KEY.search(key)
        if match is None or match[2] not in shapes:
            raise AdapterError(f"{path}: tensor {key!r} is not a LoRA matrix of a projection of this model")
        layer, projection, side = int(match[1]), match[2], match[3]
        out, into = shapes[projection]
        expected = (rank, into) if side == "A" else (out, rank)
        if layer >= config.n_layers:
            raise AdapterError(
                f"{path}: tensor {key!r} is for layer {layer}, the model has {config.n_layers}"
            )
        if tuple(tensor.shape) != expected:
            raise AdapterError(
                f"{path}: tensor {key!r} must have shape {expected}, got {tuple(tensor.shape)}"
            )
        if not torch.isfinite(tensor).all():
            raise AdapterError(f"{path}: tensor {key!r} holds NaN or infinite values")
        found.setdefault((layer, projection), {})[side] = tensor.float()
    if not found:
        raise AdapterError(f"{path} holds no LoRA matrices")
    lonely = next((k for k, pair in found.items() if len(pair) != 2), None)
    if lonely:
        raise AdapterError(f"{path}: layer {lonely[0]} {lonely[1]} has only one of A and B")
    scale = alpha / rank**0.5 if settings.get("use_rslora") else alpha / rank
    return LoraAdapter(name or folder.name, rank, scale, {k: (p["A"], p["B"]) for k, p in found.items()})
