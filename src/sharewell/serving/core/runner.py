"""One forward pass per step: the packed batch that the scheduler plans and the runner that computes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    import torch

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


class Runner(Protocol):
    """Computes a step. Implementations: the paged runner (real model), and a cost model in the simulator."""

    takes_adapters: bool  # False for models whose own code runs: load_adapter would raise

    def run(self, batch: StepBatch) -> torch.Tensor:
        """Logits float32 ``[R, vocab]`` of ``batch.logit_rows``; keys and values are written to the pool."""
        ...

    def load_adapter(self, slot: int, adapter: LoraAdapter) -> None:
        """Put ``adapter`` into ``slot`` (0 .. max_adapters - 1), replacing what was there."""
        ...
