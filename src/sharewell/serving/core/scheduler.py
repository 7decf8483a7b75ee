"""Which tokens run in the next step: continuous batching with chunked prefill (Orca; Sarathi-Serve,
2403.02310).

Running decodes come first, then prompts that have begun, then waiting requests by (priority, deadline,
arrival), all within one budget of tokens. A waiting request whose next prompt block is being computed by
another one waits for it instead of computing it too. When pages run out, the last in that order is preempted
and computed again later; the first always goes on, so there is no livelock."""

from __future__ import annotations

import bisect
from collections.abc import Callable
from typing import Protocol

from ...kv import BlockManager, OutOfBlocks, block_hashes
from .sequence import Sequence, Status


class AdapterSlots(Protocol):
    """Gives adapters a place in the runner while sequences use them."""

    def acquire(self, name: str | None) -> int | None:
        """The slot of ``name`` (-1 for the base model), pinned; None when every slot is pinned by others."""
        ...

    def release(self, slot: int) -> None: ...


class Scheduler:
    """Plans steps over ``blocks``; owns the waiting and running sequences."""

    def __init__(
        self, blocks: BlockManager, adapters: AdapterSlots, max_batch_tokens: int, max_seqs: int
    ) -> None:
        self.blocks, self.adapters = blocks, adapters
        self.max_batch_tokens, self.max_seqs = max_batch_tokens, max_seqs
        self.waiting: list[Sequence] = []  # sorted by key
        self.running: list[Sequence] = []  # in order of admission
        self.copies: list[tuple[int, int]] = []
        self.preemptions = 0
        self.on_row_free: Callable[[Sequence], None] = lambda sequence: None
        # Gives pages back that no sequence uses (pinned segments); False when there are none.
        self.relieve: Callable[[], bool] = lambda: False

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        sequence.status = Status.WAITING
        bisect.insort(self.waiting, sequence, key=lambda s: s.key)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is, and free what it holds."""
        if sequence.status is Status.WAITING:
            self.waiting.remove(sequence)
        elif sequence.status is Status.RUNNING:
            self._leave(sequence)
        sequence.status = Status.FINISHED

    def _leave(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.blocks.free(sequence.id)
        self.adapters.release(sequence.adapter_slot)
        self.on_row_free(sequence)

    def preempt(self, sequence: Sequence) -> None:
        """Free the sequence's pages and queue it again; published pages stay findable until they are
        reused."""
        self._leave(sequence)
        sequence.computed = sequence.published = 0
        sequence.adapter_slot = -1
        if sequence.prompt_logprobs is not None:
            sequence.prompt_logprobs = []
        self.preemptions += 1
        self.add(sequence)

    def plan(self) -> list[tuple[Sequence, int]]:
        """The sequences of the next step with the number of tokens each computes; pages are reserved."""
        self.copies = []
        budget = self.max_batch_tokens
        planned: dict[int, tuple[Sequence, int]] = {}
        for decoding in (True, False):
            for sequence in list(self.running):
                pending = len(sequence.tokens) - sequence.computed
                if sequence.status is not Status.RUNNING or (pending == 1) is not decoding or budget <= 0:
                    continue
                n = pending if sequence.kv_plan is not None else min(pending, budget)
                if self._reserve(sequence, n, planned):
                    planned[sequence.id] = (sequence, n)
                    budget -= n
        self._admit(budget, planned)
        return [entry for entry in planned.values() if entry[0].status is Status.RUNNING]

    def _reserve(self, sequence: Sequence, n: int, planned: dict[int, tuple[Sequence, int]]) -> bool:
        """Room for n more tokens, preempting from the back of the order; False when the sequence itself had
        to go."""
        blocks = self.blocks
        while True:
            needed = sequence.computed + n - blocks.length(sequence.id)
            try:
                if needed > 0:
                    self.copies += blocks.append(sequence.id, needed)
                return True
            except OutOfBlocks:
                if self.relieve():
                    continue
                victim = max(self.running, key=lambda s: s.key)
                self.preempt(victim)
                planned.pop(victim.id, None)
                if victim is sequence:
                    return False

    def _admit(self, budget: int, planned: dict[int, tuple[Sequence, int]]) -> None:
        i = 0
        while i < len(self.waiting) and budget > 0 and len(self.running) < self.max_seqs:
            sequence = self.waiting[i]
            self._extend_hashes(sequence)
            if self._waits_for_another(sequence):
                i += 1
                continue
            slot = self.adapters.acquire(sequence.request.adapter)
            if slot is None:
                i += 1
                continue
            prefix = sequence.block_hashes if sequence.prompt_logprobs is None else []
            try:
                got = self.blocks.allocate(sequence.id, len(sequence.tokens), prefix, sequence.tokens)
            except OutOfBlocks:
                self.adapters.release(slot)
                if self.relieve():
                    continue
                if not self._make_way(sequence, planned):
                    return
                continue
            del self.waiting[i]
            sequence.status, sequence.adapter_slot = Status.RUNNING, slot
            sequence.computed = got.cached_tokens
            sequence.published = got.cached_tokens // self.blocks.block_size
            if sequence.cached_tokens < 0:
                sequence.cached_tokens = min(got.cached_tokens, sequence.n_prompt)
            n = len(sequence.tokens) - sequence.computed
            if sequence.kv_plan is None:
                self.blocks.claim(sequence.id, sequence.block_hashes[sequence.published :])
                n = min(n, budget)
            self.running.append(sequence)
            planned[sequence.id] = (sequence, n)
            budget -= n

    def _extend_hashes(self, sequence: Sequence) -> None:
        if not self.blocks.prefix_sharing:
            return
        size, known = self.blocks.block_size, len(sequence.block_hashes)
        if len(sequence.tokens) // size > known:
            parent = sequence.block_hashes[-1] if known else None
            sequence.block_hashes += block_hashes(
                sequence.tokens[known * size :], size, salt=sequence.salt, parent=parent
            )

    def _waits_for_another(self, sequence: Sequence) -> bool:
        if sequence.prompt_logprobs is not None:
            return False
        usable = sequence.block_hashes[: (len(sequence.tokens) - 1) // self.blocks.block_size]
        here = self.blocks.match(usable)
        return here < len(usable) and self.blocks.claimant(usable[here]) is not None

    def _make_way(self, sequence: Sequence, planned: dict[int, tuple[Sequence, int]]) -> bool:
        """Preempt a running sequence of strictly lower priority for a waiting one."""
        victim = max(self.running, key=lambda s: s.key, default=None)
        if victim is None or victim.request.priority <= sequence.request.priority:
            return False
        self.preempt(victim)
        planned.pop(victim.id, None)
        return True

    def publish(self, sequence: Sequence) -> None:
        """Offer the sequence's newly filled blocks to others."""
        size = self.blocks.block_size
        full = sequence.computed // size
        if full == sequence.published or not self.blocks.prefix_sharing:
            return
        if sequence.kv_plan is not None:
            # keys and values of a plan may be approximate: nobody else may take those for exact
            full = min(full, sequence.kv_plan.exact_tokens // size)
            if full <= sequence.published:
                return
        self._extend_hashes(sequence)
        for i in range(sequence.published, full):
            self.blocks.publish(
                sequence.id, i, sequence.block_hashes[i], sequence.tokens[i * size : (i + 1) * size]
            )
        sequence.published = full
