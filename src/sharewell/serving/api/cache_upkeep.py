"""What the server does for its answer cache beside serving: tell it of load, and check its hits."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import TYPE_CHECKING, Any

from ...semantic_cache import Lookup, SemanticCache, answers_agree, load_of
from ...simulation import Clock
from ..core.messages import EngineStats
from .errors import ApiError

if TYPE_CHECKING:
    from .service import Piece

log = logging.getLogger(__name__)
WATCH_S = 1.0


class CacheUpkeep:
    """Two tasks beside the requests. ``run`` does work in the cache's own thread."""

    def __init__(
        self,
        cache: SemanticCache,
        model: str,
        clock: Clock,
        run: Callable[[Callable[[], None]], Awaitable[Any]],
    ) -> None:
        self.cache, self.model, self.clock, self._run = cache, model, clock, run
        self._rng = random.Random(0)
        self._watching: asyncio.Task[None] | None = None
        self._checking: asyncio.Task[None] | None = None

    @property
    def load(self) -> float:
        """What the cache takes the engine's load to be, smoothed, in [0, 1]."""
        return self.cache.load.get(self.model)

    def watch(self, stats: Callable[[], Awaitable[EngineStats]], most: int) -> None:
        """Tell the cache every second how busy the engine is: ``most`` requests are no load yet, twice as
        many are full load (see :func:`load_of`; the cache smooths it over 30 s)."""
        self._watching = asyncio.create_task(self._watch(stats, most))

    async def _watch(self, stats: Callable[[], Awaitable[EngineStats]], most: int) -> None:
        while True:
            if self.cache.embedder is not None:  # the exact tier knows no load
                now = await stats()
                self.cache.set_load(self.model, load_of(now.running + now.waiting, most))
            await self.clock.sleep_until(self.clock.monotonic() + WATCH_S)

    def recheck(self, found: Lookup, given: str, again: Callable[[], AsyncGenerator[Piece]]) -> None:
        """Have a sampled share of the hits in other words answered by ``again`` as well, one at a time;
        ``given`` is what the hit said. Nobody waits for it."""
        if found.tier != "semantic" or self._rng.random() >= self.cache.settings.recheck_share:
            return
        if self._checking is None or self._checking.done():
            self._checking = asyncio.create_task(self._compare(found, given, again))

    async def _compare(self, found: Lookup, given: str, again: Callable[[], AsyncGenerator[Piece]]) -> None:
        kept: list[Piece] = []
        try:
            async with contextlib.aclosing(again()) as pieces:
                async for piece in pieces:
                    kept.append(piece)
        except ApiError as error:  # the engine refused or failed: nothing was learnt
            log.info("a cached answer could not be compared: %s", error)
            return
        if not kept or kept[-1].finish_reason != "stop":
            return
        fresh = "".join(piece.text for piece in kept)

        def judge() -> None:
            if self.cache.embedder is None:
                return
            self.cache.judge(found, answers_agree(given, fresh, self.cache.embedder.embed))
            moved = self.cache.follow(found.category)
            if moved is not None:
                log.info("cache: category %s now needs %s", found.category, moved.threshold or "equality")

        await self._run(judge)

    async def rest(self) -> None:
        """Stop both; the engine is about to end."""
        for task in (self._watching, self._checking):
            if task is not None:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
