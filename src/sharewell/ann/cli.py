"""``sharewell ann``: build an index from an array of vectors, query it, measure it beside other libraries."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(help="Nearest-neighbour indexes: build, query, bench.", no_args_is_help=True)
MetricOption = Annotated[str, typer.Option(help="cosine, l2 or ip.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _vectors(path: Path, what: str) -> Any:
    """The array in a .npy file, mapped. Raises ValueError naming the file."""
    import numpy as np

    if not path.is_file():
        raise ValueError(f"{what} must be a .npy file that exists, got {path}")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{what}: {path} cannot be read as .npy: {error}") from None
    if array.ndim != 2:
        raise ValueError(f"{what} must have shape [n, dim], {path} has {array.shape}")
    return array


@app.command("build")
def build(
    vectors: Annotated[Path, typer.Argument(help="float array [n, dim] in a .npy file.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Index file to write.")],
    metric: MetricOption = "cosine",
    m: Annotated[int, typer.Option("--m", help="Links a node and layer.")] = 16,
    ef_construction: Annotated[int, typer.Option(help="Candidates kept while inserting.")] = 200,
    storage: Annotated[str, typer.Option(help="float32, or int8 for a quarter of the bytes.")] = "float32",
    threads: Annotated[int | None, typer.Option(min=1, help="Default: all usable cores.")] = None,
    hnswlib: Annotated[bool, typer.Option("--hnswlib", help="Write an hnswlib file.")] = False,
) -> None:
    """Index the rows of an array under their numbers.

    Example: sharewell ann build vectors.npy --out vectors.index --metric cosine
    """
    from rich.console import Console
    from rich.progress import Progress

    from .hnsw import HNSWConfig, HNSWIndex
    from .hnswlib_files import to_hnswlib

    rows = _vectors(vectors, "vectors")
    config = HNSWConfig(
        rows.shape[1],
        metric,  # pyright: ignore[reportArgumentType]
        M=m,
        ef_construction=ef_construction,
        capacity=max(1, len(rows)),
        storage=storage,
        threads=threads,
    )
    index = HNSWIndex(config)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("indexing", total=len(rows))
        for first in range(0, len(rows), 2000):
            part = rows[first : first + 2000]
            index.add(part, range(first, first + len(part)))  # pyright: ignore[reportArgumentType]
            progress.advance(task, len(part))
    to_hnswlib(index, out) if hnswlib else index.save(out)
    typer.echo(f"{out}: {len(index)} vectors of {config.dim} dimensions, {out.stat().st_size / 1e6:.1f} MB")


@app.command("query")
def query(
    index: Annotated[Path, typer.Argument(help="Index file.")],
    queries: Annotated[Path, typer.Argument(help="float array [n, dim] in a .npy file.")],
    k: Annotated[int, typer.Option("--k", "-k", min=1, help="Neighbours of each.")] = 10,
    ef: Annotated[int | None, typer.Option(min=1, help="Candidates; more find more.")] = None,
    exact: Annotated[bool, typer.Option("--exact", help="Look at every vector.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Print the nearest labels of each row of an array.

    Example: sharewell ann query vectors.index queries.npy -k 5
    """
    from .hnsw import HNSWIndex

    found = HNSWIndex.load(index, mmap=True).search(
        _vectors(queries, "queries"), k, ef=ef, strategy="scan" if exact else "auto"
    )
    if as_json:
        rows = {"labels": found.labels.tolist(), "distances": found.distances.tolist()}
        typer.echo(json.dumps(rows | {"strategy": found.strategy}))
        return
    for labels, distances in zip(found.labels.tolist(), found.distances.tolist(), strict=True):
        typer.echo("  ".join(f"{a}:{d:.4g}" for a, d in zip(labels, distances, strict=True) if a >= 0))


@app.command("bench")
def bench(
    vectors: Annotated[Path, typer.Argument(help="float array [n, dim] in a .npy file.")],
    against: Annotated[
        str, typer.Option(help="Comma-separated: hnswlib, faiss, usearch.")
    ] = "hnswlib,faiss,usearch",
    recall: Annotated[str, typer.Option(help="Comma-separated recalls to compare at.")] = "0.9,0.95,0.99",
    metric: MetricOption = "cosine",
    queries: Annotated[int, typer.Option(min=1, help="Rows held back as queries.")] = 500,
    k: Annotated[int, typer.Option("--k", "-k", min=1)] = 10,
    seed: Annotated[int, typer.Option(help="Which rows are queries.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Measure ours beside installed libraries on your vectors: queries a second at equal recall, one thread.

    Example: sharewell ann bench vectors.npy --against hnswlib --recall 0.95
    """
    import numpy as np
    from rich.console import Console
    from rich.table import Table

    from ..bench import cpu_seconds
    from .curves import CONTENDERS, curves, query_seconds_at, truth

    unknown = next((n for n in against.split(",") if n and n not in CONTENDERS), None)
    if unknown is not None:
        raise ValueError(f"against must name hnswlib, faiss or usearch, got {unknown!r}")
    try:
        recalls = [float(r) for r in recall.split(",")]
    except ValueError:
        raise ValueError(f"recall must be numbers such as 0.9,0.95, got {recall!r}") from None
    rows = np.asarray(_vectors(vectors, "vectors"), np.float32)
    if len(rows) <= queries:
        raise ValueError(f"queries must be fewer than the {len(rows)} vectors, got {queries}")
    order = np.random.default_rng(seed).permutation(len(rows))
    asked, kept = rows[order[:queries]], rows[order[queries:]]
    table = Table("library", *(f"q/s at {r:g}" for r in recalls), "build CPU s", "MB")
    contenders, build_s = [], {}
    for name in dict.fromkeys(["sharewell", *filter(None, against.split(","))]):
        if not CONTENDERS[name].installed():
            typer.echo(f"{name} is not installed", err=True)
            continue
        contender = CONTENDERS[name](rows.shape[1], metric, 16, 200)  # pyright: ignore[reportArgumentType]
        if name == "sharewell":
            contender.build(kept[:100])  # compiles
        start = cpu_seconds()
        contender.build(kept)
        build_s[name] = cpu_seconds() - start
        contenders.append(contender)
    measured = curves(contenders, asked, truth(kept, asked, k, metric), cpu_seconds)  # pyright: ignore[reportArgumentType]
    result = {}
    for contender in contenders:
        at = {r: query_seconds_at(measured[contender.name], r) for r in recalls}
        result[contender.name] = {
            "queries_per_s": {str(r): s and 1 / s for r, s in at.items()},
            "build_cpu_s": build_s[contender.name],
            "bytes": contender.nbytes(),
        }
        cells = ["not reached" if s is None else f"{1 / s:,.0f}" for s in at.values()]
        table.add_row(
            contender.name, *cells, f"{build_s[contender.name]:.2f}", f"{contender.nbytes() / 1e6:.1f}"
        )
    if as_json:
        typer.echo(json.dumps(result))
    else:
        Console(file=sys.stdout).print(table)
