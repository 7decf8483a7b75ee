"""Server processes that take turns: all but the one that is measured stand still (SIGSTOP)."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

START_TIMEOUT_S = 300.0


class ServerFailed(RuntimeError):
    """A server ended, or did not answer in time; the message holds the end of its log."""


@dataclass(frozen=True)
class Usage:
    """What a process and its descendants took: CPU seconds so far, and peak resident memory.

    The peaks of several processes are added up, which counts pages that they share more than once.
    """

    cpu_s: float
    peak_bytes: int


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class Group:
    """A command with its children in a process group of their own, with a log file."""

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], log: Path, **pipes: Any
    ) -> None:
        self.log = log
        self.started = time.perf_counter()
        with log.open("ab") as out:
            self.process = subprocess.Popen(
                command,
                env={**os.environ, **environment},
                stdout=pipes.get("stdout", out),
                stdin=pipes.get("stdin", subprocess.DEVNULL),
                stderr=out,
                start_new_session=True,
                preexec_fn=_die_with_parent,  # noqa: PLW1509 - no threads here, and a benchmark that is killed leaves no server behind
            )
        self._stopped = self._ended = False

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def pause(self) -> None:
        """Let it stand still: an idle peer must not burn the CPU of the one that is measured."""
        self._stopped = True
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        if self._stopped:
            self._stopped = False
            self._signal(signal.SIGCONT)

    def usage(self) -> Usage:
        """Of the process and all its living descendants."""
        cpu, peak = 0.0, 0
        with contextlib.suppress(psutil.Error):
            root = psutil.Process(self.process.pid)
            for process in (root, *root.children(recursive=True)):
                with contextlib.suppress(psutil.Error):
                    times = process.cpu_times()
                    cpu += times.user + times.system + getattr(times, "children_user", 0.0)
                    cpu += getattr(times, "children_system", 0.0)
                    peak += _high_water_bytes(process)
        return Usage(cpu, peak)

    def tail(self, lines: int = 15) -> str:
        """The end of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def stop(self) -> None:
        """End it and everything it started; again does nothing."""
        if self._ended:
            return
        self._ended = True
        self.resume()
        self._signal(signal.SIGTERM)
        try:
            self.process.wait(8)
        except subprocess.TimeoutExpired:
            pass
        self._signal(signal.SIGKILL)
        self.process.wait()


def _high_water_bytes(process: psutil.Process) -> int:
    for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return process.memory_info().rss


@dataclass(frozen=True)
class Launch:
    """How to start a server of OpenAI's protocol. ``{port}`` in the command becomes the port."""

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    model: str = "smollm2"


class Server:
    """A running server. Use as a context manager; it stands still except inside :meth:`turn`."""

    def __init__(self, launch: Launch, logs: Path) -> None:
        self.launch, self._logs = launch, logs
        self.url = ""

    def __enter__(self) -> Server:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        command = [part.replace("{port}", str(port)) for part in self.launch.command]
        self.group = Group(command, self.launch.environment, self._logs / f"{self.launch.name}.log")
        try:
            self._wait()
        except BaseException:
            self.group.stop()
            raise
        return self

    def _wait(self) -> None:
        """Until it is healthy. Raises ServerFailed."""
        deadline = time.perf_counter() + START_TIMEOUT_S
        with httpx.Client(timeout=2) as client:
            while time.perf_counter() < deadline:
                if self.group.process.poll() is not None:
                    raise ServerFailed(f"{self.launch.name} ended:\n{self.group.tail()}")
                with contextlib.suppress(httpx.TransportError):
                    if client.get(f"{self.url}/health").status_code == 200:
                        return
                time.sleep(0.05)
        raise ServerFailed(f"{self.launch.name} was not ready in {START_TIMEOUT_S} s:\n{self.group.tail()}")

    def __exit__(self, *_: object) -> None:
        self.group.stop()

    @contextlib.contextmanager
    def turn(self) -> Iterator[Server]:
        """Running inside, standing still outside."""
        self.group.resume()
        time.sleep(0.1)  # what waited while it stood still (heartbeats) is done before the clock starts
        try:
            yield self
        finally:
            self.group.pause()
