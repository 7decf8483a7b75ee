"""A small detection task that is learned in seconds, and a detector trained on it once a session."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from sharewell.perception import FeatureDataset, FitResult, LiquidTADConfig, TADModel, TrainConfig, fit

HZ = 2.0
ROWS, WIDTH = 200, 12


@dataclass(frozen=True)
class ToyTask:
    """``folder`` holds features and ``annotations``; "up" raises channels 0-3, "down" channels 4-7."""

    folder: Path
    annotations: Path

    def dataset(self, *subsets: str, **settings: Any) -> FeatureDataset:
        return FeatureDataset(
            self.annotations, self.folder, 1, 1, subsets=subsets, **{"max_length": 128, **settings}
        )


def write_toy(folder: Path, *, videos: int = 8, seed: int = 0) -> ToyTask:
    rng = np.random.default_rng(seed)
    database = {}
    for number in range(videos):
        features = 0.3 * rng.standard_normal((ROWS, WIDTH)).astype(np.float32)
        annotations = []
        for start, kind in ((20, 0), (90, 1), (150, 0)):
            first = start + int(rng.integers(-8, 8))
            last = first + int(rng.integers(10, 25))
            features[first:last, 4 * kind : 4 * kind + 4] += 2
            annotations.append({"label": ("up", "down")[kind], "segment": [first / HZ, last / HZ]})
        np.save(folder / f"v{number}.npy", features)
        subset = "training" if number < videos * 3 // 4 else "test"
        database[f"v{number}"] = {
            "subset": subset,
            "fps": HZ,
            "duration": ROWS / HZ,
            "annotations": annotations,
        }
    path = folder / "annotations.json"
    path.write_text(json.dumps({"database": database}, indent=1), encoding="utf-8")
    return ToyTask(folder, path)


def toy_model(backbone: Any = "liquid", seed: int = 0, **changes: Any) -> TADModel:
    config = LiquidTADConfig(
        **{"c_in": WIDTH, "n_cls": 2, "dim": 16, "arch": (1, 1, 2), "heads": 2, "window": 5, **changes}
    )
    return TADModel(config, backbone, seed=seed)


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()  # kept until the process ends


@cache
def toy() -> ToyTask:
    return write_toy(Path(_folder().name))


@cache
def trained() -> FitResult:
    """A liquid detector that solves the task."""
    config = TrainConfig(lr=8e-3, epochs=10, warmup_epochs=1, batch_size=2, ema_decay=0.9)
    return fit(toy_model(initial_positives=10), toy().dataset("training"), toy().dataset("test"), config)
