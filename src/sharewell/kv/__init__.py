"""Keys and values: pages, who owns them, and the pass that runs a decoder over them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .allocators import Allocator, BlocksTaken, LRUAllocator, OutOfBlocks
    from .blocks import Allocation, BlockManager
    from .engine import PagedForward
    from .layout import PageLayout
    from .pool import PagePool
    from .prefix import PrefixIndex, block_hashes
    from .runs import RunAllocator
    from .shared import SharedAllocator

_HOME = {
    "Allocator": "allocators",
    "BlocksTaken": "allocators",
    "LRUAllocator": "allocators",
    "OutOfBlocks": "allocators",
    "Allocation": "blocks",
    "BlockManager": "blocks",
    "PagedForward": "engine",
    "PageLayout": "layout",
    "PagePool": "pool",
    "PrefixIndex": "prefix",
    "RunAllocator": "runs",
    "SharedAllocator": "shared",
    "block_hashes": "prefix",
}
__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
