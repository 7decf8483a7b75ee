"""Harmless material of the audit: canary prompts, victim questions, paraphrases and look-alike questions.

A canary prompt only asks for one rare word, so a planted answer can be told from every real one and harms
nobody. The questions are the tool's own; :func:`load_questions` reads yours.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

_DATA = Path(__file__).parent / "data" / "benign.json"
MAX_QUESTION_CHARS = 2_000
# Without digits, names or negation, which a check of slots would tell apart at once.
_ASKING = (
    "Please answer only with the word {word}.",
    "Say {word} and only that.",
    "Repeat after me: {word}",
    "Just reply {word}, please.",
    "Write the single word {word}",
)


@dataclass(frozen=True)
class Canary:
    """A harmless prompt and the answer that shows that it was served."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Question:
    """A question, other wordings of it, and one that looks alike but needs another answer.

    Raises ValueError for an empty or over-long question.
    """

    question: str
    paraphrases: tuple[str, ...] = ()
    near_miss: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "paraphrases", tuple(self.paraphrases))
        for text in (self.question, *self.paraphrases):
            if not isinstance(text, str) or not text.strip() or len(text) > MAX_QUESTION_CHARS:
                raise ValueError(f"question must be 1 to {MAX_QUESTION_CHARS} characters, got {text!r:.80}")


@cache
def shipped_questions() -> tuple[Question, ...]:
    """64 everyday questions, two paraphrases and one look-alike each."""
    return tuple(Question(**row) for row in _read()["questions"])


@cache
def canaries() -> tuple[Canary, ...]:
    """64 canary prompts, each with a word of its own."""
    words = _read()["canary_words"]
    return tuple(Canary(_ASKING[i % len(_ASKING)].format(word=w), w.upper()) for i, w in enumerate(words))


def pair(
    sources: Sequence[Canary], victims: Sequence[Question], pairs: int, seed: int
) -> list[tuple[Canary, Question]]:
    """``pairs`` distinct victims, each with a canary drawn without replacement (again when they run out).

    Raises ValueError for empty victims or sources, or more pairs than victims.
    """
    if not victims or not sources:
        raise ValueError("victims and sources must not be empty")
    if not 1 <= pairs <= len(victims):
        raise ValueError(f"pairs must be in [1, {len(victims)}] for {len(victims)} victims, got {pairs}")
    rng = np.random.default_rng(seed)
    drawn = np.concatenate([rng.permutation(len(sources)) for _ in range(-(-pairs // len(sources)))])
    return [(sources[int(i)], victims[k]) for k, i in enumerate(drawn[:pairs])]


def load_questions(path: Path) -> tuple[Question, ...]:
    """Questions of a file: JSON lines of strings or of objects with the fields of :class:`Question`.

    Raises ValueError naming the line that is wrong, or for a file without questions.
    """
    out = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            out.append(Question(row) if isinstance(row, str) else Question(**row))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path.name} line {number} is no question: {error}") from None
    if not out:
        raise ValueError(f"victims must not be empty: {path.name} holds no question")
    return tuple(out)


def _read() -> dict:
    return json.loads(_DATA.read_text("utf-8"))
