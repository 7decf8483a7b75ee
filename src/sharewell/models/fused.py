"""Llama-, Qwen2/3- and Mistral-like decoders with fused, packed weights: the fast path on CPU.

Query, key and value projections are one matrix, gate and up another, packed for the compiled step of
:mod:`sharewell.kernels`. Weights are float32, bfloat16, int8 or int4 (groups of 32); activations are float32 for
float32 weights and bfloat16 otherwise, the residual stream and every sum float32.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np
import torch

from .. import kernels
from ..kernels import PackedMatrix, pack_dense, pack_int4, pack_int8, quantize_int4, quantize_int8
from ..kernels import step as compiled
from .rope import inverse_frequencies, rope_tables

if TYPE_CHECKING:
    from .checkpoint import Checkpoint
    from .config import ModelConfig
    from .lora import LoraAdapter

PARTS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
_PREFIX = {**dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), "self_attn")}


def _name(layer: int, part: str) -> str:
    return f"model.layers.{layer}.{_PREFIX.get(part, 'mlp')}.{part}"


def supports(config: ModelConfig, format: str) -> str | None:
    """None when the fused decoder can run ``config`` with weights in ``format``, else the reason why not."""
    if not config.fusable:
        return f"architecture {config.architecture} is not Llama-, Qwen2/3- or Mistral-like"
    if format != "float32" and not kernels.available():
        return "this CPU has no AVX512-BF16"
    for name, multiple in (("hidden_size", 64), ("intermediate_size", 32), ("head_dim", 16)):
        if getattr(config, name) % multiple:
            return f"{name} {getattr(config, name)} is not a multiple of {multiple}"
    if format in ("int8", "int4") and config.head_dim % 32:
        return f"head_dim {config.head_dim} is not a multiple of 32"
    if config.n_heads // config.n_kv_heads > compiled.MAX_ITEM_ROWS:
        return f"more than {compiled.MAX_ITEM_ROWS} query heads share a key head"
    return None


def _pack(checkpoint: Checkpoint, names: list[str], format: str, pad_each: bool = False) -> PackedMatrix:
    """Pack the matrices ``names`` one below the other; ``pad_each`` pads each to whole work items first."""

    def stacked(tensors: list[torch.Tensor]) -> torch.Tensor:
        if pad_each:
            tensors = [torch.nn.functional.pad(t, (0, 0, 0, -t.shape[0] % kernels.PAD)) for t in tensors]
        return torch.cat(tensors) if len(tensors) > 1 else tensors[0]

    if format in ("float32", "bfloat16"):
        dtype = getattr(torch, format)
        return pack_dense(stacked([checkpoint.tensor(n, dtype) for n in names]), format)  # pyright: ignore[reportArgumentType]
    stored = [checkpoint.quantized(n) for n in names]
    if all(s is not None and s.group == kernels.GROUP for s in stored):
        if format == "int4" and all(s.m is not None for s in stored):  # pyright: ignore[reportOptionalMemberAccess]
            return pack_int4(*(stacked([getattr(s, f) for s in stored]) for f in ("q", "d", "m")))
        if format == "int8" and all(s.m is None for s in stored):  # pyright: ignore[reportOptionalMemberAccess]
            return pack_int8(*(stacked([getattr(s, f) for s in stored]) for f in ("q", "d")))
    parts = [checkpoint.tensor(n, torch.float32) for n in names]
    if format == "int8":
        return pack_int8(*(stacked(list(t)) for t in zip(*map(quantize_int8, parts), strict=True)))
    return pack_int4(*(stacked(list(t)) for t in zip(*map(quantize_int4, parts), strict=True)))


class FusedDecoder:
    """A packed decoder that runs whole steps on tiled pages (:meth:`step`) on ``threads`` cores.

    ``format``: float32, bfloat16, int8 or int4 for the projections; with int4 the vocabulary's matrix is int8,
    whose error would otherwise reach the logits directly. Raises ValueError with the reason where
    :func:`supports` gives one.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        format: str = "bfloat16",
        *,
        max_length: int | None = None,
        threads: int = 1,
        max_adapters: int = 0,
        max_lora_rank: int = 64,
    ) -> None:
        config = self.config = checkpoint.config
        reason = supports(config, format)
        if reason:
            raise ValueError(f"the fused decoder cannot run this model: {reason}")
        self.format = format
        self.dtype = torch.float32 if format == "float32" else torch.bfloat16
        self.device = torch.device("cpu")
        self.threads = threads
        self.max_length = max_length or config.context_length
        n, hidden = config.n_layers, config.hidden_size
        self._bf16 = format != "float32"

        self._packed = [
            [_pack(checkpoint, [_name(i, p) + ".weight" for p in part], format, pad_each=j == compiled.GATE_UP) for j, part in enumerate(PARTS)]
            for i in range(n)
        ]
        top = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
        self._head = _pack(checkpoint, [top], "int8" if format == "int4" else format)
        self._embedding = (
            self._head
            if config.tie_word_embeddings
            else _pack(checkpoint, ["model.embed_tokens.weight"], "float32" if format == "float32" else "bfloat16")
        )

        def vector(name: str) -> torch.Tensor:
            return checkpoint.tensor(name, torch.float32)

        self._norms = torch.stack(
            [
                torch.stack([vector(f"model.layers.{i}.{part}.weight") for part in ("input_layernorm", "post_attention_layernorm")])
                for i in range(n)
            ]
        ).numpy()
        self._final_norm = vector("model.norm.weight").numpy()
        if config.qk_norm:
            self._q_norms, self._k_norms = (
                torch.stack([vector(f"model.layers.{i}.self_attn.{part}.weight") for i in range(n)]).numpy() for part in ("q_norm", "k_norm")
            )
        else:
            self._q_norms = self._k_norms = np.ones((n, 1), np.float32)
        width = self._packed[0][compiled.QKV].n_padded
        self._bias = np.zeros((n, width), np.float32)
        if config.attention_bias:
            for i in range(n):
                parts = [vector(_name(i, p) + ".bias") for p in PARTS[compiled.QKV]]
                joined = torch.cat(parts).numpy()
                self._bias[i, : joined.size] = joined
        inverse = inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        self._cos, self._sin = (t.numpy() for t in rope_tables(inverse, self.max_length))
        self._matrices = np.array([[m.row() for m in layer] for layer in self._packed], np.int64)
        self._head_row = np.array(self._head.row(), np.int64)
        self._scale = np.float32(config.head_dim**-0.5)
        self._eps = np.float32(config.rms_norm_eps)
        self._hidden = hidden
        self._max_lora_rank = max_lora_rank
        self._lora = np.zeros((n, 4, max(1, max_adapters), 5), np.int64)
        self._lora_weights: dict[int, list[PackedMatrix]] = {}
        self._team = _Team(threads)
        self._workspace = _Workspace(self, 64)

    @property
    def nbytes(self) -> int:
        """Bytes of packed weights."""
        return sum(m.nbytes for layer in self._packed for m in layer) + self._head.nbytes

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Rows of the embedding, float32 ``[T, hidden]``, read out of the packed matrix."""
        return self._embedding.rows(token_ids.long())

    def load_adapter(self, slot: int, adapter: LoraAdapter | None) -> None:
        """Put ``adapter`` into ``slot``; None empties it. Raises ValueError when slot or rank is out of range."""
        if not 0 <= slot < self._lora.shape[2]:
            raise ValueError(f"slot must be in [0, {self._lora.shape[2]}), got {slot}")
        self._lora[:, :, slot] = 0
        self._lora_weights.pop(slot, None)
        if adapter is None:
            return
        if adapter.rank > self._max_lora_rank:
            raise ValueError(f"rank of adapter {adapter.name!r} must be at most {self._max_lora_rank}, got {adapter.rank}")
        format = "bfloat16" if self._bf16 else "float32"
        kept = self._lora_weights[slot] = []
        for layer in range(self.config.n_layers):
            for j, parts in enumerate(PARTS):
                pair = self._lora_pair(adapter, layer, j, parts)
                if pair is None:
                    continue
                a, b = (pack_dense(t, format) for t in pair)
                kept += [a, b]
                self._lora[layer, j, slot] = [a.data.data_ptr(), b.data.data_ptr(), b.k, a.n_padded, a.k]

    def _lora_pair(self, adapter: LoraAdapter, layer: int, matrix: int, parts: tuple[str, ...]) -> tuple[torch.Tensor, torch.Tensor] | None:
        """A stacked and B block-diagonal (times the adapter's scale) for the fused matrix, or None if untouched."""
        present = [p for p in parts if (layer, p) in adapter.targets]
        if not present:
            return None
        sizes = self._part_rows(matrix)
        rank = sum(adapter.targets[layer, p][0].shape[0] for p in present)
        columns = -(-rank // 16) * 16
        a_all = torch.cat([adapter.targets[layer, p][0].float() for p in present])
        b_all = torch.zeros(sum(sizes), columns)
        row = column = 0
        for part, size in zip(parts, sizes, strict=True):
            if part in present:
                b = adapter.targets[layer, part][1].float()
                b_all[row : row + b.shape[0], column : column + b.shape[1]] = b * adapter.scale
                column += b.shape[1]
            row += size
        return torch.nn.functional.pad(a_all, (0, 0, 0, columns - rank)), b_all

    def _part_rows(self, matrix: int) -> tuple[int, ...]:
        c = self.config
        if matrix == compiled.QKV:
            return c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim, c.n_kv_heads * c.head_dim
        if matrix == compiled.GATE_UP:
            return (self._matrices[0, matrix, 2] // 2,) * 2
        return (c.hidden_size,)

    def lora_width(self) -> int:
        """Most inner columns (padded) that any fused matrix needs for one adapter."""
        return -(-3 * self._max_lora_rank // kernels.PAD) * kernels.PAD

    def step(
        self,
        token_ids: np.ndarray,
        positions: np.ndarray,
        slots: np.ndarray,
        query_starts: np.ndarray,
        block_tables: np.ndarray,
        logit_rows: np.ndarray,
        pool: TiledPool,
        adapter_slots: np.ndarray | None = None,
    ) -> torch.Tensor:
        """One pass over T packed tokens of S sequences (shapes as in ``StepBatch``); writes keys and values to ``pool``.

        Returns float32 logits ``[R, vocab]`` of ``logit_rows``; they are overwritten by the next step. Raises
        ValueError for a position beyond ``max_length``. A row's result does not depend on the other rows.
        """
        rows = len(token_ids)
        if rows and int(positions.max()) >= self.max_length:
            raise ValueError(f"positions must be below max_length {self.max_length}, got {int(positions.max())}")
        space = self._workspace
        if rows > space.rows or len(logit_rows) > space.logits.shape[0]:
            space = self._workspace = _Workspace(self, max(rows, 2 * space.rows), max(len(logit_rows), space.logits.shape[0]))
        space.hidden_tensor[:rows] = self.embed(torch.from_numpy(token_ids))
        items = self._attention_items(query_starts)
        segments = _segments(query_starts, adapter_slots)
        c = self.config
        shape = np.array(
            [
                c.n_layers, self._hidden, c.n_heads, c.n_kv_heads, c.head_dim, c.intermediate_size, pool.block_size,
                pool.block_bytes, pool.layer_bytes, pool.values_at, pool.address, c.sliding_window or 0, int(self._bf16),
                int(c.qk_norm), self._matrices[0, compiled.GATE_UP, 2] // 2, rows, 0,
            ],
            np.int64,
        )  # fmt: skip
        space.sync[:] = 0
        arguments = (
            self.threads, space.sync, shape, self._eps, self._scale, self._matrices, self._norms, self._q_norms, self._k_norms,
            self._bias, self._head_row, self._final_norm, self._cos, self._sin, pool.data, positions, slots, query_starts, block_tables,
            items, segments, self._lora, logit_rows, space.every_row, space.hidden[:rows], space.qkv[:rows],
            space.x[:rows], space.xf[:rows], space.xs[:rows], space.q, space.qf, space.u, space.uf, space.scratch,
            space.logits,
        )  # fmt: skip
        self._team.run(arguments)
        return space.logits_tensor[: len(logit_rows), : c.vocab_size]

    def _attention_items(self, query_starts: np.ndarray) -> np.ndarray:
        """Work items (first row, rows, sequence): neighbouring rows of one sequence that fit a register tile."""
        most = compiled.MAX_ITEM_ROWS // (self.config.n_heads // self.config.n_kv_heads)
        counts = np.diff(query_starts)
        if len(counts) and int(counts.max(initial=0)) == 1 and int(counts.min()) == 1:
            n = len(counts)
            return np.stack([query_starts[:-1].astype(np.int64), np.ones(n, np.int64), np.arange(n)], 1)
        items = [
            (start, min(most, end - start), s)
            for s, (first, end) in enumerate(zip(query_starts[:-1].tolist(), query_starts[1:].tolist(), strict=True))
            for start in range(first, end, most)
        ]
        return np.array(items, np.int64).reshape(-1, 3)

    def close(self) -> None:
        """Stop the worker threads."""
        self._team.close()


class TiledPool:
    """Pages in the layout that the compiled step reads, over memory that somebody else owns.

    ``data``: uint8, flat; a block is ``[layers, planes k v, kv heads, block_size / 16 tiles]``, tiles as
    :mod:`sharewell.kernels.step` describes.
    """

    def __init__(self, data: np.ndarray, block_size: int, block_bytes: int, layer_bytes: int, values_at: int) -> None:
        if block_size % 16:
            raise ValueError(f"block_size must be a multiple of 16 for tiled pages, got {block_size}")
        self.data = data
        self.block_size, self.block_bytes, self.layer_bytes, self.values_at = block_size, block_bytes, layer_bytes, values_at
        self.address = data.ctypes.data


def _segments(query_starts: np.ndarray, adapter_slots: np.ndarray | None) -> np.ndarray:
    if adapter_slots is None or not len(adapter_slots) or int(adapter_slots.max()) < 0:
        return np.zeros((0, 3), np.int64)
    runs: list[list[int]] = []
    for s, slot in enumerate(adapter_slots.tolist()):
        start, end = int(query_starts[s]), int(query_starts[s + 1])
        if slot < 0:
            continue
        if runs and runs[-1][2] == slot and runs[-1][0] + runs[-1][1] == start:
            runs[-1][1] += end - start
        else:
            runs.append([start, end - start, slot])
    return np.array(runs, np.int64).reshape(-1, 3)


class _Workspace:
    """Every buffer of a step for up to ``rows`` tokens, allocated once."""

    def __init__(self, decoder: FusedDecoder, rows: int, logit_rows: int = 64) -> None:
        c = decoder.config
        attention = c.n_heads * c.head_dim
        widest = max(c.hidden_size, attention)
        self.rows = rows
        self.hidden_tensor = torch.zeros(rows, c.hidden_size)
        self.hidden = self.hidden_tensor.numpy()
        self.qkv = torch.zeros(rows, max(decoder._bias.shape[1], c.intermediate_size // 32)).numpy()
        self.x = torch.zeros(rows, widest if decoder._bf16 else 1, dtype=torch.int16).numpy().view(np.uint16)
        self.xf = torch.zeros(rows, widest).numpy()
        self.xs = torch.zeros(rows, max(1, widest // 32)).numpy()
        flat = rows * max(c.intermediate_size, attention)
        self.q = torch.zeros(flat if decoder._bf16 else 1, dtype=torch.int16).numpy().view(np.uint16)
        self.qf = torch.zeros(1 if decoder._bf16 else flat).numpy()
        lora = decoder.lora_width() if decoder._lora.shape[2] else 1
        self.uf = torch.zeros(rows, lora).numpy()
        self.u = torch.zeros(rows, lora, dtype=torch.int16).numpy().view(np.uint16)
        most = compiled.MAX_ITEM_ROWS
        scratch = most * (compiled.CHUNK * 16 * 3 // 2 + c.head_dim + 2) + c.head_dim + rows * 128
        self.scratch = torch.zeros(decoder.threads, scratch).numpy()
        self.logits_tensor = torch.zeros(logit_rows, decoder._head.n_padded)
        self.logits = self.logits_tensor.numpy()
        self.every_row = np.arange(rows)
        self.sync = np.zeros(8 + 5 * c.n_layers + 2, np.int64)


class _Team:
    """The threads that run one compiled step together: the caller and ``threads - 1`` workers that sleep between steps."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._arguments: tuple | None = None
        self._start = [threading.Semaphore(0) for _ in range(threads - 1)]
        self._done = threading.Semaphore(0)
        self._failure: BaseException | None = None
        for i in range(threads - 1):
            threading.Thread(target=self._work, args=(i,), name=f"sharewell-step-{i + 1}", daemon=True).start()

    def _work(self, i: int) -> None:
        while True:
            self._start[i].acquire()
            if self._arguments is None:
                return
            try:
                compiled.decoder_step(i + 1, *self._arguments)
            except BaseException as failure:  # handed to the caller, which raises it
                self._failure = failure
            self._done.release()

    def run(self, arguments: tuple) -> None:
        self._arguments = arguments
        for start in self._start:
            start.release()
        compiled.decoder_step(0, *arguments)
        for _ in self._start:
            self._done.acquire()
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def close(self) -> None:
        self._arguments = None
        for start in self._start:
            start.release()
        self._start = []
