"""KTH out of its official files and out of PredRNN's: which films, which runs of frames, which split, which windows."""

import pickle
import shutil

import numpy as np
import pytest
from PIL import Image

from vpfast.data import DataError, PreparedClips, read_video
from vpfast.data.prepare import prepare
from vpfast.data.sets.kth import KTH, read_sequences

SMALL = {"size": (16, 20)}
LIST = "prose\r\n\r\nperson01_boxing_d1\t\tframes\t1-4, 5-8\r\nperson17_running_d2    frames 3-5, 9-20, 4-6\r\n"


@pytest.fixture
def films(make_video, tmp_path, pattern):
    """kth/boxing/person01_boxing_d1_uncomp.avi of 10 frames, kth/person17_running_d2_uncomp.avi of 14, and a list."""
    make_video("kth/boxing/person01_boxing_d1_uncomp.avi", pattern(10, 32, 48), "mpeg4")
    make_video("kth/person17_running_d2_uncomp.avi", pattern(14, 32, 48), "mpeg4")
    (tmp_path / "kth/00sequences.txt").write_text(LIST)
    return tmp_path / "kth"


def test_a_recording_is_a_run_of_listed_frames(films, tmp_path):
    told = []
    done = prepare(KTH(**SMALL), films, tmp_path / "out", tell=told.append)
    facts = [(entry.name, entry.split, entry.shape[0], entry.tags["person"]) for entry in done.index.recordings]
    assert facts == [
        ("boxing/person01_boxing_d1/0001-0008", "train", 8, "01"),
        ("running/person17_running_d2/0003-0006", "test", 4, "17"),
        ("running/person17_running_d2/0009-0020", "test", 6, "17"),
    ]
    whole = read_video(films / "person17_running_d2_uncomp.avi", size=(16, 20)).numpy()
    for name, frames in (("0003-0006", whole[2:6]), ("0009-0020", whole[8:])):
        assert np.array_equal(np.load(tmp_path / f"out/frames/running/person17_running_d2/{name}.npy"), frames)
    (note,) = told
    assert note.endswith("ends with frame 14, the list of sequences goes on to 20")


def test_whole_films_without_the_list(films):
    (films / "00sequences.txt").unlink()
    with pytest.raises(DataError, match=r"holds no 00sequences\.txt.* --sequences false takes whole films"):
        KTH().recordings(films)
    recordings = KTH(sequences=False).recordings(films)
    assert [(each.name, each.fps, len(list(each.read()))) for each in recordings] == [
        ("boxing/person01_boxing_d1", 25.0, 10),
        ("running/person17_running_d2", 25.0, 14),
    ]
    for each in recordings:  # what a worker is sent
        assert len(list(pickle.loads(pickle.dumps(each)).read())) in (10, 14)


def test_persons_are_divided_as_in_the_literature(tmp_path):
    for person in range(1, 26):
        (tmp_path / f"person{person:02}_walking_d1_uncomp.avi").touch()

    def persons(split, **options):
        recordings = KTH(sequences=False, **options).recordings(tmp_path)
        return [int(each.tags["person"]) for each in recordings if each.split == split]

    assert persons("train") == list(range(1, 15))
    assert persons("val") == [15, 16]
    assert persons("test") == list(range(17, 26))
    assert persons("train", val_persons=()) == list(range(1, 17))
    assert persons("val", val_persons=(3,)) == [3]
    with pytest.raises(ValueError, match=r"val_persons: \[17\] given, must be of 1 to 16"):
        persons("val", val_persons=(16, 17))


def predrnn_windows(numbers, length, jumping):
    """First frames of the windows by PredRNN's rule: backwards over the files of a film, numbers without a gap."""
    windows, index = [], len(numbers) - 1
    while index >= length - 1:
        if numbers[index] - numbers[index - length + 1] == length - 1:
            windows.append(numbers[index - length + 1])
            index -= 2 if jumping else length - 1
        index -= 1
    return sorted(windows)


