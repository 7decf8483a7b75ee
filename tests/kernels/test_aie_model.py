"""The board model against the published timings, and its streams against a count of cycles."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from sharewell.kernels.aie_model import AieModel, BoardTiming, board_timings
from sharewell.kernels.aie_streams import StreamShape, simulate_streams
from sharewell.kernels.cli import app

# Published totals in ms for 512^3 at DIM 4 .. 128.
SWEEP_MS = {4: 6.194, 8: 3.230, 16: 1.811, 32: 1.123, 64: 0.792, 128: 0.586}


def test_the_model_meets_all_22_published_runs() -> None:
    compared = AieModel().compare()
    assert len(compared) == 22
    errors = [abs(c.error) for c in compared]
    assert max(errors) <= 0.16
    assert median(errors) <= 0.04
    cubes = [
        c
        for c in compared
        if c.published.dtype == "int16" and c.published.m == c.published.k == c.published.n
    ]
    assert len(cubes) == 12
    assert max(abs(c.error) for c in cubes) <= 0.08


def test_published_totals_are_compute_and_launch() -> None:
    for run in board_timings():
        if run.total_ms is not None:
            assert run.total_ms - run.compute_ms == pytest.approx(AieModel().board.launch_s * 1e3, abs=0.02)


def test_a_larger_tile_is_faster_as_on_the_board() -> None:
    reports = AieModel().sweep_dim(512, 512, 512)
    assert [r.dim_a for r in reports] == list(SWEEP_MS)
    for report, published in zip(reports, SWEEP_MS.values(), strict=True):
        assert report.latency_ms == pytest.approx(published, rel=0.06)
    ratio = reports[0].latency_ms / reports[-1].latency_ms
    assert ratio == pytest.approx(SWEEP_MS[4] / SWEEP_MS[128], rel=0.06)
    words = [r.words[0] + r.words[1] for r in reports]
    assert all(a == 2 * b for a, b in itertools.pairwise(words))


def test_the_headline_figures_of_the_paper() -> None:
    model = AieModel()
    report = model.simulate(1024, 1024, 1024)
    assert report.gops == pytest.approx(607, abs=13)
    assert report.bound == "memory"
    board = report.with_latency(3.537)
    assert board.gops == pytest.approx(607.2, abs=0.1)
    assert board.gops_per_w == pytest.approx(56.9, abs=0.05)
    assert model.pau(replace(board, gops=607.0)) == pytest.approx(211.2, abs=0.1)
    assert {name: round(x, 1) for name, x in model.frugality().items()} == {
        "cores": 22.0,
        "power": 7.1,
        "plio": 6.3,
    }
    assert (report.plio, report.cores, report.uram, report.dsp) == (26, 16, 0, 0)
    # 6 MiB of matrices become 50 MiB of traffic
    assert sum(report.words) * 16 == pytest.approx(50 * 2**20, rel=0.01)
    assert report.iterations == 128


def test_32768_times_the_operations_take_9_times_the_latency() -> None:
    model = AieModel()
    small, large = model.simulate(32, 32, 32, dim=16), model.simulate(1024, 1024, 1024)
    assert large.m**3 / small.m**3 == 32_768
    assert large.latency_ms / small.latency_ms == pytest.approx(3.537 / 0.393, rel=0.03)


def test_calibration_recovers_constants_that_it_never_saw() -> None:
    truth = AieModel(
        replace(AieModel().board, overhead_s=0.3e-3, memory_bytes_per_s=9e9, port_bytes_per_s=6e9)
    )
    runs = [replace(c.published, compute_ms=c.model.compute_ms) for c in truth.compare()]
    fitted = AieModel().calibrate(runs).board
    assert fitted.overhead_s == pytest.approx(0.3e-3, rel=1e-6)
    assert fitted.memory_bytes_per_s == pytest.approx(9e9, rel=1e-6)
    assert fitted.port_bytes_per_s == pytest.approx(6e9, rel=1e-6)


def test_calibration_on_the_published_runs_gives_the_shipped_constants() -> None:
    fitted, shipped = AieModel().calibrate().board, AieModel().board
    assert fitted.overhead_s == pytest.approx(shipped.overhead_s, rel=0.02)
    assert fitted.memory_bytes_per_s == pytest.approx(shipped.memory_bytes_per_s, rel=0.02)
    assert fitted.port_bytes_per_s == pytest.approx(shipped.port_bytes_per_s, rel=0.02)
    with pytest.raises(ValueError, match="1 runs do not determine"):
        AieModel().calibrate(board_timings()[:1])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("M,K\n1,2\n", "columns must be M,K,N,dim_a"),
        ("{head}\n", "at least one run"),
        ("{head}\n1,2,3,4,5,2,x,1\n", "line 2 must hold six whole numbers and two times"),
        ("{head}\n8,8,8,4,4,2,1.0,\n8,8,8,4,4,3,1.0,\n", "line 3 must hold positive sizes, 2 or 4 bytes"),
        ("{head}\n8,8,8,4,4,2,-1.0,\n", "line 2"),
        ("{head}\n8,8,8,4,4,2,nan,\n", "line 2"),
        ("{head}\n8,8,8,4\n", "line 2"),
    ],
)
def test_a_wrong_timing_file_is_named(tmp_path: Path, content: str, message: str) -> None:
    head = "M,K,N,dim_a,dim_b,bytes_per_element,compute_ms,total_ms"
    path = tmp_path / "t.csv"
    path.write_text(content.format(head=head))
    with pytest.raises(ValueError, match=message):
        board_timings(path)


def test_what_the_board_cannot_do_is_named() -> None:
    with pytest.raises(ValueError, match="board must be one of ve2302, got 'x'"):
        AieModel("x")
    with pytest.raises(ValueError, match="at most 34 cores, got 5 x 8"):
        AieModel(splits=5)
    with pytest.raises(ValueError, match="dtype must be int16 or int32"):
        AieModel().simulate(8, 8, 8, "int8")
    with pytest.raises(ValueError, match="at most 32768 bytes, got 256 x 128"):
        AieModel().simulate(512, 512, 512, dims=(256, 128))
    with pytest.raises(ValueError, match="8 divide K"):
        AieModel().simulate(64, 20, 64)
    with pytest.raises(ValueError, match="k must be at least 1"):
        AieModel().simulate(64, 0, 64)


# Streams


def test_no_deadlock_in_1000_random_shapes_when_the_result_fifo_holds_a_tile() -> None:
    rng = np.random.default_rng(0)
    for _ in range(1000):
        sizes = {
            n: int(rng.integers(1, 7)) for n in ("iterations", "groups", "a_words", "b_words", "c_words")
        }
        shape = StreamShape(
            splits=int(rng.integers(1, 4)),
            cascade=int(rng.integers(1, 9)),
            fifo_depth=int(rng.integers(1, 17)),
            **sizes,
        )
        for depth in (shape.tile_words, shape.tile_words + int(rng.integers(1, 50))):
            run = simulate_streams(replace(shape, c_depth=depth))
            assert run.deadlock is None, (shape, run.deadlock)
            assert len(run.finished) == shape.iterations


def test_too_shallow_a_result_fifo_deadlocks_and_is_named() -> None:
    shape = StreamShape.of_tile(32, 32, 32, iterations=3, fifo_depth=4, c_depth=8)
    assert shape.tile_words == 128
    run = simulate_streams(shape)
    assert run.deadlock is not None
    assert "the writer waits for split 0, which waits for words of A" in run.deadlock
    assert "the broadcast of A waits for room in the A FIFO of split 1" in run.deadlock
    assert "the C FIFO of split 1 is full (8 words, a tile has 128)" in run.deadlock
    assert run.finished == ()
    assert simulate_streams(replace(shape, c_depth=128)).deadlock is None
    assert simulate_streams(replace(shape, splits=1)).deadlock is None  # nobody else to wait for


def test_every_cycle_moves_a_word_of_the_busiest_stream() -> None:
    # Bound by A, by B, by the writer: initiation interval 1 in the steady state, exactly.
    for a_words, b_words, c_words in ((32, 64, 2), (4, 200, 2), (4, 16, 8)):
        shape = StreamShape(
            iterations=12,
            groups=8,
            a_words=a_words,
            b_words=b_words,
            c_words=c_words,
            c_depth=4 * 8 * c_words,
        )
        run = simulate_streams(shape)
        assert run.deadlock is None
        assert run.steady_period() == shape.period


@given(
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 6),
    st.integers(1, 8),
    st.integers(1, 20),
    st.integers(1, 6),
)
@settings(max_examples=80)
def test_no_iteration_is_faster_than_its_busiest_stream(
    splits: int, cascade: int, groups: int, a: int, b: int, c: int
) -> None:
    shape = StreamShape(splits, cascade, 8, groups, a, b, c, c_depth=8192)
    run = simulate_streams(shape)
    assert run.deadlock is None
    assert run.cycles >= 8 * shape.period
    assert run.steady_period() >= shape.period


def test_stream_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match="c_depth must be a whole number of at least 1, got 0"):
        StreamShape(c_depth=0)
    with pytest.raises(ValueError, match="DIM must be multiples of 4"):
        StreamShape.of_tile(6, 8, 8)
    with pytest.raises(ValueError, match="iterations must be at least 3"):
        simulate_streams(StreamShape(iterations=2)).steady_period()


def test_words_of_a_tile_agree_with_the_closed_form() -> None:
    report = AieModel().simulate(256, 512, 256, dim=32)
    shape = StreamShape.of_tile(32, 512 // 8, 32)
    per_core = report.iterations
    assert report.words[0] == per_core * 8 * shape.groups * shape.a_words  # broadcast: once for both splits
    assert report.words[1] == per_core * 16 * shape.b_words
    assert report.words[2] == per_core * 2 * shape.tile_words


def test_the_command_prints_the_table_beside_the_paper(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["aie", "--table"])
    assert result.exit_code == 0
    assert "PAU 211." in result.output
    assert result.output.count("int16") == 19 + 1
    result = CliRunner().invoke(app, ["aie", "--table", "--json"])
    assert len(json.loads(result.output)) == 22
    result = CliRunner().invoke(
        app, ["aie", "--m", "512", "--k", "512", "--n", "512", "--dim", "128", "--json"]
    )
    assert json.loads(result.output)["latency_ms"] == pytest.approx(0.586, rel=0.06)
    own = tmp_path / "own.csv"
    lines = ["M,K,N,dim_a,dim_b,bytes_per_element,compute_ms,total_ms"]
    for c in AieModel().compare():
        r: BoardTiming = c.published
        lines.append(f"{r.m},{r.k},{r.n},{r.dim_a},{r.dim_b},{r.item_bytes},{2 * r.compute_ms},")
    own.write_text("\n".join(lines) + "\n")
    result = CliRunner().invoke(app, ["aie", "--csv", str(own), "--json"])
    assert json.loads(result.output)["compute_ms"] == pytest.approx(2 * 3.319, rel=0.05)
