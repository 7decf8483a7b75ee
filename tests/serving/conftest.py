"""Servers for the tests of this folder: real weights, real processes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

_HERE = str(Path(__file__).parent)
if _HERE not in sys.path:
    sys.path.insert(0, _HERE)

from server_process import ServerProcess  # noqa: E402


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Iterator[ServerProcess]:
    """The default server: the format that ``auto`` picks, every core that this process may use."""
    with ServerProcess(tmp_path_factory.mktemp("server"), engine={"kv_cache_bytes": 256 << 20}) as running:
        yield running
