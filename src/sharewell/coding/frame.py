"""The container of the room's formats: independent, checksummed blocks between a start and an end mark.

    file   = magic (4 bytes), version (1), block*, end
    block  = 'B', mode (1), size of the data (4), size of the payload (4), CRC-32 of the payload (4),
             BLAKE2b-64 of the data (8), CRC-32 of this header (4), payload
    end    = 'E', number of blocks (4), size of all data (8), CRC-32 of the end (4)

Numbers are little-endian. A CRC-32 sees every change of a single byte, and the end mark every cut, so that
nothing damaged is ever handed out: the payload is checked before it is decoded, the data after it."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b

VERSION = 1
MAX_BLOCK = 1 << 28  # bytes of data in one block
_START = struct.Struct("<4sB")
_BLOCK = struct.Struct("<cBIII8s")
_END = struct.Struct("<cIQ")
_CRC = struct.Struct("<I")
BLOCK_HEADER = _BLOCK.size + _CRC.size
END_SIZE = _END.size + _CRC.size


class CodecError(ValueError):
    """A stream cannot be decoded, or not within the limits given."""


class BadMagic(CodecError):
    """The stream is of another format."""


class UnsupportedVersion(CodecError):
    """The stream was written by a version that this one does not know."""


class Truncated(CodecError, EOFError):
    """The stream ends before its end mark."""


class ChecksumMismatch(CodecError):
    """A byte was changed; the data of the block is withheld."""


class OutputLimit(CodecError):
    """The data would be larger than ``max_output``."""


@dataclass(frozen=True)
class BlockHeader:
    """What stands before a payload."""

    mode: int
    size: int  # bytes of data
    payload_size: int
    payload_crc: int
    digest: bytes


def digest(data: bytes) -> bytes:
    """BLAKE2b-64 of a block's data."""
    return blake2b(data, digest_size=8).digest()


def start_mark(magic: bytes) -> bytes:
    """What a stream begins with."""
    return _START.pack(magic, VERSION)


def pack_block(mode: int, data: bytes, payload: bytes) -> bytes:
    """Header and payload of one block."""
    head = _BLOCK.pack(b"B", mode, len(data), len(payload), zlib.crc32(payload), digest(data))
    return head + _CRC.pack(zlib.crc32(head)) + payload


def end_mark(n_blocks: int, size: int) -> bytes:
    """What a stream ends with."""
    head = _END.pack(b"E", n_blocks, size)
    return head + _CRC.pack(zlib.crc32(head))


class FrameReader:
    """Takes a stream apart as its bytes come in.

    ``decode(mode, payload, size) -> bytes`` turns a payload into data of exactly ``size`` bytes and raises
    ValueError for anything else. ``max_output``: most bytes of data in all, or None.
    """

    def __init__(
        self, magic: bytes, decode: Callable[[int, bytes, int], bytes], max_output: int | None = None
    ) -> None:
        if max_output is not None and max_output < 0:
            raise ValueError(f"max_output must be at least 0, got {max_output}")
        self._magic, self._decode, self._max_output = magic, decode, max_output
        self._pending = bytearray()
        self._started = False
        self._header: BlockHeader | None = None
        self._n_blocks = self._size = 0
        self.eof = False

    @property
    def unused_data(self) -> bytes:
        """What was fed behind the end mark."""
        return bytes(self._pending) if self.eof else b""

    @property
    def pending(self) -> int:
        """Bytes fed and not yet taken in."""
        return len(self._pending)

    def feed(self, data: bytes) -> None:
        """Add bytes of the stream."""
        self._pending += data

    def next_block(self) -> bytes | None:
        """The data of the next block that is complete, checked; None when there is none (yet, or any
        more)."""
        if self.eof:
            return None
        if not self._started:
            if not self._magic.startswith(bytes(self._pending[:4])):
                raise BadMagic(f"not a stream that starts with {self._magic!r}")
            head = self._take(_START.size)
            if head is None:
                return None
            version = _START.unpack(head)[1]
            if version != VERSION:
                raise UnsupportedVersion(f"version must be {VERSION}, got {version}")
            self._started = True
        if self._header is None and not self._read_header():
            return None
        header = self._header
        payload = None if header is None else self._take(header.payload_size)
        if header is None or payload is None:
            return None
        self._header = None
        if zlib.crc32(payload) != header.payload_crc:
            raise ChecksumMismatch(f"block {self._n_blocks}: payload is damaged")
        try:
            data = self._decode(header.mode, payload, header.size)
        except CodecError:
            raise
        except ValueError as error:
            raise ChecksumMismatch(f"block {self._n_blocks}: {error}") from None
        if len(data) != header.size or digest(data) != header.digest:
            raise ChecksumMismatch(f"block {self._n_blocks}: data is damaged")
        self._n_blocks += 1
        self._size += len(data)
        return data

    def _take(self, n: int) -> bytes | None:
        if len(self._pending) < n:
            return None
        out = bytes(self._pending[:n])
        del self._pending[:n]
        return out

    def _read_header(self) -> bool:
        """Take in a block's header, or the end mark; whether there is a block to come."""
        kind = bytes(self._pending[:1])
        if kind not in (b"", b"B", b"E"):
            raise ChecksumMismatch(f"block {self._n_blocks}: header is damaged")
        head = self._take(END_SIZE if kind == b"E" else BLOCK_HEADER) if kind else None
        if head is None:
            return False
        if zlib.crc32(head[:-4]) != _CRC.unpack(head[-4:])[0]:
            raise ChecksumMismatch(f"block {self._n_blocks}: header is damaged")
        if kind == b"E":
            _, n_blocks, size = _END.unpack(head[:-4])
            if (n_blocks, size) != (self._n_blocks, self._size):
                raise ChecksumMismatch(f"end mark names {n_blocks} blocks, {self._n_blocks} were there")
            self.eof = True
            return False
        _, *fields = _BLOCK.unpack(head[:-4])
        header = BlockHeader(*fields)
        if header.size > MAX_BLOCK or header.payload_size > MAX_BLOCK + 1024:
            raise ChecksumMismatch(f"block {self._n_blocks}: header is out of range")
        if self._max_output is not None and self._size + header.size > self._max_output:
            raise OutputLimit(f"data is larger than max_output={self._max_output} bytes")
        self._header = header
        return True
