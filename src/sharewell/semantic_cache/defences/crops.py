"""A paraphrase is near in its parts, too; a suffix collision rests on its suffix.

Ours, in answer to the attack of arXiv 2601.23088. A mitigation, not a guarantee.
"""

from __future__ import annotations

import zlib

import numpy as np
from numpy.typing import NDArray

from ..base import Context, Entry, Query, Verdict
from .scored import ScoredDefence
from .words import content_words

MAX_CROPS = 4
WINDOW = 3
# Every content word lies in a window; a text that would need more of them stays in the exact tier.
MAX_WINDOWS = 64


def crops(text: str, m: int = MAX_CROPS) -> list[str]:
    """The first ``m`` of: first half, last half, first two thirds, 70 % of the words (drawn by the text's
    hash)."""
    words = text.split()
    n = len(words)
    half = max(1, (n + 1) // 2)
    drawn = np.random.default_rng(zlib.crc32(text.encode())).permutation(n)[: max(1, round(0.7 * n))]
    parts = [
        words[:half],
        words[-half:],
        words[: max(1, round(n * 2 / 3))],
        [words[i] for i in sorted(drawn)],
    ]
    return [" ".join(part) for part in parts[:m]]


def windows(text: str) -> list[str]:
    """All runs of three content words, or every second or third run of a long text; the whole of a short
    one."""
    words = content_words(text)
    if len(words) <= WINDOW:
        return [" ".join(words)]
    starts = range(len(words) - WINDOW + 1)
    step = 1 if len(starts) <= MAX_WINDOWS else 2 if len(starts) <= 2 * MAX_WINDOWS else WINDOW
    return [" ".join(words[i : i + WINDOW]) for i in sorted({*starts[::step], starts[-1]})]


class CropConsistency(ScoredDefence):
    """Two scores. ``agreement``: the median over the query's ``m`` crops of the greatest similarity to one of
    the entry's. ``weakest part``: the least similarity of three consecutive content words of the entry to the
    query; words that ask for something else are such a part, wherever they stand and whatever follows.

    An entry's crops are embedded once, at admission, and stored with it; the query's only for a candidate,
    and a miss costs nothing. With ``m`` 0 there is only the weakest part, and a candidate costs nothing
    either. An entry without stored crops (older than this defence) is embedded at the hit. Default thresholds
    are for all-MiniLM-L6-v2: calibrate. Raises ValueError for ``m`` outside [0, 4].
    """

    name = "crop"

    def __init__(self, m: int = MAX_CROPS, tau: float = 0.45, tau_part: float = 0.4) -> None:
        if not 0 <= m <= MAX_CROPS:
            raise ValueError(f"m must be in [0, {MAX_CROPS}], got {m}")
        self.m = m
        self.score_names = ("agreement", "weakest part") if m else ("weakest part",)
        super().__init__((tau, tau_part) if m else (tau_part,))

    def admit(self, entry: Entry, context: Context) -> Verdict:
        """Embed the entry's crops and parts. A text of too many parts is refused."""
        parts = windows(entry.text)
        if len(parts) > MAX_WINDOWS + 1:
            return Verdict(False, f"crop: more than {MAX_WINDOWS} parts")
        return Verdict(True, crops=context.embed([*crops(entry.text, self.m), *parts]))

    def scores(self, query: Query, entry: Entry, context: Context) -> tuple[float, ...]:
        """(agreement, weakest part), or the latter alone. Embeds the query's crops."""
        nothing = (-1.0,) * len(self.score_names)
        if not query.text.strip():
            return nothing
        kept = entry.crops
        # a file may hold entries that were admitted with another m
        before = -1 if kept is None else len(kept) - len(windows(entry.text))
        if kept is None or before < self.m:
            admitted = self.admit(entry, context)
            if admitted.crops is None:
                return nothing
            kept, before = admitted.crops, self.m
        whole = context.embed([query.text])[0] if query.embedding is None else query.embedding
        weakest = float((kept[before:] @ whole).min())
        if not self.m:
            return (weakest,)
        asked: NDArray[np.float32] = context.embed(crops(query.text, self.m))
        return float(np.median((asked @ kept[: self.m].T).max(axis=1))), weakest
