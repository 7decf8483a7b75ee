"""What passes through the cache, and the one hook by which a defence sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from .policy import CategoryPolicy


class CacheVersionError(ValueError):
    """A cache file of another embedder or format; the message says how to go on. Vectors never mix."""


@dataclass(frozen=True)
class Query:
    """One question as the cache sees it.

    ``partition`` is the hash within which answers may be shared (see :class:`Namespace`), ``owner`` who asks;
    ``embedding`` float32 ``[dim]`` of unit norm, or None in the exact tier.
    """

    text: str
    partition: str
    owner: str
    category: str
    embedding: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Entry:
    """One stored answer. ``id`` is 0 before it is stored.

    ``embedding`` float32 ``[dim]`` of unit norm, or None for an answer of the exact tier only; ``crops``
    float32 ``[m, dim]``: what a defence's ``admit`` attached. ``created``: unix seconds. ``response`` is any
    text (the server keeps JSON there); ``answer_text`` is the plain answer, where the caller knows it.
    """

    id: int
    partition: str
    owner: str
    category: str
    text: str
    embedding: NDArray[np.float32] | None
    response: str
    created: float
    crops: NDArray[np.float32] | None = None
    answer_text: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """What a defence says. ``crops`` (from ``admit`` only): vectors ``[m, dim]`` to keep with the entry."""

    ok: bool
    reason: str = ""
    score: float | None = None
    crops: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Context:
    """What a defence may use: ``embed`` maps texts to float32 ``[n, dim]``; ``similarity`` is the cosine of
    query and entry (1.0 in the exact tier and at admission), ``threshold`` the one it passed, ``now`` unix
    seconds."""

    embed: Callable[[Sequence[str]], NDArray[np.float32]]
    policy: CategoryPolicy
    now: float
    similarity: float = 1.0
    threshold: float = 1.0


@runtime_checkable
class Defence(Protocol):
    """A check beside the threshold. An exception counts as a refusal: a miss, and it is counted.

    ``admit`` sees every entry of the semantic tier before it is stored; ``accept`` sees every candidate that
    passed threshold and lifetime, nearest first, before its answer is read.
    """

    name: str

    def admit(self, entry: Entry, context: Context) -> Verdict:
        """May this entry answer others? Refused, it is kept for the exact tier only."""
        ...

    def accept(self, query: Query, entry: Entry, context: Context) -> Verdict:
        """May ``entry`` answer ``query``?"""
        ...
