"""What a lookup answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .policy import CategoryPolicy


@dataclass(frozen=True)
class Lookup:
    """``status`` is "hit", "miss" or "bypass" (nobody looked), ``tier`` "exact" or "semantic" of a hit, and
    ``reason`` why in words. ``similarity``: cosine of the entry, or of the nearest that was not good enough;
    ``age_s``: of the entry; ``timings``: seconds of embed, search and fetch. A miss carries what :meth:`put`
    needs again: give it back there.
    """

    status: str
    reason: str
    category: str
    policy: CategoryPolicy
    tier: str = ""
    response: str = ""
    similarity: float = 0.0
    age_s: float = 0.0
    entry_id: int = 0
    entry_text: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)
    cost_s: float = 0.0
    timings: Mapping[str, float] = field(default_factory=dict)
    embedding: NDArray[np.float32] | None = field(default=None, repr=False, compare=False)

    @property
    def hit(self) -> bool:
        """True when ``response`` is an answer."""
        return self.status == "hit"
