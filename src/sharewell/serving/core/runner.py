"""One forward pass per step: the packed batch that the scheduler plans and the runner that computes it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    import torch

    from ...kv import KVPlan, PlanStats
    from ...models import LoraAdapter


@dataclass
class StepBatch:
    """All tokens of one step, packed along one axis without padding.

    S sequences, T tokens in all, R rows of logits wanted. A sequence's new tokens are
    ``token_ids[query_starts[s]:query_starts[s+1]]``; their keys and values go to ``slots`` and they attend to
    ``context_lens[s]`` tokens (new ones included) through ``block_tables[s]``.
    """

    token_ids: np.ndarray  # int64 [T]
    positions: np.ndarray  # int64 [T]
    slots: np.ndarray  # int64 [T], block * block_size + offset
    query_starts: np.ndarray  # int32 [S + 1]
    context_lens: np.ndarray  # int32 [S]
    block_tables: np.ndarray  # int32 [S, max blocks], unused entries 0
    logit_rows: np.ndarray  # int64 [R], indices into the T tokens, ascending
    adapter_slots: np.ndarray  # int32 [S], -1 for the base model
    copies: list[tuple[int, int]]  # (source block, destination block) to copy before the pass (copy on write)
    plans: dict[int, KVPlan] = field(default_factory=dict)  # of sequences whose tokens follow one
    plan_stats: dict[int, PlanStats] = field(default_factory=dict)  # filled by the runner

    def only(self, s: int) -> StepBatch:
        """The part of sequence ``s``, without copies and plans."""
        return self._part(np.array([s]))

    def without_plans(self) -> StepBatch:
        """The part of the sequences that follow none."""
        return self._part(np.array([s for s in range(len(self.context_lens)) if s not in self.plans]))

    def rows_of(self, s: int) -> np.ndarray:
        """Which of ``logit_rows`` are of sequence ``s``: indices."""
        first, end = self.query_starts[s : s + 2]
        return np.flatnonzero((self.logit_rows >= first) & (self.logit_rows < end))

    def _part(self, chosen: np.ndarray) -> StepBatch:
        chosen = chosen.astype(np.int64)
        counts = np.diff(self.query_starts)
        mine = np.isin(np.repeat(np.arange(len(counts)), counts), chosen)
        where = np.cumsum(mine) - 1
        kept = self.logit_rows[mine[self.logit_rows]]
        return StepBatch(
            token_ids=self.token_ids[mine],
            positions=self.positions[mine],
            slots=self.slots[mine],
            query_starts=np.concatenate([[0], np.cumsum(counts[chosen])]).astype(np.int32),
            context_lens=self.context_lens[chosen],
            block_tables=np.ascontiguousarray(self.block_tables[chosen]),
            logit_rows=where[kept],
            adapter_slots=self.adapter_slots[chosen],
            copies=[],
        )


class Runner(Protocol):
    """Computes a step. Implementations: the paged runner (real model), and a cost model in the simulator."""

    takes_adapters: bool  # False for models whose own code runs: load_adapter would raise

    def run(self, batch: StepBatch) -> torch.Tensor:
        """Logits float32 ``[R, vocab]`` of ``batch.logit_rows``; keys and values are written to the pool."""
        ...

    def load_adapter(self, slot: int, adapter: LoraAdapter) -> None:
        """Put ``adapter`` into ``slot`` (0 .. max_adapters - 1), replacing what was there."""
        ...
