"""How long the Tempus design takes on a Versal AI Edge board: a closed form calibrated on published board
timings.

Source: arXiv 2605.00536 and the board logs of its authors' code (see ``data/NOTICE``). The form of the model
and its three constants are ours; it says that the design is bound by its streams, never by its cores. Board
latency is launch and compute only: it leaves out moving the matrices to the board and back, so it is no
end-to-end time.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Literal

import numpy as np

Bound = Literal["memory", "port", "core"]
WORD_BYTES = 16  # a 128-bit PLIO word
ITEM_BYTES = {"int16": 2, "int32": 4}
MACS_PER_CYCLE = {"int16": 64, "int32": 16}
TILE_BYTES = 32 << 10  # of one output tile in a core's local memory
SUB_TILE = 4  # cores compute 4x4x4 blocks


@dataclass(frozen=True)
class AieBoard:
    """A board and the constants of the model: seconds, bytes per second, hertz, watts."""

    name: str = "ve2302"
    array_cores: int = 34
    launch_s: float = 0.218e-3
    overhead_s: float = 0.168e-3
    memory_bytes_per_s: float = 17.0e9
    port_bytes_per_s: float = 14.9e9
    clock_hz: float = 1.25e9  # not stated in what we read; it never binds
    power_w: float = 10.677
    peak_tops: float = 23.0


BOARDS = {"ve2302": AieBoard()}


@dataclass(frozen=True)
class Platform:
    """A design to compare with: its throughput and what it takes for it."""

    name: str
    tops: float
    cores: int
    power_w: float
    plio: int
    peak_tops: float


# PLIO and peaks are those with which the paper's ratio of 211.2 comes out; it does not state them in what we
# read.
ARIES = Platform("ARIES", 15.86, 352, 76.30, 164, 128.0)


@dataclass(frozen=True)
class AieReport:
    """One product on the board. ``words`` are 128-bit words of A, B and C; ``bound`` names what takes
    longest."""

    m: int
    k: int
    n: int
    dtype: str
    dim_a: int
    dim_b: int
    iterations: int
    words: tuple[int, int, int]
    compute_ms: float
    latency_ms: float
    gops: float
    power_w: float
    bound: Bound
    cores: int
    plio: int
    uram: int = 0
    dsp: int = 0

    @property
    def gops_per_w(self) -> float:
        return self.gops / self.power_w

    @property
    def gops_per_core(self) -> float:
        return self.gops / self.cores

    def with_latency(self, latency_ms: float) -> AieReport:
        """This product with a measured latency in place of the predicted one."""
        return replace(self, latency_ms=latency_ms, gops=2e-6 * self.m * self.n * self.k / latency_ms)


@dataclass(frozen=True)
class BoardTiming:
    """One published run. ``total_ms`` None: the log has none."""

    m: int
    k: int
    n: int
    dim_a: int
    dim_b: int
    item_bytes: int
    compute_ms: float
    total_ms: float | None

    @property
    def dtype(self) -> str:
        return "int16" if self.item_bytes == 2 else "int32"


@dataclass(frozen=True)
class Comparison:
    """The model beside a published run; ``error`` is relative, of the compute time."""

    published: BoardTiming
    model: AieReport

    @property
    def error(self) -> float:
        return self.model.compute_ms / self.published.compute_ms - 1


_COLUMNS = ("M", "K", "N", "dim_a", "dim_b", "bytes_per_element", "compute_ms", "total_ms")


def board_timings(path: str | Path | None = None) -> list[BoardTiming]:
    """The runs of a CSV file, by default the published ones. ValueError names line and values."""
    packaged = files("sharewell.kernels").joinpath("data", "tempus_board_timings.csv")
    text = packaged.read_text("utf-8") if path is None else Path(path).read_text("utf-8")
    reader = csv.DictReader(text.splitlines())
    if tuple(reader.fieldnames or ()) != _COLUMNS:
        raise ValueError(f"columns must be {','.join(_COLUMNS)}, got {','.join(reader.fieldnames or ())}")
    runs = []
    for number, row in enumerate(reader, start=2):
        try:
            sizes = [int(row[name]) for name in _COLUMNS[:6]]
            compute, total = float(row["compute_ms"]), float(row["total_ms"]) if row["total_ms"] else None
        except (TypeError, ValueError):
            raise ValueError(f"line {number} must hold six whole numbers and two times, got {row}") from None
        if (
            min(sizes) < 1
            or sizes[5] not in (2, 4)
            or not (0 < compute < 1e9)
            or (total is not None and total <= 0)
        ):
            raise ValueError(
                f"line {number} must hold positive sizes, 2 or 4 bytes and positive times, got {row}"
            )
        m, k, n, dim_a, dim_b, item = sizes
        runs.append(BoardTiming(m, k, n, dim_a, dim_b, item, compute, total))
    if not runs:
        raise ValueError("the file must hold at least one run, got none")
    return runs


class AieModel:
    """``splits`` columns of ``cascade`` cores. Raises ValueError for an unknown board or a block it has no
    room for."""

    def __init__(self, board: str | AieBoard = "ve2302", splits: int = 2, cascade: int = 8) -> None:
        if isinstance(board, str) and board not in BOARDS:
            raise ValueError(f"board must be one of {', '.join(BOARDS)}, got {board!r}")
        self.board = BOARDS[board] if isinstance(board, str) else board
        if splits < 1 or cascade < 1 or splits * cascade > self.board.array_cores:
            raise ValueError(
                f"splits and cascade must be at least 1 and make at most {self.board.array_cores} cores, "
                f"got {splits} x {cascade}"
            )
        self.splits, self.cascade = splits, cascade

    @property
    def cores(self) -> int:
        return self.splits * self.cascade

    @property
    def plio(self) -> int:
        """Streams: A once a row of cores (broadcast), B once a core, C once a column: 8 + 16 + 2."""
        return self.cascade + self.cores + self.splits

    def tile(self, m: int, n: int, dim: int) -> tuple[int, int]:
        """(DIM_A, DIM_B) for a requested DIM: at most half of M, and the columns that one split has."""
        return max(1, min(dim, m // 2)), max(1, min(dim, n // self.splits))

    def simulate(
        self,
        m: int,
        k: int,
        n: int,
        dtype: str = "int16",
        dim: int = 64,
        *,
        dims: tuple[int, int] | None = None,
    ) -> AieReport:
        """``[m, k] @ [k, n]`` with tiles of ``dim`` (or exactly ``dims`` = (DIM_A, DIM_B)).

        Raises ValueError for sizes that the tiles do not divide, or a tile that overfills a core's 32 KiB.
        """
        if dtype not in ITEM_BYTES:
            raise ValueError(f"dtype must be int16 or int32, got {dtype!r}")
        for name, value in (("m", m), ("k", k), ("n", n), ("dim", dim)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        item = ITEM_BYTES[dtype]
        a, b = dims or self.tile(m, n, dim)
        if a < 1 or b < 1 or m % a or n % (self.splits * b) or k % self.cascade:
            raise ValueError(
                f"DIM_A must divide M, {self.splits} DIM_B divide N and {self.cascade} divide K, "
                f"got DIM {a} x {b} for {m}x{k}x{n}"
            )
        if a * b * item > TILE_BYTES:
            raise ValueError(f"a tile of C must take at most {TILE_BYTES} bytes, got {a} x {b} of {dtype}")
        per_word = WORD_BYTES // item
        iterations = m * (n // self.splits) // (a * b)
        # A is replayed for every column of tiles, B for every row of them.
        words = (
            m * k // per_word * (n // (self.splits * b)),
            k * n // per_word * (m // a),
            m * n // per_word,
        )
        cycles = iterations * a * (k // self.cascade) * b / MACS_PER_CYCLE[dtype]
        times: dict[Bound, float] = {
            "memory": WORD_BYTES * sum(words) / self.board.memory_bytes_per_s,
            "port": WORD_BYTES * words[1] / self.board.port_bytes_per_s,
            "core": cycles / self.board.clock_hz,
        }
        bound = max(times, key=lambda name: times[name])
        compute = self.board.overhead_s + times[bound]
        latency = self.board.launch_s + compute
        return AieReport(
            m, k, n, dtype, a, b, iterations, words, compute * 1e3, latency * 1e3, 2e-9 * m * k * n / latency,
            self.board.power_w, bound, self.cores, self.plio,
        )  # fmt: skip

    def sweep_dim(
        self, m: int, k: int, n: int, dtype: str = "int16", dims: Sequence[int] = (4, 8, 16, 32, 64, 128)
    ) -> list[AieReport]:
        """The same product with larger and larger tiles."""
        return [self.simulate(m, k, n, dtype, dim) for dim in dims]

    def compare(self, runs: Iterable[BoardTiming] | None = None) -> list[Comparison]:
        """The model beside the published runs."""
        runs = board_timings() if runs is None else runs
        return [Comparison(r, self.simulate(r.m, r.k, r.n, r.dtype, dims=(r.dim_a, r.dim_b))) for r in runs]

    def pau(self, report: AieReport, against: Platform = ARIES) -> float:
        """Platform-aware utility of ``report`` over that of ``against``.

        PAU = TOPS / (cores * watts * PLIO * peak TOPS of the platform). It multiplies four denominators and
        so rewards any small platform: read GOPS per watt and per core beside it.
        """
        ours = report.gops / 1e3 / (report.cores * report.power_w * report.plio * self.board.peak_tops)
        theirs = against.tops / (against.cores * against.power_w * against.plio * against.peak_tops)
        return ours / theirs

    def frugality(self, against: Platform = ARIES) -> dict[str, float]:
        """How many times fewer cores, watts and PLIO streams than ``against``."""
        return {
            "cores": against.cores / self.cores,
            "power": against.power_w / self.board.power_w,
            "plio": against.plio / self.plio,
        }

    def calibrate(self, runs: Iterable[BoardTiming] | str | Path | None = None) -> AieModel:
        """This model with overhead, memory and port bandwidth fitted to ``runs`` (published ones, or a CSV
        file).

        Least squares of relative errors; which of memory and port binds a run follows from the fit before,
        until it no longer changes. Raises ValueError when the runs do not determine the three.
        """
        loaded = board_timings(runs) if runs is None or isinstance(runs, (str, Path)) else list(runs)
        model, seen = self, set()
        while True:
            reports = [c.model for c in model.compare(loaded)]
            binds = tuple(report.bound for report in reports)
            if binds in seen:
                return model
            seen.add(binds)
            rows = []
            for run, report in zip(loaded, reports, strict=True):
                by_memory = WORD_BYTES * sum(report.words) if report.bound == "memory" else 0
                by_port = WORD_BYTES * report.words[1] if report.bound == "port" else 0
                rows.append([1e3 / run.compute_ms, by_memory / run.compute_ms, by_port / run.compute_ms])
            # Columns in seconds and nanoseconds per byte, so that they are of one size.
            matrix = np.array(rows) * np.array([1.0, 1e-6, 1e-6])
            used = [j for j in range(3) if matrix[:, j].any()]
            fit, _, rank, _ = np.linalg.lstsq(matrix[:, used], np.ones(len(rows)), rcond=None)
            if rank < len(used) or min(fit) <= 0 or len(used) < 2:
                raise ValueError(f"{len(rows)} runs do not determine overhead and bandwidths")
            values = dict(zip(used, fit, strict=True))
            board = replace(
                model.board,
                overhead_s=float(values[0]),
                memory_bytes_per_s=1e9 / float(values[1]) if 1 in values else model.board.memory_bytes_per_s,
                port_bytes_per_s=1e9 / float(values[2]) if 2 in values else model.board.port_bytes_per_s,
            )
            model = AieModel(board, self.splits, self.cascade)
