"""Everything that can go wrong around the real server, with real weights and processes that really die."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import sqlite3
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from server_process import ServerProcess, stream

MIB = 1 << 20
PROMPTS = [
    "The lighthouse stood on the cliff, and every night",
    "To bake bread you need",
    "List the planets of the solar system:",
    "In 1969, two men walked on the moon. The first of them",
    "def fibonacci(n):",
    "Once upon a time, in a village by the sea, a girl found",
    "The most important rule of safety in a laboratory is",
    "Dear Sir or Madam, I am writing to you because",
]


def until(true: Callable[[], bool], what: str, timeout_s: float = 60) -> None:
    """Wait for something that must come; how long it takes decides nothing."""
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s} s"
        time.sleep(0.02)


def ledger(server: ServerProcess) -> tuple[int, int, int]:
    """Requests, prompt tokens and completion tokens in the ledger, read as another program would."""
    with sqlite3.connect(f"file:{server.state_path}?mode=ro", uri=True) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        return db.execute(
            "SELECT COUNT(*), COALESCE(SUM(prompt_tokens), 0), COALESCE(SUM(completion_tokens), 0) FROM usage"
        ).fetchone()


class Streams:
    """Streams that several clients read at once, each event as it comes."""

    def __init__(self, server: ServerProcess, prompts: list[str], max_tokens: int, **fields: Any) -> None:
        self.texts = [""] * len(prompts)
        self.usage: list[dict[str, int] | None] = [None] * len(prompts)
        self.errors: list[dict[str, Any] | None] = [None] * len(prompts)
        self.events = [0] * len(prompts)
        self._pool = ThreadPoolExecutor(len(prompts))
        fields = {"stream_options": {"include_usage": True}, "ignore_eos": True, **fields}
        self._done = [
            self._pool.submit(self._read, server, i, prompt, max_tokens, fields)
            for i, prompt in enumerate(prompts)
        ]

    def _read(self, server: ServerProcess, i: int, prompt: str, max_tokens: int, fields: dict) -> None:
        try:
            for event in stream(server.client, prompt, max_tokens, **fields):
                self.events[i] += 1
                if "error" in event:
                    self.errors[i] = event["error"]
                for choice in event.get("choices", ()):
                    self.texts[i] += choice["text"]
                self.usage[i] = event.get("usage") or self.usage[i]
        except httpx.HTTPStatusError as refusal:  # before the first event
            self.errors[i] = refusal.response.json()["error"]

    def all_begun(self, events: int = 4) -> bool:
        return all(n >= events for n in self.events)

    def counts(self) -> list[tuple[int, int]]:
        """Prompt and completion tokens that each answer reported."""
        return [(u["prompt_tokens"], u["completion_tokens"]) for u in self.usage if u is not None]

    def join(self) -> None:
        for done in self._done:
            done.result(timeout=120)
        self._pool.shutdown()


@pytest.fixture(scope="module")
def broken_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter of finite weights under which every answer overflows."""
    import torch
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("overflow")
    settings = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["v_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    name = "base_model.model.model.layers.0.self_attn.v_proj.lora_"
    huge = torch.finfo(torch.float32).max
    signs = torch.where(torch.arange(576) % 2 == 0, huge, -huge)
    tensors = {name + "A.weight": signs[None].clone(), name + "B.weight": torch.full((192, 1), huge)}
    save_file(tensors, str(folder / "adapter_model.safetensors"))
    return folder


@pytest.fixture(scope="module")
def exact(
    tmp_path_factory: pytest.TempPathFactory, smollm2: Path, broken_adapter: Path
) -> Iterator[ServerProcess]:
    """Float32, a cache of 64 blocks that requests soon fill, and little patience with slow clients."""
    engine = {
        "dtype": "float32",
        "num_blocks": 64,
        "max_seqs": 8,
        "adapters": {"broken": str(broken_adapter)},
    }
    patience = {"body_timeout_s": 2.0, "write_timeout_s": 2.0}
    with ServerProcess(tmp_path_factory.mktemp("exact"), engine=engine, **patience) as running:
        yield running
    assert "Traceback" not in running.log


# The engine


def test_eight_streams_go_on_exactly_when_the_engine_is_killed(exact: ServerProcess) -> None:
    undisturbed = Streams(exact, PROMPTS, 24)
    undisturbed.join()
    assert len(undisturbed.counts()) == 8 and undisturbed.errors == [None] * 8
    written = ledger(exact)
    restarts = exact.engine()["restarts"]

    killed = Streams(exact, PROMPTS, 24)
    until(killed.all_begun, "every stream has begun")
    psutil.Process(exact.engine_pid()).kill()
    killed.join()
    assert killed.errors == [None] * 8
    assert killed.texts == undisturbed.texts
    assert killed.counts() == undisturbed.counts() == [(n, 24) for n, _ in undisturbed.counts()]
    assert exact.engine()["restarts"] == restarts + 1

    answer = exact.answer(PROMPTS[0], 24, ignore_eos=True)
    assert answer["choices"][0]["text"] == undisturbed.texts[0]
    reported = [*killed.usage, answer["usage"]]
    prompt, completion = (
        sum(u[f"{name}_tokens"] for u in reported if u) for name in ("prompt", "completion")
    )
    assert ledger(exact) == (written[0] + 9, written[1] + prompt, written[2] + completion)


def test_only_the_request_with_nan_logits_fails_and_its_pages_harm_nobody(exact: ServerProcess) -> None:
    long = " ".join(PROMPTS) * 4  # takes most of the 64 blocks
    alone = exact.answer(long, 8)["choices"][0]["text"]
    neighbours = Streams(exact, PROMPTS[:2], 24)
    refusal = exact.client.post(
        "/v1/completions", json={"model": "smollm2:broken", "prompt": long, "max_tokens": 8, "temperature": 0}
    )
    neighbours.join()
    assert refusal.status_code == 500 and refusal.json()["error"]["code"] == "nan_logits"
    assert neighbours.errors == [None, None] and None not in neighbours.usage
    # The pages that held NaN are now this request's, partly filled.
    assert exact.answer(long[: len(long) // 2], 1) and exact.answer(long, 8)["choices"][0]["text"] == alone
    again = Streams(exact, PROMPTS[:2], 24)
    again.join()
    assert again.texts == neighbours.texts


def test_clients_that_leave_free_their_blocks_at_once(exact: ServerProcess) -> None:
    assert exact.engine()["blocks_used"] == 0
    clients = [httpx.Client(base_url=exact.url, timeout=60) for _ in range(6)]
    streams = [stream(c, p, 900, ignore_eos=True) for c, p in zip(clients, PROMPTS[:6], strict=True)]
    for events in streams:
        next(events)
    before = exact.engine()
    assert before["running"] == 6 and before["blocks_used"] > 0
    for events, client in zip(streams, clients, strict=True):
        events.close()
        client.close()
    until(lambda: exact.engine()["running"] == 0, "nothing runs")
    after = exact.engine()
    assert (after["blocks_used"], after["waiting"]) == (0, 0)
    # Each of the six was to generate 900 tokens. How many steps pass until the server sees that a client has
    # gone is a matter of the machine; that it takes one step from there is tested with the engine's host.
    assert after["generated_tokens"] - before["generated_tokens"] < 600


# The network


def send(server: ServerProcess, data: bytes, timeout_s: float = 30) -> bytes:
    """Everything that the server answers to these bytes until it closes the connection or is silent."""
    with socket.create_connection(server.address, timeout=timeout_s) as connection:
        try:
            connection.sendall(data)
            answer = b""
            while part := connection.recv(65536):
                answer += part
        except (TimeoutError, ConnectionError):
            pass
        return answer


def head(size: int | None, path: str = "/v1/completions", *more: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json", *more]
    lines.append("Transfer-Encoding: chunked" if size is None else f"Content-Length: {size}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def test_a_body_of_50_mb_is_refused_and_not_kept(exact: ServerProcess) -> None:
    before = exact.memory_bytes()
    size = 50 * MIB
    body = b'{"model": "smollm2", "prompt": "' + b"a" * (size - 34) + b'"}'
    declared = exact.client.post("/v1/completions", content=body)
    assert declared.status_code == 413
    error = declared.json()["error"]
    assert error["code"] == "body_too_large" and str(len(body)) in error["message"]

    def pieces() -> Iterator[bytes]:
        for start in range(0, size, MIB):
            yield body[start : start + MIB]

    chunked = exact.client.post("/v1/completions", content=pieces())
    assert chunked.status_code == 413 and chunked.json()["error"]["code"] == "body_too_large"
    assert b" 413 " in send(exact, head(size, "/v1/completions", "Expect: 100-continue"))
    assert exact.memory_bytes() - before < 40 * MIB
    assert exact.answer("Hello", 1)["usage"]["completion_tokens"] == 1


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"{", None),
        (b"", None),
        (b"\xff\xfe", None),
        (b'{"model": "smollm2", "prompt": "a", "n": 1e999}', None),
        (b"[" * 100_000, None),
        (b'{"model": "smollm2", "prompt": "\\ud800"}', None),
        (b'["smollm2"]', None),
        (b'{"model": "smollm2", "prompt": {"a": 1}}', "prompt"),
        (b'{"model": "smollm2", "prompt": "a", "max_tokens": "many"}', "max_tokens"),
        (b'{"model": "smollm2", "prompt": "a", "temperature": null, "top_p": []}', "top_p"),
        (b'{"model": "smollm2", "prompt": [1, 2, 99999999]}', "prompt"),
    ],
)
def test_a_malformed_body_is_refused_with_its_field(
    exact: ServerProcess, body: bytes, param: str | None
) -> None:
    answer = exact.client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["message"] and error["type"] == "invalid_request_error"
    if param is not None:
        assert error["param"] == param


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc", b"400"),  # TLS
        (b"GET / HTTP/9.9\r\n\r\n", b"400"),
        (b"nonsense\r\n\r\n", b"400"),
        (b"GET /health HTTP/1.1\r\nX: " + b"a" * 100_000, b"431"),
        (head(None, "/v1/completions") + b"nothex\r\n", b"400"),
        (b"POST /v1/completions HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n", b"400"),
    ],
)
def test_what_is_not_http_is_refused_in_the_api_s_own_form(
    exact: ServerProcess, data: bytes, status: bytes
) -> None:
    answer = send(exact, data)
    assert answer.startswith(b"HTTP/1.1 " + status)
    assert "message" in json.loads(answer.partition(b"\r\n\r\n")[2])["error"]


