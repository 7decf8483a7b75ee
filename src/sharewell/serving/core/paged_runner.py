"""The real model behind the engine: picks weights, decoder and pages for a configuration and runs packed
steps."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ...kv import PagedForward, PlanError, UnsupportedModel
from ...models import (
    Checkpoint,
    FusedDecoder,
    InterfaceDecoder,
    LoraAdapter,
    ModelConfig,
    load_stock_decoder,
)
from .config import EngineConfig
from .runner import StepBatch

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choice:
    """What ``auto`` became: number format of the weights, which decoder runs, and the reason in words."""

    format: str
    runner: str
    reason: str


def choose(config: EngineConfig, model: ModelConfig, stored_bits: int) -> Choice:
    """Resolve ``dtype`` and ``runner``. Raises ValueError when the asked combination cannot run here."""
    from ...models import supports

    format, reason = config.dtype, "as configured"
    if format == "auto":
        if config.device == "cuda":
            format, reason = "bfloat16", "the fast format on CUDA"
        elif stored_bits == 4 and supports(model, "int4") is None:
            format, reason = (
                "int4",
                "the checkpoint is stored in 4 bits: the same values at a quarter of the memory traffic",
            )
        elif supports(model, "bfloat16") is None:
            format, reason = "bfloat16", "half the memory traffic of float32 at the same quality"
        else:
            format, reason = "float32", f"no fast bfloat16 here ({supports(model, 'bfloat16')})"
    obstacle = "it runs on CPU only" if config.device == "cuda" else supports(model, format)
    if config.runner != "stock" and obstacle is None and config.block_size % 16 == 0:
        return Choice(format, "fused", reason)
    if config.runner == "fused":
        raise ValueError(
            "runner must be stock or auto for this model: "
            f"fused cannot run it ({obstacle or 'block_size % 16'})"
        )
    if format in ("int8", "int4"):
        raise ValueError(
            f"dtype {format} needs the fused runner, which cannot run this model: {obstacle or config.runner}"
        )
    return Choice(format, "stock", reason)


def memory_budget(device: str) -> int:
    """Bytes for pages when nothing is configured: 2 GiB or a quarter of the memory on CPU, 80 % of what is
    free on CUDA."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0] * 0.8)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(2 << 30, total // 4)


class PagedRunner:
    """Implements :class:`~sharewell.serving.core.runner.Runner` on a model folder."""

    def __init__(self, folder: Path, config: EngineConfig, threads: int) -> None:
        checkpoint = Checkpoint(folder)
        self.model = checkpoint.config
        self.choice = choose(config, self.model, checkpoint.stored_bits)
        self.revision = checkpoint.revision
        self.max_length = min(config.max_model_len or self.model.context_length, self.model.context_length)
        fused = self.choice.runner == "fused"
        # the fused step brings its own threads; two teams would fight
        torch.set_num_threads(1 if fused else threads)
        adapters = config.max_adapters
        if fused:
            decoder = FusedDecoder(
                checkpoint,
                self.choice.format,
                max_length=self.max_length,
                threads=threads,
                max_adapters=adapters,
                max_lora_rank=config.max_lora_rank,
            )
        else:
            dtype = getattr(torch, self.choice.format)
            decoder = load_stock_decoder(folder, dtype, config.device, adapters)
            self.model = decoder.config
        size = torch.finfo(decoder.dtype).bits // 8
        block_bytes = 2 * self.model.n_layers * config.block_size * self.model.kv_width * size
        budget = config.kv_cache_bytes or memory_budget(config.device)
        self.num_blocks = config.num_blocks or max(2, budget // block_bytes)
        self.decoder = decoder
        self.takes_adapters = not isinstance(decoder, InterfaceDecoder)
        self._forward = PagedForward(
            decoder, self.num_blocks, config.block_size, one_by_one=config.deterministic
        )
        log.info(
            "%s weights on the %s runner (%s), %d threads",
            self.choice.format,
            self.choice.runner,
            self.choice.reason,
            threads,
        )

    def run(self, batch: StepBatch) -> torch.Tensor:
        """Float32 logits ``[R, vocab]``."""
        for source, destination in batch.copies:
            self._forward.copy_block(source, destination)
        return self._run_planned(batch) if batch.plans else self._run(batch)

    def _run_planned(self, batch: StepBatch) -> torch.Tensor:
        """Each sequence with a plan by itself, the others together; rows in the batch's order."""
        out = torch.empty(len(batch.logit_rows), self.model.vocab_size)
        rest = batch.without_plans()
        if len(rest.token_ids):
            others = np.ones(len(batch.logit_rows), dtype=bool)
            for s in batch.plans:
                others[batch.rows_of(s)] = False
            out[torch.from_numpy(others)] = self._run(rest)[:, : self.model.vocab_size]
        for s, plan in batch.plans.items():
            part = batch.only(s)
            try:
                logits, batch.plan_stats[s] = self._forward.planned(
                    plan, part.token_ids, part.positions, part.block_tables[0], part.logit_rows,
                    int(part.adapter_slots[0]),
                )  # fmt: skip
            except (PlanError, UnsupportedModel) as error:
                log.warning("a plan failed, its prompt is computed in full: %s", error)
                logits = self._run(part)
            out[torch.from_numpy(batch.rows_of(s))] = logits[:, : self.model.vocab_size]
        return out

    @property
    def forward(self) -> PagedForward:
        """The pass and its pages, for planners that copy or pin what is in them."""
        return self._forward

    def _run(self, batch: StepBatch) -> torch.Tensor:
        return self._forward(
            batch.token_ids,
            batch.positions,
            batch.slots,
            batch.query_starts,
            batch.context_lens,
            batch.block_tables,
            batch.logit_rows,
            batch.adapter_slots,
        )

    def load_adapter(self, slot: int, adapter: LoraAdapter | None) -> None:
        """Put ``adapter`` into ``slot``; None empties it."""
        self.decoder.load_adapter(slot, adapter)
