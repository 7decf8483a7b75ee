"""Answers that were given before: the semantic cache in front of the engine.

What the exact tier compares is what the engine would get (every token of the prompt, every sampling
parameter), so nothing can be forgotten. Its answers are kept as the pieces that were shown, and a hit shows
them again: as a stream or whole, with calls and scores, under a new id.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import logging
import re
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import orjson
from prometheus_client.registry import Collector

from ...models import Embedder
from ...semantic_cache import (
    CacheSettings,
    Lookup,
    Namespace,
    SemanticCache,
    fingerprint,
)
from ...semantic_cache import Request as CacheRequest
from ...simulation import Clock
from ..core.messages import EngineRequest, TokenLogprob
from .cache_metrics import CacheCollector
from .cache_upkeep import CacheUpkeep
from .config import ServerConfig
from .keys import ApiKey

if TYPE_CHECKING:
    from .service import Piece, Usage

log = logging.getLogger(__name__)
T = TypeVar("T")
MOST_WAIT_S = 60.0  # for another request's equal answer
# says nothing about the answer
_ROUTING = ("request_id", "priority", "arrival_s", "deadline_s", "emitted", "finished", "cache_salt")
_MAX_AGE = re.compile(r"max-age\s*=\s*(\d{1,9})")


@dataclass
class CacheNote:
    """What the reply's headers say."""

    status: str = "bypass"
    reason: str = "the cache is off"
    tier: str = ""
    similarity: float = 0.0
    age_s: float = 0.0
    source: str = ""

    def headers(self) -> dict[str, str]:
        """``x-sharewell-cache`` and, of a hit, how near and how old it is and which answer it was."""
        if self.status != "hit":
            return {"x-sharewell-cache": self.status}
        return {
            "x-sharewell-cache": "hit",
            "x-sharewell-cache-tier": self.tier,
            "x-sharewell-cache-similarity": f"{self.similarity:.4f}",
            "x-sharewell-cache-source": self.source,
            "age": str(int(self.age_s)),
        }


@dataclass
class Ask:
    """What one request wants of the cache. ``question`` is compared by meaning within ``history`` (everything
    else the prompt was made of); "" for the exact tier only. ``max_tokens`` as the client gave it."""

    mode: str
    question: str = ""
    history: Any = None
    max_tokens: int | None = None
    seeded: bool = False
    look: bool = True
    store: bool = True
    max_age_s: float | None = None
    note: CacheNote = field(default_factory=CacheNote)


@dataclass(frozen=True)
class _Plan:
    request: CacheRequest
    namespace: Namespace
    semantic: bool


