"""The engine's benchmark: its client, its turns, its rows, and the figures that it left in the repository."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import jsonschema_rs
import pytest

from sharewell.bench import Report, find_benchmark, list_benchmarks

ROOT = Path(__file__).parents[2]
if str(ROOT) not in sys.path:  # as `sharewell bench` does it
    sys.path.insert(0, str(ROOT))

from benchmarks import docs_table  # noqa: E402
from benchmarks.serving.load import Answer, Load, WrongAnswer, send  # noqa: E402
from benchmarks.serving.peers import find_peer  # noqa: E402
from benchmarks.serving.processes import Group  # noqa: E402
from benchmarks.serving.stage import Turn, row  # noqa: E402
from benchmarks.serving.workload import Prompts, spaced_lengths  # noqa: E402

PAUSE_S = 0.05


class _Completions(BaseHTTPRequestHandler):
    """A server of OpenAI's protocol that answers after a known time; ``model`` says what it does wrong."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if body["model"] == "refusing":
            self.send_error(429)
            return
        self.send_response(200)
        self.end_headers()
        new = body["max_tokens"]
        for _ in range(new):
            time.sleep(PAUSE_S)
            self._event({"choices": [{"text": "a"}]})
        given = new - 1 if body["model"] == "short" else new
        self._event(
            {"choices": [], "usage": {"prompt_tokens": len(body["prompt"]), "completion_tokens": given}}
        )
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, event: dict[str, object]) -> None:
        self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Completions)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_every_token_and_its_time_is_counted(url: str):
    load = send(url, "model", [[1, 2, 3], [4, 5]], 4)
    assert [(a.prompt_tokens, a.new_tokens, a.text) for a in load.answers] == [(3, 4, "aaaa"), (2, 4, "aaaa")]
    for answer in load.answers:
        assert len(answer.events_s) == 4
        assert answer.ttft_s >= PAUSE_S and answer.total_s >= 4 * PAUSE_S
    assert load.wall_s >= max(a.total_s for a in load.answers)


def test_one_client_sends_one_request_after_the_other(url: str):
    load = send(url, "model", [[1], [2], [3]], 2, clients=1)
    assert load.wall_s >= sum(a.total_s for a in load.answers)


def test_a_server_that_gives_other_tokens_than_asked_for_is_refused(url: str):
    with pytest.raises(WrongAnswer, match="asked for 3 tokens after 2, usage says"):
        send(url, "short", [[1, 2]], 3)
    with pytest.raises(WrongAnswer, match="429"):
        send(url, "refusing", [[1, 2]], 3)


def test_rates_follow_from_the_times_of_the_events():
    slow = Answer(10, 5, (0.5, 0.75, 1.0, 1.25, 1.5), "")
    fast = Answer(10, 5, (0.1, 0.2, 0.3, 0.4, 0.5), "")
    assert slow.decode_tokens_per_s == 4 / 1.0
    load = Load((slow, fast), 2.0)
    assert load.tokens_per_s == 5.0
    assert load.ttft_s == 0.3
    assert 0.1 < load.itl_p95_s <= 0.25


def test_a_row_compares_medians_and_says_when_a_peer_is_missing():
    ours = [Turn(30.0, 1, 1), Turn(10.0, 1, 1), Turn(20.0, 1, 1)]
    theirs = [Turn(10.0, 1, 1), Turn(5.0, 1, 1), Turn(20.0, 1, 1)]
    there = row("rate", ours, theirs, "tokens_per_s", "tokens/s", "higher", "peer", target=2.0)
    assert (there.ours, there.baseline, there.ratio, there.met) == (20.0, 10.0, 2.0, True)
    missing = row("rate", ours, None, "tokens_per_s", "tokens/s", "higher", "peer", target=2.0)
    assert (missing.baseline, missing.met, missing.note) == (None, False, "peer not installed")
    slower = row("time", ours, theirs, "tokens_per_s", "ms", "lower", "peer", target=1.0, scale=1e3)
    assert (slower.ours, slower.ratio, slower.met) == (20_000.0, 0.5, False)


def test_prompts_have_their_length_and_never_begin_alike(smollm2: Path):
    lengths = spaced_lengths(16, 32, 512, seed=3)
    assert (min(lengths), max(lengths), len(set(lengths))) == (32, 512, 16)
    prompts = Prompts(smollm2, seed=1).batch(lengths * 4)
    assert [len(p) for p in prompts] == lengths * 4
    assert len({tuple(p[:16]) for p in prompts}) == len(prompts)
    assert Prompts(smollm2, seed=1).take(40) == Prompts(smollm2, seed=1).take(40)


def test_a_group_that_stands_still_takes_no_cpu(tmp_path: Path):
    group = Group([sys.executable, "-c", "while True: pass"], {}, tmp_path / "log")
    try:
        deadline = time.monotonic() + 30
        while group.usage().cpu_s < 0.1 and time.monotonic() < deadline:
            time.sleep(0.02)
        group.pause()
        time.sleep(0.05)  # the signal is delivered
        before = group.usage().cpu_s
        time.sleep(0.3)
        assert before >= 0.1
        assert group.usage().cpu_s == before
        group.resume()
        while group.usage().cpu_s == before and time.monotonic() < deadline:
            time.sleep(0.02)
        assert group.usage().cpu_s > before
    finally:
        group.stop()
    assert group.process.poll() is not None


def test_a_peer_is_named_by_a_python_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SHAREWELL_PEER_VLLM", str(tmp_path / "python"))
    with pytest.raises(ValueError, match="SHAREWELL_PEER_VLLM must be the Python of an environment"):
        find_peer("vllm")
    monkeypatch.setenv("SHAREWELL_PEER_VLLM", sys.executable)  # ours: a Python, but without the package
    assert find_peer("vllm") is None


def test_the_table_of_a_page_is_replaced_and_nothing_else():
    page = "before\n<!-- table: engine -->\nold\n<!-- end -->\nafter\n"
    placed = docs_table.place(page, "engine", "new")
    assert placed == "before\n<!-- table: engine -->\nnew\n<!-- end -->\nafter\n"
    with pytest.raises(ValueError, match="no <!-- table: other -->"):
        docs_table.place(page, "other", "new")


def test_the_committed_report_has_a_row_for_every_line_of_the_claim():
    report = Report.load(find_benchmark("engine").result_path("full"))
    jsonschema_rs.validator_for(Report.json_schema()).validate(report.to_dict())
    answered = {r.claim[:3] for r in report.rows if r.target is not None}
    assert answered == {"(a)", "(b)", "(c)", "(d)", "(e)", "(f)"}
    assert [r.metric for r in report.rows if r.target is not None and r.baseline is None] == []


WITH_TABLE = [
    benchmark
    for benchmark in list_benchmarks(ROOT)
    for page in [ROOT / "docs" / benchmark.system.room / f"{benchmark.system.slug}.md"]
    if page.is_file() and f"<!-- table: {benchmark.system.slug} -->" in page.read_text("utf-8")
]


@pytest.mark.parametrize("benchmark", WITH_TABLE, ids=lambda b: b.system.slug)
def test_the_figures_on_a_page_are_those_of_the_committed_report(benchmark):
    page = ROOT / "docs" / benchmark.system.room / f"{benchmark.system.slug}.md"
    result = benchmark.result_path("full")
    slug = benchmark.system.slug
    table = docs_table.markdown(Report.load(result)) if result.is_file() else docs_table.not_run(slug)
    assert docs_table.place(page.read_text("utf-8"), benchmark.system.slug, table) == page.read_text("utf-8")
