"""Small models that ship inside the package: ``assets/<slug>/`` with a ``manifest.toml``."""

from __future__ import annotations

import hashlib
import tomllib
from pathlib import Path
from typing import Any

from .config import ModelError

_ASSETS = Path(__file__).parent / "assets"


def shipped_models() -> dict[str, Path]:
    """Folders of the language models that ship, by name: those with a configuration."""
    return {path.parent.name: path.parent for path in sorted(_ASSETS.glob("*/config.json"))}


def shipped_manifest(slug: str) -> dict[str, Any]:
    """The manifest of a shipped model, every file of which is checked against its sha256.

    Raises ModelError for an unknown name and for a file that differs."""
    folder = _ASSETS / slug
    path = folder / "manifest.toml"
    if not path.is_file():
        raise ModelError(f"shipped model must be one of {', '.join(shipped_models())}, got {slug!r}")
    manifest = tomllib.loads(path.read_text(encoding="utf-8"))
    for entry in manifest.get("file", ()):
        data = (folder / entry["name"]).read_bytes()
        found = hashlib.sha256(data).hexdigest()
        if found != entry["sha256"]:
            raise ModelError(f"sha256 of {slug}/{entry['name']} must be {entry['sha256']}, got {found}")
    return manifest
