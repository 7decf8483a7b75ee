"""Nearest neighbours: a graph index that is fast without a compiler, and an exact one."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .base import IndexFormatError, SearchResult, VectorIndex
    from .flat import FlatIndex
    from .hnsw import HNSWConfig, HNSWIndex, IndexStats
    from .hnswlib_files import from_hnswlib, to_hnswlib
    from .neighbors import HNSWTransformer

_HOME = {
    "FlatIndex": "flat",
    "HNSWConfig": "hnsw",
    "HNSWIndex": "hnsw",
    "HNSWTransformer": "neighbors",
    "IndexFormatError": "base",
    "IndexStats": "hnsw",
    "SearchResult": "base",
    "VectorIndex": "base",
    "from_hnswlib": "hnswlib_files",
    "to_hnswlib": "hnswlib_files",
}
__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
