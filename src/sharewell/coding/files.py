"""Compressed files that read and write like any other."""

from __future__ import annotations

import builtins
import io
import os
from typing import IO, Any

from .frame import CodecError, Truncated
from .quasicryth import Buffer, QuasicrythCompressor, QuasicrythDecompressor

_READ_SIZE = 1 << 16


class QuasicrythFile(io.BufferedIOBase):
    """A binary file that is compressed or decompressed on its way; see :func:`open`."""

    def __init__(self, file: str | os.PathLike[str] | IO[bytes], mode: str = "rb", **settings: Any) -> None:
        if mode not in ("r", "rb", "w", "wb", "x", "xb", "a", "ab"):
            raise ValueError(f"mode must be r, w, x or a, with or without b, got {mode!r}")
        self._own = isinstance(file, str | os.PathLike)
        self._writing = mode[0] != "r"
        self._coder: Any = (
            QuasicrythCompressor(**settings) if self._writing else QuasicrythDecompressor(**settings)
        )
        self._settings = settings
        # a file that is appended to holds one stream after the other
        self._file: Any = builtins.open(file, mode[0] + "b") if isinstance(file, str | os.PathLike) else file  # noqa: SIM115
        self._rest = b""
        self._at = 0
        self._failed: CodecError | None = None

    def readable(self) -> bool:
        return not self._writing

    def writable(self) -> bool:
        return self._writing

    def tell(self) -> int:
        """Bytes of data read or written so far."""
        return self._at

    def write(self, data: Buffer, /) -> int:
        """Compress ``data`` into the file; whole blocks reach it at once."""
        if not self._writing or self.closed:
            raise io.UnsupportedOperation("not open for writing")
        self._file.write(self._coder.compress(data))
        n = memoryview(data).nbytes
        self._at += n
        return n

    def read(self, size: int | None = -1, /) -> bytes:
        """Up to ``size`` bytes of data, all for -1. Raises a :class:`QuasicrythError` for a damaged file:
        reading all at once, at once; reading by pieces, behind the last complete block before the damage."""
        if self._writing or self.closed:
            raise io.UnsupportedOperation("not open for reading")
        wanted = -1 if size is None else size
        out = bytearray()
        while wanted < 0 or len(out) < wanted:
            try:
                part = self._read_part(-1 if wanted < 0 else wanted - len(out))
            except CodecError:
                if wanted < 0 or not out:
                    raise
                break  # hand out what is good; the next call raises
            if not part:
                break
            out += part
        self._at += len(out)
        return bytes(out)

    def read1(self, size: int = -1, /) -> bytes:
        """What comes next, at most ``size`` bytes of it."""
        if self._writing or self.closed:
            raise io.UnsupportedOperation("not open for reading")
        part = self._read_part(size)
        self._at += len(part)
        return part

    def readinto(self, buffer: Any, /) -> int:
        """Fill ``buffer`` as far as there is data; returns the number of bytes."""
        view = memoryview(buffer).cast("B")
        data = self.read(len(view))
        view[: len(data)] = data
        return len(data)

    def _read_part(self, size: int) -> bytes:
        if self._failed is not None:
            raise self._failed
        try:
            return self._next_part(size)
        except CodecError as error:
            self._failed = error
            raise

    def _next_part(self, size: int) -> bytes:
        while True:
            if self._coder.eof:
                rest = self._coder.unused_data or self._file.read(_READ_SIZE)
                if not rest:
                    return b""
                self._coder, self._rest = QuasicrythDecompressor(**self._settings), rest
            chunk, self._rest = self._rest, b""
            if not chunk and self._coder.needs_input:
                chunk = self._file.read(_READ_SIZE)
                if not chunk:
                    raise Truncated("file ends before its end mark")
            data = self._coder.decompress(chunk, size)
            if data:
                return data

    def close(self) -> None:
        """Write what is left and close the file (a file object that was given stays open)."""
        if self.closed:
            return
        try:
            if self._writing:
                self._file.write(self._coder.flush())
        finally:
            if self._own:
                self._file.close()
            super().close()
