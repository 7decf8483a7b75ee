"""Import from and export to the files that hnswlib 0.8 writes, so that an existing index needs no rebuild."""

from __future__ import annotations

import os
import struct
import tempfile
from pathlib import Path

import numpy as np

from .base import IndexFormatError, Metric
from .graph import ENTRY, TOP, Graph
from .hnsw import HNSWConfig, HNSWIndex
from .repair import count_incoming
from .rows import LAYERS, draw_sketches, empty_graph

# offset of layer 0, capacity, count, bytes an element, place of the label, place of the vector, top level,
# entry,
# links a layer above 0, links on layer 0, M, 1 / ln M, ef of construction
_HEADER = struct.Struct("<QQQQQQiIQQQdQ")
_DELETED = 1 << 16  # in the word that counts an element's links


def from_hnswlib(path: Path | str, dim: int, metric: Metric = "l2") -> HNSWIndex:
    """The index in an hnswlib file; hnswlib does not write dimension and metric down, so they must be said.

    Raises IndexFormatError when the file does not fit them or is damaged, as far as that can be seen: the
    format has no checksum.
    """
    path = Path(path)
    data = path.read_bytes()

    def refuse(what: str) -> IndexFormatError:
        return IndexFormatError(f"{path}: {what}")

    if len(data) < _HEADER.size:
        raise refuse("it is too short for an hnswlib index")
    start0, _, n, size, label_at, vector_at, top, entry, max_m, max_m0, m, _, ef = _HEADER.unpack_from(data)
    if start0 != 0 or not 2 <= m <= 512 or max_m != m or max_m0 != 2 * m or vector_at != 4 + 4 * max_m0:
        raise refuse("this is not an hnswlib index (its header does not hold together)")
    if label_at - vector_at != 4 * dim or size != label_at + 8:
        raise refuse(f"its vectors have {(label_at - vector_at) // 4} dimensions, not {dim}")
    end = _HEADER.size + n * size
    if len(data) < end or (n and not (0 <= entry < n and 0 <= top < LAYERS)):
        raise refuse("it is truncated or damaged")
    elements = np.frombuffer(data, np.uint8, n * size, _HEADER.size).reshape(n, size)
    words = elements[:, : 4 + 4 * max_m0].copy().view(np.uint32)
    vectors = elements[:, vector_at:label_at].copy().view(np.float32)
    labels = elements[:, label_at:].copy().view(np.uint64)[:, 0].astype(np.int64)
    counts = (words[:, 0] & 0xFFFF).astype(np.int32)

    each, at, levels, upper = 4 + 4 * max_m, end, np.zeros(n, np.int16), []
    for node in range(n):
        if at + 4 > len(data):
            raise refuse("it is truncated in the upper layers")
        (length,) = struct.unpack_from("<I", data, at)
        at += 4
        if length % each or length > LAYERS * each or at + length > len(data):
            raise refuse(f"the upper layers of element {node} are damaged")
        levels[node] = length // each
        if length:
            upper.append(np.frombuffer(data, np.uint32, length // 4, at).reshape(-1, 1 + max_m))
        at += length
    rows = np.concatenate(upper) if upper else np.zeros((0, 1 + max_m), np.uint32)
    ids = [
        words[:, 1:][np.arange(max_m0)[None] < counts[:, None]],
        rows[:, 1:][np.arange(max_m)[None] < rows[:, :1]],
    ]
    if (
        at != len(data)
        or (counts > max_m0).any()
        or (rows[:, 0] > max_m).any()
        or any((x >= n).any() for x in ids)
    ):
        raise refuse("its links are damaged")

    g = empty_graph(max(1, n), dim, m, "float32", len(rows))
    g.vectors[:n, :dim], g.level[:n], g.count0[:n] = vectors, levels, counts
    g.norms[:n] = np.einsum("ij,ij->i", vectors, vectors)
    draw_sketches(g, np.arange(n), vectors)
    g.links0[:n] = np.minimum(words[:, 1:], max(n, 1) - 1)  # cells beyond the count hold anything
    g.links[:], g.count[:] = np.minimum(rows[:, 1:], max(n, 1) - 1), rows[:, 0]
    g.upper[:n] = np.concatenate(([0], np.cumsum(levels[:-1]))) if n else 0
    g.dead[:n] = (words[:, 0] & _DELETED) != 0
    g.meta[ENTRY], g.meta[TOP] = (entry, top) if n else (-1, -1)
    count_incoming(g, n)
    index = HNSWIndex(HNSWConfig(dim, metric, M=m, ef_construction=max(1, ef), capacity=1))
    index._rows.adopt(g, np.concatenate([labels, np.full(len(g.level) - n, -1, np.int64)]), n, len(rows))
    index._next_label = int(labels.max(initial=-1)) + 1
    return index


def to_hnswlib(index: HNSWIndex, path: Path | str) -> None:
    """Write ``index`` as an hnswlib file (after compacting it). Raises ValueError for int8 storage."""
    config, rows, path = index.config, index._rows, Path(path).absolute()
    if config.storage != "float32":
        raise ValueError(f"storage must be float32 for an hnswlib file, got {config.storage!r}")
    with rows.lock:
        index.compact()
        g, live = rows.graph, rows.live(rows.graph)
        body = _elements(g, rows.labels, live, index.dim, config.M)
        m, n = config.M, len(live)
        place = np.full(len(g.level), 0, np.uint32)
        place[live] = np.arange(n)
        size = 4 + 8 * m + 4 * index.dim + 8
        entry = int(place[g.meta[ENTRY]]) if n else 0
        head = _HEADER.pack(
            0, max(1, n), n, size, size - 8, 4 + 8 * m, int(g.meta[TOP]), entry, m, 2 * m, m,
            1 / np.log(m), config.ef_construction,
        )  # fmt: skip
        parts = [head, body.tobytes()]
        for node in live.tolist():
            level = int(g.level[node])
            parts.append(struct.pack("<I", level * (4 + 4 * m)))
            for row in range(int(g.upper[node]), int(g.upper[node]) + level):
                words = np.zeros(1 + m, np.uint32)
                words[0] = g.count[row]
                words[1 : 1 + g.count[row]] = place[g.links[row, : g.count[row]]]
                parts.append(words.tobytes())
    descriptor, aside = tempfile.mkstemp(prefix=path.name + ".", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise


def _elements(g: Graph, labels: np.ndarray, live: np.ndarray, dim: int, m: int) -> np.ndarray:
    """Layer 0: uint8 ``[n, bytes an element]`` of count, links, vector and label."""
    place = np.zeros(len(g.level), np.uint32)
    place[live] = np.arange(len(live))
    words = np.zeros((len(live), 1 + 2 * m), np.uint32)
    words[:, 0] = g.count0[live]
    filled = np.arange(2 * m)[None] < g.count0[live][:, None]
    words[:, 1:][filled] = place[g.links0[live]][filled]
    vectors = np.ascontiguousarray(g.vectors[live, :dim], np.float32)
    parts = (words, vectors, labels[live].astype(np.uint64)[:, None])
    return np.concatenate([np.ascontiguousarray(p).view(np.uint8) for p in parts], axis=1)
