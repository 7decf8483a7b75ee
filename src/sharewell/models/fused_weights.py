"""The weights of a Llama-like checkpoint, packed for the compiled step.

Query, key and value projections become one matrix, gate and up another.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from .. import kernels
from ..kernels import (
    GATE_UP,
    MAX_ITEM_ROWS,
    QKV,
    PackedMatrix,
    pack_dense,
    pack_int4,
    pack_int8,
    quantize_int4,
    quantize_int8,
)
from .config import ModelError

if TYPE_CHECKING:
    from .checkpoint import Checkpoint
    from .config import ModelConfig
    from .lora import LoraAdapter

PARTS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def _name(layer: int, part: str) -> str:
    return f"model.layers.{layer}.{'self_attn' if part in _ATTENTION else 'mlp'}.{part}"


def supports(config: ModelConfig, format: str) -> str | None:
    """None when the fused decoder can run ``config`` with weights in ``format``, else the reason why not."""
    if not config.fusable:
        return config.not_fusable
    if format in ("int8", "int4") and not kernels.available():
        return "this CPU has no AVX512-VNNI"
    for name, multiple in (("hidden_size", 64), ("intermediate_size", 32), ("head_dim", 16)):
        if getattr(config, name) % multiple:
            return f"{name} {getattr(config, name)} is not a multiple of {multiple}"
    if format in ("int8", "int4") and config.head_dim % 32:
        return f"head_dim {config.head_dim} is not a multiple of 32"
    if config.n_heads // config.n_kv_heads > MAX_ITEM_ROWS:
        return f"more than {MAX_ITEM_ROWS} query heads share a key head"
    return None


def _checked(tensor: torch.Tensor, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    if tuple(tensor.shape) != shape:
        raise ModelError(f"tensor {name!r} must have shape {shape}, got {tuple(tensor.shape)}")
    return tensor


def _pack(
    checkpoint: Checkpoint, shapes: dict[str, tuple[int, int]], format: str, pad_each: bool = False
) -> PackedMatrix:
    """Pack the matrices named in ``shapes`` in one; ``pad_each`` pads each to whole work items first."""

    def stacked(tensors: list[torch.Tensor]) -> torch.Tensor:
        if pad_each:
            tensors = [torch.nn.functional.pad(t, (0, 0, 0, -t.shape[0] % kernels.PAD)) for t in tensors]
        return torch.cat(tensors) if len(tensors) > 1 else tensors[0]

    def read(dtype: torch.dtype) -> list[torch.Tensor]:
        return [_checked(checkpoint.tensor(name, dtype), name, shape) for name, shape in shapes.items()]

    if format == "float32" or format == "bfloat16":
        return pack_dense(stacked(read(torch.float32 if format == "float32" else torch.bfloat16)), format)
    stored = [
        s for name in shapes if (s := checkpoint.quantized(name)) is not None and s.group == kernels.GROUP
    ]
    if len(stored) == len(shapes):
        for (name, shape), part in zip(shapes.items(), stored, strict=True):
            _checked(part.q, name, shape)
        minima = [s.m for s in stored if s.m is not None]
        if format == "int4" and len(minima) == len(stored):
            return pack_int4(stacked([s.q for s in stored]), stacked([s.d for s in stored]), stacked(minima))
        if format == "int8" and not minima:
            return pack_int8(stacked([s.q for s in stored]), stacked([s.d for s in stored]))
    parts = read(torch.float32)
    if format == "int8":
        q, d = zip(*map(quantize_int8, parts), strict=True)
        return pack_int8(stacked(list(q)), stacked(list(d)))
    q, d, m = zip(*map(quantize_int4, parts), strict=True)
    return pack_int4(stacked(list(q)), stacked(list(d)), stacked(list(m)))


class FusedWeights:
    """Packed matrices and plain vectors of all layers, as arrays that the compiled step reads by address.

    ``format``: float32, bfloat16, int8 or int4 for the projections. With int4 the vocabulary's matrix is
    int8, since its error would reach the logits directly. Raises ModelError for a missing or unreadable
    tensor.
    """

    def __init__(self, checkpoint: Checkpoint, format: str) -> None:
        config = self.config = checkpoint.config
        n = config.n_layers
        sizes = config.projection_shapes()
        self._packed = [
            [
                _pack(
                    checkpoint,
                    {_name(i, p) + ".weight": sizes[p] for p in parts},
                    format,
                    pad_each=j == GATE_UP,
                )
                for j, parts in enumerate(PARTS)
            ]
            for i in range(n)
        ]
        embeddings, vocabulary = "model.embed_tokens.weight", (config.vocab_size, config.hidden_size)
        top = embeddings if config.tie_word_embeddings else "lm_head.weight"
        self._head = _pack(checkpoint, {top: vocabulary}, "int8" if format == "int4" else format)
        self._embedding = self._head
        if not config.tie_word_embeddings:
            plain = "float32" if format == "float32" else "bfloat16"
            self._embedding = _pack(checkpoint, {embeddings: vocabulary}, plain)
        self.matrices = np.array([[m.row() for m in layer] for layer in self._packed], np.int64)
        self.head = np.array(self._head.row(), np.int64)
        self.embedding = np.array(self._embedding.row(), np.int64)

        def vector(name: str, size: int) -> np.ndarray:
            return _checked(checkpoint.tensor(name, torch.float32), name, (size,)).numpy()

        def vectors(name: str, size: int) -> np.ndarray:
            return np.stack([vector(f"model.layers.{i}.{name}", size) for i in range(n)])

        hidden, dim = config.hidden_size, config.head_dim
        parts = ("input_layernorm", "post_attention_layernorm")
        self.norms = np.stack([vectors(f"{part}.weight", hidden) for part in parts], 1)
        self.final_norm = vector("model.norm.weight", hidden)
        self.q_norms = self.k_norms = np.ones((n, 1), np.float32)
        if config.qk_norm:
            self.q_norms, self.k_norms = (
                vectors(f"self_attn.{part}.weight", dim) for part in ("q_norm", "k_norm")
            )
        self.qkv_bias = np.zeros((n, self._packed[0][QKV].n_padded), np.float32)
        if config.attention_bias:
            joined = np.concatenate([vectors(f"self_attn.{p}.bias", sizes[p][0]) for p in PARTS[QKV]], 1)
            self.qkv_bias[:, : joined.shape[1]] = joined

    @property
    def nbytes(self) -> int:
        """Bytes of packed matrices."""
        matrices = [m for layer in self._packed for m in layer] + [self._head]
        if self._embedding is not self._head:
            matrices.append(self._embedding)
        return sum(m.nbytes for m in matrices)

    @property
    def head_rows(self) -> int:
        """Rows of the vocabulary's matrix, padding included."""
        return self._head.n_padded

    def part_rows(self, matrix: int) -> tuple[int, ...]:
        """Rows of the parts of a fused matrix, the padding of gate and up included."""
        c = self.config
        if matrix == QKV:
            return c.n_heads * c.head_dim, c.kv_width, c.kv_width
        if matrix == GATE_UP:
            return (int(self.matrices[0, matrix, 2]) // 2,) * 2
        return (c.hidden_size,)


class FusedAdapters:
    """LoRA adapters in ``slots`` slots, packed beside a :class:`FusedWeights`; ``rows`` is what the step
    reads.
    """

    def __init__(self, weights: FusedWeights, slots: int, max_rank: int, format: str) -> None:
        self._weights, self._max_rank = weights, max_rank
        self._format = format
        self._kept: dict[int, list[PackedMatrix]] = {}
        self._slots = slots
        self.rows = np.zeros((weights.config.n_layers, len(PARTS), max(1, slots), 6), np.int64)
        # Query, key and value side by side are the most inner columns that one fused matrix needs.
        self.width = -(-3 * max_rank // kernels.PAD) * kernels.PAD if slots else 1

    def load(self, slot: int, adapter: LoraAdapter | None) -> None:
        """Put ``adapter`` into ``slot``; None empties it. Raises ValueError when slot or rank is out of
        range.
        """
        if not 0 <= slot < self._slots:
            raise ValueError(f"slot must be in [0, {self._slots}), got {slot}")
        if adapter is not None and adapter.rank > self._max_rank:
            raise ValueError(
                f"rank of adapter {adapter.name!r} must be at most {self._max_rank}, got {adapter.rank}"
            )
        self.rows[:, :, slot] = 0
        self._kept.pop(slot, None)
        if adapter is None:
            return
        kept = self._kept[slot] = []
        for layer in range(len(self.rows)):
            for j in range(len(PARTS)):
                pair = self._fused_pair(adapter, layer, j)
                if pair is None:
                    continue
                a, b = (pack_dense(t, "float32" if self._format == "float32" else "bfloat16") for t in pair)
                kept += [a, b]
                self.rows[layer, j, slot] = [
                    a.data.data_ptr(), b.data.data_ptr(), b.k, a.n_padded, a.k, a.row()[4],
                ]  # fmt: skip

    def _fused_pair(
        self, adapter: LoraAdapter, layer: int, matrix: int
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """A stacked and B block-diagonal (times the adapter's scale) for the fused matrix; None if
        untouched.
        """
        parts, sizes = PARTS[matrix], self._weights.part_rows(matrix)
        present = [p for p in parts if (layer, p) in adapter.targets]
        if not present:
            return None
        a_all = torch.cat([adapter.targets[layer, p][0].float() for p in present])
        columns = -(-len(a_all) // 16) * 16
        b_all = torch.zeros(sum(sizes), columns)
        row = column = 0
        for part, size in zip(parts, sizes, strict=True):
            if part in present:
                b = adapter.targets[layer, part][1].float()
                b_all[row : row + b.shape[0], column : column + b.shape[1]] = b * adapter.scale
                column += b.shape[1]
            row += size
        return torch.nn.functional.pad(a_all, (0, 0, 0, columns - len(a_all))), b_all
