"""How the kernels are compiled: once per machine and version of their source.

numba keys its cache by a function's own file, so a changed callee in another file would go unnoticed, and it
writes beside the source, which may be read-only. Hence a folder of our own in the user's cache, whose name is
a digest of all sources.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from pathlib import Path
from typing import Any

import numba
from llvmlite import ir
from numba.core import types
from platformdirs import user_cache_path

from .simd import intrinsic

INVOKED = 9  # arguments of an entry
_SOURCES = ("attention", "compile", "gemm", "lora", "shape", "simd", "step", "team", "vectors")


@cache
def cache_folder() -> Path:
    """Folder of the machine code, under the user's cache."""
    digest = hashlib.blake2b(digest_size=8)
    for name in _SOURCES:
        digest.update((Path(__file__).parent / f"{name}.py").read_bytes())
    return user_cache_path("sharewell") / "kernels" / digest.hexdigest()


@contextmanager
def _own_cache() -> Iterator[None]:
    """numba decides where a function's code is kept when the function is decorated."""
    config: Any = numba.config  # pyright: ignore[reportPrivateImportUsage]
    given = config.CACHE_DIR
    config.CACHE_DIR = given or str(cache_folder())
    try:
        yield
    finally:
        config.CACHE_DIR = given


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """``numba.njit`` without the GIL, cached in :func:`cache_folder` (``NUMBA_CACHE_DIR`` wins if set)."""

    def decorate(function: Callable[..., Any]) -> Any:
        with _own_cache():
            return numba.njit(nogil=True, cache=True, **options)(function)

    return decorate


def entry(function: Callable[..., None]) -> Callable[[], int]:
    """A function of INVOKED int64 arguments that others call by address (:func:`invoke`).

    numba compiles a callee again into each of its callers; the large tiles are compiled once this way, and
    only those in use. The result compiles on its first call, and returns the address.
    """
    kept: list[Any] = []

    @wraps(function)
    def address() -> int:
        if not kept:
            with _own_cache():
                kept.append(numba.cfunc(types.void(*[types.int64] * INVOKED), cache=True)(function))
        return kept[0].address

    return address


@intrinsic
def invoke(typingctx, pointer, a, b, c, d, e, f, g, h, i):
    """Call the entry at ``pointer``."""

    def codegen(context, builder, signature, args):
        integer = ir.IntType(64)
        kind = ir.FunctionType(ir.VoidType(), [integer] * INVOKED)
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * (INVOKED + 1)), codegen
