"""Settings of an audit."""

from __future__ import annotations

from dataclasses import dataclass, field

from .generator import SearchConfig

MAX_PAIRS = 10_000


@dataclass(frozen=True)
class AuditConfig:
    """What an audit does; raises ValueError naming the field and its range.

    ``threshold`` None reads it from the cache, per category. ``margin``: how far above it a text must be to
    count as found. ``lambda_ppl`` needs a perplexity (see :class:`CollisionAudit`). ``adaptive_pairs``: how
    many pairs the attacker who knows the defences gets, None for all. ``controls`` random suffixes,
    ``timing_probes`` half hits and half misses. Past ``time_budget_s`` the report is partial: it counts only
    what was tried, and its intervals are that much wider.
    """

    pairs: int = 50
    threshold: float | None = None
    margin: float = 0.01
    search: SearchConfig = field(default_factory=lambda: SearchConfig(suffix_lengths=(16, 32), batch=24))
    adaptive_search: SearchConfig = field(
        default_factory=lambda: SearchConfig(suffix_lengths=(24,), batch=24, steps=30, patience=8)
    )
    adaptive_pairs: int | None = None
    lambda_ppl: float = 0.0
    controls: int = 1_000
    timing_probes: int = 400
    seed: int = 0
    time_budget_s: float = 600.0

    def __post_init__(self) -> None:
        def check(ok: bool, name: str, allowed: str) -> None:
            if not ok:
                raise ValueError(f"{name} must be {allowed}, got {getattr(self, name)!r}")

        def whole(name: str, low: int, high: int) -> None:
            value = getattr(self, name)
            check(type(value) is int and low <= value <= high, name, f"a whole number in [{low}, {high}]")

        whole("pairs", 1, MAX_PAIRS)
        whole("controls", 0, 1_000_000)
        whole("timing_probes", 0, 100_000)
        whole("seed", 0, 2**63 - 1)
        if self.adaptive_pairs is not None:
            whole("adaptive_pairs", 0, MAX_PAIRS)
        check(self.threshold is None or 0 < self.threshold < 1, "threshold", "None or in (0, 1)")
        check(0 <= self.margin < 1, "margin", "in [0, 1)")
        check(0 <= self.lambda_ppl < float("inf"), "lambda_ppl", "at least 0")
        check(0 < self.time_budget_s < float("inf"), "time_budget_s", "above 0 and finite")
