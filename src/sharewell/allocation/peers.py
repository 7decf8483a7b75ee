"""Peers over TCP: one asks another for what it lacks, and gets a delta. Pull only: nobody can push rows
in.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from .gossip import GossipLog, MergeReport
from .wire import MAX_MESSAGE_BYTES, GossipFormatError, decode_heads, encode_heads

log = logging.getLogger(__name__)

MAX_REQUEST_BYTES = 4 << 20


class Peer:
    """Serves a log and pulls from others. ``on_merge`` hears of every merge, for an index to follow."""

    def __init__(
        self,
        gossip: GossipLog,
        *,
        timeout_s: float = 10.0,
        max_rows: int = 50_000,
        max_connections: int = 64,
        on_merge: Callable[[MergeReport], None] | None = None,
    ) -> None:
        if not timeout_s > 0:
            raise ValueError(f"timeout_s must be positive, got {timeout_s}")
        self.gossip, self.timeout_s, self.max_rows = gossip, timeout_s, max_rows
        self._on_merge = on_merge
        self._server: asyncio.Server | None = None
        self._open = asyncio.Semaphore(max_connections)

    async def serve(self, host: str = "127.0.0.1", port: int = 0) -> tuple[str, int]:
        """Listen; returns the address. Port 0 takes a free one."""
        self._server = await asyncio.start_server(self._answer, host, port)
        return self._server.sockets[0].getsockname()[:2]

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with self._open, asyncio.timeout(self.timeout_s):
                heads = decode_heads(await _receive(reader, MAX_REQUEST_BYTES))
                await _send(writer, self.gossip.delta(heads, self.max_rows))
        except (GossipFormatError, OSError, EOFError, TimeoutError) as error:
            log.info("a peer's request was dropped: %s", error)
        finally:
            writer.close()

    async def pull(self, host: str, port: int) -> MergeReport:
        """Ask one peer for rows above this log's heads and merge them.

        A connection that breaks loses nothing: the next pull starts from the heads again. Raises OSError or
        TimeoutError when the peer does not answer, GossipFormatError when it answers nonsense.
        """
        async with asyncio.timeout(self.timeout_s):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                await _send(writer, encode_heads(self.gossip.heads()))
                message = await _receive(reader, MAX_MESSAGE_BYTES)
            except EOFError as error:
                raise ConnectionError(f"{host}:{port} closed before its answer was complete") from error
            finally:
                writer.close()
        report = self.gossip.merge(message)
        if self._on_merge is not None:
            self._on_merge(report)
        return report


async def _send(writer: asyncio.StreamWriter, message: bytes) -> None:
    writer.write(len(message).to_bytes(4, "big") + message)
    await writer.drain()


async def _receive(reader: asyncio.StreamReader, limit: int) -> bytes:
    size = int.from_bytes(await reader.readexactly(4), "big")
    if size > limit:
        raise GossipFormatError(f"message must have at most {limit} bytes, got {size}")
    return await reader.readexactly(size)