class Answers:
    """The server's cache. ``model`` identifies the weights, ``embedder`` loads the embedding model (in a
    thread of the cache's own, at the first request that wants the semantic tier). Raises
    CacheVersionError."""

    def __init__(
        self, config: ServerConfig, clock: Clock, model: str, embedder: Callable[[], Embedder]
    ) -> None:
        self.config, self.clock, self._model = config, clock, model
        self._load_embedder = embedder
        self._thread = ThreadPoolExecutor(1, "sharewell-cache")
        self.cache: SemanticCache | None = None
        if config.cache != "off":
            settings = CacheSettings(capacity=config.cache_entries, recheck_share=config.cache_recheck)
            self.cache = SemanticCache(config.cache_path, settings=settings, clock=clock)
            self.upkeep = CacheUpkeep(self.cache, model, clock, self._run)
        self._no_embedder = False
        self.saved_tokens = self.bypassed = 0

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def ask(self, body: Any, cache_control: str | None, **what: Any) -> Ask:
        """What a request wants: its own words first (``sharewell.cache``, Cache-Control), then the
        configuration.

        A request that would be answered anew each time (a temperature above 0 without a seed) goes past the
        cache unless it asks for it, or the operator lets it.
        """
        wanted = body.sharewell.cache if body.sharewell is not None else None
        seeded = getattr(body, "seed", None) is not None
        fresh = body.temperature != 0 and not seeded
        ask = Ask(wanted or self.config.cache, seeded=seeded, **what)
        control = (cache_control or "").lower()
        if self.cache is None or ask.mode == "off":
            ask.mode = "off"
        elif fresh and wanted is None and not self.config.cache_sampled:
            ask.mode, ask.note.reason = "off", "it asks for a fresh sample"
        elif "no-store" in control:
            ask.mode, ask.note.reason = "off", "no-store"
        elif "no-cache" in control:
            ask.look, ask.note.reason = False, "no-cache"
        elif age := _MAX_AGE.search(control):
            ask.max_age_s = float(age[1])
        return ask

    def _plan(
        self, request: EngineRequest, stops: Sequence[str], keep_special: bool, key: ApiKey, ask: Ask
    ) -> _Plan:
        parts = dataclasses.asdict(request)
        for name in _ROUTING:
            parts.pop(name, None)
        prompt = ",".join(map(str, parts.pop("prompt_ids"))).encode()
        sampling = parts["sampling"]
        if not ask.seeded or sampling["temperature"] == 0:
            sampling.pop("seed")  # chosen by us, or without effect
        sampling["logit_bias"] = {str(token): bias for token, bias in sampling["logit_bias"].items()}
        sampling["max_tokens"] = ask.max_tokens  # the engine's own limit shrinks with the prompt
        context = fingerprint(parts, stops=list(stops), keep_special=keep_special, history=ask.history)
        tenant = "all" if self.config.share_scope == "all" else f"key {key.id}"
        scored = sampling["logprobs"] is not None or sampling["prompt_logprobs"] is not None
        semantic = ask.mode == "semantic" and bool(ask.question.strip()) and request.n == 1 and not scored
        exact = hashlib.blake2b(prompt, digest_size=20).hexdigest()
        return _Plan(
            CacheRequest(ask.question, exact),
            Namespace(f"key {key.id}", tenant, self._model, context),
            semantic,
        )

    async def through(
        self, request: EngineRequest, stops: Sequence[str], keep_special: bool, key: ApiKey, ask: Ask,
        usage: Usage, compute: Callable[[], AsyncGenerator[Piece]],
        again: Callable[[], AsyncGenerator[Piece]],
    ) -> AsyncGenerator[Piece]:  # fmt: skip
        """The pieces of an earlier answer, or those of ``compute``, which are kept when they are complete.
        ``again`` computes at the lowest priority what a hit is compared with."""
        cache = self.cache
        assert cache is not None
        plan = self._plan(request, stops, keep_special, key, ask)
        if plan.semantic and cache.embedder is None:
            await self._run(self._attach)
        found = await self._look(plan, ask)
        flight = (plan.namespace, plan.request)
        leads = False
        if not found.hit and ask.look:
            waiting = cache.flight.board(flight)
            leads = waiting is None
            if waiting is not None and await _landed(waiting):
                found = await self._look(plan, ask)
        if found.hit:
            pieces = self._replay(found, usage)
            self.upkeep.recheck(found, "".join(piece.text for piece in pieces), again)
            for piece in pieces:
                yield piece
            return
        kept: list[Piece] = []
        start, before = self.clock.monotonic(), (usage.prompt_tokens, usage.completion_tokens)
        left = set(range(request.n))
        try:
            async with contextlib.aclosing(compute()) as computed:
                async for piece in computed:
                    kept.append(piece)
                    if piece.finish_reason is not None:
                        left.discard(piece.index)
                        if not left and ask.store:
                            cost_s = self.clock.monotonic() - start
                            used = (usage.prompt_tokens - before[0], usage.completion_tokens - before[1])
                            writing = self._keep(plan, found, kept, cost_s, used, request.request_id)
                            if writing is not None and leads:
                                leads = False
                                writing.add_done_callback(
                                    lambda done: cache.flight.land(
                                        flight, not done.exception() and done.result()
                                    )
                                )
                    yield piece
        finally:
            if leads:
                cache.flight.land(flight, None)

    def _attach(self) -> None:
        """Turn the semantic tier on; where that fails requests have the exact tier, and the log says why."""
        assert self.cache is not None
        if self.cache.embedder is not None or self._no_embedder:
            return
        try:
            self.cache.attach(self._load_embedder())
        except ValueError as error:  # ModelError, or CacheVersionError
            self._no_embedder = True
            log.warning("the cache answers equal requests only: %s", error)

    async def _look(self, plan: _Plan, ask: Ask) -> Lookup:
        cache = self.cache
        assert cache is not None
        max_age_s = ask.max_age_s if ask.look else -1.0
        found = await self._run(
            lambda: cache.lookup(
                plan.request, namespace=plan.namespace, semantic=plan.semantic, max_age_s=max_age_s
            )
        )
        note = ask.note
        note.status, note.reason, note.tier = found.status, found.reason, found.tier
        note.similarity, note.age_s = found.similarity, found.age_s
        note.source = str(found.meta.get("id", ""))
        return found

    def _replay(self, found: Lookup, usage: Usage) -> list[Piece]:
        prompt, completion = found.meta["usage"]
        usage.prompt_tokens += prompt
        usage.completion_tokens += completion
        usage.cached_tokens += prompt
        self.saved_tokens += prompt + completion
        return [_piece(*fields) for fields in orjson.loads(found.response)]

    def _keep(
        self,
        plan: _Plan,
        found: Lookup,
        pieces: list[Piece],
        cost_s: float,
        used: tuple[int, int],
        answer_id: str,
    ) -> Future | None:
        """Store an answer that came to its end; one that was cut at its limit serves the same request only.

        Nobody waits for it: the next lookup stands behind it in the cache's one thread.
        """
        cache = self.cache
        assert cache is not None
        reasons = {p.finish_reason for p in pieces if p.finish_reason is not None}
        if not reasons <= {"stop", "length"}:
            return None
        body = orjson.dumps([_fields(p) for p in pieces]).decode()
        text = "".join(p.text for p in pieces)
        meta = {"usage": list(used), "id": answer_id}
        semantic = plan.semantic and reasons == {"stop"}

        def put() -> int:
            return cache.put(
                plan.request, body, namespace=plan.namespace, cost_s=cost_s, answer_text=text, meta=meta,
                semantic=semantic, looked=found,
            )  # fmt: skip

        return self._thread.submit(put)

    def stats(self) -> dict[str, Any]:
        """What the page shows."""
        if self.cache is None:
            return {"mode": "off"}
        totals = self.cache.figures.totals()

        def total(name: str) -> float:
            return sum(value for (_, counted), value in totals.items() if counted == name)

        return {
            "mode": self.config.cache,
            "entries": len(self.cache.index),
            "exact_hits": int(total("exact_hits")),
            "semantic_hits": int(total("semantic_hits")),
            "misses": int(total("misses")),
            "bypassed": self.bypassed,
            "saved_tokens": self.saved_tokens,
            "saved_s": total("saved_s"),
            "rechecked": int(total("judged")),
            "disagreed": int(total("wrong")),
            "load": self.upkeep.load,
            "fault": self.cache.fault,
        }

    def collector(self) -> Collector:
        """The same for Prometheus, by category."""
        return CacheCollector(self)

    async def stop(self) -> None:
        """Write what is pending and close the file."""
        if self.cache is not None:
            await self._run(self.cache.close)
        self._thread.shutdown()


