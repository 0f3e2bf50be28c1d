"""Pictures are read back: right size, right content, whole or not there."""

import os
import sys

import numpy as np
import pytest
import torch

from vpfast.data import read_video
from vpfast.visual import beside, growing_mp4, side_by_side, write_gif, write_mp4, write_strip
from vpfast.visual.strip import _columns


def moving(frames=6, channels=3, height=20, width=24):
    clip = torch.full((frames, channels, height, width), 0.25)
    for number, frame in enumerate(clip):
        frame[0, 4:12, number : number + 8] = 0.9
    return clip


def image(path):
    from PIL import Image

    return np.array(Image.open(path).convert("RGB"))


def error(read, clip):
    return (read.float() / 255 - clip.expand(-1, 3, -1, -1)).abs().max().item()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("fps", [0.5, 7, 50])
def test_gif_is_exact_where_colours_are_few(tmp_path, channels, fps):
    from PIL import Image

    clip = moving(channels=channels)
    clip[3] = clip[2]  # a frame like the one before is still a frame
    write_gif(tmp_path / "a.gif", clip, fps)
    read = read_video(tmp_path / "a.gif")
    assert read.shape == (6, 3, 20, 24)
    assert error(read, clip) <= 0.5 / 255 + 1e-6
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.info["loop"] == 0
        total = 0
        for number in range(gif.n_frames):
            gif.seek(number)
            total += gif.info["duration"]
    assert total == pytest.approx(6000 / fps, abs=20)


def test_every_grey_survives_in_a_gif(tmp_path):
    ramp = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(3, 1, 1, 1)
    write_gif(tmp_path / "a.gif", ramp)
    assert torch.equal(read_video(tmp_path / "a.gif"), ramp.expand(-1, 3, -1, -1))


def test_gif_of_many_colours_comes_close_and_keeps_the_commonest(tmp_path):
    y, x = torch.meshgrid(torch.linspace(0, 1, 40), torch.linspace(0, 1, 40), indexing="ij")
    clip = torch.stack([x, y, (x + y) / 2]).repeat(4, 1, 1, 1)
    clip[..., :4] = 1
    write_gif(tmp_path / "a.gif", clip)
    read = read_video(tmp_path / "a.gif")
    assert (read.float() / 255 - clip).abs().mean() < 0.02
    assert read[..., :4].min() == 255


@pytest.mark.parametrize(("height", "width"), [(20, 24), (21, 24), (20, 25), (33, 17)])
def test_mp4_pads_odd_sizes(tmp_path, height, width):
    clip = moving(height=height, width=width)
    write_mp4(tmp_path / "a.mp4", clip, fps=29.97)
    read = read_video(tmp_path / "a.mp4")
    assert read.shape == (6, 3, height + height % 2, width + width % 2)
    assert (read[..., :height, :width].float() / 255 - clip).abs().mean() < 0.05


def test_mp4_says_what_it_is(tmp_path):
    import av

    write_mp4(tmp_path / "a.mp4", moving(), fps=12.5)
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert float(stream.average_rate) == 12.5
        assert stream.codec_context.colorspace == 1


def test_mp4_without_libx264(tmp_path, monkeypatch):
    import av

    monkeypatch.setattr(av, "codecs_available", av.codecs_available - {"libx264"})
    write_mp4(tmp_path / "a.mp4", moving(), fps=10)
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video[0].codec_context.name == "mpeg4"
    assert len(read_video(tmp_path / "a.mp4")) == 6


@pytest.mark.parametrize("write", [write_gif, write_mp4])
@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf")])
def test_frame_rates_that_make_no_sense(tmp_path, write, fps):
    with pytest.raises(ValueError, match="fps must be above 0"):
        write(tmp_path / "a", moving(), fps)


