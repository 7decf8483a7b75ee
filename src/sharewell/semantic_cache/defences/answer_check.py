"""An answer belongs to its question: checked when it is stored."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ..base import Context, Entry, Query, Verdict
from .crops import crops
from .words import content_words


class AnswerCheck:
    """At admission the answer must be nearer to its own question, or a crop of it, than to most of ``pool``.

    ``pool`` are other questions; ``share`` of them must be farther. ``judge(query, answer)`` is asked, if
    given, at hits whose similarity is less than ``borderline`` above the threshold. An entry whose plain
    answer the caller did not give (``answer_text``) is admitted unchecked. Raises ValueError for fewer than 8
    pool questions.
    """

    name = "answer"

    def __init__(
        self,
        pool: Sequence[str],
        share: float = 0.9,
        judge: Callable[[str, str], bool] | None = None,
        borderline: float = 0.02,
    ) -> None:
        if len(pool) < 8:
            raise ValueError(f"pool must have at least 8 questions, got {len(pool)}")
        if not 0 < share <= 1:
            raise ValueError(f"share must be in (0, 1], got {share}")
        self.pool, self.share, self.judge, self.borderline = tuple(pool), share, judge, borderline
        self._vectors: np.ndarray | None = None

    def admit(self, entry: Entry, context: Context) -> Verdict:
        """Refuse an answer that is no nearer to its question than to others; ``score`` is the margin."""
        if not entry.answer_text.strip():
            return Verdict(True, "answer: not given")
        if self._vectors is None:
            self._vectors = context.embed(self.pool)
        # crops of function words alone ("how do I") are near to anything
        parts = crops(" ".join(content_words(entry.text)))
        answer, *own = context.embed([entry.answer_text, entry.text, *(part for part in parts if part)])
        others = float(np.quantile(self._vectors @ answer, self.share))
        margin = float(max(np.dot(answer, vector) for vector in own)) - others
        return Verdict(margin >= 0, "" if margin >= 0 else "answer: not about its question", margin)

    def accept(self, query: Query, entry: Entry, context: Context) -> Verdict:
        """Ask the judge about a borderline hit."""
        if self.judge is None or context.similarity - context.threshold >= self.borderline:
            return Verdict(True)
        ok = bool(self.judge(query.text, entry.answer_text or entry.response))
        return Verdict(ok, "" if ok else "answer: the judge said no")
