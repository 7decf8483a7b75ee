"""MOHAF: a lazy greedy auction over a tree of resources, with prices that follow load.

Agrawal et al. 2025, arXiv 2508.14830. Weights, price rule and clusters are ours where the paper is silent.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from .clusters import build_tree, static_boxes
from .core import Allocation, Objective, Problem, objective_value, realised

ENUMERATE_AT_MOST = 60
CRITICAL_AT_MOST = 500
LIST = 32  # resources remembered of each request
DIRECTIONS = 24  # sampled requests whose weights the clusters' bounds are made for


@dataclass(frozen=True)
class MohafConfig:
    """``hierarchy``: search clusters of resources (exact, faster) of at most ``leaf`` members. Prices are the
    level of the resource times clip(1 + price_eta (load - price_target), price_low, price_high).

    ``payment``: ``"posted"`` price at acceptance, ``"first"`` (the whole budget), or ``"critical"``: the
    lowest budget with which the request still wins, which makes telling the truth about it the best policy
    (by bisection over reruns of the density order alone, at most 500 requests). ``guarantee="enumerate"``:
    also start from every triple of requests (at most 60); with one resource and one capacity that is 1 - 1/e
    of the optimum (Sviridenko 2004), beyond it is only a better answer.
    """

    w_cost: float = 0.3
    w_qos: float = 0.3
    w_energy: float = 0.2
    w_fair: float = 0.2
    hierarchy: bool = True
    leaf: int = 64
    price_eta: float = 0.5
    price_target: float = 0.7
    price_low: float = 0.5
    price_high: float = 2.0
    payment: Literal["posted", "first", "critical"] = "posted"
    guarantee: Literal["greedy", "enumerate"] = "greedy"
    seed: int = 0

    def __post_init__(self) -> None:
        _ = self.objective
        if self.leaf < 1:
            raise ValueError(f"leaf must be at least 1, got {self.leaf}")
        if not self.price_eta >= 0:
            raise ValueError(f"price_eta must be at least 0, got {self.price_eta}")
        if not 0 <= self.price_target <= 1:
            raise ValueError(f"price_target must be in [0, 1], got {self.price_target}")
        if not 0 < self.price_low <= 1 <= self.price_high:
            raise ValueError(
                f"price_low must be in (0, 1] and price_high at least 1, got {self.price_low} "
                f"and {self.price_high}"
            )
        if self.payment not in ("posted", "first", "critical"):
            raise ValueError(f"payment must be posted, first or critical, got {self.payment!r}")
        if self.guarantee not in ("greedy", "enumerate"):
            raise ValueError(f"guarantee must be greedy or enumerate, got {self.guarantee!r}")

    @property
    def objective(self) -> Objective:
        return Objective(self.w_cost, self.w_qos, self.w_energy, self.w_fair)


def request_columns(problem: Problem) -> np.ndarray:
    """[N, 5]: budget, floors of reliability and availability, latency limit, size."""
    return np.column_stack(
        [
            problem.budget,
            problem.min_reliability,
            problem.min_availability,
            problem.max_latency_ms,
            problem.size,
        ]
    )


def weights_of(objective: Objective) -> np.ndarray:
    return np.array([objective.w_cost, objective.w_qos, objective.w_energy])


class Mohaf:
    """The auction. ``solve`` runs the density order and the plain gain order and keeps the better: density
    alone has no guarantee with capacities."""

    def __init__(self, config: MohafConfig | None = None) -> None:
        self.config = config or MohafConfig()

    def solve(
        self, problem: Problem, *, level: np.ndarray | None = None, used: np.ndarray | None = None
    ) -> Allocation:
        """Place ``problem``. ``level`` [M]: price level of each resource (its cost when None). ``used``
        [M, D]: capacity already taken. Raises ValueError for sizes that a guarantee or payment rule excludes.

        ``stats``: clusters and their silhouette, pairs and bounds looked at, searches, which order won.
        """
        config = self.config
        n = len(problem.budget)
        if config.guarantee == "enumerate" and n > ENUMERATE_AT_MOST:
            raise ValueError(f"guarantee='enumerate' is for at most {ENUMERATE_AT_MOST} requests, got {n}")
        if config.payment == "critical" and n > CRITICAL_AT_MOST:
            raise ValueError(f"payment='critical' is for at most {CRITICAL_AT_MOST} requests, got {n}")
        table = _Table(problem, config, level, used)
        orders = (True,) if config.payment == "critical" else (True, False)
        runs = [(table.place(by_density), by_density) for by_density in orders]
        if config.guarantee == "enumerate" and config.payment != "critical":
            for size in (1, 2, 3):
                for start in (
                    itertools.permutations(range(n), size)
                    if size < 3
                    else itertools.combinations(range(n), 3)
                ):
                    runs.append((table.place(True, start), True))
        scored = [(self._value(problem, run), -k) for k, (run, _) in enumerate(runs)]
        (assign, payment, price, _), by_density = runs[-max(scored)[1]]
        if config.payment == "first":
            payment = np.where(assign >= 0, problem.budget, 0.0)
        elif config.payment == "critical":
            payment = self._critical(problem, assign, payment, level, used)
        utility = realised(problem, assign, payment, config.objective)
        tree = table.tree
        stats: dict[str, Any] = {
            "order": "density" if by_density else "gain",
            "clusters": 0 if tree is None else tree.clusters,
            "silhouette": 0.0 if tree is None else tree.silhouette,
            "pairs": int(sum(run[3][0] for run, _ in runs)),
            "bounds": int(sum(run[3][1] for run, _ in runs)),
            "searches": int(sum(run[3][2] for run, _ in runs)),
            "value": max(scored)[0],
        }
        return Allocation(assign, price, payment, utility, stats)

    def _value(self, problem: Problem, run: tuple[np.ndarray, ...]) -> float:
        assign, payment, price, _ = run
        return objective_value(
            problem, Allocation(assign, price, payment, np.zeros(0)), self.config.objective
        )

    def _critical(
        self,
        problem: Problem,
        assign: np.ndarray,
        posted: np.ndarray,
        level: np.ndarray | None,
        used: np.ndarray | None,
    ) -> np.ndarray:
        """Lowest winning budgets, to 1e-10 of the budget. The order of acceptance is monotone in a budget: it
        enters only through the request's own utility."""
        out = np.zeros_like(posted)
        for i in np.flatnonzero(assign >= 0):
            lose, win = 0.0, float(problem.budget[i])
            while win - lose > 1e-10 * problem.budget[i]:
                middle = (lose + win) / 2
                budget = problem.budget.copy()
                budget[i] = middle
                trial = _Table(_with_budget(problem, budget), self.config, level, used).place(True)
                if trial[0][i] >= 0:
                    win = middle
                else:
                    lose = middle
            out[i] = win
        return out


