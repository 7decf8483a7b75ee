"""Videos with known actions: handwritten digits that shift, spin, grow, blink or swap over moving clutter.

The digits are those of scikit-learn (UCI optical recognition, CC BY 4.0). Every video is really encoded with
H.264, so whatever reads it has to decode it. Digits of the ``train`` and ``test`` splits, and the noise
around them, are apart: a detector is tested on writing that it never saw.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .features import write_atomically

if TYPE_CHECKING:
    import numpy as np

MOTIONS = ("shift", "spin", "grow", "blink", "swap")
SPLIT_AT = 1200  # of 1,797 digits: the first are for training
CANVAS = 40  # pixels of the square that a digit is drawn in


@dataclass(frozen=True)
class DigitClip:
    """What one video shows. ``seconds`` long, ``size`` x ``size`` pixels, ``fps`` frames a second."""

    seed: int
    split: str = "train"
    seconds: float = 60.0
    size: int = 96
    fps: int = 12
    blobs: int = 7

    def __post_init__(self) -> None:
        if self.split not in ("train", "test"):
            raise ValueError(f"split must be train or test, got {self.split!r}")
        if not 1 <= self.seconds <= 36_000:
            raise ValueError(f"seconds must be in [1, 36000], got {self.seconds}")
        if not (64 <= self.size <= 512 and self.size % 2 == 0):
            raise ValueError(f"size must be even and in [64, 512], got {self.size}")
        if not 4 <= self.fps <= 60:
            raise ValueError(f"fps must be in [4, 60], got {self.fps}")
        if not 0 <= self.blobs <= 64:
            raise ValueError(f"blobs must be in [0, 64], got {self.blobs}")


@dataclass(frozen=True)
class Action:
    start_s: float
    end_s: float
    label: str


def plan_actions(clip: DigitClip) -> list[Action]:
    """Actions of 1.5 to 5 s with pauses of 1 to 5 s between them, every motion equally likely."""
    import numpy as np

    rng = np.random.default_rng([clip.seed, clip.split == "test", 1])
    actions: list[Action] = []
    at = float(rng.uniform(0.5, 4.0))
    while True:
        length = float(rng.uniform(1.5, 5.0))
        if at + length > clip.seconds - 0.5:
            return actions
        actions.append(Action(round(at, 3), round(at + length, 3), MOTIONS[int(rng.integers(len(MOTIONS)))]))
        at += length + float(rng.uniform(1.0, 5.0))


def render_frames(clip: DigitClip, actions: list[Action]) -> Iterator[np.ndarray]:
    """uint8 [size, size, 3] at ``clip.fps``."""
    import numpy as np
    from scipy import ndimage
    from sklearn.datasets import load_digits

    rng = np.random.default_rng([clip.seed, clip.split == "test", 2])
    bunch: Any = load_digits()
    images = bunch.images.astype(np.float32) / 16.0
    images = images[:SPLIT_AT] if clip.split == "train" else images[SPLIT_AT:]
    size = clip.size
    texture = ndimage.gaussian_filter(rng.standard_normal((3, 192, 192)), (0, 5, 5), mode="wrap")
    texture = (0.28 + 0.11 * texture / texture.std()).astype(np.float32)
    drift = rng.uniform(-14, 14, 2)
    blobs = [_Blob(rng, size) for _ in range(clip.blobs)]

    digit = images[rng.integers(len(images))]
    centre = rng.uniform(0.3, 0.7, 2) * size
    angle, zoom, colour = 0.0, 1.0, rng.uniform(0.75, 1.0, 3)
    current: Action | None = None
    pace, way, swapped = 1.0, np.zeros(2), 0
    pending = list(actions)
    for number in range(round(clip.seconds * clip.fps)):
        t = number / clip.fps
        if current is not None and t >= current.end_s:
            current, zoom = None, 1.0
        if current is None and pending and t >= pending[0].start_s:
            current = pending.pop(0)
            pace, swapped = float(rng.uniform(0.8, 1.3)), 0
            heading = math.atan2(size / 2 - centre[0], size / 2 - centre[1]) + float(rng.uniform(-0.6, 0.6))
            way = np.array([math.sin(heading), math.cos(heading)]) * 13.0 * pace
        visible = True
        if current is not None:
            since, dt = t - current.start_s, 1 / clip.fps
            if current.label == "shift":
                centre = centre + way * dt
                for axis in (0, 1):  # turns back at the edge
                    if not 0.2 * size < centre[axis] < 0.8 * size:
                        way[axis] = -way[axis]
                        centre[axis] = min(max(centre[axis], 0.2 * size), 0.8 * size)
            elif current.label == "spin":
                angle += 2.3 * pace * dt
            elif current.label == "grow":
                share = since / (current.end_s - current.start_s)
                zoom = 1.0 + 0.8 * (1 - abs(2 * share - 1))
            elif current.label == "blink":
                visible = math.sin(2 * math.pi * 0.9 * pace * since) < 0
            elif current.label == "swap":
                if int(since * 1.6 * pace) >= swapped:
                    swapped += 1
                    digit = images[rng.integers(len(images))]
        corner = (np.arange(size) + drift[0] * t) % 192, (np.arange(size) + drift[1] * t) % 192
        frame = texture[:, corner[0].astype(int)][:, :, corner[1].astype(int)].copy()
        for blob in blobs:
            blob.draw(frame, t)
        if visible:
            _draw_digit(frame, digit, centre, angle, zoom, colour, ndimage.map_coordinates)
        yield (np.clip(frame, 0, 1).transpose(1, 2, 0) * 255).astype(np.uint8)


class _Blob:
    """A patch of noise that drifts and turns back at the edges: clutter as large and as lively as a digit."""

    def __init__(self, rng: np.random.Generator, size: int) -> None:
        from scipy import ndimage

        self.size, self.edge = size, int(rng.integers(10, 22))
        noise = ndimage.gaussian_filter(rng.standard_normal((self.edge, self.edge)), 1.6)
        self.alpha = (noise > 0).astype("float32")
        self.colour = rng.uniform(0.15, 0.75, (3, 1, 1)).astype("float32")
        self.start, self.speed = rng.uniform(0, 2, 2), rng.uniform(-0.2, 0.2, 2)

    def draw(self, frame: np.ndarray, t: float) -> None:
        span = self.size - self.edge
        y, x = (int(abs((s + v * t) % 2 - 1) * span) for s, v in zip(self.start, self.speed, strict=True))
        part = frame[:, y : y + self.edge, x : x + self.edge]
        part += self.alpha * (self.colour - part)


def _draw_digit(
    frame: np.ndarray,
    digit: np.ndarray,
    centre: np.ndarray,
    angle: float,
    zoom: float,
    colour: np.ndarray,
    sample: Callable[..., np.ndarray],
) -> None:
    """Blend ``digit`` [8, 8] into ``frame`` [3, size, size], 3 pixels to a digit's pixel at ``zoom`` 1."""
    import numpy as np

    size, half = frame.shape[1], CANVAS
    y0, y1 = max(0, int(centre[0]) - half), min(size, int(centre[0]) + half)
    x0, x1 = max(0, int(centre[1]) - half), min(size, int(centre[1]) + half)
    ys, xs = np.mgrid[y0:y1, x0:x1].astype(np.float32)
    ys, xs = (ys - centre[0]) / (3 * zoom), (xs - centre[1]) / (3 * zoom)
    c, s = math.cos(angle), math.sin(angle)
    alpha = sample(digit, (c * ys - s * xs + 3.5, s * ys + c * xs + 3.5), order=1, cval=0.0, mode="constant")
    part = frame[:, y0:y1, x0:x1]
    part += alpha * (colour[:, None, None].astype(np.float32) - part)


