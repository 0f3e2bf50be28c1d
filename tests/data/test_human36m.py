"""Human3.6M from its videos and from OpenSTL's lists: what is found, how it is divided, what is refused."""

import os
import pickle

import numpy as np
import pytest
from PIL import Image

from vpfast.data import DataError, PreparedClips, VideoError, read_video
from vpfast.data.prepare import prepare
from vpfast.data.sets import SOURCES, Human36M

SUBJECTS = ("S1", "S5", "S6", "S7", "S8", "S9", "S11")


@pytest.fixture
def videos(make_video, tmp_path):
    """Writes videos, ``S1/Videos/Walking 1.54138969.mp4`` and so on; all the same one."""

    def write(*names, **options):
        for name in names:
            make_video(f"h36m/{name}.mp4", **options)
        return tmp_path / "h36m"

    return write


@pytest.fixture
def lists(tmp_path):
    """Writes OpenSTL's two lists, and the pictures 0 to 60 of the videos given."""

    def write(train=(), test=(), pictures=("S1_Eating.54138969_", "S11_Walking.60457274_")):
        src = tmp_path / "openstl"
        (src / "images").mkdir(parents=True, exist_ok=True)
        for prefix in pictures:
            for number in range(61):
                Image.new("RGB", (20, 20), (number,) * 3).save(src / f"images/{prefix}{number:06}.jpg", quality=100)
        for name, lines in (("train.txt", train), ("test.txt", test)):
            (src / name).write_text("".join(f"{line}\n" for line in lines))
        return src

    return write


def refused(source, src, words):
    with pytest.raises(DataError, match=words) as caught:
        source.recordings(src)
    assert str(src) in str(caught.value)


def splits(recordings):
    return {each.name: each.split for each in recordings}


def test_it_is_known_by_name():
    assert SOURCES["human36m"] is Human36M


def test_s11_tests_and_s9_is_held_apart(videos):
    names = [f"{subject}/Videos/Sitting.54138969" for subject in SUBJECTS]
    found = Human36M().recordings(videos(*names, "S1/Videos/_ALL.54138969"))
    assert splits(found) == {
        **{f"{subject}/Sitting.54138969": "train" for subject in ("S1", "S5", "S6", "S7", "S8")},
        "S9/Sitting.54138969": "val",
        "S11/Sitting.54138969": "test",
    }
    assert found[0].tags == {"subject": "S1", "action": "Sitting", "camera": "54138969"}
    assert found[0].fps == 50.0
    whole = Human36M(val_subjects=()).recordings(videos())
    assert [each.split for each in whole] == ["train"] * 6 + ["test"]


def test_the_papers_crop_is_taken_out_of_the_frame(videos, pattern):
    clip = pattern(2, 900, 1000)
    src = videos("S11/Videos/WalkDog 1.60457274", clip=clip)
    (recording,) = pickle.loads(pickle.dumps(Human36M().recordings(src)))
    read = list(recording.read())
    whole = read_video(src / "S11/Videos/WalkDog 1.60457274.mp4").permute(0, 2, 3, 1).numpy()
    assert np.array_equal(np.stack(read), whole[:, 120:880, 120:880])
    (uncropped,) = Human36M(crop=None).recordings(src)
    assert np.array_equal(np.stack(list(uncropped.read())), whole)
    prepare(Human36M(), src, src / "out", workers=0)
    assert PreparedClips(src / "out", "test", 2)[0].shape == (2, 3, 128, 128)


def test_frames_too_small_for_the_crop(videos):
    (recording,) = Human36M().recordings(videos("S5/Videos/Eating 2.55011271"))
    with pytest.raises(
        VideoError, match=r"Eating 2.55011271.mp4: frames of 32x48 .* too small .*\[120, 880\].*--crop null"
    ):
        list(recording.read())


def test_a_video_that_is_none(videos):
    src = videos("S5/Videos/Eating.55011271")
    for content, words in [(b"", "empty file"), (b"not a video" * 99, "not a video that can be decoded")]:
        (src / "S5/Videos/Eating.55011271.mp4").write_bytes(content)
        (recording,) = Human36M().recordings(src)
        with pytest.raises(VideoError, match=f"Eating.55011271.mp4: .*{words}"):
            list(recording.read())


