"""Single flight: of equal questions that come at once, one is answered by the model."""

from __future__ import annotations

import threading
from collections.abc import Hashable
from concurrent.futures import Future


class SingleFlight:
    """Who comes first leads; the others get a future, which holds what the leader found worth sharing, or
    None when it failed or its answer is nobody else's: then they ask for themselves, all at once."""

    def __init__(self) -> None:
        self._under_way: dict[Hashable, Future] = {}
        self._lock = threading.Lock()
        self.shared = 0

    def board(self, key: Hashable) -> Future | None:
        """None: you lead, and must call :meth:`land`. Else wait for this future."""
        with self._lock:
            future = self._under_way.get(key)
            if future is None:
                self._under_way[key] = Future()
                return None
            self.shared += 1
            return future

    def land(self, key: Hashable, value: object | None) -> None:
        """The leader's result. Landing twice does nothing."""
        with self._lock:
            future = self._under_way.pop(key, None)
        if future is not None:
            future.set_result(value)

    def __len__(self) -> int:
        return len(self._under_way)
