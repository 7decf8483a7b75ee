"""Quasicryth: lossless compression of text by phrases of 2 to 144 words, used in the manner of ``lzma``.

Source: Tacconelli 2026 (2603.14999), after its official code; what differs is told in
docs/coding/quasicryth.md.

    >>> from sharewell.coding import quasicryth
    >>> quasicryth.decompress(quasicryth.compress(b"to be or not to be")) == b"to be or not to be"
    True
"""

from __future__ import annotations

import io
import lzma
import os
from dataclasses import dataclass
from typing import IO, Any, TypeAlias

from .frame import (
    MAX_BLOCK,
    BadMagic,
    ChecksumMismatch,
    CodecError,
    FrameReader,
    OutputLimit,
    Truncated,
    UnsupportedVersion,
    end_mark,
    pack_block,
    start_mark,
)

QuasicrythError = CodecError
Buffer: TypeAlias = bytes | bytearray | memoryview
MAGIC = b"SWqc"
STORED, LZMA, PHRASES = 0, 1, 2
MODES = {STORED: "stored", LZMA: "lzma", PHRASES: "phrases"}
_MIN_TEXT = 64  # bytes below which a block is not looked at as text


@dataclass(frozen=True)
class Settings:
    """How to compress. Raises ValueError naming the field and its range.

    level: 1 (one layout, never lzma) to 9 (every block also tried with lzma and with every layout of
    ``auto``); at levels between, lzma is tried on blocks that are no text. tiling: where phrases may be
    looked for, ``auto`` or one of ``tiling.TILINGS``. n_tilings: how many tilings of that kind, None for its
    usual number.
    """

    tiling: str = "auto"
    n_tilings: int | None = None
    block_size: int = 1 << 25
    level: int = 6

    def __post_init__(self) -> None:
        if not 1 <= self.level <= 9:
            raise ValueError(f"level must be in [1, 9], got {self.level}")
        if not 1 <= self.block_size <= MAX_BLOCK:
            raise ValueError(f"block_size must be in [1, {MAX_BLOCK}], got {self.block_size}")
        if self.tiling != "auto":
            self.arms()
        elif self.n_tilings is not None:
            raise ValueError(f"n_tilings needs a tiling other than auto, got {self.n_tilings}")

    def arms(self) -> list[str]:
        """The layouts to try, as ``tiling.Arm.parse`` reads them."""
        from .tiling import Arm

        if self.tiling != "auto":
            return [str(Arm.parse(self.tiling + (f":{self.n_tilings}" if self.n_tilings else "")))]
        if self.level <= 3:
            return ["all"]
        return ["none"] if self.level <= 8 else ["none", "all", "fibonacci:12"]


@dataclass(frozen=True)
class BlockStats:
    """One block: its mode, and of a block of phrases the layout, the bytes of each part and the phrases
    used."""

    mode: str
    data_bytes: int
    payload_bytes: int
    tiling: str = ""
    bytes_of: dict[str, int] | None = None  # header, words, phrases, text
    phrases_used: dict[int, int] | None = None  # words in the phrase -> times used


