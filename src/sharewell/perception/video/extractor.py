"""Feature extractors: anything that turns a source into features [T, C] on an even grid.

:class:`TorchExtractor` makes one from any torch module, by windows as the frames arrive, so that a file of
hours and a live source take the same small memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

from .decode import DecodeStats, Sampling, sample_frames
from .errors import VideoDecodeError
from .features import ExtractorSettings, FeatureGrid, Features

if TYPE_CHECKING:
    import numpy as np
    import torch

FRAME_STATISTICS = 4
DEFAULT_GRID = FeatureGrid()


@runtime_checkable
class FeatureExtractor(Protocol):
    """``name`` and ``settings`` tell apart features that a detector must not mix."""

    @property
    def settings(self) -> ExtractorSettings: ...

    def extract(self, source: str | Path) -> Features:
        """All features of a source. Raises VideoDecodeError only when nothing at all could be read; of a
        damaged file the features before the damage come back with ``complete=False``."""
        ...


@runtime_checkable
class StreamingExtractor(FeatureExtractor, Protocol):
    """An extractor that needs only the last frames, so it can follow a live source."""

    def chunks(self, source: str | Path, stats: DecodeStats | None = None) -> Iterator[np.ndarray]:
        """float32 [n, C] arrays, n >= 1, in order, as the frames arrive. Raises VideoDecodeError at damage,
        after the features of all frames before it."""
        ...


@dataclass(frozen=True)
class TorchExtractor:
    """A torch module, run on sampled frames.

    ``module`` takes float32 [n, 3, height, width] (``takes="frames"``) and gives [n, d], which is averaged
    over the frames of a window; or takes [n, 3, num_frames, height, width] (``takes="clips"``, as 3-D
    networks do) and gives [n, d] at once. Pixels are scaled to [0, 1], then (x - mean) / std. A frame's
    statistics against the frame before it (mean, spread and greatest block of the absolute difference; change
    of the mean brightness), averaged over the window, are appended: C = d + 4. ``batch``: windows that go
    through the module at once.
    """

    name: str
    module: torch.nn.Module
    dim: int  # d, of the module alone
    grid: FeatureGrid = DEFAULT_GRID
    takes: Literal["frames", "clips"] = "frames"
    width: int = 224
    height: int = 224
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    batch: int = 16
    device: str = "cpu"
    skip_damaged: bool = False
    threads: int = 0

    def __post_init__(self) -> None:
        if self.takes not in ("frames", "clips"):
            raise ValueError(f"takes must be frames or clips, got {self.takes!r}")
        if self.dim < 1 or self.batch < 1:
            raise ValueError(f"dim and batch must be at least 1, got {self.dim} and {self.batch}")
        if any(s <= 0 for s in self.std):
            raise ValueError(f"std must be positive, got {self.std}")
        _ = self.sampling  # checks fps, width and height
        self.module.eval().requires_grad_(False).to(self.device)

    @property
    def settings(self) -> ExtractorSettings:
        return ExtractorSettings(self.name, self.dim + FRAME_STATISTICS, self.grid)

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.grid.fps, self.width, self.height, self.skip_damaged, self.threads)

    def with_grid(self, grid: FeatureGrid) -> TorchExtractor:
        return replace(self, grid=grid)

    def extract(self, source: str | Path) -> Features:
        return collect(self, source)

    def chunks(self, source: str | Path, stats: DecodeStats | None = None) -> Iterator[np.ndarray]:
        frames = (frame.rgb for frame in sample_frames(source, self.sampling, stats))
        yield from self.from_frames(frames)

    def from_frames(self, frames: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        """Features of uint8 [height, width, 3] frames that come from anywhere at ``grid.fps``."""
        windows = _Windows(self)
        try:
            for frame in frames:
                yield from windows.push(frame)
        except VideoDecodeError:
            yield from windows.finish()
            raise
        yield from windows.finish()


class _Windows:
    """Frames in, features out; holds the frames of one window and one batch."""

    def __init__(self, extractor: TorchExtractor) -> None:
        self.of = extractor
        self.size, self.stride = extractor.grid.num_frames, extractor.grid.stride
        self.seen = 0
        self.last: np.ndarray | None = None  # the frame before, float32
        self.waiting: list[np.ndarray] = []  # frames (or clips) that wait for a full batch
        self.statistics: deque[np.ndarray] = deque(maxlen=self.size)
        self.pixels: deque[np.ndarray] = deque(maxlen=self.size)  # clips only
        self.embedded: deque[np.ndarray] = deque()  # frames only: module outputs, oldest first
        self.first = 0  # frame number of embedded[0]
        self.next = 0  # window that comes next
        self.pending: list[np.ndarray] = []  # statistics of the windows (clips) or frames that wait

    def push(self, frame: np.ndarray) -> Iterator[np.ndarray]:
        import numpy as np

        pixels = frame.astype(np.float32) / 255.0
        statistics = frame_statistics(pixels, self.last)
        self.last = pixels
        self.seen += 1
        if self.of.takes == "frames":
            self.waiting.append(pixels)
            self.pending.append(statistics)
            if len(self.waiting) == self.of.batch:
                yield from self._flush()
            return
        self.pixels.append(pixels)
        self.statistics.append(statistics)
        start = self.seen - self.size
        if start >= 0 and start % self.stride == 0:
            self._queue_clip()
            if len(self.waiting) == self.of.batch:
                yield from self._flush()

    def finish(self) -> Iterator[np.ndarray]:
        if not self.seen:
            return
        if self.seen < self.size:  # shorter than one window: the last frame stands still
            for _ in range(self.size - self.seen):
                yield from self.push((self.last * 255.0).round().astype("uint8"))  # pyright: ignore
        if self.waiting:
            yield from self._flush()

    def _queue_clip(self) -> None:
        import numpy as np

        self.waiting.append(np.stack(self.pixels))
        self.pending.append(np.mean(self.statistics, axis=0))

    def _flush(self) -> Iterator[np.ndarray]:
        import numpy as np

        out = self._run(np.stack(self.waiting))
        joined = np.concatenate([out, np.stack(self.pending)], axis=1)
        self.waiting, self.pending = [], []
        if self.of.takes == "clips":
            yield joined
            return
        self.embedded.extend(joined)
        ready = []
        while self.next * self.stride + self.size <= self.first + len(self.embedded):
            begin = self.next * self.stride - self.first
            ready.append(np.mean([self.embedded[i] for i in range(begin, begin + self.size)], axis=0))
            self.next += 1
            for _ in range(min(len(self.embedded), self.next * self.stride - self.first)):
                self.embedded.popleft()
                self.first += 1
        if ready:
            yield np.stack(ready).astype(np.float32)

    def _run(self, pixels: np.ndarray) -> np.ndarray:
        """[n, H, W, 3] or [n, frames, H, W, 3] -> [n, d]."""
        import numpy as np
        import torch

        of = self.of
        x = (torch.from_numpy(pixels) - torch.tensor(of.mean)) / torch.tensor(of.std)
        x = x.movedim(-1, 1).contiguous()
        with torch.inference_mode():
            out = of.module(x.to(of.device)).float().cpu().numpy()
        if out.shape != (len(pixels), of.dim):
            raise ValueError(
                f"extractor {of.name}: the module must give [n, {of.dim}], "
                f"got {list(out.shape)} for n = {len(pixels)}"
            )
        return out.astype(np.float32)


def frame_statistics(frame: np.ndarray, before: np.ndarray | None) -> np.ndarray:
    """float32 [4] of two frames [H, W, 3] in [0, 1]: mean, standard deviation and greatest 8 x 8-block mean
    of the absolute difference, and the signed change of the mean brightness. Zeros for the first frame."""
    import numpy as np

    if before is None:
        return np.zeros(FRAME_STATISTICS, np.float32)
    difference = np.abs(frame - before).mean(axis=2)
    h, w = (difference.shape[0] // 8) * 8, (difference.shape[1] // 8) * 8
    blocks = difference[:h, :w].reshape(h // 8, 8, w // 8, 8).mean(axis=(1, 3))
    return np.array(
        [difference.mean(), difference.std(), blocks.max(), frame.mean() - before.mean()], dtype=np.float32
    )


def collect(extractor: StreamingExtractor, source: str | Path, stats: DecodeStats | None = None) -> Features:
    """All chunks in one array. Raises VideoDecodeError only when there is none."""
    import numpy as np

    stats = DecodeStats() if stats is None else stats
    parts: list[np.ndarray] = []
    complete = True
    try:
        for chunk in extractor.chunks(source, stats):
            parts.append(chunk)  # noqa: PERF402 - what came before damage must stay
    except VideoDecodeError as error:
        if not parts:
            raise
        complete = False
        stats.damage.append(str(error))
    return Features(np.concatenate(parts), extractor.settings.grid, stats.duration_s, complete)