def test_a_body_that_does_not_arrive_is_given_up(exact: ServerProcess) -> None:
    answer = send(exact, head(100) + b'{"model": ')
    assert b" 408 " in answer and b"body_timeout" in answer


def test_a_head_that_trickles_in_is_cut_off(exact: ServerProcess) -> None:
    with socket.create_connection(exact.address, timeout=30) as connection:
        ended = threading.Event()

        def trickle() -> None:
            try:
                for byte in b"GET /health HTTP/1.1\r\nX-Slow: " + b"a" * 10_000:
                    connection.send(bytes([byte]))
                    if ended.wait(0.1):
                        return
            except OSError:
                pass

        sender = threading.Thread(target=trickle)
        sender.start()
        try:
            assert connection.recv(1) == b""
        except ConnectionError:
            pass
        ended.set()
        sender.join()


def test_a_client_that_never_reads_is_cut_off_and_little_is_kept_for_it(exact: ServerProcess) -> None:
    before = exact.memory_bytes()
    tokens = exact.client.post("/tokenize", json={"prompt": " internationalization" * 1000}).json()["tokens"]
    body = json.dumps({"tokens": tokens * 300}).encode()  # more text than the kernel's buffers hold
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(30)
        connection.connect(exact.address)
        connection.sendall(head(len(body), "/detokenize") + body)
        peer = connection.getsockname()[1]

        def has_connection() -> bool:
            return any(c.raddr and c.raddr.port == peer for c in psutil.Process(exact.pid).net_connections())

        assert connection.recv(16, socket.MSG_PEEK).startswith(b"HTTP/1.1 200")  # it has begun to answer
        until(lambda: not has_connection(), "the server gives it up")
        connection.settimeout(5)
        received = 0
        with contextlib.suppress(OSError):
            while part := connection.recv(1 << 20):
                received += len(part)
    assert received < len(" internationalization") * 1000 * 300
    assert exact.memory_bytes() - before < 100 * MIB


