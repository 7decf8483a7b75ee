"""Text that every Python installation has: the standard library's modules and the language reference.

Small language models are trained and measured on it, so that nothing is downloaded. It differs a little from
one Python version to the next."""

from __future__ import annotations

import hashlib
import sysconfig
from importlib import import_module
from pathlib import Path
from typing import Literal

_HELD_OUT = 10  # one document of so many


def python_text(part: Literal["train", "held-out"], limit_bytes: int | None = None) -> bytes:
    """UTF-8 text of the top-level modules of the standard library and of pydoc's topics, shuffled by the hash
    of their names; a tenth of the documents is held out. The licence of the text is Python's (PSF-2.0)."""
    if part not in ("train", "held-out"):
        raise ValueError(f"part must be train or held-out, got {part!r}")
    documents = {
        f"{path.name}": path.read_bytes() for path in Path(sysconfig.get_path("stdlib")).glob("*.py")
    }
    topics = import_module("pydoc_data.topics").topics
    documents |= {f"topic {name}": text.encode() for name, text in topics.items()}
    order = sorted(documents, key=lambda name: hashlib.sha256(name.encode()).digest())
    chosen = [
        documents[name]
        for name in order
        if (hashlib.sha256(name.encode()).digest()[-1] % _HELD_OUT == 0) == (part == "held-out")
    ]
    text = b"\n".join(chosen)
    return text if limit_bytes is None else text[:limit_bytes]
