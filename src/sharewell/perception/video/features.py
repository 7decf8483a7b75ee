"""Features of a video: what they are, how they lie in time, and how they are kept in a folder.

Feature i covers the sampled frames i * stride ... i * stride + num_frames - 1, so its middle lies at
(i * stride + num_frames / 2) / fps seconds: the convention of the ActionFormer and OpenTAD feature folders.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

FORMAT = "sharewell-features-1"
SETTINGS_FILE = "features.json"


@dataclass(frozen=True)
class FeatureGrid:
    """How features lie in time: ``num_frames`` frames each, ``stride`` frames apart, at ``fps``."""

    fps: float = 4.0
    stride: int = 1
    num_frames: int = 4

    def __post_init__(self) -> None:
        if not (math.isfinite(self.fps) and 0 < self.fps <= 100_000):
            raise ValueError(f"fps must be in (0, 100000], got {self.fps}")
        for name in ("stride", "num_frames"):
            if not (isinstance(getattr(self, name), int) and 1 <= getattr(self, name) <= 100_000):
                raise ValueError(f"{name} must be in [1, 100000], got {getattr(self, name)}")

    @property
    def step_s(self) -> float:
        """Seconds from one feature to the next."""
        return self.stride / self.fps

    def count(self, frames: int) -> int:
        """Features of so many frames. Fewer than ``num_frames`` frames are filled up to one feature."""
        return 0 if frames <= 0 else max(0, frames - self.num_frames) // self.stride + 1

    def seconds(self, grid: float) -> float:
        """Time of a position on the feature grid."""
        return (grid * self.stride + self.num_frames / 2) / self.fps


@dataclass(frozen=True)
class Features:
    """``array``: float32 [T, C]; ``duration_s`` of the video, which may end behind the last feature."""

    array: np.ndarray
    grid: FeatureGrid
    duration_s: float
    complete: bool = True  # False: the video was damaged, and this is what came before

    def __post_init__(self) -> None:
        import numpy as np

        if self.array.ndim != 2 or not len(self.array):
            raise ValueError(f"features must be [T, C] with T >= 1, got the shape {list(self.array.shape)}")
        if self.array.dtype != np.float32:
            object.__setattr__(self, "array", self.array.astype(np.float32))
        bad = ~np.isfinite(self.array).all(axis=1)
        if bad.any():
            raise ValueError(
                f"features must be finite; {int(bad.sum())} are not, first at row {int(bad.argmax())}"
            )


@dataclass(frozen=True)
class ExtractorSettings:
    """What made the features of a folder; a detector can only read features of the same settings."""

    extractor: str
    dim: int
    grid: FeatureGrid

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, "extractor": self.extractor, "dim": self.dim, **asdict(self.grid)}

    @classmethod
    def from_json(cls, document: Any, where: str) -> ExtractorSettings:
        """Raises ValueError naming the file and what is wrong with it."""
        try:
            if document["format"] != FORMAT:
                raise ValueError(f"format must be {FORMAT!r}, got {document['format']!r}")
            grid = FeatureGrid(float(document["fps"]), document["stride"], document["num_frames"])
            return cls(str(document["extractor"]), int(document["dim"]), grid)
        except KeyError as error:
            raise ValueError(f"{where}: {error.args[0]} is missing") from None
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from None


def write_atomically(path: Path, data: bytes) -> None:
    """Replace ``path`` in one step, so that a killed run leaves the old file or the new one, never half of
    one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with beside.open("wb") as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())
    beside.replace(path)


class ExtractedFolder:
    """``features.json`` (the settings and durations), and for every video ``<name>.npy`` and ``<name>.json``.

    The second is written last, so a video counts as done only when both are whole.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder)

    def settings(self) -> ExtractorSettings | None:
        """None where the folder holds none (features of other tools have none)."""
        file = self.path / SETTINGS_FILE
        if not file.is_file():
            return None
        try:
            document = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file}: no valid JSON ({error})") from None
        return ExtractorSettings.from_json(document, str(file))

    def prepare(self, settings: ExtractorSettings) -> None:
        """Make the folder, or check that what it holds was made in the same way. Raises ValueError if not."""
        there = self.settings()
        if there is None:
            self.write_settings(settings)
        elif there != settings:
            raise ValueError(
                f"{self.path} holds features of {_in_words(there)}; these would be of {_in_words(settings)}: "
                "choose another folder"
            )

    def write_settings(self, settings: ExtractorSettings) -> None:
        """``features.json``, with the durations of all videos that are done (training reads them there)."""
        videos = {name: {"duration_s": record["duration_s"]} for name, record in self.records()}
        write_atomically(self.path / SETTINGS_FILE, _json_bytes({**settings.to_json(), "videos": videos}))

    def record(self, name: str) -> dict[str, Any] | None:
        """What is known of a video that is done: duration_s, complete, source_bytes, damage; None if it is
        not."""
        file = self.path / f"{name}.json"
        if not file.is_file() or not (self.path / f"{name}.npy").is_file():
            return None
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            return None

    def records(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """(name, record) of every video that is done, by name."""
        for file in sorted(self.path.glob("*.npy")):
            if (record := self.record(file.stem)) is not None:
                yield file.stem, record

    def save(self, name: str, features: Features, record: dict[str, Any]) -> None:
        import io

        import numpy as np

        buffer = io.BytesIO()
        np.save(buffer, features.array, allow_pickle=False)
        write_atomically(self.path / f"{name}.npy", buffer.getvalue())
        write_atomically(
            self.path / f"{name}.json",
            _json_bytes({"duration_s": features.duration_s, "complete": features.complete, **record}),
        )

    def load(self, name: str) -> np.ndarray:
        """float32 [T, C]. Raises FileNotFoundError, or ValueError for an array of another kind."""
        import numpy as np

        file = self.path / f"{name}.npy"
        if not file.is_file():
            raise FileNotFoundError(f"no features of {name} in {self.path}")
        array = np.load(file, allow_pickle=False)
        if array.ndim != 2:
            raise ValueError(f"{file}: features must be [T, C], got the shape {list(array.shape)}")
        return array.astype(np.float32)


def _json_bytes(document: dict[str, Any]) -> bytes:
    return (json.dumps(document, indent=2, allow_nan=False) + "\n").encode()


def _in_words(settings: ExtractorSettings) -> str:
    grid = settings.grid
    return (
        f"{settings.extractor!r} ({settings.dim} wide, {grid.fps:g} frames/s, {grid.num_frames} frames each, "
        f"stride {grid.stride})"
    )
