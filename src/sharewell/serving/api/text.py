"""Stop strings: what of a growing text may be shown, and where it ends."""

from __future__ import annotations

from collections.abc import Sequence


class StopScanner:
    """Passes text on except what may still become a stop string; ends at the first, which is not shown.

    The first is the one that is complete first (of those that end together the longest), so what is shown
    does not depend on how the text was cut into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [s for s in stops if s]
        self._held = ""
        self.stopped: str | None = None

    def push(self, text: str) -> str:
        """The text that is now certain to be shown; empty after the stop."""
        if self.stopped is not None:
            return ""
        if not self._stops:
            return text
        held = self._held + text
        found = [(at + len(s), at, s) for s in self._stops if (at := held.find(s)) >= 0]
        if found:
            _, at, self.stopped = min(found)
            self._held = ""
            return held[:at]
        keep = max(overlap(held, s) for s in self._stops)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def flush(self) -> str:
        """What was held back, at the end of the answer."""
        held, self._held = self._held, ""
        return held


def overlap(text: str, word: str) -> int:
    """Length of the longest end of ``text`` that begins ``word`` without being all of it."""
    for n in range(min(len(text), len(word) - 1), 0, -1):
        if text.endswith(word[:n]):
            return n
    return 0
