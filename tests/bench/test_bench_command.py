"""``sharewell bench`` on a checkout of its own: finding, running, keeping, and what goes wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sharewell.bench import Report, find_benchmark, list_benchmarks
from sharewell.bench.discovery import find_root

BENCHMARK = """
from benchmarks.serving.shared_part import BASE
from sharewell.bench import Report, Row, environment, interleave, values

def run(scale, *, seed, progress):
    contenders = {"ours": lambda: None, "theirs": lambda: sum(range(BASE))}
    samples = interleave(contenders, repeats=3, progress=progress)
    rows = (
        Row("answer", 42.0 + seed, 21.0, "points", "higher", "half of it", claim="twice", target=2.0),
        Row.from_samples("time", values(samples["ours"]), values(samples["theirs"]), "s", "lower", "sum"),
    )
    return Report("engine", scale, rows, environment(), seed)
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "src" / "sharewell").mkdir(parents=True)
    room = tmp_path / "benchmarks" / "serving"
    room.mkdir(parents=True)
    (room / "engine.py").write_text(BENCHMARK)
    (room / "shared_part.py").write_text("BASE = 1000\n")
    return tmp_path


def bench(checkout: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sharewell", "bench", *args],
        cwd=checkout / "benchmarks",  # a folder inside the checkout is enough
        env={**os.environ, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_smoke_run_prints_the_table_and_keeps_nothing(checkout: Path):
    done = bench(checkout, "engine", "--seed", "1")
    assert done.returncode == 0, done.stderr
    assert "2.05x" in done.stdout and "twice (needs 2.00x: met)" in done.stdout
    assert not (checkout / "benchmarks" / "results").exists()


def test_full_run_is_kept_with_the_machine_and_its_load(checkout: Path):
    done = bench(checkout, "engine", "--scale", "full")
    assert done.returncode == 0, done.stderr
    kept = Report.load(checkout / "benchmarks" / "results" / "engine-full.json")
    assert (kept.slug, kept.scale, kept.seed) == ("engine", "full", 0)
    assert kept.environment["load"]["wall_s"] > 0
    listed = bench(checkout)
    assert "answer: 2.00x" in listed.stdout


def test_json_and_plot_go_where_they_are_told(checkout: Path):
    target, picture = checkout / "out" / "r.json", checkout / "out" / "r.png"
    done = bench(checkout, "engine", "--scale", "full", "--json", str(target), "--plot", str(picture))
    assert done.returncode == 0, done.stderr
    assert Report.load(target).rows[0].ratio == 2.0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert not (checkout / "benchmarks" / "results").exists()


def test_json_on_standard_output_is_all_that_is_there(checkout: Path):
    done = bench(checkout, "engine", "--json", "-")
    assert Report.from_dict(json.loads(done.stdout)).scale == "smoke"
    assert "2.00x" in done.stderr


def test_all_runs_every_benchmark_that_exists(checkout: Path):
    done = bench(checkout, "--all")
    assert done.returncode == 0, done.stderr
    assert "engine (smoke, seed 0)" in done.stdout


def test_a_failing_benchmark_shows_its_traceback_and_fails_the_command(checkout: Path):
    (checkout / "benchmarks" / "serving" / "engine.py").write_text(
        "def run(scale, *, seed, progress):\n    1 / 0\n"
    )
    done = bench(checkout, "engine")
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr and done.stderr.endswith("error: failed: engine\n")


def test_a_report_of_something_else_is_refused(checkout: Path):
    path = checkout / "benchmarks" / "serving" / "engine.py"
    path.write_text(BENCHMARK.replace('Report("engine", scale', 'Report("motor", scale'))
    done = bench(checkout, "engine")
    assert done.returncode == 1
    assert "TypeError: engine.py: run() must return the Report of ('engine', 'smoke', 0)" in done.stderr


def test_a_system_without_a_benchmark_is_said_so(checkout: Path):
    (checkout / "benchmarks" / "serving" / "engine.py").unlink()
    done = bench(checkout, "engine")
    assert done.returncode == 2
    assert done.stderr == "error: engine has no benchmark: benchmarks/serving/engine.py does not exist\n"
    assert "no benchmark" in bench(checkout).stdout


def test_the_checkout_is_found_from_inside_and_else_the_packages_own(checkout: Path, tmp_path_factory):
    assert find_root(checkout / "benchmarks" / "serving") == checkout.resolve()
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    assert (find_root(elsewhere) / "src" / "sharewell" / "bench").is_dir()


def test_every_system_is_listed_in_order(checkout: Path):
    listed = list_benchmarks(checkout)
    assert "engine" in [b.system.slug for b in listed]
    assert find_benchmark("engine", checkout).path == checkout / "benchmarks" / "serving" / "engine.py"


def test_committed_results_are_what_a_full_run_printed():
    root = find_root(Path(__file__).parent)
    for path in sorted((root / "benchmarks" / "results").glob("*.json")):
        kept = Report.load(path)  # refuses a figure that was edited afterwards
        assert path.name == f"{kept.slug}-{kept.scale}.json"
        assert kept.environment["commit"], path.name
        assert kept.environment["load"]["wall_s"] > 0, path.name
