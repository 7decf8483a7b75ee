"""Which tiles of a long product are done: a bitmap in a file beside the output.

``SWTGEMM1`` | 32 bytes: digest of the product | tiles (8 bytes, little endian) | bitmap | a CRC-32 of every
tile's bytes in the output (4 bytes, little endian; 0 while not done) | 32 bytes: BLAKE2b of all before.
Written in one atomic replace; a flipped or cut byte is detected, and a done tile whose bytes have changed is
computed again.
"""

from __future__ import annotations

import hashlib
import os
import struct
from array import array
from pathlib import Path

MAGIC = b"SWTGEMM1"
_HEAD = len(MAGIC) + 32 + 8


class ResumeError(ValueError):
    """The resume file is damaged, or belongs to another product."""


class TileBitmap:
    """Done flags of ``tiles`` tiles of the product with 32-byte ``digest``, kept at ``path``."""

    def __init__(self, path: str | Path, digest: bytes, tiles: int) -> None:
        if len(digest) != 32 or tiles < 0:
            raise ValueError(
                f"digest must have 32 bytes and tiles be at least 0, got {len(digest)} and {tiles}"
            )
        self.path, self._digest, self.tiles = Path(path), digest, tiles
        self._bits = bytearray((tiles + 7) // 8)
        self._checks = array("I", bytes(4 * tiles))

    @classmethod
    def open(cls, path: str | Path, digest: bytes, tiles: int) -> TileBitmap:
        """The bitmap at ``path``, or an empty one where there is no file.

        Raises ResumeError for a damaged file and for one of another product.
        """
        bitmap = cls(path, digest, tiles)
        if not bitmap.path.exists():
            return bitmap
        stored, bits, checks = _parse(bitmap.path.read_bytes(), bitmap.path.name)
        if (stored, len(checks)) == (digest, tiles):
            bitmap._bits, bitmap._checks = bytearray(bits), checks
            return bitmap
        raise ResumeError(
            f"{bitmap.path.name} belongs to another product (other operands, sizes or settings): "
            "delete it to start over, or repeat the call that it is of"
        )

    def done(self, tile: int) -> bool:
        return bool(self._bits[tile >> 3] >> (tile & 7) & 1)

    def mark(self, tile: int, check: int) -> None:
        """``tile`` is done, and the CRC-32 of its bytes in the output is ``check``."""
        self._bits[tile >> 3] |= 1 << (tile & 7)
        self._checks[tile] = check

    def check(self, tile: int) -> int:
        return self._checks[tile]

    @property
    def number_done(self) -> int:
        return sum(byte.bit_count() for byte in self._bits)

    def to_bytes(self) -> bytes:
        body = MAGIC + self._digest + struct.pack("<Q", self.tiles) + bytes(self._bits)
        body += struct.pack(f"<{self.tiles}I", *self._checks)
        return body + hashlib.blake2b(body, digest_size=32).digest()

    def save(self) -> None:
        """Write, fsync, rename."""
        beside = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        with beside.open("wb") as file:
            file.write(self.to_bytes())
            file.flush()
            os.fsync(file.fileno())
        beside.replace(self.path)

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


def _parse(content: bytes, name: str) -> tuple[bytes, bytes, array[int]]:
    """(digest, bitmap, checks). Raises ResumeError for anything that :meth:`TileBitmap.to_bytes` did not
    write."""
    body, check = content[:-32], content[-32:]
    damaged = ResumeError(f"{name} is damaged: delete it to start over")
    if len(content) < _HEAD + 32 or not body.startswith(MAGIC):
        raise damaged
    if hashlib.blake2b(body, digest_size=32).digest() != check:
        raise damaged
    tiles = struct.unpack_from("<Q", body, _HEAD - 8)[0]
    flags = (tiles + 7) // 8
    bits = body[_HEAD : _HEAD + flags]
    if len(body) != _HEAD + flags + 4 * tiles or (tiles % 8 and bits[-1] >> tiles % 8):
        raise damaged
    return (
        body[len(MAGIC) : len(MAGIC) + 32],
        bits,
        array("I", struct.unpack_from(f"<{tiles}I", body, _HEAD + flags)),
    )
