"""Sets of defences by name, calibrated, for the audit to compare."""

from __future__ import annotations

from collections.abc import Sequence

from ...models import Embedder
from ..base import Defence
from ..defences import (
    AnswerCheck,
    BenignPair,
    CropConsistency,
    RarityScreen,
    ScopeGuard,
    SecondOpinion,
    calibrate_defences,
    default_defences,
)
from .sources import Question

NAMES = ("none", "scope", "crop", "second", "rarity", "answer", "default")
DEFAULT_SETS = ("none", "default", "scope", "crop", "second", "crop+second")


def benign_pairs(questions: Sequence[Question]) -> list[BenignPair]:
    """Every wording as stored, every other wording of the same question as asked."""
    out = []
    for question in questions:
        wordings = (question.question, *question.paraphrases)
        out += [BenignPair(a, b) for a in wordings for b in wordings if a != b]
    return out


def halves(questions: Sequence[Question]) -> tuple[list[Question], list[Question]]:
    """(to calibrate with, to measure with): a threshold is never judged by the pairs that chose it."""
    return list(questions[::2]), list(questions[1::2])


def build_defences(
    spec: str, embedder: Embedder, threshold: float, questions: Sequence[Question], max_hit_loss: float = 0.08
) -> list[Defence]:
    """The defences of ``spec``, names joined by "+", with thresholds from the benign pairs of ``questions``.

    ``max_hit_loss`` is below the 10 % that the measuring half may lose, so that chance has some room. With
    fewer than 20 benign hits the shipped thresholds stay, and those of "default" always do. Raises ValueError
    for an unknown name.
    """
    names = [name for name in spec.split("+") if name != "none"]
    unknown = sorted(set(names) - set(NAMES))
    if unknown or not spec or ("default" in names and len(names) > 1):
        raise ValueError(
            f"defences must be of {', '.join(NAMES)}, joined by + (but for default); got {spec!r}"
        )
    if names == ["default"]:
        return default_defences(embedder)
    texts = [t for q in questions for t in (q.question, *q.paraphrases)]
    makers = {
        "scope": ScopeGuard,
        "crop": CropConsistency,
        "second": SecondOpinion,
        "rarity": lambda: RarityScreen(texts),
        "answer": lambda: AnswerCheck([q.question for q in questions]),
    }
    made: list[Defence] = [makers[name]() for name in dict.fromkeys(names)]
    scored = [d for d in made if isinstance(d, CropConsistency | SecondOpinion)]
    if scored:
        try:
            calibrate_defences(
                embedder, benign_pairs(questions), scored, threshold=threshold, max_hit_loss=max_hit_loss
            )
        except ValueError as error:
            if "at least 20 hits" not in str(error):
                raise
    return made
