"""Sharewell: share what requests, layers, agents and users would each recompute, resend or store again.

Importing the package loads no room: ``sharewell.serving``, ``sharewell.kv`` and the others load when they are
first named, and each says in its extra (``sharewell[serving]``) what it needs.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

__version__ = "0.1.0"


def __getattr__(name: str) -> ModuleType:
    if name.startswith("_") or find_spec(f"{__name__}.{name}") is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(f"{__name__}.{name}")
