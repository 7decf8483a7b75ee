"""The auction as it runs all day: requests come and go, prices carry over, and a crash loses nothing.

Every event is a row of a gossip log with one author, so that the file is checked row by row when it is
opened, and replaying it gives the same state.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from .core import Problem, Request, Resource
from .gossip import DamagedLog, GossipLog
from .mohaf import Mohaf, MohafConfig

SMOOTHING = 0.9  # of price levels between epochs


class AuctionStream:
    """``submit`` and ``release`` requests by id, ``fail`` and ``restore`` resources, and ``epoch`` to place
    what waits. Times are the caller's (of the simulator, say) and are only recorded.

    ``log``: path of the event log; one that exists is replayed (then ``resources`` must be the same).
    """

    def __init__(
        self, resources: list[Resource], config: MohafConfig | None = None, log: str | Path = ":memory:"
    ) -> None:
        self.config = config or MohafConfig()
        if self.config.payment == "critical":
            raise ValueError("payment must be posted or first in a stream, got 'critical'")
        self.resources = list(resources)
        probe = Problem.from_records([Request([1.0] * len(self.resources[0].capacity), 1.0)], self.resources)
        self.capacity, self.cost = probe.capacity, probe.cost
        self.level = self.cost.copy()  # price level of each resource
        self.used = np.zeros_like(self.capacity)
        self.up = np.ones(len(self.resources), bool)
        self.waiting: dict[str, Request] = {}
        self.placed: dict[str, tuple[int, float]] = {}  # id -> resource, payment
        self._requests: dict[str, Request] = {}
        self._log = GossipLog(log)
        setting = {"resources": [_plain(r) for r in self.resources], "config": asdict(self.config)}
        events = [json.loads(row[0]) for _, _, row in self._log.rows()]
        if not events:
            self._write({"do": "open", **setting})
        elif events[0] != json.loads(json.dumps({"do": "open", **setting})):
            self._log.close()
            raise DamagedLog("the log is of an auction with other resources or settings")
        for event in events[1:]:
            self._apply(event)

    def _write(self, event: dict[str, Any]) -> None:
        self._log.append((json.dumps(event, sort_keys=True).encode(),))

    def _record(self, event: dict[str, Any]) -> Any:
        self._write(event)  # first the log: what has happened is what is written
        return self._apply(event)

    def submit(self, request_id: str, request: Request, now: float = 0.0) -> bool:
        """Queue a request; False when its id is known already (nothing changes then). Raises ProblemError."""
        if request_id in self._requests:
            return False
        if len(request.demand) != self.capacity.shape[1]:
            raise ValueError(f"demand must have {self.capacity.shape[1]} entries, got {len(request.demand)}")
        Problem.from_records([request], self.resources)
        self._record({"do": "submit", "id": request_id, "request": _plain(request), "now": now})
        return True

    def release(self, request_id: str, now: float = 0.0) -> bool:
        """A request is done, or withdrawn; False when it is not known."""
        if request_id not in self._requests:
            return False
        self._record({"do": "release", "id": request_id, "now": now})
        return True

    def fail(self, resource: int, now: float = 0.0) -> list[str]:
        """A resource is gone; its requests return to the queue. Returns their ids."""
        self._known(resource)
        return self._record({"do": "fail", "resource": resource, "now": now})

    def restore(self, resource: int, now: float = 0.0) -> None:
        """A resource is back, empty."""
        self._known(resource)
        self._record({"do": "restore", "resource": resource, "now": now})

    def epoch(self, now: float = 0.0) -> dict[str, tuple[int, float]]:
        """Place what waits; returns id -> (resource, payment) of those placed now."""
        return self._record({"do": "epoch", "now": now})

    def _known(self, resource: int) -> None:
        if not 0 <= resource < len(self.resources):
            raise ValueError(f"resource must be in [0, {len(self.resources) - 1}], got {resource}")

    def _apply(self, event: dict[str, Any]) -> Any:
        kind = event["do"]
        if kind == "submit":
            request = Request(**event["request"])
            self._requests[event["id"]] = self.waiting[event["id"]] = request
        elif kind == "release":
            request = self._requests.pop(event["id"])
            self.waiting.pop(event["id"], None)
            if event["id"] in self.placed:
                j, _ = self.placed.pop(event["id"])
                self.used[j] -= request.demand
        elif kind == "fail":
            j = event["resource"]
            self.up[j] = False
            back = [name for name, (at, _) in self.placed.items() if at == j]
            for name in back:
                del self.placed[name]
                self.waiting[name] = self._requests[name]
            self.used[j] = 0
            return back
        elif kind == "restore":
            self.up[event["resource"]] = True
        elif kind == "epoch":
            return self._place()
        return None

    def _place(self) -> dict[str, tuple[int, float]]:
        if not self.waiting or not self.up.any():
            return {}
        names, alive = list(self.waiting), np.flatnonzero(self.up)
        problem = Problem.from_records([self.waiting[n] for n in names], [self.resources[j] for j in alive])
        result = Mohaf(self.config).solve(problem, level=self.level[alive], used=self.used[alive])
        out = {}
        for k, at in enumerate(result.assign.tolist()):
            if at < 0:
                continue
            j = int(alive[at])
            request = self.waiting.pop(names[k])
            self.used[j] += request.demand
            self.placed[names[k]] = out[names[k]] = (j, float(result.payment[k]))
        low, high = self.config.price_low, self.config.price_high
        smooth = SMOOTHING * self.level[alive] + (1 - SMOOTHING) * result.price
        self.level[alive] = np.clip(smooth, low * self.cost[alive], high * self.cost[alive])
        return out

    def close(self) -> None:
        self._log.close()


def _plain(record: Request | Resource) -> dict[str, Any]:
    """JSON values of a record."""
    fields = asdict(replace(record))
    return {
        k: [float(x) for x in v] if isinstance(v, list | tuple | np.ndarray) else v for k, v in fields.items()
    }
