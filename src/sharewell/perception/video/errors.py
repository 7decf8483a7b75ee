"""What can go wrong with a file, in terms that a user can act on."""

from __future__ import annotations


class VideoDecodeError(ValueError):
    """A file that cannot be decoded (further). What was decoded before stays valid.

    ``offset_bytes`` is where in the file the damage was met (-1: unknown, as in a pipe), ``time_s`` the time
    of the last good frame, ``frames`` how many good frames came before.
    """

    def __init__(self, video: str, why: str, *, offset_bytes: int, time_s: float, frames: int) -> None:
        self.video, self.why = video, why
        self.offset_bytes, self.time_s, self.frames = offset_bytes, time_s, frames
        where = f"byte {offset_bytes}" if offset_bytes >= 0 else "an unknown offset"
        super().__init__(f"{video}: {why} at {where}, after {frames} good frames ({time_s:.2f} s)")
