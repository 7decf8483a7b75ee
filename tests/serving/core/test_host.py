"""The host's loop and its wire: nothing is lost in between, and slow side work holds up no step."""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hash_runner import EOS, VOCAB, make_core, reference, tiny_adapter
from hypothesis import given
from hypothesis import strategies as st

from sharewell.serving.core.engine import EngineCore
from sharewell.serving.core.grammar import GrammarState
from sharewell.serving.core.host import (
    CANCEL,
    CLOSE,
    MAX_FRAME,
    OUTPUTS,
    REFUSED,
    STATS,
    SUBMIT,
    Built,
    Frames,
    Host,
    output_of,
    output_row,
    pack,
)
from sharewell.serving.core.messages import (
    EngineRequest,
    GrammarSpec,
    SamplingParams,
    TokenLogprob,
    TokenOutput,
    from_wire,
    to_wire,
)

scores = st.builds(
    TokenLogprob,
    st.integers(0, VOCAB),
    st.floats(-50, 0),
    st.lists(st.tuples(st.integers(0, VOCAB), st.floats(-50, 0)), max_size=3).map(tuple),
)
outputs = st.builds(
    TokenOutput,
    st.text(min_size=1),
    st.integers(0, 127),
    st.lists(st.integers(0, 2**31 - 1), max_size=3).map(tuple),
    st.lists(scores, max_size=2).map(tuple),
    st.sampled_from([None, "stop", "length", "error"]),
)
requests = st.builds(
    EngineRequest,
    st.text(min_size=1),
    st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=20).map(tuple),
    st.builds(
        SamplingParams,
        temperature=st.floats(0, 2),
        seed=st.integers(0, 2**64 - 1),
        logit_bias=st.dictionaries(st.integers(0, 99), st.floats(-100, 100), max_size=3),
        stop_token_ids=st.lists(st.integers(0, 99), max_size=2).map(tuple),
        grammar=st.none() | st.builds(GrammarSpec, st.just("regex"), st.text()),
    ),
    n=st.just(2),
    adapter=st.none() | st.text(),
    deadline_s=st.none() | st.floats(0, 1e9),
    emitted=st.sampled_from([(), ((), ()), ((1, 2), ())]),
    finished=st.sampled_from([(), (1,)]),
)


@given(st.lists(outputs, max_size=4), st.lists(requests, max_size=2), st.integers(1, 50))
def test_messages_arrive_as_they_were_however_the_bytes_are_cut(
    sent: list[TokenOutput], asked: list[EngineRequest], piece: int
) -> None:
    data = pack([OUTPUTS, [output_row(o) for o in sent]]) + b"".join(
        pack([SUBMIT, to_wire(r)]) for r in asked
    )
    frames, messages = Frames(), []
    for i in range(0, len(data), piece):
        messages += frames.feed(data[i : i + piece])
    assert [output_of(row) for row in messages[0][1]] == sent
    assert [from_wire(m[1]) for m in messages[1:]] == asked


def test_rare_fields_of_an_output_arrive() -> None:
    full = TokenOutput(
        "r",
        1,
        (5,),
        (TokenLogprob(5, -0.5, ((5, -0.5),)),),
        "error",
        7,
        "nan_logits",
        32,
        (None, TokenLogprob(1, -2.0)),
    )
    (message,) = Frames().feed(pack([OUTPUTS, [output_row(full)]]))
    assert output_of(message[1][0]) == full
    only_scores = TokenOutput("r", 0, (5,), prompt_logprobs=())
    (message,) = Frames().feed(pack([OUTPUTS, [output_row(only_scores)]]))
    assert output_of(message[1][0]) == only_scores


def test_a_frame_beyond_the_limit_is_refused() -> None:
    with pytest.raises(ValueError, match="beyond"):
        Frames().feed(struct.pack("<I", MAX_FRAME + 1))


class Client:
    """The other end of a host that runs in a thread."""

    def __init__(self, core: EngineCore) -> None:
        self.socket, theirs = socket.socketpair()
        self.socket.settimeout(30)
        self._frames, self._messages = Frames(), []
        built = Built(core, lambda name, path: tiny_adapter(name, int(path)))
        self.thread = threading.Thread(target=Host(theirs, built).run, daemon=True)
        self.thread.start()

    def send(self, message: Any) -> None:
        self.socket.sendall(pack(message))

    def receive(self) -> list[Any]:
        while not self._messages:
            self._messages = self._frames.feed(self.socket.recv(1 << 16))
        return self._messages.pop(0)

    def answer(self, name: str) -> tuple[list[int], str | None]:
        """Everything that comes until ``name`` has ended; it must be the only one that comes."""
        tokens: list[int] = []
        while True:
            message = self.receive()
            assert message[0] == OUTPUTS, message
            for output in map(output_of, message[1]):
                assert output.request_id == name
                tokens += output.token_ids
                if output.finish_reason:
                    return tokens, output.finish_reason

    def close(self) -> None:
        self.send([CLOSE])
        self.thread.join(30)
        assert not self.thread.is_alive()
        self.socket.close()


