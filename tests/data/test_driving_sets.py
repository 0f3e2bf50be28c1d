"""Caltech Pedestrian and KITTI raw from their own files: what is found, how it is divided, what is refused."""

import pickle
import zlib
from dataclasses import replace

import numpy as np
import pytest
from hostile import jpeg, seq_file
from PIL import Image

from vpfast.data import DataError, PreparedClips, VideoError
from vpfast.data.norpix import iter_seq
from vpfast.data.prepare import prepare
from vpfast.data.sets import KITTI, SOURCES, Caltech
from vpfast.data.sets.kitti import CATEGORIES

FRAMES = [jpeg(48, 64, seed=seed) for seed in range(6)]


def refused(source, src, words):
    with pytest.raises(DataError, match=words) as caught:
        source.recordings(src)
    assert str(src) in str(caught.value)


def by_split(recordings):
    return {split: [each.name for each in recordings if each.split == split] for split in ("train", "val", "test")}


@pytest.fixture
def caltech(tmp_path):
    """Writes the named videos, ``set00/V000`` and so on."""

    def write(*names, content=None):
        for name in names:
            path = tmp_path / "caltech" / f"{name}.seq"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(seq_file(FRAMES, height=48, width=64) if content is None else content)
        return tmp_path / "caltech"

    return write


