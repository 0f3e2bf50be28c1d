"""Clips out of prepared sets: which windows, from an index that may say anything, in little memory."""

import dataclasses
import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from vpfast.data import DataError, PreparedClips
from vpfast.data._clips import Windows, npy_header
from vpfast.data.prepare import sha256
from vpfast.data.prepared import Entry, Index, read_index
from vpfast.data.resize import to_grey


def write_set(root, recordings, channels=1, size=(2, 3)):
    """A prepared set of ``recordings``: (name, split, frames, step, anchor); every pixel of frame t is t."""
    entries = []
    for name, split, frames, step, anchor in recordings:
        path = root / f"frames/{name}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        array = np.broadcast_to(np.arange(frames, dtype=np.uint8)[:, None, None, None], (frames, channels, *size))
        np.save(path, np.ascontiguousarray(array))
        assert path.read_bytes()[:128] == npy_header(array.shape)
        entries.append(
            Entry(name, split, f"frames/{name}.npy", array.shape, sha256(path), "x.avi", None, step, anchor, {})
        )
    (root / "index.json").write_text(Index("tiny", size, channels, "squash", {}, tuple(entries)).to_json())
    return root


@pytest.fixture
def prepared(tmp_path):
    """Train: a (12 frames), b (7), c (30, step 3, from its end); test: d (20)."""
    recordings = [("a", "train", 12, None, "start"), ("deep/b", "train", 7, None, "start")]
    recordings += [("c", "train", 30, 3, "end"), ("d", "test", 20, None, "start")]
    return write_set(tmp_path / "set", recordings)


def test_windows_are_those_of_the_index(prepared):
    clips = PreparedClips(prepared, "train", length=7)
    starts = [(entry.name, start) for entry, start in map(clips.locate, range(len(clips)))]
    assert starts == [("a", 0), ("deep/b", 0), *[("c", start) for start in range(2, 24, 3)]]
    for index, (_, start) in enumerate(starts):
        clip = clips[index]
        assert (clip.shape, clip.dtype) == ((7, 1, 2, 3), torch.float32)
        torch.testing.assert_close(clip[:, 0, 1, 2] * 255, torch.arange(start, start + 7.0))
    assert torch.equal(clips[-1], clips[len(clips) - 1])
    with pytest.raises(IndexError, match="index 10 in a set of 10 clips"):
        clips[10]
    assert len(PreparedClips(prepared, "train", length=7, step=1)) == 6 + 1 + 24


def test_recordings_too_short_are_told(prepared):
    with pytest.warns(UserWarning, match="1 of 3 recordings of the train split left out, which have fewer than 8"):
        assert {entry.name for entry in PreparedClips(prepared, "train", length=8).recordings} == {"a", "c"}
    with pytest.raises(DataError, match=r"no clip of 31 frames in its train split; the longest of its 3 .* has 30"):
        PreparedClips(prepared, "train", length=31)


def test_patterns_are_on_the_names(prepared):
    clips = PreparedClips(prepared, "train", length=7, include=("deep/*", "a"), exclude=("a",))
    assert [entry.name for entry in clips.recordings] == ["deep/b"]
    with pytest.raises(DataError, match=r"none of the 3 recordings of the train split left by .* names are like a"):
        PreparedClips(prepared, "train", include=("walking/*",))


def test_a_split_without_recordings_is_refused(prepared):
    with pytest.raises(DataError, match=r"no recording of the val split \(recordings there are, train: 3, test: 1\)"):
        PreparedClips(prepared, "val")
    with pytest.raises(ValueError, match="split must be one of train, val, test, got 'dev'"):
        PreparedClips(prepared, "dev")
    with pytest.raises(ValueError, match="at least 1, got length=0"):
        PreparedClips(prepared, "train", length=0)