@pytest.fixture
def slow(
    smollm2: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Client, threading.Event, EngineCore]]:
    """A host whose grammars are compiled only when the event is set."""
    core, _ = make_core(vocab=49152, tokenizer=smollm2 / "tokenizer.json")
    go, compile_grammar = threading.Event(), core.compile_grammar

    def slowly(spec: GrammarSpec) -> GrammarState:
        assert go.wait(30)
        return compile_grammar(spec)

    monkeypatch.setattr(core, "compile_grammar", slowly)
    client = Client(core)
    yield client, go, core
    go.set()
    client.close()


def constrained(name: str, pattern: str) -> EngineRequest:
    return EngineRequest(
        name, (5, 6), SamplingParams(temperature=0, max_tokens=30, grammar=GrammarSpec("regex", pattern))
    )


def test_a_slow_grammar_holds_up_no_other_request(slow: tuple[Client, threading.Event, EngineCore]) -> None:
    client, go, _ = slow
    client.send([SUBMIT, to_wire(constrained("slow", "[ab]{3}"))])
    plain = EngineRequest(
        "plain", (7, 8), SamplingParams(temperature=0, max_tokens=5, stop_token_ids=(), ignore_eos=True)
    )
    client.send([SUBMIT, to_wire(plain)])
    assert len(client.answer("plain")[0]) == 5
    go.set()
    assert client.answer("slow")[1] == "stop"


def test_a_request_cancelled_while_its_grammar_is_compiled_never_runs(
    slow: tuple[Client, threading.Event, EngineCore],
) -> None:
    client, go, core = slow
    client.send([SUBMIT, to_wire(constrained("gone", "[ab]{3}"))])
    client.send([CANCEL, "gone", None])
    client.send([SUBMIT, to_wire(constrained("kept", "[cd]{3}"))])
    go.set()
    assert client.answer("kept")[1] == "stop"
    assert not core._live


def test_a_refused_grammar_is_reported_with_its_reason(
    slow: tuple[Client, threading.Event, EngineCore],
) -> None:
    client, go, _ = slow
    go.set()
    client.send([SUBMIT, to_wire(constrained("bad", "(("))])
    kind, name, code, text = client.receive()
    assert (kind, name, code) == (REFUSED, "bad", "invalid_grammar") and "invalid regex" in text


def test_the_loop_ends_when_the_other_side_is_gone() -> None:
    core, _ = make_core()
    client = Client(core)
    request = EngineRequest("r", (5, 6), SamplingParams(temperature=0, max_tokens=4, stop_token_ids=(EOS,)))
    client.send([SUBMIT, to_wire(request)])
    assert client.answer("r") == reference(request)
    client.socket.close()
    client.thread.join(30)
    assert not client.thread.is_alive()


def test_a_schema_is_compiled_once_for_all_its_requests(smollm2: Path) -> None:
    core, _ = make_core(vocab=49152, tokenizer=smollm2 / "tokenizer.json")
    spec = GrammarSpec("json_schema", json.dumps({"type": "boolean"}))
    assert not core.grammar_ready(spec)
    client = Client(core)
    for name in ("a", "b"):
        sampling = SamplingParams(temperature=0, max_tokens=9, grammar=spec)
        client.send([SUBMIT, to_wire(EngineRequest(name, (5, 6), sampling))])
        assert client.answer(name)[1] == "stop"
        assert core.grammar_ready(spec)
    client.close()


def test_a_cancelled_request_is_gone_before_the_next_step() -> None:
    """However many requests run, no step begins after the host could read their cancellation."""
    core, runner = make_core(num_blocks=256)
    go = threading.Semaphore(0)
    steps: list[int] = []

    def before_run(batch: Any) -> None:
        steps.append(len(batch.context_lens))
        go.acquire()  # the test says when a step may end

    runner.before_run = before_run
    client = Client(core)
    for i in range(6):
        sampling = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
        client.send([SUBMIT, to_wire(EngineRequest(f"r{i}", (5 + i, 6), sampling))])
    for _ in range(20):
        go.release()
    while len(steps) < 21:
        time.sleep(0.001)
    assert core.blocks.num_used > 0
    for i in range(6):
        client.send([CANCEL, f"r{i}", None])
    for _ in range(100):
        go.release()  # from here on every step could run
    client.send([STATS])
    while (message := client.receive())[0] != STATS:
        pass
    stats = from_wire(message[1])
    assert (stats.running, stats.waiting, stats.blocks_used) == (0, 0, 0)
    assert len(steps) <= 22  # the one under way when the cancellations came, and at most one more
    client.close()
