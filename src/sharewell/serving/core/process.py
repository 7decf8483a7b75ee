"""The engine seen from asyncio: requests in, streams of tokens out, and a new engine when one dies.

The engine runs in a process of its own behind a socket; nothing here blocks. Every live request keeps its prompt and
the tokens that it has produced, so after a death the requests go on in the next process from where they were.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

from ...simulation import Clock, WallClock
from .config import EngineConfig
from .cores import CompetitionMonitor, thread_environment, usable_cores
from .engine import EngineCore, QueueFull, Refused
from .host import ADAPTER, CANCEL, CLOSE, FAILED, OUTPUTS, READY, REFUSED, STATS, SUBMIT, Frames, output_of, pack
from .messages import EngineInfo, EngineRequest, EngineStats, TokenOutput, from_wire, to_wire

log = logging.getLogger(__name__)


class EngineFailed(RuntimeError):
    """The engine could not be started; the message is the engine's own."""


class Draining(RuntimeError):
    """The engine takes no new requests because it is about to stop."""


class _Live:
    """A request under way: its stream, and what it has produced so far."""

    def __init__(self, request: EngineRequest) -> None:
        self.request = request
        self.stream: asyncio.Queue[TokenOutput | Exception] = asyncio.Queue()
        self.emitted: list[list[int]] = [list(e) for e in request.emitted] or [[] for _ in range(request.n)]
        self.unfinished = set(range(request.n)) - set(request.finished)
        self.begun: set[int] = set()

    def resumed(self) -> EngineRequest:
        """The request that produces what is still missing."""
        done = tuple(sorted(set(range(self.request.n)) - self.unfinished))
        return dataclasses.replace(self.request, emitted=tuple(map(tuple, self.emitted)), finished=done)


