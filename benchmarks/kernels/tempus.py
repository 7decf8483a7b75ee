"""Tempus: products on a fixed workspace beside numpy and dask, and the board model beside the published
timings.

Every part runs in a process of its own with one thread for BLAS, so that memory is that of the part alone.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from sharewell.bench import Progress, Report, Row, environment, interleave, values

ROOT = Path(__file__).parents[2]
MIB = 1 << 20
WORKSPACE = 8 * MIB
SWEEP_MS = {4: 6.194, 8: 3.230, 16: 1.811, 32: 1.123, 64: 0.792, 128: 0.586}  # the board, 512^3
LIMIT = 300_000_000  # RLIMIT_DATA of the product of 30,000 x 30,000
PARTS: dict[str, Callable[..., Any]] = {}


def part(function: Callable[..., Any]) -> Callable[..., Any]:
    PARTS[function.__name__] = function
    return function


def alone(function: Callable[..., Any], **arguments: Any) -> Any:
    """What ``function`` returns in a fresh process with one BLAS thread."""
    one = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.kernels.tempus", function.__name__, json.dumps(arguments)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **one}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{function.__name__}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def gemm(**settings: Any) -> Any:
    from sharewell.kernels.temporal_gemm import TemporalGemm
    from sharewell.kernels.temporal_plan import TemporalGemmConfig

    return TemporalGemm(TemporalGemmConfig(**{"workspace_bytes": WORKSPACE, **settings}))


def status_bytes(name: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{name}:"))


class AnonymousPeak:
    """Largest anonymous memory of this process (no page cache of mapped files), looked at every 2 ms."""

    def __enter__(self) -> AnonymousPeak:
        self.start = self.peak = status_bytes("RssAnon")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self.peak = max(self.peak, status_bytes("RssAnon"))

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def extra(self) -> int:
        return self.peak - self.start


def drop_cache(*paths: Path) -> None:
    """Ask the kernel to forget the pages of these files."""
    for path in paths:
        handle = os.open(path, os.O_RDWR)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


@part
def speed(side: int, repeats: int, seed: int) -> dict[str, list[float]]:
    """Seconds of ours on two engines and of numpy at side^3 float32, in turns."""
    rng = np.random.default_rng(seed)
    a, b = (rng.standard_normal((side, side), np.float32) for _ in range(2))
    out = {name: np.empty((side, side), np.float32) for name in ("numba", "blas", "numpy")}
    numba, blas = gemm(engine="numba"), gemm(engine="blas")
    samples = interleave(
        {
            "numba": lambda: numba(a, b, out["numba"]),
            "blas": lambda: blas(a, b, out["blas"]),
            "numpy": lambda: np.matmul(a, b, out=out["numpy"]),
        },
        repeats=repeats,
    )
    np.testing.assert_allclose(out["numba"], out["numpy"], rtol=0, atol=1e-3 * side**0.5)
    np.testing.assert_allclose(out["blas"], out["numpy"], rtol=0, atol=1e-3 * side**0.5)
    return {name: values(taken) for name, taken in samples.items()}


@part
def scaling(sides: list[int], repeats: int, seed: int) -> dict[str, list[float]]:
    """Seconds per product of each side, in turns."""
    rng = np.random.default_rng(seed)
    engine = gemm()
    runs: dict[str, Callable[[], Any]] = {}
    for side in sides:
        a, b = (rng.standard_normal((side, side), np.float32) for _ in range(2))
        out = np.empty((side, side), np.float32)
        count = max(1, (sides[-1] // side) ** 3 // 8)  # small products several times, to be measurable

        def product(a: Any = a, b: Any = b, out: Any = out, count: int = count) -> int:
            for _ in range(count):
                engine(a, b, out)
            return count

        runs[str(side)] = product
    samples = interleave(runs, repeats=repeats)
    return {name: [s.wall_s / s.value for s in taken] for name, taken in samples.items()}


@part
def sweep(side: int, repeats: int, seed: int) -> dict[str, Any]:
    """Seconds and bytes moved at side^3 for tiles of each DIM."""
    rng = np.random.default_rng(seed)
    a, b = (rng.standard_normal((side, side), np.float32) for _ in range(2))
    out = np.empty((side, side), np.float32)
    # Panels shallower than K, so that neither operand stays between tiles: as on the board.
    engines = {str(dim): gemm(tile=(dim, dim, side // 3 + 1), order="C", cascade=1) for dim in SWEEP_MS}
    gemm()(a[:64, :64], b[:64, :64])  # compile
    runs: dict[str, Callable[[], Any]] = {
        dim: (lambda engine=engine: engine(a, b, out)) for dim, engine in engines.items()
    }
    samples = interleave(runs, repeats=repeats, warmup=0)
    moved = {dim: engine.stats.bytes_a + engine.stats.bytes_b for dim, engine in engines.items()}
    return {"seconds": {dim: values(taken) for dim, taken in samples.items()}, "bytes": moved}


@part
def memory(folder: str, side: int, width: int, dtype: str, limit: int) -> dict[str, Any]:
    """Extra anonymous memory of one product of files; under RLIMIT_DATA when ``limit`` is given."""
    if limit:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    here = Path(folder)
    a = np.memmap(here / "a", dtype, "r", shape=(side, side))
    b = np.memmap(here / "b", dtype, "r", shape=(side, width))
    c = np.memmap(here / "c", "int32" if dtype == "int8" else dtype, "w+", shape=(side, width))
    warm = np.ones((8, 8), dtype)
    gemm(workspace_bytes=MIB, prefetch=True)(warm, warm)
    with AnonymousPeak() as peak:
        engine = gemm()
        start = time.perf_counter()
        engine(a, b, c)
        seconds = time.perf_counter() - start
    rows = np.linspace(0, side - 1, 20).astype(int)
    exact = np.float64 if dtype != "int8" else np.int64
    expected = np.asarray(a[rows], exact) @ np.asarray(b, exact)
    np.testing.assert_allclose(c[rows], expected, rtol=0, atol=0 if dtype == "int8" else 1e-3 * side**0.5)
    refused = False
    if limit:
        try:
            np.fromfile(here / "a", dtype)
        except MemoryError:
            refused = True
    return {
        "extra": peak.extra,
        "refused": refused,
        "workspace": engine.stats.peak_workspace,
        "seconds": seconds,
    }


@part
def disk(folder: str, side: int, width: int, dtype: str, repeats: int) -> dict[str, list[float]]:
    """Seconds of a product of files that are not in the page cache, with and without the prefetch thread,
    beside the same product in memory and reading the files alone."""
    here = Path(folder)
    files = (here / "a", here / "b")
    shapes = ((side, side), (side, width))
    engines = {"prefetch": gemm(prefetch=True), "no prefetch": gemm(prefetch=False)}
    in_memory = gemm(prefetch=False)
    loaded = [np.fromfile(path, dtype).reshape(shape) for path, shape in zip(files, shapes, strict=True)]
    result = "int32" if dtype == "int8" else dtype
    out = np.empty((side, width), result)
    taken: dict[str, list[float]] = {name: [] for name in (*engines, "compute", "read")}

    def read() -> None:
        buffer = bytearray(4 * MIB)
        for path in files:
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass

    def cold(engine: Any) -> Callable[[], Any]:
        def product() -> None:
            a, b = (np.memmap(path, dtype, "r", shape=s) for path, s in zip(files, shapes, strict=True))
            engine(a, b, out)

        return product

    runs = {name: cold(engine) for name, engine in engines.items()}
    runs["compute"] = lambda: in_memory(*loaded, out)
    runs["read"] = read
    in_memory(*(m[:64, :64] for m in loaded))  # compile
    names = list(runs)
    for turn in range(repeats):
        for name in names[turn % 4 :] + names[: turn % 4]:
            drop_cache(*files)
            start = time.perf_counter()
            runs[name]()
            taken[name].append(time.perf_counter() - start)
    return taken


@part
def on_disk(folder: str, side: int, who: str) -> dict[str, float] | None:
    """Seconds and extra anonymous memory of side^3 float32 from cold files into a file; None: no dask."""
    here = Path(folder)
    a, b = (np.memmap(here / name, np.float32, "r", shape=(side, side)) for name in ("a", "b"))
    c = np.memmap(here / f"c-{who}", np.float32, "w+", shape=(side, side))
    if who == "dask":
        try:
            import dask.array as da
            from dask.config import set as configure
        except ModuleNotFoundError:
            return None
        chunk = min(side, 2048)
        chunks: Any = (chunk, chunk)
        x, y = (da.from_array(m, chunks=chunks) for m in (a, b))

        def product() -> None:
            with configure(scheduler="threads", num_workers=1):
                da.store(da.matmul(x, y), c, lock=False)
    else:
        engine = gemm(engine=who)
        warm = np.ones((8, 8), np.float32)
        gemm(workspace_bytes=MIB, prefetch=True, engine=who)(warm, warm)

        def product() -> None:
            gemm(engine=who)(a, b, c)

        del engine
    drop_cache(here / "a", here / "b")
    with AnonymousPeak() as peak:
        start = time.perf_counter()
        product()
        seconds = time.perf_counter() - start
    rows = np.array([0, side // 2, side - 1])
    np.testing.assert_allclose(c[rows], np.asarray(a[rows]) @ b, rtol=0, atol=1e-3 * side**0.5)
    return {"seconds": seconds, "extra": peak.extra}


def write_matrix(path: Path, shape: tuple[int, int], dtype: str, rng: np.random.Generator) -> None:
    with path.open("wb") as file:
        for start in range(0, shape[0], 512):
            rows = min(512, shape[0] - start)
            if dtype == "int8":
                block = rng.integers(-128, 128, (rows, shape[1]), np.int8)
            else:
                block = rng.standard_normal((rows, shape[1]), np.float32)
            block.tofile(file)


def speed_rows(sides: list[int], repeats: int, seed: int, progress: Progress) -> list[Row]:
    rows = []
    for number, side in enumerate(sides):
        taken = alone(speed, side=side, repeats=repeats, seed=seed)
        rates = {name: [2e-9 * side**3 / s for s in seconds] for name, seconds in taken.items()}
        for engine, target in (("numba", 0.70), ("blas", 0.85)):
            rows.append(
                Row.from_samples(
                    f"{side}^3 float32, engine {engine}",
                    rates[engine],
                    rates["numpy"],
                    "GFLOP/s",
                    "higher",
                    "numpy (OpenBLAS)",
                    claim="most of the speed of BLAS on an 8 MiB workspace, one thread",
                    target=target,
                )
            )
        progress("speed", number + 1, len(sides))
    return rows


def model_rows() -> list[Row]:
    from sharewell.kernels.aie_model import AieModel

    model = AieModel()
    compared = model.compare()
    errors = [abs(c.error) for c in compared]
    cubes = [
        abs(c.error)
        for c in compared
        if c.published.dtype == "int16" and c.published.m == c.published.k == c.published.n
    ]
    sweep_errors = [
        abs(r.latency_ms / SWEEP_MS[r.dim_a] - 1)
        for r in model.sweep_dim(512, 512, 512, dims=tuple(SWEEP_MS))
    ]
    rows = [
        Row(
            f"board model, {name}",
            100 * error,
            bar,
            "% error",
            "lower",
            "bar",
            claim="the model meets the published board timings",
            target=1.0,
        )
        for name, error, bar in (
            ("median of 22 runs", median(errors), 4.0),
            ("worst of 22 runs", max(errors), 16.0),
            ("worst int16 cube", max(cubes), 8.0),
            ("worst of the DIM sweep", max(sweep_errors), 6.0),
        )
    ]
    report = model.simulate(1024, 1024, 1024)
    board = report.with_latency(3.537)
    saved = model.frugality()
    pairs = (
        ("board model, 1024^3", report.gops, 607.0, "GOPS"),
        ("1024^3 at the board's latency", board.gops_per_w, 56.9, "GOPS/W"),
        ("PAU over ARIES at the board's latency", model.pau(board), 211.2, "x"),
        ("fewer cores than ARIES", saved["cores"], 22.0, "x"),
        ("less power than ARIES", saved["power"], 7.1, "x"),
        ("fewer PLIO than ARIES", saved["plio"], 6.3, "x"),
    )
    rows += [Row(name, ours, paper, unit, "higher", "the paper") for name, ours, paper, unit in pairs]
    return rows


def run(scale: str, *, seed: int, progress: Progress) -> Report:
    full = scale == "full"
    rng = np.random.default_rng(seed)
    rows = speed_rows([1024, 2048] if full else [256], 11 if full else 3, seed, progress)
    extra: dict[str, Any] = {}

    sides = [512, 1024] if full else [128, 256]
    taken = alone(scaling, sides=sides, repeats=11 if full else 3, seed=seed)
    per = {side: [1e12 * s / (2 * side**3) for s in taken[str(side)]] for side in sides}
    rows.append(
        Row.from_samples(
            f"time per operation at {sides[1]}^3",
            per[sides[1]],
            per[sides[0]],
            "ps",
            "lower",
            f"{sides[0]}^3",
            claim="growing in time costs no more per operation",
            target=1 / 1.1,
        )
    )
    swept = alone(sweep, side=512 if full else 128, repeats=2 if full else 1, seed=seed)
    extra["dim_sweep"] = {
        dim: {"ms": 1e3 * median(s), "bytes": swept["bytes"][dim], "board_ms": SWEEP_MS[int(dim)]}
        for dim, s in swept["seconds"].items()
    }
    rows.append(
        Row.from_samples(
            "DIM 128 at 512^3" if full else "DIM 128 at 128^3",
            [1e3 * s for s in swept["seconds"]["128"]],
            [1e3 * s for s in swept["seconds"]["4"]],
            "ms",
            "lower",
            "DIM 4",
            claim="a larger tile is faster",
            target=1.0,
            note="the board: 10.6 times",
        )
    )
    progress("curves", 1, 1)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        extras: dict[str, int] = {}
        cases = [(side, side, "float32", 0) for side in ((256, 1024, 4096) if full else (256, 1024))]
        big = 30_000 if full else 3_000
        cases.append((big, 64, "int8", LIMIT if full else 0))
        for number, (side, width, dtype, limit) in enumerate(cases):
            write_matrix(folder / "a", (side, side), dtype, rng)
            write_matrix(folder / "b", (side, width), dtype, rng)
            said = alone(memory, folder=name, side=side, width=width, dtype=dtype, limit=limit)
            extras[f"{side} x {side} x {width} {dtype}"] = said["extra"]
            if limit and not said["refused"]:
                raise RuntimeError("loading A did not exceed the limit: the memory row shows nothing")
            progress("memory", number + 1, len(cases))
        extra["extra_memory_bytes"] = extras
        rows.append(
            Row(
                "spread of extra memory over sizes",
                (max(extras.values()) - min(extras.values())) / MIB,
                1.0,
                "MiB",
                "lower",
                "bar",
                claim=f"the same memory from 256^3 to a file of {big * big / 1e6:.0f} MB",
                target=1.0,
            )
        )
        rows.append(
            Row(
                f"memory for {big:,} x {big:,} int8 times 64 columns",
                max(extras.values()) / 1e6,
                big * big / 1e6,
                "MB",
                "lower",
                "loading A",
                claim=f"runs where loading A raises MemoryError (RLIMIT_DATA {LIMIT // 10**6} MB)"
                if full
                else "",
            )
        )
        # The int8 files are still there: about as long to read as to multiply.
        for side, width, dtype in (
            (big, 64, "int8"),
            (8192 if full else 1024, 1024 if full else 256, "float32"),
        ):
            if dtype == "float32":
                write_matrix(folder / "a", (side, side), dtype, rng)
                write_matrix(folder / "b", (side, width), dtype, rng)
            taken = alone(disk, folder=name, side=side, width=width, dtype=dtype, repeats=3 if full else 1)
            bound = [max(c, r) for c, r in zip(taken["compute"], taken["read"], strict=True)]
            what = f"{side} x {side} x {width} {dtype} from cold files"
            extra[what] = {key: median(s) for key, s in taken.items()}
            rows.append(
                Row.from_samples(
                    what,
                    taken["prefetch"],
                    bound,
                    "s",
                    "lower",
                    "slower of compute and disk",
                    claim="reading hides behind computing",
                    target=0.8,
                )
            )
            rows.append(
                Row.from_samples(
                    what,
                    taken["prefetch"],
                    taken["no prefetch"],
                    "s",
                    "lower",
                    "without double buffering",
                    claim="without double buffering it is slower",
                    target=1.0,
                )
            )
            progress("disk", 1 + (dtype == "float32"), 2)

        side = 8192 if full else 1024
        write_matrix(folder / "a", (side, side), "float32", rng)
        write_matrix(folder / "b", (side, side), "float32", rng)
        repeats, order = (2 if full else 1), ["numba", "dask"]
        got: dict[str, list[dict[str, float]]] = {who: [] for who in order}
        for turn in range(repeats):
            for who in order[turn % 2 :] + order[: turn % 2]:
                said = alone(on_disk, folder=name, side=side, who=who)
                if said is not None:
                    got[who].append(said)
            progress("dask", turn + 1, repeats)
        for key, metric, unit, scale_by in (
            ("seconds", "time", "s", 1.0),
            ("extra", "extra memory", "MB", 1e-6),
        ):
            theirs = [scale_by * s[key] for s in got["dask"]] or None
            rows.append(
                Row.from_samples(
                    f"{side}^3 float32 on disk, {metric}",
                    [scale_by * s[key] for s in got["numba"]],
                    theirs,
                    unit,
                    "lower",
                    "dask.array, one worker" if theirs else "",
                    claim="faster and smaller than dask's chunks" if theirs else "",
                    target=1.0 if theirs else None,
                    note="" if theirs else "peer not installed",
                )
            )
    rows += model_rows()
    from sharewell.kernels.temporal_triton import available

    if available():
        from .tempus_gpu import gpu_rows

        rows += gpu_rows()
    else:
        extra["gpu"] = "not run: no CUDA device"
    return Report("tempus", "full" if full else "smoke", tuple(rows), environment(), seed, extra)


if __name__ == "__main__":
    print(json.dumps(PARTS[sys.argv[1]](**json.loads(sys.argv[2]))))
