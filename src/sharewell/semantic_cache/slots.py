"""The slot verifier: what a sentence embedding blurs must agree word for word.

Cosine similarity hardly sees a swapped number, a ``not``, another name or another identifier. These are the
slots that fix an answer, so they are compared as text: microseconds, and only for candidates of a hit.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from .base import Context, Entry, Query, Verdict

_NUMBER = re.compile(r"(?<![\w.])[-+]?\d+(?:[.,:/]\d+)*")
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")


def _words(text: str) -> list[str]:
    return text.split()


_NUMBER_WORDS = {
    word: str(value)
    for value, word in enumerate(
        _words(
            "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"
            " sixteen seventeen eighteen nineteen twenty"
        )
    )
    if word != "one"  # more often a pronoun than a number
}  # fmt: skip
_NUMBER_WORDS |= {"thirty": "30", "forty": "40", "fifty": "50", "hundred": "100", "thousand": "1000"}
_NUMBER_WORDS |= {"half": "1/2", "twice": "2", "double": "2", "triple": "3", "dozen": "12"}
_NEGATIONS = frozenset(
    _words(
        "not no never none nobody nothing neither nor without cannot except unless avoid against refuse stop"
    )
)
_OPPOSITES = (
    ("before", "after"), ("first", "last"), ("minimum", "maximum"), ("min", "max"), ("lowest", "highest"),
    ("smallest", "largest"), ("increase", "decrease"), ("enable", "disable"), ("start", "stop"),
    ("open", "close"), ("read", "write"), ("encode", "decode"), ("encrypt", "decrypt"),
    ("upload", "download"),
    ("import", "export"), ("install", "uninstall"), ("add", "remove"), ("left", "right"), ("up", "down"),
    ("input", "output"), ("client", "server"), ("push", "pull"), ("buy", "sell"), ("above", "below"),
    ("ascending", "descending"), ("safe", "unsafe"), ("legal", "illegal"), ("cheapest", "dearest"),
    ("oldest", "newest"), ("shortest", "longest"), ("more", "less"), ("most", "least"), ("hot", "cold"),
)  # fmt: skip
_OPPOSITE = {a: b for pair in _OPPOSITES for a, b in (pair, pair[::-1])}
# backticks, dotted or underscored names, calls, paths, CamelCase, names with digits in them
_IDENTIFIER = re.compile(
    r"`[^`]+`|\b[A-Za-z]\w*(?:\.\w+)+\b|\b\w*[a-zA-Z]_\w+|\b\w+\(\)|(?<!\w)/[\w./-]{2,}|(?<!\w)--?[a-z][\w-]+"
    r"|\b[a-z]+[A-Z]\w*|\b[A-Z][a-z]+[A-Z]\w*|\b(?=\w*[a-zA-Z])(?=\w*\d)\w+\b"
)
_SENTENCE = re.compile(r"(?:^|[.!?:]\s+|\n)\W*")
_PRONOUNS = frozenset({"i", "i'm", "i'd", "i've", "i'll"})


@dataclass(frozen=True)
class Slots:
    """What was found in one text; ``names`` and ``identifiers`` in lower case."""

    numbers: tuple[str, ...]
    negated: bool
    names: frozenset[str]
    identifiers: frozenset[str]
    words: frozenset[str]


@lru_cache(maxsize=4096)
def slots(text: str) -> Slots:
    """The slots of a text."""
    words = [w.replace("’", "'").lower() for w in _WORD.findall(text)]
    numbers = [n.lstrip("+").replace(",", "") for n in _NUMBER.findall(text)]
    numbers += [_NUMBER_WORDS[w] for w in words if w in _NUMBER_WORDS]
    starts = {match.end() for match in _SENTENCE.finditer(text)}
    names = {
        match.group().lower().removesuffix("'s").removesuffix("’s")
        for match in _WORD.finditer(text)
        if match.group()[0].isupper()
        # the first word of a sentence is upper case anyhow, unless it is so throughout
        and (match.start() not in starts or (match.group().isupper() and len(match.group()) > 1))
        and match.group().lower().replace("’", "'") not in _PRONOUNS
    }
    return Slots(
        tuple(sorted(numbers)),
        any(w in _NEGATIONS or w.endswith("n't") for w in words),
        frozenset(names),
        frozenset(i.strip("`").removesuffix("()").lower() for i in _IDENTIFIER.findall(text)),
        frozenset(w.removesuffix("'s") for w in words),
    )


def disagreement(a: str, b: str) -> str:
    """What differs between two texts: "numbers", "negation", "names", "identifiers", "opposites", or "" when
    nothing does."""
    x, y = slots(a), slots(b)
    if x.numbers != y.numbers:
        return "numbers"
    if x.negated != y.negated:
        return "negation"
    if x.identifiers != y.identifiers:
        # an identifier written without its code marks counts as there
        loose_a, loose_b = a.lower(), b.lower()
        missing = [i for i in x.identifiers - y.identifiers if i not in loose_b]
        missing += [i for i in y.identifiers - x.identifiers if i not in loose_a]
        if missing:
            return "identifiers"
    if not (x.names <= y.words and y.names <= x.words):
        return "names"
    for word in x.words - y.words:
        if _OPPOSITE.get(word) in y.words - x.words:
            return "opposites"
    return ""


class SlotVerifier:
    """The defence that lets only candidates through whose slots agree with the question's."""

    name = "slots"

    def admit(self, entry: Entry, context: Context) -> Verdict:
        """Every entry."""
        return Verdict(True)

    def accept(self, query: Query, entry: Entry, context: Context) -> Verdict:
        """See :func:`disagreement`."""
        found = disagreement(query.text, entry.text)
        return Verdict(not found, f"{found} differ" if found else "")