class AsyncEngine:
    """One engine process and its streams. Make it with :meth:`start`; close it with :meth:`close`."""

    def __init__(self, config: EngineConfig, recover_timeout_s: float, clock: Clock) -> None:
        self.config = config
        self.info: EngineInfo
        self.restarts = 0
        self._recover_timeout_s, self._clock = recover_timeout_s, clock
        self._live: dict[str, _Live] = {}
        self._adapters = dict(config.adapters)
        self._process: subprocess.Popen[bytes] | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._stats_waiters: list[asyncio.Future[EngineStats]] = []
        self._adapter_waiters: dict[str, asyncio.Future[str | None]] = {}
        self._last_stats = EngineStats()
        self._before_restart = EngineStats()
        self._ready = asyncio.Event()
        self._closing = self._draining = False
        self._lost: Exception | None = None
        self._competition: CompetitionMonitor | None = None

    @classmethod
    async def start(
        cls, config: EngineConfig, *, recover_timeout_s: float = 60.0, clock: Clock | None = None
    ) -> AsyncEngine:
        """Start the process and wait until its model is loaded. Raises EngineFailed with the engine's message."""
        engine = cls(config, recover_timeout_s, clock or WallClock())
        try:
            await engine._launch()
        except BaseException:
            await engine.close()
            raise
        return engine

    @property
    def pid(self) -> int:
        """Process id of the engine."""
        assert self._process is not None
        return self._process.pid

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the loaded adapters."""
        return tuple(sorted(self._adapters))

    async def _launch(self) -> None:
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
        threads = self.config.threads or usable_cores()
        command = [sys.executable, "-m", "sharewell.serving.core.host", str(theirs.fileno())]
        environment = {**os.environ, **thread_environment(threads)}
        try:
            self._process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], env=environment, stdin=subprocess.DEVNULL, start_new_session=False
            )
        finally:
            theirs.close()
        self._competition = CompetitionMonitor((os.getpid(), self._process.pid))
        reader, self._writer = await asyncio.open_unix_connection(sock=ours)
        settings = dataclasses.asdict(self.config) | {"adapters": self._adapters}
        self._writer.write(pack(settings))
        frames = Frames()
        first = await self._first_message(reader, frames)
        if first[0] == FAILED:
            raise EngineFailed(first[1])
        self.info = from_wire(first[1])
        self._ready.set()
        self._spawn(self._read(reader, frames))

    async def _first_message(self, reader: asyncio.StreamReader, frames: Frames) -> list[Any]:
        while True:
            data = await reader.read(1 << 16)
            if not data:
                code = self._process.wait() if self._process else None
                raise EngineFailed(f"the engine process ended with code {code} before it was ready")
            if messages := frames.feed(data):
                return messages[0]

    def _spawn(self, coroutine: Any) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _read(self, reader: asyncio.StreamReader, frames: Frames) -> None:
        try:
            while data := await reader.read(1 << 20):
                for message in frames.feed(data):
                    self._handle(message)
        except (OSError, ValueError) as error:
            log.error("engine connection broke: %s", error)
        if not self._closing:
            await self._recover()

    def _handle(self, message: list[Any]) -> None:
        kind = message[0]
        if kind == OUTPUTS:
            for row in message[1]:
                self._deliver(output_of(row))
        elif kind == REFUSED:
            live = self._live.pop(message[1], None)
            if live is not None:
                full = message[2] == "queue_full"
                live.stream.put_nowait(QueueFull(message[3]) if full else Refused(message[2], message[3]))
        elif kind == STATS:
            self._last_stats = from_wire(message[1])
            waiters, self._stats_waiters = self._stats_waiters, []
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_result(self._last_stats)
        elif kind == ADAPTER:
            waiter = self._adapter_waiters.pop(message[1], None)
            if waiter is not None and not waiter.done():
                waiter.set_result(message[2])

    def _deliver(self, output: TokenOutput) -> None:
        live = self._live.get(output.request_id)
        if live is None or output.index not in live.unfinished:
            return
        live.emitted[output.index] += output.token_ids
        if output.index in live.begun and output.cached_tokens:
            output = dataclasses.replace(output, cached_tokens=0)  # a resumed request was reported before
        live.begun.add(output.index)
        if output.finish_reason is not None:
            live.unfinished.discard(output.index)
            if not live.unfinished:
                del self._live[output.request_id]
        live.stream.put_nowait(output)

    async def _recover(self) -> None:
        """Start another process and hand it every request that was under way."""
        self._ready.clear()
        code = self._process.wait() if self._process else None
        log.error("engine process ended with code %s; restarting with %d requests under way", code, len(self._live))
        self._before_restart = self._totals()
        self._last_stats = EngineStats()
        self._fail_waiters()
        deadline = self._clock.monotonic() + self._recover_timeout_s
        pause = 0.1
        while not self._closing:
            try:
                async with asyncio.timeout(max(0.1, deadline - self._clock.monotonic())):
                    await self._launch()
                break
            except (EngineFailed, OSError, TimeoutError) as error:
                self._kill()
                if self._clock.monotonic() + pause >= deadline:
                    self._give_up(error)
                    return
                await self._clock.sleep_until(self._clock.monotonic() + pause)
                pause = min(5.0, 2 * pause)
        self.restarts += 1
        for live in list(self._live.values()):
            self._write([SUBMIT, to_wire(live.resumed())])

    def _give_up(self, error: Exception) -> None:
        log.error("the engine could not be restarted within %.0f s: %s", self._recover_timeout_s, error)
        self._lost = EngineFailed(f"the engine could not be restarted: {error}")
        for request_id, live in list(self._live.items()):
            for index in sorted(live.unfinished):
                live.stream.put_nowait(TokenOutput(request_id, index, finish_reason="error", error="engine_lost"))
        self._live.clear()
        self._ready.set()

    def _fail_waiters(self) -> None:
        for waiter in (*self._stats_waiters, *self._adapter_waiters.values()):
            waiter.cancel()
        self._stats_waiters, self._adapter_waiters = [], {}

    def _write(self, message: Any) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(pack(message))

    async def submit(self, request: EngineRequest) -> AsyncIterator[TokenOutput]:
        """The request's outputs as they come, all choices mixed; leaving the iterator early cancels the request.

        Raises QueueFull, Refused, Draining or EngineFailed before the first output.
        """
        if self._draining or self._closing:
            raise Draining("the server is shutting down")
        if self._lost is not None:
            raise self._lost
        if len(self._live) >= self.config.max_waiting + self.config.max_seqs:
            raise QueueFull(f"{len(self._live)} requests are under way already")
        live = _Live(request)
        self._live[request.request_id] = live
        if self._ready.is_set():
            self._write([SUBMIT, to_wire(request)])  # otherwise the recovery submits it
        left = set(live.unfinished)
        try:
            while left:
                output = await live.stream.get()
                if isinstance(output, Exception):
                    left.clear()
                    raise output
                if output.finish_reason is not None:
                    left.discard(output.index)
                yield output
        finally:
            if left:
                self.cancel(request.request_id)

    def cancel(self, request_id: str) -> None:
        """End a request; its stream gets nothing more."""
        if self._live.pop(request_id, None) is not None:
            self._write([CANCEL, request_id])

    @property
    def live(self) -> int:
        """Requests under way."""
        return len(self._live)

    def _totals(self) -> EngineStats:
        """The last snapshot with the counters of earlier processes added."""
        counters = (
            "prompt_tokens", "computed_prompt_tokens", "cached_prompt_tokens", "generated_tokens", "steps", "preemptions",
            "step_s", "forward_s",
        )  # fmt: skip
        sums = {n: getattr(self._before_restart, n) + getattr(self._last_stats, n) for n in counters}
        competing = self._competition.cores if self._competition else 0.0
        return dataclasses.replace(self._last_stats, restarts=self.restarts, competing_cpu=competing, **sums)

    async def stats(self, timeout_s: float = 1.0) -> EngineStats:
        """A snapshot; the last known one when the engine is in a long step or restarting."""
        if self._competition is not None:
            self._competition.sample()
        if self._ready.is_set() and self._lost is None:
            waiter: asyncio.Future[EngineStats] = asyncio.get_running_loop().create_future()
            self._stats_waiters.append(waiter)
            self._write([STATS])
            with contextlib.suppress(TimeoutError, asyncio.CancelledError):
                await asyncio.wait_for(asyncio.shield(waiter), timeout_s)
        return self._totals()

    async def load_adapter(self, name: str, path: str) -> None:
        """Make an adapter available. Raises Refused with the reason when its files are not usable."""
        await self._change_adapter(name, path)
        self._adapters[name] = path

    async def unload_adapter(self, name: str) -> None:
        """Forget an adapter. Raises Refused while it is in use."""
        await self._change_adapter(name, None)
        self._adapters.pop(name, None)

    async def _change_adapter(self, name: str, path: str | None) -> None:
        waiter: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        self._adapter_waiters[name] = waiter
        self._write([ADAPTER, name, path])
        problem = await waiter
        if problem is not None:
            raise Refused("invalid_adapter", problem)

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new requests and wait for those under way; False when some were still running at the timeout."""
        self._draining = True
        deadline = self._clock.monotonic() + timeout_s
        while self._live and self._clock.monotonic() < deadline:
            await self._clock.sleep_until(self._clock.monotonic() + 0.05)
        return not self._live

    def _kill(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    async def close(self) -> None:
        """Stop the process; streams under way end with an error."""
        self._closing = True
        for request_id, live in list(self._live.items()):
            for index in sorted(live.unfinished):
                live.stream.put_nowait(TokenOutput(request_id, index, finish_reason="error", error="engine_closed"))
        self._live.clear()
        self._fail_waiters()
        self._write([CLOSE])
        if self._writer is not None:
            with contextlib.suppress(OSError):
                await self._writer.drain()
            self._writer.close()
        process = self._process
        if process is not None:
            deadline = self._clock.monotonic() + 3
            while process.poll() is None and self._clock.monotonic() < deadline:
                await self._clock.sleep_until(self._clock.monotonic() + 0.02)
            self._kill()
        for task in list(self._tasks):
            task.cancel()


__all__ = ["AsyncEngine", "Draining", "EngineCore", "EngineFailed", "QueueFull", "Refused"]
