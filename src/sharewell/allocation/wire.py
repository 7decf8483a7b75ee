"""The gossip wire format: one framed, checksummed message of signed runs of rows.

A run is consecutive rows of one author: a link to the row before it, the rows, and the author's signature
over the last link. Strings are written once a message, rows refer to them. Everything from a peer is hostile:
sizes are bounded before memory is taken, and a message that is not exactly what it should be is not read at
all.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

MAGIC, VERSION = b"SWG", 1
_HEAD = struct.Struct(">3sBBI16s")
_COMPRESSED = 1
KEY, LINK, SIGNATURE = 32, 32, 64
MAX_MESSAGE_BYTES = 16 << 20
MAX_ROW_TOKENS = 256
MAX_SEQ = 1 << 40
ROOT = bytes(LINK)  # the link before an author's first row

Row = tuple[bytes, ...]  # the fields of a row; what they mean is the application's business


class GossipFormatError(ValueError):
    """A message that is damaged, of another version, or not what a peer may send; nothing of it was
    merged.
    """


@dataclass(frozen=True)
class Run:
    """Rows ``first``, ``first + 1``, ... of ``author`` (an Ed25519 public key), after the row of ``link``."""

    author: bytes
    first: int
    link: bytes
    rows: tuple[Row, ...]
    signature: bytes

    @property
    def last(self) -> int:
        return self.first + len(self.rows) - 1

    def links(self) -> list[bytes]:
        """Link of each row: what the next one, or the signature, commits to."""
        out, link = [], self.link
        for seq, row in enumerate(self.rows, start=self.first):
            link = link_of(link, self.author, seq, row)
            out.append(link)
        return out


def pack_row(row: Row) -> bytes:
    """A row by itself: what is stored, and what a link commits to."""
    out = bytearray(varint(len(row)))
    for token in row:
        out += varint(len(token))
        out += token
    return bytes(out)


def unpack_row(raw: bytes) -> Row:
    """Inverse of :func:`pack_row`. Raises GossipFormatError."""
    reader = Reader(raw)
    row = tuple(reader.take(reader.number(len(raw))) for _ in range(reader.number(MAX_ROW_TOKENS)))
    reader.end()
    return row


def link_of(link: bytes, author: bytes, seq: int, row: Row) -> bytes:
    """BLAKE2b of the link before, author, number and content: one link fixes the whole history."""
    return link_of_packed(link, author, seq, pack_row(row))


def link_of_packed(link: bytes, author: bytes, seq: int, packed: bytes) -> bytes:
    return hashlib.blake2b(link + author + seq.to_bytes(8, "big") + packed, digest_size=LINK).digest()


def signed_part(author: bytes, seq: int, link: bytes) -> bytes:
    """What an author signs."""
    return b"sharewell-gossip-1" + author + seq.to_bytes(8, "big") + link


def varint(value: int) -> bytes:
    """LEB128 of a number from 0."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


class Reader:
    """Bytes taken from the front; raises GossipFormatError instead of reading past the end."""

    def __init__(self, raw: bytes) -> None:
        self._raw, self._at = raw, 0

    def take(self, size: int) -> bytes:
        end = self._at + size
        if end > len(self._raw):
            raise GossipFormatError("message is cut short")
        part = self._raw[self._at : end]
        self._at = end
        return part

    def number(self, limit: int) -> int:
        """A varint of at most ``limit``, in its shortest form."""
        value = shift = 0
        while True:
            if self._at >= len(self._raw) or shift > 63:
                raise GossipFormatError("message is cut short or a number is too long")
            byte = self._raw[self._at]
            self._at += 1
            value |= (byte & 127) << shift
            if byte < 128:
                break
            shift += 7
        if value > limit or (byte == 0 and shift):
            raise GossipFormatError(f"number must be at most {limit} in shortest form, got {value}")
        return value

    def end(self) -> None:
        if self._at != len(self._raw):
            raise GossipFormatError("message has bytes after its end")


def encode(runs: Iterable[Run], compress: bool = True) -> bytes:
    """One message."""
    symbols: dict[bytes, int] = {}
    body = bytearray()
    count = 0
    for run in runs:
        count += 1
        body += run.author + varint(run.first) + run.link + varint(len(run.rows))
        for row in run.rows:
            body += varint(len(row))
            for token in row:
                body += varint(symbols.setdefault(token, len(symbols)))
        body += run.signature
    table = bytearray(varint(len(symbols)))
    for token in symbols:
        table += varint(len(token)) + token
    whole = bytes(table) + varint(count) + bytes(body)
    flags = 0
    if compress:
        whole, flags = zlib.compress(varint(len(whole)) + whole, 6), _COMPRESSED
    return frame(whole, flags)


