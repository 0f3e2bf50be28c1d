"""Preparing: every recording once, the same by however many processes, from where it stopped, and all or no index."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from vpfast.data import DataError, PreparedClips, _clips, read_video
from vpfast.data._parallel import in_parallel
from vpfast.data.prepare import check, prepare
from vpfast.data.prepared import read_index
from vpfast.data.resize import resize_frames, to_grey
from vpfast.data.sets.folder import Folder
from vpfast.data.sets.source import Recording

HERE = Path(__file__).parent


@pytest.fixture
def videos(make_video, make_frames, tmp_path, pattern):
    """src/train/a.avi (12 frames), src/train/b (7 images), src/val/c.mp4 (9), src/test/d.avi (8); 32x48."""
    make_video("src/train/a.avi", pattern(12, 32, 48), "mpeg4")
    make_frames(pattern(7, 32, 48), "src/train/b")
    make_video("src/val/c.mp4", pattern(9, 32, 48))
    make_video("src/test/d.avi", pattern(8, 32, 48), "mpeg4")
    return tmp_path / "src"


SMALL = Folder(size=(16, 24))


def read_counting(count, path):
    """Frames for a test, noted in a file beside the source's."""
    with open(path.parent / "read.log", "a") as log:
        log.write(f"{path.name}\n")
    for number in range(count):
        yield np.full((4, 6, 3), number, np.uint8)


@dataclass(frozen=True)
class Fake:
    """Five frames of 4x6 for each name; the files are empty, for their time of change alone."""

    name = "fake"
    size = (4, 6)
    fit = "squash"
    channels = 3
    names: tuple[str, ...] = ("a", "b/c")
    read = staticmethod(read_counting)

    def recordings(self, src):
        files = {name: src / name.replace("/", "-") for name in self.names}
        for file in files.values():
            file.open("a").close()
        return [Recording(name, "train", files[name], partial(self.read, 5, files[name])) for name in self.names]


@pytest.fixture
def src(tmp_path):
    (tmp_path / "src").mkdir()
    return tmp_path / "src"


def read_log(src):
    log = src / "read.log"
    names = sorted(log.read_text().split()) if log.exists() else []
    log.unlink(missing_ok=True)
    return names


