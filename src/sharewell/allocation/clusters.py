"""A tree of resource clusters: k-means++ on what decides a placement, split until clusters are small."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .core import Problem


@dataclass(frozen=True, eq=False)
class ClusterTree:
    """Resources in leaf order, and nodes whose children (or members, for a leaf) are the rows
    ``first[node]:last[node]``. Children always come after their parent; node 0 is the root."""

    order: np.ndarray  # [M]: resource at each row
    first: np.ndarray
    last: np.ndarray
    leaf: np.ndarray
    parent: np.ndarray
    home: np.ndarray  # [M]: leaf of each row
    clusters: int  # directly below the root
    silhouette: float  # of those clusters, on a sample; 0 when there is one


def features(problem: Problem) -> np.ndarray:
    """[M, F]: capacity, cost, reliability, availability, energy and place, each with unit spread."""
    columns = np.column_stack(
        [
            problem.capacity,
            problem.cost,
            problem.reliability,
            problem.availability,
            problem.energy,
            problem.resource_location,
        ]
    )
    spread = columns.std(axis=0)
    return (columns - columns.mean(axis=0)) / np.where(spread > 0, spread, 1.0)


def kmeans(x: np.ndarray, k: int, rng: np.random.Generator, rounds: int = 8) -> np.ndarray:
    """Labels [M] of k-means with k-means++ starts (Arthur, Vassilvitskii 2007). Some may stay unused."""
    centers = np.empty((k, x.shape[1]))
    centers[0] = x[rng.integers(len(x))]
    nearest = ((x - centers[0]) ** 2).sum(axis=1)
    for c in range(1, k):
        total = nearest.sum()
        pick = rng.integers(len(x)) if total <= 0 else np.searchsorted(nearest.cumsum(), rng.random() * total)
        centers[c] = x[min(int(pick), len(x) - 1)]
        np.minimum(nearest, ((x - centers[c]) ** 2).sum(axis=1), out=nearest)
    labels = np.zeros(len(x), int)
    for _ in range(rounds):
        distance = (centers**2).sum(axis=1) - 2 * x @ centers.T
        new = distance.argmin(axis=1)
        if (new == labels).all():
            break
        labels = new
        size = np.bincount(labels, minlength=k)
        for f in range(x.shape[1]):
            mean = np.bincount(labels, x[:, f], k) / np.maximum(size, 1)
            centers[:, f] = np.where(size > 0, mean, centers[:, f])
    return labels


def silhouette(x: np.ndarray, labels: np.ndarray, rng: np.random.Generator, sample: int = 400) -> float:
    """Mean silhouette width on a sample; 0 for one cluster."""
    if len(np.unique(labels)) < 2:
        return 0.0
    at = rng.choice(len(x), min(sample, len(x)), replace=False)
    x, labels = x[at], labels[at]
    distance = np.sqrt(np.maximum(((x[:, None] - x[None]) ** 2).sum(axis=2), 0))
    names = np.unique(labels)
    means = np.stack([distance[:, labels == c].sum(axis=1) for c in names], axis=1)
    size = np.array([(labels == c).sum() for c in names])
    own = np.searchsorted(names, labels)
    row = np.arange(len(x))
    inside = means[row, own] / np.maximum(size[own] - 1, 1)
    outside = means / size
    outside[row, own] = np.inf
    nearest = outside.min(axis=1)
    width = np.where(size[own] > 1, (nearest - inside) / np.maximum(np.maximum(nearest, inside), 1e-300), 0.0)
    return float(width.mean())


def build_tree(problem: Problem, leaf_size: int, seed: int) -> ClusterTree:
    """k = ceil(sqrt(members / 2)) clusters, at least 2, at every level, until at most ``leaf_size`` are
    left.
    """
    x, rng = features(problem), np.random.default_rng(seed)
    first, last, leaf, parent = [0], [0], [False], [-1]
    order: list[np.ndarray] = []
    home: list[np.ndarray] = []
    rows, clusters, width = 0, 1, 0.0
    queue: list[tuple[int, np.ndarray]] = [(0, np.arange(len(x)))]
    while queue:
        node, members = queue.pop(0)
        if len(members) <= leaf_size:
            leaf[node], first[node], last[node] = True, rows, rows + len(members)
            order.append(members)
            home.append(np.full(len(members), node))
            rows += len(members)
            continue
        k = max(2, math.ceil(math.sqrt(len(members) / 2)))
        labels = kmeans(x[members], k, rng)
        parts = [members[labels == c] for c in range(k)]
        parts = [part for part in parts if len(part)]
        if len(parts) == 1:  # all alike: any split is as good
            parts = np.array_split(members, k)
        if node == 0:
            clusters, width = len(parts), silhouette(x[members], labels, rng)
        first[node], last[node] = len(first), len(first) + len(parts)
        for part in parts:
            queue.append((len(first), part))
            first.append(0)
            last.append(0)
            leaf.append(False)
            parent.append(node)
    return ClusterTree(
        np.concatenate(order),
        np.array(first),
        np.array(last),
        np.array(leaf),
        np.array(parent),
        np.concatenate(home),
        clusters,
        width,
    )


def static_boxes(problem: Problem, tree: ClusterTree) -> np.ndarray:
    """[nodes, 8]: price (filled in later), best reliability and availability, lowest energy, place ranges."""
    nodes = len(tree.first)
    box = np.zeros((nodes, 8))
    for node in range(nodes - 1, -1, -1):
        rows = slice(tree.first[node], tree.last[node])
        if tree.leaf[node]:
            at = tree.order[rows]
            place = problem.resource_location[at]
            box[node, 1:] = (
                problem.reliability[at].max(),
                problem.availability[at].max(),
                problem.energy[at].min(),
                place[:, 0].min(),
                place[:, 0].max(),
                place[:, 1].min(),
                place[:, 1].max(),
            )
        else:
            below = box[rows]
            box[node, 1:] = (
                below[:, 1].max(),
                below[:, 2].max(),
                below[:, 3].min(),
                below[:, 4].min(),
                below[:, 5].max(),
                below[:, 6].min(),
                below[:, 7].max(),
            )
    return box