def test_colour_becomes_grey_and_grey_no_colour(tmp_path, prepared):
    colour = write_set(tmp_path / "colour", [("a", "train", 9, None, "start")], channels=3)
    path = colour / "frames/a.npy"
    frames = np.random.default_rng(0).integers(0, 256, (9, 3, 2, 3), dtype=np.uint8)
    np.save(path, frames)
    clip = PreparedClips(colour, length=9, channels=1)[0]
    torch.testing.assert_close(clip * 255, to_grey(torch.from_numpy(frames)).float())
    assert PreparedClips(colour, length=9)[0].shape == (9, 3, 2, 3)
    with pytest.raises(DataError, match="prepared in grey and asked for in RGB; prepare it again with --channels 3"):
        PreparedClips(prepared, length=7, channels=3)
    with pytest.raises(ValueError, match="channels must be"):
        PreparedClips(prepared, length=7, channels=2)


def test_workers_read_the_same_clips(prepared):
    clips = PreparedClips(prepared, "train", length=7, step=2)
    assert len(pickle.dumps(clips)) < 4000
    alone = torch.cat(list(DataLoader(clips, 3)))
    beside = torch.cat(list(DataLoader(clips, 3, num_workers=2)))
    assert torch.equal(alone, beside)
    assert len(alone) == len(clips)


@given(
    films=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 9), st.booleans()), min_size=1, max_size=5),
    length=st.integers(1, 12),
)
def test_windows_are_all_there_are(films, length):
    frames, steps, from_end = zip(*films, strict=True)
    windows = Windows(frames, length, steps, from_end)
    expected = []
    for film, (count, step, backwards) in enumerate(films):
        starts = range(count - length, -1, -step) if backwards else range(0, count - length + 1, step)
        expected += [(film, start) for start in sorted(starts)]
    assert [windows.locate(index) for index in range(len(windows))] == expected


NOWHERE = "no such folder; `vpfast data prepare NAME --src FOLDER --out"


def test_what_is_not_a_prepared_set(tmp_path, prepared):
    with pytest.raises(DataError, match=NOWHERE):
        PreparedClips(tmp_path / "nowhere")
    with pytest.raises(DataError, match=NOWHERE):
        PreparedClips(prepared / "index.json")
    with pytest.raises(DataError, match=r"holds no index\.json, so it is not a prepared set"):
        PreparedClips(prepared / "frames")
    (tmp_path / "half").mkdir()
    (tmp_path / "half/.prepare.jsonl").write_text("")
    with pytest.raises(DataError, match="not yet prepared to the end; the same `vpfast data prepare` goes on"):
        PreparedClips(tmp_path / "half")


WRONG_INDEX = [
    ("", "cannot be read as the index"),
    ("[" * 100_000, "cannot be read as the index"),
    ("[]", "must hold keys and values"),
    ("{}", "format None given, this vpfast reads 1"),
    ({"format": 2}, "format 2 given, this vpfast reads 1; prepare the set again"),
    ({"size": [64]}, r"size \[64\] given"),
    ({"size": [True, 3]}, "size"),
    ({"size": [0, 3]}, "size"),
    ({"channels": 2}, "channels 2 given"),
    ({"channels": True}, "channels True given"),
    ({"fit": "stretch"}, "fit must be"),
    ({"options": None}, "options must hold"),
    ({"recordings": {}}, "recordings must be a list"),
    ({"recordings": [3]}, "recording 0 must hold keys"),
    ({"name": 5}, "name must be a text"),
    ({"r.name": None}, "recording 0: name None is none"),
    ({"r.split": "dev"}, "recording 0: split 'dev' is none"),
    ({"r.split": ["train"]}, "recording 0: split"),
    ({"r.file": "/etc/passwd.npy"}, "recording 0: file"),
    ({"r.file": "../../a.npy"}, "recording 0: file"),
    ({"r.file": "frames//a.npy"}, "recording 0: file"),
    ({"r.file": "frames/d.npy"}, r"two recordings have the file \['frames/d.npy'\]"),
    ({"r.name": "d"}, r"two recordings have the name \['d'\]"),
    ({"r.shape": [12, 1, 2]}, "recording 0: shape"),
    ({"r.shape": [12, 1, 2, 2**50]}, "recording 0: shape"),
    ({"r.shape": [12, 1, 2, -3]}, "recording 0: shape"),
    ({"r.shape": [12, 1, 3, 3]}, r"recording 0: shape \[12, 1, 3, 3\] is not of \[1, 2, 3\] frames"),
    ({"r.shape": [2**39, 1, 2, 3]}, r"200 bytes long, must be 3298534883456 for its \[549755813888, 1, 2, 3\] frames"),
    ({"r.sha256": "x"}, "recording 0: sha256"),
    ({"r.fps": float("nan")}, "recording 0: fps"),
    ({"r.step": 0}, "recording 0: step"),
    ({"r.anchor": "middle"}, "recording 0: anchor"),
    ({"r.tags": {"a": 1}}, "recording 0: tags"),
]


