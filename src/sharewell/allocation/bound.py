"""How far from the optimum: the LP relaxation by column generation, and a bound that holds at every step.

For any prices lambda >= 0 on capacities and nu > 0 on the groups' served demand,
``sum lambda C + sum_g max_s (w sqrt(n_g s) - nu_g s) + sum_i max(0, max_j u_ij + nu d_i - lambda_j d_i)``
is at least F of every allocation. HiGHS finds good prices on a few columns a request; looking at all pairs
then makes the bound true for the whole problem.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .core import Allocation, Objective, Problem


@dataclass(frozen=True)
class BoundResult:
    """``upper``: no allocation has a greater F. ``relaxed``: F of the relaxation on the columns used.
    ``rounds`` of column generation, ``columns`` in the last."""

    upper: float
    relaxed: float
    rounds: int
    columns: int


class LPBound:
    """Upper bound on F at prices ``price_factor`` times cost (1 is list cost; for a mechanism whose prices
    fall below cost take its lowest factor). ``gap``: relative distance of bound and relaxation to stop at."""

    def __init__(
        self,
        objective: Objective | None = None,
        price_factor: float = 1.0,
        columns: int = 8,
        max_rounds: int = 8,
        gap: float = 2e-3,
    ) -> None:
        if not price_factor > 0:
            raise ValueError(f"price_factor must be positive, got {price_factor}")
        if columns < 1 or max_rounds < 1:
            raise ValueError("columns and max_rounds must be at least 1")
        self.objective, self.factor = objective or Objective(), price_factor
        self.columns, self.max_rounds, self.gap = columns, max_rounds, gap

    def solve(self, problem: Problem, start: Allocation | None = None) -> BoundResult:
        """The bound; the pairs of ``start`` are among the first columns."""
        from scipy.optimize import linprog
        from scipy.sparse import coo_matrix

        from .market import ask_rows, offer_rows, weights_of
        from .offers import best_reduced

        n, (m, dims) = len(problem.budget), problem.capacity.shape
        groups, size = len(problem.group_size), problem.size / problem.size.mean()
        w, w_fair, price = weights_of(self.objective), self.objective.w_fair, problem.cost * self.factor
        ask, offer = ask_rows(problem), offer_rows(problem, price, problem.capacity)

        def best(duals: np.ndarray, keep: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            return best_reduced(ask, offer, duals, problem.worst_energy, w, keep)

        rows, _, utility = best(np.zeros((m, dims)), self.columns)
        pairs: dict[tuple[int, int], float] = {}
        for k in range(rows.shape[1]):
            for i in np.flatnonzero(rows[:, k] >= 0):
                pairs[int(i), int(rows[i, k])] = float(utility[i, k])
        if start is not None:
            for i in np.flatnonzero(start.assign >= 0):
                i, j = int(i), int(start.assign[i])
                ok = problem.allowed(i, price)[j]
                if ok:
                    pairs.setdefault(
                        (i, j), float(problem.utilities(i, price * problem.size[i], self.objective)[j])
                    )
        whole = np.bincount(problem.group, size, groups)
        upper, relaxed, rounds = np.inf, 0.0, 0
        while rounds < self.max_rounds:
            rounds += 1
            i, j = np.array([p[0] for p in pairs]), np.array([p[1] for p in pairs])
            u = np.fromiter(pairs.values(), float, len(pairs))
            k = len(pairs)
            # Variables: x of the pairs, s_g, t_g <= tangents of sqrt(n_g s). Rows: capacity, one place each,
            # served demand of the groups, tangents.
            cut_points = [
                np.geomspace(max(whole[g], 1e-9) * 1e-4, max(whole[g], 1e-9), 24) for g in range(groups)
            ]
            r, c, v, b = [], [], [], []
            for d in range(dims):
                r.append(j * dims + d)
                c.append(np.arange(k))
                v.append(problem.demand[i, d])
            b.append(problem.capacity.reshape(-1))
            at = m * dims
            r.append(at + i)
            c.append(np.arange(k))
            v.append(np.ones(k))
            b.append(np.ones(n))
            at += n
            # s_g - sum d x <= 0: its dual is nu_g.
            r += [at + np.arange(groups), at + problem.group[i]]
            c += [k + np.arange(groups), np.arange(k)]
            v += [np.ones(groups), -size[i]]
            b.append(np.zeros(groups))
            served_row = at
            at += groups
            for g in range(groups):
                for s in cut_points[g]:
                    slope = 0.5 * np.sqrt(problem.group_size[g] / s)
                    r.append(np.array([at, at]))
                    c.append(np.array([k + groups + g, k + g]))
                    v.append(np.array([1.0, -slope]))
                    b.append(np.array([np.sqrt(problem.group_size[g] * s) - slope * s]))
                    at += 1
            matrix = coo_matrix(
                (np.concatenate(v), (np.concatenate(r), np.concatenate(c))), (at, k + 2 * groups)
            )
            cost = -np.concatenate([u, np.zeros(groups), np.full(groups, w_fair)])
            solved = linprog(
                cost, A_ub=matrix.tocsr(), b_ub=np.concatenate(b), bounds=(0, None), method="highs-ds"
            )
            if solved.status != 0:
                raise RuntimeError(f"HiGHS did not solve the relaxation: {solved.message}")
            relaxed = -float(solved.fun)
            dual = np.maximum(-solved.ineqlin.marginals, 0.0)
            toll = dual[: m * dims].reshape(m, dims)
            nu = np.maximum(dual[served_row : served_row + groups], 1e-9)
            rows, net, utility = best(toll, 4)
            fair = self._fair_part(nu, whole, problem.group_size, w_fair)
            value = np.maximum(net[:, 0] + nu[problem.group] * size, 0.0)
            upper = min(
                upper, float((toll * problem.capacity).sum() + fair.sum() + value[np.isfinite(value)].sum())
            )
            if upper - relaxed <= self.gap * upper:
                break
            before = len(pairs)
            fresh = net + (nu[problem.group] * size - dual[m * dims : m * dims + n])[:, None] > 1e-9
            for column in range(rows.shape[1]):
                for q in np.flatnonzero((rows[:, column] >= 0) & fresh[:, column]):
                    pairs[int(q), int(rows[q, column])] = float(utility[q, column])
            if len(pairs) == before:
                break
        return BoundResult(upper, relaxed, rounds, len(pairs))

    @staticmethod
    def _fair_part(nu: np.ndarray, whole: np.ndarray, size: np.ndarray, w: float) -> np.ndarray:
        """max over 0 <= s <= whole of w sqrt(n s) - nu s, for each group."""
        s = np.minimum(w * w * size / (4 * nu * nu), whole)
        return w * np.sqrt(size * s) - nu * s
