"""The OpenAI-compatible HTTP API: text in, text out, in front of one engine."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .app import NotReady, create_app
    from .config import ServerConfig
    from .errors import ApiError
    from .server import bind, run
    from .service import Service

_HOME = {
    "ApiError": "errors",
    "NotReady": "app",
    "ServerConfig": "config",
    "Service": "service",
    "bind": "server",
    "create_app": "app",
    "run": "server",
}
__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
