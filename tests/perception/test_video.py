"""Detection in files and streams: the same as over the whole recording, and what is written about it."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import math
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sharewell.cli import main
from sharewell.perception import (
    Annotation,
    Detection,
    DigitClip,
    ExtractorSettings,
    FeatureGrid,
    FeatureMeta,
    LiquidTADConfig,
    StreamConfig,
    StreamDetector,
    TADModel,
    VideoDetector,
    VideoResult,
    detect,
    export_onnx,
    mean_average_precision,
    predict,
    probe,
    render_clip,
    sample_frames,
)
from sharewell.perception.video.detect import live
from sharewell.perception.video.digits import MOTIONS, plan_actions
from sharewell.perception.video.extractors import shipped
from sharewell.perception.video.pretrain import PretrainConfig, train_motion_net

GRID = FeatureGrid(4.0, 1, 4)
TEST_SEED = 4_000_000  # videos that neither the shipped weights nor the benchmark saw


def assert_same(got: list[Detection], expected: list[Detection], atol: float = 1e-5) -> None:
    def key(d: Detection) -> tuple:
        return (d.label, round(d.start, 2), round(d.end, 2), round(d.score, 3))

    assert len(got) == len(expected)
    for a, b in zip(sorted(got, key=key), sorted(expected, key=key), strict=True):
        assert a.label == b.label
        assert np.allclose([a.start, a.end, a.score], [b.start, b.end, b.score], atol=atol)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list]:
    """A video of 75 s with digits of the test split, and what happens in it."""
    path = tmp_path_factory.mktemp("clip") / "digits.mp4"
    return path, render_clip(DigitClip(TEST_SEED, "test", seconds=75), path)


@pytest.fixture(scope="module")
def demonstration() -> VideoDetector:
    return VideoDetector.load(threads=1)


@pytest.fixture(scope="module")
def found(clip: tuple[Path, list], demonstration: VideoDetector) -> VideoResult:
    return detect(clip[0], demonstration)


# windows and streams


def lively_model(backbone: str = "liquid") -> TADModel:
    """Random weights whose scores spread over the whole range, so that there is something to suppress."""
    model = TADModel(
        LiquidTADConfig.tiny(6, 3, dim=16, arch=(1, 1, 2), window=5),
        backbone,  # pyright: ignore[reportArgumentType]
        seed=3,
    )
    with torch.no_grad():
        model.classify.out.weight.mul_(6)
        assert model.classify.out.bias is not None
        model.classify.out.bias.fill_(-1.0)
    return model.eval()


@settings(max_examples=15)
@given(
    st.integers(1, 260),
    st.integers(4, 80),
    st.lists(st.integers(1, 70), min_size=1, max_size=6),
    st.sampled_from(["liquid", "actionformer", "maxpool"]),
)
def test_any_core_and_any_chunks_give_the_detections_of_the_whole(
    rows: int, core: int, chunks: list[int], backbone: str
):
    model = lively_model(backbone)
    feats = np.random.default_rng(rows).standard_normal((rows, 6)).astype(np.float32)
    config = StreamConfig(min_score=0.3, core=core)
    stream = StreamDetector(model, GRID, config)
    got, at, turn = [], 0, 0
    while at < rows:
        step = chunks[turn % len(chunks)]
        got += stream.push(feats[at : at + step])
        at, turn = at + step, turn + 1
    assert got == []  # without a guard everything is settled at the end
    got = stream.finish()
    whole = predict(model, feats, FeatureMeta(4.0, 1, 4), window=None, decode=stream.decode)
    assert len(whole) > 0 or rows < 8
    assert_same(got, whole)


def test_a_stream_settles_early_what_the_whole_finds(clip: tuple[Path, list], demonstration: VideoDetector):
    feats = demonstration.extractor.extract(clip[0]).array
    feats = np.concatenate([feats] * 4)  # five minutes
    offline = StreamDetector(demonstration.model, GRID)
    assert offline.push(feats) == []
    expected = offline.finish()
    _, config = live(demonstration, StreamConfig())
    stream = StreamDetector(demonstration.model, GRID, config)
    early: list[Detection] = []
    for at in range(0, len(feats), 7):
        for detection in stream.push(feats[at : at + 7]):
            early.append(detection)
            now_s = (at + 7) * GRID.step_s + GRID.num_frames / GRID.fps
            assert now_s - detection.end <= stream.latency_s + 7 * GRID.step_s  # they come by sevens
        assert len(stream.rows) <= stream.edge + stream.core + stream.ahead + 7  # memory does not grow
    assert len(early) > 0.6 * len(expected)
    assert_same(early + stream.finish(), expected)


def test_less_lookahead_answers_sooner(demonstration: VideoDetector):
    exact = StreamDetector(demonstration.model, GRID, StreamConfig(core=32, guard_s=4))
    hasty = StreamDetector(demonstration.model, GRID, StreamConfig(core=32, guard_s=4, lookahead=16))
    assert hasty.latency_s == exact.latency_s - (exact.edge - 16) / 4
    assert hasty.ahead == 16 and exact.ahead == exact.edge


def test_a_group_that_never_ends_is_settled_by_patience():
    model = lively_model()
    config = StreamConfig(min_score=0.05, core=32, guard_s=1e6, patience_s=20.0)
    stream = StreamDetector(model, GRID, config)
    rng = np.random.default_rng(0)
    counts = []
    for _ in range(20):
        stream.push(rng.standard_normal((64, 6)).astype(np.float32))
        counts.append(len(stream.open.scores) + len(stream.settled.scores))
    assert max(counts[10:]) < 2 * max(counts[:10])


@pytest.mark.parametrize("field", ["min_score", "core", "lookahead", "guard_s", "patience_s"])
def test_a_wrong_stream_config_names_field_and_range(field: str):
    with pytest.raises(ValueError, match=field):
        StreamConfig(**{field: -1})


def test_a_stream_refuses_what_is_no_feature(demonstration: VideoDetector):
    stream = StreamDetector(demonstration.model, GRID)
    with pytest.raises(ValueError, match=r"features must have shape \[rows, 100\]"):
        stream.push(np.zeros((3, 7), np.float32))
    with pytest.raises(ValueError, match="finite"):
        stream.push(np.full((3, 100), np.nan, np.float32))


# what ships


def test_the_shipped_files_are_those_of_the_manifest():
    manifest = tomllib.loads(shipped("manifest.toml").read_text())
    total = 0
    for entry in manifest.values():
        data = shipped(entry["file"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == entry["sha256"]
        total += len(data)
    assert total < 5_000_000
    assert manifest["detector"]["demonstration"] is True


def test_the_shipped_detector_finds_motions_of_digits_it_never_saw(
    tmp_path: Path, demonstration: VideoDetector
):
    truth, guesses = {}, {}
    for number in range(4):
        one = DigitClip(TEST_SEED + 1 + number, "test", seconds=45)
        path = tmp_path / f"{number}.mp4"
        truth[path.stem] = [Annotation(a.start_s, a.end_s, a.label) for a in render_clip(one, path)]
        guesses[path.stem] = detect(path, demonstration, StreamConfig(min_score=0.01)).detections
    assert len({a.label for actions in truth.values() for a in actions} & set(MOTIONS)) >= 4
    assert 100 * mean_average_precision(truth, guesses).average >= 60


def test_videos_are_the_same_for_the_same_seed(tmp_path: Path):
    one = DigitClip(5, seconds=3)
    render_clip(one, tmp_path / "a.mp4")
    render_clip(one, tmp_path / "b.mp4")
    frames = [[f.rgb for f in sample_frames(tmp_path / n)] for n in ("a.mp4", "b.mp4")]
    assert np.array_equal(frames[0], frames[1])
    assert plan_actions(DigitClip(5)) == plan_actions(DigitClip(5)) != plan_actions(DigitClip(6))


# files


def test_every_output_says_the_same(clip: tuple[Path, list], found: VideoResult, tmp_path: Path, capsys):
    code = main(["detect", str(clip[0]), "--out", str(tmp_path), "--timeline", str(tmp_path / "t.svg")])
    assert code == 0
    assert "demonstration" in capsys.readouterr().err
    document = json.loads((tmp_path / "digits.json").read_text())
    assert document["complete"] is True and document["demonstration"] is True
    assert document["duration_s"] == pytest.approx(75, abs=0.2)
    inside = document["results"]["digits"]
    assert [(d["label"], *d["segment"]) for d in inside] == [
        (d.label, round(d.start, 3), round(d.end, 3)) for d in found.detections
    ]
    rows = list(csv.DictReader((tmp_path / "digits.csv").open()))
    assert [r["label"] for r in rows] == [d["label"] for d in inside]
    drawing = (tmp_path / "t.svg").read_text()
    assert (drawing.startswith("<?xml") and "detections" in drawing) or "<svg" in drawing
    assert main(["detect", str(clip[0]), "--out", str(tmp_path)]) == 0
    assert (tmp_path / "digits.png").read_bytes().startswith(b"\x89PNG")


def test_the_overlay_shows_the_video_and_names_what_runs(
    clip: tuple[Path, list], found: VideoResult, tmp_path: Path
):
    from sharewell.perception.video.render import write_overlay

    target = tmp_path / "shown.mp4"
    write_overlay(clip[0], found.detections, target)
    assert probe(target).duration_s == pytest.approx(probe(clip[0]).duration_s, abs=0.2)
    before, after = (list(sample_frames(p)) for p in (clip[0], target))
    assert abs(len(before) - len(after)) <= 1
    best = max(found.detections, key=lambda d: d.score)
    middle = round(4 * (best.start + best.end) / 2)
    quiet = next(
        i
        for i in range(len(before))
        if not any(d.start - 0.5 <= i / 4 <= d.end + 0.5 for d in found.detections)
    )
    bottom = slice(50, 62)  # of 64 rows

    def change(i: int) -> float:
        return float(np.abs(before[i].rgb[bottom].astype(float) - after[i].rgb[bottom]).mean())

    assert change(middle) > 3 * change(quiet)


def test_clips_hold_their_actions(clip: tuple[Path, list], found: VideoResult, tmp_path: Path):
    from sharewell.perception.video.render import write_clips

    wanted = sorted(found.detections, key=lambda d: -d.score)[:3]
    for d, path in zip(wanted, write_clips(clip[0], wanted, tmp_path), strict=True):
        assert d.label in path.name
        info = probe(path)
        # It starts at the key frame before, at most 250 frames of 12 a second early.
        assert d.end - d.start - 0.2 <= info.duration_s <= d.end - d.start + 21.5
        frames = list(sample_frames(path))
        whole = list(sample_frames(clip[0]))
        last = whole[min(len(whole) - 1, int(4 * d.end))].rgb.astype(float)
        assert min(np.abs(f.rgb - last).mean() for f in frames[-3:]) < 25


def test_clips_keep_the_sound(make_video, tmp_path: Path):
    from sharewell.perception.video.render import write_clips

    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 255, (64, 64, 3), dtype=np.uint8) for _ in range(40)]
    source = make_video("loud.mp4", pictures, sound=True)
    (target,) = write_clips(source, [Detection(1.0, 2.5, "a b/c", 0.9)], tmp_path / "clips")
    assert target.name.endswith("_a_b_c.mp4")
    assert probe(target).has_audio
    with av.open(str(target)) as container:
        assert sum(1 for _ in container.decode(video=0)) >= 15


def test_a_damaged_video_gives_what_came_before(
    clip: tuple[Path, list], found: VideoResult, tmp_path: Path, capsys
):
    whole = tmp_path / "whole.mkv"
    with av.open(str(clip[0])) as source, av.open(str(whole), "w") as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                out.mux(packet)
    data = whole.read_bytes()
    hurt = tmp_path / "hurt.mkv"
    hurt.write_bytes(data[: len(data) * 2 // 3])
    code = main(["detect", str(hurt), "--json", str(tmp_path / "found.json")])
    assert code == 1
    assert "damaged" in capsys.readouterr().err
    document = json.loads((tmp_path / "found.json").read_text())
    assert document["complete"] is False and "hurt.mkv" in document["error"]
    assert 40 < document["duration_s"] < 60
    early = [d for d in found.detections if d.end < document["duration_s"] - 35]
    got = [(d["label"], *d["segment"]) for d in document["results"]["hurt"]]
    assert len(early) > 0
    for d in early:
        assert any(label == d.label and abs(start - d.start) < 1e-2 for label, start, _ in got)


def test_an_exported_detector_finds_the_same(
    clip: tuple[Path, list], demonstration: VideoDetector, found: VideoResult, tmp_path: Path
):
    assert isinstance(demonstration.model, TADModel)
    target = export_onnx(demonstration.model, tmp_path / "detector.onnx")
    exported = VideoDetector.load(target, demonstration.extractor)
    assert_same(list(detect(clip[0], exported).detections), list(found.detections), atol=1e-3)
    with pytest.raises(ValueError, match="name one with --extractor"):
        VideoDetector.load(target)


def test_a_sensor_goes_the_same_way(tmp_path: Path, capsys):
    """Extract, train and detect on a signal; the number of channels is known from the model."""
    rng = np.random.default_rng(0)
    rows = ["video,start,end,label,subset"]
    for number in range(3):
        samples = rng.standard_normal((400, 2)).astype(np.float32)
        samples[100:200] += 3
        np.save(tmp_path / f"s{number}.npy", samples)
        rows.append(f"s{number},10,20,up,{'test' if number == 2 else 'train'}")
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    feats, run = tmp_path / "feats", tmp_path / "run"
    signals = [str(tmp_path / f"s{number}.npy") for number in range(3)]
    for step in (
        ["tad", "extract", *signals, "-e", "signal", "--channels", "2", "--fps", "10", "-o", str(feats)],
        ["tad", "labels", str(tmp_path / "labels.csv"), "-f", str(feats), "-o", str(tmp_path / "a.json")],
        ["tad", "train", str(tmp_path / "a.json"), str(feats), "-o", str(run), "--epochs", "1"],
        ["detect", signals[2], "--model", str(run), "--json", str(tmp_path / "found.json")],
    ):
        assert main(step) == 0, (step, capsys.readouterr().err)
    document = json.loads((tmp_path / "found.json").read_text())
    assert document["duration_s"] == 40.0 and document["extractor"]["dim"] == 32


def test_the_extractor_can_be_trained_again(tmp_path: Path):
    """A toy of what tools/train/liquidtad.py does: better than chance after a few steps, twice the same."""
    videos = []
    for number in range(2):
        one = DigitClip(50 + number, seconds=15)
        videos.append((tmp_path / f"{number}.mp4", render_clip(one, tmp_path / f"{number}.mp4")))
    config = PretrainConfig(epochs=3, batch=16)
    (first, right), (second, again) = (train_motion_net(videos, config) for _ in range(2))
    assert right == again > 0.4
    for a, b in zip(first.module.parameters(), second.module.parameters(), strict=True):
        assert torch.equal(a, b)


def test_one_frame_is_enough(make_video, demonstration: VideoDetector):
    path = make_video("one.mp4", [np.full((64, 64, 3), 90, np.uint8)])
    result = detect(path, demonstration)
    assert result.complete and result.stats.sampled == 1
    assert all(0 <= d.start < d.end <= result.duration_s for d in result.detections)


def test_a_pipe_streams_the_same_detections(clip: tuple[Path, list], found: VideoResult):
    stream = subprocess.run(
        [sys.executable, "-m", "sharewell", "detect", "-", "--stream"],
        stdin=clip[0].open("rb"),
        capture_output=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert stream.returncode == 0, stream.stderr.decode()
    assert b"overlap" in stream.stderr and b"at most" in stream.stderr
    lines = [json.loads(line) for line in stream.stdout.decode().splitlines()]
    assert_same([Detection(**line) for line in lines], list(found.detections), atol=2e-4)


def test_local_features_can_take_the_place_of_the_extractor(
    clip: tuple[Path, list], demonstration: VideoDetector, found: VideoResult, tmp_path: Path, capsys
):
    features = tmp_path / "feats"
    assert main(["tad", "extract", str(clip[0]), "-e", "small", "-o", str(features)]) == 0
    capsys.readouterr()
    assert main(["detect", str(clip[0]), "-e", f"dir:{features}", "--json", "-"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [d["label"] for d in document["results"]["digits"]] == [d.label for d in found.detections]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing.mp4"], "no video nothing.mp4"),
        (["-", "--clips", "out"], "can be read only once"),
        (["x.mp4", "--timeline", "t.gif"], ".png, .svg, .pdf"),
        (["x.mp4", "--lookahead-s", "3"], "--stream"),
        (["x.mp4", "--min-score", "2"], "min_score must be in (0, 1)"),
        (["x.mp4", "--model", "nowhere"], "nowhere"),
        (["x.mp4", "-e", "resnet"], "extractor must be one of"),
    ],
)
def test_wrong_use_is_one_line(arguments: list[str], message: str, capsys):
    assert main(["detect", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_a_detector_and_features_of_another_width_are_told_apart(demonstration: VideoDetector):
    from sharewell.perception import load_extractor

    with pytest.raises(ValueError, match="features 100 wide, those of signal are 32 wide"):
        dataclasses.replace(demonstration, extractor=load_extractor("signal", channels=2))
    with pytest.raises(ValueError, match="streaming needs a video extractor"):
        live(
            dataclasses.replace(demonstration, extractor=Elsewhere(demonstration.extractor.settings)),
            StreamConfig(),
        )


@dataclasses.dataclass
class Elsewhere:
    """No frames to follow: an extractor that reads its features from elsewhere."""

    settings: ExtractorSettings

    def extract(self, source: str | Path):
        raise NotImplementedError


def test_from_a_folder_of_videos_to_a_detector(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    """The command sequence of the docs, at its smallest."""
    monkeypatch.chdir(tmp_path)
    steps = (
        "tad demo -o videos --train 3 --test 2 --seconds 12",
        "tad extract videos -e small -o feats",
        "tad labels videos/labels.csv -f feats -o annotations.json",
        "tad train annotations.json feats -o run --epochs 1 --warmup-epochs 1",
        "detect videos/test_003.mp4 --model run --json found.json --min-score 0.001",
    )
    for step in steps:
        assert main(step.split()) == 0, (step, capsys.readouterr().err)
    document = json.loads(Path("found.json").read_text())
    assert document["extractor"]["extractor"] == "small-v1" and document["demonstration"] is False
    assert math.isclose(document["extractor"]["fps"], 4.0)
