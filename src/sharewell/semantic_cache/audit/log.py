"""Found attack texts on file, so that an audit goes on where it stopped and CI can replay it."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path

from .generator import Collision


class AttackLog:
    """Collisions by key, as JSON lines; ``path`` None keeps them in memory. Several processes may add to one
    file. A last line that was cut off by a crash is dropped. Raises ValueError for any other that is none.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._found: dict[str, Collision] = {}
        self._read_bytes = self._lines = 0
        if path is not None and path.exists():
            data = path.read_bytes()
            end = data.rfind(b"\n") + 1
            if end < len(data):
                os.truncate(path, end)
            self._take_new()

    def _take_new(self) -> None:
        """Read the whole lines that were added since the last look."""
        if self.path is None or not self.path.exists() or self.path.stat().st_size <= self._read_bytes:
            return
        with self.path.open("rb") as file:
            file.seek(self._read_bytes)
            data = file.read()
        end = data.rfind(b"\n") + 1
        for line in data[:end].splitlines():
            self._lines += 1
            try:
                row = json.loads(line)
                key = row.pop("key")
                row["suffix"], row["penalties"] = tuple(row["suffix"]), tuple(row["penalties"])
                self._found[key] = Collision(**row)
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise ValueError(f"{self.path.name} line {self._lines} is no attack: {error}") from None
        self._read_bytes += end

    def __len__(self) -> int:
        return len(self._found)

    @staticmethod
    def key(*parts: object) -> str:
        """16 hex digits of what the search depended on."""
        return hashlib.sha256("\n".join(map(repr, parts)).encode()).hexdigest()[:16]

    def get(self, key: str) -> Collision | None:
        """A collision found before, by this process or another."""
        if key not in self._found:
            self._take_new()
        return self._found.get(key)

    def put(self, key: str, found: Collision) -> None:
        """Keep a collision, on disk at once."""
        self._found[key] = found
        if self.path is None:
            return
        row = {"key": key, **asdict(found)}
        del row["history"]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
