"""Which tiles in which order: the plan of a product on a fixed workspace, and what it moves.

Source: Tempus, arXiv 2605.00536 (one block of cores reused over time; A and B are read again once per pass of
the other). The software orders, the split of K and the search are ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

Order = Literal["A", "B", "C"]
ORDERS: tuple[Order, ...] = ("C", "A", "B")
ACCUMULATORS = ("auto", "float32", "float64", "int32", "int64")
SEGMENT = 512  # a cascade segment of K is not cut shorter than this
ROW_BYTES = 256  # of one k of a packed B panel: four vectors
STEP_S = 25e-6  # price of one step of the schedule in the model: Python, two waits, two copies
ALIGN = 64
ROW_PAD = (
    64  # bytes after a row of a packed A panel: rows 4 KiB apart would all fall into the same cache sets
)

ITEM_BYTES = {
    "int8": 1, "uint8": 1, "int16": 2, "uint16": 2, "int32": 4, "uint32": 4, "int64": 8,
    "float16": 2, "bfloat16": 2, "float32": 4, "float64": 8,
}  # fmt: skip
_LARGEST = {
    "int8": 1 << 7, "uint8": (1 << 8) - 1, "int16": 1 << 15, "uint16": (1 << 16) - 1,
    "int32": 1 << 31, "uint32": (1 << 32) - 1, "int64": 1 << 63,
}  # fmt: skip


class WorkspaceTooSmall(ValueError):
    """The smallest tile does not fit. ``needed_bytes`` would."""

    def __init__(self, needed_bytes: int, workspace_bytes: int, what: str) -> None:
        super().__init__(
            f"workspace_bytes must be at least {needed_bytes} for {what}, got {workspace_bytes} bytes"
        )
        self.needed_bytes = needed_bytes


def _require(ok: bool, name: str, allowed: str, value: object) -> None:
    if not ok:
        raise ValueError(f"{name} must be {allowed}, got {value!r}")


@dataclass(frozen=True)
class TemporalGemmConfig:
    """Settings of :class:`~sharewell.kernels.TemporalGemm`.

    ``tile`` (m, n, k) of one step, None: chosen by the traffic model. ``splits`` column groups a tile is
    worked on in, ``cascade`` segments of K whose partial sums are added in order (fewer when they would be
    shorter than 512). ``workspace_bytes`` holds all panels, the tile and its accumulator; it never grows.
    ``order``: which operand stays while the others stream. ``programs``: CUDA only, how many programs run at
    once. ``engine``: "numba" (bit-identical for any threads, tile, order and workspace) or "blas" (numpy's on
    the packed panels; no such promise). ``prefetch``: pack the next panels in a thread while this step
    computes; "auto": where an operand is not in memory or there is a second thread. Raises ValueError naming
    field, range and value.
    """

    tile: tuple[int, int, int] | None = None
    splits: int = 2
    cascade: int = 8
    workspace_bytes: int = 8 << 20
    threads: int = 1
    dtype_acc: str = "auto"
    order: Literal["auto", "A", "B", "C"] = "auto"
    programs: int = 16
    engine: Literal["numba", "blas"] = "numba"
    prefetch: bool | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        tile = self.tile
        whole = tile is None or (len(tile) == 3 and all(type(t) is int and t >= 1 for t in tile))
        _require(whole, "tile", "None or three positive whole numbers (m, n, k)", tile)
        for name, low, high in (
            ("splits", 1, 64),
            ("cascade", 1, 1024),
            ("threads", 1, 1024),
            ("programs", 1, 4096),
        ):
            value = getattr(self, name)
            _require(type(value) is int and low <= value <= high, name, f"in [{low}, {high}]", value)
        _require(
            type(self.workspace_bytes) is int and self.workspace_bytes >= 1,
            "workspace_bytes",
            "a positive whole number",
            self.workspace_bytes,
        )
        _require(
            self.dtype_acc in ACCUMULATORS, "dtype_acc", f"one of {', '.join(ACCUMULATORS)}", self.dtype_acc
        )
        _require(self.order in ("auto", *ORDERS), "order", "auto, A, B or C", self.order)
        _require(self.engine in ("numba", "blas"), "engine", "numba or blas", self.engine)
        _require(self.prefetch in (True, False, "auto"), "prefetch", "True, False or 'auto'", self.prefetch)


@dataclass(frozen=True)
class MachineRates:
    """What the predicted seconds rest on; :func:`~sharewell.kernels.measure_rates` measures them here."""

    flops_per_s: float = 130e9
    bytes_per_s: float = 8e9  # packed from memory

    def __post_init__(self) -> None:
        for name in ("flops_per_s", "bytes_per_s"):
            _require(getattr(self, name) > 0, name, "positive", getattr(self, name))


@dataclass(frozen=True)
class Types:
    """Element types of a product: of A and B, their panels, the accumulator, the result by default."""

    a: str
    b: str
    panel: str
    accumulator: str
    result: str
    checked: bool = False  # the values decide at run time whether int32 suffices

    @property
    def lanes(self) -> int:
        """Columns of one packed B panel."""
        return ROW_BYTES // ITEM_BYTES[self.accumulator]


def resolve_types(
    a: str, b: str, k: int, dtype_acc: str = "auto", engine: str = "numba", pairs: bool = True
) -> Types:
    """Types of ``A [M, k] @ B [k, N]``: integers in int32 where no values can overflow it, else int64 (which
    wraps as numpy does for 32 and 64 bit operands); float16 and bfloat16 in float32. ``pairs``: the CPU
    multiplies and adds pairs of 16-bit integers.

    Raises TypeError for other element types, a mix of integers and floats, or an accumulator of the other
    kind.
    """
    for name, kind in (("A", a), ("B", b)):
        if kind not in ITEM_BYTES:
            raise TypeError(f"dtype of {name} must be one of {', '.join(ITEM_BYTES)}, got {kind}")
    integer = a in _LARGEST
    if integer != (b in _LARGEST):
        raise TypeError(f"A and B must both be integers or both floats, got {a} and {b}")
    if dtype_acc != "auto" and dtype_acc.startswith("int") != integer:
        raise TypeError(f"dtype_acc {dtype_acc} cannot hold a product of {a} and {b}")
    if integer:
        if engine == "blas":
            raise TypeError(f"engine 'blas' takes floats, got {a} and {b}: use engine 'numba'")
        fits = k * _LARGEST[a] * _LARGEST[b] < 1 << 31
        accumulator = dtype_acc if dtype_acc != "auto" else ("int32" if fits else "int64")
        pairs = pairs and accumulator == "int32" and all(t in ("int8", "uint8", "int16") for t in (a, b))
        panel = "int16" if pairs else accumulator
        return Types(a, b, panel, accumulator, accumulator, accumulator == "int32" and not fits)
    wide = "float64" in (a, b)
    accumulator = dtype_acc if dtype_acc != "auto" else ("float64" if wide else "float32")
    if wide and accumulator == "float32":
        raise TypeError(f"dtype_acc float32 would narrow float64 operands, got {a} and {b}")
    result = a if a == b else ("float64" if wide else "float32")
    return Types(a, b, accumulator, accumulator, result)


def segments(k: int, cascade: int) -> list[tuple[int, int]]:
    """The cascade: ``k`` cut into at most ``cascade`` even pieces of at least 512, a function of these two
    alone, so that neither threads, tiles, order nor workspace change a bit of the result."""
    count = max(1, min(cascade, k // SEGMENT))
    length = max(2, math.ceil(k / count / 2) * 2)
    return [(start, min(k, start + length)) for start in range(0, k, length)]


@dataclass(frozen=True)
class Chunk:
    """K from ``start`` to ``stop``, one panel deep; ``parts`` are (offset, length, ends a segment, opens the
    first)."""

    start: int
    stop: int
    parts: tuple[tuple[int, int, bool, bool], ...]


def chunks(k: int, cascade: int, k_t: int) -> list[Chunk]:
    """Panels along K: whole segments when ``k_t`` holds one, else even cuts inside each segment."""
    cut = segments(k, cascade)
    longest = max((b - a for a, b in cut), default=1)
    out: list[Chunk] = []
    if k_t >= longest:
        group = k_t // longest
        for first in range(0, len(cut), group):
            inside = cut[first : first + group]
            parts = tuple((a - inside[0][0], b - a, True, a == 0) for a, b in inside)
            out.append(Chunk(inside[0][0], inside[-1][1], parts))
        return out
    for a, b in cut:
        for start in range(a, b, k_t):
            stop = min(b, start + k_t)
            out.append(Chunk(start, stop, ((0, stop - start, stop == b, a == 0),)))
    return out


def chunk_count(cut: list[tuple[int, int]], k_t: int) -> int:
    """How many :func:`chunks` there are, without making them."""
    longest = max((b - a for a, b in cut), default=1)
    if k_t >= longest:
        return -(-len(cut) // (k_t // longest))
    return sum(-(-(b - a) // k_t) for a, b in cut)


@dataclass(frozen=True)
class Step:
    """One step: rows i0..i1, columns j0..j1, one chunk of K. ``load`` a spilled tile first, ``spill`` it
    after."""

    i: int
    j: int
    c: int
    i0: int
    i1: int
    j0: int
    j1: int
    opens: bool
    closes: bool
    load: bool
    spill: bool


@dataclass(frozen=True)
class GemmPlan:
    """What a product ``[M, K] @ [K, N]`` will do. Bytes are element bytes read and written, exactly as the
    run will count them; ``bytes_c`` includes partial tiles that are put aside and fetched again."""

    m: int
    n: int
    k: int
    types: Types
    tile: tuple[int, int, int]
    order: Order
    cascade: int
    iterations: int  # steps of the schedule
    bytes_a: int
    bytes_b: int
    bytes_c: int
    workspace_bytes: int
    staging_bytes: int
    predicted_s: float

    @property
    def bytes_moved(self) -> int:
        return self.bytes_a + self.bytes_b + self.bytes_c

    @property
    def counts(self) -> tuple[int, int, int]:
        """Tiles along M, N and chunks along K."""
        m_t, n_t, k_t = self.tile
        return -(-self.m // m_t), -(-self.n // n_t), chunk_count(segments(self.k, self.cascade), k_t)

    def chunks(self) -> list[Chunk]:
        return chunks(self.k, self.cascade, self.tile[2])

    def steps(self) -> Iterator[Step]:
        """The schedule, outermost loop first: C = (i, j, k), A = (i, k, j), B = (j, k, i)."""
        (m_t, n_t, _), (ni, nj, nk) = self.tile, self.counts
        spills = nk > 1 and ((self.order == "A" and nj > 1) or (self.order == "B" and ni > 1))
        if self.order == "C":
            triples = ((i, j, c) for i in range(ni) for j in range(nj) for c in range(nk))
        elif self.order == "A":
            triples = ((i, j, c) for i in range(ni) for c in range(nk) for j in range(nj))
        else:
            triples = ((i, j, c) for j in range(nj) for c in range(nk) for i in range(ni))
        for i, j, c in triples:
            i0, j0 = i * m_t, j * n_t
            opens, closes = c == 0, c == nk - 1
            i1, j1 = min(self.m, i0 + m_t), min(self.n, j0 + n_t)
            yield Step(i, j, c, i0, i1, j0, j1, opens, closes, spills and not opens, spills and not closes)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "bytes_moved": self.bytes_moved}


def passes(order: Order, ni: int, nj: int, nk: int) -> tuple[int, int, int]:
    """How often A is read, B is read, and C is written or read (1 = once), with two buffers for each operand.

    A panel of the other operand is kept while it is one of the two used last, hence the cases of 2.
    """
    if order == "C":
        return (1 if nk <= 2 else nj), (1 if nj * nk <= 2 else ni), 1
    spills = 2 * nk - 1
    if order == "A":
        return 1, (1 if nk * nj <= 2 else ni), (1 if nj == 1 else spills)
    return (1 if nk * ni <= 2 else nj), 1, (1 if ni == 1 else spills)


@dataclass(frozen=True)
class Source:
    """What the model needs to know of an operand: bytes in one unbroken run are ``run`` elements of a row or
    column; ``on_disk`` is read in pages, ``staged`` reads allocate a block that the workspace must pay for.
    """

    on_disk: bool = False
    staged: bool = False
    row_major: bool = True

    def price(self, rows: int, columns: int, item: int) -> float:
        """Bytes really touched per byte wanted, for a block of rows x columns."""
        run = (columns if self.row_major else rows) * item
        return 1 + (4096 if self.on_disk else 64) / run


def _round_up(x: int, to: int) -> int:
    return -(-x // to) * to


def workspace_need(
    types: Types, tile: tuple[int, int, int], sources: tuple[Source, Source]
) -> tuple[int, int]:
    """(bytes of panels, tile and accumulator, bytes of staging) of a tile (m, n, k)."""
    m, n, k = tile
    width, k = _round_up(n, types.lanes), _round_up(k, 2)
    panel, acc = ITEM_BYTES[types.panel], ITEM_BYTES[types.accumulator]
    parts = [m * (k * panel + ROW_PAD)] * 2 + [k * width * panel] * 2 + [m * width * acc] * 2
    blocks = [
        m * k * ITEM_BYTES[types.a] * sources[0].staged,
        k * n * ITEM_BYTES[types.b] * sources[1].staged,
    ]
    return sum(_round_up(p, ALIGN) for p in parts) + ALIGN, max(blocks)


def _candidates(m: int, n: int, k: int, types: Types, cascade: int) -> Iterator[tuple[int, int, int]]:
    lanes = types.lanes
    rows = sorted({min(m, 6 << e) for e in range(12)} | {min(m, 9 << e) for e in range(2, 10)} | {min(m, 1)})
    columns = sorted({min(n, lanes * c) for c in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128)})
    cut = segments(k, cascade)
    longest = cut[0][1] - cut[0][0]
    depths = {max(2, _round_up(longest >> e, 2)) for e in range(12)} | {2}
    depths |= {longest * g for g in range(1, len(cut) + 1)}
    for m_t in rows:
        for n_t in columns:
            for k_t in sorted(depths):
                yield m_t, n_t, k_t


def make_plan(
    m: int,
    n: int,
    k: int,
    types: Types,
    cfg: TemporalGemmConfig,
    *,
    sources: tuple[Source, Source] = (Source(), Source()),
    may_spill: bool = True,
    rates: MachineRates = MachineRates(),  # noqa: RUF009
) -> GemmPlan:
    """The tile and order that move the fewest bytes within the workspace, each step priced at 25 us.

    ``may_spill``: partial tiles may be written to the output and read back (its type must be the
    accumulator's). Raises WorkspaceTooSmall with the bytes that the smallest (or the given) tile needs.
    """
    for name, size in (("m", m), ("n", n), ("k", k)):
        _require(type(size) is int and size >= 1, name, "at least 1", size)
    if cfg.tile is not None:
        options = iter([(min(m, cfg.tile[0]), min(n, cfg.tile[1]), min(_round_up(k, 2), cfg.tile[2]))])
    else:
        options = _candidates(m, n, k, types, cfg.cascade)
    item_a, item_b = ITEM_BYTES[types.a], ITEM_BYTES[types.b]
    item_c = ITEM_BYTES[types.accumulator]
    flops_s = 2.0 * m * n * k / rates.flops_per_s
    best: tuple[float, GemmPlan] | None = None
    smallest: int | None = None
    depth_counts: dict[int, int] = {}
    cut = segments(k, cfg.cascade)
    longest = cut[0][1] - cut[0][0]
    for tile in options:
        need, staging = workspace_need(types, tile, sources)
        smallest = need + staging if smallest is None else min(smallest, need + staging)
        if need + staging > cfg.workspace_bytes:
            continue
        m_t, n_t, k_t = tile
        if k_t not in depth_counts:
            depth_counts[k_t] = chunk_count(cut, k_t)
        ni, nj, nk = -(-m // m_t), -(-n // n_t), depth_counts[k_t]
        for order in ORDERS if cfg.order == "auto" else (cfg.order,):
            pass_a, pass_b, pass_c = passes(order, ni, nj, nk)
            # What is put aside is the tile, not the accumulator: a chunk must end a segment of K.
            if pass_c > 1 and (not may_spill or (k_t < longest and cfg.engine == "numba")):
                continue
            moved = (m * k * item_a * pass_a, k * n * item_b * pass_b, m * n * item_c * pass_c)
            touched = moved[0] * sources[0].price(m_t, min(k, k_t), item_a)
            touched += moved[1] * sources[1].price(min(k, k_t), n_t, item_b) + moved[2]
            # Rows of six and panels of four vectors fill the registers; what a tile leaves over is lost time.
            filled = (m_t / _round_up(m_t, 6)) * (n_t / _round_up(n_t, types.lanes))
            # Every part of K loads and stores the accumulators of the tile once.
            depth = min(k_t, k)
            seconds = (
                flops_s / filled * (1 + 12 / depth) + touched / rates.bytes_per_s + ni * nj * nk * STEP_S
            )
            if best is None or seconds < best[0]:
                plan = GemmPlan(
                    m, n, k, types, tile, order, cfg.cascade, ni * nj * nk, *moved, need, staging, seconds
                )  # fmt: skip
                best = (seconds, plan)
    if best is None:
        what = f"a product {m}x{k} @ {k}x{n} of {types.a} and {types.b}"
        if smallest is not None and smallest <= cfg.workspace_bytes:
            raise ValueError(
                f"order {cfg.order} puts partial tiles aside in the output: it needs an array of "
                f"{types.accumulator} and a tile of at least {longest} along k, got {cfg.tile}: use order C"
            )
        raise WorkspaceTooSmall(smallest or 0, cfg.workspace_bytes, what)
    return best[1]