def encode_video(
    frames: Iterator[np.ndarray],
    path: Path,
    *,
    times: Iterator[float] | None = None,
    fps: int = 12,
    crf: int = 26,
) -> None:
    """H.264 of uint8 [H, W, 3] frames, by PyAV. ``times`` (seconds, rising) gives a variable rate."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as out:
        stream = None
        for number, frame in enumerate(frames):
            if stream is None:
                stream = out.add_stream("libx264", rate=fps, options={"crf": str(crf), "preset": "veryfast"})
                stream.width, stream.height, stream.pix_fmt = frame.shape[1], frame.shape[0], "yuv420p"
                stream.codec_context.time_base = Fraction(1, 12_800)
                stream.codec_context.thread_count = 1  # the same bytes on every machine
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            seconds = number / fps if times is None else next(times)
            picture.time_base, picture.pts = Fraction(1, 12_800), round(seconds * 12_800)
            out.mux(stream.encode(picture))
        if stream is None:
            raise ValueError(f"{path}: a video needs at least one frame")
        out.mux(stream.encode(None))


def render_clip(clip: DigitClip, path: Path) -> list[Action]:
    """Write the video, and return what happens in it."""
    actions = plan_actions(clip)
    encode_video(render_frames(clip, actions), path, fps=clip.fps)
    return actions


def render_folder(
    folder: Path,
    train: int,
    test: int,
    *,
    seed: int = 0,
    clip: DigitClip | None = None,
    progress: Callable[[str, float, float], None] = lambda what, done, total: None,
) -> Path:
    """``train`` + ``test`` videos and their ``labels.csv`` (video, start, end, label, subset): what a user
    would have. A video that is there already is not made again. Returns the path of the labels."""
    template = clip or DigitClip(0)
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["video", "start", "end", "label", "subset"])
    for number in range(train + test):
        split = "train" if number < train else "test"
        one = replace(template, seed=seed * 100_000 + number, split=split)
        name = f"{split}_{number:03d}.mp4"
        target = folder / name
        if not target.exists():
            half = folder / f".{name}.part.mp4"
            render_clip(one, half)
            half.replace(target)
        for action in plan_actions(one):
            rows.writerow([name, action.start_s, action.end_s, action.label, split])
        progress("videos", number + 1, train + test)
    write_atomically(folder / "labels.csv", text.getvalue().encode())
    return folder / "labels.csv"
