"""The engine's own process: reads requests from a socket, steps, writes what the steps produced.

Started by :class:`~sharewell.serving.core.process.AsyncEngine` as ``python -m sharewell.serving.core.host FD
CORES``, or in a thread with the same socket. It ends when the socket closes, so it never outlives the process
that owns it, and sleeps while there is nothing to do. What takes long and is not a step (compiling a grammar,
reading an adapter) is done by a helper thread. Frames are four bytes of length and msgpack:

in:  [configuration, builder] first, then [SUBMIT, request], [CANCEL, id],
     [ADAPTER, number, name, path or nil], [STATS], [CLOSE]
out: [READY, info] or [FAILED, text] first, then [OUTPUTS, [...]], [REFUSED, id, code, text], [STATS, stats],
     [ADAPTER, number, error or nil]
"""

from __future__ import annotations

import ctypes
import functools
import gc
import importlib
import logging
import os
import select
import signal
import socket
import struct
import sys
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgpack

from ...simulation import WallClock
from .config import EngineConfig
from .cores import pin, usable_cores
from .engine import EngineCore, QueueFull, Refused
from .messages import EngineInfo, EngineRequest, SamplingParams, TokenLogprob, TokenOutput, from_wire, to_wire

if TYPE_CHECKING:
    from ...models import LoraAdapter
    from .paged_runner import PagedRunner

SUBMIT, CANCEL, ADAPTER, STATS, CLOSE, READY, FAILED, OUTPUTS, REFUSED = range(9)
MAX_FRAME = 64 << 20
log = logging.getLogger(__name__)


def pack(message: Any) -> bytes:
    """A frame."""
    body: bytes = msgpack.packb(message, use_bin_type=True)  # pyright: ignore[reportAssignmentType]
    return struct.pack("<I", len(body)) + body


class Frames:
    """Messages out of a stream of bytes. Raises ValueError for a frame beyond the limit."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Any]:
        """The messages that ``data`` completes."""
        self._buffer += data
        messages, at = [], 0
        while len(self._buffer) - at >= 4:
            (size,) = struct.unpack_from("<I", self._buffer, at)
            if size > MAX_FRAME:
                raise ValueError(f"frame of {size} bytes is beyond {MAX_FRAME}")
            if len(self._buffer) - at - 4 < size:
                break
            messages.append(
                msgpack.unpackb(self._buffer[at + 4 : at + 4 + size], raw=False, strict_map_key=False)
            )
            at += 4 + size
        del self._buffer[:at]
        return messages


def output_row(output: TokenOutput) -> list[Any]:
    """A TokenOutput as a short array; the common fields first, the rare ones only where they are there."""
    row: list[Any] = [output.request_id, output.index, output.token_ids]
    rare = (
        output.finish_reason or output.logprobs or output.cached_tokens or output.prompt_logprobs is not None
        or output.sharing is not None
    )  # fmt: skip
    if rare:
        row += [
            output.finish_reason, output.cached_tokens, output.stop_token_id, output.error,
            [_score_row(s) for s in output.logprobs],
            None if output.prompt_logprobs is None else [s and _score_row(s) for s in output.prompt_logprobs],
            output.sharing,
        ]  # fmt: skip
    return row


def _score_row(score: TokenLogprob) -> tuple[int, float, tuple[tuple[int, float], ...]]:
    return score.token_id, score.logprob, score.top


def _score_of(row: list[Any]) -> TokenLogprob:
    return TokenLogprob(row[0], row[1], tuple(map(tuple, row[2])))


def output_of(row: list[Any]) -> TokenOutput:
    """Inverse of :func:`output_row`."""
    if len(row) == 3:
        return TokenOutput(row[0], row[1], tuple(row[2]))
    request_id, index, tokens, reason, cached, stop, error, logprobs, prompt, sharing = row
    return TokenOutput(
        request_id, index, tuple(tokens), tuple(map(_score_of, logprobs)), reason, stop, error, cached,
        None if prompt is None else tuple(s and _score_of(s) for s in prompt), sharing,
    )  # fmt: skip


@dataclass(frozen=True)
class Built:
    """An engine, and how it reads an adapter's folder: ``read_adapter(name, path)`` raises ValueError for a
    bad one."""

    core: EngineCore
    read_adapter: Callable[[str, str], LoraAdapter]


def build(config: EngineConfig) -> Built:
    """Load the model and make the engine. Raises ModelError, AdapterError or ValueError for what cannot be
    run."""
    from ...models import load_peft_adapter, resolve_model
    from .paged_runner import PagedRunner

    folder = resolve_model(config.model, progress=False)
    threads = config.threads or usable_cores()
    runner = PagedRunner(folder, config, threads)
    info = EngineInfo(
        model=config.model,
        dtype=runner.choice.format,
        device=config.device,
        context_length=runner.max_length,
        vocab_size=runner.model.vocab_size,
        eos_token_ids=runner.model.eos_token_ids,
        block_size=config.block_size,
        num_blocks=runner.num_blocks,
        max_seqs=config.max_seqs,
        threads=threads,
        revision=runner.revision,
        adapters=tuple(sorted(config.adapters)),
        runner=runner.choice.runner,
    )
    core = EngineCore(config, runner, info, WallClock().monotonic, folder / "tokenizer.json")

    def read_adapter(name: str, path: str) -> LoraAdapter:
        return load_peft_adapter(path, runner.model, name)

    for name, path in config.adapters.items():
        core.load_adapter(name, read_adapter(name, path))
    _warm(core)
    _plan_relays(core, runner, config)
    return Built(core, read_adapter)


def _plan_relays(core: EngineCore, runner: PagedRunner, config: EngineConfig) -> None:
    """Let requests that opt in relay, where the model's keys can be moved."""
    from ...kv import UnsupportedModel
    from .relaying import RelayPlanner, RelaySettings

    settings = RelaySettings(config.relay_share, config.relay_sample, config.relay_fallback_kl)
    try:
        core.planner = RelayPlanner(core, runner.forward, settings)
    except UnsupportedModel as error:
        log.info("requests cannot relay: %s", error)


