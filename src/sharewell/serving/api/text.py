"""From tokens to text that may be shown: detokenising and stop strings, across token boundaries."""

from __future__ import annotations

from collections.abc import Sequence


class StopScanner:
    """Passes text on except what may still become a stop string; ends at the first stop string, which is not shown."""

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
        first = min(((held.find(s), s) for s in self._stops if s in held), default=None)
        if first is not None:
            self.stopped, self._held = first[1], ""
            return held[: first[0]]
        keep = max(self._overlap(held, s) for s in self._stops)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def flush(self) -> str:
        """What was held back, at the end of the answer."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Length of the longest end of ``text`` that begins ``stop``."""
        for n in range(min(len(text), len(stop) - 1), 0, -1):
            if text.endswith(stop[:n]):
                return n
        return 0