def test_what_is_not_human36m(videos, lists, tmp_path):
    refused(Human36M(), tmp_path, "no video of Human3.6M, SN/Videos/ACTION.CAMERA.mp4")
    refused(Human36M(), tmp_path / "none", "No such file")
    refused(Human36M(), lists(), "give --lists true")
    refused(Human36M(), videos("S1/Videos/holiday"), "holiday.mp4: not named as Human3.6M's videos are")
    (tmp_path / "h36m/S1/Videos/holiday.mp4").unlink()
    refused(Human36M(), videos("a/S1/Videos/Eating.54138969", "S1/Videos/Eating.54138969"), "is there twice")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"crop": (880, 120)}, "crop must be null or two numbers"),
        ({"crop": (-1, 120)}, "crop must be null or two numbers"),
        (
            {"val_subjects": ("S2",)},
            r"val_subjects: \['S2'\] given, must be of S1, S5, S6, S7, S8, S9",
        ),
        ({"val_subjects": ("S11",)}, "S11 is the test split"),
        ({"length": 0}, "length must be at least 1"),
    ],
)
def test_options_out_of_their_range(tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        Human36M(**options).recordings(tmp_path)


def test_openstls_windows(lists):
    src = lists(
        ["images/S1_Eating.54138969_,0", "", "images/S1_Eating.54138969_,25"], ["images/S11_Walking.60457274_,7"]
    )
    found = Human36M(lists=True).recordings(src)
    assert splits(found) == {
        "S1/Eating.54138969/000000": "train",
        "S1/Eating.54138969/000025": "train",
        "S11/Walking.60457274/000007": "test",
    }
    last = pickle.loads(pickle.dumps(found[-1]))
    assert [int(frame[..., 0].mean().round()) for frame in last.read()] == list(range(7, 47, 5))
    assert (last.fps, last.tags["subject"]) == (10.0, "S11")
    assert last.source == src / "images/S11_Walking.60457274_000007.jpg"
    assert len(list(Human36M(lists=True, length=3).recordings(src)[0].read())) == 3
    assert splits(Human36M(lists=True, val_subjects=("S1",)).recordings(src))["S1/Eating.54138969/000000"] == "val"


def test_openstls_windows_prepared(lists):
    src = lists(["images/S1_Eating.54138969_,0"], ["images/S11_Walking.60457274_,7"])
    prepare(Human36M(lists=True, size=(16, 16)), src, src / "out", workers=0)
    clips = PreparedClips(src / "out", "train", 8)
    assert clips[0].shape == (8, 3, 16, 16)
    assert len(clips) == 1


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("images/S11_Walking.60457274_,26", r"images/S11_Walking.60457274_000061.jpg is missing, of the 8 of a window"),
        ("images/S11_Walking.60457274_", r"reads b'images/S11_Walking.60457274_\\n'; expected is PREFIX,FIRST"),
        ("images/S11_Walking.60457274_,-5", "expected is PREFIX,FIRST"),
        ("images/S11_Walking.60457274_,99999999999", "expected is PREFIX,FIRST"),
        ("images/S11_W\u00e4lking.60457274_,0", "expected is PREFIX,FIRST"),
        ("../S11_Walking.60457274_,0", "S11_Walking.60457274_ leads out of the folder"),
        ("/etc/S11_Walking.60457274_,0", "leads out of the folder"),
        ("images/holiday_,0", "images/holiday_ is no prefix such as"),
        ("images/S4_Walking.60457274_,0", "is no prefix such as"),
        ("pictures/S11_Walking.60457274_,0", "its folder .*pictures cannot be read"),
        ("images/" + "S" * 5000, "expected is PREFIX,FIRST"),
    ],
)
def test_lines_that_are_wrong_are_named(lists, line, words):
    src = lists([], ["images/S11_Walking.60457274_,0", line])
    (src / "train.txt").write_text("images/S1_Eating.54138969_,0\n")
    refused(Human36M(lists=True), src, f"test.txt: line 2.*{words}")


def test_lists_missing_empty_and_no_files(lists):
    src = lists(["images/S1_Eating.54138969_,0"])
    refused(Human36M(lists=True), src, r"test.txt: an empty file \(0 bytes\)")
    (src / "test.txt").unlink()
    refused(Human36M(lists=True), src, r"test.txt: cannot be read \(No such file.*OpenSTL has train.txt, test.txt")
    os.mkfifo(src / "test.txt")
    refused(Human36M(lists=True), src, r"test.txt: cannot be read \(not a regular file")
    (src / "test.txt").unlink()
    (src / "test.txt").write_text("images/S11_Walking.60457274_,0\n" * 2)
    refused(Human36M(lists=True), src, "S11/Walking.60457274/000000 is there twice")