def _lzma_filters(size: int) -> list[dict[str, Any]]:
    """Dictionary of at most half a block or 16 MiB, so that lzma keeps within the memory that is promised."""
    dictionary = max(1 << 16, min(1 << 24, 1 << max(0, (size - 1).bit_length() - 1)))
    return [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": dictionary}]


def encode_block(data: bytes, settings: Settings) -> tuple[int, bytes, BlockStats]:
    """(mode, payload, what was done) of one block, in the smallest of the modes that the level tries."""
    best: tuple[int, bytes, BlockStats] = (STORED, data, BlockStats("stored", len(data), len(data)))
    textual = False
    if len(data) >= _MIN_TEXT:
        for found in _as_text(data, settings):
            textual = True
            if len(found[1]) < len(best[1]):
                best = found
    weak = not textual or 2 * len(best[1]) > len(data)
    if len(data) >= _MIN_TEXT and (settings.level == 9 or (settings.level > 1 and weak)):
        packed = lzma.compress(data, lzma.FORMAT_RAW, filters=_lzma_filters(len(data)))
        if len(packed) < len(best[1]):
            best = (LZMA, packed, BlockStats("lzma", len(data), len(packed)))
    return best


def _as_text(data: bytes, settings: Settings) -> list[tuple[int, bytes, BlockStats]]:
    import numpy as np

    from . import text_block, tokens
    from .tiling import PHRASE_LENGTHS, Arm

    raw = np.frombuffer(data, np.uint8)
    n_tokens, n_words = tokens.count_tokens(raw, tokens.CLASSES)
    # digits and symbols one by one are no words: a byte-wise coder does better, with less memory
    if n_tokens * 10 > len(data) * 6 or n_words * 8 < n_tokens:
        return []
    parsed = tokens.tokenize(raw)
    if parsed is None:
        return []
    out = []
    for name in settings.arms():
        layout = text_block.lay_out(parsed, Arm.parse(name))
        coded = text_block.encode(layout, len(data))
        if coded is None:
            continue
        used = np.bincount(
            layout.book.levels[layout.events[layout.events >= 0]], minlength=len(PHRASE_LENGTHS)
        )
        stats = BlockStats(
            "phrases",
            len(data),
            len(coded[0]),
            name,
            {part: getattr(coded[1], part) for part in ("header", "words", "phrases", "text")},
            {length: int(n) for length, n in zip(PHRASE_LENGTHS, used, strict=True)},
        )
        out.append((PHRASES, coded[0], stats))
    return out


def decode_block(mode: int, payload: bytes, size: int) -> bytes:
    """The data of one block; at most ``size`` bytes are ever made. Raises ValueError for a forged payload."""
    if mode == STORED:
        if len(payload) != size:
            raise ValueError("a stored block must be as long as its data")
        return payload
    if mode == LZMA:
        try:
            decoder = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=_lzma_filters(size))
            return decoder.decompress(payload, max_length=size) if size else b""
        except lzma.LZMAError:
            raise ValueError("lzma payload is forged") from None
    if mode == PHRASES:
        from .text_block import decode

        return decode(payload, size)
    raise ValueError(f"mode must be one of {sorted(MODES)}, got {mode}")


def compress(
    data: Buffer,
    *,
    tiling: str = "auto",
    n_tilings: int | None = None,
    block_size: int = 1 << 25,
    level: int = 6,
) -> bytes:
    """``data`` as one stream; see :class:`Settings`."""
    compressor = QuasicrythCompressor(tiling=tiling, n_tilings=n_tilings, block_size=block_size, level=level)
    return compressor.compress(data) + compressor.flush()


def decompress(data: Buffer, *, max_output: int | None = None) -> bytes:
    """The data of one stream or of several, one after the other.

    Raises a :class:`QuasicrythError`: BadMagic, UnsupportedVersion, Truncated, ChecksumMismatch, or
    OutputLimit as soon as the data would be larger than ``max_output`` bytes."""
    rest, out = bytes(data), bytearray()
    while True:
        left = None if max_output is None else max_output - len(out)
        decompressor = QuasicrythDecompressor(max_output=left)
        out += decompressor.decompress(rest)
        if not decompressor.eof:
            raise Truncated("stream ends before its end mark")
        rest = decompressor.unused_data
        if not rest:
            return bytes(out)


