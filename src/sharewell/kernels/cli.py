"""``sharewell gemm``: plan, run and measure products on a fixed workspace; the model of the paper's board."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import numpy as np

app = typer.Typer(help="Products of any size on a fixed workspace.", no_args_is_help=True)

_UNITS = {
    "": 1,
    "b": 1,
    "kb": 1000,
    "mb": 1000**2,
    "gb": 1000**3,
    "kib": 1 << 10,
    "mib": 1 << 20,
    "gib": 1 << 30,
}

Rows = Annotated[int, typer.Option("--m", min=1, help="Rows of A.")]
Columns = Annotated[int, typer.Option("--n", min=1, help="Columns of B.")]
Depth = Annotated[int, typer.Option("--k", min=1, help="Columns of A, rows of B.")]
WorkspaceSize = Annotated[str, typer.Option("--workspace", help="Memory it may use: 8MiB, 64MB, 500000.")]
Programs = Annotated[
    int, typer.Option("--programs", min=1, max=4096, help="CUDA only: programs that run at once.")
]
Threads = Annotated[int, typer.Option("--threads", min=1, max=1024, help="Threads that compute.")]
Engine = Annotated[str, typer.Option("--engine", help="numba or blas.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def parse_bytes(text: str) -> int:
    """Bytes of "8MiB", "64MB" or "500000". Raises ValueError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]*)", text.strip())
    if match is None or match[2].lower() not in _UNITS or float(match[1]) <= 0:
        raise ValueError(f"a size must be a number with B, KB, MB, GB, KiB, MiB or GiB, got {text!r}")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def _config(workspace: str, threads: int, engine: str, programs: int = 16, **more: Any) -> Any:
    from .temporal_plan import TemporalGemmConfig

    settings: dict[str, Any] = {
        "workspace_bytes": parse_bytes(workspace),
        "threads": threads,
        "engine": engine,
    }
    return TemporalGemmConfig(programs=programs, **settings, **more)


@app.command()
def plan(
    m: Rows = 1024,
    n: Columns = 1024,
    k: Depth = 1024,
    dtype: Annotated[str, typer.Option(help="Element type of A and B.")] = "float32",
    workspace: WorkspaceSize = "8MiB",
    threads: Threads = 1,
    engine: Engine = "numba",
    programs: Programs = 16,
    as_json: AsJson = False,
) -> None:
    """Show the tiles, order and traffic of a product, and how long it should take here.

    Example: sharewell gemm plan --m 30000 --n 64 --k 30000 --dtype int8 --workspace 8MB
    """
    from .temporal_gemm import TemporalGemm, measure_rates

    cfg = _config(workspace, threads, engine, programs)
    try:
        made = TemporalGemm(cfg, measure_rates(cfg.engine)).plan(m, n, k, dtype)
    except TypeError as error:
        raise ValueError(str(error)) from None
    if as_json:
        typer.echo(json.dumps(made.to_dict()))
        return
    typer.echo(f"{m} x {k} @ {k} x {n} of {dtype}, summed in {made.types.accumulator}")
    typer.echo(
        f"  tile        {' x '.join(map(str, made.tile))} (m, n, k), {made.iterations} steps, "
        f"order {made.order}"
    )
    typer.echo(f"  workspace   {made.workspace_bytes:,} of {cfg.workspace_bytes:,} bytes")
    for name, moved in (("A", made.bytes_a), ("B", made.bytes_b), ("C", made.bytes_c)):
        typer.echo(f"  moves {name}     {moved:,} bytes")
    typer.echo(
        f"  predicted   {made.predicted_s:.3g} s ({2 * m * n * k / made.predicted_s / 1e9:.1f} GFLOP/s)"
    )


def _open(text: str) -> Any:
    """A .npy file memory-mapped, or ``file.safetensors:name``."""
    import numpy as np

    from .temporal_operands import open_safetensors

    name, _, tensor = text.partition(".safetensors:")
    if tensor:
        return open_safetensors(f"{name}.safetensors", tensor)
    if not text.endswith(".npy"):
        raise ValueError(f"a matrix must be FILE.npy or FILE.safetensors:NAME, got {text!r}")
    try:
        return np.load(text, mmap_mode="r")
    except (EOFError, ValueError) as error:
        raise ValueError(f"{text} is no .npy file that can be mapped: {error}") from None


