"""Asking a running server how a prompt was computed, and showing it in the terminal."""

from __future__ import annotations

import json
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote
from urllib.request import Request, urlopen

COLOURS = {
    "prefix": "green",
    "computed": "dim",
    "relayed": "blue",
    "deviation": "red",
    "influence": "yellow",
    "edge": "magenta",
}


def fetch(server: str, request_id: str, key: str | None = None, timeout_s: float = 10.0) -> dict[str, Any]:
    """The server's account of a request. Raises ValueError with its words, or for an address where none
    answers."""
    if not server.startswith(("http://", "https://")):
        raise ValueError(f"--server must be an address such as http://127.0.0.1:8000, got {server!r}")
    url = f"{server.rstrip('/')}/v1/sharewell/explain/{quote(request_id, safe='')}"
    request = Request(url, headers={"Authorization": f"Bearer {key}"} if key else {})
    try:
        with urlopen(request, timeout=timeout_s) as answer:
            return json.load(answer)
    except HTTPError as error:
        try:
            why = json.load(error)["error"]["message"]
        except (ValueError, KeyError, TypeError):
            why = str(error)
        raise ValueError(why) from None
    except (URLError, OSError, ValueError) as error:
        raise ValueError(f"no Sharewell server answers at {server}: {error}") from None


def show(found: dict[str, Any]) -> None:
    """Print the prompt coloured by origin, and the counts."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    table = Table("tokens", "share", "what became of them")
    for origin, n in found["tokens"].items():
        what = Text(found["meaning"][origin], style=COLOURS[origin])
        table.add_row(f"{n:,}", f"{n / found['prompt_tokens']:.0%}", what)
    text = Text()
    for span in found["spans"]:
        text.append(span["text"], style=COLOURS[span["origin"]])
    console.print(text)
    console.print(table)
    sources = sorted({s["from"] for s in found["spans"] if s["from"]})
    if sources:
        console.print("earlier answers: " + ", ".join(sources))
    for name, label in (("predicted_kl", "predicted"), ("sampled_kl", "measured")):
        if found[name] is not None:
            console.print(f"{label} divergence from full computation: {found[name]:.3g} nats")
    if found["note"]:
        console.print(found["note"])
