"""Real servers on real weights, each started once for all tests that use it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

_HERE = str(Path(__file__).parent)
if _HERE not in sys.path:  # lets the tests of this folder import running_server
    sys.path.insert(0, _HERE)

from running_server import ORIGIN, RunningServer, serving, write_adapter  # noqa: E402

from sharewell.models import ModelConfig  # noqa: E402
from sharewell.serving.api.keys import StateStore  # noqa: E402
from sharewell.simulation import WallClock  # noqa: E402


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Iterator[RunningServer]:
    """SmolLM2 as ``sharewell serve`` runs it by default, without keys; with an alias, an adapter and CORS."""
    folder = tmp_path_factory.mktemp("server")
    adapter = write_adapter(folder / "pirate", ModelConfig.from_folder(smollm2))
    names = ("--served-model-name", "smollm2", "--served-model-name", "gpt-4o-mini")
    with serving(folder, *names, "--lora", f"pirate={adapter}", "--cors-origin", ORIGIN) as running:
        yield running


@pytest.fixture(scope="session")
def keyed(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Iterator[RunningServer]:
    """SmolLM2 in float32 for the users alice and bob, and carol, who may ask twice a minute."""
    folder = tmp_path_factory.mktemp("keyed")
    store = StateStore(folder / "state.sqlite3", WallClock())
    keys = {name: store.add_key(name) for name in ("alice", "bob")}
    keys["carol"] = store.add_key("carol", requests_per_min=2)
    store.close()
    with serving(folder, "--dtype", "float32", keys=keys) as running:
        yield running


@pytest.fixture
def api(server: RunningServer) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client
