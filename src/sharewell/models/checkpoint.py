"""Weights by their Hugging Face names: safetensors folders, and our own lossless form of GGUF blocks."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open

from .config import ModelConfig, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT = "sharewell-1"
OWN_FILE = "weights.safetensors"


@dataclass(frozen=True)
class GroupQuantized:
    """A matrix ``[n, k]`` in groups of ``group`` columns: value = d q + m. q uint8 (with m) or int8; d, m
    ``[n, k / group]``.
    """

    q: torch.Tensor
    d: torch.Tensor
    m: torch.Tensor | None
    group: int

    def dequantize(self) -> torch.Tensor:
        """float32 ``[n, k]``, exactly d * q + m in float32."""
        n, k = self.q.shape
        values = self.q.view(n, k // self.group, self.group).float() * self.d.float()[..., None]
        if self.m is not None:
            values += self.m.float()[..., None]
        return values.view(n, k)


class Checkpoint:
    """The tensors of a model folder, read lazily. Raises ModelError for what is missing, truncated or
    corrupt.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.config = ModelConfig.from_folder(self.folder)
        self._files: dict[str, Path] = {}
        own = self.folder / OWN_FILE
        paths = [own] if own.exists() else sorted(self.folder.glob("*.safetensors"))
        if not paths:
            raise ModelError(f"{self.folder} holds no *.safetensors weights")
        self._index(paths)

    def _index(self, paths: list[Path]) -> None:
        digest = hashlib.blake2b((self.folder / "config.json").read_bytes(), digest_size=8)
        for path in paths:
            try:
                with safe_open(path, framework="pt") as file:
                    names = list(file.keys())
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{path} cannot be read (truncated or corrupt): {error}") from None
            for name in names:
                self._files[name] = path
            with path.open("rb") as raw:
                digest.update(str(path.stat().st_size).encode() + raw.read(1 << 16))
        self.revision = digest.hexdigest()

    def names(self) -> list[str]:
        """Names of all tensors, quantised ones once."""
        return sorted({n.removesuffix(".q").removesuffix(".d").removesuffix(".m") for n in self._files})

    def _read(self, name: str) -> torch.Tensor:
        path = self._files.get(name)
        if path is None:
            raise ModelError(f"{self.folder} has no tensor {name!r}")
        try:
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"tensor {name!r} in {path} cannot be read: {error}") from None

    def tensor(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """The tensor in ``dtype``; quantised ones are dequantised in float32 first."""
        stored = self.quantized(name)
        return (stored.dequantize() if stored is not None else self._read(name)).to(dtype)

    def quantized(self, name: str) -> GroupQuantized | None:
        """The stored integers of ``name``, or None when it is stored in floating point."""
        if name + ".q" not in self._files:
            return None
        q, d = self._read(name + ".q"), self._read(name + ".d")
        if name + ".m" not in self._files:
            return GroupQuantized(q, d, None, q.shape[1] // d.shape[1])
        low, high = q & 15, q >> 4
        q = torch.stack([low, high], -1).view(q.shape[0], -1)
        return GroupQuantized(q, d, self._read(name + ".m"), q.shape[1] // d.shape[1])

    @property
    def stored_bits(self) -> int:
        """4 for checkpoints whose projections are stored in 4 bits, 16 otherwise."""
        return 4 if "model.layers.0.mlp.down_proj.weight.m" in self._files else 16


def load_transformers(folder: Path | str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The stock transformers model with the weights of ``folder`` (either form): the oracle and the
    fallback.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = Path(folder)
    if not (folder / OWN_FILE).exists():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()
    checkpoint = Checkpoint(folder)
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    state = {name: checkpoint.tensor(name, dtype) for name in checkpoint.names()}
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    _materialize_buffers(model, config)
    return model.eval()


def _materialize_buffers(model: PreTrainedModel, config: object) -> None:
    """Rotary frequencies are computed, not stored: build them anew where the meta device left them empty."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if any(b.is_meta for b in child.buffers(recurse=False)):
                setattr(module, name, type(child)(config=config))  # pyright: ignore[reportCallIssue]


def export_hf(folder: Path | str, out: Path | str, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write ``folder`` as a plain Hugging Face folder (config, tokenizer, one safetensors file) to
    ``out``.
    """
    import shutil

    from safetensors.torch import save_file

    checkpoint, out = Checkpoint(folder), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    for path in checkpoint.folder.glob("*.json"):
        if not path.name.endswith(".index.json"):
            shutil.copy(path, out / path.name)
    raw = json.loads((out / "config.json").read_text())
    raw["dtype"] = str(dtype).removeprefix("torch.")
    (out / "config.json").write_text(json.dumps(raw, indent=2))
    state = {name: checkpoint.tensor(name, dtype).contiguous() for name in checkpoint.names()}
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    return out
