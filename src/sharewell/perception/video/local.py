"""Features that are there already (I3D, VideoMAE, ...), and sensors instead of cameras."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .features import ExtractedFolder, ExtractorSettings, FeatureGrid, Features

if TYPE_CHECKING:
    import numpy as np

SIGNAL_GRID = FeatureGrid(10.0, 4, 16)
SIGNAL_SUFFIXES = frozenset({".csv", ".npy"})


@dataclass(frozen=True)
class FolderExtractor:
    """``<folder>/<name of the video>.npy`` [T, C], made by any tool on ``grid`` (the folder's own
    ``features.json`` where it has one)."""

    folder: Path
    grid: FeatureGrid | None = None

    def __post_init__(self) -> None:
        if not self.folder.is_dir():
            raise FileNotFoundError(f"no feature folder {self.folder}")
        if self.grid is None and ExtractedFolder(self.folder).settings() is None:
            raise ValueError(
                f"{self.folder} has no features.json: say --fps, --stride and --num-frames of its features"
            )

    @property
    def settings(self) -> ExtractorSettings:
        there = ExtractedFolder(self.folder).settings()
        if there is not None and (self.grid is None or there.grid == self.grid):
            return there
        if there is not None:
            raise ValueError(f"{self.folder}/features.json says {there.grid}, you say {self.grid}")
        files = sorted(self.folder.glob("*.npy"))
        if not files:
            raise FileNotFoundError(f"no .npy features in {self.folder}")
        assert self.grid is not None
        dim = ExtractedFolder(self.folder).load(files[0].stem).shape[1]
        return ExtractorSettings(f"dir:{self.folder.name}", dim, self.grid)

    def extract(self, source: str | Path) -> Features:
        """Those of ``<stem of source>.npy``. Raises FileNotFoundError, or ValueError naming the file."""
        name, settings = Path(source).stem, self.settings
        array = ExtractedFolder(self.folder).load(name)
        if array.shape[1] != settings.dim:
            raise ValueError(f"{self.folder / name}.npy is {array.shape[1]} wide, the others {settings.dim}")
        record = ExtractedFolder(self.folder).record(name) or {}
        span_s = ((len(array) - 1) * settings.grid.stride + settings.grid.num_frames) / settings.grid.fps
        try:
            return Features(array, settings.grid, float(record.get("duration_s", span_s)))
        except ValueError as error:
            raise ValueError(f"{self.folder / name}.npy: {error}") from None


@dataclass(frozen=True)
class SignalExtractor:
    """Sensor samples as they are: feature i is ``num_frames`` samples of every channel, one after the other,
    [channels * num_frames]. ``fps`` is the sampling rate. Reads .npy [samples, channels], or .csv with one
    row a sample and an optional header; a column named ``time`` (or ``t``) is left out."""

    channels: int
    grid: FeatureGrid = SIGNAL_GRID

    @property
    def settings(self) -> ExtractorSettings:
        return ExtractorSettings("signal", self.channels * self.grid.num_frames, self.grid)

    def extract(self, source: str | Path) -> Features:
        """Raises FileNotFoundError, or ValueError naming the file, its line and what is wrong there."""
        import numpy as np

        samples = read_signal(Path(source))
        if samples.shape[1] != self.channels:
            raise ValueError(f"{source}: must have {self.channels} channels, has {samples.shape[1]}")
        duration_s = len(samples) / self.grid.fps
        size = self.grid.num_frames
        if len(samples) < size:
            samples = np.concatenate([samples, np.repeat(samples[-1:], size - len(samples), axis=0)])
        windows = np.lib.stride_tricks.sliding_window_view(samples, size, axis=0)[:: self.grid.stride]
        return Features(windows.reshape(len(windows), -1).astype(np.float32), self.grid, duration_s)


def read_signal(path: Path) -> np.ndarray:
    """float32 [samples, channels] of a .npy or .csv file."""
    import numpy as np

    if not path.is_file():
        raise FileNotFoundError(f"no signal {path}")
    if path.suffix.lower() == ".npy":
        samples = np.load(path, allow_pickle=False)
        samples = samples[:, None] if samples.ndim == 1 else samples
    else:
        samples = _read_csv(path)
    if samples.ndim != 2 or not samples.size:
        raise ValueError(f"{path}: a signal must be [samples, channels], got the shape {list(samples.shape)}")
    bad = ~np.isfinite(samples.astype(np.float64)).all(axis=1)
    if bad.any():
        raise ValueError(
            f"{path}: samples must be finite; {int(bad.sum())} are not, first at row {int(bad.argmax())}"
        )
    return samples.astype(np.float32)


def _read_csv(path: Path) -> np.ndarray:
    import numpy as np

    rows: list[list[float]] = []
    keep: list[int] | None = None
    with path.open(newline="", encoding="utf-8-sig") as file:
        for number, cells in enumerate(csv.reader(file), 1):
            if not any(cell.strip() for cell in cells):
                continue
            if number == 1 and not all(_is_number(cell) for cell in cells):
                keep = [i for i, cell in enumerate(cells) if cell.strip().lower() not in ("time", "t")]
                continue
            keep = list(range(len(cells))) if keep is None else keep
            try:
                rows.append([float(cells[i]) for i in keep])
            except (ValueError, IndexError):
                raise ValueError(
                    f"{path}, line {number}: must hold {len(keep)} numbers, got {cells}"
                ) from None
    return np.array(rows, dtype=np.float32).reshape(len(rows), len(keep or ()))


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True
