"""RelayCaching inside the engine: answers of requests that opt in are kept as pinned pages, and later prompts
that hold their tokens are computed under a plan.

A finished answer is looked at once (hidden states, influence), when the engine is idle or when it is first
wanted; so is the sampled share of relayed requests that is computed in full to measure what relaying changed.
Nothing of this runs for requests without ``sharing={"relay": "auto"}``."""

from __future__ import annotations

import itertools
import logging
import random
from collections import OrderedDict, deque
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...kv import (
    KVSegmentStore,
    Match,
    OutOfBlocks,
    OwnPlan,
    PagedForward,
    Piece,
    PinnedPages,
    PlanError,
    RelayConfig,
    RelayPlan,
    StudyPlan,
    UnsupportedModel,
    origin_spans,
    profile_for,
    rope_of,
)
from ...models import WholeDecoder
from .engine import Planner
from .sequence import Sequence, Status

if TYPE_CHECKING:
    from .engine import EngineCore

log = logging.getLogger(__name__)
STRIDE = 8  # every so many tokens of an answer say which earlier ones they looked at
CONTINUATION = 32  # answer tokens whose distributions are compared by the guard
WINDOW = 8  # sampled divergences whose mean decides on falling back
PROBE = 16  # while fallen back, one request of so many is relayed, and measured
MOST_NAMES = 4096


@dataclass(frozen=True)
class RelaySettings:
    """``share``: of the pages that segments may pin; ``sample``: of relayed requests that are computed in
    full when the engine is idle; ``fallback_kl``: mean sampled divergence (nats) above which nothing is
    relayed any more. Raises ValueError naming the field."""

    share: float = 0.25
    sample: float = 0.05
    fallback_kl: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"relay_share must be in (0, 1), got {self.share!r}")
        if not 0 <= self.sample <= 1:
            raise ValueError(f"relay_sample must be in [0, 1], got {self.sample!r}")
        if self.fallback_kl is not None and not self.fallback_kl > 0:
            raise ValueError(f"relay_fallback_kl must be None or positive, got {self.fallback_kl!r}")


@dataclass
class _Relayed:
    """What became of one request's prompt."""

    plan: RelayPlan | None = None
    names: dict[int, str] = field(default_factory=dict)  # segment -> whose answer it is
    pins: list[int] = field(default_factory=list)
    note: str = ""
    told: bool = False


@dataclass
class _Pending:
    """A finished answer in pages that nobody has looked at yet; ``keeper`` holds all of its sequence's."""

    keeper: int
    tokens: list[int]
    n_prompt: int
    key: str
    scope: str
    writer: str
    adapter_slot: int = -1


