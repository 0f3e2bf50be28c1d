"""Any folder of videos as a set to prepare: which video is of which split."""

import pytest

from vpfast.data import DataError, VideoError
from vpfast.data.sets.folder import Folder, frame_number


@pytest.fixture
def folder(tmp_path):
    for name in ("a/run2.avi", "a/run10.mp4", "b/walk1.avi", "b/notes.txt", "walk2.mkv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def test_patterns_divide_the_videos(folder):
    source = Folder(train=("a/*",), val=("*walk1*",), test=())
    found = [(each.name, each.split) for each in source.recordings(folder)]
    assert found == [("a/run2.avi", "train"), ("a/run10.mp4", "train"), ("b/walk1.avi", "val")]
    (one,) = Folder(test=("*.mkv",)).recordings(folder / "walk2.mkv")
    assert (one.name, one.split) == ("walk2.mkv", "test")


def test_a_video_is_of_one_split(folder):
    with pytest.raises(DataError, match=r"b/walk1\.avi: matched by the patterns of train and test"):
        Folder(train=("*",), test=("b/*",)).recordings(folder)


def test_nothing_to_prepare(folder, tmp_path):
    with pytest.raises(DataError, match=r"none of the videos there is of a split \(train: \['train/\*'\]"):
        Folder().recordings(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(VideoError, match="0 videos found"):
        Folder().recordings(tmp_path / "empty")
    with pytest.raises(VideoError, match="cannot be read"):
        Folder().recordings(tmp_path / "nowhere")


def test_numbers_of_frames(tmp_path):
    assert frame_number(tmp_path / "image_0042.jpg") == 42
    assert frame_number(tmp_path / "7.png") == 7
    with pytest.raises(DataError, match="its name ends in no number"):
        frame_number(tmp_path / "image_12b.jpg")
