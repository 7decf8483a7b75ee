"""The engine: submit, cancel, step. Synchronous and deterministic; it owns no clock, thread or socket.

A step is plan (which tokens, no model), run (one forward pass), commit (sample, publish pages, finish).
Whoever hosts the engine decides when to step and passes the time in."""

from __future__ import annotations

import hashlib
import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...kv import BlockManager
from .config import EngineConfig
from .grammar import Grammars, GrammarState
from .messages import EngineInfo, EngineRequest, EngineStats, GrammarSpec, TokenOutput
from .runner import Runner, StepBatch
from .sampling import bias, draw, logprob, penalize
from .scheduler import Scheduler
from .sequence import Sequence, Status

if TYPE_CHECKING:
    from ...kv import KVPlan
    from ...models import LoraAdapter

log = logging.getLogger(__name__)


class Planner:
    """Gives requests that opt in (``EngineRequest.sharing``) a plan for their prompt's keys and values.

    Called in the engine's thread; what it raises is the engine's failure."""

    has_idle_work = False

    def plan(self, sequence: Sequence) -> KVPlan | None:
        """The plan of a choice that was just submitted; None: compute it as usual. ``begin`` of the plan sees
        which tokens are left when shared prefixes are taken off, each time the prompt is computed."""

    def leaving(self, sequence: Sequence) -> None:
        """A choice ends (finished or cancelled): its tokens are final, ``computed`` of them are in its pages,
        which are freed behind this call unless the planner forks them."""

    def report(self, sequence: Sequence) -> Mapping[str, Any] | None:
        """What goes out with a choice's first output: how its prompt was computed."""

    def idle_step(self) -> None:
        """A short piece of the work that waits until no sequence does (``has_idle_work``)."""

    def stats(self) -> Mapping[str, Any]:
        """Fields of EngineStats that are this planner's."""
        return {}


class QueueFull(RuntimeError):
    """max_waiting requests wait already."""