@pytest.mark.parametrize(("change", "message"), WRONG_INDEX, ids=[str(change)[:30] for change, _ in WRONG_INDEX])
def test_an_index_is_not_believed(prepared, change, message):
    path = prepared / "index.json"
    if isinstance(change, str):
        path.write_text(change)
    else:
        values = json.loads(path.read_text())
        for key, value in change.items():
            place = values["recordings"][0] if key.startswith("r.") else values
            place[key.removeprefix("r.")] = value
        path.write_text(json.dumps(values))
    with pytest.raises(DataError, match=message):
        PreparedClips(prepared, length=7)


def test_an_index_of_bytes_that_are_no_text(prepared):
    (prepared / "index.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot be read as the index"):
        read_index(prepared)


def test_an_index_is_written_as_it_is_read(prepared):
    index = read_index(prepared)
    (prepared / "index.json").write_text(index.to_json())
    assert read_index(prepared) == index
    assert index.recordings[2] == dataclasses.replace(index.recordings[2], step=3, anchor="end")


def test_an_array_that_is_gone_or_cut_off(prepared):
    path = prepared / "frames/a.npy"
    clips = PreparedClips(prepared, length=7)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"a\.npy: 199 bytes long, must be 200 .*`vpfast data prepare` makes it again"):
        PreparedClips(prepared, length=7)
    path.write_bytes(path.read_bytes()[:140])
    with pytest.raises(DataError, match=r"a\.npy: the decoded frames of a can no longer be read"):
        clips[0]
    path.unlink()
    with pytest.raises(DataError, match=r"a\.npy: cannot be read \(No such file or directory\)"):
        PreparedClips(prepared, length=7)


PEAK = """
import json, resource, sys
from pathlib import Path
from torch.utils.data import DataLoader
from vpfast.data import PreparedClips
from vpfast.data._clips import npy_header
from vpfast.data.prepared import Entry, Index

def sparse_set(root, recordings, frames):
    shape, entries = (frames, 3, 64, 64), []
    for number in range(recordings):
        path = root / f"frames/{number}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            file.write(npy_header(shape))
            file.truncate(128 + frames * 3 * 64 * 64)
        entries.append(Entry(str(number), "train", f"frames/{number}.npy", shape, "0" * 64, "x"))
    (root / "index.json").write_text(Index("s", (64, 64), 3, "squash", {}, tuple(entries)).to_json())
    return sum(path.stat().st_size for path in root.rglob("*.npy"))

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

sizes, peaks = [], []
for recordings, frames in ((8, 100), (64, 100)):
    root = Path(sys.argv[1]) / str(recordings)
    sizes.append(sparse_set(root, recordings, frames))
    clips = PreparedClips(root, length=5)
    assert sum(len(batch) for batch in DataLoader(clips, 4)) == recordings * frames // 5
    peaks.append(peak())
print(json.dumps([sizes, peaks]))
"""


def test_memory_does_not_grow_with_the_set(tmp_path):
    """Every clip of 10 MB, then of 79 MB, which may take no more than what the allocator keeps."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK, tmp_path], capture_output=True, text=True, check=True, timeout=300
    )
    sizes, peaks = json.loads(done.stdout)
    assert sizes[1] - sizes[0] > 60e6
    assert peaks[1] - peaks[0] < 16e6
