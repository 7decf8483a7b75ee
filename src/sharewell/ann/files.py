"""Index files: a header, arrays on cache lines, a checksum for each; written aside, synced and renamed.

Layout: 8 bytes of magic, uint32 length of the header, the header as JSON (with shape, type, place and BLAKE2b
digest of every array), its own digest of 16 bytes, then the arrays.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .base import IndexFormatError
from .graph import Graph
from .rows import Rows, grown

MAGIC = b"SWANN\x00\x00\x02"  # the last byte is the version
MAX_HEADER = 1 << 20
_KINDS = {"float32", "int8", "uint8", "int16", "int32", "int64"}


def _digest(data: Any) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def write_arrays(path: Path, header: dict[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Write the file atomically: whoever reads ``path`` meanwhile, or after a crash, finds the old one or the
    new one.
    """
    table, at = {}, 0
    for name, array in arrays.items():
        data = np.ascontiguousarray(array)
        table[name] = {
            "dtype": str(data.dtype), "shape": list(data.shape), "offset": at, "digest": _digest(data).hex()
        }  # fmt: skip
        at += -(-data.nbytes // 64) * 64
    text = json.dumps(header | {"arrays": table}, separators=(",", ":")).encode()
    head = MAGIC + struct.pack("<I", len(text)) + text + _digest(text)
    head += bytes(-len(head) % 64)
    path = path.absolute()
    descriptor, aside = tempfile.mkstemp(prefix=path.name + ".", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(head)
            for array in arrays.values():
                data = np.ascontiguousarray(array)
                file.write(data.data.cast("B") if data.size else b"")
                file.write(bytes(-data.nbytes % 64))
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read_arrays(path: Path, kind: str, *, mmap: bool = False) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Header and arrays of a file; every byte is checked, also of a mapped one. Raises IndexFormatError."""

    def refuse(what: str) -> IndexFormatError:
        return IndexFormatError(f"{path}: {what}")

    with path.open("rb") as file:
        start = file.read(12)
        if start[:7] != MAGIC[:7] or len(start) < 12:
            raise refuse("this is not an index file (wrong magic)")
        if start[7] != MAGIC[7]:
            raise refuse(f"version {start[7]} is not known, this library reads version {MAGIC[7]}")
        (size,) = struct.unpack("<I", start[8:])
        if size > MAX_HEADER:
            raise refuse("the header is damaged")
        text, digest = file.read(size), file.read(16)
        if len(text) < size or _digest(text) != digest:
            raise refuse("the header is damaged or truncated")
    header = json.loads(text)
    if header.get("kind") != kind:
        raise refuse(f"it holds a {header.get('kind')} index, not a {kind} one")
    first = -(-(12 + size + 16) // 64) * 64
    # private pages: an index may change what it has mapped, and the file never sees it
    whole = np.memmap(path, np.uint8, "c").view(np.ndarray) if mmap else np.fromfile(path, np.uint8)
    arrays = {}
    end = 0
    for name, entry in header.pop("arrays").items():
        shape, offset = tuple(entry["shape"]), first + entry["offset"]
        if entry["dtype"] not in _KINDS or any(s < 0 for s in shape):
            raise refuse(f"array {name} has type {entry['dtype']} and shape {shape}")
        dtype = np.dtype(entry["dtype"])
        nbytes = int(np.prod(shape)) * dtype.itemsize
        end = max(end, offset + -(-nbytes // 64) * 64)
        raw = whole[offset : offset + nbytes]
        if len(raw) < nbytes:
            raise refuse(f"it is truncated: array {name} needs {nbytes} bytes, {len(raw)} are there")
        if _digest(raw.data if raw.size else b"").hex() != entry["digest"]:
            raise refuse(f"array {name} is damaged (its checksum differs)")
        if whole[offset + nbytes : offset + -(-nbytes // 64) * 64].any():
            raise refuse(f"there are bytes behind array {name} that belong to nothing")
        arrays[name] = raw.view(dtype).reshape(shape)
    if len(whole) != end or whole[12 + size + 16 : first].any():
        raise refuse("there are bytes that belong to nothing")
    return header, arrays


def save_index(path: Path, rows: Rows, config: dict[str, Any], next_label: int) -> None:
    """Write an HNSW index."""
    g, n, upper = rows.graph, rows.n, rows.upper_used
    arrays = {name: array[:n] for name, array in g._asdict().items() if name not in ("locks", "meta")}
    arrays |= {"links": g.links[:upper], "count": g.count[:upper], "meta": g.meta, "labels": rows.labels[:n]}
    header = {"kind": "hnsw", "config": config, "n": n, "upper": upper, "next_label": next_label}
    write_arrays(path, header, arrays)


@dataclass(frozen=True)
class Loaded:
    """What a file held, ready to be used."""

    config: dict[str, Any]
    next_label: int
    n: int
    upper: int
    graph: Graph
    labels: np.ndarray


def load_index(path: Path, *, mmap: bool) -> Loaded:
    """Read what :func:`save_index` wrote. Raises IndexFormatError."""
    header, arrays = read_arrays(path, "hnsw", mmap=mmap)
    n, upper, config = header["n"], header["upper"], header["config"]
    links0 = arrays["links0"]
    sound = links0.shape == (n, 2 * config["M"]) and arrays["links"].shape == (upper, config["M"])
    for ids in (links0, arrays["links"]):
        sound = sound and (not ids.size or (int(ids.min()) >= 0 and int(ids.max()) < n))
    if not sound:
        raise IndexFormatError(f"{path}: the links do not fit the vectors")
    labels = arrays.pop("labels")
    g = Graph(**arrays, locks=np.zeros(n + 1, np.int32))
    if not mmap or n == 0:  # into arrays that begin on cache lines, as the kernels need them
        g = grown(g, max(1, n), upper)
        labels = np.concatenate([labels, np.full(len(g.level) - n, -1, np.int64)])
    return Loaded(config, header["next_label"], n, upper, g, labels)
