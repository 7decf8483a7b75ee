"""What clients may do before an endpoint sees them: keys, bodies and connections, bounded in size, number and
time."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st

from sharewell.serving.api.config import ServerConfig
from sharewell.serving.api.errors import ApiError
from sharewell.serving.api.keys import ApiKey
from sharewell.serving.api.limits import Gate
from sharewell.serving.api.server import MAX_PIPELINED, bounded_protocol

ALICE = ApiKey(1, "alice")


class Served:
    """A gate before an application that notes what reaches it."""

    def __init__(self, **settings: Any) -> None:
        self.draining = False
        self.seen: list[tuple[str, bytes, ApiKey | None]] = []
        self.hold = asyncio.Event()
        self.hold.set()
        config = ServerConfig(**{"max_body_bytes": 100, "body_timeout_s": 5.0, **settings})
        self.gate = Gate(self._app, config, self._find, lambda: self.draining)

    def _find(self, header: str | None) -> ApiKey:
        if header != "Bearer alice":
            raise ApiError(401, "a key is needed", code="invalid_api_key")
        return ALICE

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        body = b""
        while scope["method"] == "POST":
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        self.seen.append((scope["path"], body, scope.get("sharewell.key")))
        await self.hold.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})

    async def ask(
        self,
        path: str = "/v1/x",
        parts: Iterable[bytes | None] = (b"",),
        *,
        method: str = "POST",
        headers: dict[str, str] | None = None,
        scope: dict[str, Any] | None = None,
    ) -> tuple[int, dict[str, str], Any]:
        """Status, headers and body of the answer. A None among ``parts`` is the client going away; parts that
        run out never end the body."""
        given = {"authorization": "Bearer alice", **(headers or {})}
        pending = list(parts)
        messages: list[Any] = []

        async def receive() -> Any:
            if not pending:
                await asyncio.Event().wait()
            part = pending.pop(0)
            if part is None:
                return {"type": "http.disconnect"}
            return {"type": "http.request", "body": part, "more_body": bool(pending) or part == b"..."}

        async def send(message: Any) -> None:
            messages.append(message)

        lines = [(k.encode(), v.encode()) for k, v in given.items() if v]
        await self.gate(
            {"type": "http", "method": method, "path": path, "headers": lines, **(scope or {})},
            receive,
            send,
        )
        if not messages:
            return 0, {}, None
        fields = {k.decode(): v.decode() for k, v in messages[0]["headers"]}
        body = b"".join(m.get("body", b"") for m in messages[1:])
        return messages[0]["status"], fields, json.loads(body) if body[:1] == b"{" else body


async def test_a_body_arrives_whole_and_as_it_was() -> None:
    served = Served()
    assert (await served.ask(parts=[b"ab", b"", b"c" * 98]))[0] == 200
    assert served.seen == [("/v1/x", b"ab" + b"c" * 98, ALICE)]


@pytest.mark.parametrize("declared", [True, False])
async def test_one_byte_too_many_is_refused(declared: bool) -> None:
    served = Served()
    headers = {"content-length": "101"} if declared else {}
    status, fields, body = await served.ask(parts=[b"a" * 50, b"a" * 51], headers=headers)
    assert (
        status == 413
        and body["error"]["code"] == "body_too_large"
        and "at most 100" in body["error"]["message"]
    )
    assert fields["connection"] == "close"  # what follows on this connection could be the body's rest
    assert served.seen == [] and served.gate._buffered == 0


async def test_a_body_that_stops_arriving_is_given_up() -> None:
    served = Served(body_timeout_s=0.05)
    status, fields, body = await served.ask(parts=[b"a", b"..."])
    assert status == 408 and body["error"]["code"] == "body_timeout"
    assert fields["connection"] == "close" and served.gate._buffered == 0


async def test_a_client_that_leaves_in_its_body_gets_nothing_and_holds_nothing() -> None:
    served = Served()
    assert (await served.ask(parts=[b"a" * 40, None]))[0] == 0
    assert served.seen == [] and served.gate._buffered == 0


async def test_all_bodies_together_are_bounded_until_they_are_answered() -> None:
    served = Served(max_buffered_bytes=150)
    served.hold.clear()
    first = asyncio.create_task(served.ask(parts=[b"a" * 100]))
    while not served.seen:  # noqa: ASYNC110
        await asyncio.sleep(0)
    status, fields, body = await served.ask(parts=[b"b" * 60])
    assert status == 503 and body["error"]["code"] == "overloaded" and int(fields["retry-after"]) >= 1
    fits = asyncio.create_task(served.ask(parts=[b"c" * 50]))
    await asyncio.sleep(0)
    served.hold.set()
    assert (await first)[0] == (await fits)[0] == 200
    assert served.gate._buffered == 0
    assert (await served.ask(parts=[b"b" * 60]))[0] == 200


@settings(max_examples=60)
@given(
    st.lists(
        st.lists(st.sampled_from([b"", b"x" * 30, b"y" * 80, b"...", None]), min_size=1, max_size=4),
        max_size=6,
    )
)
def test_whatever_bodies_do_nothing_stays_counted(bodies: list[list[bytes | None]]) -> None:
    async def check() -> None:
        served = Served(body_timeout_s=0.01, max_buffered_bytes=160)
        statuses = await asyncio.gather(*(served.ask(parts=parts) for parts in bodies))
        assert {s for s, _, _ in statuses} <= {0, 200, 408, 413, 503}
        assert served.gate._buffered == 0

    asyncio.run(check())


async def test_draining_refuses_new_work_and_still_tells_how_it_goes() -> None:
    served = Served()
    served.draining = True
    status, fields, body = await served.ask()
    assert status == 503 and body["error"]["code"] == "draining" and int(fields["retry-after"]) >= 1
    assert (await served.ask("/stats", method="GET"))[0] == 200


@pytest.mark.parametrize("path", ["/", "/health", "/openapi.json", "/page/page.css"])
async def test_the_page_and_the_health_need_no_key(path: str) -> None:
    served = Served()
    assert (await served.ask(path, method="GET", headers={"authorization": ""}))[0] == 200
    assert served.seen == [(path, b"", None)]


@pytest.mark.parametrize(
    "path",
    ["/v1/models", "/stats", "/metrics", "/tokenize", "/pages", "/health/", "//", "/page", "/x/page/y"],
)
async def test_everything_else_needs_one(path: str) -> None:
    served = Served()
    status, fields, body = await served.ask(path, headers={"authorization": "Bearer bob"})
    assert status == 401 and body["error"]["code"] == "invalid_api_key"
    assert fields["www-authenticate"] == "Bearer"
    assert served.seen == []


async def test_a_stranger_s_body_is_not_read() -> None:
    served = Served(body_timeout_s=0.05)
    status, fields, _ = await served.ask(parts=[b"a", b"..."], headers={"authorization": ""})
    assert status == 401 and fields["connection"] == "close"


async def test_a_preflight_needs_no_key_and_too_many_connections_are_told() -> None:
    served = Served()
    assert (await served.ask(method="OPTIONS", headers={"authorization": ""}))[0] == 200
    status, fields, body = await served.ask(scope={"sharewell.overloaded": True})
    assert status == 503 and body["error"]["code"] == "overloaded" and int(fields["retry-after"]) >= 1


async def test_what_is_not_a_request_passes() -> None:
    passed: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        passed.append(scope["type"])

    async def nothing(*_: Any) -> Any:
        raise AssertionError

    gate = Gate(app, ServerConfig(), lambda header: ALICE, lambda: False)
    await gate({"type": "lifespan"}, nothing, nothing)
    assert passed == ["lifespan"]


# Connections


class Listening:
    """A small application behind the server's own protocol, on a real socket."""

    def __init__(self, **bounds: Any) -> None:
        config = ServerConfig(**{"body_timeout_s": 5.0, "write_timeout_s": 5.0, **bounds})
        self.begun = 0
        self.gone = 0
        self.failed: list[BaseException] = []
        settings = uvicorn.Config(
            self._app,
            port=0,
            http=bounded_protocol(config),
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_level="critical",
        )
        self._server = uvicorn.Server(settings)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.005)
        self.address = self._server.servers[0].sockets[0].getsockname()

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        self.begun += 1
        size = int(scope["path"][1:] or 2)
        overloaded = scope["sharewell.overloaded"]
        headers = [(b"content-length", str(size).encode())]
        try:
            await send(
                {"type": "http.response.start", "status": 503 if overloaded else 200, "headers": headers}
            )
            while size > 0:
                part = min(size, 1 << 16)
                size -= part
                await send({"type": "http.response.body", "body": b"x" * part, "more_body": size > 0})
            if (await receive())["type"] == "http.disconnect":
                self.gone += 1
        except BaseException as error:
            self.failed.append(error)
            raise

    def connect(self) -> socket.socket:
        return socket.create_connection(self.address, timeout=30)

    def send(self, data: bytes) -> bytes:
        """All that comes back until the connection ends."""
        with self.connect() as connection:
            connection.sendall(data)
            return read(connection)

    def connections(self) -> int:
        return len(self._server.server_state.connections)

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join(30)


