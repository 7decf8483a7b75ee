"""Streams of wrist movements with labelled actions, made from the BasicMotions recordings.

The recordings (UEA archive: 10 Hz, accelerometer and gyroscope, 10 s each, four movements of 20 people's
sessions) come with the wheel of aeon (BSD-3-Clause): ``pip install --no-deps aeon``; aeon itself is never
imported. Standing is the background; walking, running and badminton are the actions. Training and test
streams use the archive's training and test recordings.
"""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np

HZ, CHANNELS, SECONDS = 10, 6, 120
WINDOW, STRIDE = 16, 4
BACKGROUND, ACTIONS = "standing", ("badminton", "running", "walking")
GAP_S, ACTION_S = (0.5, 10.0), (1.5, 30.0)


def recordings(part: str) -> dict[str, list[np.ndarray]] | None:
    """By movement, [100, 6] each, of "TRAIN" or "TEST"; None when aeon's wheel is not installed."""
    try:
        files = distribution("aeon")
    except PackageNotFoundError:
        return None
    path = Path(str(files.locate_file(f"aeon/datasets/data/BasicMotions/BasicMotions_{part}.ts")))
    out: dict[str, list[np.ndarray]] = {}
    for line in path.read_text(encoding="utf-8").split("@data", 1)[-1].strip().splitlines():
        *dimensions, label = line.strip().split(":")
        values = np.array([[float(v) for v in d.split(",")] for d in dimensions], np.float32)
        out.setdefault(label.lower(), []).append(values.T)
    return out


def stream(
    source: dict[str, list[np.ndarray]], rng: np.random.Generator
) -> tuple[np.ndarray, list[dict[str, object]]]:
    """Samples [1200, 6] and annotations: standing and actions in turn, cut from the recordings of a
    movement; what is longer than one of them (10 s) goes on in another."""

    def cut(label: str, seconds: tuple[float, float]) -> np.ndarray:
        # Log-uniform, so that short and long ones are equally common at every level of the pyramid.
        left = round(HZ * float(np.exp(rng.uniform(*np.log(seconds)))))
        pieces = []
        while left:
            whole = source[label][rng.integers(len(source[label]))]
            count = min(left, len(whole))
            first = rng.integers(len(whole) - count + 1)
            pieces.append(whole[first : first + count])
            left -= count
        return np.concatenate(pieces)

    parts, annotations, length = [], [], 0
    while True:
        gap = cut(BACKGROUND, GAP_S)
        label = ACTIONS[rng.integers(len(ACTIONS))]
        action = cut(label, ACTION_S)
        if length + len(gap) + len(action) > SECONDS * HZ:
            break
        start = length + len(gap)
        length = start + len(action)
        parts += [gap, action]
        annotations.append({"label": label, "segment": [start / HZ, length / HZ]})
    while length < SECONDS * HZ:
        gap = cut(BACKGROUND, GAP_S)[: SECONDS * HZ - length]
        parts.append(gap)
        length += len(gap)
    return np.concatenate(parts), annotations


def windows(samples: np.ndarray) -> np.ndarray:
    """Feature rows [297, 96]: the raw samples of windows of 16, one every 4."""
    view = np.lib.stride_tricks.sliding_window_view(samples, WINDOW, axis=0)[::STRIDE]
    return view.reshape(len(view), -1).astype(np.float32)


def write_streams(folder: Path, *, train: int = 96, test: int = 60, seed: int = 0) -> Path | None:
    """Write feature files and ``annotations.json`` once; None without the recordings."""
    path = folder / "annotations.json"
    if path.is_file():
        return path
    sources = {"training": recordings("TRAIN"), "test": recordings("TEST")}
    if any(source is None for source in sources.values()):
        return None
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    everything = np.concatenate([r for group in (sources["training"] or {}).values() for r in group])
    mean, spread = everything.mean(axis=0), everything.std(axis=0)
    database = {}
    for subset, count in (("training", train), ("test", test)):
        for number in range(count):
            source = sources[subset]
            assert source is not None
            samples, annotations = stream(source, rng)
            name = f"{subset}_{number:03}"
            np.save(folder / f"{name}.npy", windows((samples - mean) / spread))
            database[name] = {
                "subset": subset,
                "fps": HZ,
                "duration": SECONDS,
                "annotations": annotations,
            }
    path.write_text(json.dumps({"database": database}), encoding="utf-8")
    return path
