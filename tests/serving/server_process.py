"""The real server in a process of its own, started as ``sharewell serve`` starts it, with every setting of
:class:`ServerConfig` open to a test. ``python server_process.py CONFIG.json`` is that process."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import psutil

ANNOUNCED = re.compile(r"at (http://\S+?:\d+)\b")


class ServerProcess:
    """A running server. ``engine`` and ``settings`` are fields of EngineConfig and ServerConfig."""

    def __init__(self, folder: Path, *, engine: dict[str, Any], **settings: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.log_path = folder / "server.log"
        self.state_path = Path(settings.pop("state_path", folder / "state.sqlite3"))
        plan = {"engine": engine, "port": 0, "state_path": str(self.state_path), "cache": "off", **settings}
        (folder / "config.json").write_text(json.dumps(plan))
        with self.log_path.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(folder / "config.json")],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, "SHAREWELL_LOG": "WARNING"},
            )
        self.url = self._wait_for_address()
        self.client = httpx.Client(base_url=self.url, timeout=120)

    def _wait_for_address(self) -> str:
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline:
            announced = ANNOUNCED.search(self.log)
            if announced:
                return announced[1]
            if self._process.poll() is not None:
                raise RuntimeError(f"the server ended with code {self._process.returncode}:\n{self.log}")
            time.sleep(0.05)
        self.kill()
        raise RuntimeError(f"the server did not start:\n{self.log}")

    @property
    def log(self) -> str:
        """What the server has said."""
        return self.log_path.read_text("utf-8", "replace")

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        parts = httpx.URL(self.url)
        return parts.host, parts.port or 80

    def engine_pid(self) -> int:
        """Process id of the engine as it is now."""
        children = psutil.Process(self.pid).children()
        (engine,) = [c.pid for c in children if c.status() != psutil.STATUS_ZOMBIE]
        return engine

    def stats(self) -> dict[str, Any]:
        """GET /stats."""
        return self.client.get("/stats").raise_for_status().json()

    def engine(self) -> dict[str, Any]:
        """The engine's part of it."""
        return self.stats()["engine"]

    def memory_bytes(self) -> int:
        """Resident memory of the API process."""
        return psutil.Process(self.pid).memory_info().rss

    def answer(self, prompt: str | list[int], max_tokens: int, **fields: Any) -> dict[str, Any]:
        """POST /v1/completions, greedily unless told otherwise; the whole answer."""
        body = {"model": "smollm2", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, **fields}
        return self.client.post("/v1/completions", json=body).raise_for_status().json()

    def interrupt(self, number: int = signal.SIGTERM) -> None:
        """Send a signal to the API process."""
        self._process.send_signal(number)

    def wait(self, timeout_s: float = 60) -> int:
        """The exit code."""
        return self._process.wait(timeout_s)

    def stop(self) -> int:
        """End the server as an operator would; its exit code."""
        self.client.close()
        if self._process.poll() is None:
            self.interrupt()
            with contextlib.suppress(subprocess.TimeoutExpired):
                return self.wait()
            self.kill()
        return self._process.returncode

    def kill(self) -> None:
        """End it as the kernel's memory killer would."""
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def stream(
    client: httpx.Client, prompt: str | list[int], max_tokens: int, **fields: Any
) -> Generator[dict[str, Any], None, None]:
    """The events of a streamed completion, greedy unless told otherwise, up to ``[DONE]``."""
    body = {"model": "smollm2", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, **fields}
    with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
        if answer.status_code != 200:
            answer.read()
            answer.raise_for_status()
        for line in answer.iter_lines():
            if line == "data: [DONE]":
                return
            if line.startswith("data: "):
                yield json.loads(line[6:])


def main() -> None:
    """Serve as ``sharewell serve`` does."""
    import logging

    from sharewell.serving.api.app import create_app
    from sharewell.serving.api.config import ServerConfig
    from sharewell.serving.api.server import bind, run
    from sharewell.serving.core.config import EngineConfig

    logging.basicConfig(level="WARNING", format="%(levelname)s %(name)s: %(message)s")
    plan = json.loads(Path(sys.argv[1]).read_text())
    engine = EngineConfig(**plan.pop("engine"))
    config = ServerConfig(engine=engine, **{**plan, "state_path": Path(plan["state_path"])})
    listener = bind(config)
    run(config, create_app(config), listener, announce=lambda line: print(line, flush=True))


if __name__ == "__main__":
    main()
