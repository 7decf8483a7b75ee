"""Who may see which answer: every entry lives in a partition, and a partition is a hash of all that
matters."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .policy import SCOPES, Scope


@dataclass(frozen=True)
class Namespace:
    """Within it an answer may be shared. ``owner`` is who asks (an API key), ``tenant`` whom they belong to,
    ``model`` the model with its weights, ``context`` a :func:`fingerprint` of everything else that shapes the
    answer: system prompt, earlier turns, tools, sampling parameters. Raises ValueError for fields that are no
    text.
    """

    owner: str = "local"
    tenant: str = "local"
    model: str = ""
    context: str = ""

    def __post_init__(self) -> None:
        for name in ("owner", "tenant", "model", "context"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} must be a string, got {getattr(self, name)!r:.80}")

    def partition(self, scope: Scope) -> str:
        """The partition of ``scope``: 32 hex digits."""
        who = {
            "user": [self.tenant, self.owner],
            "tenant": [self.tenant],
            "global": [],
        }[scope]
        return fingerprint(scope=scope, who=who, model=self.model, context=self.context)

    def visible(self) -> tuple[str, ...]:
        """All partitions that this namespace may read, narrowest first."""
        return tuple(self.partition(scope) for scope in SCOPES)  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True)
class Request:
    """A question. ``text`` is what is embedded and compared; ``exact`` what must be equal, byte for byte, in
    the exact tier (by default the text, its whitespace and Unicode form normalised). Raises ValueError for an
    empty text.
    """

    text: str
    exact: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.text, str) or not (self.text.strip() or self.exact):
            raise ValueError(f"text must be a question, got {self.text!r:.80}")
        if not self.exact:
            object.__setattr__(self, "exact", " ".join(unicodedata.normalize("NFC", self.text).split()))

    def key(self, partition: str) -> bytes:
        """The exact tier's key in a partition."""
        # what is no valid Unicode (a lone surrogate) still needs a key of its own
        text = f"{partition}\n{self.exact}".encode("utf-8", "surrogatepass")
        return hashlib.blake2b(text, digest_size=16).digest()


def fingerprint(parts: Mapping[str, Any] | None = None, **more: Any) -> str:
    """32 hex digits that differ when any part differs. Parts are JSON values.

    ``fingerprint(system="Be brief.", tools=[], temperature=0)``. Raises TypeError for what is no JSON.
    """
    text = json.dumps({**(parts or {}), **more}, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
