"""The engine core: requests of tokens in, tokens out; the host process and its asyncio side."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import EngineConfig
    from .engine import EngineCore, Planner, QueueFull, Refused
    from .host import Built, build
    from .messages import (
        EngineInfo,
        EngineRequest,
        EngineStats,
        GrammarSpec,
        SamplingParams,
        TokenLogprob,
        TokenOutput,
    )
    from .process import AsyncEngine, Draining, EngineFailed
    from .runner import Runner, StepBatch

_HOME = {
    "AsyncEngine": "process",
    "Built": "host",
    "Draining": "process",
    "EngineConfig": "config",
    "EngineCore": "engine",
    "EngineFailed": "process",
    "EngineInfo": "messages",
    "EngineRequest": "messages",
    "EngineStats": "messages",
    "GrammarSpec": "messages",
    "Planner": "engine",
    "QueueFull": "engine",
    "Refused": "engine",
    "Runner": "runner",
    "SamplingParams": "messages",
    "StepBatch": "runner",
    "TokenLogprob": "messages",
    "TokenOutput": "messages",
    "build": "host",
}
__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
