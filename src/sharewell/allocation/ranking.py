"""G-Rank's ranking: whose clicks count for whom. Gold, Pouwelse 2023, arXiv 2301.12530.

The index is kept up to date row by row and never passes over the whole log. It knows no transport: rows come
from the gossip log, from a simulation, or from a list.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from heapq import nsmallest
from math import fsum
from typing import Any, Literal, NamedTuple

_NO_CLAIMS: tuple[int, Counter[str]] = (0, Counter())
Author = Any  # hashable, and comparable with its like


class ClickRow(NamedTuple):
    """One click: who, the how-many-th of theirs, what was asked, what was shown, what was taken."""

    author: Author
    seq: int
    query: str
    shown: tuple[str, ...]
    clicked: str
    title: str = ""
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Item:
    """Something that can be found: its tags and title are what a query is matched with."""

    title: str = ""
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class GRankConfig:
    """``top_k_terms``: how many of an author's most frequent terms are compared. ``isolation`` F: what
    everybody counts on top of similarity; at 0 only similar authors count. ``explore``: chance of swapping
    two results, never the first when ``protect_first``. ``half_life``: rows of an author after which a click
    counts half; None for never. ``require_metadata_match``: an item that only others clicked must itself
    carry the term. ``variant``: the paper's similarity, or that of the authors' notebook.
    ``max_rows_per_author``, ``max_rows``: limits of the log.
    """

    top_k_terms: int = 10
    isolation: float = 0.0
    explore: float = 0.0
    protect_first: bool = True
    max_rows: int = 200_000
    max_rows_per_author: int = 20_000
    half_life: float | None = None
    require_metadata_match: bool = True
    variant: Literal["paper", "notebook"] = "paper"

    def __post_init__(self) -> None:
        for name in ("top_k_terms", "max_rows", "max_rows_per_author"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.isolation < float("inf"):
            raise ValueError(f"isolation must be finite and at least 0, got {self.isolation}")
        if not 0 <= self.explore <= 1:
            raise ValueError(f"explore must be in [0, 1], got {self.explore}")
        if self.half_life is not None and not self.half_life > 0:
            raise ValueError(f"half_life must be positive or None, got {self.half_life}")
        if self.variant not in ("paper", "notebook"):
            raise ValueError(f"variant must be paper or notebook, got {self.variant!r}")


@dataclass(frozen=True)
class Ranked:
    """A result. ``why``: (author, clicks, similarity) behind the score, strongest first; empty for a text
    match."""

    item: str
    score: float
    why: tuple[tuple[Author, float, float], ...] = ()


class _Profile:
    """What is known of one author."""

    __slots__ = ("clicked", "seq", "terms", "top", "top_is_old")

    def __init__(self) -> None:
        self.terms: Counter[str] = Counter()
        self.clicked = 0  # bit set of item numbers
        self.seq = 0
        self.top = 0  # bit set of term numbers
        self.top_is_old = True


class RankIndex:
    """The state of node ``own``: profiles, votes and tags out of rows, in time that the new rows alone
    take.
    """

    def __init__(
        self, own: Author, config: GRankConfig | None = None, library: Mapping[str, Item] | None = None
    ) -> None:
        self.own, self.config = own, config or GRankConfig()
        self.library: dict[str, Item] = dict(library or {})
        self._profiles: dict[Author, _Profile] = {}
        self._bits: dict[Hashable, int] = {}  # items and terms to bit numbers
        # term -> item -> author -> clicks (with a half life: [weight, number of the last row])
        self._votes: dict[str, dict[str, dict[Author, Any]]] = {}
        self._popular: Counter[str] = Counter()
        self._own_items: set[str] = set()
        self._claims: dict[str, tuple[int, Counter[str]]] = {}  # item -> describers, tag -> how many of them
        self._described: set[tuple[str, Author]] = set()
        self._raw: dict[Author, float] = {}
        self._stale: set[Author] = set()
        self._all_stale = True
        self._greatest = 0.0
        self._weight: dict[Author, float] = {}  # similarity plus isolation

    # --- taking rows in

    def observe(self, rows: Iterable[ClickRow]) -> None:
        """Add rows, each author's in ascending order; one at or below the author's last is ignored."""
        for row in rows:
            author, item, query = row.author, row.clicked, row.query
            profile = self._profiles.get(author)
            if profile is None:
                profile = self._profiles[author] = _Profile()
            if row.seq <= profile.seq:
                continue
            profile.seq = row.seq
            profile.terms[query] += 1
            profile.top_is_old = True
            profile.clicked |= 1 << self._bit(item)
            votes = self._votes.setdefault(query, {}).setdefault(item, {})
            if self.config.half_life is None:
                votes[author] = votes.get(author, 0) + 1
            else:
                weight, last = votes.get(author, (0.0, row.seq))
                votes[author] = (weight * self._decay(row.seq - last) + 1.0, row.seq)
            self._popular[item] += 1
            if (item, author) not in self._described:
                self._described.add((item, author))
                number, tags = self._claims.get(item) or (0, Counter())
                tags.update(set(row.tags))
                self._claims[item] = (number + 1, tags)
            if author == self.own:
                self._own_items.add(item)
                self._all_stale = True
            else:
                self._stale.add(author)

    def _bit(self, thing: Hashable) -> int:
        return self._bits.setdefault(thing, len(self._bits))

    def _decay(self, rows: int) -> float:
        return 2.0 ** (-rows / self.config.half_life) if self.config.half_life else 1.0

    # --- similarity

    def _top(self, profile: _Profile) -> int:
        if profile.top_is_old:
            profile.top, profile.top_is_old = 0, False
            # The most frequent terms; of equally frequent ones the first in the alphabet.
            for term, _ in nsmallest(
                self.config.top_k_terms, profile.terms.items(), key=lambda t: (-t[1], t[0])
            ):
                profile.top |= 1 << self._bit(("term", term))
        return profile.top

    def raw_similarity(self, author: Author) -> float:
        """s_own(author) = (k_t + k_m^2) / k_u before normalising; 0 for a stranger."""
        mine, other = self._profiles.get(self.own), self._profiles.get(author)
        if mine is None or other is None:
            return 0.0
        union = (mine.clicked | other.clicked).bit_count()
        terms = (self._top(mine) & self._top(other)).bit_count()
        items = (mine.clicked & other.clicked).bit_count()
        if not union:
            return 0.0
        if self.config.variant == "notebook":
            return (items + terms * terms) / union
        return (terms + items * items) / union

    def _settle(self) -> None:
        if self._all_stale:
            self._raw = {a: self.raw_similarity(a) for a in self._profiles if a != self.own}
            self._all_stale = False
        elif self._stale:
            for author in self._stale:
                self._raw[author] = self.raw_similarity(author)
        else:
            return
        self._stale.clear()
        self._greatest = max(self._raw.values(), default=0.0)
        isolation, greatest = self.config.isolation, self._greatest or 1.0
        self._weight = {author: s / greatest + isolation for author, s in self._raw.items()}
        self._weight[self.own] = 1.0 + isolation

    def similarity(self, author: Author) -> float:
        """S_own(author) in [0, 1]: over the greatest of all others (not of oneself, which would leave
        everybody near 0 and the node echoing itself); 1 for oneself."""
        if author == self.own:
            return 1.0
        self._settle()
        return self._raw.get(author, 0.0) / self._greatest if self._greatest > 0 else 0.0

    def neighbours(self, n: int = 10) -> list[tuple[Author, float]]:
        """The ``n`` most similar authors."""
        self._settle()
        best = sorted(self._raw, key=lambda a: (-self._raw[a], a))[:n]
        return [(author, self.similarity(author)) for author in best]

    # --- ranking

    def carries(self, item: str, term: str) -> bool:
        """Whether the item's own tags or title hold ``term``: the library's word, else that of at least half
        of the authors who described it."""
        known = self.library.get(item)
        if known is not None:
            return term in known.tags or term in known.title.lower().split()
        number, tags = self._claims.get(item, (0, Counter()))
        return number > 0 and 2 * tags[term] >= number

    def rank(
        self,
        query: str,
        candidates: Iterable[str] | None = None,
        k: int = 10,
        rng: random.Random | None = None,
        explain: bool = True,
    ) -> list[Ranked]:
        """The ``k`` best items for ``query``, of ``candidates`` when given; ties to the lowest item id.

        ``rng`` draws the exploring swap; ``explain=False`` leaves ``why`` empty.
        Raises ValueError for an empty query or k below 1.
        """
        if not query or not query.strip():
            raise ValueError("query must not be empty")
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        query = query.strip().lower()
        allowed = None if candidates is None else set(candidates)
        found = self._by_votes(query, allowed) if query in self._votes else []
        explain = explain and bool(found)
        ranked = [
            Ranked(item, -score, self._why(query, item) if explain else ())
            for score, item in nsmallest(k, found or self._cold(query, allowed))
        ]
        if rng is not None and self.config.explore and rng.random() < self.config.explore:
            low = 1 if self.config.protect_first else 0
            if len(ranked) - low >= 2:
                a, b = rng.sample(range(low, len(ranked)), 2)
                ranked[a], ranked[b] = ranked[b], ranked[a]
        return ranked

    def _by_votes(self, query: str, allowed: set[str] | None) -> list[tuple[float, str]]:
        """(-score, item) of what was clicked for the query, so that the best are the smallest."""
        self._settle()
        weight, fades = self._weight, self.config.half_life is not None
        strict, own_items = self.config.require_metadata_match, self._own_items
        library, claims = self.library, self._claims
        found: list[tuple[float, str]] = []
        worthless: list[tuple[float, str]] = []
        for item, votes in self._votes[query].items():
            if allowed is not None and item not in allowed:
                continue
            if strict and item not in own_items:
                # As `carries`, in place: a frequent term has thousands of items.
                if item in library:
                    if not self.carries(item, query):
                        continue
                else:
                    number, tags = claims.get(item, _NO_CLAIMS)
                    if not number or 2 * tags.get(query, 0) < number:
                        continue
            # fsum: the order in which authors became known must not show in the last bit.
            if fades:
                score = fsum([self._faded(a, c) * weight[a] for a, c in votes.items()])
            elif len(votes) == 1:
                ((author, count),) = votes.items()
                score = count * weight[author]
            else:
                score = fsum([count * weight[author] for author, count in votes.items()])
            (found if score > 0 else worthless).append((-score, item))
        return found or worthless

    def _faded(self, author: Author, vote: tuple[float, int]) -> float:
        return vote[0] * self._decay(self._profiles[author].seq - vote[1])

    def _why(self, query: str, item: str) -> tuple[tuple[Author, float, float], ...]:
        """Who clicked the item for the query, strongest first."""
        self._settle()
        raw, greatest, isolation = self._raw, self._greatest, self.config.isolation
        faded = self.config.half_life is not None
        rows = []
        for author, vote in self._votes.get(query, {}).get(item, {}).items():
            count = self._faded(author, vote) if faded else vote
            alike = raw.get(author, 0.0) / greatest if greatest > 0 else 0.0
            rows.append((author, count, 1.0 if author == self.own else alike))
        rows.sort(key=lambda w: (-w[1] * (w[2] + isolation), w[0]))
        return tuple(rows)

    def _cold(self, query: str, allowed: set[str] | None) -> list[tuple[float, str]]:
        """As :meth:`_by_votes`, for a query nobody is known to have asked: own library, then tags in the log,
        then what is clicked most."""

        def usable(item: str) -> bool:
            return allowed is None or item in allowed

        known = {i for i in self.library if usable(i) and self.carries(i, query)}
        top = max(self._popular.values(), default=0) + 1
        out = [(-float(top + self._popular[i]), i) for i in known]
        out += [
            (-float(n), i)
            for i, n in self._popular.items()
            if i not in known and usable(i) and self.carries(i, query)
        ]
        return out or [(-float(n), i) for i, n in self._popular.items() if usable(i)]


def exact_similarity(rows: Sequence[ClickRow], i: Author, j: Author, top_k: int = 10) -> Any:
    """s_i(j) as a Fraction straight from its definition: the oracle of the tests, and slow."""
    from fractions import Fraction

    def of(author: Author) -> tuple[set[str], set[str]]:
        own = [row for row in rows if row.author == author]
        counts = Counter(row.query for row in own)
        return set(sorted(counts, key=lambda t: (-counts[t], t))[:top_k]), {row.clicked for row in own}

    (terms_i, clicked_i), (terms_j, clicked_j) = of(i), of(j)
    union = len(clicked_i | clicked_j)
    return Fraction(len(terms_i & terms_j) + len(clicked_i & clicked_j) ** 2, union) if union else Fraction(0)
