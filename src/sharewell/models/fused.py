"""Llama-, Qwen2/3- and Mistral-like decoders with fused, packed weights: the fast path on CPU.

Weights are float32, bfloat16, int8 or int4 (groups of 32); keys and values float32 for float32 weights and
bfloat16 otherwise. Activations, the residual stream and every sum are float32; int8 and int4 products take
activations rounded to int8 in groups of 32.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..kernels import (
    DOWN,
    EMBEDS,
    GATE_UP,
    MAX_ITEM_ROWS,
    N_LAYERS,
    OUT,
    PHASES,
    QKV,
    attention_entries,
    decoder_step,
    sync_words,
)
from .fused_weights import FusedAdapters, FusedWeights, supports
from .rope import inverse_frequencies, rope_tables
from .step_team import Team, TiledPool, Workspace

if TYPE_CHECKING:
    from .checkpoint import Checkpoint
    from .lora import LoraAdapter

# Matrices whose int8 activations carry what their rounding left out, as a second int8 term: the smaller half
# of
# the work. The engine's benchmark measures the perplexity that is left.
PRECISE_MATRICES = 1 << QKV | 1 << OUT | 1 << DOWN

__all__ = ["FusedDecoder", "TiledPool", "supports"]


class FusedDecoder:
    """A packed decoder that runs whole steps on tiled pages (:meth:`step`) on ``threads`` cores.

    ``format``: float32, bfloat16, int8 or int4 for the projections; with int4 the vocabulary's matrix is
    int8. Raises ValueError with the reason where :func:`supports` gives one.
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
        w = self._weights = FusedWeights(checkpoint, format)
        self._adapters = FusedAdapters(w, max_adapters, max_lora_rank, format)
        inverse = inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        cos, sin = (t.numpy() for t in rope_tables(inverse, self.max_length))
        self._model = (
            np.float32(config.rms_norm_eps), np.float32(config.head_dim**-0.5), w.matrices, w.norms,
            w.q_norms, w.k_norms, w.qkv_bias, w.embedding, w.head, w.final_norm, cos, sin,
        )  # fmt: skip
        self._team = Team(threads, decoder_step)
        self._space = self._workspace(64, 64)
        self._shape: tuple[TiledPool, np.ndarray] | None = None
        self._kv_rows = np.repeat(np.arange(config.n_layers, dtype=np.int64)[:, None], 2, 1)

    @property
    def nbytes(self) -> int:
        """Bytes of packed weights."""
        return self._weights.nbytes

    def load_adapter(self, slot: int, adapter: LoraAdapter | None) -> None:
        """Put ``adapter`` into ``slot``; None empties it. Raises ValueError when slot or rank is out of
        range.
        """
        self._adapters.load(slot, adapter)

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
        """One pass over T packed tokens of S sequences; writes keys and values to ``pool``.

        ``token_ids``, ``positions``, ``slots``: int64 ``[T]``; ``query_starts``: int32 ``[S + 1]``, where
        each sequence's rows begin; ``block_tables``: int32 ``[S, blocks]``; ``logit_rows``: int64 ``[R]``;
        ``adapter_slots``: int32 ``[S]``, -1 for none. Returns float32 logits ``[R, vocab]``, overwritten by
        the next step. Raises ValueError for a position or token id out of range. A row's result does not
        depend on the other rows.
        """
        rows, wanted = len(token_ids), len(logit_rows)
        self._check(token_ids, positions)
        space = self._room(rows, wanted)
        self._team.run(
            (
                self.threads, sync_words(PHASES * self.config.n_layers + 2), self._shape_for(pool),
                *self._model, pool.data, self._kv_rows, token_ids, positions, slots, query_starts,
                block_tables, self._attention_items(query_starts), _segments(query_starts, adapter_slots),
                self._adapters.rows, logit_rows,
                space.hidden[:rows], space.qkv[:rows], space.x, space.xq, space.q, space.act, space.actq,
                space.u, space.scratch, space.logits,
            )
        )  # fmt: skip
        return space.logits_tensor[:wanted, : self.config.vocab_size]

    def run_layer(
        self,
        layer: int,
        hidden: torch.Tensor,
        token_ids: np.ndarray,
        positions: np.ndarray,
        slots: np.ndarray,
        block_table: np.ndarray,
        pool: TiledPool,
        logit_rows: np.ndarray,
        *,
        source: int | None = None,
        adapter_slots: np.ndarray | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One layer for T tokens of one sequence, whose ``positions`` are ascending and may have gaps; what
        the pages hold in the gaps is read like any other key. For plans that speak between layers.

        ``hidden``: float32 ``[T, hidden]``, changed in place (layer 0 begins with the embeddings instead);
        ``block_table``: int32 ``[1, blocks]``; ``source``: another layer whose keys and values are read, and
        nothing is written then. Returns the hidden states and the logits of ``logit_rows`` (of use after the
        last layer), overwritten by the next step. The values behind the sequence's last token in its tile
        must be finite: :meth:`step` sees to that, this does not. Raises ValueError as :meth:`step` does.
        """
        rows, wanted = len(positions), len(logit_rows)
        self._check(token_ids, positions)
        space, part = self._room(rows, wanted), slice(layer, layer + 1)
        eps, scale, matrices, norms, q_norms, k_norms, qkv_bias, *ends = self._model
        shape = self._shape_for(pool).copy()
        shape[N_LAYERS], shape[EMBEDS] = 1, layer == 0
        reads = layer if source is None else source
        kv_rows = np.array([[reads, layer if reads == layer else -1]], np.int64)
        one = np.array([0, rows], np.int32)
        self._team.run(
            (
                self.threads, sync_words(PHASES + 2), shape, eps, scale, matrices[part], norms[part],
                q_norms[part], k_norms[part], qkv_bias[part], *ends, pool.data, kv_rows, token_ids, positions,
                slots, one[:1], block_table, self._attention_items(one), _segments(one, adapter_slots),
                self._adapters.rows[part], logit_rows, hidden.numpy(), space.qkv[:rows], space.x, space.xq,
                space.q, space.act, space.actq, space.u, space.scratch, space.logits,
            )
        )  # fmt: skip
        return hidden, space.logits_tensor[:wanted, : self.config.vocab_size]

    def last_queries(self, rows: int) -> torch.Tensor:
        """Copy float32 ``[rows, heads, head_dim]`` of the rotated queries of the last :meth:`run_layer`, of
        ``rows`` tokens; the softmax scale is in them already."""
        c = self.config
        shape = c.n_kv_heads, rows, c.n_heads // c.n_kv_heads, c.head_dim
        q = torch.from_numpy(self._space.q[: rows * c.n_heads * c.head_dim]).view(shape)
        return q.transpose(0, 1).reshape(rows, c.n_heads, c.head_dim).clone()

    def _check(self, token_ids: np.ndarray, positions: np.ndarray) -> None:
        if not len(token_ids):
            return
        if not 0 <= int(positions.min()) <= int(positions.max()) < self.max_length:
            worst = int(positions.min()) if int(positions.min()) < 0 else int(positions.max())
            raise ValueError(f"positions must be below max_length {self.max_length}, got {worst}")
        if not 0 <= int(token_ids.min()) <= int(token_ids.max()) < self.config.vocab_size:
            worst = int(token_ids.min()) if int(token_ids.min()) < 0 else int(token_ids.max())
            raise ValueError(f"token ids must be in [0, {self.config.vocab_size}), got {worst}")

    def _room(self, rows: int, wanted: int) -> Workspace:
        """The workspace, grown to ``rows`` tokens and ``wanted`` rows of logits."""
        space = self._space
        if rows > space.rows or wanted > space.logit_rows:
            more = max(rows, 2 * space.rows) if rows > space.rows else space.rows
            space = self._space = self._workspace(more, max(wanted, space.logit_rows))
        return space

    def close(self) -> None:
        """Stop the worker threads."""
        self._team.close()

    def _workspace(self, rows: int, logit_rows: int) -> Workspace:
        return Workspace(
            self.config,
            rows,
            logit_rows,
            qkv_width=self._weights.qkv_bias.shape[1],
            head_rows=self._weights.head_rows,
            lora_width=self._adapters.width,
            threads=self.threads,
            quantized=self.format in ("int8", "int4"),
        )

    def _shape_for(self, pool: TiledPool) -> np.ndarray:
        if self._shape is None or self._shape[0] is not pool:
            c = self.config
            half = int(self._weights.matrices[0, GATE_UP, 2]) // 2
            quantized, narrow = self.format in ("int8", "int4"), self.dtype == torch.bfloat16
            values = [
                c.n_layers, c.hidden_size, c.n_heads, c.n_kv_heads, c.head_dim, c.intermediate_size,
                pool.block_size, pool.block_bytes, pool.layer_bytes, pool.values_at, pool.address,
                c.sliding_window or 0, int(narrow), int(quantized), int(c.qk_norm), half,
                PRECISE_MATRICES if quantized else 0, *attention_entries(narrow), 1,
            ]  # fmt: skip
            self._shape = pool, np.array(values, np.int64)
        return self._shape[1]

    def _attention_items(self, query_starts: np.ndarray) -> np.ndarray:
        """Work items (first row, rows, sequence): neighbouring rows of one sequence that fit a register
        tile.
        """
        most = MAX_ITEM_ROWS // (self.config.n_heads // self.config.n_kv_heads)
        counts = np.diff(query_starts)
        if len(counts) and int(counts.min()) == int(counts.max()) == 1:
            items = np.ones((len(counts), 3), np.int64)
            items[:, 0], items[:, 2] = query_starts[:-1], np.arange(len(counts))
            return items
        starts = query_starts.tolist()
        items = [
            (start, min(most, end - start), s)
            for s, (first, end) in enumerate(pairwise(starts))
            for start in range(first, end, most)
        ]
        return np.array(items, np.int64).reshape(-1, 3)


def _segments(query_starts: np.ndarray, adapter_slots: np.ndarray | None) -> np.ndarray:
    """Runs of neighbouring rows with one adapter: int64 ``[G, 3]`` (first row, rows, slot)."""
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
