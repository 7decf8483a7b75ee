"""The whole state of a policy in one file, replaced atomically; a ledger replays what came after it."""

from __future__ import annotations

import dataclasses
import io
import json
import os
from collections import Counter, OrderedDict, deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .state import Decision, Waiting

if TYPE_CHECKING:
    from .linear import LinearPolicy

FORMAT = "sharewell-bandit-1"


def write_snapshot(policy: LinearPolicy, path: str | Path) -> Path:
    """Write (numpy's npz without pickle: arrays, and JSON as bytes), flush to disk, rename."""
    path = Path(path)
    with policy._lock:
        waiting = [
            {
                "id": w.decision.id, "arm": w.decision.arm, "mean": w.decision.mean, "step": w.step,
                "propensity": w.decision.propensity, "version": w.decision.version, "unix_s": w.unix_s,
                "in_window": w.in_window, "partial": w.partial, "parts": sorted(w.parts),
            }
            for w in policy._waiting.values()
        ]  # fmt: skip
        about = {
            "format": FORMAT, "settings": policy._settings, "version": policy._version,
            "choices": policy._choices, "counters": dict(policy.counters), "waiting": waiting,
            "ended": list(policy._ended.items()),
            "rows": [[(weight, y, name) for _, weight, y, name in rows] for rows in policy._rows],
            "events": 0 if policy.ledger is None else policy.ledger.last,
        }  # fmt: skip
        arrays = {f"model_{name}": getattr(policy._models, name) for name in policy._models.ARRAYS}
        arrays["decays"] = policy._decays
        arrays["waiting_x"] = np.array([w.decision.x for w in policy._waiting.values()])
        arrays["rows_x"] = np.array([row[0] for rows in policy._rows for row in rows])
        if policy._detectors is not None:
            arrays["detectors"] = policy._detectors.state
        buffer = io.BytesIO()
        np.savez(buffer, about=np.frombuffer(json.dumps(about).encode(), dtype=np.uint8), **arrays)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with open(beside, "wb") as file:
        file.write(buffer.getvalue())
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    return path


def read_snapshot(policy: LinearPolicy, path: str | Path) -> int:
    """Fill a new policy of the same settings; returns the number of the last event that it knows.

    Raises ValueError for a file that is no snapshot or belongs to other settings.
    """
    path = Path(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        about: dict[str, Any] = json.loads(arrays.pop("about").tobytes())
    except (ValueError, OSError, KeyError, EOFError) as error:
        raise ValueError(f"snapshot must be a file that a policy wrote, got {path}: {error}") from None
    if about.get("format") != FORMAT or about["settings"] != policy._settings:
        raise ValueError(f"snapshot must be of settings {policy._settings}, got {about.get('settings')}")
    policy._models.restore({k.removeprefix("model_"): v for k, v in arrays.items() if k[:6] == "model_"})
    policy._decays[:] = arrays["decays"]
    if policy._detectors is not None:
        policy._detectors.state[:] = arrays["detectors"]
    left = iter(arrays["rows_x"])
    policy._rows = [deque([next(left).copy(), *row] for row in rows) for rows in about["rows"]]
    names = {field.name for field in dataclasses.fields(Waiting)} - {"decision", "parts"}
    for entry, x in zip(about["waiting"], arrays["waiting_x"], strict=True):
        decision = Decision(
            entry["id"], entry["arm"], x, entry["mean"], entry["propensity"], entry["version"]
        )
        kept = {name: entry[name] for name in names}
        policy._waiting[decision.id] = Waiting(decision, parts=set(entry["parts"]), **kept)
    policy._ended = OrderedDict(about["ended"])
    policy._version, policy._choices = about["version"], about["choices"]
    policy.counters = Counter(about["counters"])
    return int(about["events"])
