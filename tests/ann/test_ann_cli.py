"""`sharewell ann` on real files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from sharewell.ann.cli import app
from sharewell.cli import main

RUNNER = CliRunner()


@pytest.fixture
def files(tmp_path: Path) -> Path:
    rows = np.random.default_rng(0).standard_normal((600, 12)).astype(np.float32)
    np.save(tmp_path / "v.npy", rows)
    np.save(tmp_path / "q.npy", rows[:3])
    return tmp_path


def test_an_index_is_built_and_queried(files: Path):
    built = RUNNER.invoke(app, ["build", str(files / "v.npy"), "--out", str(files / "i"), "--threads", "1"])
    assert built.exit_code == 0, built.output
    assert "600 vectors of 12 dimensions" in built.output
    for more in ([], ["--exact"]):
        asked = RUNNER.invoke(
            app, ["query", str(files / "i"), str(files / "q.npy"), "-k", "2", "--json", *more]
        )
        assert [row[0] for row in json.loads(asked.output)["labels"]] == [0, 1, 2]


def test_ours_is_measured_without_any_other_library(files: Path):
    done = RUNNER.invoke(app, ["bench", str(files / "v.npy"), "--against", "", "--queries", "50", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.output)["sharewell"]["queries_per_s"]["0.9"] > 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["ann", "build", "nowhere.npy", "--out", "x"],
        ["ann", "query", "nowhere", "nowhere.npy"],
        ["ann", "bench", "nowhere.npy", "--against", "annoy"],
    ],
)
def test_a_mistake_ends_in_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    assert main(arguments) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
