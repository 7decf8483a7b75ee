"""Feature files with their annotations: whole recordings for testing, crops for training."""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .annotations import Annotation, AnnotationError, VideoRecord, labels_of, locate, read_records
from .config import require
from .decode import FeatureMeta, check_features

FOLDER_FILE = "features.json"
ANY_LABEL = "action"  # the one class of a class-agnostic detector
CROP_TRIALS = 200


@dataclass(frozen=True)
class FeatureFolder:
    """What a folder's ``features.json`` says about its files; ``sharewell tad extract`` writes one.

    ``fps`` is that of the frames which the rows count in; ``videos`` maps a video to its own ``fps`` and
    ``duration_s`` where they differ.
    """

    extractor: str
    stride: float
    num_frames: float
    fps: float | None = None
    videos: Mapping[str, Mapping[str, float]] | None = None

    @classmethod
    def read(cls, folder: str | Path) -> FeatureFolder | None:
        """None without the file. Raises ValueError naming the file when it is not what it should be."""
        path = Path(folder) / FOLDER_FILE
        if not path.is_file():
            return None
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return cls(
                str(values["extractor"]),
                float(values["stride"]),
                float(values["num_frames"]),
                None if values.get("fps") is None else float(values["fps"]),
                values.get("videos"),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: needs extractor, stride and num_frames ({error})") from None

    def write(self, folder: str | Path) -> Path:
        from .annotations import write_json

        return write_json(Path(folder) / FOLDER_FILE, {**self.__dict__})


@dataclass(frozen=True)
class Sample:
    """One recording or a crop of it: ``features`` [rows, c_in] float32, ``segments`` [n, 2] in rows,
    ``labels`` [n]."""

    video_id: str
    features: Tensor
    segments: Tensor
    labels: Tensor
    meta: FeatureMeta


@dataclass(frozen=True)
class DatasetReport:
    """What was read and what was left out, so that nothing is skipped in silence."""

    videos: int
    annotations: int
    without_actions: tuple[str, ...] = ()
    missing_features: tuple[str, ...] = ()
    outside: int = 0  # annotations that begin after the last feature row


class FeatureDataset:
    """Feature files ``<prefix><video>.npy`` ([rows, width], or ``.npz`` with one array) and annotations.

    ``json``: ActivityNet JSON or a CSV with video, start, end, label; also ActionFormer's and OpenTAD's JSON.
    ``stride``, ``num_frames``, ``fps``: how rows lie in time (see :class:`FeatureMeta`); None takes them from
    the folder's ``features.json``, ``fps`` also from the annotations. ``subsets``: which videos, by the
    annotation's subset (None: all), or ``videos`` by name. ``labels``: class names in order of their index
    (None: all that occur); ``class_agnostic``: one class for all.
    ``max_length``: longest crop in training; ``resize_to``: instead stretch every recording to so many rows.
    ``missing``: "error" or "skip" for a video without a feature file; ``report`` counts them.

    Raises ValueError (AnnotationError) naming file, line and video for what cannot be used.
    """

    def __init__(
        self,
        json: str | Path,
        feature_dir: str | Path,
        stride: float | None = None,
        num_frames: float | None = None,
        fps: float | None = None,
        *,
        subsets: Sequence[str] | None = None,
        videos: Sequence[str] | None = None,
        labels: Sequence[str] | None = None,
        class_agnostic: bool = False,
        max_length: int = 2304,
        resize_to: int | None = None,
        prefix: str = "",
        crop_ratio: tuple[float, float] = (0.9, 1.0),
        min_kept: float = 0.5,
        missing: str = "error",
        min_rows: int = 1,
    ) -> None:
        require(max_length >= 1, "max_length", "at least 1", max_length)
        require(resize_to is None or resize_to >= 2, "resize_to", "None or at least 2", resize_to)
        require(0 < crop_ratio[0] <= crop_ratio[1] <= 1, "crop_ratio", "0 < low <= high <= 1", crop_ratio)
        require(0 < min_kept <= 1, "min_kept", "in (0, 1]", min_kept)
        require(missing in ("error", "skip"), "missing", "error | skip", missing)
        self.path, self.feature_dir = Path(json), Path(feature_dir)
        if not self.feature_dir.is_dir():
            raise ValueError(f"feature_dir must be a folder that exists, got {feature_dir}")
        self.prefix, self.max_length, self.resize_to = prefix, max_length, resize_to
        self.crop_ratio, self.min_kept, self.min_rows = crop_ratio, min_kept, min_rows
        self.class_agnostic = class_agnostic
        self.folder = FeatureFolder.read(self.feature_dir)
        self.stride = self._setting("stride", stride)
        self.num_frames = self._setting("num_frames", num_frames)
        self.fps = fps
        records = read_records(self.path)
        wanted = None if subsets is None else {name.lower() for name in subsets}
        chosen = [r for r in records.values() if wanted is None or r.subset in wanted]
        if videos is not None:
            names = set(videos)
            strangers = sorted(names - set(records))
            require(not strangers, "videos", f"in {self.path.name}", strangers)
            chosen = [record for record in chosen if record.video_id in names]
        if not chosen:
            known = sorted({r.subset for r in records.values()})
            raise ValueError(
                f"subsets must name some of {known} in {self.path.name}, got {list(subsets or [])}"
            )
        self.labels = tuple(labels) if labels is not None else labels_of(records.values())
        self.records, absent = [], []
        for record in chosen:
            self._check_labels(record)
            if self._file(record.video_id) is None:
                absent.append(record.video_id)
                if missing == "error":
                    names = f"{self.prefix}{record.video_id}.npy"
                    raise AnnotationError(
                        f"{locate(self.path, record.video_id)}: no {names} in {feature_dir}"
                    )
                continue
            self.records.append(record)
        if not self.records:
            raise ValueError(f"feature_dir must hold files of the annotated videos, {feature_dir} has none")
        self.metas = [self._meta(record) for record in self.records]
        self.report = DatasetReport(
            len(self.records),
            sum(len(r.annotations) for r in self.records),
            tuple(r.video_id for r in self.records if not r.annotations),
            tuple(absent),
            sum(self._outside(r, m) for r, m in zip(self.records, self.metas, strict=True)),
        )

    def _setting(self, name: str, given: float | None) -> float:
        value = given if given is not None else getattr(self.folder, name, None)
        if value is None:
            raise ValueError(f"{name} must be given: {self.feature_dir} has no {FOLDER_FILE}")
        require(value > 0, name, "positive", value)
        return float(value)

    def _check_labels(self, record: VideoRecord) -> None:
        for annotation in record.annotations:
            if annotation.label not in self.labels:
                where = locate(self.path, record.video_id)
                raise AnnotationError(
                    f"{where}: label {annotation.label!r} is not one of {list(self.labels)}"
                )

    def _file(self, video_id: str) -> Path | None:
        for name in (f"{self.prefix}{video_id}", video_id, f"v_{video_id}"):
            for suffix in (".npy", ".npz"):
                path = self.feature_dir / f"{name}{suffix}"
                if path.is_file():
                    return path
        return None

    def _meta(self, record: VideoRecord) -> FeatureMeta:
        own = ((self.folder.videos or {}) if self.folder else {}).get(record.video_id, {})
        fps = self.fps or own.get("fps") or record.fps or (self.folder.fps if self.folder else None)
        if fps is None:
            where = locate(self.path, record.video_id)
            raise AnnotationError(f"{where}: fps is missing; give it in the annotations or as fps=")
        duration = record.duration_s or own.get("duration_s")
        return FeatureMeta(float(fps), self.stride, self.num_frames, duration, record.video_id)

    def _outside(self, record: VideoRecord, meta: FeatureMeta) -> int:
        rows = len(self._open(record.video_id))
        return sum(float(meta.to_rows(np.array(a.start))) >= rows for a in record.annotations)

    def _open(self, video_id: str) -> np.ndarray:
        path = self._file(video_id)
        assert path is not None
        try:
            loaded: Any = np.load(path, mmap_mode="r" if path.suffix == ".npy" else None, allow_pickle=False)
            array = loaded if isinstance(loaded, np.ndarray) else loaded[loaded.files[0]]
        except (ValueError, OSError, EOFError, IndexError, zipfile.BadZipFile) as error:
            where = locate(self.path, video_id)
            raise AnnotationError(f"{where}: {path.name} cannot be read as features: {error}") from None
        if array.ndim != 2 or len(array) < self.min_rows:
            where = locate(self.path, video_id)
            raise AnnotationError(
                f"{where}: {path.name} must be [rows >= {self.min_rows}, width], got {array.shape}"
            )
        return array

    @property
    def width(self) -> int:
        """Channels of the first file."""
        return int(self._open(self.records[0].video_id).shape[1])

    @property
    def n_cls(self) -> int:
        return 1 if self.class_agnostic else len(self.labels)

    def annotations(self, record: VideoRecord) -> tuple[Annotation, ...]:
        """What a prediction is compared with: with one class for all, every label is "action"."""
        if not self.class_agnostic:
            return record.annotations
        return tuple(Annotation(a.start, a.end, ANY_LABEL) for a in record.annotations)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        """The whole recording. Raises ValueError naming the video for NaN, or another width than the rest."""
        record, meta = self.records[index], self.metas[index]
        array = self._open(record.video_id)
        try:
            check_features(array, array.shape[1], record.video_id)
        except ValueError as error:
            raise AnnotationError(f"{locate(self.path, record.video_id)}: {error}") from None
        features = torch.from_numpy(np.array(array, np.float32))
        if self.resize_to is not None:
            covered = (len(features) - 1) * meta.stride + meta.num_frames
            features = F.interpolate(features.T[None], self.resize_to, mode="linear", align_corners=False)[
                0
            ].T
            stride = covered / self.resize_to
            meta = FeatureMeta(meta.fps, stride, stride, meta.duration_s, meta.video_id)
        seconds = np.array([(a.start, a.end) for a in record.annotations], np.float64).reshape(-1, 2)
        segments = torch.from_numpy(meta.to_rows(seconds).astype(np.float32))
        index_of = {label: 0 if self.class_agnostic else n for n, label in enumerate(self.labels)}
        labels = torch.tensor([index_of[a.label] for a in record.annotations], dtype=torch.long)
        inside = segments[:, 0] < len(features)
        return Sample(record.video_id, features, segments[inside], labels[inside], meta)

    def crop(self, index: int, generator: torch.Generator) -> Sample:
        """A random stretch for training: at most ``max_length`` rows, a share ``crop_ratio`` of shorter ones,
        with at least one action kept to ``min_kept``; actions kept to less are left out."""
        whole = self[index]
        if self.resize_to is not None:
            return whole
        rows = len(whole.features)
        if rows > self.max_length:
            length = self.max_length
        else:
            low, high = (max(1, round(share * rows)) for share in self.crop_ratio)
            length = low + int(torch.randint(high - low + 1, (), generator=generator))
        if length == rows:
            return whole
        for trial in range(CROP_TRIALS + 1):
            first = int(torch.randint(rows - length + 1, (), generator=generator))
            if trial == CROP_TRIALS:  # actions are rare here: take the crop around one of them
                one = int(torch.randint(len(whole.segments), (), generator=generator))
                first = min(max(0, math.floor(float(whole.segments[one].mean()) - length / 2)), rows - length)
            clipped = whole.segments.clamp(first, first + length)
            shares = (clipped[:, 1] - clipped[:, 0]) / (whole.segments[:, 1] - whole.segments[:, 0])
            kept = shares >= self.min_kept
            if len(kept) == 0 or bool(kept.any()):
                break
        return Sample(
            whole.video_id,
            whole.features[first : first + length],
            clipped[kept] - first,
            whole.labels[kept],
            whole.meta,
        )


def collate(samples: Sequence[Sample], multiple: int) -> tuple[Tensor, Tensor]:
    """Features [batch, c_in, rows] padded with zeros to a multiple of ``multiple`` rows, and the mask."""
    rows = max(len(sample.features) for sample in samples)
    rows = -(-rows // multiple) * multiple
    widths = {sample.features.shape[1] for sample in samples}
    if len(widths) > 1:
        names = ", ".join(f"{s.video_id}: {s.features.shape[1]}" for s in samples)
        raise ValueError(f"features of all videos must be equally wide, got {names}")
    features = torch.zeros(len(samples), widths.pop(), rows)
    mask = torch.zeros(len(samples), 1, rows)
    for row, sample in enumerate(samples):
        features[row, :, : len(sample.features)] = sample.features.T
        mask[row, :, : len(sample.features)] = 1
    return features, mask