def _create(path: Path, shape: tuple[int, int], dtype: str, resume: Path) -> np.memmap:
    import numpy as np

    if resume.exists() and path.exists():
        out = np.load(path, mmap_mode="r+")
        if isinstance(out, np.memmap) and (out.shape, out.dtype.name) == (shape, dtype):
            return out
    resume.unlink(missing_ok=True)
    return np.lib.format.open_memmap(path, "w+", dtype=dtype, shape=shape)


@app.command()
def run(
    a: Annotated[str, typer.Argument(help="A: FILE.npy or FILE.safetensors:NAME.")],
    b: Annotated[str, typer.Argument(help="B, likewise.")],
    out: Annotated[Path, typer.Argument(help="FILE.npy to write A @ B to.")],
    workspace: WorkspaceSize = "8MiB",
    threads: Threads = 1,
    engine: Engine = "numba",
    acc: Annotated[str, typer.Option(help="Accumulator: auto, float32, float64, int32, int64.")] = "auto",
    transpose_b: Annotated[bool, typer.Option("--transpose-b", help="Multiply by B transposed.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
    as_json: AsJson = False,
) -> None:
    """Multiply two matrices that lie on disk, within a fixed workspace; neither is loaded.

    An interrupted run goes on where it stopped when it is called again: OUT.resume remembers which tiles are
    done.

    Example: sharewell gemm run a.npy b.npy c.npy --workspace 64MB
    """
    from ..bench import no_progress, progress_bars
    from .temporal_gemm import TemporalGemm
    from .temporal_operands import as_operand, transposed

    cfg = _config(workspace, threads, engine, dtype_acc=acc)
    if out.suffix != ".npy":
        raise ValueError(f"OUT must be a .npy file, got {str(out)!r}")
    try:
        left, right = as_operand(_open(a), "A"), as_operand(_open(b), "B")
        right = transposed(right) if transpose_b else right
        (m, k), (k_b, n) = left.shape, right.shape
        if k != k_b:
            raise ValueError(f"inner dimensions of A and B must be equal, got shapes {(m, k)} and {(k_b, n)}")
        gemm = TemporalGemm(cfg)
        types = gemm.types(left.element, right.element, k)
        stored = "float32" if types.result == "bfloat16" else types.result  # .npy has no bfloat16
        resume = out.with_name(f"{out.name}.resume")
        target = _create(out, (m, n), stored, resume)
        if quiet or as_json:
            gemm(left, right, target, resume=resume, progress=no_progress)
        else:
            with progress_bars() as progress:
                gemm(left, right, target, resume=resume, progress=progress)
    except (TypeError, OverflowError) as error:
        raise ValueError(str(error)) from None
    stats = gemm.stats
    assert stats is not None
    if as_json:
        typer.echo(json.dumps({"out": str(out), "shape": [m, n], "dtype": stored, **stats.to_dict()}))
        return
    typer.echo(
        f"{out}: {m} x {n} {stored}; moved {stats.bytes_moved:,} bytes "
        f"on a workspace of {stats.peak_workspace:,}"
        + (f", {stats.tiles_resumed} tiles were there already" if stats.tiles_resumed else "")
    )


@app.command()
def bench(
    m: Rows = 1024,
    n: Columns = 1024,
    k: Depth = 1024,
    dtype: Annotated[str, typer.Option(help="float32 or float64.")] = "float32",
    workspace: WorkspaceSize = "8MiB",
    threads: Threads = 1,
    engine: Engine = "numba",
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each.")] = 7,
    seed: Annotated[int, typer.Option(help="Of the matrices.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Time one product beside numpy's, in turns.

    Example: sharewell gemm bench --m 2048 --n 2048 --k 2048
    """
    import numpy as np

    from ..bench import interleave, median, values
    from .temporal_gemm import TemporalGemm

    if dtype not in ("float32", "float64"):
        raise ValueError(f"--dtype must be float32 or float64, got {dtype!r}")
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((m, k)).astype(dtype)
    b = rng.standard_normal((k, n)).astype(dtype)
    gemm = TemporalGemm(_config(workspace, threads, engine))
    ours, theirs = np.empty((m, n), dtype), np.empty((m, n), dtype)
    samples = interleave(
        {"sharewell": lambda: gemm(a, b, ours), "numpy": lambda: np.matmul(a, b, out=theirs)}, repeats=repeats
    )
    seconds = {name: median(values(taken)) for name, taken in samples.items()}
    rates = {name: 2e-9 * m * n * k / s for name, s in seconds.items()}
    result = {
        "seconds": seconds,
        "gflops": rates,
        "ratio": seconds["numpy"] / seconds["sharewell"],
        "workspace_bytes": gemm.stats.peak_workspace if gemm.stats else 0,
    }
    if as_json:
        typer.echo(json.dumps(result))
        return
    for name in seconds:
        typer.echo(f"{name:10} {seconds[name] * 1e3:10.2f} ms  {rates[name]:8.1f} GFLOP/s")
    typer.echo(f"{result['ratio']:.2f} x numpy's speed on a workspace of {result['workspace_bytes']:,} bytes")


@app.command()
def aie(
    m: Rows = 1024,
    k: Depth = 1024,
    n: Columns = 1024,
    dtype: Annotated[str, typer.Option(help="int16 or int32.")] = "int16",
    dim: Annotated[int, typer.Option(min=1, max=128, help="Requested tile edge.")] = 64,
    table: Annotated[bool, typer.Option("--table", help="All published runs beside the model.")] = False,
    csv: Annotated[
        Path | None, typer.Option(help="Your own board timings: calibrates the model on them.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Predict the Tempus design on a Versal AI Edge board, or print the model beside the published timings.

    Example: sharewell gemm aie --table
    """
    from dataclasses import asdict

    from .aie_model import AieModel, board_timings

    model = AieModel() if csv is None else AieModel().calibrate(csv)
    if not table:
        report = model.simulate(m, k, n, dtype, dim)
        if as_json:
            typer.echo(
                json.dumps(
                    {**asdict(report), "gops_per_w": report.gops_per_w, "pau_ratio": model.pau(report)}
                )
            )
            return
        typer.echo(
            f"{m} x {k} @ {k} x {n} {dtype}, DIM {report.dim_a} x {report.dim_b}: "
            f"{report.latency_ms:.3f} ms, "
            f"{report.gops:.0f} GOPS, {report.gops_per_w:.1f} GOPS/W, bound by {report.bound}"
        )
        return
    rows = model.compare(board_timings(csv))
    if as_json:
        typer.echo(
            json.dumps(
                [
                    {"published": asdict(r.published), "model_ms": r.model.compute_ms, "error": r.error}
                    for r in rows
                ]
            )
        )
        return
    from rich.console import Console
    from rich.table import Table

    shown = Table("M x K x N", "DIM", "type", "published ms", "model ms", "error", "bound by")
    for row in rows:
        run_, report = row.published, row.model
        shown.add_row(
            f"{run_.m} x {run_.k} x {run_.n}", f"{run_.dim_a} x {run_.dim_b}", run_.dtype,
            f"{run_.compute_ms:.3f}",
            f"{report.compute_ms:.3f}", f"{row.error:+.1%}", report.bound,
        )  # fmt: skip
    Console().print(shown)
    best, saved = model.simulate(1024, 1024, 1024), model.frugality()
    board = best.with_latency(3.537)
    typer.echo(
        f"1024^3 int16, GOPS: board {board.gops:.0f}, model {best.gops:.0f}; "
        f"{best.plio} PLIO, no URAM, no DSP"
    )
    typer.echo(f"at the board's latency: {board.gops_per_w:.1f} GOPS/W, {board.gops_per_core:.1f} GOPS/core")
    typer.echo(
        f"times better than ARIES: PAU {model.pau(board):.1f} (paper 211.2), "
        f"cores {saved['cores']:.1f} (22.0), "
        f"power {saved['power']:.1f} (7.1), PLIO {saved['plio']:.1f} (6.3)"
    )
