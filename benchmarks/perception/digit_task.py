"""The digit-motion task from nothing to a detector: render, train the extractor, extract, label, train,
evaluate.

Three sets of videos that share no video: one trains the extractor, one the detector, one tests. The digits
and the noise of the test set occur in neither of the others. Used by the benchmark ``video`` and by the tool
that trains what ships.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sharewell.perception import FeatureDataset, FitResult, LiquidTADConfig, TADModel, TrainConfig, fit
from sharewell.perception.video.digits import DigitClip, plan_actions, render_folder
from sharewell.perception.video.extraction import extract_folder, find_sources
from sharewell.perception.video.extractor import TorchExtractor
from sharewell.perception.video.labels import convert_labels
from sharewell.perception.video.pretrain import PretrainConfig, train_motion_net

Progress = Callable[[str, float, float], None]


@dataclass(frozen=True)
class TaskSize:
    """Numbers of videos, their length, and epochs of the two trainings."""

    extractor_videos: int = 32
    train_videos: int = 48
    test_videos: int = 32
    seconds: float = 60.0
    extractor_epochs: int = 8
    epochs: int = 30
    warmup_epochs: int = 5


SMOKE = TaskSize(3, 3, 2, 20.0, 1, 2, 1)


def train_extractor(
    folder: Path, size: TaskSize, seed: int, progress: Progress
) -> tuple[TorchExtractor, float]:
    """Render the first set, and train the small extractor on it."""
    series = 2 * seed + 1  # odd: the sets of the detector have even numbers
    render_folder(
        folder,
        size.extractor_videos,
        0,
        seed=series,
        clip=DigitClip(0, seconds=size.seconds),
        progress=progress,
    )
    videos = [
        (
            folder / f"train_{number:03d}.mp4",
            plan_actions(DigitClip(series * 100_000 + number, "train", seconds=size.seconds)),
        )
        for number in range(size.extractor_videos)
    ]
    return train_motion_net(
        videos, PretrainConfig(epochs=size.extractor_epochs, seed=seed), progress=progress
    )


@dataclass(frozen=True)
class Prepared:
    """Where the data lies, and the CPU seconds that extraction took."""

    annotations: Path
    features: Path
    extract_cpu_s: float


def prepare(
    folder: Path, extractor: TorchExtractor, size: TaskSize, seed: int, progress: Progress
) -> Prepared:
    """Render the detector's sets, extract and convert as a user would: annotations and feature folder."""
    table = render_folder(
        folder / "videos",
        size.train_videos,
        size.test_videos,
        seed=2 * seed,
        clip=DigitClip(0, seconds=size.seconds),
        progress=progress,
    )
    features = folder / "features"
    began = time.process_time()
    report = extract_folder(find_sources([folder / "videos"]), extractor, features, progress=progress)
    spent = time.process_time() - began
    if report.failed or report.partial:
        raise RuntimeError(f"videos that were just made cannot be read: {report.failed + report.partial}")
    annotations = folder / "annotations.json"
    annotations.write_text(json.dumps(convert_labels(table, features).document), encoding="utf-8")
    return Prepared(annotations, features, spent)


def shuffle_labels(annotations: Path, target: Path, seed: int) -> Path:
    """The same segments; the labels of the training videos dealt out anew over all of them. The test videos
    keep theirs."""
    document = json.loads(annotations.read_text(encoding="utf-8"))
    actions = [
        action
        for entry in document["database"].values()
        if entry["subset"] == "train"
        for action in entry["annotations"]
    ]
    labels = [action["label"] for action in actions]
    for action, which in zip(actions, np.random.default_rng(seed).permutation(len(labels)), strict=True):
        action["label"] = labels[which]
    target.write_text(json.dumps(document), encoding="utf-8")
    return target


def train_detector(
    annotations: Path, features: Path, size: TaskSize, seed: int, progress: Progress
) -> FitResult:
    """LiquidTAD, 128 wide, five levels; evaluated on the test videos at tIoU 0.3 to 0.7."""
    train = FeatureDataset(annotations, features, subsets=["train"])
    test = FeatureDataset(annotations, features, subsets=["test"], labels=train.labels)
    model = TADModel(LiquidTADConfig.tiny(train.width, len(train.labels), labels=train.labels), seed=seed)
    config = TrainConfig(
        lr=2e-3,
        epochs=size.epochs - size.warmup_epochs,
        warmup_epochs=size.warmup_epochs,
        batch_size=8,
        ema_decay=0.99,
        seed=seed,
    )
    return fit(model, train, test, config, progress=progress)
