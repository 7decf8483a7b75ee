"""The index in the manner of scikit-learn: ``fit``, ``transform``, ``kneighbors``."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .base import Metric
from .hnsw import HNSWConfig, HNSWIndex


class HNSWTransformer:
    """Approximate k-neighbours graph; works in a scikit-learn pipeline before whatever takes a sparse
    distance graph.

    ``n_neighbors`` of each point, itself included when it was fitted. Learned: ``index_``,
    ``n_samples_fit_``.
    """

    def __init__(
        self,
        n_neighbors: int = 5,
        *,
        metric: Metric = "l2",
        M: int = 16,  # noqa: N803
        ef_construction: int = 200,
        ef: int = 64,
        seed: int = 100,
    ) -> None:
        self.metric: Metric = metric
        self.n_neighbors, self.M = n_neighbors, M
        self.ef_construction, self.ef, self.seed = ef_construction, ef, seed

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The settings, by name."""
        names = ("n_neighbors", "metric", "M", "ef_construction", "ef", "seed")
        return {name: getattr(self, name) for name in names}

    def set_params(self, **settings: Any) -> HNSWTransformer:
        """Change settings. Raises ValueError for an unknown one."""
        known = self.get_params()
        for name, value in settings.items():
            if name not in known:
                raise ValueError(f"parameter must be one of {sorted(known)}, got {name!r}")
            setattr(self, name, value)
        return self

    def fit(self, X: npt.ArrayLike, y: object = None) -> HNSWTransformer:  # noqa: N803
        """Index ``X [n, dim]``."""
        rows = np.asarray(X, np.float32)
        if rows.ndim != 2:
            raise ValueError(f"X must have shape [n, dim], got {rows.shape}")
        config = HNSWConfig(
            rows.shape[1],
            self.metric,
            M=self.M,
            ef_construction=self.ef_construction,
            ef=self.ef,
            seed=self.seed,
        )
        self.index_ = HNSWIndex(config)
        self.index_.add(rows)
        self.n_samples_fit_ = len(rows)
        return self

    def kneighbors(
        self,
        X: npt.ArrayLike,  # noqa: N803
        n_neighbors: int | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Distances float32 and indices int64, both ``[n, n_neighbors]``; Euclidean under l2, as scikit-learn
        has it.
        """
        found = self.index_.search(X, n_neighbors or self.n_neighbors)
        distances = np.sqrt(found.distances) if self.metric == "l2" else found.distances
        return distances, found.labels

    def transform(self, X: npt.ArrayLike) -> Any:  # noqa: N803
        """Sparse distances ``[n, n_samples_fit_]`` (scipy CSR, sorted by distance in each row)."""
        from scipy.sparse import csr_matrix

        distances, labels = self.kneighbors(X)
        here = labels >= 0
        starts = np.concatenate(([0], np.cumsum(here.sum(axis=1))))
        return csr_matrix((distances[here], labels[here], starts), shape=(len(labels), self.n_samples_fit_))

    def fit_transform(self, X: npt.ArrayLike, y: object = None) -> Any:  # noqa: N803
        """:meth:`fit`, then :meth:`transform`."""
        return self.fit(X).transform(X)
