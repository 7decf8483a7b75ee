"""Prometheus metrics and the recent figures that the page shows."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from statistics import median
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..core.messages import EngineStats
from .relays import RelayCollector

_TTFT = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_ITL = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
# field of EngineStats: (metric, help); Prometheus adds _total to the name of a counter
_COUNTERS = {
    "prompt_tokens": ("prompt_tokens", "Prompt tokens submitted"),
    "computed_prompt_tokens": ("computed_prompt_tokens", "Prompt tokens that were computed"),
    "cached_prompt_tokens": ("cached_prompt_tokens", "Prompt tokens that were shared instead of computed"),
    "generated_tokens": ("generated_tokens", "Tokens generated"),
    "steps": ("steps", "Engine steps"),
    "preemptions": ("preemptions", "Sequences preempted for lack of blocks"),
    "restarts": ("engine_restarts", "Engine processes that died and were replaced"),
    "step_s": ("step_seconds", "Seconds in engine steps"),
    "forward_s": ("forward_seconds", "Seconds of these in the model's forward pass"),
}
_GAUGES = {
    "running": ("requests_running", "Sequences running"),
    "waiting": ("requests_waiting", "Sequences waiting"),
    "blocks_total": ("blocks", "Blocks of the cache"),
    "blocks_used": ("blocks_used", "Blocks that sequences reference"),
    "blocks_shared": ("blocks_shared", "Blocks that two or more sequences reference"),
    "blocks_cached": ("blocks_cached", "Free blocks whose content can still be shared"),
    "blocks_free": ("blocks_free", "Blocks that can be taken"),
    "competing_cpu": ("competing_cpu_cores", "Cores that other processes used recently"),
}


class _EngineCollector(Collector):
    """The engine's last snapshot, in Prometheus' own types: what only grows is a counter."""

    def __init__(self) -> None:
        self.stats = EngineStats()

    def collect(self) -> Iterable[Metric]:
        for field, (name, about) in _COUNTERS.items():
            yield CounterMetricFamily("sharewell_" + name, about, getattr(self.stats, field))
        for field, (name, about) in _GAUGES.items():
            yield GaugeMetricFamily("sharewell_" + name, about, getattr(self.stats, field))


class Metrics:
    """One registry a server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._engine, self._relays = _EngineCollector(), RelayCollector()
        self.registry.register(self._engine)
        self.registry.register(self._relays)

        def histogram(name: str, about: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, about, buckets=buckets, registry=self.registry)

        self.ttft = histogram("sharewell_ttft_seconds", "Time to first token", _TTFT)
        self.tpot = histogram(
            "sharewell_tpot_seconds", "Mean time per token after the first, per answer", _ITL
        )
        self.itl = histogram("sharewell_itl_seconds", "Time between tokens", _ITL)
        self.requests = Counter(
            "sharewell_requests",
            "Answers by endpoint and status",
            ["endpoint", "status"],
            registry=self.registry,
        )
        self.recent_ttft: deque[float] = deque(maxlen=256)
        self.recent_itl: deque[float] = deque(maxlen=2048)
        self._rates: deque[tuple[float, int, int]] = deque(maxlen=64)

    def first_token(self, seconds: float) -> None:
        """A request's first token came ``seconds`` after its arrival."""
        self.ttft.observe(seconds)
        self.recent_ttft.append(seconds)

    def next_token(self, seconds: float) -> None:
        """A token came ``seconds`` after the one before."""
        self.itl.observe(seconds)
        self.recent_itl.append(seconds)

    def exposition(self, stats: EngineStats) -> bytes:
        """The text that Prometheus scrapes."""
        self._engine.stats = self._relays.stats = stats
        return generate_latest(self.registry)

    def rates(self, now: float, stats: EngineStats) -> dict[str, float]:
        """Tokens per second over the last five seconds of polling; 0 at the first poll."""
        if not self._rates or now - self._rates[-1][0] >= 0.1:  # several pages may poll at once
            self._rates.append((now, stats.generated_tokens, stats.prompt_tokens))
        while len(self._rates) > 2 and now - self._rates[0][0] > 5:
            self._rates.popleft()
        then, generated, prompt = self._rates[0]
        span = now - then
        if span < 0.05:
            return {"generated_tokens_per_s": 0.0, "prompt_tokens_per_s": 0.0}
        return {
            "generated_tokens_per_s": max(0.0, (stats.generated_tokens - generated) / span),
            "prompt_tokens_per_s": max(0.0, (stats.prompt_tokens - prompt) / span),
        }

    def latency(self) -> dict[str, float | None]:
        """Recent medians, and the 95th percentile of the time to first token, in seconds; None before the
        first."""
        ttft = sorted(self.recent_ttft)
        return {
            "ttft_last_s": self.recent_ttft[-1] if ttft else None,
            "ttft_p50_s": median(ttft) if ttft else None,
            "ttft_p95_s": ttft[min(len(ttft) - 1, int(0.95 * len(ttft)))] if ttft else None,
            "itl_p50_s": median(self.recent_itl) if self.recent_itl else None,
        }


class CountAnswers:
    """ASGI middleware that counts answers by endpoint and status, what other middleware answers included."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._count(scope, message["status"])
            await send(message)

        try:
            await self.app(scope, receive, counted)
        except Exception:
            self._count(scope, 500)  # answered by the handler outside of all middleware
            raise

    def _count(self, scope: Scope, status: int) -> None:
        # Paths that are no route share one label, so that clients cannot invent labels.
        route: Any = scope.get("route")
        self.metrics.requests.labels(getattr(route, "path", "other"), str(status)).inc()
