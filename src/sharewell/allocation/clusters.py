"""Clusters of resources: k-means++ on what decides a placement."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .core import Problem


@dataclass(frozen=True, eq=False)
class Clusters:
    """``label`` [M]: cluster of each resource, from 0 to ``count`` - 1. ``silhouette``: on a sample."""

    label: np.ndarray
    count: int
    silhouette: float


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


def cluster(problem: Problem, seed: int) -> Clusters:
    """k = ceil(sqrt(M / 2)) clusters, at least 2."""
    x, rng = features(problem), np.random.default_rng(seed)
    k = max(2, math.ceil(math.sqrt(len(x) / 2)))
    label = kmeans(x, k, rng)
    names, label = np.unique(label, return_inverse=True)
    if len(names) == 1:  # all alike: any split is as good
        names, label = np.arange(k), np.arange(len(x)) * k // len(x)
    return Clusters(label, len(names), silhouette(x, label, rng))