def read(connection: socket.socket) -> bytes:
    answer = b""
    try:
        while part := connection.recv(1 << 16):
            answer += part
    except ConnectionError:
        pass
    return answer


@contextmanager
def listening(**bounds: Any) -> Iterator[Listening]:
    served = Listening(**bounds)
    yield served
    served.close()
    assert served.failed == [], "an endpoint wrote to a connection that was gone"


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def get(size: int = 2, *headers: str) -> bytes:
    return "\r\n".join([f"GET /{size} HTTP/1.1", "Host: x", *headers, "", ""]).encode()


LAST = get(2, "Connection: close")


def test_a_few_requests_ahead_of_their_answers_are_answered_in_order() -> None:
    with listening() as served:
        answer = served.send(get(3) + get(4) * 10 + LAST)
        assert answer.count(b"HTTP/1.1 200 OK") == served.begun == 12
        assert [len(p.partition(b"\r\n\r\n")[2]) for p in answer.split(b"HTTP/1.1")[1:]] == [3, *[4] * 10, 2]


def test_requests_without_end_ahead_of_their_answers_end_the_connection() -> None:
    with listening() as served:
        with served.connect() as connection, pytest.raises(OSError):
            while True:
                connection.sendall(get() * 1000)
        until(lambda: served.connections() == 0)
        assert served.begun <= 2 * MAX_PIPELINED
        assert served.send(LAST).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"nonsense\r\n\r\n", b"400"),
        (b"\x16\x03\x01\x02\x00", b"400"),
        (b"GET / HTTP/1.1\r\nX: " + b"a" * 70_000, b"431"),
        (b"GET /" + b"a" * 70_000, b"431"),
    ],
)
def test_a_head_that_is_none_or_too_large_is_refused(data: bytes, status: bytes) -> None:
    with listening() as served:
        answer = served.send(data)
        assert answer.startswith(b"HTTP/1.1 " + status)
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"]
        assert served.begun == 0