def frame(body: bytes, flags: int = 0) -> bytes:
    return _HEAD.pack(MAGIC, VERSION, flags, len(body), _checksum(flags, body)) + body


def _checksum(flags: int, body: bytes) -> bytes:
    return hashlib.blake2b(
        bytes([VERSION, flags]) + len(body).to_bytes(4, "big") + body, digest_size=16
    ).digest()


def unframe(message: bytes, flags_allowed: int = _COMPRESSED) -> tuple[int, bytes]:
    """(flags, body). Raises GossipFormatError for a wrong size, magic, version, flag or checksum."""
    if not _HEAD.size <= len(message) <= MAX_MESSAGE_BYTES:
        raise GossipFormatError(
            f"message must have {_HEAD.size} to {MAX_MESSAGE_BYTES} bytes, got {len(message)}"
        )
    magic, version, flags, size, checksum = _HEAD.unpack_from(message)
    if magic != MAGIC or version != VERSION:
        raise GossipFormatError(f"message must start with {MAGIC!r} version {VERSION}")
    body = message[_HEAD.size :]
    if flags & ~flags_allowed or size != len(body) or checksum != _checksum(flags, body):
        raise GossipFormatError("message is damaged: length, flags or checksum do not fit")
    return flags, body


def decode(message: bytes) -> list[Run]:
    """The runs of a message. Raises GossipFormatError; signatures are not checked here."""
    flags, body = unframe(message)
    if flags & _COMPRESSED:
        inflate = zlib.decompressobj()
        try:
            body = inflate.decompress(body, MAX_MESSAGE_BYTES)
        except zlib.error as error:
            raise GossipFormatError(f"message does not inflate: {error}") from None
        if not inflate.eof or inflate.unused_data:
            raise GossipFormatError("message inflates past the limit, or is cut short")
        reader = Reader(body)
        size = reader.number(MAX_MESSAGE_BYTES)
        body = reader.take(size)
        reader.end()
    reader = Reader(body)
    symbols = [reader.take(reader.number(len(body))) for _ in range(reader.number(len(body)))]
    runs: list[Run] = []
    tokens_left = len(body)  # every token takes a byte at least: bounds what the rows can take
    for _ in range(reader.number(len(body))):
        author, first = reader.take(KEY), reader.number(MAX_SEQ)
        link, count = reader.take(LINK), reader.number(len(body))
        if first < 1 or count < 1:
            raise GossipFormatError("a run must start at 1 or later and hold a row")
        rows: list[Row] = []
        for _ in range(count):
            width = reader.number(MAX_ROW_TOKENS)
            tokens_left -= width + 1
            if tokens_left < 0:
                raise GossipFormatError("message is cut short")
            row = []
            for _ in range(width):
                at = reader.number(len(symbols))
                if at >= len(symbols):
                    raise GossipFormatError("a row refers to a string that is not there")
                row.append(symbols[at])
            rows.append(tuple(row))
        runs.append(Run(author, first, link, tuple(rows), reader.take(SIGNATURE)))
    reader.end()
    return runs


def encode_heads(heads: dict[bytes, int]) -> bytes:
    """A request: the highest row known of each author, -1 for one whose rows are not wanted."""
    body = bytearray(varint(len(heads)))
    for author, seq in sorted(heads.items()):
        body += author + varint(seq + 1)
    return frame(bytes(body))


def decode_heads(message: bytes) -> dict[bytes, int]:
    """Inverse of :func:`encode_heads`. Raises GossipFormatError."""
    _, body = unframe(message, flags_allowed=0)
    reader = Reader(body)
    heads: dict[bytes, int] = {}
    for _ in range(reader.number(len(body))):
        author = reader.take(KEY)
        if author in heads:
            raise GossipFormatError("an author is named twice")
        heads[author] = reader.number(MAX_SEQ) - 1
    reader.end()
    return heads


def split_points(signed: Sequence[int], after: int, budget: int) -> int:
    """The last signed row within ``budget`` rows after ``after``, else the next signed one; 0 for none."""
    ahead = [seq for seq in signed if seq > after]
    if not ahead:
        return 0
    within = [seq for seq in ahead if seq <= after + budget]
    return within[-1] if within else ahead[0]