class QuasicrythCompressor:
    """Compresses piece by piece; the pieces' sizes make no difference to the stream. One use."""

    def __init__(
        self,
        *,
        tiling: str = "auto",
        n_tilings: int | None = None,
        block_size: int = 1 << 25,
        level: int = 6,
    ) -> None:
        self.settings = Settings(tiling, n_tilings, block_size, level)
        self.stats: list[BlockStats] = []
        self._pending = bytearray()
        self._size = 0
        self._started = self._finished = False

    def compress(self, data: Buffer) -> bytes:
        """Take in ``data``; returns what of the stream is ready."""
        if self._finished:
            raise ValueError("compressor has been flushed")
        out = [] if self._started else [start_mark(MAGIC)]
        self._started = True
        view = memoryview(data).cast("B")
        size = self.settings.block_size
        while len(view):
            taken = size - len(self._pending)
            self._pending += view[:taken]
            view = view[taken:]
            if len(self._pending) == size:
                out.append(self._block())
        return b"".join(out)

    def flush(self) -> bytes:
        """End the stream; returns the rest of it."""
        out = self.compress(b"")
        if self._pending:
            out += self._block()
        self._finished = True
        return out + end_mark(len(self.stats), self._size)

    def _block(self) -> bytes:
        data = bytes(self._pending)
        self._pending.clear()
        mode, payload, stats = encode_block(data, self.settings)
        self.stats.append(stats)
        self._size += len(data)
        return pack_block(mode, data, payload)


class QuasicrythDecompressor:
    """Decompresses one stream piece by piece; data is handed out a whole checked block at a time.

    ``eof``: the end mark was read. ``unused_data``: what came behind it. ``needs_input``: nothing more can be
    handed out before more is fed.
    """

    def __init__(self, *, max_output: int | None = None) -> None:
        self._reader = FrameReader(MAGIC, decode_block, max_output)
        self._ready = bytearray()
        self.needs_input = True

    @property
    def eof(self) -> bool:
        """Whether the end of the stream was reached and all its data handed out."""
        return self._reader.eof and not self._ready

    @property
    def unused_data(self) -> bytes:
        """What was fed behind the end of the stream."""
        return self._reader.unused_data if self.eof else b""

    def decompress(self, data: Buffer, max_length: int = -1) -> bytes:
        """Feed ``data``; at most ``max_length`` bytes of data (-1: all there is). Raises EOFError after the
        end, and a :class:`QuasicrythError` for a damaged stream."""
        if self.eof:
            raise EOFError("end of stream already reached")
        self._reader.feed(bytes(data))
        starved = False
        while max_length < 0 or len(self._ready) < max_length:
            block = self._reader.next_block()
            if block is None:
                starved = True
                break
            self._ready += block
        n = len(self._ready) if max_length < 0 else min(max_length, len(self._ready))
        out = bytes(self._ready[:n])
        del self._ready[:n]
        self.needs_input = starved and not self._ready and not self._reader.eof
        return out


def open(  # noqa: A001  as in gzip, bz2 and lzma
    file: str | os.PathLike[str] | IO[bytes],
    mode: str = "rb",
    *,
    encoding: str | None = None,
    errors: str | None = None,
    newline: str | None = None,
    **settings: Any,
) -> Any:
    """Open a compressed file: ``rb``, ``wb``, ``xb``, ``ab``, or the same with ``t`` for text.
    ``settings``: those of the compressor (tiling, n_tilings, block_size, level) or of the decompressor
    (max_output)."""
    from .files import QuasicrythFile

    if "t" in mode:
        binary: Any = QuasicrythFile(file, mode.replace("t", "") + "b", **settings)
        return io.TextIOWrapper(binary, encoding or "utf-8", errors, newline)
    if (encoding, errors, newline) != (None, None, None):
        raise ValueError("encoding, errors and newline are for text mode")
    return QuasicrythFile(file, mode, **settings)


def analyze(data: Buffer, **settings: Any) -> list[BlockStats]:
    """Compress and say of every block how: mode, layout, bytes of each part, phrases used by their length."""
    compressor = QuasicrythCompressor(**settings)
    compressor.compress(data)
    compressor.flush()
    return compressor.stats


__all__ = [
    "BadMagic",
    "BlockStats",
    "ChecksumMismatch",
    "OutputLimit",
    "QuasicrythCompressor",
    "QuasicrythDecompressor",
    "QuasicrythError",
    "Settings",
    "Truncated",
    "UnsupportedVersion",
    "analyze",
    "compress",
    "decompress",
    "open",
]
