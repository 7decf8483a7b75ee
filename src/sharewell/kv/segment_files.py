"""Segments as files: safetensors with a checksum of everything in them, replaced atomically."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .segments import Segment, TensorKV

_FORMAT = "sharewell-segment-1"


class DamagedSegment(ValueError):
    """A file that is not the segment that was written; the message names it and what is wrong."""


def _checksum(tensors: dict[str, torch.Tensor], labels: dict[str, str]) -> str:
    digest = hashlib.blake2b(json.dumps(labels, sort_keys=True).encode(), digest_size=16)
    for name in sorted(tensors):
        x = tensors[name]
        digest.update(f"{name}{x.dtype}{tuple(x.shape)}".encode())
        digest.update(x.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def write_segment(folder: Path, segment: Segment) -> Path:
    """Write ``segment`` to ``folder`` under the hash of its content; returns the file."""
    every = torch.arange(len(segment))
    pairs = [segment.read(layer, every) for layer in range(segment.kv.n_layers)]
    tensors = {
        "k": torch.stack([k.cpu() for k, _ in pairs]),
        "v": torch.stack([v.cpu() for _, v in pairs]),
        "token_ids": segment.token_ids,
        "positions": segment.positions,
    }
    if segment.influence is not None:
        tensors["influence"] = segment.influence.cpu().contiguous()
    tensors |= {f"hidden.{layer}": h.cpu().contiguous() for layer, h in segment.hidden.items()}
    labels = {
        "format": _FORMAT, "model_key": segment.model_key, "scope": segment.scope, "writer": segment.writer,
    }  # fmt: skip
    checksum = _checksum(tensors, labels)
    folder.mkdir(parents=True, exist_ok=True)
    path, part = folder / f"{checksum}.safetensors", folder / f"{checksum}.{os.getpid()}.part"
    save_file(tensors, part, metadata={**labels, "checksum": checksum})
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.replace(path)
    return path


def read_segment(path: Path) -> Segment:
    """The segment of a file. Raises DamagedSegment."""
    try:
        with safe_open(path, framework="pt") as file:
            labels = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise DamagedSegment(f"{path.name} cannot be read: {error}") from None
    expected = labels.pop("checksum", "")
    if labels.get("format") != _FORMAT:
        raise DamagedSegment(f"{path.name} is not a segment: its format is {labels.get('format')!r}")
    if _checksum(tensors, labels) != expected:
        raise DamagedSegment(f"{path.name} is damaged: its checksum differs from its content")
    try:
        hidden = {int(n[7:]): x for n, x in tensors.items() if n.startswith("hidden.")}
        return Segment(
            -1, labels["model_key"], tensors["token_ids"], tensors["positions"],
            TensorKV(tensors["k"], tensors["v"]), hidden, tensors.get("influence"),
            labels["scope"], labels["writer"],
        )  # fmt: skip
    except (KeyError, ValueError) as error:
        raise DamagedSegment(f"{path.name} is not a whole segment: {error}") from None