class RelayPlanner(Planner):
    """The engine's planner. Raises UnsupportedModel, naming the layer, for a model whose keys cannot be
    moved."""

    def __init__(
        self,
        core: EngineCore,
        forward: PagedForward,
        settings: RelaySettings,
        seed: int = 0,
        config: RelayConfig | None = None,
    ) -> None:
        decoder = forward.decoder
        if isinstance(decoder, WholeDecoder):
            raise UnsupportedModel(
                "layer 0: this model runs through its own code, which leaves out no tokens"
            )
        if getattr(decoder.config, "sliding_window", None):
            raise UnsupportedModel(
                "layer 0 has a sliding window: its reused tokens would lack what is behind"
            )
        rope_of(decoder)
        self._core, self._forward, self._settings = core, forward, settings
        self.profile = profile_for(decoder.config)
        self._config = config or RelayConfig()
        self._layers = self._config.range(self.profile, decoder.config.n_layers)
        self._heads = decoder.config.n_heads
        block_bytes = forward.pool.layout.block_bytes
        self.store = KVSegmentStore(max(1, int(core.info.num_blocks * settings.share)) * block_bytes)
        self._names: OrderedDict[int, str] = OrderedDict()  # segment -> request
        self._pending: OrderedDict[int, _Pending] = OrderedDict()  # by keeper
        self._live: dict[int, _Relayed] = {}
        self._jobs: deque[Generator[None]] = deque()
        self._keepers = itertools.count(-10, -1)
        self._random = random.Random(seed)
        self._sampled: deque[float] = deque(maxlen=WINDOW)
        self._since_fallback = 0
        self._recent: deque[tuple[str, float]] = deque(maxlen=32)
        self._counters = dict.fromkeys(
            ("relayed_tokens", "relay_recomputed_tokens", "relayed_prompts", "relay_declined",
             "relay_missing",
             "relay_damaged", "relay_samples", "relay_fallbacks"), 0,
        )  # fmt: skip
        self._kl_sum = 0.0
        core.scheduler.relieve = self.relieve

    # A request comes

    def plan(self, sequence: Sequence) -> RelayPlan | None:
        sharing = sequence.request.sharing or {}
        if sharing.get("relay") != "auto":
            return None
        state = self._live[sequence.id] = _Relayed()
        if self._fallen_back():
            state.note = (
                f"fallen back: the sampled divergence is {self._mean():.3g} nats, "
                f"above {self._settings.fallback_kl:.3g}"
            )
            self._counters["relay_fallbacks"] += 1
            return None
        self._study_all(sequence.request.cache_salt)
        wanted, among = sharing.get("segments"), None
        if wanted:
            chosen = set(wanted)
            among = [s for s, name in self._names.items() if name in chosen]
        prompt = sequence.tokens[: sequence.n_prompt]
        scope = sequence.request.cache_salt
        matches = self.store.find(self._key(sequence), prompt, scope=scope, among=among)
        if not matches:
            state.note = "no earlier answer's tokens were found in the prompt"
            return None
        state.names = {m.segment: self._names.get(m.segment, "") for m in matches}
        state.plan = RelayPlan(lambda: self._acquire(state, matches), self._config, self.profile)
        state.plan.exact_tokens = matches[0].start
        return state.plan

    def _acquire(self, state: _Relayed, matches: list[Match]) -> list[Piece]:
        """The segments that are still there; the tokens of others are computed."""
        self._release(state)
        pieces = []
        for m in matches:
            try:
                segment = self.store.pin(m.segment)
            except KeyError:
                self._counters["relay_missing"] += 1
                continue
            state.pins.append(m.segment)
            pieces.append(Piece(segment, m.start, m.offset, m.length))
        return pieces

    def _release(self, state: _Relayed) -> None:
        for segment in state.pins:
            self.store.release(segment)
        state.pins = []

    def _key(self, sequence: Sequence) -> str:
        core, adapter = self._core, sequence.request.adapter or ""
        edition = core.adapters.editions.get(adapter, 0)
        return repr((core.info.revision, core.info.dtype, adapter, edition))

    def report(self, sequence: Sequence) -> dict[str, Any] | None:
        """What became of the prompt, once it is computed: counts, and spans of tokens by origin."""
        state = self._live.get(sequence.id)
        if state is None or state.told:
            return None
        state.told = True
        plan, n = state.plan, sequence.n_prompt
        cached = max(0, sequence.cached_tokens)
        prefix: list[list] = [[0, cached, "prefix", ""]] if cached else []
        self._release(state)
        if plan is None or not plan.n_layers or plan.declined or plan.damaged:
            if plan is not None and (plan.declined or plan.damaged):
                self._counters["relay_declined"] += 1
                self._counters["relay_damaged"] += len(plan.damaged)
                for segment in plan.damaged:
                    self.store.drop(segment)
                state.note = plan.declined or "a stored segment held NaN or infinite values"
            state.plan = None
            rest = [[cached, n, "computed", ""]] if cached < n else []
            return {"relayed": 0, "recomputed": 0, "kl": None, "note": state.note, "spans": prefix + rest}
        recomputed = int(plan.selected.sum())
        relayed = int(plan.shared.sum()) - recomputed
        names = {i: state.names.get(piece.segment.id, "") for i, piece in enumerate(plan.pieces)}
        counters = self._counters
        counters["relayed_prompts"] += bool(relayed)
        counters["relayed_tokens"] += relayed
        counters["relay_recomputed_tokens"] += recomputed
        return {
            "relayed": relayed,
            "recomputed": recomputed,
            "kl": plan.predicted_kl,
            "reuse": plan.reuse_rate,
            "note": state.note,
            "spans": prefix + origin_spans(plan.origin, plan.owner, names, plan.first_position),
        }

    # A request ends

    def leaving(self, sequence: Sequence) -> None:
        state = self._live.pop(sequence.id, None)
        if state is None:
            return
        self._release(state)
        if sequence.status is not Status.RUNNING or sequence.computed < sequence.n_prompt:
            return
        blocks, n = self._core.blocks, sequence.computed - sequence.n_prompt
        request = sequence.request
        if n >= self.store.block:
            keeper = next(self._keepers)
            blocks.fork(sequence.id, keeper, sequence.computed)
            self._pending[keeper] = _Pending(
                keeper, sequence.tokens[: sequence.computed], sequence.n_prompt, self._key(sequence),
                request.cache_salt, request.request_id, sequence.adapter_slot,
            )  # fmt: skip
            if sequence.adapter_slot >= 0:  # the adapter may be gone later
                self._study(keeper)
        plan = state.plan
        measured = plan is not None and state.told and request.adapter is None and n > 1
        if measured and (self._probing() or self._random.random() < self._settings.sample):
            keeper = next(self._keepers)
            blocks.fork(sequence.id, keeper, sequence.computed)
            tokens, hashes = sequence.tokens[: sequence.computed], list(sequence.block_hashes)
            job = self._compare(request.request_id, keeper, tokens, sequence.n_prompt, hashes)
            next(job)  # begun, so that closing it gives its pages back
            self._jobs.append(job)

    def _study_all(self, scope: str) -> None:
        for keeper in [p.keeper for p in self._pending.values() if p.scope == scope]:
            self._study(keeper)

    def _study(self, keeper: int) -> None:
        """Look at an answer, and keep it as a segment of pinned pages."""
        p = self._pending.pop(keeper)
        blocks, n = self._core.blocks, len(p.tokens)
        size, table = blocks.block_size, np.array(blocks.table(keeper), np.int32)
        at = np.arange(p.n_prompt, n)
        look = StudyPlan(self._layers, self._heads, stride=STRIDE)
        try:
            self._forward.planned(
                look, np.array(p.tokens[p.n_prompt :]), at, table, np.zeros(0, np.int64), p.adapter_slot
            )
        except (PlanError, UnsupportedModel) as error:
            log.warning("an answer cannot be relayed: %s", error)
            blocks.free(keeper)
            return
        first, mine = p.n_prompt // size, next(self._keepers)
        blocks.fork(keeper, mine, n, first_block=first)
        blocks.free(keeper)
        pages = self._forward.pages(blocks.table(mine), n - first * size)
        positions = torch.from_numpy(at)
        kv = PinnedPages(pages, positions - first * size, lambda: blocks.free(mine))
        segment = None
        try:
            segment = self.store.put(
                p.key, p.tokens[p.n_prompt :], kv, positions, hidden=look.kept, influence=look.influence,
                scope=p.scope, writer=p.writer,
            )  # fmt: skip
        except ValueError as error:  # NaN: nobody shall read it
            self._counters["relay_damaged"] += 1
            log.warning("an answer is not kept: %s", error)
        if segment is None:
            kv.release()
            return
        self._names[segment] = p.writer
        while len(self._names) > MOST_NAMES:
            self._names.popitem(last=False)

    def relieve(self) -> bool:
        """Give pages back because a request needs them; False when there are none to give."""
        if self._pending:
            self._core.blocks.free(self._pending.popitem(last=False)[1].keeper)
            return True
        if self._jobs:
            self._jobs.popleft().close()
            return True
        return self.store.shrink()

    # When the engine is idle

    @property
    def has_idle_work(self) -> bool:
        return bool(self._pending or self._jobs)

    def idle_step(self) -> None:
        if self._pending:
            self._study(next(iter(self._pending)))
        elif self._jobs and next(self._jobs[0], self) is self:
            self._jobs.popleft()

    def _compare(
        self, name: str, relayed: int, tokens: list[int], n_prompt: int, hashes: list[bytes]
    ) -> Generator[None]:
        """Compute a relayed request in full, a chunk at a time, and compare the distributions of its answer's
        first tokens on the same text."""
        core, blocks, full = self._core, self._core.blocks, next(self._keepers)
        held = [relayed]
        try:
            yield
            tokens = tokens[: n_prompt + CONTINUATION]
            try:
                start = blocks.allocate(full, len(tokens), hashes, tokens).cached_tokens
            except OutOfBlocks:
                return
            held.append(full)
            asked = np.arange(n_prompt, len(tokens))
            table = np.array(blocks.table(full), np.int32)
            start = min(start, n_prompt)
            while start < n_prompt:
                end = min(n_prompt, start + core.config.max_batch_tokens)
                self._pass(tokens, np.arange(start, end), table, np.zeros(0, np.int64))
                start = end
                yield
            rows = np.arange(len(asked))
            exact = self._pass(tokens, asked, table, rows).log_softmax(-1)
            yield
            table = np.array(blocks.table(relayed), np.int32)
            got = self._pass(tokens, asked, table, rows).log_softmax(-1)
            kl = max(0.0, float((exact.exp() * (exact - got)).sum(-1).mean()))
            self._counters["relay_samples"] += 1
            self._kl_sum += kl
            self._sampled.append(kl)
            self._recent.append((name, kl))
        finally:
            for keeper in held:
                blocks.free(keeper)

    def _pass(self, tokens: list[int], at: np.ndarray, table: np.ndarray, rows: np.ndarray) -> torch.Tensor:
        logits, _ = self._forward.planned(OwnPlan(), np.array(tokens)[at], at, table, rows)
        return logits[:, : self._core.info.vocab_size].float()

    # The guard

    def _mean(self) -> float:
        return sum(self._sampled) / len(self._sampled)

    def _probing(self) -> bool:
        bound = self._settings.fallback_kl
        return bound is not None and bool(self._sampled) and self._mean() > bound

    def _fallen_back(self) -> bool:
        if not self._probing():
            self._since_fallback = 0
            return False
        self._since_fallback += 1
        return self._since_fallback % PROBE != 0

    def stats(self) -> dict[str, Any]:
        """For EngineStats."""
        store = self.store.stats()
        return {
            **self._counters,
            "relay_segments": store.segments,
            "relay_segment_bytes": store.bytes_used,
            "relay_evictions": store.evictions,
            "relay_kl_sum": self._kl_sum,
            "relay_fallen_back": self._probing(),
            "relay_recent": tuple(self._recent),
        }
