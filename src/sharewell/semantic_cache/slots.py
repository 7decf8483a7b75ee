"""The slot verifier: what a sentence embedding blurs must agree word for word.

Cosine similarity hardly sees a swapped number, a ``not``, another name or another identifier. These are the
slots that fix an answer, so they are compared as text: microseconds, and only for candidates of a hit.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass
from difflib import SequenceMatcher
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
    ("good", "bad"), ("better", "worse"), ("best", "worst"), ("high", "low"), ("true", "false"),
    ("early", "late"), ("big", "small"), ("cheap", "expensive"), ("allow", "forbid"), ("win", "lose"),
    ("on", "off"),
)  # fmt: skip
_OPPOSITE = {a: b for pair in _OPPOSITES for a, b in (pair, pair[::-1])}
# backticks, dotted or underscored names, calls, paths, CamelCase, names with digits in them
_IDENTIFIER = re.compile(
    r"`[^`]+`|\b[A-Za-z]\w*(?:\.\w+)+\b|\b\w*[a-zA-Z]_\w+|\b\w+\(\)|(?<!\w)/[\w./-]{2,}|(?<!\w)--?[a-z][\w-]+"
    r"|\b[a-z]+[A-Z]\w*|\b[A-Z][a-z]+[A-Z]\w*|\b(?=\w*[a-zA-Z])(?=\w*\d)\w+\b"
)
# a number and what it counts: "10 degrees Celsius" is 10 Celsius
_COUNTED = re.compile(r"(\d+(?:[.,]\d+)*)\s+(?:degrees?\s+|of\s+|the\s+)*([^\W\d_]+)")
_SENTENCE = re.compile(r"(?:^|[.!?:]\s+|\n)\W*")
_PRONOUNS = frozenset({"i", "i'm", "i'd", "i've", "i'll"})
# what people say around a question, whatever it is
_COURTESY = frozenset(_words("please thanks thank hi hello hey dear cheers kindly regards sorry ok okay"))
# words that fix no answer by themselves, beside negations and opposites
_FUNCTION = frozenset(
    _words(
        "a an the this that these those my your his her its our their some any it he she they we you i me us"
        " is are was were be been am do does did have has had can could may might must shall should will"
        " would of in on at to for from by with without no not into as and or but so if what which who whose"
        " when where why how there here just right now today"
    )
)
# words that may stand for one another in a request
_ALIKE = tuple(
    frozenset(_words(line))
    for line in (
        "get fetch obtain return retrieve give tell show print display",
        "make create build generate cook bake", "remove delete erase", "check test verify",
        "convert turn change transform", "compute calculate",
        "find locate look", "begin commence start", "end finish terminate", "buy purchase",
        "fix repair solve", "big large huge", "quick fast", "maximum highest largest",
        "minimum lowest smallest",
    )
)  # fmt: skip


LEAST_ENTRIES = 100  # before any name is taken as read
MOST_PARTITIONS = 4096  # whose names are counted: every system prompt is a partition


@dataclass(frozen=True)
class Slots:
    """What was found in one text; ``names`` and ``identifiers`` in lower case, ``content``: its words in
    order without courtesies, ``counted``: numbers with what they count."""

    numbers: tuple[str, ...]
    negated: bool
    names: frozenset[str]
    identifiers: frozenset[str]
    words: frozenset[str]
    content: tuple[str, ...]
    counted: frozenset[tuple[str, str]]


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
        and match.group().lower().replace("’", "'") not in _PRONOUNS | _COURTESY
    }
    return Slots(
        tuple(sorted(numbers)),
        any(w in _NEGATIONS or w.endswith("n't") for w in words),
        frozenset(names),
        frozenset(i.strip("`").removesuffix("()").lower() for i in _IDENTIFIER.findall(text)),
        frozenset(w.removesuffix("'s") for w in words),
        tuple(w.removesuffix("'s") for w in words if w not in _COURTESY),
        frozenset((match[1].replace(",", ""), match[2].lower()) for match in _COUNTED.finditer(text)),
    )


def disagreement(a: str, b: str, customary: Collection[str] = frozenset()) -> str:
    """What differs between two texts: "numbers", "negation", "names", "identifiers", "opposites", "a word",
    or "" when nothing does. ``customary`` names (lower case) may be left out on one side."""
    x, y = slots(a), slots(b)
    if x.numbers != y.numbers or _counts_another(x, y):
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
    only_x, only_y = x.names - y.words, y.names - x.words
    if (only_x and only_y) or not (only_x | only_y) <= frozenset(customary):
        return "names"
    for word in x.words - y.words:
        if _OPPOSITE.get(word) in y.words - x.words:
            return "opposites"
    return "a word" if _substituted(x, y) else ""


def _counts_another(x: Slots, y: Slots) -> bool:
    """Both speak of the same things, but the number belongs to another of them: 5 C in F, 5 F in C."""
    of = dict(y.counted)
    return any(
        number in of and of[number] != what and what in y.words and of[number] in x.words
        for number, what in x.counted
    )


def _substituted(x: Slots, y: Slots) -> bool:
    """The texts are word for word the same but for one place, where other words stand: ``weak references to
    the keys`` and ``to the values``. How they begin and end does not count (that is where wordings differ),
    nor do inflections, misspellings and a few words that mean the same."""
    one, other = x.content, y.content
    matcher = SequenceMatcher(None, one, other, autojunk=False)
    equal = [block for block in matcher.get_matching_blocks() if block.size]
    if not equal or sum(block.size for block in equal) * 2 < min(len(one), len(other)):
        return False
    # what stands between two equal runs, or after the last
    first, ends = equal[0], [(b.a, b.b) for b in equal[1:]] + [(len(one), len(other))]
    if first.size < 2:
        return False
    changed = []
    for block, (a, b) in zip(equal, ends, strict=True):
        v, w = one[block.a + block.size : a], other[block.b + block.size : b]
        if v or w:
            changed.append((v, w))
    if len(changed) != 1:
        return False
    v, w = changed[0]
    if not (0 < len(v) <= 3 and 0 < len(w) <= 3):
        return False
    if [_NUMBER_WORDS.get(t, t) for t in v] == [_NUMBER_WORDS.get(t, t) for t in w]:
        return False
    if set(v) <= _FUNCTION or set(w) <= _FUNCTION or any(set(v) & g and set(w) & g for g in _ALIKE):
        return False
    return SequenceMatcher(None, " ".join(v), " ".join(w), autojunk=False).ratio() < 0.8


class SlotVerifier:
    """The defence that lets only candidates through whose slots agree with the question's.

    A name that at least ``customary`` of the recent questions of a partition and category have (``Python``
    where all program in it) is taken as read: one side may leave it out, none may have another instead.
    ``None`` never takes a name as read. Raises ValueError outside (0, 1].
    """

    name = "slots"

    def __init__(self, customary: float | None = 0.2) -> None:
        if customary is not None and not 0 < customary <= 1:
            raise ValueError(f"customary must be None or a share in (0, 1], got {customary}")
        self._customary = customary
        self._named: OrderedDict[tuple[str, str], _Named] = OrderedDict()
        self._lock = threading.Lock()

    def admit(self, entry: Entry, context: Context) -> Verdict:
        """Every entry."""
        if self._customary is not None:
            key = entry.partition, entry.category
            with self._lock:
                self._named.setdefault(key, _Named()).add(slots(entry.text).names)
                self._named.move_to_end(key)
                if len(self._named) > MOST_PARTITIONS:
                    self._named.popitem(last=False)
        return Verdict(True)

    def accept(self, query: Query, entry: Entry, context: Context) -> Verdict:
        """See :func:`disagreement`."""
        found = disagreement(query.text, entry.text, self.taken_as_read(entry.partition, entry.category))
        return Verdict(not found, f"{found} differ" if found else "")

    def taken_as_read(self, partition: str, category: str) -> frozenset[str]:
        """The names that either side may leave out."""
        if self._customary is None:
            return frozenset()
        with self._lock:
            named = self._named.get((partition, category))
            return frozenset() if named is None else named.common(self._customary)


class _Named:
    """How many of the recent entries have each name."""

    def __init__(self) -> None:
        self.entries, self.counts = 0.0, dict[str, float]()
        self.known: frozenset[str] = frozenset()

    def add(self, names: frozenset[str]) -> None:
        self.entries += 1
        for name in names:
            self.counts[name] = self.counts.get(name, 0.0) + 1
        if self.entries >= 2 * LEAST_ENTRIES:  # the past fades, and what was rare is forgotten
            self.entries /= 2
            self.counts = {name: n / 2 for name, n in self.counts.items() if n >= 4}
        self.known = frozenset()

    def common(self, share: float) -> frozenset[str]:
        if self.entries < LEAST_ENTRIES:
            return frozenset()
        if not self.known:
            least = share * self.entries
            self.known = frozenset(name for name, n in self.counts.items() if n >= least)
        return self.known
