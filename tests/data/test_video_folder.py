"""Windows out of folders of videos: which, in what order, from a cache that never lies."""

import contextlib
import json
import multiprocessing
import os
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from vpfast.data import DataError, VideoError, VideoFolder, _clips, read_video, video_folder
from vpfast.data._files import natural_key


@pytest.fixture
def folder(make_video, make_frames, tmp_path, pattern):
    """clips/run2.avi (12 frames), clips/run10.mp4 (30) and clips/walk/ (7 images), all 32x48."""
    make_video("clips/run10.mp4", pattern(30, 32, 48))
    make_video("clips/run2.avi", pattern(12, 32, 48), "mpeg4")
    make_frames(pattern(7, 32, 48), "clips/walk")
    (tmp_path / "clips/readme.txt").write_text("not a video")
    (tmp_path / "clips/.hidden.mp4").write_bytes(b"")
    return tmp_path / "clips"


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def names(data):
    return [video.path.name for video in data.videos]


def test_windows_in_natural_order(folder, cache):
    data = VideoFolder(folder, length=5, cache=cache)
    assert names(data) == ["run2.avi", "run10.mp4", "walk"]
    assert [data.locate(i)[1] for i in range(len(data))] == [0, 5, 0, 5, 10, 15, 20, 25, 0]
    clip = data[3]
    assert (clip.shape, clip.dtype) == ((5, 3, 32, 48), torch.float32)
    assert torch.equal((clip * 255).round().byte(), read_video(folder / "run10.mp4", start=5, count=5))
    assert torch.equal(data[-1], data[len(data) - 1])
    with pytest.raises(IndexError, match="index 9 in a set of 9"):
        data[9]


@given(frames=st.lists(st.integers(1, 60), min_size=1, max_size=4), length=st.integers(1, 20), step=st.integers(1, 25))
def test_every_window_fits_and_none_is_missing(tmp_path_factory, frames, length, step):
    """On cached arrays alone, so that hypothesis can try many."""
    if max(frames) < length:
        return
    root = tmp_path_factory.mktemp("videos")
    videos = []
    for number, count in enumerate(frames):
        array = np.arange(count, dtype=np.uint8).reshape(-1, 1, 1, 1)
        path = root / f"{number}.npy"
        path.write_bytes(_clips.npy_header(array.shape) + array.tobytes())
        assert np.array_equal(np.load(path), array)
        videos.append(video_folder.Video(path, path, array.shape))
    original = video_folder.find_videos, video_folder._decoded
    video_folder.find_videos = lambda *_: list(range(len(videos)))
    video_folder._decoded = lambda number, *_: videos[number]
    try:
        with pytest.warns(UserWarning, match="left out") if min(frames) < length else contextlib.nullcontext():
            data = VideoFolder(root, length=length, step=step)
    finally:
        video_folder.find_videos, video_folder._decoded = original
    expected = [(v, s) for v, n in enumerate(frames) for s in range(0, n - length + 1, step)]
    assert len(data) == len(expected)
    for index, (number, start) in enumerate(expected):
        assert data.locate(index) == (videos[number], start)
        assert (data[index].flatten() * 255).round().tolist() == list(range(start, start + length))


def test_include_and_exclude(folder, cache):
    assert names(VideoFolder(folder, length=5, cache=cache, include=["run*"])) == ["run2.avi", "run10.mp4"]
    assert names(VideoFolder(folder, length=5, cache=cache, exclude=["*.avi", "walk"])) == ["run10.mp4"]
    assert names(VideoFolder(folder.parent, length=5, cache=cache, include="clips/w*")) == ["walk"]
    with pytest.raises(VideoError, match=r"3 videos found, none left by include=\['x'\]"):
        VideoFolder(folder, cache=cache, include=["x"])


def test_one_file_or_one_folder_of_frames_as_root(folder, cache):
    assert len(VideoFolder(folder / "run10.mp4", length=10, cache=cache)) == 3
    assert len(VideoFolder(folder / "walk", length=7, cache=cache)) == 1


def test_size_channels_and_step(folder, cache):
    data = VideoFolder(folder, length=4, size=(8, 10), channels=1, step=1, cache=cache, fit="crop")
    assert data[0].shape == (4, 1, 8, 10)
    assert len(data) == 9 + 27 + 4


def test_short_videos_are_left_out_with_a_warning(folder, cache):
    with pytest.warns(UserWarning, match="walk: left out, its 7 frames are fewer than 10"):
        data = VideoFolder(folder, length=10, cache=cache)
    assert names(data) == ["run2.avi", "run10.mp4"]


@pytest.mark.filterwarnings("error")
def test_where_all_are_too_short_the_error_says_it_all(folder, cache):
    with pytest.raises(VideoError, match="no clip of 31 frames; found 3 videos, the longest of 30 frames"):
        VideoFolder(folder, length=31, cache=cache)


def test_mixed_sizes_need_a_size(folder, cache, make_video, pattern):
    make_video("clips/z.avi", pattern(12, 16, 48), "mpeg4")
    with pytest.raises(VideoError, match=r"walk|z.avi: 16x48 .* is 32x48; give a size"):
        VideoFolder(folder, length=5, cache=cache)
    assert VideoFolder(folder, length=5, size=16, cache=cache)[0].shape == (5, 3, 16, 16)


