"""What an audit found, as values and as JSON."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..calibration import lower_bound, upper_bound
from .timing import TimingLeak

FORMAT = "sharewell-cache-audit-1"


@dataclass(frozen=True)
class Rate:
    """``count`` of ``n`` with the two-sided 95 % Clopper-Pearson interval ``[low, high]``; of none it is
    [0, 1]."""

    count: int
    n: int

    def __post_init__(self) -> None:
        if not 0 <= self.count <= self.n:
            raise ValueError(f"count must be in [0, {self.n}], got {self.count}")

    @property
    def value(self) -> float:
        return self.count / self.n if self.n else 0.0

    @property
    def low(self) -> float:
        return lower_bound(self.count, self.n, 0.975) if self.n else 0.0

    @property
    def high(self) -> float:
        return upper_bound(self.count, self.n, 0.975) if self.n else 1.0

    def to_dict(self) -> dict[str, float]:
        return {"count": self.count, "n": self.n, "rate": self.value, "low": self.low, "high": self.high}

    def __str__(self) -> str:
        interval = f"{100 * self.low:.1f}-{100 * self.high:.1f}"
        return f"{100 * self.value:.1f} % ({self.count} of {self.n}; 95 %: {interval})"


@dataclass(frozen=True)
class PairResult:
    """One attempt: did the key collide (``similarity`` reached the threshold), was the entry admitted for
    others, and was the victim ``served`` the canary? ``adaptive``: the attacker knew the defences."""

    source: str
    victim: str
    text: str
    similarity: float
    threshold: float
    adaptive: bool
    collided: bool
    admitted: bool
    served: bool
    steps: int
    reason: str = ""


@dataclass(frozen=True)
class DefenceResult:
    """A set of defences: hijack rates of the attacker who knows nothing of them and of the adaptive one, what
    it costs in benign hits, and added milliseconds on a candidate hit and on a miss (medians)."""

    name: str
    hijacked: Rate
    hijacked_adaptive: Rate
    benign_hits: Rate
    wrong_hits: Rate
    same_owner_hits: Rate
    candidate_ms: float
    miss_ms: float
    pairs: tuple[PairResult, ...] = field(default=(), repr=False)

    @property
    def risk(self) -> Rate:
        """The worse of both attackers' rates."""
        return max(self.hijacked, self.hijacked_adaptive, key=lambda r: (r.value, r.n))

    def lost(self, undefended: DefenceResult) -> float:
        """Share of the undefended benign hits that this set loses."""
        return (
            1 - self.benign_hits.count / undefended.benign_hits.count if undefended.benign_hits.count else 0.0
        )


@dataclass(frozen=True)
class AuditReport:
    """``results``: one for each set of defences; ``configured`` names the cache's own. ``mode``: "white box",
    "transfer" or "black box". ``partial``: the time budget ended it; its intervals say what is not known."""

    results: tuple[DefenceResult, ...]
    configured: str
    mode: str
    threshold: float
    planned_pairs: int
    partial: bool
    control: Rate
    exact_tier: Rate
    timing: TimingLeak | None
    seed: int
    embedder: str
    spent_s: float
    notes: tuple[str, ...] = ()

    def result(self, name: str) -> DefenceResult:
        """The result of a set of defences. Raises ValueError for one that was not audited."""
        for result in self.results:
            if result.name == name:
                return result
        raise ValueError(f"name must be one of {', '.join(r.name for r in self.results)}; got {name!r}")

    @property
    def risk(self) -> float:
        """The cache's own hijack rate; of a partial audit the upper end of its interval."""
        rate = self.result(self.configured).risk
        return rate.high if self.partial or not rate.n else rate.value

    def to_dict(self, *, reveal: bool = False) -> dict[str, Any]:
        """JSON values. Attack texts are replaced by a hash unless ``reveal``."""
        results = []
        for result in self.results:
            row: dict[str, Any] = {
                name: value.to_dict() if isinstance(value, Rate) else value
                for name, value in vars(result).items()
                if name != "pairs"
            }
            row["lost_benign_hits"] = result.lost(self.results[0])
            row["pairs"] = [_shown(asdict(pair), reveal) for pair in result.pairs]
            results.append(row)
        return {
            "format": FORMAT,
            "configured": self.configured,
            "risk": self.risk,
            "mode": self.mode,
            "threshold": self.threshold,
            "planned_pairs": self.planned_pairs,
            "partial": self.partial,
            "control": self.control.to_dict(),
            "exact_tier": self.exact_tier.to_dict(),
            "timing": None if self.timing is None else asdict(self.timing),
            "seed": self.seed,
            "embedder": self.embedder,
            "spent_s": self.spent_s,
            "notes": list(self.notes),
            "results": results,
        }

    def to_json(self, *, reveal: bool = False) -> str:
        """:meth:`to_dict` as text."""
        return json.dumps(self.to_dict(reveal=reveal), indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    def to_html(self, *, reveal: bool = False) -> str:
        """One self-contained page for a security team."""
        from .html import render

        return render(self, reveal=reveal)


def digest(text: str) -> str:
    """How an attack text is named where it is not revealed."""
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()[:16]


def _shown(pair: Mapping[str, Any], reveal: bool) -> dict[str, Any]:
    return dict(pair) if reveal else {**pair, "text": digest(str(pair["text"]))}