WRITERS = {
    "a.gif": write_gif,
    "a.mp4": write_mp4,
    "a.png": lambda path, clip: write_strip(path, {"truth": clip}),
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize(
    ("clip", "kind", "words"),
    [
        (torch.zeros(3, 2, 8, 8), ValueError, r"\(3, 2, 8, 8\)"),
        (torch.zeros(0, 3, 8, 8), ValueError, r"\(0, 3, 8, 8\)"),
        (torch.zeros(3, 8, 8), ValueError, r"\(T, C, H, W\)"),
        (torch.full((1, 1, 8, 8), torch.nan), ValueError, "NaN"),
        (torch.zeros(1, 1, 8, 8, dtype=torch.int64), TypeError, "int64"),
        (moving() * 255, ValueError, r"found 63\.75 to 229\.5; divide by 255"),
        (moving() * -255, ValueError, r"found -229\.5 to -63\.75; divide by 255"),
    ],
)
def test_frames_that_cannot_be_shown(tmp_path, name, clip, kind, words):
    with pytest.raises(kind, match=words):
        WRITERS[name](tmp_path / name, clip)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", WRITERS)
def test_a_little_beyond_white_and_black_is_clipped(tmp_path, name):
    clip = moving()
    clip[:, :, 14:17], clip[:, :, 17:] = 1, 0
    WRITERS[name](tmp_path / name, clip)
    WRITERS[name](
        tmp_path / f"beyond-{name}",
        clip.index_fill(2, torch.arange(14, 17), 1.6).index_fill(2, torch.arange(17, 20), -0.4),
    )
    if name.endswith(".mp4"):  # libx264 does not always encode the same frames to the same bytes
        plain, beyond = (read_video(tmp_path / each).int() for each in (name, f"beyond-{name}"))
        assert (plain - beyond).abs().max() < 10
    else:
        assert (tmp_path / f"beyond-{name}").read_bytes() == (tmp_path / name).read_bytes()


@pytest.mark.parametrize("name", WRITERS)
def test_a_failure_leaves_the_old_file_alone(tmp_path, name, monkeypatch):
    (tmp_path / name).write_text("precious")

    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr("vpfast.visual._frames.os.replace", full)
    with pytest.raises(OSError, match="disk full"):
        WRITERS[name](tmp_path / name, moving())
    assert os.listdir(tmp_path) == [name]
    assert (tmp_path / name).read_text() == "precious"


def test_side_by_side_shows_both_clips_enlarged():
    truth, prediction = moving(), moving().flip(0)
    film = side_by_side({"truth": truth, "prediction": prediction}, context=2, scale=3)
    assert film.dtype == torch.uint8
    assert film.shape[:2] == (6, 3)
    assert len({frame.numpy().tobytes() for frame in film}) == 6
    for number in range(6):
        for clip, left in ((truth, 12), (prediction, 12 + 72 + 12)):
            big = (clip[number] * 255).round().byte().repeat_interleave(3, 1).repeat_interleave(3, 2)
            assert torch.equal(film[number, :, 35 : 35 + 60, left : left + 72], big)


def test_the_frame_tells_given_from_predicted():
    film = side_by_side({"a": moving(channels=1)}, context=2, scale=4)
    edges = [tuple(frame[:, 34, 60].tolist()) for frame in film]
    assert len(set(edges[:2])) == len(set(edges[2:])) == 1
    assert edges[0] != edges[2]
    assert edges[0][0] == pytest.approx(edges[0][2], abs=30)  # grey
    assert edges[2][2] > edges[2][0] + 100  # blue


def test_a_short_clip_lines_up_with_the_end():
    long, short = moving(6), moving(6)[4:]
    film = side_by_side({"truth": long, "prediction": short}, scale=3)
    panels = film[:, :, 35 : 35 + 60, 96 : 96 + 72]
    assert torch.equal(panels[4:], film[4:, :, 35 : 35 + 60, 12 : 12 + 72])
    assert (panels[:4] == 255).all()


def test_small_clips_are_enlarged_and_large_ones_left():
    assert side_by_side({"a": torch.zeros(1, 1, 64, 64)}).shape[3] == 256 + 24
    assert side_by_side({"a": torch.zeros(1, 1, 300, 400)}).shape[3] == 400 + 24


def test_clips_that_do_not_go_together(tmp_path):
    with pytest.raises(ValueError, match=r"one size .*'a': '20x24', 'b': '8x8'"):
        side_by_side({"a": moving(), "b": torch.zeros(2, 1, 8, 8)})
    with pytest.raises(ValueError, match="at least one clip"):
        write_strip(tmp_path / "a.png", {})
    with pytest.raises(ValueError, match=r"between 0 and the 6 frames .* got 7"):
        side_by_side({"a": moving()}, context=7)
    with pytest.raises(ValueError, match="scale must be"):
        side_by_side({"a": moving()}, scale=0)
    with pytest.raises(ValueError, match="max_columns must be at least 2"):
        write_strip(tmp_path / "a.png", {"a": moving()}, max_columns=1)


def test_strip_has_a_row_for_each_clip_and_each_error(tmp_path):
    truth = moving(8, 1)
    for rows, options in (
        ({"truth": truth}, {}),
        ({"truth": truth, "prediction": truth * 0.5}, {"errors": False}),
        ({"truth": truth, "prediction": truth * 0.5}, {}),
        ({"truth": truth, "a": truth, "b": truth[3:] * 0.9}, {"context": 3}),
    ):
        write_strip(tmp_path / "a.png", rows, **options)
        write_strip(tmp_path / "b.png", {"one": truth}, context=options.get("context", 0))
        with_errors = 2 * len(rows) - 1 if options.get("errors", True) else len(rows)
        one_row = 0.92 * (20 / 24) ** 0.5 + 0.05
        taller = image(tmp_path / "a.png").shape[0] - image(tmp_path / "b.png").shape[0]
        assert taller == pytest.approx(150 * one_row * (with_errors - 1), abs=2)


def test_strip_shows_too_bright_in_red_and_too_dark_in_blue(tmp_path):
    truth = torch.full((2, 1, 16, 16), 0.5)
    prediction = truth.clone()
    prediction[0] += 0.3
    prediction[1] -= 0.3
    write_strip(tmp_path / "a.png", {"truth": truth, "prediction": prediction}, dpi=100)
    picture = image(tmp_path / "a.png").astype(int)
    height, cell = picture.shape[0], 92
    row = picture[height - 14 - cell // 2 - 5]
    red = np.flatnonzero(row[:, 0] > row[:, 2] + 60)
    blue = np.flatnonzero(row[:, 2] > row[:, 0] + 60)
    assert len(red) > 60
    assert len(blue) > 60
    assert red[:60].max() < blue[:60].min()  # the first frame lies left of the second


def test_strip_is_the_same_file_twice_and_leaves_pyplot_alone(tmp_path):
    before = "matplotlib.pyplot" in sys.modules
    for name in ("a.png", "b.png"):
        write_strip(tmp_path / name, {"truth": moving(), "prediction": moving() * 0.5}, context=2)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert ("matplotlib.pyplot" in sys.modules) == before


@pytest.mark.parametrize(
    ("steps", "context", "most"),
    [(20, 10, 12), (30, 10, 12), (50, 10, 12), (40, 0, 12), (20, 19, 4), (20, 1, 5), (9, 9, 3)],
)
def test_columns_left_out_evenly_but_never_the_edges(steps, context, most):
    columns = _columns(steps, context, most)
    assert len(columns) <= most
    assert columns == sorted(set(columns))
    assert columns[-1] == steps - 1
    if context:
        assert context - 1 in columns
    if context < steps:
        assert context in columns
    for part in ([c for c in columns if c < context], [c for c in columns if c >= context]):
        gaps = np.diff(part)
        assert gaps.size == 0 or gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize(
    ("missing", "make"),
    [
        ("av", lambda folder: write_gif(folder / "a.gif", moving())),
        ("av", lambda folder: write_mp4(folder / "a.mp4", moving())),
        ("PIL", lambda folder: write_gif(folder / "a.gif", torch.rand(1, 3, 20, 20))),
        ("PIL", lambda folder: side_by_side({"a": moving()})),
        ("matplotlib.figure", lambda folder: write_strip(folder / "a.png", {"a": moving()})),
    ],
)
def test_a_missing_package_is_named(tmp_path, monkeypatch, missing, make):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=r"pip install 'vpfast\[cli\]'"):
        make(tmp_path)


def test_real_clip(shared, tmp_path):
    clip = read_video(
        shared / "data/kth/walking/person07_walking_d2_uncomp.avi", size=64, channels=1, start=40, count=20
    )
    film = side_by_side({"truth": clip, "prediction": clip[10:]}, context=10)
    write_gif(tmp_path / "a.gif", film, fps=6)
    read = read_video(tmp_path / "a.gif")
    assert read.shape == film.shape
    assert (read.int() - film.int()).abs().float().mean() < 0.1
    write_mp4(tmp_path / "a.mp4", film, fps=6)
    assert (read_video(tmp_path / "a.mp4").int() - film.int()).abs().float().mean() < 4
    write_strip(tmp_path / "a.png", {"truth": clip, "prediction": clip[10:]}, context=10)
    assert image(tmp_path / "a.png").shape[1] > 1000


def test_a_film_grows_frame_by_frame(tmp_path):
    clip = moving(frames=9)
    with growing_mp4(tmp_path / "a.mp4", fps=7) as write:
        write(clip[:1])
        write(clip[1:4])
        assert not (tmp_path / "a.mp4").exists()
        write(clip[4:])
    write_mp4(tmp_path / "b.mp4", clip, fps=7)
    grown, written = (read_video(tmp_path / name).int() for name in ("a.mp4", "b.mp4"))
    assert grown.shape == (9, 3, 20, 24)
    assert (grown - written).abs().max() < 10  # libx264 does not always encode the same frames to the same bytes


@pytest.mark.parametrize(
    ("frames", "words"),
    [([], "at least one frame"), ([moving(), moving(height=22)], "frames are 22x24 .*, those before 20x24")],
    ids=["no frame", "another size"],
)
def test_a_film_that_cannot_be_grown_leaves_nothing(tmp_path, frames, words):
    def grow():
        with growing_mp4(tmp_path / "a.mp4") as write:
            for each in frames:
                write(each)

    with pytest.raises(ValueError, match=words):
        grow()
    assert os.listdir(tmp_path) == []


def test_pictures_beside_each_other_and_a_place_that_is_empty():
    picture = torch.full((1, 10, 14), 0.5)
    both = beside({"came": picture, "predicted": picture}, "predicted", "frame 7")
    one = beside({"came": picture, "predicted": None}, "predicted", "frame 7")
    assert both.shape == one.shape == (3, one.shape[1], 2 * 14 * 18 + 3 * 12)
    left = 12 + 14 * 18 + 12
    assert (both[:, 35 : 35 + 180, 12 : 12 + 252] == 128).all()
    assert (both[:, 35 : 35 + 180, left : left + 252] == 128).all()
    assert (one[:, 35 : 35 + 180, left : left + 252] == 255).all()
    assert not torch.equal(both, beside({"came": picture, "predicted": picture}, "predicted", "frame 8"))
