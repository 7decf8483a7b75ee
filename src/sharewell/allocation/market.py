"""A problem laid out for the compiled loops of placement."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .clusters import cluster
from .core import Objective, Problem
from .offers import Fan, Tree
from .placement import Crowd, Layout, Rules, place

if TYPE_CHECKING:
    from .mohaf import MohafConfig

LIST = 16  # resources remembered of each request
DIRECTIONS = 24  # sampled requests whose weights the clusters' bounds are made for
TREE_FROM = 64  # resources
REGROW = 4  # the tree is cut anew each time this part of the resources took another request
CAPACITY_SCALE = 0.1  # of utility for room of one mean demand: what decides whether a cut is by capacity


def ask_rows(problem: Problem) -> np.ndarray:
    """[N, 7 + D]: requests as the compiled loops read them; see :mod:`.offers`."""
    return np.column_stack(
        [
            problem.budget,
            problem.min_reliability,
            problem.min_availability,
            problem.max_latency_ms,
            problem.size,
            problem.request_location,
            problem.demand,
        ]
    )


def offer_rows(problem: Problem, price: np.ndarray, left: np.ndarray) -> np.ndarray:
    """[M, 6 + D]: resources as the compiled loops read them, at ``price`` [M] and with ``left`` [M, D]."""
    return np.column_stack(
        [
            problem.reliability,
            problem.availability,
            problem.energy,
            problem.resource_location,
            price,
            left,
        ]
    )


def weights_of(objective: Objective) -> np.ndarray:
    return np.array([objective.w_cost, objective.w_qos, objective.w_energy])


class Market:
    """A problem laid out for the compiled loops."""

    def __init__(
        self, problem: Problem, config: MohafConfig, level: np.ndarray | None, used: np.ndarray | None
    ) -> None:
        self.problem, self.config = problem, config
        n, m = len(problem.budget), len(problem.cost)
        # A few resources are looked at faster one by one.
        self.clusters = cluster(problem, config.seed) if config.hierarchy and m > TREE_FROM else None
        self.ask = ask_rows(problem)
        self.base = problem.cost if level is None else np.ascontiguousarray(level, float)
        taken = np.zeros_like(problem.capacity) if used is None else used
        self.offer = offer_rows(problem, self.base, np.maximum(problem.capacity - taken, 0.0))
        self.share = problem.size / problem.size.mean()
        objective = config.objective
        margin = objective.w_qos / 3
        # Weights of price, reliability and availability in a request's utility.
        coef = np.column_stack(
            [
                objective.w_cost * problem.size / problem.budget,
                margin / np.maximum(1 - problem.min_reliability, 1e-9),
                margin / np.maximum(1 - problem.min_availability, 1e-9),
            ]
        )
        unit_energy = objective.w_energy / problem.worst_energy
        self.fan = _fan(problem, coef, unit_energy, np.random.default_rng(config.seed))
        middle = np.median(coef, axis=0)
        near = margin / np.median(problem.max_latency_ms)
        room = CAPACITY_SCALE / problem.demand.mean(axis=0)
        # What one unit along each column of an offer is worth in utility; for capacity, how often it decides.
        scale = [middle[1], middle[2], unit_energy, near, near, middle[0], *room]
        groups = self.clusters
        self.layout = Layout(
            np.zeros(1, np.int64) if groups is None else groups.label.astype(np.int64),
            0 if groups is None else groups.count,
            np.array(scale),
            config.leaf,
            0 if groups is None else max(1, m // REGROW),
        )
        self.rules = Rules(
            problem.worst_energy,
            weights_of(objective),
            objective.w_fair,
            config.price_eta,
            config.price_target,
            config.price_low,
            config.price_high,
        )
        self.survey = np.full((n, LIST), -np.inf), np.full((n, LIST), -1, np.int32)
        self.surveyed = False

    def place(
        self, by_density: bool, forced: tuple[int, ...] = ()
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(assign, payment, price, counters) of one order; see :func:`placement.place`."""
        problem, offer = self.problem, self.offer.copy()
        size = problem.group_size
        assign, payment, count = place(
            self.ask,
            offer,
            self.base,
            problem.capacity,
            Crowd(problem.group, self.share, size, np.zeros(len(size))),
            self.rules,
            self.layout,
            _empty_tree(self.layout, len(offer), problem.capacity.shape[1]),
            self.fan,
            *self.survey,
            self.surveyed,
            by_density,
            np.array(forced, np.int64),
        )
        self.surveyed = True
        return assign, payment, offer[:, 5], count


def _fan(problem: Problem, coef: np.ndarray, unit_energy: float, rng: np.random.Generator) -> Fan:
    some = rng.integers(len(coef), size=DIRECTIONS)
    rays = 0.9 * coef[some]  # a little shorter, so that more requests have all of one within them
    fixed = (
        np.outer(problem.reliability, rays[:, 1])
        + np.outer(problem.availability, rays[:, 2])
        - (unit_energy * problem.energy)[:, None]
    )
    near, share = np.zeros(len(coef), np.int64), np.full(len(coef), -1.0)
    for t, ray in enumerate(rays):
        reach = np.minimum(1.0, (coef / np.maximum(ray, 1e-300)).min(axis=1))
        near[reach > share], share = t, np.maximum(share, reach)
    price, reliability, availability = np.ascontiguousarray(rays.T)
    return Fan(fixed, price, reliability, availability, np.ascontiguousarray(coef), near, share)


def _empty_tree(layout: Layout, m: int, dims: int) -> Tree:
    """Room for every node: median cuts leave more than half a leaf in each."""
    nodes = 1 if not layout.every else 1 + 3 * layout.clusters + 4 * m // (layout.leaf_size + 1)
    return Tree(
        np.zeros(nodes, np.int64),
        np.zeros(nodes, np.int64),
        np.zeros(nodes, np.bool_),
        np.zeros(nodes, np.int64),
        np.zeros(m, np.int64),
        np.zeros(m, np.int64),
        np.zeros((nodes, 8 + DIRECTIONS)),
        np.zeros((nodes, dims)),
        np.empty(nodes + 1),
        np.empty(nodes + 1, np.int64),
        np.zeros(1, np.int64),
    )
