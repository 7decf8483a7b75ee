"""Words that carry meaning: what a text keeps when its function words are left out."""

from __future__ import annotations

import re
import unicodedata

_WORD = re.compile(r"\w+(?:['’+#.-]\w+)*")
# English function words, and what every question has.
_FUNCTION_WORDS = (
    "a about after again all also am an and any are as at be because been before being between but by can "
    "could did do does doing down during each few for from further get had has have having he her here "
    "hers him his how i i'm if in into is it it's its itself just me mine more most must my myself need "
    "no nor of off on once only or other our ours out over own please same shall she should so some such "
    "tell than that the their theirs them then there these they this those through to too under until up "
    "us very want was way we were what what's when where which while who whom whose why will with would "
    "you your yours"
)
_FUNCTION = frozenset(_FUNCTION_WORDS.split())


def content_words(text: str) -> list[str]:
    """Words of ``text`` in order, lower case, without English function words; all of them if none is left."""
    words = [w.casefold() for w in _WORD.findall(unicodedata.normalize("NFKC", text))]
    return [w for w in words if w not in _FUNCTION] or words


def alike(a: str, b: str) -> bool:
    """Whether two words are forms of one: equal, or with a common beginning of four letters that is most of
    the shorter one."""
    if a == b:
        return True
    short = min(len(a), len(b))
    common = next((i for i in range(short) if a[i] != b[i]), short)
    return common >= 4 and common >= 0.75 * short


def explained(words: list[str], by: list[str]) -> float:
    """Share of ``words`` that have a like word in ``by``; 1.0 of none."""
    if not words:
        return 1.0
    return sum(any(alike(w, other) for other in by) for w in words) / len(words)
