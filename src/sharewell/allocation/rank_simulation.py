"""A network of nodes that search, click and gossip; the setting of the paper's experiments, with its attacks.

Nodes run the real ranking; only the transport is an exchange of slices of one shared store of rows, by the
high-water marks that the gossip log would use.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal

from .rank_metrics import list_distance, ndcg
from .ranking import ClickRow, GRankConfig, Item, RankIndex

Attack = Literal["targeted", "inflation", "epic", "push"]


@dataclass(frozen=True)
class SimConfig:
    """``nodes`` search ``terms`` over ``items`` of ``tags_per_item`` tags; each holds ``library_share`` of
    the items and starts with one click for every term. In a step one node searches, clicks, and pulls from
    one author that it knows. ``explore``: chance of the paper's exploring swap. ``offline``: nodes cut off at
    ``offline_at``. ``communities``: groups of nodes that like different items of the same term.

    A user clicks position r with probability in proportion to appeal / r: appeal is the item's own, drawn
    from 1 / rank (Zipf) within its term.
    """

    nodes: int = 100
    items: int = 260
    terms: int = 39
    tags_per_item: int = 3
    library_share: float = 0.1
    shown: int = 10
    explore: float = 0.5
    isolation: float = 0.0
    steps: int = 8000
    measure_at: tuple[int, ...] = (4000, 8000)
    attack_nodes: int = 10
    attack_clicks: int = 100
    attack_joins_at: int = 2500
    attack_at: int = 5000
    offline: int = 0
    offline_at: int = 4000
    communities: int = 1
    majority: float | None = None  # share of nodes in the first of two communities; None for equal sizes

    def __post_init__(self) -> None:
        for name in ("nodes", "items", "terms", "tags_per_item", "shown", "steps", "communities"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.tags_per_item > self.terms:
            raise ValueError(f"tags_per_item must be at most terms ({self.terms}), got {self.tags_per_item}")
        if self.majority is not None and not (self.communities == 2 and 0.5 <= self.majority < 1):
            raise ValueError(f"majority must be in [0.5, 1), of two communities, got {self.majority}")
        if not 0 < self.library_share <= 1:
            raise ValueError(f"library_share must be in (0, 1], got {self.library_share}")
        if not 0 <= self.offline <= self.nodes:
            raise ValueError(f"offline must be in [0, nodes], got {self.offline}")


@dataclass
class Frame:
    """Figures at one step, means over honest nodes that are online and terms: agreement of the first result
    with global popularity, nDCG@10 and positional distance per item against it."""

    step: int
    top1: float
    ndcg: float
    distance: float
    offline_ndcg: float | None = None
    community_ndcg: float | None = None  # against the popularity in the node's own community
    community_ndcg_popular: float | None = None  # the same of global popularity


@dataclass
class SimResult:
    frames: list[Frame] = field(default_factory=list)
    rows: int = 0
    gossiped: int = 0  # rows that changed hands
    offline_ndcg_when_cut: float | None = None


class Simulation:
    """One run; :meth:`run` yields the frames. Draws only from ``seed``."""

    def __init__(self, config: SimConfig, attack: Attack | None = None, seed: int = 0) -> None:
        if attack not in (None, "targeted", "inflation", "epic", "push"):
            raise ValueError(f"attack must be targeted, inflation, epic or push, got {attack!r}")
        self.config, self.attack = config, attack
        self.rng = random.Random(seed)
        self._attacker_rng = random.Random(seed + 1)  # its own: the honest run stays comparable
        self.terms = [f"term{t:02d}" for t in range(config.terms)]
        self.items = [f"item{i:03d}" for i in range(config.items)]
        self.catalogue = {
            i: Item(i, tuple(self.rng.sample(self.terms, config.tags_per_item))) for i in self.items
        }
        self.by_term = {t: [i for i in self.items if t in self.catalogue[i].tags] for t in self.terms}
        # Appeal of each item within a term, for each community its own.
        self.appeal: list[dict[tuple[str, str], float]] = []
        for community in range(config.communities):
            table: dict[tuple[str, str], float] = {}
            for t in self.terms:
                order = self.by_term[t][:]
                self.rng.shuffle(order)
                liked = order if config.communities == 1 else order[community :: config.communities]
                for rank, item in enumerate(liked):
                    table[t, item] = 1.0 / (rank + 1)
            self.appeal.append(table)
        self.rows: dict[int, list[ClickRow]] = defaultdict(list)
        self.heads: list[dict[int, int]] = []
        self.nodes: list[RankIndex] = []
        self.votes: dict[str, Counter[str]] = defaultdict(Counter)  # of honest nodes
        self.votes_in: list[dict[str, Counter[str]]] = [
            defaultdict(Counter) for _ in range(config.communities)
        ]
        self.honest = config.nodes
        self.result = SimResult()
        for _ in range(config.nodes):
            self._join()

    def community(self, node: int) -> int:
        if self.config.majority is None:
            return node % self.config.communities
        return int(node >= self.config.majority * self.config.nodes)

    def _join(self, start: bool = True) -> int:
        """A new node: a library, a click for every term, and one peer's log to learn whom to ask."""
        config, node = self.config, len(self.nodes)
        held = self.rng.sample(self.items, max(1, round(config.library_share * config.items)))
        settings = GRankConfig(
            isolation=config.isolation, explore=config.explore, protect_first=False, max_rows=10**9
        )
        self.nodes.append(RankIndex(node, settings, {i: self.catalogue[i] for i in held}))
        self.heads.append({})
        if start:
            for term in self.terms:
                self._click(node, term, self._choose(node, term, self._library_results(node, term)))
        if node:  # one after the other: everybody hangs together, as those asked learn who asks
            self._pull(node, self.rng.randrange(node))
        return node

    def _library_results(self, node: int, term: str) -> list[str]:
        """What a node that knows nobody is shown: what it holds for the term, else what anybody would see."""
        held = [i for i in self.nodes[node].library if term in self.catalogue[i].tags]
        return held or self.rng.sample(self.by_term[term], min(self.config.shown, len(self.by_term[term])))

    def _choose(self, node: int, term: str, shown: Sequence[str]) -> str | None:
        if not shown:
            return None
        appeal = self.appeal[self.community(node)]
        weights = [appeal.get((term, item), 0.0) / (r + 1) for r, item in enumerate(shown)]
        if not any(weights):
            return None
        return self.rng.choices(shown, cum_weights=list(accumulate(weights)))[0]

    def _click(
        self, node: int, term: str, item: str | None, shown: Sequence[str] = (), fake: bool = False
    ) -> None:
        if item is None:
            return
        own = self.rows[node]
        tags = self.catalogue[item].tags
        # A forger claims what the row needs; the clicked item's real tags are in honest descriptions.
        row = ClickRow(node, len(own) + 1, term, tuple(shown), item, item, (*tags, term) if fake else tags)
        own.append(row)
        self.nodes[node].observe((row,))
        self.heads[node][node] = row.seq
        self.result.rows += 1
        if not fake and node < self.honest:
            self.votes[term][item] += 1
            self.votes_in[self.community(node)][term][item] += 1

    def _pull(self, node: int, peer: int) -> None:
        """Rows of every author above the node's high-water mark, from what ``peer`` has."""
        mine, index = self.heads[node], self.nodes[node]
        self.heads[peer].setdefault(node, 0)  # who asks is thereby known
        for author, head in list(self.heads[peer].items()):
            have = mine.get(author, 0)
            if head > have:
                index.observe(self.rows[author][have:head])
                mine[author] = head
                self.result.gossiped += head - have

    def step(self, t: int) -> None:
        config = self.config
        node = self.rng.randrange(self.honest)
        cut = t >= config.offline_at and node < config.offline
        term = self.terms[self.rng.randrange(config.terms)]
        if cut:
            return
        shown = [r.item for r in self.nodes[node].rank(term, k=config.shown, rng=self.rng, explain=False)]
        self._click(node, term, self._choose(node, term, shown), shown)
        known = [
            a for a in self.heads[node] if a != node and not (t >= config.offline_at and a < config.offline)
        ]
        if known:
            self._pull(node, known[self.rng.randrange(len(known))])

    def _attack(self, t: int) -> None:
        """Sybils join, later click what they want to push, and pull now and then, so that they become known.

        targeted: all on the least wanted item of one term. inflation: any item for any term. push: targeted,
        and written into every log at once. epic: targeted, by three times as many sybils as nodes, who have
        clicked for every term like everybody before.
        """
        config, rng = self.config, self._attacker_rng
        if self.attack is None or t < config.attack_joins_at:
            return
        extra = 3 * config.nodes if self.attack == "epic" else config.attack_nodes
        if t == config.attack_joins_at:
            for _ in range(extra):
                self._join(start=self.attack == "epic")
        sybils = range(self.honest, self.honest + extra)
        if t == config.attack_at:
            term = self.terms[0]
            target = min(self.by_term[term], key=lambda i: (self.votes[term][i], i))
            for s in sybils:
                for _ in range(config.attack_clicks):
                    if self.attack == "inflation":
                        self._click(s, rng.choice(self.terms), rng.choice(self.items), fake=True)
                    else:
                        self._click(s, term, target, fake=True)
                if self.attack == "push":
                    for node in range(self.honest):
                        self._pull(node, s)
        if rng.random() < extra / config.nodes:
            self._pull(rng.choice(sybils), rng.randrange(self.honest))

    def run(self) -> SimResult:
        config = self.config
        for t in range(1, config.steps + 1):
            self._attack(t)
            if config.offline and t == config.offline_at:
                self.result.offline_ndcg_when_cut = self._quality(range(config.offline))[1]
            self.step(t)
            if t in config.measure_at:
                self.result.frames.append(self.measure(t))
        return self.result

    def popular(self, term: str, community: int | None = None) -> list[str]:
        votes = self.votes[term] if community is None else self.votes_in[community][term]
        return sorted(votes, key=lambda i: (-votes[i], i))

    def _quality(self, nodes: range) -> tuple[float, float, float]:
        first = gain = distance = 0.0
        total = 0
        for term in self.terms:
            popular, gains = self.popular(term), self.votes[term]
            if not popular:
                continue
            for node in nodes:
                ranked = [r.item for r in self.nodes[node].rank(term, k=10, explain=False)]
                first += bool(ranked) and ranked[0] == popular[0]
                gain += ndcg(ranked, gains)
                distance += list_distance(ranked, popular)
                total += 1
        return first / total, gain / total, distance / total

    def measure(self, t: int) -> Frame:
        config = self.config
        frame = Frame(t, *self._quality(range(config.offline, self.honest)))
        if config.offline and t >= config.offline_at:
            frame.offline_ndcg = self._quality(range(config.offline))[1]
        if config.communities > 1:
            # Means of the communities, so that a small one counts as much as a large one.
            scores: list[list[tuple[float, float]]] = [[] for _ in range(config.communities)]
            for term in self.terms:
                everywhere = self.popular(term)
                for node in range(self.honest):
                    own = self.community(node)
                    gains = self.votes_in[own][term]
                    if gains:
                        ranked = [r.item for r in self.nodes[node].rank(term, k=10, explain=False)]
                        scores[own].append((ndcg(ranked, gains), ndcg(everywhere, gains)))
            means = [[sum(column) / len(column) for column in zip(*s, strict=True)] for s in scores if s]
            frame.community_ndcg, frame.community_ndcg_popular = (
                sum(column) / len(means) for column in zip(*means, strict=True)
            )
        return frame


def simulate(config: SimConfig | None = None, attack: Attack | None = None, seed: int = 0) -> SimResult:
    """Run one network; see SimConfig."""
    return Simulation(config or SimConfig(), attack, seed).run()