@pytest.fixture
def kitti(tmp_path):
    """Writes drives of a few pictures each, by the name of the drive's folder."""

    def write(*drives, camera="image_03", numbers=range(3), side=(75, 248)):
        for drive in drives:
            folder = tmp_path / "kitti" / drive[:10] / drive / camera / "data"
            folder.mkdir(parents=True)
            for number in numbers:
                pixels = np.random.default_rng(number).integers(0, 256, (*side, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{number:010}.png")
        return tmp_path / "kitti"

    return write


def test_both_are_known_by_name():
    assert (SOURCES["caltech"], SOURCES["kitti"]) == (Caltech, KITTI)


def test_caltechs_sets_are_divided_as_their_authors_do(caltech):
    names = [f"set{number:02}/V{video:03}" for number in range(11) for video in (0, 1, 10)]
    found = Caltech().recordings(caltech(*names))
    assert [each.name for each in found] == sorted(names)
    divided = by_split(found)
    assert divided["test"] == names[18:]
    assert divided["val"] == [f"set{number:02}/V000" for number in range(6)]
    assert len(divided["train"]) == 12
    assert not by_split(Caltech(val_videos=()).recordings(caltech()))["val"]
    assert {each.fps for each in found} == {30.0}
    assert found[4].tags == {"set": "01"}


def test_every_third_frame_of_caltech(caltech):
    src = caltech("set06/V000")
    (recording,) = pickle.loads(pickle.dumps(Caltech(every=3).recordings(src)))
    assert recording.fps == 10.0
    whole = list(iter_seq(src / "set06/V000.seq"))
    read = list(recording.read())
    assert len(read) == 2
    assert np.array_equal(read[0], whole[2])
    assert np.array_equal(read[1], whole[5])


def test_caltech_in_folders_of_any_depth(caltech, tmp_path):
    caltech("downloads/set01/V003", ".trash/set02/V001")
    (recording,) = Caltech().recordings(tmp_path)
    assert recording.name == "set01/V003"


def test_what_is_not_caltech(caltech, tmp_path):
    refused(Caltech(), tmp_path, "no video of Caltech Pedestrian, setNN/VNNN.seq")
    refused(Caltech(), tmp_path / "none", "No such file")
    for odd in ("set11/V000", "set01/first", "V000"):
        src = caltech(odd)
        refused(Caltech(), src, rf"{odd}.seq: not one of Caltech Pedestrian's")
        (src / f"{odd}.seq").unlink()
    refused(Caltech(), caltech("set01/V000", "copy/set01/V000"), "set01/V000 is there twice")
    for wrong, words in [({"every": 0}, "every must be"), ({"val_videos": ("set00",)}, "val_videos: .*such as V000")]:
        with pytest.raises(ValueError, match=words):
            Caltech(**wrong).recordings(tmp_path)


@pytest.mark.parametrize("content", [b"", b"RIFF", seq_file(FRAMES)[:1000]])
def test_a_caltech_video_that_is_none_is_refused_before_anything_is_read(caltech, content):
    refused(Caltech(), caltech("set03/V001", content=content), r"set03/V001.seq: ")


def test_prednets_61_drives():
    assert len(CATEGORIES) == 61
    assert {name: list(CATEGORIES.values()).count(name) for name in ("city", "residential", "road")} == {
        "city": 28,
        "residential": 21,
        "road": 12,
    }


def test_kitti_is_divided_as_prednet_does(kitti):
    drives = [f"{name}_sync" for name in CATEGORIES]
    found = KITTI(others="train").recordings(kitti(*drives, "2011_09_28_drive_0016_sync", numbers=[]))
    divided = by_split(found)
    assert divided["val"] == ["city/2011_09_26_drive_0005"]
    assert divided["test"] == [
        "city/2011_09_26_drive_0104",
        "residential/2011_09_26_drive_0079",
        "road/2011_09_26_drive_0070",
    ]
    assert len(divided["train"]) == 57 + 1
    assert divided["train"][-1 - 20 - 11] == "other/2011_09_28_drive_0016"
    assert found[0].tags == {"category": "city", "camera": "image_03"}
    assert found[0].fps == 10.0


def test_kittis_pictures_in_order(kitti, tmp_path):
    src = kitti("2011_09_26_drive_0001_sync", numbers=range(8, 12))
    kitti("2011_09_26_drive_0001_extract")  # as the cameras saw it, unrectified: not what PredNet takes
    (recording,) = pickle.loads(pickle.dumps(KITTI().recordings(src)))
    read = list(recording.read())
    assert recording.name == "city/2011_09_26_drive_0001"
    expected = [np.asarray(Image.open(file)) for file in sorted(src.rglob("*_sync/**/*.png"))]
    assert [frame.tolist() for frame in read] == [frame.tolist() for frame in expected]


def test_cameras_and_categories_that_are_not_there(kitti, tmp_path):
    refused(
        KITTI(), tmp_path, "no drive of KITTI raw, DATE_drive_NNNN_sync/image_03/data/NNNNNNNNNN.png, in it or below"
    )
    src = kitti("2011_09_28_drive_0016_sync", camera="image_02")
    refused(KITTI(), src, "there are image_02: give --camera")
    refused(KITTI(camera="image_02"), src, r"none of its 1 drives \(2011_09_28_drive_0016, ...\) .*--others")
    (recording,) = KITTI(camera="image_02", others="val").recordings(src)
    assert (recording.name, recording.split) == ("other/2011_09_28_drive_0016", "val")
    assert recording.tags == {"camera": "image_02"}


def test_the_same_drive_twice(kitti, tmp_path):
    src = kitti("2011_09_26_drive_0001_sync")
    (src / "2011_09_26").rename(src / "a")
    kitti("2011_09_26_drive_0001_sync")
    refused(KITTI(), src, "city/2011_09_26_drive_0001 is there twice")


def test_pictures_missing_misnamed_and_of_two_sizes(kitti):
    src = kitti("2011_09_26_drive_0001_sync", numbers=[0, 1, 2, 3, 4, 5])
    folder = src / "2011_09_26/2011_09_26_drive_0001_sync/image_03/data"
    (recording,) = KITTI().recordings(src)

    def complaint():
        with pytest.raises(VideoError) as caught:
            list(recording.read())
        assert str(folder) in str(caught.value)
        return str(caught.value)

    (folder / "0000000002.png").unlink()
    assert "picture 0000000002 is missing before 0000000003.png" in complaint()
    (folder / "0000000003.png").unlink()
    assert "picture 0000000002 to 0000000003 is missing before 0000000004.png" in complaint()
    for number in (2, 3):
        (folder / f"{number:010}.png").write_bytes((folder / "0000000000.png").read_bytes())
    (folder / "0000000003.png").write_bytes(b"")
    assert "0000000003.png: not an image that can be read (an empty file, 0 bytes)" in complaint()
    (folder / "0000000003.png").write_bytes((folder / "0000000000.png").read_bytes()[:-500])
    assert "0000000003.png: not an image that can be read (" in complaint()
    (folder / "0000000003.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    assert "0000000003.png: not an image that can be read (cannot identify" in complaint()
    Image.new("RGB", (20, 20)).save(folder / "0000000003.png")
    assert "0000000003.png: frame 3 is 20x20 (height x width), the frames before it are 75x248" in complaint()
    (folder / "first.png").write_bytes(b"")
    assert "first.png: not named as KITTI's pictures are" in complaint()
    for file in folder.iterdir():
        file.unlink()
    assert "a drive without pictures" in complaint()


def test_a_picture_that_boasts_costs_nothing(kitti):
    """A PNG of 100 bytes that announces 3 GB."""
    src = kitti("2011_09_26_drive_0001_sync", numbers=[0])
    file = next(src.rglob("*.png"))
    data = bytearray(file.read_bytes()[:100])
    data[16:24] = (30_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    file.write_bytes(data)
    (recording,) = KITTI().recordings(src)
    with pytest.raises(VideoError, match=r"0000000000.png: not an image .*pixels"):
        list(recording.read())


def test_the_columns_of_msp_ns_code(kitti, tmp_path):
    src = kitti("2011_09_26_drive_0001_sync", numbers=[0], side=(37, 1242))
    released = KITTI(size=(128, 256), fit="squash", columns=1024)
    (recording,) = released.recordings(src)
    (frame,) = recording.read()
    assert np.array_equal(frame, np.asarray(Image.open(next(src.rglob("*.png"))))[:, 109:1133])
    (narrow,) = replace(released, columns=2000).recordings(src)
    with pytest.raises(VideoError, match=r"its pictures are 1242 pixels wide, fewer than columns=2000"):
        list(narrow.read())
    with pytest.raises(ValueError, match="columns must be at least 1 or null, got 0"):
        replace(released, columns=0).recordings(src)


def test_real_caltech_prepared(shared, tmp_path):
    prepare(Caltech(), shared / "data/caltech_style", tmp_path / "set", workers=0)
    clips = PreparedClips(tmp_path / "set", "test", 20)
    assert clips[0].shape == (20, 3, 128, 160)
    whole = list(iter_seq(shared / "data/caltech_style/set06/V000.seq"))
    small = Image.fromarray(whole[0]).resize((171, 128), Image.Resampling.BILINEAR)
    expected = np.asarray(small)[:, 5:165].transpose(2, 0, 1) / 255
    assert np.abs(clips[0][0].numpy() - expected).max() < 1.01 / 255


def test_real_kitti_prepared(shared, tmp_path):
    src = shared / "data/kitti_raw"
    source = KITTI(camera="image_02", others="test")
    prepare(source, src, tmp_path / "a", workers=0)
    files = sorted(src.rglob("*.png"))
    clips = PreparedClips(tmp_path / "a", "test", len(files))
    assert clips[0].shape == (len(files), 3, 128, 160)
    small = Image.open(files[-1]).resize((424, 128), Image.Resampling.BILINEAR)
    expected = np.asarray(small)[:, 132:292].transpose(2, 0, 1) / 255
    assert np.abs(clips[0][-1].numpy() - expected).max() < 1.01 / 255
    prepare(replace(source, size=(128, 256), fit="squash", columns=1024), src, tmp_path / "b", workers=0)
    released = PreparedClips(tmp_path / "b", "test", 10)
    small = Image.open(files[0]).crop((109, 0, 1133, 375)).resize((256, 128), Image.Resampling.BILINEAR)
    assert np.abs(released[0][0].numpy() - np.asarray(small).transpose(2, 0, 1) / 255).max() < 1.01 / 255
