"""The table of systems (``systems.toml``) and the ``sharewell systems`` command that shows it."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import typer

TABLE = Path(__file__).with_name("systems.toml")
_SLUG = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_ARXIV = re.compile(r"\d{4}\.\d{4,5}")


@dataclass(frozen=True)
class System:
    """One row: a published mechanism that lives in ``room``. Raises ValueError naming field and range."""

    slug: str
    name: str
    room: str
    object: str
    paper: str
    year: int
    arxiv: tuple[str, ...]
    claim: str

    def __post_init__(self) -> None:
        def check(ok: bool, field: str, allowed: str) -> None:
            if not ok:
                raise ValueError(
                    f"system {self.slug!r}: {field} must be {allowed}, got {getattr(self, field)!r}"
                )

        for field in ("slug", "name", "room", "object", "paper", "claim"):
            value = getattr(self, field)
            check(isinstance(value, str) and value.strip() == value != "", field, "a non-empty string")
        check(_SLUG.fullmatch(self.slug) is not None, "slug", "lower-case words joined by hyphens")
        check(self.room.isidentifier(), "room", "the name of a package")
        check(type(self.year) is int and 1950 <= self.year <= 2100, "year", "a year in [1950, 2100]")
        valid = all(isinstance(i, str) and _ARXIV.fullmatch(i) for i in self.arxiv)
        check(valid, "arxiv", "a list of ids such as 2309.06180")

    @property
    def module_name(self) -> str:
        """The slug as a Python name: the stem of its benchmark and test."""
        return self.slug.replace("-", "_")


def load_systems(path: Path = TABLE) -> tuple[System, ...]:
    """The rows in the order of the file.

    Raises ValueError for a missing, unknown or wrong field, or a slug used twice.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path.name} is not valid TOML: {error}") from None
    if set(table) != {"system"}:
        raise ValueError(f"{path.name} must hold [[system]] tables only, got {sorted(table)}")
    fields = {field.name for field in dataclasses.fields(System)}
    rows: list[System] = []
    for number, row in enumerate(table["system"], 1):
        if set(row) != fields:
            missing, unknown = sorted(fields - set(row)), sorted(set(row) - fields)
            raise ValueError(f"{path.name}, row {number}: missing fields {missing}, unknown fields {unknown}")
        if not isinstance(row["arxiv"], list):
            raise ValueError(f"{path.name}, row {number}: arxiv must be a list, got {row['arxiv']!r}")
        rows.append(System(**{**row, "arxiv": tuple(row["arxiv"])}))
    slugs = [row.slug for row in rows]
    if twice := sorted({slug for slug in slugs if slugs.count(slug) > 1}):
        raise ValueError(f"{path.name}: slug used twice: {', '.join(twice)}")
    return tuple(rows)


def find_system(slug: str, rows: Sequence[System] | None = None) -> System:
    """The row of ``slug``. Raises ValueError naming what comes close."""
    rows = load_systems() if rows is None else rows
    for row in rows:
        if row.slug == slug:
            return row
    near = get_close_matches(slug, [row.slug for row in rows], n=3)
    hint = f"did you mean {', '.join(near)}?" if near else "run: sharewell systems"
    raise ValueError(f"no system is called {slug!r}; {hint}")


def systems(
    room: Annotated[str | None, typer.Option(help="Only the systems of this room.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the systems, what each lets you share, and the paper behind it.

    Example: sharewell systems --room serving --json
    """
    rows = load_systems()
    if room is not None:
        rooms = sorted({row.room for row in rows})
        rows = tuple(row for row in rows if row.room == room)
        if not rows:
            raise typer.BadParameter(f"must be one of {', '.join(rooms)}, got {room!r}", param_hint="--room")
    if as_json:
        import json

        payload: list[dict[str, Any]] = [dataclasses.asdict(row) for row in rows]
        typer.echo(json.dumps(payload, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("slug", "name", "room", "what is shared", "source", "arXiv")
    for row in rows:
        table.add_row(
            row.slug, row.name, row.room, row.object, f"{row.paper}, {row.year}", "\n".join(row.arxiv) or "-"
        )
    Console().print(table)