@pytest.mark.parametrize("action", ["running", "walking"])
def test_folders_of_frames_and_windows_as_predrnn_has_them(make_frames, pattern, tmp_path, action):
    numbers = [*range(1, 33), *range(40, 61), *range(70, 75)]
    folder = make_frames(pattern(len(numbers), 20, 60), f"src/{action}/person02_{action}_d3_uncomp")
    for place, number in reversed(list(enumerate(numbers, start=1))):
        (folder / f"frame{place}.png").rename(folder / f"image_{number:04}.png")
    prepare(KTH(stride="predrnn", **SMALL), tmp_path / "src", tmp_path / "out")
    with pytest.warns(UserWarning, match="1 of 3 recordings"):
        clips = PreparedClips(tmp_path / "out", length=10)
    names = [f"{action}/person02_{action}_d3/{run}" for run in ("0001-0032", "0040-0060")]
    assert [entry.name for entry in clips.recordings] == names
    found = []
    for index in range(len(clips)):
        entry, start = clips.locate(index)
        found.append(int(entry.name[-9:-5]) + start)
    assert sorted(found) == predrnn_windows(numbers, 10, action == "running")
    frames = read_video(folder, size=(16, 20)).numpy()
    first = numbers.index(found[-1])
    assert np.array_equal((clips[-1].numpy() * 255).round().astype(np.uint8), frames[first : first + 10])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("person26_boxing_d1_uncomp.avi", "persons 01 to 25"),
        ("person01_dancing_d1_uncomp.avi", "an action of boxing, handclapping"),
        ("person01_boxing_d5_uncomp.avi", "not the name of one of KTH's films"),
        ("holiday.avi", "move it out of the folder"),
        ("again/person01_boxing_d1_uncomp.avi", r"the same film as .*person01_boxing_d1_uncomp\.avi; keep one"),
        ("person02_boxing_d1_uncomp.avi", "not in the list of sequences; --sequences false takes whole films"),
        ("person03_boxing_d1_uncomp/", "a film's folder without images"),
        ("person03_boxing_d1_uncomp/front.jpg", "its name ends in no number"),
    ],
)
def test_films_that_are_none(films, name, message):
    path = films / name
    (path if name.endswith("/") else path.parent).mkdir(exist_ok=True)
    if not name.endswith("/"):
        path.touch()
    with pytest.raises(DataError, match=message):
        KTH().recordings(films)


def test_a_frame_that_is_there_twice(make_frames, pattern, tmp_path):
    folder = make_frames(pattern(3, 20, 60), "src/person02_boxing_d3_uncomp")
    (folder / "frame2.png").rename(folder / "frame01.png")
    with pytest.raises(DataError, match=r"frame1\.png: frame 1 is there twice, frame01\.png is it too"):
        KTH().recordings(tmp_path / "src")


@pytest.mark.parametrize("how", ["cut", "empty", "not an image", "another size"])
def test_damaged_images_are_named(make_frames, pattern, tmp_path, how):
    folder = make_frames(pattern(6, 20, 60), "src/person02_boxing_d3_uncomp", names="image_{:04}.png")
    path = folder / "image_0004.png"
    if how == "another size":
        Image.fromarray(pattern(1, 24, 60)[0]).save(path)
    else:
        path.write_bytes(damaged(path.read_bytes(), how))
    with pytest.raises(DataError, match=r"image_0004\.png: (not an image|frame 3 is 24x60)"):
        prepare(KTH(**SMALL), tmp_path / "src", tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.npy"))


def test_a_folder_without_films(tmp_path):
    with pytest.raises(DataError, match=r"holds none of KTH's films; expected ACTION/personNN_ACTION_dM_uncomp.avi"):
        KTH().recordings(tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        KTH().recordings(tmp_path / "nowhere")


def test_films_of_the_list_that_are_not_there_are_told(films, tmp_path):
    with open(films / "00sequences.txt", "a") as file:
        file.write("person25_walking_d4 frames 1-100\n")
    told = []
    prepare(KTH(**SMALL), films, tmp_path / "out", tell=told.append)
    assert any(
        "1 of the 3 films that the list of sequences has are not there, such as person25_walking_d4" in n for n in told
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "lists no sequence"),
        ("person01_boxing_d1 *missing*\n", "lists no sequence"),
        ("<!DOCTYPE html>", "lists no sequence"),
        ("person01_boxing_d1 frames 1-95; 96-185", "line 1 reads 'person01_boxing_d1 frames 1-95; 96-185', expected"),
        ("\nperson01_boxing_d1 frames 1-95,", "line 2"),
        ("person01_boxing_d1 frames", "line 1"),
        ("person01_boxing_d1 frames 9-3", "line 1 has a range that counts backwards or from 0"),
        ("person01_boxing_d1 frames 0-3", "from 0"),
        ("person01_boxing_d1 frames 1-" + "9" * 5000, "line 1"),
        ("person01_boxing_d1 frames 1-2\nperson01_boxing_d1 frames 3-4", "line 2"),
        (b"person01\xff", "cannot be read as KTH's list"),
        (b"\0" * 100, "lists no sequence"),
        (None, "cannot be read as KTH's list of sequences"),
    ],
)
def test_a_list_that_is_none(tmp_path, text, message):
    path = tmp_path / "list.txt"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=message):
        read_sequences(path)


