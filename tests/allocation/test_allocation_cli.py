"""The room's commands do what their help says, and name what is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from sharewell.allocation.cli import auction_app, grank_app, waterfill

RUNNER = CliRunner()
WATERFILL = typer.Typer()
WATERFILL.command()(waterfill)


def ok(app: typer.Typer, *args: str) -> str:
    result = RUNNER.invoke(app, list(args))
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def channel(path: Path, cross: float) -> Path:
    H = np.full((2, 2, 2), cross)
    H[[0, 1], [0, 1]] = 1.0
    np.savez(path, H=H, noise=np.array([[0.1, 0.2], [0.2, 0.1]]), power=np.ones(2))
    return path


def test_waterfill_reports_certificate_and_allocation(tmp_path: Path):
    file = channel(tmp_path / "channel.npz", 0.3)
    told = json.loads(ok(WATERFILL, str(file), "--schedule", "async", "--max-delay", "5", "--json"))
    assert told["converged"] and told["rho"] == pytest.approx(0.3) and "asynchronous" in told["guaranteed"]
    np.testing.assert_allclose(np.sum(told["p"], axis=1), 1)
    ok(WATERFILL, str(file), "--report", str(tmp_path / "out.json"))
    np.testing.assert_allclose(json.loads((tmp_path / "out.json").read_text())["p"], told["p"], atol=1e-8)
    assert "certain to converge: sequential, simultaneous, asynchronous" in ok(WATERFILL, str(file))
    unsettled = RUNNER.invoke(WATERFILL, [str(channel(tmp_path / "c.npz", 9.0)), "--max-iter", "1"])
    assert unsettled.exit_code == 1 and "iteration limit" in unsettled.output


def test_auction_run_gives_figures_bound_reasons_and_a_table(tmp_path: Path):
    out = tmp_path / "who.csv"
    told = json.loads(ok(auction_app, "run", "--size", "60", "--json", "--out", str(out)))
    assert 0 < told["metrics"]["of_bound"] <= 1
    lost = [i for i, j in enumerate(told["assign"]) if j < 0]
    assert sorted(map(int, told["reasons"])) == lost
    lines = out.read_text().splitlines()
    assert len(lines) == 61 and lines[0] == "request,resource,payment,utility,reason"
    assert "mohaf" in ok(auction_app, "run", "--size", "40")
    table = json.loads(ok(auction_app, "bench", "--seeds", "1", "--size", "80", "--json"))
    assert set(table) == {"mohaf", "greedy", "first-price", "random", "best-fit"}


@pytest.mark.parametrize(
    ("app", "args", "message"),
    [
        (auction_app, ["run", "--machines", "m.csv"], "--machines"),
        (auction_app, ["run", "--requests", "r.csv"], "--requests"),
        (grank_app, ["sync"], "--peer"),
        (grank_app, ["sync", "--peer", "nowhere"], "HOST:PORT"),
        (grank_app, ["index", "no-such-folder"], "FOLDER"),
    ],
)
def test_wrong_use_ends_with_exit_code_2(
    app: typer.Typer, args: list[str], message: str, tmp_path: Path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    result = RUNNER.invoke(app, args)
    assert result.exit_code == 2 and message in result.output


def test_documents_are_found_and_clicks_travel_between_two_machines(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "blue-train.md").write_text("jazz jazz jazz saxophone record")
    (tmp_path / "docs" / "cooking.md").write_text("pasta tomato jazz kitchen")
    assert "2 documents" in ok(grank_app, "index", "docs")
    both = json.loads(ok(grank_app, "query", "jazz", "--log", "a.db", "--json"))
    assert {r["item"] for r in both} == {"blue-train.md", "cooking.md"}
    ok(grank_app, "query", "jazz", "--log", "a.db", "--click", "blue-train.md")
    ok(grank_app, "query", "jazz", "--log", "b.db", "--click", "cooking.md")
    code = (
        "import sys; from sharewell.allocation.cli import grank_app\n"
        "sys.argv = ['grank', *sys.argv[1:]]; grank_app()"
    )
    server = subprocess.Popen(
        [sys.executable, "-u", "-c", code, "sync", "--serve", "127.0.0.1:0", "--log", "a.db"],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert server.stdout is not None
        said = server.stdout.readline()
        address = said.split(" on ")[1].strip()
        assert "1 new rows" in ok(grank_app, "sync", "--peer", address, "--log", "b.db")
    finally:
        server.terminate()
        server.wait(20)
    ranked = json.loads(ok(grank_app, "query", "jazz", "--log", "b.db", "--json"))
    assert {r["item"] for r in ranked} == {"blue-train.md", "cooking.md"} and all(r["why"] for r in ranked)
    start = time.monotonic()
    gone = RUNNER.invoke(grank_app, ["sync", "--peer", address, "--log", "b.db"])
    assert gone.exit_code == 1 and address in gone.output and time.monotonic() - start < 30


def test_simulate_prints_quarters():
    frames = json.loads(ok(grank_app, "simulate", "--nodes", "8", "--steps", "80", "--json"))
    assert [f["step"] for f in frames] == [20, 40, 60, 80]
