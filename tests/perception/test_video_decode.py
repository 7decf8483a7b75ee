"""Decoding of really encoded files: the right frame at the right time, and what happens to broken ones."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharewell.perception import DecodeStats, Sampling, VideoDecodeError, probe, sample_frames
from sharewell.perception.video.features import FeatureGrid

GRID = Sampling(4.0, 32, 32, threads=1)


def flat(level: int, size: int = 64) -> np.ndarray:
    """A picture of one brightness: what comes back tells which frame it was."""
    return np.full((size, size, 3), level, np.uint8)


def levels(path: Path, sampling: Sampling = GRID, stats: DecodeStats | None = None) -> list[float]:
    """Brightness of every sampled frame."""
    return [float(f.rgb.mean()) for f in sample_frames(path, sampling, stats)]


def moving(count: int, size: int = 96, seed: int = 0) -> list[np.ndarray]:
    """Pictures that need many bytes, so that damage in the middle of the file hits a picture."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 255, (size, size, 3), dtype=np.uint8) for _ in range(count)]


def test_a_steady_video_is_sampled_four_times_a_second(make_video):
    path = make_video("steady.mp4", [flat(10 + 5 * i) for i in range(40)])
    stats = DecodeStats()
    frames = list(sample_frames(path, GRID, stats))
    assert [f.time_s for f in frames] == [i / 4 for i in range(16)]
    # At 0.25 s the frame of 0.2 s is shown, at 0.5 s that of 0.5 s, ...
    shown = [int(i / 4 * 10 + 1e-9) for i in range(16)]
    assert np.allclose([f.rgb.mean() for f in frames], [10 + 5 * n for n in shown], atol=2.5)
    assert not any(f.repeated for f in frames)
    assert stats.decoded == 40 and stats.sampled == 16 and stats.damaged == 0
    assert stats.duration_s == pytest.approx(4.0, abs=0.01)


def test_a_variable_rate_lands_where_a_player_shows_it(make_video):
    times = [0.0, 0.1, 0.15, 1.0, 1.05, 1.1, 2.6, 2.7, 4.0]
    path = make_video("variable.mkv", [flat(20 + 25 * i) for i in range(len(times))], times=times)
    frames = list(sample_frames(path, GRID))
    expected = [max(i for i, t in enumerate(times) if t <= f.time_s + 1e-6) for f in frames]
    assert np.allclose([f.rgb.mean() for f in frames], [20 + 25 * i for i in expected], atol=2.5)
    assert [f.repeated for f in frames] == [
        i > 0 and expected[i] == expected[i - 1] for i in range(len(frames))
    ]
    assert frames[-1].time_s >= 4.0


@given(st.lists(st.integers(1, 12), min_size=1, max_size=12))
def test_the_grid_shows_the_last_frame_whose_time_has_come(steps: list[int]):
    # The rule itself, on the sampler's own logic with frames that need no file.
    import sharewell.perception.video.decode as module

    times = [0.0, *np.cumsum(steps) / 10.0]

    class Picture:
        def __init__(self, number: int) -> None:
            self.number, self.time = number, times[number]

        def to_ndarray(self, **_: object) -> np.ndarray:
            return np.array([self.number])

    def frames(source, stats, **_):
        for number, t in enumerate(times):
            stats.duration_s = t + 0.1
            yield t, Picture(number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "decode_frames", frames)
        out = list(sample_frames("x", GRID))
    assert [f.time_s for f in out] == [i / 4 for i in range(len(out))]
    assert [int(f.rgb[0]) for f in out] == [
        max(i for i, t in enumerate(times) if t < f.time_s + 1e-9) for f in out
    ]
    assert len(out) == sum(1 for i in range(10_000) if i / 4 < times[-1] + 0.1 - 1e-9)


def test_a_video_of_one_frame_gives_one_frame(make_video):
    frames = list(sample_frames(make_video("one.mp4", [flat(99)]), GRID))
    assert len(frames) == 1 and frames[0].time_s == 0
    assert frames[0].rgb.shape == (32, 32, 3)


