"""The four texts of the room's benchmarks, as Debian ships them.

They are read from the folder named by SHAREWELL_CORPORA, which `sh benchmarks/coding/fetch_corpora.sh
FOLDER` fills; without it there are only Python's own sources."""

from __future__ import annotations

import gzip
import os
import subprocess
import sysconfig
from pathlib import Path


def folder() -> Path | None:
    """Where the unpacked packages are, or None."""
    named = os.environ.get("SHAREWELL_CORPORA", "")
    path = Path(named) if named else Path.home() / ".cache" / "sharewell-corpora"
    return path / "x" if (path / "x").is_dir() else None


def python_sources() -> bytes:
    """All modules of the standard library and its packages, in order of their names; tests and others left
    out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
    paths = [p for p in root.rglob("*.py") if not skipped & set(p.relative_to(root).parts)]
    return b"".join(p.read_bytes() for p in sorted(paths))


def linux_doc() -> bytes | None:
    """The kernel's documentation in reStructuredText, sorted by path and concatenated."""
    home = folder()
    paths = sorted((home / "linux-doc-6.1").rglob("*.rst.txt*")) if home else []
    if not paths:
        return None
    return b"".join(gzip.decompress(p.read_bytes()) if p.suffix == ".gz" else p.read_bytes() for p in paths)


def gcide() -> bytes | None:
    """The GNU Collaborative International Dictionary of English."""
    home = folder()
    path = home / "dict-gcide/usr/share/dictd/gcide.dict.dz" if home else None
    return gzip.decompress(path.read_bytes()) if path and path.is_file() else None


def bible() -> bytes | None:
    """The King James Bible, as the package's own reader prints it."""
    home = folder()
    program = home / "bible-kjv/usr/bin/bible" if home else None
    data = home / "bible-kjv-text/usr/lib" if home else None
    if program is None or data is None or not program.is_file():
        return None
    command = [str(program), "-d", "bible.data", "gen1:1-rev22:21"]
    done = subprocess.run(
        command, cwd=data, capture_output=True, check=False, timeout=60, env={"COLUMNS": "80"}
    )
    return done.stdout or None


def corpora() -> dict[str, bytes]:
    """Every corpus that is there, by name."""
    found = {
        "linux-doc-6.1": linux_doc(),
        "dict-gcide": gcide(),
        "bible-kjv": bible(),
        "python-stdlib": python_sources(),
    }
    return {name: data for name, data in found.items() if data}
