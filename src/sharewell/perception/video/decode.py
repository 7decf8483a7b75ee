"""From a video to frames on an even grid of times, one frame in memory at a time.

Times come from the presentation time stamps, never from a frame count, so a file with a variable rate lands
where a player would show it. Audio is neither needed nor read.
"""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import VideoDecodeError

if TYPE_CHECKING:
    import numpy as np

log = logging.getLogger(__name__)

VIDEO_SUFFIXES = frozenset(
    [".3gp", ".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".ts", ".webm", ".wmv"]
)
PIPE = "-"
LONGEST_GAP_S = 3600.0  # a jump of the time stamps beyond this is damage, not a pause


@dataclass(frozen=True)
class Sampling:
    """Which frames of a video are looked at.

    ``fps``: grid points a second; at each, the frame that a player would show. A slower video repeats its
    frames, so the grid stays even; the extractor sees a repeated frame as a still one. ``width`` x
    ``height``: pixels that a frame is scaled to (its shape is not kept). ``skip_damaged``: go on behind
    damage; what was lost is counted in :class:`DecodeStats`. ``threads``: of the decoder, 0 for the usable
    cores.
    """

    fps: float = 4.0
    width: int = 64
    height: int = 64
    skip_damaged: bool = False
    threads: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.fps) and 0 < self.fps <= 240):
            raise ValueError(f"fps must be in (0, 240], got {self.fps}")
        for name in ("width", "height"):
            if not (isinstance(getattr(self, name), int) and 8 <= getattr(self, name) <= 4096):
                raise ValueError(f"{name} must be in [8, 4096], got {getattr(self, name)}")
        if not 0 <= self.threads <= 64:
            raise ValueError(f"threads must be in [0, 64], got {self.threads}")


@dataclass
class DecodeStats:
    """What one pass over a video met. Filled while the frames are read."""

    decoded: int = 0  # frames that came out of the decoder
    sampled: int = 0  # frames that were handed on
    repeated: int = 0  # of these, the same picture as before
    without_time: int = 0  # time stamps that were missing and had to be guessed from the rate
    backwards: int = 0  # frames whose time stamp ran backwards: not used
    damaged: int = 0  # packets that could not be decoded, or frames that the decoder marked as damaged
    last_time_s: float = 0.0
    longest_gap_s: float = 0.0  # between two frames: some containers lose damaged frames without a word
    duration_s: float = 0.0  # up to the end of the last frame
    damage: list[str] = field(default_factory=list)  # the first few, in words


@dataclass(frozen=True)
class SampledFrame:
    """``rgb``: uint8 [height, width, 3]; ``time_s`` since the first frame; ``repeated``: same as the one
    before."""

    time_s: float
    rgb: np.ndarray
    repeated: bool


@dataclass(frozen=True)
class VideoInfo:
    """What the container says before anything is decoded; 0 where it does not say."""

    width: int
    height: int
    fps: float
    duration_s: float
    codec: str
    has_audio: bool


@contextmanager
def open_video(source: str | Path) -> Iterator[tuple[Any, Any]]:
    """(container, video stream) of a file, a URL that FFmpeg knows, or ``-`` for standard input.

    Raises FileNotFoundError, or VideoDecodeError for what is no video.
    """
    import av.error

    name = str(source)
    piped = name == PIPE
    if not piped and "://" not in name and not Path(name).exists():
        raise FileNotFoundError(f"no video {name}")
    if not piped and Path(name).is_dir():
        raise IsADirectoryError(f"{name} is a folder, not a video")
    # FFmpeg's own messages go to Python's logging, and are quiet unless somebody listens.
    try:
        container = av.open(sys.stdin.buffer if piped else name, metadata_errors="replace")
    except (av.error.FFmpegError, ValueError) as error:
        raise VideoDecodeError(
            name, f"no readable video ({error})", offset_bytes=0, time_s=0, frames=0
        ) from None
    try:
        if not container.streams.video:
            raise VideoDecodeError(name, "holds no video stream", offset_bytes=0, time_s=0, frames=0)
        yield container, container.streams.video[0]
    finally:
        container.close()


def probe(source: str | Path) -> VideoInfo:
    """What the container says of a video. Raises like :func:`open_video`."""
    with open_video(source) as (container, stream):
        return _info(container, stream)


def _info(container: Any, stream: Any) -> VideoInfo:
    rate = float(stream.average_rate or stream.guessed_rate or 0)
    return VideoInfo(
        stream.width or 0,
        stream.height or 0,
        rate,
        _duration_s(container, stream),
        stream.codec_context.name,
        bool(container.streams.audio),
    )


def _duration_s(container: Any, stream: Any) -> float:
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    return container.duration / 1e6 if container.duration and container.duration > 0 else 0.0