def _with_budget(problem: Problem, budget: np.ndarray) -> Problem:
    from dataclasses import replace

    return replace(problem, budget=budget)


class _Table:
    """A problem laid out for the compiled loops: resources in the order of the tree's leaves."""

    def __init__(
        self, problem: Problem, config: MohafConfig, level: np.ndarray | None, used: np.ndarray | None
    ) -> None:
        self.problem, self.config = problem, config
        m = len(problem.cost)
        # One cluster would only add a bound to a scan.
        self.tree = (
            build_tree(problem, config.leaf, config.seed) if config.hierarchy and m > config.leaf else None
        )
        self.order = np.arange(m) if self.tree is None else self.tree.order
        self.req = request_columns(problem)
        self.res = np.column_stack([problem.reliability, problem.availability, problem.energy])[self.order]
        self.place_of = np.ascontiguousarray(problem.resource_location[self.order])
        self.base = np.ascontiguousarray((problem.cost if level is None else level)[self.order])
        self.capacity = np.ascontiguousarray(problem.capacity[self.order])
        taken = np.zeros_like(self.capacity) if used is None else used[self.order]
        self.remaining = np.maximum(self.capacity - taken, 0.0)
        self.share = problem.size / problem.size.mean()
        objective = config.objective
        margin = objective.w_qos / 3
        # Weights of price, reliability and availability in a request's utility.
        self.coef = np.column_stack(
            [
                objective.w_cost * problem.size / problem.budget,
                margin / np.maximum(1 - problem.min_reliability, 1e-9),
                margin / np.maximum(1 - problem.min_availability, 1e-9),
            ]
        )
        some = np.random.default_rng(config.seed).integers(len(self.coef), size=DIRECTIONS)
        self.beta, self.gain_r, self.gain_a = (np.ascontiguousarray(0.9 * c) for c in self.coef[some].T)
        self.still = (
            np.outer(self.res[:, 0], self.gain_r)
            + np.outer(self.res[:, 1], self.gain_a)
            - (objective.w_energy / problem.worst_energy * self.res[:, 2])[:, None]
        )
        boxes = np.zeros((1, 8)) if self.tree is None else static_boxes(problem, self.tree)
        self.box = np.concatenate([boxes, np.zeros((len(boxes), DIRECTIONS))], axis=1)
        n = len(problem.budget)
        self.survey = np.full((n, LIST), -np.inf), np.full((n, LIST), -1, np.int64)
        self.surveyed = False

    def place(
        self, by_density: bool, forced: tuple[int, ...] = ()
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        from .placement import place

        problem, config, tree = self.problem, self.config, self.tree
        nothing = np.zeros(1, np.int64)
        assign, payment, price, count = place(
            self.req,
            problem.demand,
            problem.request_location,
            problem.group,
            problem.group_size,
            self.share,
            np.zeros(len(problem.group_size)),
            self.res,
            self.remaining.copy(),
            self.place_of,
            self.base,
            self.capacity,
            self.order,
            nothing if tree is None else tree.first,
            nothing if tree is None else tree.last,
            np.ones(1, np.bool_) if tree is None else tree.leaf,
            nothing if tree is None else tree.parent,
            nothing if tree is None else tree.home,
            self.box.copy(),
            np.zeros((len(self.box), self.capacity.shape[1])),
            self.still,
            self.coef,
            self.beta,
            self.gain_r,
            self.gain_a,
            *self.survey,
            self.surveyed,
            tree is not None,
            by_density,
            np.array(forced, np.int64),
            problem.worst_energy,
            weights_of(config.objective),
            config.w_fair,
            config.price_eta,
            config.price_target,
            config.price_low,
            config.price_high,
        )
        self.surveyed = True
        prices = np.empty_like(price)
        prices[self.order] = price
        return np.where(assign >= 0, self.order[assign], -1), payment, prices, count
