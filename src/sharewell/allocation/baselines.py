"""What MOHAF is measured against: the same interface, simpler rules, all at list cost unless they say
else.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .core import Allocation, Objective, Problem, realised

Choose = Callable[[int, np.ndarray, np.ndarray], int]  # request, feasible resources, remaining [M, D]


def _in_order(
    problem: Problem, order: np.ndarray, choose: Choose, objective: Objective, pay_budget: bool = False
) -> Allocation:
    """Take requests in ``order``; each goes to what ``choose`` picks of the resources that can take it."""
    remaining = problem.capacity.copy()
    assign, payment = np.full(len(order), -1, np.int64), np.zeros(len(order))
    for i in order:
        i = int(i)
        ok = problem.allowed(i, problem.cost) & (problem.demand[i] <= remaining).all(axis=1)
        feasible = np.flatnonzero(ok)
        if not len(feasible):
            continue
        j = choose(i, feasible, remaining)
        remaining[j] -= problem.demand[i]
        assign[i] = j
        payment[i] = problem.budget[i] if pay_budget else problem.cost[j] * problem.size[i]
    return Allocation(assign, problem.cost.copy(), payment, realised(problem, assign, payment, objective))


class RandomAuction:
    """Requests in random order, each on a random resource that can take it."""

    def __init__(self, seed: int = 0, objective: Objective | None = None) -> None:
        self.seed, self.objective = seed, objective or Objective()

    def solve(self, problem: Problem) -> Allocation:
        rng = np.random.default_rng(self.seed)
        order = rng.permutation(len(problem.budget))
        return _in_order(problem, order, lambda _i, ok, _r: int(rng.choice(ok)), self.objective)


class GreedyAuction:
    """Highest budget first, each on the resource of greatest utility that can take it."""

    def __init__(self, objective: Objective | None = None) -> None:
        self.objective = objective or Objective()

    def solve(self, problem: Problem) -> Allocation:
        def best(i: int, ok: np.ndarray, _remaining: np.ndarray) -> int:
            return int(ok[problem.utilities(i, problem.cost * problem.size[i], self.objective)[ok].argmax()])

        order = np.argsort(-problem.budget, kind="stable")
        return _in_order(problem, order, best, self.objective)


class FirstPriceAuction:
    """Highest budget first, winners pay their whole budget and take the best service they can get for it."""

    def __init__(self, objective: Objective | None = None) -> None:
        self.objective = objective or Objective()

    def solve(self, problem: Problem) -> Allocation:
        def best(i: int, ok: np.ndarray, _remaining: np.ndarray) -> int:
            same = np.full(len(problem.cost), problem.budget[i])
            return int(ok[problem.utilities(i, same, self.objective)[ok].argmax()])

        order = np.argsort(-problem.budget, kind="stable")
        return _in_order(problem, order, best, self.objective, pay_budget=True)


class BestFit:
    """First come first served, each on the resource that it fills most (Kubernetes' MostAllocated score)."""

    def __init__(self, objective: Objective | None = None) -> None:
        self.objective = objective or Objective()

    def solve(self, problem: Problem) -> Allocation:
        def fullest(i: int, ok: np.ndarray, remaining: np.ndarray) -> int:
            room = np.maximum(problem.capacity[ok], 1e-300)
            return int(ok[((remaining[ok] - problem.demand[i]) / room).mean(axis=1).argmin()])

        return _in_order(problem, np.arange(len(problem.budget)), fullest, self.objective)


class FirstComeFirstServed:
    """First come first served, each on the lowest-numbered resource that can take it."""

    def __init__(self, objective: Objective | None = None) -> None:
        self.objective = objective or Objective()

    def solve(self, problem: Problem) -> Allocation:
        order = np.arange(len(problem.budget))
        return _in_order(problem, order, lambda _i, ok, _r: int(ok[0]), self.objective)
