"""Ours, as a user starts it: `sharewell serve` over HTTP."""

from __future__ import annotations

import sys
from pathlib import Path

from .processes import Launch


def sharewell_launch(
    name: str, threads: int, state: Path, *, dtype: str = "auto", prefix_sharing: bool = True
) -> Launch:
    """``name``: of the log. ``state``: folder for the server's SQLite file."""
    command = [
        sys.executable, "-m", "sharewell", "serve", "smollm2", "--port", "{port}", "--dtype", dtype,
        "--threads", str(threads), "--cache", "off",  # repeated prompts are to be computed
    ]  # fmt: skip
    if not prefix_sharing:
        command.append("--no-prefix-sharing")
    return Launch(name, tuple(command), {"SHAREWELL_STATE": str(state / f"{name}.sqlite3")})
