"""MOHAF: a lazy greedy auction over a tree of resources, with prices that follow load.

Agrawal et al. 2025, arXiv 2508.14830. Weights, price rule and clusters are ours where the paper is silent.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from .core import Allocation, Objective, Problem, objective_value, realised

ENUMERATE_AT_MOST = 60
CRITICAL_AT_MOST = 500


@dataclass(frozen=True)
class MohafConfig:
    """``hierarchy``: search clusters of resources, cut into groups of at most ``leaf`` members (exact, and
    faster where resources are many). Prices are the level of the resource times clip(1 + price_eta (load -
    price_target), price_low, price_high).

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
    leaf: int = 16
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
        from .market import Market

        config = self.config
        n = len(problem.budget)
        if config.guarantee == "enumerate" and n > ENUMERATE_AT_MOST:
            raise ValueError(f"guarantee='enumerate' is for at most {ENUMERATE_AT_MOST} requests, got {n}")
        if config.payment == "critical" and n > CRITICAL_AT_MOST:
            raise ValueError(f"payment='critical' is for at most {CRITICAL_AT_MOST} requests, got {n}")
        table = Market(problem, config, level, used)
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
        stats: dict[str, Any] = {
            "order": "density" if by_density else "gain",
            "clusters": table.layout.clusters,
            "silhouette": 0.0 if table.clusters is None else table.clusters.silhouette,
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
        from .market import Market

        out = np.zeros_like(posted)
        for i in np.flatnonzero(assign >= 0):
            lose, win = 0.0, float(problem.budget[i])
            while win - lose > 1e-10 * problem.budget[i]:
                middle = (lose + win) / 2
                budget = problem.budget.copy()
                budget[i] = middle
                trial = Market(replace(problem, budget=budget), self.config, level, used).place(True)
                if trial[0][i] >= 0:
                    win = middle
                else:
                    lose = middle
            out[i] = win
        return out
