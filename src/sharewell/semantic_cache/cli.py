"""``sharewell cache``: what a cache file holds and saves, its thresholds, and forgetting."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .audit.cli import audit

if TYPE_CHECKING:
    from .cache import SemanticCache

app = typer.Typer(help="The answer cache: report, calibrate, invalidate, audit.", no_args_is_help=True)
app.command("audit")(audit)
CacheOption = Annotated[
    Path | None, typer.Option("--cache", help="Cache file; default: the one of `sharewell serve`.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_AGE = re.compile(r"(\d+(?:\.\d+)?)\s*([smhd]?)")
_SECONDS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}


def default_path() -> Path:
    """Beside the server's state file."""
    import os

    from platformdirs import user_data_path

    state = Path(os.environ.get("SHAREWELL_STATE") or user_data_path("sharewell") / "server.sqlite3")
    return state.with_name("answers.sqlite3")


def _opened(path: Path | None, *, embedder: bool = False) -> SemanticCache:
    """The cache in a file that exists. Raises ValueError."""
    from ..models import load_embedder
    from .cache import SemanticCache

    path = path or default_path()
    if not path.is_file():
        raise ValueError(f"--cache must be a cache file that exists, got {path}")
    cache = SemanticCache(path, load_embedder("minilm", 1) if embedder else None)
    if cache.fault:
        raise ValueError(f"--cache: {cache.fault}")
    return cache


@app.command("report")
def report(cache: CacheOption = None, as_json: JsonOption = False) -> None:
    """Entries, hits and seconds saved per category, of all servers that use the file.

    Example: sharewell cache report --json
    """
    with _opened(cache) as opened:
        figures = opened.report()
    if as_json:
        typer.echo(json.dumps(figures, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table()
    table.add_column("category", no_wrap=True)
    for title in ("entries", "lookups", "hits", "exact", "in other words", "wrong", "saved", "threshold"):
        table.add_column(title)
    for name, row in figures["categories"].items():
        wrong = "not judged" if row["wrong_rate"] is None else f"{row['wrong_rate']:.1%} of {row['judged']}"
        threshold = "exact only" if row["threshold"] is None else f"{row['threshold']:g}"
        table.add_row(
            name, str(row["entries"]), str(row["lookups"]), f"{row['hit_rate']:.1%}", str(row["exact_hits"]),
            str(row["semantic_hits"]), wrong, f"{row['saved_s']:.1f} s", threshold,
        )  # fmt: skip
    console = Console()
    console.print(table)
    console.print(f"{figures['entries']} answers")


def _pairs(path: Path) -> list[tuple[str, str, bool]]:
    """Lines of {"question", "cached", "same"}. Raises ValueError naming the line."""
    out = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            pair = (row["question"], row["cached"], row["same"])
            if not (isinstance(pair[0], str) and isinstance(pair[1], str) and isinstance(pair[2], bool)):
                raise TypeError
        except (ValueError, TypeError, KeyError):
            raise ValueError(
                f'{path.name} line {number} must be like {{"question": "...", "cached": "...", "same": true}}'
            ) from None
        out.append(pair)
    if not out:
        raise ValueError(f"{path.name} holds no pair")
    return out


@app.command("calibrate")
def calibrate(
    pairs: Annotated[
        Path, typer.Argument(help='JSON lines: {"question": ..., "cached": ..., "same": true or false}.')
    ],
    cache: CacheOption = None,
    category: Annotated[str | None, typer.Option(help="Take all pairs as this category's.")] = None,
    max_wrong: Annotated[
        float | None, typer.Option(help="Wrong hits allowed, such as 0.02; default: each category's own.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print, but change nothing.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Choose each category's threshold from judged pairs, with a bound on wrong hits, kept in the file.

    A category without enough pairs to certify is left with its exact tier only.

    Example: sharewell cache calibrate judged.jsonl --max-wrong 0.02
    """
    from dataclasses import asdict, replace

    if not pairs.is_file():
        raise ValueError(f"pairs must be a file that exists, got {pairs}")
    given = _pairs(pairs)
    with _opened(cache, embedder=True) as opened:
        if category is not None and category not in opened.policies:
            raise ValueError(
                f"--category must be one of {', '.join(sorted(opened.policies))}, got {category!r}"
            )
        if max_wrong is not None:
            for name, policy in opened.policies.items():
                opened.policies[name] = replace(policy, max_wrong=max_wrong)
        found = opened.calibrate(given, category=category, apply=not dry_run)
    if as_json:
        typer.echo(json.dumps({name: asdict(result) for name, result in found.items()}, indent=2))
        return
    for name, result in sorted(found.items()):
        if result.threshold is None:
            typer.echo(f"{name}: exact only ({result.reason})")
        else:
            bound = f"{result.wrong} of {result.hits} wrong, at most {result.bound:.1%} with 95 % confidence"
            typer.echo(f"{name}: {result.threshold:g} ({bound})")


@app.command("invalidate")
def invalidate(
    cache: CacheOption = None,
    text: Annotated[str | None, typer.Option(help="Answers to this question.")] = None,
    similar: Annotated[
        float | None, typer.Option(help="With --text: also to questions within this cosine of it.")
    ] = None,
    owner: Annotated[
        str | None, typer.Option(help='Answers to one key; "key 3" is the key with id 3.')
    ] = None,
    category: Annotated[str | None, typer.Option(help="Answers of one category.")] = None,
    older_than: Annotated[
        str | None, typer.Option(help="Older answers than this, such as 90s, 15m, 2h, 7d.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All answers.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Forget answers that meet every condition given. Servers stop giving them at once.

    Example: sharewell cache invalidate --category live --older-than 15m
    """
    conditions: dict[str, Any] = {"text": text, "owner": owner, "category": category}
    if older_than is not None:
        age = _AGE.fullmatch(older_than.strip())
        if age is None:
            raise ValueError(f"--older-than must be like 90s, 15m, 2h or 7d, got {older_than!r}")
        conditions["older_than_s"] = float(age[1]) * _SECONDS[age[2]]
    if everything:
        conditions["older_than_s"] = -1e12  # also what a clock that ran ahead dated
    with _opened(cache, embedder=similar is not None) as opened:
        gone = opened.invalidate(similar=similar, **conditions)
    typer.echo(json.dumps({"removed": gone}) if as_json else f"removed {gone} answers")
