"""The engine's own process: reads requests from a socket, steps, writes what the steps produced.

Started by :class:`~sharewell.serving.core.process.AsyncEngine` as ``python -m sharewell.serving.core.host FD``. It ends
when the socket closes, so it never outlives the process that owns it. Frames are four bytes of length and msgpack:

in:  [SUBMIT, request], [CANCEL, id], [ADAPTER, name, path or nil], [STATS], [CLOSE]
out: [READY, info], [FAILED, text], [OUTPUTS, [...]], [REFUSED, id, code, text], [STATS, stats], [ADAPTER, name, error or nil]
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import select
import signal
import socket
import struct
import sys
import time
from pathlib import Path
from typing import Any

import msgpack

from .config import EngineConfig
from .cores import usable_cores
from .engine import EngineCore, QueueFull, Refused
from .messages import EngineInfo, EngineRequest, TokenOutput, from_wire, to_wire

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
            messages.append(msgpack.unpackb(self._buffer[at + 4 : at + 4 + size], raw=False, strict_map_key=False))
            at += 4 + size
        del self._buffer[:at]
        return messages


def output_row(output: TokenOutput) -> list[Any]:
    """A TokenOutput as a short array; the common fields first, the rare ones only where they are there."""
    row: list[Any] = [output.request_id, output.index, output.token_ids]
    rare = (
        output.finish_reason or output.logprobs or output.cached_tokens or output.prompt_logprobs or output.error is not None
    )
    if rare:
        row += [
            output.finish_reason, output.cached_tokens, output.stop_token_id, output.error,
            to_wire(output.logprobs), to_wire(output.prompt_logprobs),
        ]  # fmt: skip
    return row


def output_of(row: list[Any]) -> TokenOutput:
    """Inverse of :func:`output_row`."""
    if len(row) == 3:
        return TokenOutput(row[0], row[1], tuple(row[2]))
    request_id, index, tokens, reason, cached, stop, error, logprobs, prompt = row
    return TokenOutput(
        request_id, index, tuple(tokens), from_wire(logprobs), reason, stop, error, cached, from_wire(prompt)
    )


def build(config: EngineConfig) -> EngineCore:
    """Load the model and make the engine. Raises ModelError, AdapterError or ValueError for what cannot be run."""
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
    core = EngineCore(config, runner, info, time.monotonic, folder / "tokenizer.json")
    for name, path in config.adapters.items():
        core.adapters.known[name] = load_peft_adapter(path, runner.model, name)
    _warm(core)
    return core


def _warm(core: EngineCore) -> None:
    """Two short requests, so that what is compiled or loaded at first use is there before the first client is."""
    from .messages import SamplingParams

    core.submit(EngineRequest("warm", tuple(range(1, 20)), SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)))
    while core.has_work:
        core.step(time.monotonic())
    core.reset_counters()


class Host:
    """The loop of the engine process."""

    def __init__(self, connection: socket.socket, core: EngineCore) -> None:
        self._connection, self._core = connection, core
        self._frames = Frames()

    def run(self) -> None:
        """Serve until the other side closes or says CLOSE."""
        core = self._core
        while True:
            readable, _, _ = select.select([self._connection], [], [], 0 if core.has_work else None)
            if readable:
                data = self._connection.recv(1 << 20)
                if not data:
                    return
                for message in self._frames.feed(data):
                    if message[0] == CLOSE:
                        return
                    self._handle(message)
            if core.has_work:
                outputs = core.step(time.monotonic())
                if outputs:
                    self._send([OUTPUTS, [output_row(o) for o in outputs]])

    def _send(self, message: Any) -> None:
        self._connection.sendall(pack(message))

    def _handle(self, message: list[Any]) -> None:
        kind = message[0]
        if kind == SUBMIT:
            request: EngineRequest = from_wire(message[1])
            try:
                self._core.submit(request)
            except QueueFull as error:
                self._send([REFUSED, request.request_id, "queue_full", str(error)])
            except Refused as error:
                self._send([REFUSED, request.request_id, error.code, str(error)])
        elif kind == CANCEL:
            self._core.cancel(message[1])
        elif kind == STATS:
            self._send([STATS, to_wire(self._core.stats())])
        elif kind == ADAPTER:
            self._send([ADAPTER, message[1], self._change_adapter(message[1], message[2])])

    def _change_adapter(self, name: str, path: str | None) -> str | None:
        from ...models import AdapterError, ModelConfig, load_peft_adapter, resolve_model

        try:
            if path is None:
                self._core.adapters.forget(name)
            else:
                model = ModelConfig.from_folder(resolve_model(self._core.config.model, progress=False))
                self._core.adapters.known[name] = load_peft_adapter(path, model, name)
        except (AdapterError, ValueError) as error:
            return str(error)
        return None


def main() -> None:
    """Entry point of the process: the socket's descriptor is the one argument, the configuration the first frame."""
    connection = socket.socket(fileno=int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C is for the server, which then drains
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: never outlive the server
    frames, first = Frames(), []
    while not first:
        data = connection.recv(1 << 20)
        if not data:
            return
        first = frames.feed(data)
    config: EngineConfig = EngineConfig(**first[0])
    logging.basicConfig(level=os.environ.get("SHAREWELL_LOG", "INFO").upper(), format="%(levelname)s engine: %(message)s")
    Path("/proc/self/comm").write_text("sharewell-eng") if Path("/proc/self/comm").exists() else None
    try:
        core = build(config)
    except Exception as error:
        log.debug("start failed", exc_info=True)
        connection.sendall(pack([FAILED, f"{type(error).__name__}: {error}"]))
        raise SystemExit(1) from None
    gc.freeze()  # what is loaded now stays: keep the collector off it
    connection.sendall(pack([READY, to_wire(core.info)]))
    Host(connection, core).run()


if __name__ == "__main__":
    main()