def _warm(core: EngineCore) -> None:
    """Two short requests, so that what is compiled or loaded at first use is there before the first client
    is."""
    core.submit(
        EngineRequest(
            "warm", tuple(range(1, 20)), SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
        )
    )
    while core.has_work:
        core.step(0.0)
    core.reset_counters()


class Host:
    """The loop of the engine process."""

    def __init__(self, connection: socket.socket, built: Built) -> None:
        self._connection, self._core, self._read_adapter = connection, built.core, built.read_adapter
        self._clock = WallClock()
        self._frames = Frames()
        self._helper = ThreadPoolExecutor(1, "sharewell-helper")
        self._done: deque[Callable[[], None]] = (
            deque()
        )  # what the helper finished, to be applied between steps
        self._woken, self._wake = socket.socketpair()
        self._compiling: set[str] = set()  # requests whose grammar the helper compiles

    def run(self) -> None:
        """Serve until the other side closes or says CLOSE."""
        try:
            while self._turn():
                pass
        finally:
            self._helper.shutdown(wait=False, cancel_futures=True)
            self._woken.close()
            self._wake.close()

    def _turn(self) -> bool:
        """Take in what has arrived and make a step; sleep when there is nothing to do."""
        core = self._core
        readable, _, _ = select.select([self._connection, self._woken], [], [], 0 if core.has_work else None)
        if self._connection in readable:
            data = self._connection.recv(1 << 20)
            if not data:
                return False
            for message in self._frames.feed(data):
                if message[0] == CLOSE:
                    return False
                self._handle(message)
        if self._woken in readable:
            self._woken.recv(4096)
        while self._done:
            self._done.popleft()()
        if core.has_work:
            outputs = core.step(self._clock.monotonic())
            if outputs:
                self._send([OUTPUTS, [output_row(o) for o in outputs]])
        return True

    def _send(self, message: Any) -> None:
        self._connection.sendall(pack(message))

    def _handle(self, message: list[Any]) -> None:
        kind = message[0]
        if kind == SUBMIT:
            request: EngineRequest = from_wire(message[1])
            if request.sampling.grammar is not None and not self._core.grammar_ready(
                request.sampling.grammar
            ):
                self._compiling.add(request.request_id)
                self._in_background(self._compile, request)
            else:
                self._submit(request)
        elif kind == CANCEL:
            request_id, index = message[1:]
            if index is None:
                self._compiling.discard(request_id)
            self._core.cancel(request_id, index)
        elif kind == STATS:
            self._send([STATS, to_wire(self._core.stats())])
        elif kind == ADAPTER:
            self._in_background(self._change_adapter, *message[1:])

    def _in_background(self, work: Callable[..., Callable[[], None]], *arguments: Any) -> None:
        """Let the helper do ``work``, which returns what is to be done between steps."""

        def job() -> None:
            try:
                finish = work(*arguments)
            except Exception as error:  # not foreseen: end the engine as a failing step would
                finish = functools.partial(_raise, error)
            self._done.append(finish)
            self._wake.send(b"x")

        self._helper.submit(job)

    def _submit(self, request: EngineRequest) -> None:
        try:
            self._core.submit(request)
        except QueueFull as error:
            self._send([REFUSED, request.request_id, "queue_full", str(error)])
        except Refused as error:
            self._send([REFUSED, request.request_id, error.code, str(error)])

    def _compile(self, request: EngineRequest) -> Callable[[], None]:
        assert request.sampling.grammar is not None
        refusal: Refused | None = None
        try:
            self._core.compile_grammar(request.sampling.grammar)  # now it is in the cache
        except Refused as error:
            refusal = error

        def finish() -> None:
            if request.request_id not in self._compiling:
                return  # cancelled meanwhile
            self._compiling.discard(request.request_id)
            if refusal is None:
                self._submit(request)
            else:
                self._send([REFUSED, request.request_id, refusal.code, str(refusal)])

        return finish

    def _change_adapter(self, number: int, name: str, path: str | None) -> Callable[[], None]:
        adapter: LoraAdapter | None = None
        problem: str | None = None
        try:
            adapter = None if path is None else self._read_adapter(name, path)
        except ValueError as error:
            problem = str(error)

        def finish() -> None:
            answer = problem
            try:
                if adapter is not None:
                    self._core.load_adapter(name, adapter)
                elif answer is None:
                    self._core.unload_adapter(name)
            except ValueError as error:
                answer = str(error)
            self._send([ADAPTER, number, answer])

        return finish


