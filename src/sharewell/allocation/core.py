"""The auction core: problems, mechanisms and their allocations, and metrics in which losers count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, Protocol

import numpy as np


class ProblemError(ValueError):
    """A request or resource that makes no sense; the message names column and rows."""


@dataclass(frozen=True)
class Objective:
    """What an allocation is worth: utilities of the placed pairs, plus ``w_fair`` times the fairness term.

    u_ij = w_cost (1 - payment / budget) + w_qos (mean margin of reliability, availability and latency over
    the request's floors) + w_energy (1 - energy_j / worst energy), each term in [0, 1] on feasible pairs.
    Fairness: sum over groups of sqrt(n_g s_g), with n_g the group's requests and s_g its served demand in
    units of the mean demand. Monotone and submodular in the set of placed requests (MOHAF, arXiv 2508.14830).
    """

    w_cost: float = 0.3
    w_qos: float = 0.3
    w_energy: float = 0.2
    w_fair: float = 0.2

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if not 0 <= value < np.inf:
                raise ValueError(f"{item.name} must be finite and at least 0, got {value}")
        if not self.w_cost + self.w_qos + self.w_energy + self.w_fair > 0:
            raise ValueError("the weights must not all be 0")


@dataclass(frozen=True)
class Request:
    """One request: ``demand`` for each kind of capacity, the most it pays in all, and its floors.

    ``location``: a point in a plane where distance is latency in milliseconds.
    """

    demand: Sequence[float]
    budget: float
    group: int = 0
    min_reliability: float = 0.0
    min_availability: float = 0.0
    max_latency_ms: float = 1e9
    location: Sequence[float] = (0.0, 0.0)


@dataclass(frozen=True)
class Resource:
    """One resource: ``capacity`` of each kind, ``cost`` and ``energy`` per unit of demand."""

    capacity: Sequence[float]
    cost: float
    reliability: float = 1.0
    availability: float = 1.0
    energy: float = 1.0
    location: Sequence[float] = (0.0, 0.0)


@dataclass(frozen=True, eq=False)
class Problem:
    """N requests and M resources as arrays; D kinds of capacity. Raises ProblemError naming column and rows.

    Requests: ``demand`` [N, D] (at least 0, not all 0), ``budget`` [N] positive, ``group`` [N] whole numbers
    from 0, ``min_reliability`` and ``min_availability`` [N] in [0, 1], ``max_latency_ms`` [N] positive,
    ``request_location`` [N, 2]. Resources: ``capacity`` [M, D], ``cost`` [M] positive, ``reliability`` and
    ``availability`` [M] in [0, 1], ``energy`` [M] at least 0, ``resource_location`` [M, 2].
    """

    demand: np.ndarray
    budget: np.ndarray
    group: np.ndarray
    min_reliability: np.ndarray
    min_availability: np.ndarray
    max_latency_ms: np.ndarray
    request_location: np.ndarray
    capacity: np.ndarray
    cost: np.ndarray
    reliability: np.ndarray
    availability: np.ndarray
    energy: np.ndarray
    resource_location: np.ndarray

    def __post_init__(self) -> None:
        for item in fields(self):
            wanted = np.int64 if item.name == "group" else np.float64
            try:
                array = np.ascontiguousarray(getattr(self, item.name), wanted)
            except (TypeError, ValueError):
                raise ProblemError(f"{item.name} must be numbers") from None
            object.__setattr__(self, item.name, array)
        if self.demand.ndim != 2 or self.capacity.ndim != 2 or self.demand.shape[1] != self.capacity.shape[1]:
            raise ProblemError(
                f"demand [N, D] and capacity [M, D] must agree in D, got {self.demand.shape} "
                f"and {self.capacity.shape}"
            )
        n, m = len(self.demand), len(self.capacity)
        if not n or not m or not self.demand.shape[1]:
            raise ProblemError(f"there must be a request, a resource and a capacity, got {n} and {m}")
        shapes = {
            **dict.fromkeys(
                ("budget", "group", "min_reliability", "min_availability", "max_latency_ms"), (n,)
            ),
            **dict.fromkeys(("cost", "reliability", "availability", "energy"), (m,)),
            "request_location": (n, 2),
            "resource_location": (m, 2),
        }
        for name, shape in shapes.items():
            if getattr(self, name).shape != shape:
                raise ProblemError(f"{name} must have shape {shape}, got {getattr(self, name).shape}")
        self._check(
            "demand", (self.demand >= 0).all(axis=1) & (self.demand.sum(axis=1) > 0), "at least 0, not all 0"
        )
        self._check("budget", self.budget > 0, "positive")
        self._check("group", self.group >= 0, "a whole number from 0")
        self._check("max_latency_ms", self.max_latency_ms > 0, "positive")
        self._check("capacity", (self.capacity >= 0).all(axis=1), "at least 0")
        self._check("cost", self.cost > 0, "positive")
        self._check("energy", self.energy >= 0, "at least 0")
        for name in ("min_reliability", "min_availability", "reliability", "availability"):
            value = getattr(self, name)
            self._check(name, (value >= 0) & (value <= 1), "in [0, 1]")
        for name in ("request_location", "resource_location"):
            self._check(name, np.isfinite(getattr(self, name)).all(axis=1), "finite")

    def _check(self, name: str, good: Any, rule: str) -> None:
        value = getattr(self, name)
        good = good & np.isfinite(value.reshape(len(value), -1)).all(axis=1)  # NaN compares false already
        if not good.all():
            rows = np.flatnonzero(~good)
            shown = ", ".join(map(str, rows[:8])) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
            raise ProblemError(f"{name} must be {rule}; row {shown}")

    @classmethod
    def from_arrays(cls, **arrays: Any) -> Problem:
        """The fields by name; floors default to none, groups to one, places to one point."""
        n, m = len(arrays["demand"]), len(arrays["capacity"])
        defaults: dict[str, Any] = {
            "group": np.zeros(n, int),
            "min_reliability": np.zeros(n),
            "min_availability": np.zeros(n),
            "max_latency_ms": np.full(n, 1e9),
            "request_location": np.zeros((n, 2)),
            "reliability": np.ones(m),
            "availability": np.ones(m),
            "energy": np.ones(m),
            "resource_location": np.zeros((m, 2)),
        }
        unknown = set(arrays) - {item.name for item in fields(cls)}
        if unknown:
            raise ProblemError(f"unknown columns: {', '.join(sorted(unknown))}")
        return cls(**{**defaults, **arrays})

    @classmethod
    def from_records(cls, requests: Sequence[Request], resources: Sequence[Resource]) -> Problem:
        """From one object a request and resource."""
        return cls(
            demand=np.array([r.demand for r in requests], float),
            budget=np.array([r.budget for r in requests], float),
            group=np.array([r.group for r in requests]),
            min_reliability=np.array([r.min_reliability for r in requests], float),
            min_availability=np.array([r.min_availability for r in requests], float),
            max_latency_ms=np.array([r.max_latency_ms for r in requests], float),
            request_location=np.array([r.location for r in requests], float),
            capacity=np.array([r.capacity for r in resources], float),
            cost=np.array([r.cost for r in resources], float),
            reliability=np.array([r.reliability for r in resources], float),
            availability=np.array([r.availability for r in resources], float),
            energy=np.array([r.energy for r in resources], float),
            resource_location=np.array([r.location for r in resources], float),
        )

    @classmethod
    def synthetic(cls, n: int = 3553, m: int = 888, tightness: float = 0.28, seed: int = 0) -> Problem:
        """See ``traces.synthetic``."""
        from .traces import synthetic

        return synthetic(n, m, tightness, seed)

    @classmethod
    def from_google_trace(cls, path: Any, machines: Any = None, split: float = 0.8, seed: int = 0) -> Problem:
        """See ``traces.from_google_trace``."""
        from .traces import from_google_trace

        return from_google_trace(path, machines, split, seed)

    @cached_property
    def size(self) -> np.ndarray:
        """[N]: demand over all kinds of capacity; what cost and energy are counted by."""
        return self.demand.sum(axis=1)

    @cached_property
    def worst_energy(self) -> float:
        return max(float(self.energy.max()), 1e-300)

    @cached_property
    def group_size(self) -> np.ndarray:
        return np.bincount(self.group).astype(float)

    def latency_ms(self, i: int) -> np.ndarray:
        """[M]: from request ``i`` to each resource."""
        gap = self.resource_location - self.request_location[i]
        return np.sqrt(gap[:, 0] * gap[:, 0] + gap[:, 1] * gap[:, 1])

    def allowed(self, i: int, price: np.ndarray) -> np.ndarray:
        """[M] bool: resources that meet the floors and budget of ``i`` at ``price`` [M] per unit, whatever
        their load."""
        return (
            (self.reliability >= self.min_reliability[i])
            & (self.availability >= self.min_availability[i])
            & (self.latency_ms(i) <= self.max_latency_ms[i])
            & (price * self.size[i] <= self.budget[i])
        )

    def utilities(self, i: int, payment: np.ndarray, objective: Objective) -> np.ndarray:
        """[M]: u_ij of request ``i`` for the ``payment`` [M] that each resource would take."""
        reliability = (self.reliability - self.min_reliability[i]) / max(1 - self.min_reliability[i], 1e-9)
        availability = (self.availability - self.min_availability[i]) / max(
            1 - self.min_availability[i], 1e-9
        )
        latency = 1 - self.latency_ms(i) / self.max_latency_ms[i]
        return (
            objective.w_cost * (1 - payment / self.budget[i])
            + objective.w_qos * (reliability + availability + latency) / 3
            + objective.w_energy * (1 - self.energy / self.worst_energy)
        )


@dataclass(frozen=True, eq=False)
class Allocation:
    """``assign`` [N]: resource of each request, -1 for none. ``price`` [M]: per unit at the end. ``payment``
    [N]. ``utility`` [N]: realised u, 0 for losers. ``stats``: what the mechanism says about itself."""

    assign: np.ndarray
    price: np.ndarray
    payment: np.ndarray
    utility: np.ndarray
    stats: Mapping[str, Any] = field(default_factory=dict)


class Mechanism(Protocol):
    """Anything that places requests on resources."""

    def solve(self, problem: Problem, /) -> Allocation: ...


def realised(problem: Problem, assign: np.ndarray, payment: np.ndarray, objective: Objective) -> np.ndarray:
    """[N]: u of every placed request for what it pays; 0 for losers."""
    out = np.zeros(len(assign))
    i = np.flatnonzero(assign >= 0)
    j = assign[i]
    gap = problem.resource_location[j] - problem.request_location[i]
    latency = np.sqrt((gap**2).sum(axis=1))
    floor_r, floor_a = problem.min_reliability[i], problem.min_availability[i]
    margins = (
        (problem.reliability[j] - floor_r) / np.maximum(1 - floor_r, 1e-9)
        + (problem.availability[j] - floor_a) / np.maximum(1 - floor_a, 1e-9)
        + 1
        - latency / problem.max_latency_ms[i]
    )
    out[i] = (
        objective.w_cost * (1 - payment[i] / problem.budget[i])
        + objective.w_qos * margins / 3
        + objective.w_energy * (1 - problem.energy[j] / problem.worst_energy)
    )
    return out


def fairness_term(problem: Problem, assign: np.ndarray) -> float:
    """sum over groups of sqrt(n_g s_g), s_g in units of the mean demand."""
    share = np.where(assign >= 0, problem.size, 0.0) / problem.size.mean()
    served = np.bincount(problem.group, share, len(problem.group_size))
    return float(np.sqrt(problem.group_size * served).sum())


def objective_value(problem: Problem, allocation: Allocation, objective: Objective) -> float:
    """F(A): utilities plus the weighted fairness term."""
    value = realised(problem, allocation.assign, allocation.payment, objective).sum()
    return float(value) + objective.w_fair * fairness_term(problem, allocation.assign)


def check_allocation(problem: Problem, allocation: Allocation) -> None:
    """Raises ProblemError when a capacity, floor or budget is broken: for tests and before acting on it."""
    used = usage(problem, allocation.assign)
    over = np.flatnonzero((used > problem.capacity * (1 + 1e-9) + 1e-12).any(axis=1))
    if len(over):
        raise ProblemError(f"capacity exceeded on resource {over[0]}")
    for i in np.flatnonzero(allocation.assign >= 0):
        j = allocation.assign[i]
        if not problem.allowed(int(i), np.zeros(len(problem.cost)))[j]:
            raise ProblemError(f"request {i} is on resource {j}, which misses its floors")
        if allocation.payment[i] > problem.budget[i] * (1 + 1e-9):
            raise ProblemError(f"request {i} pays more than its budget")


def usage(problem: Problem, assign: np.ndarray) -> np.ndarray:
    """[M, D]: demand placed on each resource."""
    used = np.zeros_like(problem.capacity)
    placed = assign >= 0
    np.add.at(used, assign[placed], problem.demand[placed])
    return used


def jain(values: np.ndarray) -> float:
    """Jain's index (sum x)^2 / (n sum x^2): 1 when all are equal, 1/n when one has it all; 1 for all zero."""
    x = np.asarray(values, float)
    squares = float((x * x).sum())
    return 1.0 if squares == 0 else float(x.sum()) ** 2 / (len(x) * squares)


def best_utilities(problem: Problem, objective: Objective) -> np.ndarray:
    """[N]: the best u that each request could have alone at list cost; 0 where nothing is feasible."""
    out = np.zeros(len(problem.budget))
    for i in range(len(out)):
        ok = problem.allowed(i, problem.cost) & (problem.demand[i] <= problem.capacity).all(axis=1)
        if ok.any():
            out[i] = problem.utilities(i, problem.cost * problem.size[i], objective)[ok].max()
    return out


def metrics(
    problem: Problem,
    allocation: Allocation,
    objective: Objective | None = None,
    *,
    best: np.ndarray | None = None,
) -> dict[str, float]:
    """Figures of an allocation; ``best`` is :func:`best_utilities` when it is known already.

    ``satisfied``: share of all requests that are placed. ``utility_ratio``: realised u over the sum of each
    request's best feasible u; ``utility_ratio_list``: the same with every winner charged list cost, so that
    price rules do not count. ``jain_groups``: over the groups' satisfied shares; ``jain_all``: of u over all
    requesters, losers with 0. ``welfare``: F. ``energy``: per unit, summed over placed demand.
    """
    objective = objective or Objective()
    assign = allocation.assign
    placed = assign >= 0
    best = best_utilities(problem, objective) if best is None else best
    total = max(float(best.sum()), 1e-300)
    u = realised(problem, assign, allocation.payment, objective)
    list_payment = np.where(placed, problem.cost[np.maximum(assign, 0)] * problem.size, 0.0)
    at_list = realised(problem, assign, list_payment, objective)
    shares = np.bincount(problem.group, placed, len(problem.group_size))
    present = problem.group_size > 0
    gap = problem.resource_location[assign[placed]] - problem.request_location[placed]
    latency = np.sqrt((gap**2).sum(axis=1))
    used, capacity = usage(problem, assign), problem.capacity
    return {
        "satisfied": float(placed.mean()),
        "utility_ratio": float(u.sum()) / total,
        "utility_ratio_list": float(at_list.sum()) / total,
        "welfare": float(u.sum()) + objective.w_fair * fairness_term(problem, assign),
        "revenue": float(allocation.payment[placed].sum()),
        "utilisation": float((used.sum(axis=0) / np.maximum(capacity.sum(axis=0), 1e-300)).mean()),
        "energy": float((problem.energy[assign[placed]] * problem.size[placed]).sum()),
        "jain_groups": jain(shares[present] / problem.group_size[present]),
        "jain_all": jain(u),
        "p95_latency_ms": float(np.percentile(latency, 95)) if len(latency) else 0.0,
    }


def explain(problem: Problem, allocation: Allocation) -> dict[int, str]:
    """For each request that was not placed, the constraint that keeps it out."""
    reasons: dict[int, str] = {}
    for i in np.flatnonzero(allocation.assign < 0):
        i = int(i)
        alone = {
            "reliability": problem.reliability >= problem.min_reliability[i],
            "availability": problem.availability >= problem.min_availability[i],
            "latency": problem.latency_ms(i) <= problem.max_latency_ms[i],
            "budget": problem.cost * problem.size[i] <= problem.budget[i],
            "capacity": (problem.demand[i] <= problem.capacity).all(axis=1),
        }
        never = [name for name, ok in alone.items() if not ok.any()]
        if never:
            reasons[i] = f"no resource meets its {' and its '.join(never)}"
        elif not np.logical_and.reduce(list(alone.values())).any():
            reasons[i] = "no resource meets all its floors together"
        else:
            reasons[i] = "capacity or price: taken by requests that were worth more"
    return reasons
