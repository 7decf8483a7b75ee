"""From a source to its detections, whole or as it plays."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..tad.checkpoint import checkpoint_extra, load_checkpoint
from ..tad.decode import Detection
from ..tad.export import OnnxDetector
from ..tad.windows import Detector
from .decode import PIPE, DecodeStats, probe
from .errors import VideoDecodeError
from .extractor import FeatureExtractor, StreamingExtractor, TorchExtractor
from .extractors import extractor_of_checkpoint, shipped
from .stream import StreamConfig, StreamDetector

LIVE_CORE = 32  # rows evaluated at a time in a live source
LIVE_GUARD_S = 4.0
LIVE_PATIENCE_S = 300.0
BLOCK = 4096  # rows fed at once from an extractor that has them all
SHIPPED_DETECTOR = "detector.safetensors"


@dataclass(frozen=True)
class VideoDetector:
    """A trained model with the extractor of its features. ``about`` says what it was trained for;
    ``demonstration`` that this is a task made up for trying things out."""

    model: Detector
    extractor: FeatureExtractor
    name: str
    about: str = ""
    demonstration: bool = False

    def __post_init__(self) -> None:
        width, wanted = self.extractor.settings.dim, self.model.config.c_in
        if width != wanted:
            raise ValueError(
                f"detector {self.name} needs features {wanted} wide, those of "
                f"{self.extractor.settings.extractor} are {width} wide"
            )

    @classmethod
    def load(
        cls, path: str | Path | None = None, extractor: FeatureExtractor | None = None, **options: Any
    ) -> VideoDetector:
        """The detector of a run's folder, a checkpoint or an exported ``.onnx`` file, or (None) the one that
        ships with the package.

        ``extractor``: instead of the one that the checkpoint names (an ONNX file names none); ``options`` go
        to the latter (``skip_damaged``, ``threads``). Raises FileNotFoundError, or ValueError for what does
        not fit together.
        """
        file = shipped(SHIPPED_DETECTOR) if path is None else Path(path)
        exported = file.suffix.lower() == ".onnx"
        model: Detector = OnnxDetector(file) if exported else load_checkpoint(file)
        extra = {} if exported else checkpoint_extra(file)
        if extractor is None:
            features = extra.get("features", {})
            if features.get("extractor") == "signal":
                options["channels"] = model.config.c_in // int(features["num_frames"])
            extractor = extractor_of_checkpoint(features, **options)
        return cls(
            model,
            extractor,
            "shipped" if path is None else str(path),
            str(extra.get("about", "")),
            bool(extra.get("demonstration", False)),
        )


@dataclass(frozen=True)
class VideoResult:
    """``detections`` in order of time. ``complete`` is False when the source was damaged: ``error`` says
    where, and the detections are those of what came before."""

    source: str
    duration_s: float
    detections: tuple[Detection, ...]
    complete: bool = True
    error: str = ""
    stats: DecodeStats = field(default_factory=DecodeStats)


def detect(
    source: str | Path,
    detector: VideoDetector,
    config: StreamConfig | None = None,
    *,
    on_detection: Callable[[Detection], None] | None = None,
    progress: Callable[[str, float, float], None] = lambda what, done, total: None,
) -> VideoResult:
    """Detections of a file, a URL or a pipe (``-``), in the memory of one window however long it is.

    ``on_detection`` is called for each as soon as it is settled (see :class:`StreamConfig`). An interrupt
    (KeyboardInterrupt) ends a live source like its end would. Raises VideoDecodeError when nothing could be
    read.
    """
    stats = DecodeStats()
    extractor = detector.extractor
    stream = StreamDetector(detector.model, extractor.settings.grid, config)
    found: list[Detection] = []
    error = ""
    total = _stated_duration(source) if isinstance(extractor, StreamingExtractor) else 0.0

    def settle(new: list[Detection]) -> None:
        for detection in new:
            found.append(detection)
            if on_detection is not None:
                on_detection(detection)

    duration_s: float | None = None
    try:
        for rows, known_s in _rows(source, extractor, stats):
            duration_s = known_s
            settle(stream.push(rows))
            if total:
                progress("seconds", min(total, stream.seen * stream.grid.step_s), total)
    except VideoDecodeError as damage:
        if not stream.seen:
            raise
        error = str(damage)
    except KeyboardInterrupt:
        if not stream.seen:
            raise
    duration_s = stats.duration_s or duration_s or 0.0
    settle(stream.finish(duration_s or None))
    damaged = bool(error) or stats.damaged > 0
    return VideoResult(
        str(source),
        duration_s,
        tuple(sorted(found, key=lambda d: (d.start, d.end, d.label))),
        not damaged,
        error or "; ".join(stats.damage),
        stats,
    )


def _rows(
    source: str | Path, extractor: FeatureExtractor, stats: DecodeStats
) -> Iterator[tuple[np.ndarray, float | None]]:
    if isinstance(extractor, StreamingExtractor):
        for chunk in extractor.chunks(source, stats):
            yield chunk, None
        return
    features = extractor.extract(source)
    for first in range(0, len(features.array), BLOCK):
        yield features.array[first : first + BLOCK], features.duration_s


def _stated_duration(source: str | Path) -> float:
    """0 for a pipe or a URL: opening it to look would eat it."""
    if str(source) == PIPE or "://" in str(source):
        return 0.0
    return probe(source).duration_s


def live(detector: VideoDetector, config: StreamConfig) -> tuple[VideoDetector, StreamConfig]:
    """The same detector for a source that plays: no batches that wait to be full, small cores, early
    settling."""
    extractor = detector.extractor
    if not isinstance(extractor, StreamingExtractor):
        raise ValueError(
            f"{extractor.settings.extractor} has no frames to follow: streaming needs a video extractor"
        )
    if isinstance(extractor, TorchExtractor):
        extractor = dataclasses.replace(extractor, batch=1)
    return (
        dataclasses.replace(detector, extractor=extractor),
        dataclasses.replace(
            config,
            core=min(config.core, LIVE_CORE),
            guard_s=min(config.guard_s, LIVE_GUARD_S),
            patience_s=min(config.patience_s, LIVE_PATIENCE_S),
        ),
    )