def test_a_client_that_asks_ahead_of_its_answers_without_end_is_cut_off(exact: ServerProcess) -> None:
    before = exact.memory_bytes()
    request = b"GET /page/page.css HTTP/1.1\r\nHost: x\r\n\r\n"
    few = send(exact, request * 8 + request.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
    assert few.count(b"HTTP/1.1 200 OK") == 9
    with socket.create_connection(exact.address, timeout=30) as connection, pytest.raises(OSError):
        for _ in range(1000):
            connection.sendall(request * 1000)
    assert exact.memory_bytes() - before < 40 * MIB


def test_five_hundred_half_open_connections_hold_up_nobody(exact: ServerProcess) -> None:
    process = psutil.Process(exact.pid)
    exact.answer("Hello", 1)
    files, memory = process.num_fds(), exact.memory_bytes()
    half = [socket.create_connection(exact.address, timeout=30) for _ in range(500)]
    for i, connection in enumerate(half):
        connection.sendall((b"", b"GET / HT", head(50)[:-4], head(50) + b"{")[i % 4])
    until(lambda: process.num_fds() >= files + 400, "the connections are there")
    assert exact.answer("Hello", 4)["usage"]["completion_tokens"] == 4
    assert exact.memory_bytes() - memory < 40 * MIB
    until(lambda: process.num_fds() <= files + 8, "the server has closed them")
    for connection in half:
        connection.close()


def test_connections_that_reset_in_the_middle_of_everything_leave_nothing_behind(
    exact: ServerProcess,
) -> None:
    process = psutil.Process(exact.pid)
    files = process.num_fds()
    body = json.dumps(
        {"model": "smollm2", "prompt": PROMPTS[0], "max_tokens": 400, "ignore_eos": True, "stream": True}
    ).encode()
    whole = head(len(body)) + body
    for cut in (1, 30, len(whole) // 2, len(whole) - 1, len(whole), len(whole)):
        connection = socket.create_connection(exact.address, timeout=30)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close by reset
        connection.sendall(whole[:cut])
        if cut == len(whole):
            assert connection.recv(16)
        connection.close()
    until(lambda: exact.engine()["running"] == 0 and process.num_fds() <= files + 4, "all is cleared away")
    assert exact.engine()["blocks_used"] == 0


# Overload, keys, and the end


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Path:
    """A model that can be taken away and given back."""
    folder = tmp_path_factory.mktemp("models") / "lost"
    folder.mkdir()
    for path in smollm2.iterdir():
        (folder / path.name).symlink_to(path)
    return folder


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Iterator[ServerProcess]:
    """One request runs, one waits; an engine that cannot be restarted is given up after two seconds."""
    engine = {"model": str(model_folder), "max_seqs": 1, "max_waiting": 1, "kv_cache_bytes": 64 * MIB}
    with ServerProcess(
        tmp_path_factory.mktemp("narrow"), engine=engine, recover_timeout_s=2.0, served_names=["smollm2"]
    ) as running:
        yield running


def test_a_full_queue_is_told_with_the_time_to_come_back(narrow: ServerProcess) -> None:
    events = stream(narrow.client, PROMPTS[0], 1000, ignore_eos=True)
    next(events)
    waiting = Streams(narrow, PROMPTS[1:2], 2)
    until(lambda: narrow.engine()["waiting"] == 1, "one waits")
    body = {"model": "smollm2", "prompt": PROMPTS[2], "max_tokens": 2}
    for more in ({}, {"stream": True}):
        refused = narrow.client.post("/v1/completions", json=body | more)
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "queue_full"
    events.close()
    waiting.join()
    assert waiting.errors == [None]
    assert narrow.answer(PROMPTS[2], 2, ignore_eos=True)["usage"]["completion_tokens"] == 2


def test_streams_end_with_an_error_event_when_the_engine_cannot_come_back(
    narrow: ServerProcess, model_folder: Path
) -> None:
    streams = Streams(narrow, PROMPTS[:2], 1000)
    until(lambda: streams.events[0] + streams.events[1] >= 4, "a stream has begun")
    away = model_folder.with_name("away")
    model_folder.rename(away)
    killed = time.monotonic()
    psutil.Process(narrow.engine_pid()).kill()
    streams.join()
    assert time.monotonic() - killed < 2.0 + 30  # the patience that was configured, and a slow machine
    # One had begun and got an event; the other had waited, and got a plain 503.
    assert [e and e["code"] for e in streams.errors] == ["engine_lost"] * 2
    assert min(streams.events) == 0 < max(streams.events)
    refused = narrow.client.post("/v1/completions", json={"model": "smollm2", "prompt": "a"})
    assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["code"] == "engine_unavailable"
    assert narrow.client.get("/stats").status_code == 200  # the page goes on

    away.rename(model_folder)

    def answered() -> bool:
        return narrow.client.post("/v1/completions", json={"model": "smollm2", "prompt": "a"}).is_success

    until(answered, "the engine is back by itself", 120)


def test_a_killed_server_leaves_no_engine_behind_and_its_ledger_has_all_that_was_reported(
    tmp_path: Path, smollm2: Path
) -> None:
    from sharewell.serving.api.keys import StateStore
    from sharewell.simulation import WallClock

    store = StateStore(tmp_path / "state.sqlite3", WallClock())
    secret = store.add_key("alice", total_tokens=10**6)
    options: dict[str, Any] = {"engine": {"kv_cache_bytes": 64 * MIB}, "state_path": store_path(tmp_path)}
    reported: list[dict[str, int]] = []
    with ServerProcess(tmp_path / "first", **options) as first:
        body = {"model": "smollm2", "prompt": "Hello", "max_tokens": 3}
        assert first.client.post("/v1/completions", json=body).status_code == 401
        first.client.headers["Authorization"] = f"Bearer {secret}"
        engine = psutil.Process(first.engine_pid())
        stop = threading.Event()

        def ask(prompt: str) -> None:
            while not stop.is_set():
                try:
                    reported.append(first.answer(prompt, 3, ignore_eos=True)["usage"])
                except httpx.HTTPError:
                    return

        clients = [threading.Thread(target=ask, args=(p,)) for p in PROMPTS[:3]]
        for client in clients:
            client.start()
        until(lambda: len(reported) >= 12, "answers have come")
        first.kill()
        stop.set()
        for client in clients:
            client.join()
    until(lambda: not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE, "the engine has ended")

    requests, prompt, completion = ledger(first)
    assert requests >= len(reported)
    assert prompt >= sum(u["prompt_tokens"] for u in reported)
    assert completion >= sum(u["completion_tokens"] for u in reported)
    (row,) = store.list_keys()
    assert (row["requests"], row["tokens"]) == (requests, prompt + completion)
    # Not more either than those and what was under way, one request a client.
    assert requests <= len(reported) + len(clients)

    with ServerProcess(tmp_path / "second", **options) as second:
        second.client.headers["Authorization"] = f"Bearer {secret}"
        events = stream(second.client, "Once upon a time", 40, ignore_eos=True)
        texts = [next(events)]
        second.interrupt(signal.SIGTERM)

        def drains() -> bool:
            return second.client.get("/health").status_code == 503

        until(drains, "it drains")
        refused = second.client.post("/v1/completions", json=body)
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "draining"
        assert int(refused.headers["retry-after"]) >= 1
        texts += list(events)
        assert texts[-1]["choices"][0]["finish_reason"] == "length"
        assert second.wait() == 0
    (row,) = store.list_keys()
    assert row["tokens"] == prompt + completion + 40 + len_of(second, "Once upon a time")
    store.close()


def store_path(folder: Path) -> str:
    return str(folder / "state.sqlite3")


def len_of(server: ServerProcess, text: str) -> int:
    from sharewell.models import Tokenizer, resolve_model

    return len(Tokenizer(resolve_model("smollm2", progress=False)).encode(text))


def test_what_does_not_finish_in_time_ends_with_an_error_event(tmp_path: Path, smollm2: Path) -> None:
    with ServerProcess(tmp_path, engine={"kv_cache_bytes": 64 * MIB}, drain_timeout_s=0.5) as server:
        streams = Streams(server, PROMPTS[:2], 6000)
        until(lambda: streams.all_begun(2), "they have begun")
        server.interrupt(signal.SIGTERM)
        streams.join()
        assert [e and e["code"] for e in streams.errors] == ["engine_closed"] * 2
        assert server.wait() == 0
