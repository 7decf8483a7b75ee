"""The rules of one category: how alike, how old, how many, and for whom."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

Scope = Literal["user", "tenant", "global"]
SCOPES = ("user", "tenant", "global")  # narrowest first
DAY_S = 86_400.0
DEFAULT = "default"


@dataclass(frozen=True)
class CategoryPolicy:
    """Rules of one category (arXiv 2510.26835); raises ValueError naming the field and its range.

    ``threshold``: least cosine of a hit, a similarity in (0, 1] and never a distance; ``floor``: how low load
    may push it; ``load_delta`` and ``load_beta``: how much of the threshold and of the lifetime full load
    gives away; ``quota``: share of the capacity; ``scope``: who may share an answer; ``strict``: load changes
    nothing; ``enabled=False`` bypasses the cache, ``semantic=False`` leaves the exact tier only;
    ``max_wrong``: wrong hits that calibration may allow.
    """

    threshold: float = 0.9
    ttl_s: float = DAY_S
    quota: float = 0.15
    floor: float | None = None
    load_delta: float = 0.0
    load_beta: float = 0.0
    scope: Scope = "tenant"
    strict: bool = False
    enabled: bool = True
    semantic: bool = True
    max_wrong: float = 0.02

    def __post_init__(self) -> None:
        def check(ok: bool, field: str, allowed: str) -> None:
            if not ok:
                raise ValueError(f"{field} must be {allowed}, got {getattr(self, field)!r}")

        check(0 < self.threshold <= 1, "threshold", "a cosine similarity in (0, 1]")
        check(self.ttl_s > 0, "ttl_s", "above 0")
        check(0 < self.quota <= 1, "quota", "in (0, 1]")
        check(self.floor is None or 0 < self.floor <= self.threshold, "floor", "None or in (0, threshold]")
        check(0 <= self.load_delta < 1, "load_delta", "in [0, 1)")
        check(0 <= self.load_beta <= 100, "load_beta", "in [0, 100]")
        check(self.scope in SCOPES, "scope", "user, tenant or global")
        check(0 < self.max_wrong < 1, "max_wrong", "in (0, 1)")

    def threshold_at(self, load: float) -> float:
        """tau_c(t) of the card's equation 6; ``load`` in [0, 1]."""
        if self.strict or not self.load_delta:
            return self.threshold
        floor = self.threshold - self.load_delta if self.floor is None else self.floor
        return max(floor, self.threshold - self.load_delta * load, 1e-6)

    def ttl_at(self, load: float) -> float:
        """ttl_c(t) in seconds."""
        return self.ttl_s if self.strict else self.ttl_s * (1 + self.load_beta * load)

    def calibrated(self, threshold: float | None, floor: float | None = None) -> CategoryPolicy:
        """With a certified threshold (None: exact only) and how low load may push it, where load may at
        all."""
        if threshold is None:
            return replace(self, semantic=False, floor=None)
        if floor is None or floor >= threshold or not self.load_delta:
            return replace(self, semantic=True, threshold=threshold, floor=None)
        delta = threshold - floor
        return replace(self, semantic=True, threshold=threshold, floor=floor, load_delta=delta)

    def stricter(self, other: CategoryPolicy) -> CategoryPolicy:
        """The stricter of both in every field: what holds when it is not clear which category it is."""
        narrow = min(self.scope, other.scope, key=SCOPES.index)
        return replace(
            self,
            threshold=max(self.threshold, other.threshold),
            floor=None,
            ttl_s=min(self.ttl_s, other.ttl_s),
            load_delta=0.0,
            load_beta=0.0,
            scope=narrow,
            strict=self.strict or other.strict,
            enabled=self.enabled and other.enabled,
            semantic=self.semantic and other.semantic,
            max_wrong=min(self.max_wrong, other.max_wrong),
        )


#: Starting points for all-MiniLM-L6-v2; thresholds belong to an embedder and to your traffic: calibrate.
DEFAULT_POLICIES: Mapping[str, CategoryPolicy] = {
    "code": CategoryPolicy(0.92, 30 * DAY_S, 0.30, load_delta=0.03, load_beta=1.0),
    "reference": CategoryPolicy(0.88, 7 * DAY_S, 0.25, load_delta=0.04, load_beta=1.0),
    "chat": CategoryPolicy(0.80, DAY_S, 0.15, load_delta=0.05, load_beta=1.0, scope="user"),
    "live": CategoryPolicy(0.95, 60.0, 0.05, strict=True),
    "sensitive": CategoryPolicy(0.95, DAY_S, 0.05, strict=True, scope="user"),
    "tools": CategoryPolicy(1.0, DAY_S, 0.05, strict=True, scope="user", semantic=False),
    DEFAULT: CategoryPolicy(0.90, DAY_S, 0.15, strict=True),
}


def checked_policies(policies: Mapping[str, CategoryPolicy]) -> dict[str, CategoryPolicy]:
    """``policies`` with a default. Raises ValueError for quotas that sum above 1, or what is no policy."""
    out = dict(policies)
    for name, policy in out.items():
        if not isinstance(policy, CategoryPolicy):
            raise ValueError(f"policies[{name!r}] must be a CategoryPolicy, got {type(policy).__name__}")
        if not name or len(name) > 64:
            raise ValueError(f"policies: a category's name must have 1 to 64 characters, got {name!r:.80}")
    left = 1.0 - sum(p.quota for p in out.values())
    if left < -1e-9:
        raise ValueError(f"quota: the categories' quotas must sum to at most 1, got {1 - left:.3f}")
    if DEFAULT not in out:
        if left < 0.01:
            raise ValueError(f"quota: nothing is left for the category {DEFAULT!r}; name it or leave 0.01")
        out[DEFAULT] = CategoryPolicy(0.9, DAY_S, min(0.15, left), strict=True)
    return out
