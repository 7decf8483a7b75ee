"""Isolation: whose answers may be served to whom. The one guarantee against planted answers."""

from __future__ import annotations

from collections.abc import Collection

from ..base import Context, Entry, Query, Verdict


class ScopeGuard:
    """Only the owner of an entry is served it, but for ``curated`` owners, whose entries serve everybody.

    ``categories`` limits the guard to some categories (those with tool calls or personal data, say), with the
    cache's own scope for the others. Cross-user hits become impossible by construction, which is also their
    price.
    """

    name = "scope"

    def __init__(self, curated: Collection[str] = (), categories: Collection[str] | None = None) -> None:
        self.curated = frozenset(curated)
        self.categories = None if categories is None else frozenset(categories)

    def admit(self, entry: Entry, context: Context) -> Verdict:
        """Everything may be stored."""
        return Verdict(True)

    def accept(self, query: Query, entry: Entry, context: Context) -> Verdict:
        """Refuse another owner's entry."""
        guarded = self.categories is None or bool({query.category, entry.category} & self.categories)
        ok = not guarded or query.owner == entry.owner or entry.owner in self.curated
        return Verdict(ok, "" if ok else "scope: another owner's entry")
