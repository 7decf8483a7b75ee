"""The ``sharewell`` command: one app, whose rooms' commands load only when they are called.

``sharewell --help`` lists every group from :data:`COMMANDS` without importing one of them, so that help and
completion stay fast however heavy a room is. A mistake of the user ends in one line and exit code 2; set
``SHAREWELL_DEBUG=1`` to see the traceback behind it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup


@dataclass(frozen=True)
class LazyCommand:
    """Where a command lives: ``attribute`` of ``module`` is a Typer app (a group) or a function."""

    name: str
    module: str
    attribute: str
    help: str
    extra: str | None = None  # what to install when an import fails

    def load(self) -> Any:
        """Import the room and build the command (a click-like Command or Group)."""
        target = getattr(import_module(self.module), self.attribute)
        if isinstance(target, typer.Typer):
            command = typer.main.get_group(target)
        else:
            single = typer.Typer(add_completion=False)
            single.command(self.name)(target)
            command = typer.main.get_command(single)
        command.name = self.name
        return command


COMMANDS = (
    LazyCommand("serve", "sharewell.serving.cli", "serve", "Serve a model to OpenAI clients.", "serving"),
    LazyCommand("keys", "sharewell.serving.cli", "keys_app", "Add, list and revoke API keys.", "serving"),
    LazyCommand("models", "sharewell.models.cli", "app", "Pull, list and export models.", "models"),
    LazyCommand("kv", "sharewell.kv.cli", "app", "Keys and values: what sharing saves and costs.", "kv"),
    LazyCommand(
        "cache",
        "sharewell.semantic_cache.cli",
        "app",
        "Answers kept: report, audit, forget.",
        "semantic_cache",
    ),
    LazyCommand("ann", "sharewell.ann.cli", "app", "Nearest neighbours: build, query, bench.", "ann"),
    LazyCommand(
        "waterfill", "sharewell.allocation.cli", "waterfill", "Share a budget over channels.", "allocation"
    ),
    LazyCommand(
        "auction", "sharewell.allocation.cli", "auction_app", "Place requests on machines.", "allocation"
    ),
    LazyCommand(
        "grank", "sharewell.allocation.cli", "grank_app", "Rank by the clicks of peers.", "allocation"
    ),
    LazyCommand("qtc", "sharewell.coding.cli", "qtc_app", "Compress text without loss.", "coding"),
    LazyCommand("mec", "sharewell.coding.cli", "mec_app", "Couple distributions, hide messages.", "coding"),
    LazyCommand("gemm", "sharewell.kernels.cli", "app", "Products on a fixed workspace.", "kernels"),
    LazyCommand(
        "tad", "sharewell.perception.cli", "app", "Actions in videos: extract, train, export.", "perception"
    ),
    LazyCommand(
        "detect", "sharewell.perception.cli", "detect", "Find what happens when in a video.", "perception"
    ),
    LazyCommand("bench", "sharewell.bench.cli", "bench", "Measure a system beside its baseline."),
    LazyCommand("systems", "sharewell.systems", "systems", "List the systems and the papers behind them."),
)


class LazyGroup(TyperGroup):
    """A group that knows its commands by name and one line of help, and imports one only to run it."""

    lazy: dict[str, LazyCommand]

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.lazy = {command.name: command for command in COMMANDS}
        for command in COMMANDS:  # stands in for the command in help, completion and spelling suggestions
            self.commands[command.name] = TyperCommand(command.name, help=command.help)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        return name, self.lazy[name].load() if name in self.lazy else command, rest


app = typer.Typer(
    name="sharewell",
    cls=LazyGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Share what AI systems recompute, resend and store again, under budgets that you set.",
    epilog="Start here: sharewell serve   (then point any OpenAI client at http://localhost:8000/v1)",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from . import __version__

        typer.echo(f"sharewell {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Share what AI systems recompute, resend and store again, under budgets that you set."""


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 1 (it failed), 2 (wrong use), 130 (interrupted)."""
    arguments = list(sys.argv[1:] if args is None else args)
    try:
        code = typer.main.get_command(app).main(arguments, prog_name="sharewell", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except typer.TyperException as error:
        message = error.format_message()
        return _fail(message, error.exit_code) if message else error.exit_code  # empty: the help was printed
    except typer.Abort:
        return _fail("aborted", 130)
    except KeyboardInterrupt:
        return 130
    except ModuleNotFoundError as error:
        if _debugging() or (error.name or "").startswith("sharewell"):
            raise
        extra = next((c.extra for c in COMMANDS if arguments and c.name == arguments[0]), None) or "all"
        return _fail(f"{error.name} is not installed; run: pip install 'sharewell[{extra}]'", 2)
    except (ValueError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
        # The configs validate themselves and raise ValueError with the field and its range.
        if _debugging():
            raise
        return _fail(str(error), 2)


def _debugging() -> bool:
    return os.environ.get("SHAREWELL_DEBUG", "") not in ("", "0")


def _fail(message: str, code: int) -> int:
    print("error:", " ".join(message.split()), file=sys.stderr)  # noqa: T201
    return code


if __name__ == "__main__":
    raise SystemExit(main())
