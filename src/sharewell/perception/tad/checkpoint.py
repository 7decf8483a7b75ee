"""Detectors and the state of their training as safetensors files, written in one atomic replace."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .config import LiquidTADConfig
from .model import TADModel

FORMAT = "sharewell-tad-1"
MODEL_FILE = "model.safetensors"


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Path:
    """Write tensors with JSON metadata; an interrupted write leaves the old file."""
    from safetensors.torch import save_file

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(plain, str(beside), metadata={FORMAT: json.dumps(metadata)})
    with open(beside, "rb+") as file:
        os.fsync(file.fileno())
    beside.replace(path)
    return path


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The JSON metadata of a file. Raises ValueError naming the file when it is not one of ours."""
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from None
    if FORMAT not in metadata:
        raise ValueError(f"{path} is no detector: it has no metadata {FORMAT!r}")
    return json.loads(metadata[FORMAT])


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata. Raises ValueError naming the file when it is not one of ours."""
    from safetensors.torch import load_file

    metadata = read_metadata(path)
    return load_file(str(path)), metadata


def model_file(path: str | Path) -> Path:
    """``path`` itself, or the model file in the folder of a run."""
    path = Path(path)
    return path / MODEL_FILE if path.is_dir() else path


def save_checkpoint(path: str | Path, model: TADModel, *, extra: Mapping[str, Any] | None = None) -> Path:
    """Write a detector: weights, config, backbone, and ``extra`` (JSON values: the extractor and how rows lie
    in time, ``{"features": {"extractor", "stride", "num_frames", "fps"}}``). A folder takes
    ``model.safetensors``."""
    metadata = {"config": model.config.to_dict(), "backbone": model.backbone, "extra": dict(extra or {})}
    return write_tensors(model_file(path), model.state_dict(), metadata)


def load_checkpoint(path: str | Path, device: str | torch.device = "cpu") -> TADModel:
    """Read a detector from a file or the folder of a run, in evaluation mode.

    Raises FileNotFoundError, or ValueError naming the file for what is not a detector.
    """
    file = model_file(path)
    tensors, metadata = read_tensors(file)
    model = TADModel(LiquidTADConfig.from_dict(metadata["config"]), metadata["backbone"])
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{file} does not hold the weights that its config needs: {error}") from None
    return model.to(device).eval()


def checkpoint_extra(path: str | Path) -> dict[str, Any]:
    """The ``extra`` that :func:`save_checkpoint` was given."""
    return dict(read_metadata(model_file(path)).get("extra", {}))
