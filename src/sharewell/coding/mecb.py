"""Minimum-entropy coupling with a bottleneck: as much of X as R bits let through, dressed as Y.

X - T - Y with both marginals exact: an encoder that maximises I(X; T) subject to H(T) <= R, then a coupling
of T with Y of least joint entropy. Source: Ebrahimi, Chen and Khisti 2024 (2410.21666): algorithm 1 (the
greedy encoder), theorem 2 (its gap is at most the binary entropy of the second largest mass), theorem 3
(how to use what is left of the rate). Beam, exact search and the bisection that meets the rate exactly are
ours."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numba import njit

from .coupling import Coupling, min_entropy_coupling
from .info import distribution, entropy, mutual_information

METHODS = ("greedy", "beam", "exact")
_EXACT_LIMIT = 9
_SLACK = 1e-12


@dataclass(frozen=True)
class Encoder:
    """p(x, t) [n, k], its rate H(T) and its information I(X; T), both in bits."""

    p_xt: np.ndarray
    rate: float
    info: float


@njit(cache=True)
def _lost(p, q):
    """Entropy in bits that merging two masses takes away."""
    if p <= 0 or q <= 0:
        return 0.0
    return p * np.log2(1 + q / p) + q * np.log2(1 + p / q)


@njit(cache=True)
def greedy_labels(p, rate):
    """int64 [n]: the column of each symbol. Merging the two largest columns leaves one that is larger
    still, so one sort serves for all merges: the columns are a merged head, the masses between, and at the
    end perhaps the two smallest together. O(n log n)."""
    n = p.size
    order = np.argsort(-p, kind="mergesort")
    positive = 0
    h = 0.0
    for i in range(n):
        if p[order[i]] > 0:
            positive += 1
            h -= p[order[i]] * np.log2(p[order[i]])
    labels = np.zeros(n, np.int64)
    for i in range(positive):
        labels[order[i]] = i
    if rate >= h - _SLACK:
        return labels
    head, taken = p[order[0]], 1
    while taken < positive:
        left = positive - taken
        a = p[order[positive - 1]]
        b = p[order[positive - 2]] if left > 1 else head
        if h - _lost(a, b) <= rate + _SLACK:
            if left > 1:
                labels[order[positive - 1]] = positive - 2
            else:
                labels[order[positive - 1]] = 0
            break
        following = p[order[taken]]
        h -= _lost(head, following)
        head += following
        labels[order[taken]] = 0
        taken += 1
        if h <= rate + _SLACK:
            break
    # columns numbered 0, 1, 2, ... in order of their mass
    for i in range(positive):
        if labels[order[i]] >= taken:
            labels[order[i]] -= taken - 1
    return labels


def _columns(p: np.ndarray, labels: np.ndarray) -> np.ndarray:
    values, compact = np.unique(labels[p > 0], return_inverse=True)
    out = np.zeros((len(p), len(values)))
    out[np.flatnonzero(p > 0), compact] = p[p > 0]
    return out


def _h(masses: np.ndarray) -> float:
    masses = masses[masses > 0]
    return float(-(masses * np.log2(masses)).sum())


def _info(p_xt: np.ndarray) -> float:
    return max(0.0, _h(p_xt.sum(1)) + _h(p_xt.sum(0)) - _h(p_xt))


def _partitions(n: int) -> Iterator[list[int]]:
    """All set partitions of n things, as labels."""

    def grow(labels: list[int], used: int) -> Iterator[list[int]]:
        if len(labels) == n:
            yield labels
            return
        for label in range(used + 1):
            yield from grow([*labels, label], max(used, label + 1))

    return grow([], 0)


def _beam_labels(p: np.ndarray, rate: float, width: int) -> list[np.ndarray]:
    """Partitions near the rate, on both sides of it, from a beam over merges of pairs."""
    positive = np.flatnonzero(p > 0)
    start = tuple(sorted(((float(p[i]), 1 << k) for k, i in enumerate(positive)), reverse=True))
    states = [(_h(p), start)]
    below: list[tuple[float, tuple]] = []
    above: list[tuple[float, tuple]] = list(states)
    while states:
        reached: dict[tuple, tuple[float, tuple]] = {}
        for h, columns in states:
            k = len(columns)
            # of many columns only neighbours in size and the extremes are paired: others lose alike
            pairs = ((i, j) for i in range(k) for j in range(i + 1, k) if k <= 16 or j - i <= 2 or i == 0)
            for i, j in pairs:
                (a, x), (b, y) = columns[i], columns[j]
                rest = [c for m, c in enumerate(columns) if m not in (i, j)]
                merged = tuple(sorted([*rest, (a + b, x | y)], reverse=True))
                key = tuple(round(mass, 12) for mass, _ in merged)
                if key not in reached:
                    reached[key] = (h - float(_lost(a, b)), merged)
        found = sorted(reached.values(), key=lambda s: s[0])
        below += [s for s in found if s[0] <= rate + _SLACK][-3:]
        rising = [s for s in found if s[0] > rate + _SLACK]
        above += rising[:3]
        # near the rate one merge of small masses ends the search, far above it more merges are to come
        spread = [rising[k] for k in np.linspace(0, len(rising) - 1, min(width, len(rising))).astype(int)]
        states = list({id(s): s for s in rising[: width // 2] + spread[: width - width // 2]}.values())
    out = []
    for group in (sorted(below, key=lambda s: -s[0])[:3], sorted(above, key=lambda s: s[0])[:3]):
        for _, columns in group:
            labels = np.zeros(len(p), np.int64)
            for label, (_, members) in enumerate(columns):
                for k, i in enumerate(positive):
                    if members >> k & 1:
                        labels[i] = label
            out.append(labels)
    return out


def _bisect(move: Any, most: float, rate: float) -> np.ndarray:
    """``move(eps)`` with the eps in [0, most] at which H(T) meets the rate (H is monotone in eps)."""
    low, high = 0.0, most
    start, end = _h(move(low).sum(0)), _h(move(high).sum(0))
    if (start - rate) * (end - rate) > 0:
        return move(most)
    for _ in range(60):
        middle = (low + high) / 2
        if (_h(move(middle).sum(0)) - rate) * (start - rate) > 0:
            low = middle
        else:
            high = middle
    return move(low if start <= rate else high)


def _refine_up(p_xt: np.ndarray, rate: float) -> np.ndarray:
    """Use the rate that is left: part of the rarest cell of a column gets a column of its own."""
    for _ in range(p_xt.shape[0]):
        if _h(p_xt.sum(0)) >= rate - 1e-10:
            break
        columns = p_xt.sum(0)
        share = np.where(p_xt > 0, p_xt / np.where(columns > 0, columns, 1), np.inf)
        share[:, (p_xt > 0).sum(0) < 2] = np.inf
        if not np.isfinite(share).any():
            break
        x, t = np.unravel_index(int(share.argmin()), share.shape)
        base = np.column_stack([p_xt, np.zeros(len(p_xt))])

        def move(eps: float, base=base, x=x, t=t) -> np.ndarray:
            out = base.copy()
            out[x, t] -= eps
            out[x, -1] += eps
            return out

        p_xt = _bisect(move, float(p_xt[x, t]), rate)
    return p_xt


def _refine_down(p_xt: np.ndarray, rate: float) -> np.ndarray:
    """Come down to the rate: part of the smallest cell of the smallest column goes to the largest column."""
    for _ in range(p_xt.size):
        if _h(p_xt.sum(0)) <= rate + 1e-10 or p_xt.shape[1] < 2:
            break
        columns = p_xt.sum(0)
        source, target = int(columns.argmin()), int(columns.argmax())
        if source == target:
            source = 1 - target if p_xt.shape[1] == 2 else int(np.argsort(columns)[0])
        cells = np.where(p_xt[:, source] > 0, p_xt[:, source], np.inf)
        x = int(cells.argmin())

        def move(eps: float, base=p_xt, x=x, source=source, target=target) -> np.ndarray:
            out = base.copy()
            out[x, source] -= eps
            out[x, target] += eps
            return out

        p_xt = _bisect(move, float(p_xt[x, source]), rate)
        p_xt = p_xt[:, p_xt.sum(0) > 0]
    return p_xt


def ebim(
    p_x: Any,
    rate: float,
    method: Literal["greedy", "beam", "exact"] = "greedy",
    refine: bool = True,
    beam: int = 32,
) -> Encoder:
    """The encoder with the most information about X at a rate of at most ``rate`` bits.

    method: ``greedy`` (O(n log n), within h(second largest mass) of the optimum), ``beam`` over merges of
    pairs, ``exact`` over all deterministic maps (at most 9 symbols). refine: use the rate up to its last
    part by making the map random in one cell. Raises DistributionError, or ValueError naming the argument.
    """
    p = distribution(p_x, "p_x").ravel()
    if not rate >= 0:
        raise ValueError(f"rate must be at least 0 bits, got {rate}")
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if beam < 1:
        raise ValueError(f"beam must be at least 1, got {beam}")
    greedy = greedy_labels(p, float(rate))
    if rate >= entropy(p) - _SLACK:
        return _encoder(_columns(p, greedy))
    if rate == 0:
        return _encoder(p[:, None].copy())
    labels = [greedy]
    if method == "exact":
        if len(p) > _EXACT_LIMIT:
            raise ValueError(f"method exact takes at most {_EXACT_LIMIT} symbols, got {len(p)}")
        ranked = sorted(
            ((_h(np.bincount(part, weights=p)), part) for part in map(np.array, _partitions(len(p)))),
            key=lambda s: s[0],
        )
        cut = sum(h <= rate + _SLACK for h, _ in ranked)
        some = 60 if len(p) <= 5 else 4
        labels += [part for _, part in ranked[max(0, cut - some) : cut + some]]
    elif method == "beam":
        labels += _beam_labels(p, float(rate), beam)
    candidates = []
    for part in labels:
        columns = _columns(p, part)
        h = _h(columns.sum(0))
        if h <= rate + 1e-9:
            candidates.append(columns)
            if refine:
                candidates.append(_refine_up(columns, rate))
        elif refine:
            candidates.append(_refine_down(columns, rate))
    if refine:
        candidates.append(_refine_down(_columns(p, np.arange(len(p))), rate))
    encoders = [_encoder(c) for c in candidates]
    return max((e for e in encoders if e.rate <= rate + 1e-9), key=lambda e: e.info)


def _encoder(p_xt: np.ndarray) -> Encoder:
    p_xt = p_xt[:, p_xt.sum(0) > 0]
    return Encoder(p_xt, max(0.0, _h(p_xt.sum(0))), _info(p_xt))


class MECB:
    """Encoder, decoder and the joint distribution between them.

    After ``fit``: ``encoder_`` (:class:`Encoder`), ``coupling_`` of T and Y, ``joint_`` p(x, y) [n, m],
    ``mutual_information_`` I(X; Y) in bits, taken from the joint.
    """

    encoder_: Encoder
    coupling_: Coupling
    joint_: np.ndarray
    mutual_information_: float

    def __init__(
        self,
        rate: float,
        method: Literal["greedy", "beam", "exact"] = "greedy",
        coupling: Literal["max", "zero", "exact"] = "max",
        refine: bool = True,
    ) -> None:
        if not rate >= 0:
            raise ValueError(f"rate must be at least 0 bits, got {rate}")
        self.rate, self.refine = rate, refine
        self.method: Literal["greedy", "beam", "exact"] = method
        self.coupling: Literal["max", "zero", "exact"] = coupling

    def fit(self, p_x: Any, p_y: Any) -> MECB:
        """Find encoder and coupling for X ~ ``p_x`` [n] and Y ~ ``p_y`` [m]. Raises DistributionError."""
        self.encoder_ = ebim(p_x, self.rate, self.method, self.refine)
        p_y = distribution(p_y, "p_y").ravel()
        p_t = self.encoder_.p_xt.sum(0)
        self.coupling_ = min_entropy_coupling(p_t, p_y, method=self.coupling)
        self.joint_ = self.encoder_.p_xt @ (self.coupling_.matrix / p_t[:, None])
        self.mutual_information_ = mutual_information(self.joint_)
        return self

    def encode(self, x: int, rng: np.random.Generator) -> int:
        """A code t ~ p(t | x). Raises ValueError for a symbol without mass."""
        return _draw(self.encoder_.p_xt, x, rng, "x")

    def decode(self, t: int, rng: np.random.Generator) -> int:
        """A symbol y ~ p(y | t)."""
        return _draw(self.coupling_.matrix, t, rng, "t")


def _draw(joint: np.ndarray, row: int, rng: np.random.Generator, name: str) -> int:
    if not 0 <= row < len(joint):
        raise ValueError(f"{name} must be in [0, {len(joint) - 1}], got {row}")
    mass = joint[row].sum()
    if mass <= 0:
        raise ValueError(f"{name}={row} has no mass")
    return int(rng.choice(joint.shape[1], p=joint[row] / mass))