def test_a_broken_video_stops_and_leaves_nothing_half_written(folder, cache):
    path = folder / "run2.avi"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(VideoError, match=r"run2\.avi"):
        VideoFolder(folder, length=5, cache=cache)
    assert not any("run2" in name for name in os.listdir(cache))


def test_missing_and_empty_roots(tmp_path, cache):
    with pytest.raises(VideoError, match=r"nowhere: cannot be read \(No such file"):
        VideoFolder(tmp_path / "nowhere", cache=cache)
    with pytest.raises(VideoError, match="0 videos found"):
        VideoFolder(tmp_path, cache=cache)


def test_each_video_is_decoded_once(folder, cache, monkeypatch):
    VideoFolder(folder, length=5, cache=cache)
    monkeypatch.setattr(video_folder, "iter_video", _refuse)
    data = VideoFolder(folder, length=3, cache=cache)  # other windows of the same frames
    assert np.load(data.videos[0].array).shape == (12, 3, 32, 48)
    assert json.loads(data.videos[0].array.with_suffix(".json").read_text())["shape"] == [12, 3, 32, 48]
    with pytest.raises(AssertionError, match="decoded again"):
        VideoFolder(folder, length=3, size=8, cache=cache)


def _refuse(*args):
    raise AssertionError("decoded again")


def test_an_altered_video_and_a_damaged_cache_are_decoded_again(folder, cache, make_video, pattern):
    before = VideoFolder(folder, length=5, cache=cache, include=["run2*"])
    array = before.videos[0].array
    array.write_bytes(array.read_bytes()[:500])
    assert torch.equal(VideoFolder(folder, length=5, cache=cache, include=["run2*"])[1], _direct(folder, 5))
    array.with_suffix(".json").write_text('{"shape": "no')
    assert torch.equal(VideoFolder(folder, length=5, cache=cache, include=["run2*"])[1], _direct(folder, 5))
    make_video("clips/run2.avi", pattern(20, 32, 48)[::-1], "mpeg4")
    assert torch.equal(VideoFolder(folder, length=5, cache=cache, include=["run2*"])[1], _direct(folder, 5))


@pytest.mark.parametrize("harm", [lambda array: array.unlink(), lambda array: array.write_bytes(b"")])
def test_a_cache_lost_after_construction_says_what_to_do(folder, cache, harm):
    data = VideoFolder(folder, length=5, cache=cache, include=["run2*"])
    harm(data.videos[0].array)
    with pytest.raises(
        DataError, match=r"npy: the decoded frames of .*run2\.avi can no longer be read .* build the data"
    ):
        data[0]
    again = VideoFolder(folder, length=5, cache=cache, include=["run2*"])
    assert torch.equal(again[1], _direct(folder, 5))
    assert torch.equal(data[1], _direct(folder, 5))


def _direct(folder, start):
    return read_video(folder / "run2.avi", start=start, count=5) / 255


def test_workers_and_pickles(folder, cache):
    data = VideoFolder(folder, length=5, size=16, cache=cache)
    assert len(pickle.dumps(data)) < 5000
    expected = torch.stack([data[i] for i in range(len(data))])
    for context in ("fork", "spawn"):
        loader = DataLoader(data, batch_size=4, num_workers=2, multiprocessing_context=context)
        assert torch.equal(torch.cat(list(loader)), expected)


def _build(arguments):
    folder, cache = arguments
    return VideoFolder(folder, length=5, cache=cache)[4].sum().item()


def test_several_processes_may_fill_the_cache_at_once(folder, cache):
    with multiprocessing.get_context("fork").Pool(4) as pool:
        sums = pool.map(_build, [(folder, cache)] * 8, chunksize=1)
    assert len(set(sums)) == 1
    assert sorted(path.suffix for path in cache.iterdir()) == [".json"] * 3 + [".npy"] * 3


def test_a_cache_that_cannot_be_written(folder, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(VideoError, match="file: cannot keep the frames of"):
        VideoFolder(folder, length=5, cache=tmp_path / "file")


def test_default_cache(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("VPFAST_CACHE", str(tmp_path / "chosen"))
    VideoFolder(folder / "walk", length=5)
    assert (tmp_path / "chosen").is_dir()
    monkeypatch.delenv("VPFAST_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert video_folder.default_cache() == tmp_path / "xdg/vpfast"


@pytest.mark.parametrize("options", [{"length": 0}, {"step": 0}, {"size": -1}])
def test_arguments_out_of_range(folder, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        VideoFolder(folder, **options)


@given(st.lists(st.integers(0, 10**6), unique=True))
def test_natural_order_counts(numbers):
    named = [f"frame{n}.png" for n in numbers]
    assert sorted(named, key=natural_key) == [f"frame{n}.png" for n in sorted(numbers)]


def test_kth(shared, cache):
    data = VideoFolder(
        shared / "data/kth", length=20, size=(32, 32), channels=1, include=["*running*", "*boxing_d4*"], cache=cache
    )
    assert names(data) == [f"person{p}_uncomp.avi" for p in ("16_boxing_d4", "09_running_d1", "15_running_d1")]
    assert len(data) == 460 // 20 + 2 * (325 // 20)
    assert 0.2 < data[0].mean() < 0.9
