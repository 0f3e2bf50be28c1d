"""The .seq reader takes whole files as they are and names what is wrong with all others."""

import io
import os
import re
import struct
import tracemalloc
import warnings

import hostile
import numpy as np
import pytest
from hostile import jpeg, seq_file
from PIL import Image

from vpfast.data import VideoError
from vpfast.data import _images as images
from vpfast.data.norpix import SeqHeader, iter_seq, read_seq_header

FRAMES = [jpeg(seed=seed) for seed in range(7)]


@pytest.fixture
def write(tmp_path):
    def write(content):
        path = tmp_path / "V000.seq"
        path.write_bytes(content)
        return path

    return write


def decoded(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def put(data, offset, text):
    return data[:offset] + text + data[offset + len(text) :]


@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("trailer", [8, 16])
@pytest.mark.parametrize("announced", [True, False])
def test_every_frame_in_order(write, trailer, count, announced):
    path = write(seq_file(FRAMES[:count], trailer, **({} if announced else {"frames": 0})))
    assert read_seq_header(path) == SeqHeader(16, 8, count if announced else None, 30.0)
    read = list(iter_seq(path))
    assert len(read) == count
    for frame, data in zip(read, FRAMES, strict=False):
        assert frame.dtype == np.uint8
        assert np.array_equal(frame, decoded(data))


def test_every_third_frame_is_the_third_the_sixth(write):
    read = list(iter_seq(write(seq_file(FRAMES)), every=3))
    assert [frame.tolist() for frame in read] == [decoded(FRAMES[2]).tolist(), decoded(FRAMES[5]).tolist()]
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        next(iter_seq("anything", every=0))


def test_frames_that_are_left_out_have_to_be_there(write):
    with pytest.raises(VideoError, match=r"frame 6 \(offset .*says that it has .* but the file ends"):
        list(iter_seq(write(seq_file(FRAMES)[:-40]), every=3))


@pytest.mark.parametrize(("mode", "kind"), [("L", 102), ("RGB", 201), ("L", 201)])
def test_grey_and_colour_become_rgb(write, mode, kind):
    (frame,) = iter_seq(write(seq_file([jpeg(mode=mode)], kind=kind)))
    assert frame.shape == (8, 16, 3)
    assert (mode == "RGB") == bool((frame[..., 0] != frame[..., 2]).any())


@pytest.mark.parametrize("side", [(1, 1), (7, 5), (123, 321)])
def test_odd_sizes(write, side):
    (frame,) = iter_seq(write(seq_file([jpeg(*side)], height=side[0], width=side[1])))
    assert frame.shape == (*side, 3)


def test_progressive_frames(write):
    data = jpeg(40, 40, progressive=True)
    (frame,) = iter_seq(write(seq_file([data], height=40, width=40)))
    assert np.array_equal(frame, decoded(data))


@pytest.mark.parametrize("fps", [0.0, -1.0, float("nan"), float("inf"), 1e9])
def test_a_rate_that_cannot_be_is_none(write, fps):
    assert read_seq_header(write(seq_file(FRAMES, fps=fps))).fps is None


def test_frames_behind_the_announced_ones_are_told(write):
    path = write(seq_file(FRAMES, frames=3))
    with pytest.warns(UserWarning, match=r"V000.seq: goes on with frames at offset \d+, behind the 3 that its header"):
        assert len(list(iter_seq(path))) == 3


def test_the_time_of_the_last_frame_is_not_missed(write):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(list(iter_seq(write(seq_file(FRAMES)[:-8])))) == 7
        assert len(list(iter_seq(write(seq_file(FRAMES, frames=0)[:-5])))) == 7


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", r"an empty file \(0 bytes\)"),
        (bytes(5000), "offset 0 reads nothing but zeros"),
        (b"RIFF" + bytes(5000), "offset 0 reads 52 49 46 46 00 .*starts with ed fe 00 00 4e"),
        (jpeg(), "offset 0 reads ff d8"),
        (seq_file(FRAMES)[:3], "ends at offset 3, inside its header of 1024 bytes"),
        (seq_file(FRAMES)[:1023], "ends at offset 1023, inside its header"),
        (seq_file(FRAMES, header_bytes=8192), r"its header \(offset 32\) says that it has 8192 bytes, not 1024"),
        (seq_file(FRAMES, kind=100), r"kind 100 \(raw grey, offset 568\); JPEG is read"),
        (seq_file(FRAMES, kind=7), r"kind 7 \(unknown, offset 568\)"),
        (seq_file(FRAMES, height=0), r"frames of 16x0 pixels \(offset 548\)"),
        (seq_file(FRAMES, frames=2**32 - 1), r"\(offset 572\) promises 4294967295 frames, more than fit into its"),
        (seq_file(FRAMES[:2], frames=3), r"frame 2 \(offset \d+\) is missing: the file ends .* promises 3 frames"),
        (seq_file([], frames=0), "a header without a single frame; it ends at offset 1024"),
        (seq_file([b"\xff\xd8" + bytes(300)]), "frame 0 .offset 1024. is no whole JPEG: .* end with 00 00"),
        (seq_file([jpeg(8, 8)]), r"frame 0 \(offset 1024\) is damaged \(it is 8x8 pixels, not 16x8\)"),
        (seq_file([b"\xff\xd8\xff\xd9"]), r"frame 0 \(offset 1024\) is damaged"),
        (
            seq_file([FRAMES[0], FRAMES[1][:200] + b"\xff\xd9"], frames=0),
            r"frame 1 \(offset \d+\) is damaged \(",
        ),
        (
            seq_file(FRAMES)[:-300],
            r"frame 6 \(offset \d+\) says that it has \d+ bytes, but the file ends at offset \d+",
        ),
        (seq_file(FRAMES, trailer=12), r"behind frame 0 \(it ends at offset \d+\) no frame starts after 8 or 16 bytes"),
    ],
)
def test_refusals_name_file_and_place(write, content, words):
    path = write(content)
    with pytest.raises(VideoError, match=words) as caught:
        list(iter_seq(path))
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize("length", [0, 3, 7, 2**31, 2**32 - 1])
def test_a_size_that_cannot_be_is_not_allocated(write, length):
    path = write(put(seq_file(FRAMES), 1024, struct.pack("<I", length)))
    with pytest.raises(
        VideoError, match=rf"frame 0 \(offset 1024\) says that it has {length} bytes; one of 16x8 has 8 to"
    ):
        list(iter_seq(path))