def decode_frames(
    source: str | Path, stats: DecodeStats, *, skip_damaged: bool = False, threads: int = 0
) -> Iterator[tuple[float, Any]]:
    """(seconds since the first frame, PyAV frame) of every good frame, in order of time.

    Raises VideoDecodeError at damage unless ``skip_damaged``; and in any case when the file breaks off before
    the duration that it states, or holds no frame at all.
    """
    import av.error

    name = str(source)
    with open_video(source) as (container, stream):
        stream.thread_type = "AUTO"
        stream.codec_context.thread_count = threads or len(os.sched_getaffinity(0))
        # Without this a decoder paints over what it cannot read, and nobody is told.
        stream.codec_context.options = {"err_detect": "explode"}
        # The duration of a container with sound may be that of the sound.
        stated_s = _duration_s(container, stream) if stream.duration or not container.streams.audio else 0.0
        rate = float(stream.average_rate or stream.guessed_rate or 25)
        first: float | None = None
        offset, good, previous = -1, 0, -math.inf

        def fail(why: str) -> VideoDecodeError:
            return VideoDecodeError(
                name, why, offset_bytes=offset, time_s=max(0.0, stats.last_time_s), frames=good
            )

        def hurt(why: str) -> None:
            stats.damaged += 1
            if len(stats.damage) < 8:
                stats.damage.append(f"{why} near {stats.last_time_s:.2f} s, byte {offset}")
            if not skip_damaged:
                raise fail(why)

        packets = container.demux(stream)
        while True:
            try:
                packet = next(packets, None)
            except av.error.FFmpegError as error:
                # The demuxer itself lost its way and stays where it is: there is nothing behind to skip to.
                stats.damaged += 1
                raise fail(f"the container is damaged ({error.strerror})") from None
            if packet is None:
                break
            if packet.pos is not None:
                offset = packet.pos
            try:
                frames = packet.decode()
            except av.error.FFmpegError as error:
                hurt(f"a packet cannot be decoded ({error.strerror})")
                continue
            for frame in frames:
                stats.decoded += 1
                if frame.is_corrupt:
                    hurt("a frame is damaged")
                    continue
                if frame.time is None:
                    stats.without_time += 1
                    time_s = previous + 1 / rate if good else 0.0
                else:
                    first = frame.time if first is None else first
                    time_s = frame.time - first
                if time_s <= previous:
                    stats.backwards += 1
                    continue
                if time_s - max(previous, 0.0) > LONGEST_GAP_S:
                    hurt(f"the time stamps jump by {time_s - previous:.0f} s")
                    continue
                step_s = time_s - previous if good else 1 / rate
                stats.longest_gap_s = max(stats.longest_gap_s, step_s)
                previous, good = time_s, good + 1
                stats.last_time_s, stats.duration_s = time_s, time_s + min(step_s, 1.0)
                yield time_s, frame
        if not good:
            raise fail("no frame could be decoded")
        # Some containers end quietly where the file was cut off; their own index says what is missing.
        if stated_s and stated_s - stats.duration_s > max(1.0, 0.02 * stated_s):
            raise fail(f"the file ends early: it states {stated_s:.1f} s")


def sample_frames(
    source: str | Path, sampling: Sampling | None = None, stats: DecodeStats | None = None
) -> Iterator[SampledFrame]:
    """Frames at times 0, 1/fps, 2/fps, ...: at each the last frame whose time has come.

    Holds one decoded and one scaled frame. Raises VideoDecodeError after the frames that came before the
    damage. A video of one frame gives one.
    """
    sampling = sampling or Sampling()
    stats = DecodeStats() if stats is None else stats
    shown: Any = None  # the scaled picture of `held`, made only when a grid point needs it
    held: Any = None
    index = 0

    def until(limit: float) -> Iterator[SampledFrame]:
        """Grid points before ``limit``, all of which show ``held``."""
        nonlocal shown, index
        while index / sampling.fps < limit - 1e-9:
            repeated = shown is not None
            if shown is None:
                shown = held.to_ndarray(
                    width=sampling.width, height=sampling.height, format="rgb24", interpolation="AREA"
                )
            stats.sampled += 1
            stats.repeated += repeated
            yield SampledFrame(index / sampling.fps, shown, repeated)
            index += 1

    try:
        for time_s, frame in decode_frames(
            source, stats, skip_damaged=sampling.skip_damaged, threads=sampling.threads
        ):
            if held is not None:
                yield from until(time_s)
            held, shown = frame, None
    except VideoDecodeError:
        if held is not None:
            yield from until(stats.duration_s)
        raise
    yield from until(stats.duration_s)