def test_nonsense_behind_a_request_never_lands_in_its_answer() -> None:
    with listening() as served, served.connect() as connection:
        connection.sendall(get(1 << 24))
        answer = connection.recv(1 << 16)
        connection.sendall(b"nonsense\r\n\r\n")
        answer += read(connection)
        assert answer.count(b"HTTP/1.1") == 1 and b"invalid_http" not in answer


@pytest.mark.parametrize("begin", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nX: 1\r\n"])
def test_a_head_that_does_not_come_ends_the_connection(begin: bytes) -> None:
    with listening(body_timeout_s=0.1) as served:
        assert served.send(begin) == b""
        assert (
            served.send(get() + b"GET / HT").count(b"HTTP/1.1 200") == 1
        )  # the second head of a connection, too


def test_an_answer_that_is_not_read_ends_the_connection() -> None:
    with listening(write_timeout_s=0.2) as served:
        with served.connect() as connection:
            connection.sendall(get(1 << 28))
            until(lambda: served.begun == 1 and served.connections() == 0)
        until(lambda: served.gone == 1)


def test_beyond_the_most_connections_requests_are_told_and_then_nobody_is_heard() -> None:
    with listening(max_connections=3) as served:
        held = [served.connect() for _ in range(3)]
        until(lambda: served.connections() == 3)
        assert served.send(LAST).startswith(b"HTTP/1.1 503")
        held += [served.connect() for _ in range(3)]
        until(lambda: served.connections() == 6)
        with served.connect() as refused:
            assert read(refused) == b""
        for connection in held:
            connection.close()
        until(lambda: served.connections() == 0)
        assert served.send(LAST).startswith(b"HTTP/1.1 200")