def test_sound_changes_nothing(make_video):
    pictures = [flat(10 + 6 * i) for i in range(30)]
    silent, loud = make_video("silent.mp4", pictures), make_video("loud.mp4", pictures, sound=True)
    assert probe(loud).has_audio and not probe(silent).has_audio
    assert levels(silent) == levels(loud)


def test_the_container_is_described(make_video):
    info = probe(make_video("some.mp4", [flat(1, 96)] * 20))
    assert (info.width, info.height, info.codec) == (96, 96, "h264")
    assert info.duration_s == pytest.approx(2.0, abs=0.1)


def test_damage_in_the_middle_keeps_the_frames_before_it(make_video):
    path = make_video("hurt.avi", moving(40), codec="mpeg4", key_every=1)
    whole = levels(path)
    data = bytearray(path.read_bytes())
    start = len(data) // 2
    data[start : start + 60_000] = bytes(60_000)
    path.write_bytes(data)
    got: list[float] = []
    with pytest.raises(VideoDecodeError) as caught:
        for frame in sample_frames(path, GRID):
            got.append(float(frame.rgb.mean()))  # noqa: PERF401 - what came before the error counts
    error = caught.value
    assert 0 < error.frames < 40
    assert start - 40_000 <= error.offset_bytes <= start + 60_000
    assert str(error.offset_bytes) in str(error) and "hurt.avi" in str(error)
    assert 4 <= len(got) < len(whole)
    assert got[:-1] == whole[: len(got) - 1]


def test_damage_can_be_passed_over_and_is_counted(make_video):
    path = make_video("hurt.mp4", moving(60), key_every=5)
    data = bytearray(path.read_bytes())
    rng = np.random.default_rng(1)
    middle = len(data) // 2
    data[middle : middle + 3_000] = rng.integers(0, 255, 3_000, dtype=np.uint8).tobytes()
    path.write_bytes(data)
    with pytest.raises(VideoDecodeError):
        levels(path)
    stats = DecodeStats()
    got = levels(path, Sampling(4.0, 32, 32, skip_damaged=True, threads=1), stats)
    assert stats.damaged > 0 and stats.damage
    assert len(got) == 24  # the grid goes on to the end


def test_a_file_cut_off_says_so(make_video):
    path = make_video("cut.mkv", moving(60))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 6 // 10])
    got = []
    with pytest.raises(VideoDecodeError) as caught:
        for frame in sample_frames(path, GRID):
            got.append(frame.time_s)  # noqa: PERF401
    assert 0 < len(got) < 24
    assert caught.value.time_s == pytest.approx(got[-1], abs=0.3)


@pytest.mark.parametrize("content", [b"", b"no video at all\n" * 100])
def test_what_is_no_video_is_refused(tmp_path: Path, content: bytes):
    path = tmp_path / "bad.mp4"
    path.write_bytes(content)
    with pytest.raises(VideoDecodeError, match=r"bad\.mp4: no readable video"):
        levels(path)


def test_a_file_without_its_index_is_refused(make_video):
    path = make_video("headless.mp4", moving(20))
    path.write_bytes(path.read_bytes()[:10_000])  # an mp4 keeps its index at the end
    with pytest.raises(VideoDecodeError):
        levels(path)


def test_sound_alone_is_no_video(tmp_path: Path):
    with wave.open(str(tmp_path / "a.wav"), "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(8000)
        out.writeframes(bytes(16_000))
    with pytest.raises(VideoDecodeError, match="holds no video stream"):
        levels(tmp_path / "a.wav")


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.mp4"):
        levels(tmp_path / "nothing.mp4")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        levels(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"), [("fps", 0.0), ("fps", float("nan")), ("width", 4), ("height", 5000), ("threads", -1)]
)
def test_a_wrong_sampling_names_field_and_range(field: str, value: float):
    with pytest.raises(ValueError, match=field):
        Sampling(**{field: value})  # pyright: ignore[reportArgumentType]


@given(st.integers(0, 300), st.integers(1, 20), st.integers(1, 20))
def test_the_number_of_features_is_the_number_of_windows(frames: int, stride: int, size: int):
    windows = sum(1 for start in range(0, frames, stride) if start + size <= frames)
    assert FeatureGrid(4.0, stride, size).count(frames) == (max(1, windows) if frames else 0)