def everything(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("fit", ["crop", "squash"])
def test_frames_are_those_of_the_reader(videos, tmp_path, channels, fit):
    done = prepare(Folder(size=(20, 20), fit=fit, channels=channels), videos, tmp_path / "out")
    assert [(entry.name, entry.split, entry.shape[0]) for entry in done.index.recordings] == [
        ("test/d.avi", "test", 8),
        ("train/a.avi", "train", 12),
        ("train/b", "train", 7),
        ("val/c.mp4", "val", 9),
    ]
    for entry in done.index.recordings:
        frames = read_video(videos / entry.source)
        frames = to_grey(frames) if channels == 1 else frames
        stored = np.load(tmp_path / "out" / entry.file)
        assert np.array_equal(stored, resize_frames(frames, (20, 20), fit).numpy())
    clip = PreparedClips(tmp_path / "out", "val", length=9)[0]
    torch.testing.assert_close(clip, torch.from_numpy(np.load(tmp_path / "out/frames/val/c.mp4.npy")) / 255)
    assert check(tmp_path / "out") == []


def test_processes_write_what_one_writes(videos, tmp_path):
    for workers in (0, 1, 3):
        done = prepare(SMALL, videos, tmp_path / str(workers), workers=workers)
        assert (done.decoded, done.kept) == (4, 0)
    assert everything(tmp_path / "0") == everything(tmp_path / "1") == everything(tmp_path / "3")
    assert sorted(everything(tmp_path / "0"))[-1] == "index.json"


def test_what_is_whole_is_not_decoded_again(src, tmp_path):
    out = tmp_path / "out"
    first = prepare(Fake(), src, out)
    assert read_log(src) == ["a", "b-c"]
    before = (out / "index.json").stat().st_mtime_ns
    assert prepare(Fake(), src, out, workers=2) == type(first)(first.index, 0, 2)
    assert (out / "index.json").stat().st_mtime_ns == before
    assert read_log(src) == []


@pytest.mark.parametrize("harm", ["cut", "other bytes", "gone", "wrong header", "other source"])
def test_what_is_not_whole_is_decoded_again(src, tmp_path, harm):
    out = tmp_path / "out"
    good = prepare(Fake(), src, out).index
    read_log(src)
    path = out / "frames/b/c.npy"
    data = path.read_bytes()
    if harm == "cut":
        path.write_bytes(data[:-1])
    elif harm == "other bytes":
        path.write_bytes(data[:-1] + b"\xff")
    elif harm == "gone":
        path.unlink()
    elif harm == "wrong header":
        path.write_bytes(_clips.npy_header((4, 3, 6, 5)) + data[128:])
    else:
        os.utime(src / "b-c", ns=(1, 1))
    assert len(check(out)) == (harm != "other source")
    done = prepare(Fake(), src, out)
    assert (done.decoded, done.kept, read_log(src)) == (1, 1, ["b-c"])
    assert path.read_bytes() == data
    assert done.index.recordings[0] == good.recordings[0]
    assert check(out) == []


def test_recordings_that_are_no_longer_there_go(src, tmp_path):
    out = tmp_path / "out"
    prepare(Fake(), src, out)
    with pytest.raises(FileExistsError, match=r"was prepared with options .*; --force replaces it, or choose another"):
        prepare(Fake(names=("a",)), src, out)
    assert check(out) == []
    done = prepare(Fake(names=("a",)), src, out, force=True)
    assert (done.decoded, [entry.name for entry in done.index.recordings]) == (1, ["a"])
    assert sorted(everything(out)) == ["frames/a.npy", "index.json"]
    assert not (out / "frames/b").exists()


def fail_at_c(count, path):
    if path.name == "b-c" and (path.parent / "bad").exists():
        yield np.zeros((4, 6, 3), np.uint8)
        raise DataError(f"{path}: damaged at offset 77")
    yield from read_counting(count, path)


def no_frames(count, path):
    yield from ()


def change_size(count, path):
    yield np.zeros((4, 6, 3), np.uint8)
    yield np.zeros((4, 7, 3), np.uint8)


def four_channels(count, path):
    yield np.zeros((4, 6, 4), np.uint8)


def tell(count, path):
    warnings.warn(f"{path.name}: has a word to say", stacklevel=1)
    yield from read_counting(count, path)


def tell_but_for_c(count, path):
    yield from (no_frames if path.name == "c" else tell)(count, path)


class TellingButForC(Fake):
    read = staticmethod(tell_but_for_c)


class Failing(Fake):
    read = staticmethod(fail_at_c)


@pytest.mark.parametrize("workers", [0, 2])
def test_one_damaged_recording_stops_no_other(src, tmp_path, workers):
    out = tmp_path / "out"
    (src / "bad").touch()
    source = Failing(names=("a", "b/c", "z"))
    with pytest.raises(
        DataError, match=r"^1 of 3 recordings cannot be prepared: .*b-c: damaged at offset 77\. The others"
    ):
        prepare(source, src, out, workers=workers)
    assert sorted(everything(out)) == [".prepare.jsonl", "frames/a.npy", "frames/z.npy"]
    with pytest.raises(DataError, match="not yet prepared to the end"):
        PreparedClips(out, length=5)
    (src / "bad").unlink()
    read_log(src)
    done = prepare(source, src, out, workers=workers)
    assert (done.decoded, done.kept, read_log(src)) == (1, 2, ["b-c"])
    assert sorted(everything(out)) == ["frames/a.npy", "frames/b/c.npy", "frames/z.npy", "index.json"]


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (no_frames, "without a single frame for a"),
        (
            change_size,
            r"frame 1 of a is uint8 \[4, 7, 3\], must be uint8 \[H, W, 3\] as large as the first, \[4, 6, 3\]",
        ),
        (four_channels, r"frame 0 of a is uint8 \[4, 6, 4\]"),
    ],
)
def test_frames_that_are_none(src, tmp_path, read, message):
    with pytest.raises(DataError, match=message):
        prepare(type("Odd", (Fake,), {"read": staticmethod(read)})(names=("a",)), src, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.npy"))


@pytest.mark.parametrize("workers", [0, 2])
def test_what_readers_tell_is_told_though_another_recording_fails(src, tmp_path, workers):
    told = []
    with pytest.raises(DataError, match="1 of 3 recordings cannot be prepared"):
        prepare(TellingButForC(names=("a", "b", "c")), src, tmp_path / "out", workers=workers, tell=told.append)
    assert sorted(told) == ["a: has a word to say", "b: has a word to say"]


def test_what_readers_tell_are_warnings(src, tmp_path):
    source = type("Telling", (Fake,), {"read": staticmethod(tell)})
    with pytest.warns(UserWarning, match="a: has a word to say"):
        prepare(source(names=("a",)), src, tmp_path / "out")


@pytest.mark.parametrize("name", ["../a", "/a", "a//b", "a/./b", "a\0", "a\\b"])
def test_names_stay_in_the_folder(src, tmp_path, name):
    class Odd(Fake):
        def recordings(self, src):
            return [Recording(name, "train", src, partial(read_counting, 5, src / "a"))]

    with pytest.raises(DataError, match="cannot be the name of a file in the prepared set"):
        prepare(Odd(), src, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_two_of_one_name(src, tmp_path):
    with pytest.raises(DataError, match=r"a and .*a would both be a; keep one of them"):
        prepare(Fake(names=("a", "a")), src, tmp_path / "out")
    with pytest.raises(DataError, match="nothing to prepare there"):
        prepare(Fake(names=()), src, tmp_path / "out")


def test_a_folder_of_others_is_left_alone(src, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").write_text("mine")
    with pytest.raises(FileExistsError, match="holds something that is not a prepared set; choose another folder"):
        prepare(Fake(), src, tmp_path / "out", force=True)
    with pytest.raises(FileExistsError, match="exists already and is not a folder"):
        prepare(Fake(), src, tmp_path / "out/thesis.tex")
    assert everything(tmp_path / "out") == {"thesis.tex": b"mine"}


@pytest.mark.parametrize("name", ["index.json", ".prepare.jsonl"])
def test_a_damaged_index_wants_force(src, tmp_path, name):
    out = tmp_path / "out"
    prepare(Fake(), src, out)
    (out / name).write_text('{"format": 1}\n')
    with pytest.raises(DataError, match=r"size None given.*\(--force prepares all of it again\)"):
        prepare(Fake(), src, out)
    done = prepare(Fake(), src, out, force=True)
    assert (done.decoded, sorted(everything(out))) == (2, ["frames/a.npy", "frames/b/c.npy", "index.json"])


def test_a_journal_whose_last_line_was_cut_off(src, tmp_path):
    out = tmp_path / "out"
    index = prepare(Fake(), src, out).index
    lines = [json.dumps(index.head()), *(json.dumps(entry.to_dict()) for entry in index.recordings)]
    (out / ".prepare.jsonl").write_text("\n".join(lines)[:-30])
    (out / "index.json").unlink()
    read_log(src)
    done = prepare(Fake(), src, out)
    assert (done.decoded, done.kept, read_log(src)) == (1, 1, ["b-c"])
    assert done.index == read_index(out) == index


def test_a_preparation_killed_before_its_last_step(src, tmp_path):
    out = tmp_path / "out"
    index = prepare(Fake(), src, out).index
    (out / ".prepare.jsonl").write_text(
        "".join(json.dumps(each) + "\n" for each in [index.head(), *(entry.to_dict() for entry in index.recordings)])
    )
    (out / "index.json").unlink()
    assert prepare(Fake(), src, out) == type(prepare(Fake(), src, out))(index, 0, 2)
    assert sorted(everything(out)) == ["frames/a.npy", "frames/b/c.npy", "index.json"]


def test_one_at_a_time(src, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    handle = os.open(out, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(FileExistsError, match="another `vpfast data prepare` is at work there"):
        prepare(Fake(), src, out)
    os.close(handle)
    prepare(Fake(), src, out)


def interrupt(task):
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)


def test_ctrl_c_that_a_worker_hears_first_is_no_lack_of_memory():
    with pytest.raises(KeyboardInterrupt):
        list(in_parallel(interrupt, range(3), 2))


SLOW = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_prepare

def slow(count, path):
    for frame in test_prepare.read_counting(count, path):
        time.sleep(0 if path.name in "ab" else 60)
        yield frame

class Slow(test_prepare.Fake):
    read = staticmethod(slow)

test_prepare.prepare(Slow(names=("a", "b", "c", "d")), sys.argv[2], sys.argv[3], workers=2)
"""


@pytest.mark.alone
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_stopped_half_way_it_goes_on(src, tmp_path, how):
    """Killed alone, or by Ctrl-C with all its workers; nobody is left working, and what was done is kept."""
    out = tmp_path / "out"
    run = subprocess.Popen(
        [sys.executable, "-c", SLOW, HERE, src, out], start_new_session=True, stderr=subprocess.PIPE, text=True
    )
    journal = out / ".prepare.jsonl"
    deadline = time.monotonic() + 120
    while not (journal.exists() and journal.read_text().count("\n") == 3 and len(list(out.rglob(".[cd].npy*"))) == 2):
        assert run.poll() is None, run.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    if how == signal.SIGINT:
        os.killpg(run.pid, how)
    else:
        os.kill(run.pid, how)
    assert run.wait(60) != 0
    while time.monotonic() < deadline:  # the workers' group is empty once all of them are gone
        try:
            os.killpg(run.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.05)
    else:
        pytest.fail("workers go on without the process that they work for")
    if how == signal.SIGINT:
        assert not list(out.rglob(".*.npy*"))
        assert run.stderr.read().count("Traceback") == 1
    run.stderr.close()
    read_log(src)
    done = prepare(Fake(names=("a", "b", "c", "d")), src, out)
    assert (done.decoded, done.kept, read_log(src)) == (2, 2, ["c", "d"])
    assert sorted(everything(out)) == [*(f"frames/{name}.npy" for name in "abcd"), "index.json"]


def test_check_names_what_is_wrong(src, tmp_path):
    out = tmp_path / "out"
    prepare(Fake(names=("a", "b", "c", "d")), src, out)
    (out / "frames/a.npy").write_bytes((out / "frames/a.npy").read_bytes()[:-1] + b"\x07")
    (out / "frames/b.npy").write_bytes(b"")
    (out / "frames/c.npy").unlink()
    np.save(out / "frames/stray.npy", np.zeros(3))
    for workers in (0, 2):
        wrong = check(out, workers)
        assert len(wrong) == 4
        assert wrong[0].endswith("frames/a.npy: changed since it was written, by its checksum")
        assert "b.npy: 0 bytes long, must be 488" in wrong[1]
        assert "c.npy: cannot be read (No such file or directory)" in wrong[2]
        assert "stray.npy: not in the index" in wrong[3]


PEAK = """
import json, resource, sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
import numpy as np
from vpfast.data._parallel import in_parallel
from vpfast.data.prepare import check, prepare
from vpfast.data.sets.source import Recording

def frames(count):
    for number in range(count):
        yield np.full((256, 256, 3), number % 256, np.uint8)

@dataclass(frozen=True)
class Long:
    name, size, fit, channels = "long", (256, 256), "squash", 3
    count: int = 10
    def recordings(self, src):
        return [Recording("only", "train", src, partial(frames, self.count))]

peaks = []
for count in (20, 200):
    out = Path(sys.argv[1]) / str(count)
    prepare(Long(count), Path(sys.argv[2]), out)
    assert check(out) == []
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
print(json.dumps(peaks))
"""


def test_memory_does_not_grow_with_a_recording(src, tmp_path):
    """4 MB of frames, then 39 MB."""
    (src / "file").touch()
    command = [sys.executable, "-c", PEAK, tmp_path / "out", src / "file"]
    peaks = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout)
    assert peaks[1] - peaks[0] < 16e6
