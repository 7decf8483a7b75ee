"""G-Rank on a gossip log: click log, ranking, and an adaptor for plain lists of rows."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from .gossip import GossipLog, LogConflict, LogLimits, MergeReport
from .identity import Identity
from .ranking import Author, ClickRow, GRankConfig, Item, Ranked, RankIndex
from .wire import GossipFormatError, Row

ClickLogConflict = LogConflict
_KIND = b"c1"
_JOIN = "\x1f"
MAX_SHOWN = 100


def pack_click(query: str, shown: Sequence[str], clicked: str, title: str, tags: Sequence[str]) -> Row:
    """Fields of a click as a row of the log. Raises ValueError for one that could not be read back."""
    if not query or not query.strip():
        raise ValueError("query must not be empty")
    if not clicked:
        raise ValueError("clicked must name an item, got an empty id")
    if len(shown) > MAX_SHOWN:
        raise ValueError(f"shown must have at most {MAX_SHOWN} items, got {len(shown)}")
    if any(_JOIN in tag for tag in tags):
        raise ValueError("tags must not hold the unit separator U+001F")
    text = (query.strip().lower(), clicked, title, _JOIN.join(tags), *shown)
    return (_KIND, *(part.encode() for part in text))


def unpack_click(author: Author, seq: int, row: Row) -> ClickRow | None:
    """Inverse of :func:`pack_click`; None for a row of another kind (other applications may share a log) or
    one that is not what an honest peer writes."""
    if len(row) < 5 or len(row) > 5 + MAX_SHOWN or row[0] != _KIND:
        return None
    try:
        query, clicked, title, tags, *shown = (part.decode() for part in row[1:])
    except UnicodeDecodeError:
        return None
    if not query or not clicked or query != query.strip().lower():
        return None
    return ClickRow(
        author, seq, query, tuple(shown), clicked, title, tuple(tags.split(_JOIN)) if tags else ()
    )


class ClickLog:
    """Clicks of this node and of all it has heard of. ``path``: an SQLite file or ``":memory:"``.

    ``share=False`` keeps one's own clicks here. :meth:`forget` deletes an author's, also one's own. Authors
    are keys without a name.
    """

    def __init__(
        self,
        path: str | Path = ":memory:",
        identity: Identity | None = None,
        config: GRankConfig | None = None,
        share: bool = True,
    ) -> None:
        config = config or GRankConfig()
        limits = LogLimits(config.max_rows_per_author, config.max_rows)
        self.gossip = GossipLog(path, identity, limits, share)
        self._followers: list[GRank] = []

    @property
    def node_id(self) -> bytes:
        return self.gossip.author

    def append(
        self, query: str, shown: Sequence[str], clicked: str, tags: Sequence[str] = (), title: str = ""
    ) -> int:
        """Log one's own click; returns its number."""
        row = pack_click(query, shown, clicked, title, tags)
        seq = self.gossip.append(row)
        click = unpack_click(self.node_id, seq, row)
        if click is not None:
            self._tell([click])
        return seq

    def delta(self, since: Mapping[bytes, int], max_rows: int = 50_000) -> bytes:
        return self.gossip.delta(since, max_rows)

    def heads(self) -> dict[bytes, int]:
        return self.gossip.heads()

    def merge(self, message: bytes) -> MergeReport:
        """Take in a delta; see ``GossipLog.merge``."""
        report = self.gossip.merge(message)
        self.follow(report)
        return report

    def follow(self, report: MergeReport) -> None:
        """Let the rankings know of a merge that the gossip log did by itself."""
        if report.conflicts:
            for follower in self._followers:
                follower.rebuild()
            return
        clicks = (unpack_click(author, seq, row) for author, seq, row in report.added)
        self._tell([click for click in clicks if click is not None])

    def _tell(self, rows: list[ClickRow]) -> None:
        for follower in self._followers:
            follower.index.observe(rows)

    def rows(self) -> Iterable[ClickRow]:
        """All clicks that count."""
        clicks = (unpack_click(author, seq, row) for author, seq, row in self.gossip.rows())
        return (click for click in clicks if click is not None)

    def forget(self, author: bytes) -> int:
        """Delete an author's clicks here and take no more of them; returns how many."""
        gone = self.gossip.forget(author)
        for follower in self._followers:
            follower.rebuild()
        return gone

    def close(self) -> None:
        self.gossip.close()


class GRank:
    """Ranks by clicks of similar authors. ``library``: what this node holds, item id to Item."""

    def __init__(
        self, log: ClickLog, library: Mapping[str, Item] | None = None, config: GRankConfig | None = None
    ) -> None:
        self.log, self.library, self.config = log, dict(library or {}), config or GRankConfig()
        self.index = RankIndex(log.node_id, self.config, self.library)
        self._shown: dict[str, tuple[str, ...]] = {}
        self.rebuild()
        log._followers.append(self)

    def rebuild(self) -> None:
        """Index the log from its first row: after somebody's rows stopped counting."""
        self.index = RankIndex(self.log.node_id, self.config, self.library)
        self.index.observe(self.log.rows())

    def rank(
        self,
        query: str,
        candidates: Iterable[str] | None = None,
        k: int = 10,
        rng: random.Random | None = None,
    ) -> list[Ranked]:
        """See ``RankIndex.rank``."""
        ranked = self.index.rank(query, candidates, k, rng)
        self._shown[query.strip().lower()] = tuple(r.item for r in ranked)
        return ranked

    def click(self, query: str, item: str) -> int:
        """Log that ``item`` was taken for ``query``. Raises ValueError for an item that neither the library
        nor the log knows."""
        known = self.library.get(item)
        if known is None and item not in self.index._popular:
            raise ValueError(f"item {item!r} is neither in the library nor in the log")
        if known is None:
            number, tags = self.index._claims.get(item, (0, {}))
            known = Item(tags=tuple(sorted(tag for tag, n in tags.items() if 2 * n >= number)))
        shown = self._shown.get(query.strip().lower(), ())
        return self.log.append(query, shown, item, known.tags, known.title)

    def similarity(self, author: bytes) -> float:
        return self.index.similarity(author)

    def neighbours(self, n: int = 10) -> list[tuple[Author, float]]:
        return self.index.neighbours(n)


class GRankEstimator:
    """Fit on rows, predict by query, in the manner of scikit-learn. ``own``: whose view it is."""

    def __init__(
        self, own: Author, config: GRankConfig | None = None, library: Mapping[str, Item] | None = None
    ):
        self.own, self.config, self.library = own, config, library

    def fit(self, rows: Iterable[ClickRow]) -> GRankEstimator:
        self.index_ = RankIndex(self.own, self.config, self.library)
        self.index_.observe(sorted(rows, key=lambda r: r.seq))
        return self

    def predict(self, query: str, k: int = 10) -> list[str]:
        if not hasattr(self, "index_"):
            raise ValueError("fit must be called before predict")
        return [r.item for r in self.index_.rank(query, k=k)]


__all__ = [
    "ClickLog",
    "ClickLogConflict",
    "GRank",
    "GRankEstimator",
    "GossipFormatError",
    "pack_click",
    "unpack_click",
]
