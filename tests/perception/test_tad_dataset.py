"""Reading annotations and features as people have them; what is wrong is named by file, line and video."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sharewell.perception import (
    Annotation,
    AnnotationError,
    FeatureDataset,
    FeatureFolder,
    Recipe,
    read_annotations,
    read_label_csv,
)
from sharewell.perception.tad.dataset import collate

from .toy import ROWS, WIDTH, toy


def write(folder: Path, videos: dict[str, dict[str, Any]], rows: int = 50, width: int = 4) -> Path:
    for name in videos:
        np.save(folder / f"{name}.npy", np.ones((rows, width), np.float32))
    path = folder / "labels.json"
    path.write_text(json.dumps({"database": videos}, indent=1), encoding="utf-8")
    return path


def video(*segments: tuple[float, float, str], **settings: Any) -> dict[str, Any]:
    items = [{"label": label, "segment": [start, end]} for start, end, label in segments]
    return {"subset": "training", "fps": 10, "annotations": items, **settings}


# -- annotation files


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        (video((5, 5, "a")), r"segment must end after it starts, at 0 or later, got \[5, 5\]"),
        (video((5, 3, "a")), "a segment must end after it starts"),
        (video((-1, 3, "a")), "a segment must end after it starts, at 0 or later"),
        (video((30, 40, "a"), duration=20), r"segment \[30, 40\] starts after the video ends at 20.0 s"),
        (video(fps=0), "fps must be a positive number, got 0"),
        (video(duration="long"), "duration must be a positive number, got 'long'"),
        ({"annotations": [{"segment": [0, 1]}]}, "an annotation needs a label and a segment"),
        (
            {"annotations": [{"label": "a", "segment": [0, 1, 2]}]},
            r"segment must be \[start, end\] in seconds",
        ),
        ({"annotations": [{"label": "a", "segment": [0, float("nan")]}]}, r"segment must be \[start, end\]"),
        ({"annotations": {}}, "annotations must be a list"),
        ([], "must be an object"),
    ],
)
def test_a_wrong_annotation_is_named_with_its_video_and_line(tmp_path: Path, entry: Any, told: str):
    path = tmp_path / "labels.json"
    path.write_text(json.dumps({"database": {"good": video((0, 1, "a")), "bad": entry}}, indent=1))
    line = next(n for n, text in enumerate(path.read_text().splitlines(), 1) if '"bad"' in text)
    with pytest.raises(AnnotationError, match=rf"^labels\.json:{line}: video bad: .*{told}"):
        read_annotations(path)


def test_overlapping_labels_stay_and_repeated_ones_count_once(tmp_path: Path):
    path = write(tmp_path, {"v": video((1, 5, "a"), (1.0004, 5.0004, "a"), (2, 6, "a"), (1, 5, "b"))})
    assert read_annotations(path)["v"].annotations == (
        Annotation(1, 5, "a"), Annotation(2, 6, "a"), Annotation(1, 5, "b"),
    )  # fmt: skip


def test_opentad_files_give_their_frame_rate_as_frames_and_duration(tmp_path: Path):
    path = write(tmp_path, {"v": {"subset": "Validation", "duration": 20.0, "frame": 500, "annotations": []}})
    record = read_annotations(path)["v"]
    assert (record.fps, record.subset, record.duration_s) == (25, "validation", 20)


def test_a_table_of_labels_is_read(tmp_path: Path):
    path = tmp_path / "labels.csv"
    path.write_text("video,start,end,label,subset,fps\na,1,2.5,jump,train,30\na,4,5,run,,\nb,,,,val,\n")
    records = read_label_csv(path)
    assert records["a"].annotations == (Annotation(1, 2.5, "jump"), Annotation(4, 5, "run"))
    assert (records["a"].subset, records["a"].fps) == ("train", 30)
    assert records["b"].annotations == () and records["b"].subset == "val"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("video,start,end\n", r"labels\.csv:1: columns must include label"),
        (
            "video,start,end,label\na,1,2,x\nb,3,2,x\n",
            r"labels\.csv:3: video b: a row needs a label and 0 <=",
        ),
        ("video,start,end,label\na,1,,x\n", r"labels\.csv:2: video a: a row needs"),
        ("video,start,end,label\n,1,2,x\n", r"labels\.csv:2: video \?: video must be given"),
        ("video,start,end,label,fps\na,1,2,x,fast\n", r"labels\.csv:2: video a: fps must be a positive"),
    ],
)
def test_a_wrong_row_of_a_table_is_named(tmp_path: Path, text: str, told: str):
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(AnnotationError, match=told):
        read_label_csv(tmp_path / "labels.csv")


# -- feature folders


def test_segments_lie_on_rows_as_windows_lie_in_time(tmp_path: Path):
    path = write(tmp_path, {"v": video((2, 4, "a"))})
    sample = FeatureDataset(path, tmp_path, stride=4, num_frames=16)[0]
    # Row i covers frames 4 i to 4 i + 16 of 10 a second: its middle is at (4 i + 8) / 10 s.
    assert sample.segments.tolist() == [[3.0, 8.0]]
    assert sample.meta.to_seconds(np.array([3.0, 8.0])).tolist() == [2.0, 4.0]


def test_settings_come_from_the_folder_unless_given(tmp_path: Path):
    path = write(tmp_path, {"v": {"annotations": []}})
    FeatureFolder("small", 2, 8, 5, {"v": {"duration_s": 11.0}}).write(tmp_path)
    dataset = FeatureDataset(path, tmp_path)
    meta = dataset.metas[0]
    assert (meta.fps, meta.stride, meta.num_frames, meta.duration_s) == (5, 2, 8, 11)
    assert dataset.folder is not None and dataset.folder.extractor == "small"
    assert FeatureDataset(path, tmp_path, stride=3, fps=7).metas[0].stride == 3
    (tmp_path / "features.json").write_text("{}")
    with pytest.raises(ValueError, match=r"features\.json: needs extractor, stride and num_frames"):
        FeatureDataset(path, tmp_path)


def test_prefixes_and_archives_are_found(tmp_path: Path):
    path = write(tmp_path, {"a": video(), "b": video(), "c": video()})
    (tmp_path / "a.npy").rename(tmp_path / "v_a.npy")
    (tmp_path / "b.npy").unlink()
    np.savez(tmp_path / "b.npz", feats=np.zeros((7, 4)))
    (tmp_path / "c.npy").rename(tmp_path / "i3d_c.npy")
    dataset = FeatureDataset(path, tmp_path, 1, 1, prefix="i3d_")
    assert [len(dataset[i].features) for i in range(3)] == [50, 7, 50]


def test_stretching_keeps_segments_in_place(tmp_path: Path):
    path = write(tmp_path, {"v": video((0, 5.3, "a"))}, rows=10)
    np.save(tmp_path / "v.npy", np.arange(40, dtype=np.float32).reshape(10, 4))
    sample = FeatureDataset(path, tmp_path, 4, 16, resize_to=20)[0]
    assert sample.features.shape == (20, 4)
    assert sample.meta.stride == pytest.approx((9 * 4 + 16) / 20)
    # The whole covers 5.2 s: the segment reaches from the first row's start to just past the last one's end.
    assert sample.segments[0].tolist() == pytest.approx([-0.5, 5.3 / 5.2 * 20 - 0.5], rel=1e-5)
    expected = torch.nn.functional.interpolate(
        torch.arange(40.0).reshape(10, 4).T[None], 20, mode="linear", align_corners=False
    )[0].T
    assert torch.equal(sample.features, expected)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda f: np.save(f / "w.npy", np.full((5, 4), np.nan)), r":\d+: video w: .*row 0 holds NaN"),
        (lambda f: np.save(f / "w.npy", np.zeros((0, 4))), r"video w: w.npy must be \[rows >= 1, width\]"),
        (
            lambda f: np.save(f / "w.npy", np.zeros(5)),
            r"video w: w.npy must be \[rows >= 1, width\], got \(5,\)",
        ),
        (lambda f: (f / "w.npy").write_bytes(b"no features"), "video w: w.npy cannot be read as features"),
        (lambda f: (f / "w.npy").unlink(), r"labels\.json:\d+: video w: no w.npy in"),
    ],
)
def test_a_wrong_feature_file_is_named(tmp_path: Path, change: Any, told: str):
    path = write(tmp_path, {"v": video((0, 1, "a")), "w": video((0, 1, "a"))})
    change(tmp_path)
    with pytest.raises(AnnotationError, match=told):
        FeatureDataset(path, tmp_path, 1, 1)[1]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"labels": ("b",)}, r"labels\.json:3: video v: label 'a' is not one of \['b'\]"),
        ({"subsets": ["test"]}, r"subsets must name some of \['training'\]"),
        ({"videos": ["x"]}, r"videos must be in labels.json, got \['x'\]"),
        ({"crop_ratio": (0.9, 1.1)}, "crop_ratio must be"),
        ({"missing": "maybe"}, "missing must be error | skip"),
        ({"stride": 0}, "stride must be positive"),
        ({"stride": None}, "stride must be given"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path: Path, settings: Any, told: str):
    path = write(tmp_path, {"v": video((0, 1, "a"))})
    with pytest.raises(ValueError, match=told):
        FeatureDataset(path, tmp_path, **{"stride": 1, "num_frames": 1, **settings})


def test_a_missing_frame_rate_is_named(tmp_path: Path):
    path = write(tmp_path, {"v": {"annotations": []}})
    with pytest.raises(AnnotationError, match=r"labels\.json:3: video v: fps is missing"):
        FeatureDataset(path, tmp_path, 1, 1)


def test_what_is_left_out_is_reported(tmp_path: Path):
    path = write(tmp_path, {"v": video((0, 1, "a"), (9, 10, "a")), "w": video(), "gone": video()}, rows=50)
    (tmp_path / "gone.npy").unlink()
    report = FeatureDataset(path, tmp_path, 1, 1, missing="skip").report
    assert (report.videos, report.annotations, report.outside) == (2, 2, 1)
    assert (report.without_actions, report.missing_features) == (("w",), ("gone",))


def test_features_of_two_widths_are_refused_by_name():
    samples = [toy().dataset("training")[0], toy().dataset("training")[1]]
    object.__setattr__(samples[1], "features", torch.zeros(10, 3))
    with pytest.raises(ValueError, match="equally wide, got v0: 12, v1: 3"):
        collate(samples, 4)


# -- crops


@given(seed=st.integers(0, 10_000), max_length=st.sampled_from([16, 60, 128, 400]))
@settings(max_examples=30)
def test_a_crop_holds_an_action_to_at_least_half_and_stays_in_place(seed: int, max_length: int):
    dataset = toy().dataset("training", max_length=max_length)
    whole = dataset[0]
    crop = dataset.crop(0, torch.Generator().manual_seed(seed))
    rows = len(crop.features)
    assert rows == max_length if max_length < ROWS else 0.9 * ROWS <= rows <= ROWS
    first = next(
        n for n in range(ROWS - rows + 1) if torch.equal(whole.features[n : n + rows], crop.features)
    )
    assert len(crop.segments) >= 1
    expected = []
    for start, end in whole.segments.tolist():
        inside = max(start, first), min(end, first + rows)
        if inside[1] - inside[0] >= 0.5 * (end - start):
            expected.append([inside[0] - first, inside[1] - first])
    assert crop.segments.tolist() == expected


def test_a_video_without_actions_is_cropped_as_background(tmp_path: Path):
    path = write(tmp_path, {"v": video()})
    crop = FeatureDataset(path, tmp_path, 1, 1, max_length=10, labels=("a",)).crop(0, torch.Generator())
    assert crop.features.shape == (10, 4) and len(crop.segments) == 0


def test_a_rare_action_is_found_all_the_same(tmp_path: Path):
    path = write(tmp_path, {"v": video((2000, 2000.4, "a"))}, rows=40_000)
    crop = FeatureDataset(path, tmp_path, 1, 1, max_length=8).crop(0, torch.Generator().manual_seed(0))
    assert len(crop.segments) == 1 and len(crop.features) == 8


def test_padding_is_masked():
    samples = [toy().dataset("training", max_length=n).crop(0, torch.Generator()) for n in (50, 33)]
    features, mask = collate(samples, 16)
    assert features.shape == (2, WIDTH, 64) and mask.sum(dim=(1, 2)).tolist() == [50, 33]
    assert not (features * (1 - mask)).any()


# -- recipes


def test_recipes_that_ship_are_the_published_settings():
    thumos, activitynet = Recipe.load("thumos14"), Recipe.load("activitynet13")
    config = thumos.model_config(2048, tuple(f"c{n}" for n in range(20)))
    assert (config.dim, config.levels, config.max_length) == (512, 6, 2304)
    assert (thumos.train.lr, thumos.train.total_epochs, thumos.train.batch_size) == (1e-4, 35, 2)
    assert (activitynet.data.resize_to, activitynet.data.fps, activitynet.train.lr) == (192, 15, 1e-3)
    assert activitynet.model_config(512, ("a", "b")).labels == ("action",)


@pytest.mark.parametrize(
    ("subsets", "train", "evaluate"),
    [
        (["validation", "validation", "test"], 2, 1),  # ActionFormer's THUMOS-14
        (["training", "validation", "validation"], 1, 2),  # OpenTAD's
    ],
)
def test_thumos_is_split_as_either_project_names_it(tmp_path: Path, subsets, train, evaluate):
    videos = {f"v{n}": video((0, 1, "a"), subset=name.title()) for n, name in enumerate(subsets)}
    path = write(tmp_path, videos)
    parts = Recipe.load("thumos14").open(path, tmp_path)
    assert [len(part) for part in parts if part is not None] == [train, evaluate]


def test_without_subsets_every_fifth_video_is_held_out(tmp_path: Path):
    path = write(tmp_path, {f"v{n}": video((0, 1, "a"), subset="") for n in range(11)})
    training, held_out = Recipe.load("tiny").changed(stride=1.0, num_frames=1.0).open(path, tmp_path)
    assert held_out is not None and [r.video_id for r in held_out.records] == ["v3", "v8"]
    assert len(training) == 9


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[train]\nlr = 0", "lr must be positive"),
        ("[train]\nspeed = 1", "unknown setting speed; known: "),
        ("[model]\npreset = 'huge'", "model.preset must be thumos14"),
        ("[modell]", "recipe must be tables model, train and data"),
        ("lr = ", "is no valid TOML"),
    ],
)
def test_a_wrong_recipe_is_named(tmp_path: Path, text: str, told: str):
    (tmp_path / "r.toml").write_text(text)
    with pytest.raises(ValueError, match=told):
        Recipe.load(tmp_path / "r.toml")