def _raise(error: Exception) -> None:
    raise error


def serve(connection: socket.socket, *, own_process: bool) -> None:
    """Build the engine that the first frame asks for, say READY or FAILED, and serve until the connection
    ends."""
    with connection:
        frames, first = Frames(), []
        while not first:
            data = connection.recv(1 << 20)
            if not data:
                return
            first = frames.feed(data)
        settings, builder = first[0]
        module, _, function = builder.partition(":")
        try:
            built: Built = getattr(importlib.import_module(module), function)(EngineConfig(**settings))
        except Exception as error:
            log.debug("start failed", exc_info=True)
            connection.sendall(pack([FAILED, f"{type(error).__name__}: {error}"]))
            return
        if own_process:
            gc.freeze()  # what is loaded now stays: keep the collector off it
        connection.sendall(pack([READY, to_wire(built.core.info)]))
        Host(connection, built).run()


def main() -> None:
    """Entry point of the process; arguments: the socket's descriptor, and the cores to stay on ("0,1")."""
    pin([int(core) for core in sys.argv[2].split(",")])
    connection = socket.socket(fileno=int(sys.argv[1]))
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
    ):  # they are for the server, which drains and then closes the socket
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: never outlive the server
    logging.basicConfig(
        level=os.environ.get("SHAREWELL_LOG", "INFO").upper(), format="%(levelname)s engine: %(message)s"
    )
    name = Path("/proc/self/comm")
    if name.exists():
        name.write_text("sharewell-eng")
    serve(connection, own_process=True)


if __name__ == "__main__":
    main()
