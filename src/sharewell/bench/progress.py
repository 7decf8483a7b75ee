"""What a benchmark says while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Progress(Protocol):
    """Called as ``progress(what, done, total)``: ``done`` of ``total`` parts of ``what`` are finished."""

    def __call__(self, what: str, done: float, total: float, /) -> None: ...


def no_progress(what: str, done: float, total: float, /) -> None:
    """Show nothing."""


@contextmanager
def progress_bars() -> Iterator[Progress]:
    """One rich bar for each ``what``, on standard error, gone at the end."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # Drawn only when something is said: a refresh thread would take CPU from what is measured.
    with Bars(*columns, console=Console(stderr=True), transient=True, auto_refresh=False) as bars:
        tasks: dict[str, TaskID] = {}

        def show(what: str, done: float, total: float) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total, refresh=True)

        yield show