def model_identity(folder: Path, config: ServerConfig) -> str:
    """What answers depend on besides the request: the weights (names, sizes and times of their files), how
    they are computed, and this version."""
    from ... import __version__

    engine = config.engine
    folders = [folder, *(Path(path) for path in engine.adapters.values())]
    files = [
        (file.name, stat.st_size, stat.st_mtime_ns)
        for each in folders
        for file in sorted(each.iterdir())
        if file.is_file() and (stat := file.stat())
    ]
    how = [engine.dtype, engine.device, engine.runner, sorted(engine.adapters), engine.max_model_len]
    return fingerprint(files=files, how=how, version=__version__)


async def _landed(flight: Future) -> bool:
    """Did the one who is answering the same request store its answer? False when it takes too long."""
    done, _ = await asyncio.wait([asyncio.wrap_future(flight)], timeout=MOST_WAIT_S)
    return bool(done) and bool(done.pop().result())


def _fields(piece: Piece) -> list[Any]:
    def scored(one: TokenLogprob | None) -> list[Any] | None:
        return None if one is None else [one.token_id, one.logprob, list(one.top)]

    prompt = None if piece.prompt_logprobs is None else [scored(s) for s in piece.prompt_logprobs]
    return [piece.index, piece.text, [scored(s) for s in piece.logprobs], piece.finish_reason, prompt]


def _piece(index: int, text: str, logprobs: list, reason: str | None, prompt: list | None) -> Piece:
    from .service import Piece

    def scored(one: list | None) -> TokenLogprob | None:
        return None if one is None else TokenLogprob(one[0], one[1], tuple((t, v) for t, v in one[2]))

    shown = tuple(s for s in map(scored, logprobs) if s is not None)
    return Piece(index, text, shown, reason, None if prompt is None else tuple(map(scored, prompt)))
