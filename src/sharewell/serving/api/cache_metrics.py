"""The answer cache in Prometheus' form."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from .answers import Answers


class CacheCollector(Collector):
    """Counts by category, from the cache's own figures."""

    def __init__(self, answers: Answers) -> None:
        self._answers = answers

    def collect(self) -> Iterable[Metric]:
        cache = self._answers.cache
        lookups = CounterMetricFamily(
            "sharewell_cache_lookups", "Lookups in the answer cache", labels=["result", "category"]
        )
        refused = CounterMetricFamily(
            "sharewell_cache_refused", "Candidates that a defence refused", labels=["defence"]
        )
        again = CounterMetricFamily(
            "sharewell_cache_reanswered",
            "Answers to other words that the engine computed as well, by whether it agreed",
            labels=["agree"],
        )
        judged = wrong = 0.0
        seconds, by_defence = 0.0, dict[str, float]()
        for (category, name), value in (cache.figures.totals() if cache is not None else {}).items():
            result = {"exact_hits": "exact", "semantic_hits": "semantic", "misses": "miss"}.get(name)
            if result is not None:
                lookups.add_metric([result, category], value)
            elif name.startswith("refused:"):
                by_defence[name[8:]] = by_defence.get(name[8:], 0.0) + value
            elif name == "judged":
                judged += value
            elif name == "wrong":
                wrong += value
            elif name == "saved_s":
                seconds += value
        for defence, value in by_defence.items():
            refused.add_metric([defence], value)
        again.add_metric(["true"], judged - wrong)
        again.add_metric(["false"], wrong)
        yield again
        yield GaugeMetricFamily(
            "sharewell_cache_load",
            "Load of the engine as the cache sees it, in [0, 1]",
            self._answers.upkeep.load if cache is not None else 0.0,
        )
        yield lookups
        yield refused
        yield CounterMetricFamily(
            "sharewell_cache_bypassed", "Requests that went past the answer cache", self._answers.bypassed
        )
        yield CounterMetricFamily(
            "sharewell_cache_saved_tokens",
            "Tokens of answers that were not computed",
            self._answers.saved_tokens,
        )
        yield CounterMetricFamily(
            "sharewell_cache_saved_seconds", "Seconds that they took when they were computed", seconds
        )
        entries = len(cache.index) if cache is not None else 0
        yield GaugeMetricFamily("sharewell_cache_entries", "Answers in the cache", entries)
        recall = cache.recall()[0] if cache is not None else None
        if recall is not None:
            yield GaugeMetricFamily(
                "sharewell_cache_index_recall", "Share of the true neighbours that the index finds", recall
            )