@pytest.mark.parametrize("by", [-1, 1, 4, 8])
def test_a_size_that_is_slightly_off(write, by):
    length = 4 + len(FRAMES[0])
    path = write(put(seq_file(FRAMES), 1024, struct.pack("<I", length + by)))
    with pytest.raises(VideoError, match=rf"frame 0 \(offset 1024\) is no whole JPEG: its {length + by - 4} bytes"):
        list(iter_seq(path))


def test_headers_that_boast_cost_nothing(write):
    """Frames of 8192x8192, which a JPEG of some hundred bytes announces too, in a file of four kilobytes."""
    announced = FRAMES[0].index(b"\xff\xc0\x00\x11\x08\x00\x08\x00\x10") + 5
    boast = put(FRAMES[0], announced, struct.pack(">HH", 8192, 8192))
    assert Image.open(io.BytesIO(boast)).size == (8192, 8192)
    paths = [write(seq_file([boast] * 3))]
    tracemalloc.start()
    for path in paths:
        with pytest.raises(VideoError, match="it is 8192x8192 pixels, not 16x8"):
            list(iter_seq(path))
    assert tracemalloc.get_traced_memory()[1] < 2_000_000
    tracemalloc.stop()
    larger = write(seq_file(FRAMES, height=8192, width=8193))
    with pytest.raises(VideoError, match=r"frames of 8193x8192 pixels \(offset 548\); 1 to 67108864 pixels are read"):
        read_seq_header(larger)


def test_a_jpeg_made_to_take_for_ever(write):
    """A progressive JPEG may go over its picture as often as it likes; a thousand empty scans are refused unread."""
    data = jpeg(progressive=True)
    last = data.rindex(b"\xff\xda")
    scan = data[last:-2]
    path = write(seq_file([data[:-2] + scan * 1000 + data[-2:]]))
    with pytest.raises(VideoError, match=r"frame 0 \(offset 1024\) is damaged \(a JPEG of 1\d\d\d scans"):
        list(iter_seq(path))
    assert images._scans(io.BytesIO(data)) > 1


def test_missing_folder_and_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe.seq")
    for name, words in [("none.seq", "No such file"), (".", "directory"), ("pipe.seq", "not a regular file")]:
        with pytest.raises(VideoError, match=f"cannot be read .*{words}"):
            read_seq_header(tmp_path / name)


def test_without_pillow(write, monkeypatch):
    import builtins

    original = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.split(".")[0] == "PIL":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    path = write(seq_file(FRAMES))
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"needs Pillow: pip install 'vpfast\[cli\]'"):
        next(iter_seq(path))


def test_a_real_file(shared):
    path = shared / "data/caltech_style/set06/V000.seq"
    header = read_seq_header(path)
    assert header == SeqHeader(640, 480, 30, pytest.approx(30.303, abs=1e-3))
    frames = list(iter_seq(path))
    assert len(frames) == 30
    assert {frame.shape for frame in frames} == {(480, 640, 3)}
    data = path.read_bytes()
    starts = [found.start() for found in re.finditer(rb"\xff\xd8\xff\xe0..JFIF", data, re.DOTALL)]
    assert len(starts) == 30
    for frame, start in zip(frames, starts, strict=True):
        assert np.array_equal(frame, decoded(data[start:]))
    moved = np.abs(frames[1].astype(int) - frames[0]).mean()
    assert 0 < moved < 20  # consecutive, and not the same


def test_a_real_file_spoiled(shared, tmp_path):
    data = (shared / "data/caltech_style/set06/V000.seq").read_bytes()
    path = tmp_path / "V000.seq"
    for at, words in [
        (1000, "inside its header"),
        (1025, r"promises 30 frames, more than fit into its 1025 bytes"),
        (300_000, r"frame 8 \(offset 298319\) says that it has 35803 bytes, but the file ends at offset 300000"),
    ]:
        path.write_bytes(data[:at])
        with pytest.raises(VideoError, match=words):
            list(iter_seq(path))
    path.write_bytes(put(data, 1024 + 36923 + 16, struct.pack("<I", 30_000)))
    with pytest.raises(VideoError, match=r"frame 1 \(offset 37963\) is no whole JPEG: its 29996 bytes"):
        list(iter_seq(path))


def test_the_makers_of_files_make_what_is_meant():
    assert len(seq_file([b""], 8)) == 1024 + 4 + 8
    assert hostile.seq_file([b""], 16)[1028:1034] != bytes(6)