class Refused(ValueError):
    """A request that can never run here; ``code`` is the API's error code."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class ResidentAdapters:
    """Known adapters by name, and the runner's slots: pinned while in use, least recently used given up
    first."""

    def __init__(self, runner: Runner, slots: int, max_rank: int = 512) -> None:
        self._runner, self._max_rank = runner, max_rank
        self.known: dict[str, LoraAdapter] = {}
        self.editions: dict[
            str, int
        ] = {}  # how often a name was given to other weights: keys and values differ
        self._pins = [0] * slots
        self._slot_of: OrderedDict[str, int] = OrderedDict()
        self._free = list(range(slots))

    def add(self, name: str, adapter: LoraAdapter) -> None:
        """Make ``adapter`` known as ``name``, replacing what was. Raises ValueError (rank, slots, name in
        use)."""
        if not self._runner.takes_adapters:
            raise ValueError(
                f"adapter {name!r} cannot be used: this model is not Llama-, Qwen- or Mistral-like"
            )
        if not self._pins:
            raise ValueError("max_adapters is 0: this engine takes no adapters")
        if adapter.rank > self._max_rank:
            raise ValueError(f"rank of adapter {name!r} must be at most {self._max_rank}, got {adapter.rank}")
        self.forget(name)
        self.known[name] = adapter
        self.editions[name] = self.editions.get(name, 0) + 1

    def acquire(self, name: str | None) -> int | None:
        """The slot of ``name``, loaded and pinned until released; None when others pin them all."""
        if name is None:
            return -1
        slot = self._slot_of.get(name)
        if slot is None:
            slot = self._evict()
            if slot is None:
                return None
            self._runner.load_adapter(slot, self.known[name])
            self._slot_of[name] = slot
        self._slot_of.move_to_end(name)
        self._pins[slot] += 1
        return slot

    def _evict(self) -> int | None:
        if self._free:
            return self._free.pop()
        for name, slot in self._slot_of.items():
            if self._pins[slot] == 0:
                del self._slot_of[name]
                return slot
        return None

    def release(self, slot: int) -> None:
        if slot >= 0:
            self._pins[slot] -= 1

    def forget(self, name: str) -> None:
        """Drop an adapter; its slot is free for others. Raises ValueError while sequences use it."""
        slot = self._slot_of.get(name)
        if slot is not None:
            if self._pins[slot]:
                raise ValueError(f"adapter {name!r} is in use")
            del self._slot_of[name]
            self._free.append(slot)
        self.known.pop(name, None)


class EngineCore:
    """One model, its pages and its queue. ``now`` is any monotonic axis in seconds, used for deadlines and
    timing."""

    def __init__(
        self,
        config: EngineConfig,
        runner: Runner,
        info: EngineInfo,
        monotonic: Callable[[], float],
        tokenizer_json: Path | None = None,
        blocks: BlockManager | None = None,
    ) -> None:
        self.config, self.info, self._runner, self._monotonic = config, info, runner, monotonic
        self.blocks = blocks or BlockManager(
            info.num_blocks, info.block_size, prefix_sharing=config.prefix_sharing
        )
        self.adapters = ResidentAdapters(runner, config.max_adapters, config.max_lora_rank)
        self.scheduler = Scheduler(self.blocks, self.adapters, config.max_batch_tokens, config.max_seqs)
        self.scheduler.on_row_free = self._free_row
        self._grammars = (
            Grammars(tokenizer_json, info.vocab_size, info.eos_token_ids) if tokenizer_json else None
        )
        self.planner: Planner | None = None
        self._live: dict[str, list[Sequence]] = {}
        self._ids = self._arrivals = 0
        self._outputs: list[TokenOutput] = []
        self._eos = frozenset(info.eos_token_ids)
        width = -(-info.context_length // info.block_size) + 1
        self._tables = np.zeros((config.max_seqs, width), np.int32)
        self._synced = [0] * config.max_seqs
        self._rows = list(range(config.max_seqs))[::-1]
        most = config.max_batch_tokens
        self._token_ids, self._positions, self._slots = (np.zeros(most, np.int64) for _ in range(3))
        self._starts = np.zeros(config.max_seqs + 1, np.int32)
        self._contexts = np.zeros(config.max_seqs, np.int32)
        self._adapter_slots = np.full(config.max_seqs, -1, np.int32)
        self._counters = dict.fromkeys(
            (
                "prompt_tokens",
                "computed_prompt_tokens",
                "cached_prompt_tokens",
                "generated_tokens",
                "steps",
                "planned_prompts",
                "planned_token_layers",
                "reused_token_layers",
            ),
            0,
        )
        self._step_s = self._forward_s = 0.0
        self._prefill_s = self._prefill_tokens = 0.0  # of recent steps with prompts in them
        self._deadlines = 0  # unfinished choices that have one

    # Requests

    def submit(self, request: EngineRequest) -> None:
        """Queue a request. Raises QueueFull, or Refused for one that can never run (length, adapter,
        grammar)."""
        if request.request_id in self._live:
            raise Refused("duplicate_request", f"request_id {request.request_id!r} is in use")
        if len(self.scheduler.waiting) >= self.config.max_waiting:
            raise QueueFull(f"{self.config.max_waiting} requests wait already")
        longest, limit = len(request.prompt_ids), self.info.context_length
        pages = self.info.num_blocks * self.info.block_size
        if longest + 1 > limit:
            message = (
                f"the prompt has {longest} tokens, but the model's context is {limit} tokens, answer included"
            )
            raise Refused("context_length_exceeded", message)
        if longest + 1 > pages:
            raise Refused(
                "context_length_exceeded", f"the prompt has {longest} tokens, but the cache holds {pages}"
            )
        if request.adapter is not None and request.adapter not in self.adapters.known:
            raise Refused("model_not_found", f"adapter {request.adapter!r} is not loaded")
        bad = next((t for t in request.prompt_ids if not 0 <= t < self.info.vocab_size), None)
        if bad is not None:
            raise Refused("invalid_prompt", f"token ids must be in [0, {self.info.vocab_size}), got {bad}")
        spec = request.sampling.grammar
        grammars = [None if spec is None else self.compile_grammar(spec) for _ in range(request.n)]
        self._arrivals += 1
        edition = self.adapters.editions.get(request.adapter or "", 0)
        scope = (self.info.revision, request.adapter or "", edition, request.cache_salt)
        salt = hashlib.blake2b(repr(scope).encode(), digest_size=16).digest()
        choices = []
        self._live[request.request_id] = choices
        for index in range(request.n):
            if index in request.finished:
                continue
            sequence = Sequence(self._ids, request, index, self._arrivals, salt)
            self._ids += 1
            sequence.grammar = grammars[index]
            stops = frozenset(request.sampling.stop_token_ids)
            sequence.stop_ids = stops if request.sampling.ignore_eos else stops | self._eos
            sequence.limit = min(request.sampling.max_tokens, min(limit, pages) - sequence.n_prompt)
            self._deadlines += request.deadline_s is not None
            if request.sharing is not None and self.planner is not None and sequence.prompt_logprobs is None:
                sequence.kv_plan = self.planner.plan(sequence)
            choices.append(sequence)
        if not choices:
            del self._live[request.request_id]
        self._counters["prompt_tokens"] += len(request.prompt_ids)
        leader = None
        for sequence in choices:
            if not self._restore(sequence):
                self._finish(sequence, "error", error="grammar_error")
            elif sequence.n_output >= sequence.limit and (
                sequence.n_output or sequence.prompt_logprobs is None
            ):
                self._finish(sequence, "length")
            elif leader is None or request.emitted or sequence.kv_plan is not None:
                leader = sequence
                self.scheduler.add(sequence)
            else:
                sequence.status = Status.FOLLOWING
                leader.followers.append(sequence)

    def grammar_ready(self, spec: GrammarSpec) -> bool:
        """True when ``spec`` is compiled already, so that submitting it takes no time."""
        return self._grammars is None or self._grammars.ready(spec)

    def compile_grammar(self, spec: GrammarSpec) -> GrammarState:
        """A fresh state of ``spec``, compiled at its first use (any thread may do that beforehand). Raises
        Refused."""
        if self._grammars is None:
            raise Refused("unsupported_grammar", "this engine has no tokenizer for constrained output")
        try:
            return self._grammars.compile(spec)
        except ValueError as error:
            raise Refused("invalid_grammar", str(error)) from None

    def _restore(self, sequence: Sequence) -> bool:
        """Rebuild what depends on the tokens emitted so far: grammar state and penalty counts."""
        params = sequence.sampling
        if params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty:
            sequence.counts, sequence.output_counts = {}, {}
            for i, token in enumerate(sequence.tokens):
                _count(sequence, token, i >= sequence.n_prompt)
        if sequence.grammar is None:
            return True
        return all(sequence.grammar.accept(t) for t in sequence.tokens[sequence.n_prompt :])

    def cancel(self, request_id: str, index: int | None = None) -> None:
        """End a request, or one choice of it, at once; unknown ones are ignored (it may just have
        finished)."""
        self._outputs = [
            o for o in self._outputs if o.request_id != request_id or index not in (None, o.index)
        ]
        choices = self._live.get(request_id, [])
        if index is None:
            self._live.pop(request_id, None)
        for sequence in choices:
            if sequence.status is not Status.FINISHED and index in (None, sequence.index):
                self._promote_followers(sequence)
                self._leave(sequence)
                self._deadlines -= sequence.request.deadline_s is not None
                self.scheduler.remove(sequence)
        if all(s.status is Status.FINISHED for s in choices):
            self._live.pop(request_id, None)

    def load_adapter(self, name: str, adapter: LoraAdapter) -> None:
        """Make ``adapter`` available as ``name``, in place of what had that name. Raises ValueError while
        that is in use."""
        self._check_unused(name)
        self.adapters.add(name, adapter)

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter. Raises ValueError while requests use it, or when it is unknown."""
        if name not in self.adapters.known:
            raise ValueError(f"adapter {name!r} is not loaded")
        self._check_unused(name)
        self.adapters.forget(name)

    def _check_unused(self, name: str) -> None:
        if any(choices and choices[0].request.adapter == name for choices in self._live.values()):
            raise ValueError(f"adapter {name!r} is in use")

    def _leave(self, sequence: Sequence) -> None:
        if sequence.request.sharing is not None and self.planner is not None:
            self.planner.leaving(sequence)

    def _promote_followers(self, leader: Sequence) -> None:
        """A leader that ends before its prompt is computed leaves its followers to queue by themselves."""
        followers, leader.followers = leader.followers, []
        for follower in followers:
            if follower.status is Status.FOLLOWING and follower.request.request_id in self._live:
                self.scheduler.add(follower)

    @property
    def has_work(self) -> bool:
        """True when a step would do something."""
        return bool(self.scheduler.running or self.scheduler.waiting or self._outputs) or (
            self.planner is not None and self.planner.has_idle_work
        )

    # Steps

    def step(self, now: float) -> list[TokenOutput]:
        """Plan, run and commit one step; returns what it produced for each choice."""
        started = self._monotonic()
        if self._deadlines:
            self._expire(now)
        every = self.config.forced_preemption_every
        if every and self._counters["steps"] % every == every - 1 and len(self.scheduler.running) > 1:
            self.scheduler.preempt(max(self.scheduler.running, key=lambda s: s.key))
        plan = self.scheduler.plan()
        if plan:
            batch, sampled = self._batch(plan)
            before = self._monotonic()
            logits = self._runner.run(batch).numpy()
            if batch.plans:
                self._count_plans(batch)
            forward = self._monotonic() - before
            self._forward_s += forward
            new = len(batch.token_ids)
            if new > len(plan):
                # weighted by tokens: a step of few costs much more for each of them
                self._prefill_s = 0.9 * self._prefill_s + forward
                self._prefill_tokens = 0.9 * self._prefill_tokens + new
            self._commit(plan, sampled, logits)
            self._counters["steps"] += 1
        elif self.planner is not None and self.planner.has_idle_work and not self.scheduler.waiting:
            self.planner.idle_step()
        outputs, self._outputs = self._outputs, []
        self._step_s += self._monotonic() - started
        return outputs

    def _count_plans(self, batch: StepBatch) -> None:
        counters = self._counters
        for s in batch.plans:
            new = int(batch.query_starts[s + 1] - batch.query_starts[s])
            counters["planned_prompts"] += 1
            stats = batch.plan_stats.get(s)
            if stats is not None:  # None: the plan failed and everything was computed
                counters["planned_token_layers"] += stats.token_layers
                counters["reused_token_layers"] += new * len(stats.computed) - stats.token_layers

    def _expire(self, now: float) -> None:
        late = [
            s
            for s in (*self.scheduler.waiting, *self.scheduler.running)
            if s.request.deadline_s is not None and s.request.deadline_s <= now
        ]
        for sequence in late:
            self._finish(sequence, "error", error="deadline_exceeded")

    def _batch(self, plan: list[tuple[Sequence, int]]) -> tuple[StepBatch, list[tuple[Sequence, int, int]]]:
        """Pack the plan. ``sampled``: (sequence, first logit row, rows) of those whose logits are wanted."""
        size = self.info.block_size
        at, rows, sampled, wanted = 0, [], [], []
        longest = 1
        total = sum(n for _, n in plan)
        if total > len(self._token_ids):  # a planned prompt comes in one piece
            self._token_ids, self._positions, self._slots = (np.zeros(total, np.int64) for _ in range(3))
        resync = bool(self.scheduler.copies)
        for i, (sequence, n) in enumerate(plan):
            start, end = sequence.computed, sequence.computed + n
            row = sequence.row
            if row < 0:
                row = sequence.row = self._rows.pop()
                self._synced[row] = 0
            table = self.blocks.table(sequence.id)
            if resync or self._synced[row] != len(table):
                self._tables[row, : len(table)] = table
                self._synced[row] = len(table)
            if n == 1:
                self._token_ids[at] = sequence.tokens[start]
                self._positions[at] = start
                self._slots[at] = table[start // size] * size + start % size
            else:
                positions = np.arange(start, end)
                self._token_ids[at : at + n] = sequence.tokens[start:end]
                self._positions[at : at + n] = positions
                self._slots[at : at + n] = (
                    self._tables[row, positions // size].astype(np.int64) * size + positions % size
                )
            self._starts[i + 1] = at + n
            self._contexts[i] = end
            self._adapter_slots[i] = sequence.adapter_slot
            rows.append(row)
            longest = max(longest, len(table))
            if sequence.prompt_logprobs is not None and start < sequence.n_prompt:
                sampled.append((sequence, len(wanted), n))
                wanted += range(at, at + n)
            elif end == len(sequence.tokens):
                sampled.append((sequence, len(wanted), 1))
                wanted.append(at + n - 1)
            at += n
        count = len(plan)
        batch = StepBatch(
            token_ids=self._token_ids[:at],
            positions=self._positions[:at],
            slots=self._slots[:at],
            query_starts=self._starts[: count + 1],
            context_lens=self._contexts[:count],
            block_tables=np.ascontiguousarray(self._tables[rows, :longest]),
            logit_rows=np.array(wanted, np.int64),
            adapter_slots=self._adapter_slots[:count],
            copies=self.scheduler.copies,
            plans={
                i: s.kv_plan
                for i, (s, _) in enumerate(plan)
                if s.kv_plan is not None and s.computed < s.n_prompt
            },
        )
        return batch, sampled

    def _commit(
        self, plan: list[tuple[Sequence, int]], sampled: list[tuple[Sequence, int, int]], logits: np.ndarray
    ) -> None:
        counters = self._counters
        for sequence, n in plan:
            prompt_left = sequence.n_prompt - sequence.computed
            if prompt_left > 0:
                counters["computed_prompt_tokens"] += min(n, prompt_left)
            sequence.computed += n
            self.scheduler.publish(sequence)
        best = logits.argmax(axis=1).tolist() if sampled else None
        for sequence, row, n in sampled:
            if sequence.prompt_logprobs is not None and sequence.computed - n < sequence.n_prompt:
                self._score_prompt(sequence, logits[row : row + n], n)
            if sequence.computed < len(sequence.tokens):
                continue
            last = row + n - 1
            followers, sequence.followers = sequence.followers, []
            forked = [f for f in followers if f.status is Status.FOLLOWING and self._fork(sequence, f)]
            assert best is not None
            self._emit(sequence, logits[last], best[last])
            for follower in forked:
                self._emit(follower, logits[last], best[last])

    def _score_prompt(self, sequence: Sequence, logits: np.ndarray, n: int) -> None:
        """Log-probabilities of the prompt tokens that follow the ``n`` computed ones."""
        scores = sequence.prompt_logprobs
        assert scores is not None
        top = sequence.sampling.prompt_logprobs or 0
        if not scores:
            scores.append(None)  # nothing predicts the first token
        for i in range(n):
            position = sequence.computed - n + i + 1
            if position < sequence.n_prompt:
                scores.append(logprob(logits[i], sequence.tokens[position], top))

    def _fork(self, leader: Sequence, follower: Sequence) -> bool:
        """Let a follower go on from its leader's prompt; it queues as an ordinary request when there is no
        room."""
        if len(self.scheduler.running) >= self.config.max_seqs:
            self.scheduler.add(follower)
            return False
        self.blocks.fork(leader.id, follower.id, leader.computed)
        follower.computed, follower.published = leader.computed, leader.published
        follower.block_hashes = list(leader.block_hashes)
        follower.cached_tokens = leader.cached_tokens
        if follower.prompt_logprobs is not None and leader.prompt_logprobs is not None:
            follower.prompt_logprobs = list(leader.prompt_logprobs)
        slot = self.adapters.acquire(follower.request.adapter)
        assert slot is not None, "the leader holds the adapter"
        follower.adapter_slot = slot
        follower.status = Status.RUNNING
        self.scheduler.running.append(follower)
        return True

    def _emit(self, sequence: Sequence, logits: np.ndarray, best: int) -> None:
        """Choose the next token of a sequence whose tokens are all computed."""
        params = sequence.sampling
        if not math.isfinite(logits[best]):  # argmax finds NaN and +inf first
            self._finish(sequence, "error", error="nan_logits")
            return
        if sequence.limit == 0:  # max_tokens 0: only the prompt's scores were wanted
            self._finish(sequence, "length")
            return
        token = best
        scored = None
        plain = params.greedy and sequence.grammar is None and sequence.counts is None
        if not plain or params.logit_bias or params.min_tokens > sequence.n_output:
            token = self._choose(sequence, logits)
            if token < 0:
                self._finish(sequence, "error", error="grammar_error")
                return
        if params.logprobs is not None:
            scored = (logprob(logits, token, params.logprobs),)
        if token in sequence.stop_ids or (sequence.grammar is not None and token in self._eos):
            self._finish(
                sequence, "stop", stop_token_id=token
            )  # before min_tokens only when nothing else was allowed
            return
        sequence.tokens.append(token)
        self._counters["generated_tokens"] += 1
        if sequence.counts is not None:
            _count(sequence, token, True)
        reason = None
        if sequence.grammar is not None:
            if not sequence.grammar.accept(token):  # a limit of the matcher: what is allowed next is unknown
                self._finish(sequence, "error", token, scored, error="grammar_error")
                return
            if sequence.grammar.complete:
                reason = "stop"
        if reason is None and sequence.n_output >= sequence.limit:
            reason = "length"
        if reason is not None:
            self._finish(sequence, reason, token, scored)
        else:
            self._put(sequence, (token,), scored or ())

    def _choose(self, sequence: Sequence, raw: np.ndarray) -> int:
        """A token under grammar, penalties, bias and sampling; -1 when the grammar allows nothing."""
        params = sequence.sampling
        logits = raw[: self.info.vocab_size]
        early = params.min_tokens > sequence.n_output and bool(sequence.stop_ids)
        if early or params.logit_bias or sequence.counts is not None or sequence.grammar is not None:
            logits = logits.copy()
        if sequence.counts is not None:
            assert sequence.output_counts is not None
            penalize(logits, params, sequence.counts, sequence.output_counts)
        bias(logits, params)
        if sequence.grammar is not None and not sequence.grammar.mask(logits):
            return -1
        if early:
            ends = [t for t in sequence.stop_ids if 0 <= t < len(logits)]
            kept = logits[ends]
            logits[ends] = -np.inf
            if logits.max() == -np.inf:  # the grammar is complete: it ends all the same
                logits[ends] = kept
        if params.greedy:
            return int(logits.argmax())
        return draw(logits, params, sequence.index, sequence.n_output)

    def _put(self, sequence: Sequence, tokens: tuple[int, ...], scored: tuple = (), **ending: object) -> None:
        first = sequence.emitted_nothing
        prompt_logprobs = sharing = None
        cached = 0
        if first:
            if sequence.request.sharing is not None and self.planner is not None:
                sharing = self.planner.report(sequence)
            sequence.emitted_nothing = False
            cached = max(0, sequence.cached_tokens)
            if sequence.index == 0:
                self._counters["cached_prompt_tokens"] += cached
            if sequence.prompt_logprobs is not None:
                prompt_logprobs = tuple(sequence.prompt_logprobs)
        self._outputs.append(
            TokenOutput(
                sequence.request.request_id,
                sequence.index,
                tokens,
                scored,
                cached_tokens=cached,
                prompt_logprobs=prompt_logprobs,
                sharing=sharing,
                **ending,  # pyright: ignore[reportArgumentType]
            )
        )

    def _finish(
        self,
        sequence: Sequence,
        reason: str,
        token: int | None = None,
        scored: tuple | None = None,
        *,
        stop_token_id: int | None = None,
        error: str | None = None,
    ) -> None:
        tokens = () if token is None else (token,)
        self._promote_followers(sequence)
        self._deadlines -= sequence.request.deadline_s is not None
        self._put(
            sequence, tokens, scored or (), finish_reason=reason, stop_token_id=stop_token_id, error=error
        )
        self._leave(sequence)  # behind its last word: the planner reports with the first one
        if sequence.status in (Status.RUNNING, Status.WAITING) and (
            sequence in self.scheduler.running or sequence in self.scheduler.waiting
        ):
            self.scheduler.remove(sequence)
        sequence.status = Status.FINISHED
        choices = self._live.get(sequence.request.request_id, [])
        if all(s.status is Status.FINISHED for s in choices):
            self._live.pop(sequence.request.request_id, None)

    def reset_counters(self) -> None:
        """Start the statistics anew (after warming up)."""
        self._counters = dict.fromkeys(self._counters, 0)
        self._step_s = self._forward_s = self._prefill_s = self._prefill_tokens = 0.0
        self.scheduler.preemptions = 0
        self.blocks.queried_tokens = self.blocks.hit_tokens = 0

    def _free_row(self, sequence: Sequence) -> None:
        if sequence.row >= 0:
            self._rows.append(sequence.row)
            sequence.row = -1

    def stats(self) -> EngineStats:
        """A snapshot."""
        blocks = self.blocks
        return EngineStats(
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting),
            blocks_total=blocks.num_blocks,
            blocks_used=blocks.num_used,
            blocks_shared=blocks.num_shared,
            blocks_cached=blocks.num_cached,
            blocks_free=blocks.num_free,
            preemptions=self.scheduler.preemptions,
            step_s=self._step_s,
            forward_s=self._forward_s,
            prefill_s_per_token=self._prefill_s / self._prefill_tokens if self._prefill_tokens else 0.0,
            adapters=tuple(sorted(self.adapters.known)),
            **self._counters,
            **(self.planner.stats() if self.planner is not None else {}),
        )


def _count(sequence: Sequence, token: int, is_output: bool) -> None:
    assert sequence.counts is not None and sequence.output_counts is not None
    sequence.counts[token] = sequence.counts.get(token, 0) + 1
    if is_output:
        sequence.output_counts[token] = sequence.output_counts.get(token, 0) + 1
