"""What the cache counts: per category, in memory first, in the file every second."""

from __future__ import annotations

import threading
from collections import defaultdict
from typing import Any

from .policy import CategoryPolicy

EVERYTHING = ""  # the category of what belongs to none


class Figures:
    """Counters by (category, name). ``drain`` hands over what came since; totals go on growing."""

    def __init__(self) -> None:
        self._total: dict[tuple[str, str], float] = defaultdict(float)
        self._fresh: dict[tuple[str, str], float] = defaultdict(float)
        self._lock = threading.Lock()

    def add(self, category: str, name: str, value: float = 1.0) -> None:
        """Count."""
        with self._lock:
            self._total[category, name] += value
            self._fresh[category, name] += value

    def drain(self) -> dict[tuple[str, str], float]:
        """What was counted since the last call."""
        with self._lock:
            fresh, self._fresh = dict(self._fresh), defaultdict(float)
        return fresh

    def totals(self) -> dict[tuple[str, str], float]:
        """Everything counted by this process."""
        with self._lock:
            return dict(self._total)


def by_category(
    counters: dict[tuple[str, str], float], held: dict[str, int], policies: dict[str, CategoryPolicy]
) -> dict[str, dict[str, Any]]:
    """The table that ``report`` shows: one row a category that has a policy, an entry or a count."""
    names = sorted({c for c, _ in counters if c} | set(held) | set(policies))
    out = {}
    for name in names:
        mine = {what: value for (c, what), value in counters.items() if c == name}
        hits = mine.get("exact_hits", 0.0) + mine.get("semantic_hits", 0.0)
        lookups = hits + mine.get("misses", 0.0)
        judged = mine.get("judged", 0.0)
        policy = policies.get(name)
        out[name] = {
            "entries": held.get(name, 0),
            "lookups": int(lookups),
            "exact_hits": int(mine.get("exact_hits", 0)),
            "semantic_hits": int(mine.get("semantic_hits", 0)),
            "hit_rate": hits / lookups if lookups else 0.0,
            "wrong_rate": mine.get("wrong", 0.0) / judged if judged else None,
            "judged": int(judged),
            "saved_s": mine.get("saved_s", 0.0),
            "evicted": int(mine.get("evicted", 0)),
            "expired": int(mine.get("expired", 0)),
            "refused": {w[8:]: int(v) for w, v in mine.items() if w.startswith("refused:")},
            "threshold": policy.threshold if policy and policy.semantic else None,
            "ttl_s": policy.ttl_s if policy else None,
            "scope": policy.scope if policy else None,
        }
    return out