def damaged(data, how):
    if how == "cut":
        return data[: len(data) // 2]
    return b"" if how == "empty" else b"#EXTM3U\nhttp://nowhere/film.avi\n"


@pytest.mark.parametrize("how", ["cut", "empty", "not a film"])
@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_films_are_named(films, tmp_path, how, workers):
    path = films / "boxing/person01_boxing_d1_uncomp.avi"
    path.write_bytes(damaged(path.read_bytes(), how))
    with pytest.raises(DataError, match=r"1 of 3 recordings cannot be prepared: .*person01_boxing_d1_uncomp\.avi: "):
        prepare(KTH(**SMALL), films, tmp_path / "out", workers=workers)
    assert not (tmp_path / "out/index.json").exists()


def test_a_film_is_named_once_however_many_runs_it_has(films, tmp_path):
    path = films / "person17_running_d2_uncomp.avi"
    path.write_bytes(b"")
    with pytest.raises(DataError) as refused:
        prepare(KTH(**SMALL), films, tmp_path / "out")
    assert str(refused.value).startswith(f"2 of 3 recordings cannot be prepared: {path}: an empty file (0 bytes). The")


def test_a_film_far_shorter_than_its_list(films, tmp_path):
    with open(films / "00sequences.txt", "w") as file:
        file.write("person01_boxing_d1 frames 100-200\nperson17_running_d2 frames 1-10\n")
    with pytest.raises(DataError, match="ends before frame 100, where the list of sequences has frames 100-200"):
        prepare(KTH(**SMALL), films, tmp_path / "out")


def test_the_official_list(shared):
    listed = read_sequences(shared / "data/kth/00sequences.txt")
    assert len(listed) == 599  # one film of 600 was never published
    assert "person13_handclapping_d3" not in listed
    assert listed["person01_boxing_d1"] == [(1, 360)]
    assert listed["person07_jogging_d4"] == [(1, 64), (194, 264), (270, 332), (490, 570)]  # listed out of order
    assert listed["person16_handwaving_d4"] == [(1, 456)]  # 212-456 follows 207-311
    assert listed["person03_walking_d4"] == [(1, 92), (118, 216), (232, 432)]  # 338-432 follows 232-338


def test_real_films(shared, tmp_path):
    done = prepare(KTH(), shared / "data/kth", tmp_path / "out", workers=2)
    by_split = {split: [e for e in done.index.recordings if e.split == split] for split in ("train", "val", "test")}
    assert {split: (len(e), sum(x.shape[0] for x in e)) for split, e in by_split.items()} == {
        "train": (13, 1512),
        "val": (5, 653),
        "test": (1, 365),
    }
    whole = read_video(shared / "data/kth/walking/person07_walking_d2_uncomp.avi", size=128, start=185, count=99)
    stored = np.load(tmp_path / "out/frames/walking/person07_walking_d2/0186-0284.npy")
    assert np.array_equal(stored, whole.numpy())


def test_a_real_film_that_was_cut_off(shared, tmp_path):
    for name in ("boxing/person21_boxing_d1_uncomp.avi", "00sequences.txt"):
        (tmp_path / "src" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(shared / "data/kth" / name, tmp_path / "src" / name)
    path = tmp_path / "src/boxing/person21_boxing_d1_uncomp.avi"
    path.write_bytes(path.read_bytes()[:1_000_000])
    with pytest.raises(DataError, match=r"person21_boxing_d1_uncomp\.avi: "):
        prepare(KTH(**SMALL), tmp_path / "src", tmp_path / "out")
