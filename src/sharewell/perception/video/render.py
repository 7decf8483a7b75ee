"""The detections as video: one copy with captions, or one clip a detection."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..tad.decode import Detection
from .decode import DecodeStats, decode_frames, open_video
from .digits import encode_video
from .errors import VideoDecodeError

CONTAINERS = frozenset({".mp4", ".mkv", ".mov", ".webm", ".avi", ".ts"})


def write_overlay(
    source: str | Path,
    detections: Sequence[Detection],
    path: Path,
    *,
    progress: Callable[[str, float, float], None] = lambda what, done, total: None,
) -> None:
    """A copy (H.264, without sound, the same times) with the running detections named at the bottom, and a
    bar of the whole. Reads one frame at a time; of a damaged video it shows what comes before the damage."""
    import numpy as np
    from PIL import Image, ImageDraw

    duration = max((d.end for d in detections), default=0.0)
    stats = DecodeStats()
    times: list[float] = []  # of the frames that were drawn and are not encoded yet

    def frames() -> Any:
        try:
            for time_s, frame in decode_frames(source, stats):
                width, height = frame.width // 2 * 2, frame.height // 2 * 2
                picture = Image.fromarray(frame.to_ndarray(width=width, height=height, format="rgb24"))
                draw = ImageDraw.Draw(picture, "RGBA")
                running = [d for d in detections if d.start <= time_s < d.end]
                size = max(10, height // 16)
                for row, d in enumerate(running):
                    y = height - (row + 1) * (size + 4) - 4
                    draw.rectangle((0, y, width, y + size + 3), fill=(0, 0, 0, 150))
                    draw.text((4, y), f"{d.label} {d.score:.2f}", fill=(255, 255, 255, 255), font_size=size)
                share = min(1.0, time_s / max(stats.duration_s, duration, 1e-9))
                draw.rectangle((0, height - 3, round(width * share), height), fill=(0, 190, 170, 255))
                progress("overlay", time_s, max(duration, time_s))
                times.append(time_s)
                yield np.asarray(picture)
        except VideoDecodeError:
            if not stats.decoded:
                raise

    def clock() -> Any:
        while True:
            yield times.pop(0)

    encode_video(frames(), path, times=clock(), fps=25, crf=23)


def write_clips(source: str | Path, detections: Sequence[Detection], folder: Path) -> list[Path]:
    """One file a detection, picture and sound copied without loss. A clip starts at the last key frame before
    its action, so up to a few seconds early. Returns the files."""
    import av

    folder.mkdir(parents=True, exist_ok=True)
    suffix = Path(source).suffix.lower()
    suffix = suffix if suffix in CONTAINERS else ".mkv"
    written: list[Path] = []
    for d in detections:
        label = re.sub(r"[^\w-]+", "_", d.label).strip("_") or "action"
        target = folder / f"{Path(source).stem}_{d.start:08.2f}-{d.end:08.2f}_{label}{suffix}"
        half = target.with_name(f".{target.name}.part{suffix}")
        with open_video(source) as (container, video):
            begin = float((video.start_time or 0) * video.time_base)
            container.seek(
                int((d.start + begin) / video.time_base), stream=video, backward=True, any_frame=False
            )
            with av.open(str(half), "w") as out:
                streams = {video.index: out.add_stream_from_template(video)}
                for audio in container.streams.audio[:1]:
                    streams[audio.index] = out.add_stream_from_template(audio)
                _copy(container, out, streams, video, begin + d.end)
        half.replace(target)
        written.append(target)
    return written


def _copy(container: Any, out: Any, streams: dict[int, Any], video: Any, end_s: float) -> None:
    """Packets up to ``end_s``, their times moved so that the clip starts at 0."""
    import av.error

    start_s: float | None = None
    try:
        for packet in container.demux([s for s in container.streams if s.index in streams]):
            if packet.dts is None:
                continue
            time_s = float((packet.pts if packet.pts is not None else packet.dts) * packet.time_base)
            if start_s is None:
                if packet.stream.index != video.index:
                    continue  # sound before the first key frame
                start_s = float(packet.dts * packet.time_base)
            if packet.stream.index == video.index and float(packet.dts * packet.time_base) >= end_s:
                break
            if time_s < start_s or (time_s >= end_s and packet.stream.index != video.index):
                continue
            shift = int(start_s / packet.time_base)
            packet.dts -= shift
            packet.pts = packet.dts if packet.pts is None else packet.pts - shift
            packet.stream = streams[packet.stream.index]
            out.mux(packet)
    except av.error.FFmpegError:
        return  # the damage that detection reported: the clip ends there
