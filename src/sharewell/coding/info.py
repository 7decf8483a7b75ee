"""Information measures of discrete distributions, in bits unless another base is asked for."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

TOLERANCE = 1e-9  # how far the sum of a distribution may be from 1


class DistributionError(ValueError):
    """What was given is no probability distribution."""


def distribution(p: Any, name: str = "p") -> np.ndarray:
    """``p`` as float64, checked: no negative entry, no NaN, sum 1 within 1e-9. Raises
    :class:`DistributionError` naming the sum."""
    array = np.asarray(p, np.float64)
    if array.size == 0:
        raise DistributionError(f"{name} must have at least one entry, got none")
    total = float(array.sum())
    if not np.isfinite(array).all():
        raise DistributionError(f"{name} must be finite, got entries that are not (sum {total})")
    if (array < 0).any():
        raise DistributionError(f"{name} must have no negative entry, got {array.min()} (sum {total})")
    if abs(total - 1) > TOLERANCE:
        raise DistributionError(f"{name} must sum to 1 within {TOLERANCE}, got the sum {total}")
    return array


def entropy(p: Any, base: float = 2) -> float:
    """Shannon entropy of a distribution of any shape."""
    p = distribution(p)
    positive = p[p > 0]
    return max(0.0, float(-(positive * np.log(positive)).sum()) / math.log(base))


def binary_entropy(p: float) -> float:
    """Entropy in bits of a coin that shows heads with probability ``p``."""
    return entropy([p, 1 - p])


def mutual_information(joint: Any, base: float = 2) -> float:
    """I(X; Y) of a joint distribution [n, m]."""
    joint = distribution(joint, "joint")
    if joint.ndim != 2:
        raise DistributionError(f"joint must have two axes, got shape {joint.shape}")
    return max(0.0, entropy(joint.sum(1), base) + entropy(joint.sum(0), base) - entropy(joint, base))
