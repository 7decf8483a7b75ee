"""Small videos, really encoded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

Maker = Callable[..., Path]


@pytest.fixture
def make_video(tmp_path: Path) -> Maker:
    """make_video(name, frames, times=..., fps=..., codec=..., sound=...) -> path of the file."""
    import av

    def make(
        name: str,
        frames: Sequence[np.ndarray],
        *,
        times: Sequence[float] | None = None,
        fps: int = 10,
        codec: str = "libx264",
        sound: bool = False,
        key_every: int = 10,
    ) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(path), "w") as out:
            video: Any = out.add_stream(codec, rate=fps)
            video.height, video.width = frames[0].shape[:2]
            video.pix_fmt = "yuv420p"
            video.codec_context.gop_size = key_every
            video.codec_context.max_b_frames = 0
            if codec == "libx264":
                video.options = {"crf": "10", "preset": "veryfast"}
                video.codec_context.time_base = Fraction(1, 1000)
            base = video.codec_context.time_base or Fraction(1, fps)
            audio = out.add_stream("aac", rate=16_000, layout="mono") if sound else None
            for number, frame in enumerate(frames):
                picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
                seconds = number / fps if times is None else times[number]
                picture.time_base, picture.pts = base, round(seconds / base)
                out.mux(video.encode(picture))
            out.mux(video.encode(None))
            if audio is not None:
                for number in range(int(16 * len(frames) / fps)):
                    tone = np.sin(np.arange(1000) * 0.1).astype(np.float32)[None]
                    part = av.AudioFrame.from_ndarray(tone, format="fltp", layout="mono")
                    part.sample_rate, part.pts, part.time_base = 16_000, number * 1000, Fraction(1, 16_000)
                    out.mux(audio.encode(part))
                out.mux(audio.encode(None))
        return path

    return make
