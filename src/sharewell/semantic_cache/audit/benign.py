"""What the defences of a cache cost users who mean no harm."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from ..cache import SemanticCache
from ..lookup import Lookup
from ..namespace import Namespace
from .outcome import Rate
from .penalties import VICTIM
from .sources import Question


def benign_costs(
    cache: SemanticCache, questions: Sequence[Question]
) -> tuple[Rate, Rate, Rate, float, float]:
    """(hits of other wordings by another user, of look-alikes, by the same user; seconds of a candidate
    hit beyond embedding and search, of a miss)."""
    counts = {"other": [0, 0], "wrong": [0, 0], "own": [0, 0]}
    on_hit, on_miss = [], []
    for question in questions:
        wordings = (question.question, *question.paraphrases)
        for i, stored in enumerate(wordings):
            owner = Namespace(owner="sharewell-audit-benign")
            entry = cache.put(stored, f"benign {stored}", namespace=owner, answer_text=stored)
            asked = [("other", VICTIM, t) for t in wordings if t != stored]
            asked += [("own", owner.owner, t) for t in wordings if not i and t != stored]
            asked += [("wrong", VICTIM, question.near_miss)] if question.near_miss and not i else []
            for kind, who, text in asked:
                found: Lookup = cache.lookup(text, namespace=Namespace(owner=who))
                counts[kind][0] += found.hit and found.entry_id == entry
                counts[kind][1] += 1
                candidate = found.similarity >= found.policy.threshold
                if "fetch_s" in found.timings:
                    (on_hit if candidate else on_miss).append(found.timings["fetch_s"])
            cache.invalidate(owner=owner.owner)
    other, wrong, own = (Rate(int(counts[k][0]), counts[k][1]) for k in ("other", "wrong", "own"))
    return other, wrong, own, median(on_hit or [0.0]), median(on_miss or [0.0])
