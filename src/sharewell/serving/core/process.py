"""The engine seen from asyncio: requests in, streams of tokens out, and a new engine when one dies.

The engine runs in a process of its own behind a socket; nothing here blocks. Every live request keeps its
prompt and the tokens that it has produced, so after a death the requests go on in the next process from where
they were. A death is noticed by the end of the connection at once, a process that hangs by its silence."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from typing import Any

from ...simulation import Clock, WallClock
from .config import EngineConfig
from .cores import CompetitionMonitor, CoreBudget, thread_environment, usable_cores
from .engine import EngineCore, QueueFull, Refused
from .host import (
    ADAPTER,
    CANCEL,
    CLOSE,
    FAILED,
    OUTPUTS,
    REFUSED,
    STATS,
    SUBMIT,
    Frames,
    output_of,
    pack,
    serve,
)
from .messages import EngineInfo, EngineRequest, EngineStats, TokenOutput, from_wire, to_wire

log = logging.getLogger(__name__)

BUILDER = "sharewell.serving.core.host:build"
MOST_DEATHS = 3  # of engines under one request; it may be what kills them
SLOWEST_START_S = 600.0  # then it hangs
SOUND_S = 30.0  # an engine that lived that long is not in a crash loop


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
        self.deaths = 0

    def resumed(self) -> EngineRequest:
        """The request that produces what is still missing."""
        done = tuple(sorted(set(range(self.request.n)) - self.unfinished))
        emitted = tuple(map(tuple, self.emitted)) if any(self.emitted) else ()
        sampling = self.request.sampling
        if sampling.prompt_logprobs is not None and self.begun >= self.unfinished:
            sampling = dataclasses.replace(sampling, prompt_logprobs=None)  # they were delivered
        return dataclasses.replace(self.request, sampling=sampling, emitted=emitted, finished=done)


class AsyncEngine:
    """One engine process and its streams. Make it with :meth:`start`; close it with :meth:`close`."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        recover_timeout_s: float,
        hang_timeout_s: float,
        clock: Clock,
        builder: str,
        in_process: bool,
    ) -> None:
        self.config = config
        self.budget = CoreBudget.here(config.threads)
        if self.budget.threads > usable_cores():
            log.warning(
                "%d threads will fight for %d cores: much slower than fewer threads",
                self.budget.threads,
                usable_cores(),
            )
        self._builder, self._in_process, self._hang_timeout_s = builder, in_process, hang_timeout_s
        self._heard = True  # something came since the last look
        self._launched_s = 0.0
        self._pause_s = 0.0  # before the next start, longer with every early death
        self._calls = 0
        self.info: EngineInfo
        self.restarts = 0
        self._recover_timeout_s, self._clock = recover_timeout_s, clock
        self._live: dict[str, _Live] = {}
        self._adapters = dict(config.adapters)
        self._process: subprocess.Popen[bytes] | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._stats_waiters: list[asyncio.Future[EngineStats]] = []
        self._adapter_waiters: dict[int, asyncio.Future[str | None]] = {}
        self._last_stats = EngineStats()
        self._before_restart = EngineStats()
        self._ready = asyncio.Event()
        self._closing = self._draining = False
        self._lost: Exception | None = None
        self._obstacle = ""  # why the last restart failed
        self._competition: CompetitionMonitor | None = None

    @classmethod
    async def start(
        cls,
        config: EngineConfig,
        *,
        recover_timeout_s: float = 60.0,
        hang_timeout_s: float = 300.0,
        clock: Clock | None = None,
        builder: str = BUILDER,
        in_process: bool = False,
    ) -> AsyncEngine:
        """Start the process and wait until its model is loaded. Raises EngineFailed with the engine's
        message.

        ``hang_timeout_s`` must be longer than the longest step. ``builder``: "module:function" that makes the
        engine of a configuration in the process. ``in_process`` runs the same loop in a thread of this
        process (for tests)."""
        engine = cls(
            config,
            recover_timeout_s=recover_timeout_s,
            hang_timeout_s=hang_timeout_s,
            clock=clock or WallClock(),
            builder=builder,
            in_process=in_process,
        )
        try:
            await engine._launch()
        except BaseException:
            await engine.close()
            raise
        engine._spawn(engine._watch())
        return engine

    @property
    def pid(self) -> int:
        """Process id of the engine."""
        return self._process.pid if self._process is not None else os.getpid()

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the loaded adapters."""
        return tuple(sorted(self._adapters))

    async def _launch(self) -> None:
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
        self._launched_s = self._clock.monotonic()
        if self._in_process:
            threading.Thread(
                target=_serve_in_thread, args=(theirs,), name="sharewell-engine", daemon=True
            ).start()
        else:
            self._process = _spawn_host(theirs, self.budget)
            pids = (os.getpid(), self._process.pid)
            self._competition = CompetitionMonitor(pids, self._clock, self.budget)
        reader, self._writer = await asyncio.open_unix_connection(sock=ours)
        settings = dataclasses.asdict(self.config)
        settings |= {"adapters": self._adapters, "threads": self.budget.threads}
        self._writer.write(pack([settings, self._builder]))
        frames = Frames()
        first, *rest = await self._first_messages(reader, frames)
        if first[0] == FAILED:
            raise EngineFailed(first[1])
        self.info = from_wire(first[1])
        self._heard = True
        self._ready.set()
        for message in rest:
            self._handle(message)
        self._spawn(self._read(reader, frames))

    async def _first_messages(self, reader: asyncio.StreamReader, frames: Frames) -> list[Any]:
        while True:
            data = await reader.read(1 << 16)
            if not data:
                self._kill()
                code = self._process.returncode if self._process else None
                raise EngineFailed(f"the engine process ended with code {code} before it was ready")
            if messages := frames.feed(data):
                return messages

    def _spawn(self, coroutine: Any) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _read(self, reader: asyncio.StreamReader, frames: Frames) -> None:
        try:
            while data := await reader.read(1 << 20):
                self._heard = True
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
        if output.index in live.begun and (
            output.cached_tokens or output.prompt_logprobs is not None or output.sharing is not None
        ):
            output = dataclasses.replace(
                output, cached_tokens=0, prompt_logprobs=None, sharing=None
            )  # a resumed one reported before
        live.begun.add(output.index)
        if output.finish_reason is not None:
            live.unfinished.discard(output.index)
            if not live.unfinished:
                del self._live[output.request_id]
        live.stream.put_nowait(output)

    async def _watch(self) -> None:
        """Ask the engine for a sign of life now and then, and end one that stays silent."""
        interval = min(2.0, self._hang_timeout_s / 4)
        silent = 0
        while not self._closing:
            await self._clock.sleep_until(self._clock.monotonic() + interval)
            if self._competition is not None:
                if notice := self._competition.watch(working=bool(self._live)):
                    log.warning(notice)
            if not self._ready.is_set() or self._lost is not None:
                silent = 0
                continue
            # counted in looks, not seconds: when this process itself was held up, the engine's signs wait to
            # be read
            silent = 0 if self._heard else silent + 1
            self._heard = False
            if silent * interval >= self._hang_timeout_s:
                log.error("the engine gave no sign of life for %.0f s: ending it", self._hang_timeout_s)
                silent = 0
                self._kill()
            else:
                self._write([STATS])

    async def _recover(self) -> None:
        """Start another process and hand it every request that was under way."""
        self._ready.clear()
        self._kill()
        code = self._process.returncode if self._process else None
        log.error(
            "engine process ended with code %s; restarting with %d requests under way", code, len(self._live)
        )
        self._before_restart = self._totals()
        self._last_stats = EngineStats()
        self._fail_waiters()
        self._close_writer()
        for request_id, live in list(self._live.items()):
            live.deaths += 1
            if live.deaths > MOST_DEATHS:
                self._fail(request_id, "engine_lost")
        died = self._clock.monotonic()
        if died - self._launched_s >= SOUND_S:
            self._pause_s = 0.0
        give_up = asyncio.create_task(self._give_up(died + self._recover_timeout_s))
        try:
            await self._relaunch()
        finally:
            give_up.cancel()
        if self._closing:
            return
        self._lost, self._obstacle = None, ""
        self.restarts += 1
        for live in self._live.values():
            self._write([SUBMIT, to_wire(live.resumed())])

    async def _relaunch(self) -> None:
        """Start engines until one is ready, with longer and longer pauses."""
        while not self._closing:
            await self._clock.sleep_until(self._clock.monotonic() + self._pause_s)
            self._pause_s = min(30.0, max(0.5, 2 * self._pause_s))
            try:
                async with asyncio.timeout(SLOWEST_START_S):
                    await self._launch()
                return
            except (EngineFailed, OSError, TimeoutError) as error:
                self._kill()
                self._close_writer()
                self._obstacle = str(error) or "it was not ready in time"
                log.error("the engine could not be restarted: %s", self._obstacle)

    async def _give_up(self, deadline: float) -> None:
        """At ``deadline`` end every stream, and refuse requests until an engine is ready after all."""
        await self._clock.sleep_until(deadline)
        self._lost = EngineFailed(f"the engine could not be restarted: {self._obstacle or 'it takes long'}")
        for request_id in list(self._live):
            self._fail(request_id, "engine_lost")

    def _fail(self, request_id: str, error: str) -> None:
        """End a request's unfinished choices with an error."""
        live = self._live.pop(request_id)
        for index in sorted(live.unfinished):
            live.stream.put_nowait(TokenOutput(request_id, index, finish_reason="error", error=error))

    def _fail_waiters(self) -> None:
        for waiter in (*self._stats_waiters, *self._adapter_waiters.values()):
            if not waiter.done():
                waiter.set_exception(EngineFailed("the engine was restarted meanwhile"))
                waiter.exception()  # retrieved: nobody may be waiting any more
        self._stats_waiters, self._adapter_waiters = [], {}

    def _close_writer(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _write(self, message: Any) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(pack(message))

    async def submit(self, request: EngineRequest) -> AsyncIterator[TokenOutput]:
        """The request's outputs as they come, all choices mixed; leaving the iterator early cancels the
        request.

        Raises QueueFull, Refused, Draining or EngineFailed before the first output.
        """
        if self._draining or self._closing:
            raise Draining("the server is shutting down")
        if self._lost is not None:
            raise self._lost
        if request.request_id in self._live:
            raise Refused("duplicate_request", f"request_id {request.request_id!r} is in use")
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
            if left and self._live.get(request.request_id) is live:
                self.cancel(request.request_id)

    def cancel(self, request_id: str) -> None:
        """End a request; whoever reads its stream sees every unfinished choice end as "cancelled"."""
        live = self._live.pop(request_id, None)
        if live is not None:
            self._write([CANCEL, request_id, None])
            for index in sorted(live.unfinished):
                live.stream.put_nowait(TokenOutput(request_id, index, finish_reason="cancelled"))

    def cancel_choice(self, request_id: str, index: int) -> None:
        """End one choice, which ends as "cancelled"; the others go on."""
        live = self._live.get(request_id)
        if live is None or index not in live.unfinished:
            return
        if live.unfinished == {index}:
            self.cancel(request_id)
            return
        live.unfinished.discard(index)
        self._write([CANCEL, request_id, index])
        live.stream.put_nowait(TokenOutput(request_id, index, finish_reason="cancelled"))

    def abandon(self) -> None:
        """Refuse new requests, and end every stream under way with the error "engine_closed"."""
        self._draining = True
        for request_id in list(self._live):
            self._write([CANCEL, request_id, None])
            self._fail(request_id, "engine_closed")

    @property
    def live(self) -> int:
        """Requests under way."""
        return len(self._live)

    def _totals(self) -> EngineStats:
        """The last snapshot with the counters of earlier processes added."""
        counters = (
            "prompt_tokens", "computed_prompt_tokens", "cached_prompt_tokens", "generated_tokens", "steps",
            "preemptions", "step_s", "forward_s", "planned_prompts", "planned_token_layers",
            "reused_token_layers", "relayed_prompts", "relayed_tokens", "relay_recomputed_tokens",
            "relay_declined", "relay_missing", "relay_damaged", "relay_fallbacks", "relay_evictions",
            "relay_samples", "relay_kl_sum",
        )  # fmt: skip
        sums = {n: getattr(self._before_restart, n) + getattr(self._last_stats, n) for n in counters}
        competing = self._competition.cores if self._competition else 0.0
        return dataclasses.replace(self._last_stats, restarts=self.restarts, competing_cpu=competing, **sums)

    async def stats(self, timeout_s: float = 1.0) -> EngineStats:
        """A snapshot; the last known one when the engine is in a long step or restarting."""
        if self._ready.is_set() and self._lost is None:
            waiter: asyncio.Future[EngineStats] = asyncio.get_running_loop().create_future()
            self._stats_waiters.append(waiter)
            self._write([STATS])
            with contextlib.suppress(TimeoutError, EngineFailed):
                async with asyncio.timeout(timeout_s):
                    await asyncio.shield(waiter)
        return self._totals()

    async def load_adapter(self, name: str, path: str) -> None:
        """Make the adapter in folder ``path`` available, in place of one of that name. Raises Refused with
        the reason when its files are not usable or the old one is in use, EngineFailed when the engine dies
        meanwhile."""
        await self._change_adapter(name, path)
        self._adapters[name] = path

    async def unload_adapter(self, name: str) -> None:
        """Forget an adapter. Raises Refused while it is in use."""
        await self._change_adapter(name, None)
        self._adapters.pop(name, None)

    async def _change_adapter(self, name: str, path: str | None) -> None:
        await self._ready.wait()
        waiter: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        self._calls += 1
        self._adapter_waiters[self._calls] = waiter
        self._write([ADAPTER, self._calls, name, path])
        problem = await waiter
        if problem is not None:
            raise Refused("invalid_adapter", problem)

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new requests and wait for those under way; False when some were still running at the
        timeout."""
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
        for request_id in list(self._live):
            self._fail(request_id, "engine_closed")
        self._fail_waiters()
        self._write([CLOSE])
        if self._writer is not None:
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(3):
                    await self._writer.drain()
        process = self._process
        if process is not None:
            deadline = self._clock.monotonic() + 3
            while process.poll() is None and self._clock.monotonic() < deadline:
                await self._clock.sleep_until(self._clock.monotonic() + 0.02)
            self._kill()
        self._close_writer()
        tasks = [t for t in self._tasks if t is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _spawn_host(connection: socket.socket, budget: CoreBudget) -> subprocess.Popen[bytes]:
    """The engine's process with its end of the connection, which is closed here."""
    cores = ",".join(map(str, budget.engine))
    command = [sys.executable, "-m", "sharewell.serving.core.host", str(connection.fileno()), cores]
    environment = {**os.environ, **thread_environment(budget.threads)}
    with connection:
        return subprocess.Popen(
            command, pass_fds=[connection.fileno()], env=environment, stdin=subprocess.DEVNULL
        )


def _serve_in_thread(connection: socket.socket) -> None:
    try:
        serve(connection, own_process=False)
    except Exception:
        log.exception("the engine's thread ended")


__all__ = ["AsyncEngine", "Draining", "EngineCore", "EngineFailed", "QueueFull", "Refused"]
