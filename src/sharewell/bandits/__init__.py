"""Bandits: choose one of several options by features, learn from late and partial feedback, share what was
learned by adding statistics."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .change import PageHinkley
    from .ledger import FeedbackError, Ledger, LedgerInUse
    from .linear import Estimate, LinearPolicy, LinTS, LinUCB
    from .state import Decision
    from .statistics import RidgeStats
    from .widths import Constant, Radius, Width

_HOME = {
    "Constant": "widths",
    "Decision": "state",
    "Estimate": "linear",
    "FeedbackError": "ledger",
    "Ledger": "ledger",
    "LedgerInUse": "ledger",
    "LinearPolicy": "linear",
    "LinTS": "linear",
    "LinUCB": "linear",
    "PageHinkley": "change",
    "Radius": "widths",
    "RidgeStats": "statistics",
    "Width": "widths",
}
__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
