"""ONNX: the same numbers from standard operators, at any length; int8; and the command line over all."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from sharewell.cli import main
from sharewell.perception import (
    FeatureMeta,
    LiquidTADConfig,
    OnnxDetector,
    TADModel,
    evaluate_dataset,
    export_onnx,
    predict,
    quantize_onnx,
)
from sharewell.perception.tad.export import LIQUID_OPERATORS, largest_difference, operators

from .toy import HZ, WIDTH, toy, toy_model, trained


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_onnx(trained().model, tmp_path_factory.mktemp("onnx") / "model.onnx")


@pytest.mark.parametrize("rows", [4, 256, 1024])
def test_onnx_gives_what_pytorch_gives_at_any_length(exported: Path, rows: int):
    detector = OnnxDetector(exported, threads=1)
    features = torch.randn(1, WIDTH, rows, generator=torch.Generator().manual_seed(rows))
    mask = torch.ones(1, 1, rows)
    mask[:, :, rows - rows // 8 - 1 :] = 0
    assert largest_difference(trained().model.infer(features, mask), detector.infer(features, mask)) < 1e-4


@pytest.mark.parametrize("kernel_size", [0, 4])
@pytest.mark.parametrize("backbone", ["liquid", "maxpool"])
def test_only_standard_operators_are_used(backbone, kernel_size: int, tmp_path: Path):
    model = TADModel(LiquidTADConfig.tiny(8, 2, dim=16, kernel_size=kernel_size), backbone)
    counted = operators(export_onnx(model, tmp_path / "m.onnx"))
    assert set(counted) <= LIQUID_OPERATORS
    assert ("Tanh" in counted) == (backbone == "liquid")


def test_an_exported_detector_predicts_the_same_and_knows_its_labels(exported: Path):
    sample = toy().dataset("test")[0]
    ours = predict(trained().model, sample.features, sample.meta)
    theirs = predict(OnnxDetector(exported, threads=1), sample.features, sample.meta)
    assert len(ours) == len(theirs) > 3
    for a, b in zip(ours[:3], theirs[:3], strict=True):
        assert a.label == b.label in ("up", "down")
        assert (a.start, a.end, a.score) == pytest.approx((b.start, b.end, b.score), abs=1e-3)


def test_int8_is_smaller_and_nearly_as_good(exported: Path, tmp_path: Path):
    calibration = [toy().dataset("training")[n].features.numpy() for n in range(4)]
    small = quantize_onnx(exported, tmp_path / "int8.onnx", calibration)
    assert "QuantizeLinear" in operators(small)
    test = toy().dataset("test")
    full = evaluate_dataset(OnnxDetector(exported, threads=1), test).average
    assert evaluate_dataset(OnnxDetector(small, threads=1), test).average > full - 0.1
    with pytest.raises(ValueError, match="calibration must hold at least one"):
        quantize_onnx(exported, tmp_path / "none.onnx", [])


def test_attention_is_not_exported_and_strangers_are_not_loaded(tmp_path: Path):
    with pytest.raises(ValueError, match="backbone must be liquid or maxpool"):
        export_onnx(toy_model("actionformer"), tmp_path / "m.onnx")
    (tmp_path / "x.onnx").write_bytes(b"no graph")
    with pytest.raises(ValueError, match=r"x\.onnx cannot be read as ONNX"):
        OnnxDetector(tmp_path / "x.onnx")
    with pytest.raises(FileNotFoundError):
        OnnxDetector(tmp_path / "y.onnx")


# -- the command line


def test_from_labels_to_an_onnx_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    task, run = toy(), tmp_path / "run"
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        '[model]\npreset = "tiny"\ndim = 16\narch = [1, 1, 2]\ninitial_positives = 10.0\n'
        "[train]\nlr = 8e-3\nepochs = 6\nwarmup_epochs = 1\nbatch_size = 2\nema_decay = 0.8\n"
        '[data]\nval_subsets = ["test"]\n'
    )
    paths = [str(task.annotations), str(task.folder), "-o", str(run), "--recipe", str(recipe)]
    assert main(["tad", "train", *paths, "--stride", "1", "--num-frames", "1", "--threads", "1"]) == 0
    told = capsys.readouterr().out
    assert "6 videos with 18 annotations train; 2 evaluate" in told and "mAP" in told

    found = tmp_path / "found.json"
    assert main(["tad", "eval", str(run), "--tiou", "0.3,0.5", "--json", "--predictions", str(found)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["average_map"] > 0.2 and set(result["ap"]) == {"up", "down"}
    command = ["tad", "score", str(task.annotations), str(found), "--subset", "test", "--tiou", "0.3,0.5"]
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["average_map"] == pytest.approx(result["average_map"])

    onnx, int8 = tmp_path / "m.onnx", tmp_path / "m8.onnx"
    assert main(["tad", "export", str(run), str(onnx), "--int8", str(int8), "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["operators"]) <= LIQUID_OPERATORS
    assert main(["tad", "eval", str(run), "--tiou", "0.3,0.5", "--json", "--onnx", str(onnx)]) == 0
    again = json.loads(capsys.readouterr().out)["average_map"]
    assert again == pytest.approx(result["average_map"], abs=0.02)

    assert main(["tad", "timescales", str(run), "--fps", str(HZ), "--json"]) == 0
    assert [row["stride"] for row in json.loads(capsys.readouterr().out)] == [1, 2, 4]


def test_backbones_are_measured_in_turns(capsys: pytest.CaptureFixture[str]):
    assert (
        main(["tad", "bench", "--width", "8", "--rows", "64", "--repeats", "1", "--threads", "1", "--json"])
        == 0
    )
    table = {row["backbone"]: row for row in json.loads(capsys.readouterr().out)["backbones"]}
    assert table["liquid"]["parameters"] < table["actionformer"]["parameters"]
    assert all(row["cpu_s"] > 0 for row in table.values())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["train", "none.json", "{folder}", "-o", "x"], "none.json"),
        (["train", "{labels}", "nowhere", "-o", "{out}"], "feature_dir must be a folder that exists"),
        (["train", "{labels}", "{folder}", "-o", "{out}"], "stride must be given"),
        (["train", "{labels}", "{folder}", "-o", "{out}", "--lr", "0"], "lr must be positive"),
        (["train", "{labels}", "{folder}", "-o", "{out}", "--recipe", "huge"], "recipe must be thumos14"),
        (["eval", "{folder}"], "is no folder of a run"),
        (["export", "{folder}", "{out}"], "does not exist"),
        (["bench", "--preset", "huge"], "--preset must be tiny"),
        (["score", "{labels}", "{labels}"], 'must be an object with "results"'),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, told, tmp_path, capsys):
    task = toy()
    names = {"labels": task.annotations, "folder": task.folder, "out": tmp_path / "out"}
    assert main(["tad", *(argument.format(**names) for argument in arguments)]) == 2
    errors = capsys.readouterr().err.strip()
    assert told in errors and errors.count("\n") == 0


def test_one_class_for_all_is_trained_and_scored_as_one(tmp_path: Path):
    data = toy().dataset("test", class_agnostic=True)
    assert data.n_cls == 1 and {int(label) for label in data[0].labels} == {0}
    assert {a.label for record in data.records for a in data.annotations(record)} == {"action"}
    model = toy_model(n_cls=1, labels=("action",))
    found = predict(model, np.zeros((20, WIDTH), np.float32), FeatureMeta(HZ, 1, 1))
    assert {d.label for d in found} <= {"action"}
