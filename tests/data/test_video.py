"""Reading videos and folders of images: real ones, odd ones, broken ones."""

import contextlib
import os
import struct
import sys
import wave

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vpfast.data import VideoError, read_video
from vpfast.data.resize import resize_frames, to_grey
from vpfast.data.video import frame_rate


def off(frames, clip):
    """Mean error in 8-bit steps of a read video against the clip that was written."""
    assert frames.dtype == torch.uint8
    assert frames.shape == (clip.shape[0], 3, *clip.shape[1:3])
    return (frames.int() - torch.from_numpy(clip).permute(0, 3, 1, 2).int()).abs().float().mean().item()


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt"),
    [
        ("a.mp4", "libx264", "yuv420p"),
        ("a.mov", "mpeg4", "yuv420p"),
        ("a.avi", "mpeg4", "yuv420p"),
        ("a.mkv", "ffv1", "bgr0"),
        ("a.webm", "libvpx-vp9", "yuv420p"),
    ],
)
def test_formats(make_video, name, codec, pix_fmt, pattern):
    clip = pattern(12, 32, 48)
    assert off(read_video(make_video(name, clip, codec, pix_fmt)), clip) < (0.01 if codec == "ffv1" else 6)


def test_odd_sizes_are_kept(make_video, pattern):
    clip = pattern(3, 33, 47)
    assert off(read_video(make_video("odd.mkv", clip, "ffv1", "bgr0")), clip) < 0.01


def test_gif(tmp_path, pattern):
    from PIL import Image

    clip = np.repeat(pattern(9, 20, 30)[..., :1], 3, axis=3)
    images = [Image.fromarray(frame) for frame in clip]
    images[0].save(tmp_path / "a.gif", save_all=True, append_images=images[1:], duration=[20, 500, *[40] * 7])
    assert off(read_video(tmp_path / "a.gif"), clip) < 2


def test_a_variable_frame_rate_is_not_evened_out(make_video, pattern):
    clip = pattern(6, 32, 32)
    assert off(read_video(make_video("vfr.mkv", clip, "ffv1", "bgr0", pts=[0, 1, 2, 90, 91, 300])), clip) < 0.01


@pytest.mark.parametrize(("ticks", "rate"), [(4, 25), (10, 10)])
def test_the_frame_rate_is_the_files_own(make_video, ticks, rate):
    assert frame_rate(make_video(pts=[ticks * number for number in range(12)])) == rate


def test_a_folder_has_no_frame_rate(tmp_path):
    assert frame_rate(tmp_path) is None


def test_no_frame_rate_without_a_video(tmp_path):
    (tmp_path / "text.mp4").write_text("this is no video\n" * 50)
    with pytest.raises(VideoError, match=r"text\.mp4: not a video that can be decoded"):
        frame_rate(tmp_path / "text.mp4")


def test_start_and_count(make_video):
    path = make_video()
    whole = read_video(path)
    assert torch.equal(read_video(path, start=3, count=4), whole[3:7])
    assert torch.equal(read_video(path, start=9), whole[9:])
    assert torch.equal(read_video(path, start=9, count=20, at_least=2), whole[9:])


@pytest.mark.parametrize(("options", "needed"), [({"count": 4}, 4), ({"count": 9, "at_least": 5}, 5)])
def test_too_few_frames_names_both_numbers(make_video, options, needed):
    with pytest.raises(VideoError, match=f"clip.mp4: has 12 frames; {needed} from frame 9 on were asked"):
        read_video(make_video(), start=9, **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"start": -1}, "start=-1"),
        ({"count": 0}, "count=0"),
        ({"at_least": 0}, "at_least=0"),
        ({"channels": 2}, "channels must be 3"),
        ({"size": 0}, "size must be"),
        ({"size": (8, 8, 8)}, "size must be"),
        ({"size": 8, "fit": "stretch"}, "stretch"),
    ],
)
def test_arguments_out_of_range(make_video, options, words):
    with pytest.raises(ValueError, match=words):
        read_video(make_video(), **options)


def test_grey_is_luma_and_leaves_grey_alone(make_video, pattern):
    clip = pattern(3, 32, 48)
    path = make_video("c.mkv", clip, "ffv1", "bgr0")
    luma = clip @ np.array([0.299, 0.587, 0.114])
    assert np.abs(read_video(path, channels=1)[:, 0].numpy() - luma).max() < 0.51
    every_grey = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    almost = torch.cat([every_grey, every_grey, every_grey ^ 1], dim=1)
    assert torch.equal(to_grey(almost), every_grey)


@given(height=st.integers(1, 40), width=st.integers(1, 40), to=st.tuples(st.integers(1, 40), st.integers(1, 40)))
def test_resizing_keeps_a_flat_picture_flat(height, width, to):
    flat = torch.full((2, 3, height, width), 137, dtype=torch.uint8)
    for fit in ("squash", "crop"):
        assert torch.equal(resize_frames(flat, to, fit), torch.full((2, 3, *to), 137, dtype=torch.uint8))


def test_down_sampling_averages():
    stripes = torch.zeros(1, 1, 64, 64, dtype=torch.uint8)
    stripes[..., ::2] = 200
    small = resize_frames(stripes, (8, 8))
    assert (small.int() - 100).abs().max() <= 5  # dropping pixels would give 0 or 200


def test_crop_takes_the_centre_and_squash_the_whole():
    wide = torch.zeros(1, 1, 10, 30, dtype=torch.uint8)
    wide[..., 10:20] = 255
    assert resize_frames(wide, (10, 10), "crop").min() == 255
    assert resize_frames(wide, (10, 10), "squash").min() == 0


@pytest.mark.parametrize(("angle", "turns"), [(90, 3), (180, 2), (270, 1)])
def test_rotation_that_the_file_asks_for(make_video, angle, turns):
    """Phones store frames as the sensor lies and a matrix that turns them, clockwise by ``angle``, in the track."""
    path = make_video("phone.mp4", qp="0")
    plain = read_video(path)
    content = bytearray(path.read_bytes())
    cos, sin = {90: (0, 1), 180: (-1, 0), 270: (0, -1)}[angle]
    at = content.index(b"tkhd") + 4 + 40
    content[at : at + 36] = struct.pack(">9i", *(v << 16 for v in (cos, sin, 0, -sin, cos, 0, 0, 0)), 1 << 30)
    path.write_bytes(content)
    assert torch.equal(read_video(path), torch.rot90(plain, turns, dims=(2, 3)))


def test_frame_folder_in_natural_order(make_frames, pattern):
    clip = pattern(12, 20, 30)
    folder = make_frames(clip)  # frame1.png ... frame12.png
    (folder / "notes.txt").write_text("not a frame")
    (folder / ".hidden.png").write_bytes(b"")
    assert off(read_video(folder), clip) == 0
    assert read_video(folder, size=8, channels=1, start=2, count=3).shape == (3, 1, 8, 8)


@pytest.mark.parametrize("ending", ["jpg", "bmp", "ppm", "webp", "tiff"])
def test_kinds_of_images(make_frames, ending, pattern):
    clip = pattern(2, 24, 32)
    assert off(read_video(make_frames(clip, names="f{}." + ending)), clip) < 6


def test_images_of_other_depths_and_palettes(tmp_path):
    from PIL import Image

    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(ramp.astype(np.uint16) * 257).save(tmp_path / "a1.png")
    Image.fromarray(ramp).save(tmp_path / "a2.png")
    Image.fromarray(np.dstack([ramp] * 3 + [ramp[::-1]])).save(tmp_path / "a3.png")
    Image.fromarray(ramp).convert("P").save(tmp_path / "a4.png")
    assert all(np.array_equal(frame[0].numpy(), ramp) for frame in read_video(tmp_path))


def test_folders_that_cannot_be_used(tmp_path, make_frames, pattern):
    with pytest.raises(VideoError, match="folder without images"):
        read_video(tmp_path)
    folder = make_frames(pattern(3, 20, 30))
    make_frames(pattern(1, 20, 31), names="frame10.png")
    with pytest.raises(VideoError, match=r"frame10.png: frame 3 is 20x31 .*before it are 20x30"):
        read_video(folder)
    (folder / "frame2.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(20))
    with pytest.raises(VideoError, match=r"frame2\.png: not an image"):
        read_video(folder)
    image = (folder / "frame1.png").read_bytes()
    (folder / "frame2.png").write_bytes(image[: len(image) // 2])
    with pytest.raises(VideoError, match=r"frame2\.png: not an image"):
        read_video(folder)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty file"),
        (b"\0" * 5000, "not a video"),
        (b"just some text\n" * 100, "not a video"),
        (b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/x.ts\n", "not a video"),
        (b"ffconcat version 1.0\nfile other.mp4\n", "not a video"),
    ],
)
@pytest.mark.parametrize("name", ["x.avi", "x.mp4", "x.txt"])
def test_files_that_are_no_video(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(VideoError, match=f"{name}.*{words}"):
        read_video(tmp_path / name)


def test_missing_file(tmp_path):
    with pytest.raises(VideoError, match=r"gone.mp4: cannot be read \(No such file"):
        read_video(tmp_path / "gone.mp4")


@pytest.mark.parametrize("name", ["clip.mp4", "frames/frame1.png"])
def test_no_reader_waits_at_a_pipe(tmp_path, name):
    (tmp_path / "frames").mkdir()
    os.mkfifo(tmp_path / name)
    with pytest.raises(VideoError, match=f"{name}: .*not a regular file"):
        read_video(tmp_path / name.split("/")[0])


def test_a_header_that_boasts_is_not_given_its_frames(tmp_path):
    from PIL import Image

    Image.new("L", (16, 16)).save(tmp_path / "a.gif")
    gif = (tmp_path / "a.gif").read_bytes()
    (tmp_path / "a.gif").write_bytes(gif[:6] + struct.pack("<HH", 16_000, 16_000) + gif[10:])
    (tmp_path / "a.y4m").write_bytes(b"YUV4MPEG2 W16000 H16000 F25:1 Ip A1:1 C420\nFRAME\n" + bytes(1000))
    for name in ("a.gif", "a.y4m"):
        with pytest.raises(VideoError, match=rf"{name}: not a video that .*; frames of up to 67108864 pixels are read"):
            read_video(tmp_path / name)


@pytest.mark.parametrize("content", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"", b"GIF89a" + bytes(40)])
def test_pictures_of_kinds_that_are_not_read(tmp_path, content):
    """EPS among them, for which Pillow would start another program."""
    (tmp_path / "frame.png").write_bytes(content)
    with pytest.raises(VideoError, match=r"frame.png: not an image that can be read \((cannot identify|an empty file)"):
        read_video(tmp_path)


def test_no_permission(make_video, tmp_path):
    path = make_video()
    path.chmod(0)
    is_root = os.geteuid() == 0
    if is_root:  # root may read everything, so be someone else for a moment
        os.seteuid(65534)
    try:
        with pytest.raises(VideoError, match=r"clip.mp4: cannot be read \(Permission denied"):
            read_video(path)
    finally:
        if is_root:
            os.seteuid(0)


@pytest.mark.parametrize(("missing", "name"), [("av", "clip.mp4"), ("PIL", "frames")])
def test_a_missing_package_is_named(make_video, make_frames, pattern, monkeypatch, missing, name):
    folder = make_frames(pattern(2, 8, 8)).parent
    make_video()
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=r"pip install 'vpfast\[cli\]'"):
        read_video(folder / name)


def test_sound_without_picture(tmp_path):
    import av

    with wave.open(str(tmp_path / "a.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(8000))
    with av.open(str(tmp_path / "a.wav")) as source, av.open(str(tmp_path / "a.mp4"), "w") as target:
        stream = target.add_stream("aac", rate=8000)
        for frame in source.decode(audio=0):
            target.mux(stream.encode(frame))
        target.mux(stream.encode(None))
    with pytest.raises(VideoError, match=r"a.mp4: holds no video stream \(only audio\)"):
        read_video(tmp_path / "a.mp4")


@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "libx264"), ("a.avi", "mpeg4")])
def test_truncated_files(make_video, name, codec, pattern):
    path = make_video(name, pattern(40, 64, 96), codec)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(VideoError, match=name):
        read_video(path)


@pytest.fixture
def cut_between_frames(make_video, pattern, tmp_path):
    """Makes ``a.mp4``, whose index at the beginning announces 80 frames, and cuts it after so many."""
    import av

    def make(frames):
        path = tmp_path / "a.mp4"
        with (
            av.open(str(make_video("whole.mp4", pattern(80, 64, 96), "mpeg4", pts=range(80)))) as source,
            av.open(str(path), "w", options={"movflags": "faststart"}) as target,
        ):
            stream = target.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                if packet.size:
                    packet.stream = stream
                    target.mux(packet)
        with av.open(str(path)) as whole:
            starts = [packet.pos for packet in whole.demux(video=0) if packet.size]
        if frames < len(starts):
            path.write_bytes(path.read_bytes()[: starts[frames]])
        return path

    return make


@pytest.mark.parametrize("frames", [2, 40, 74, 79])
def test_a_file_cut_between_two_frames_is_refused(cut_between_frames, frames):
    path = cut_between_frames(frames)
    size = path.stat().st_size
    with pytest.raises(
        VideoError, match=rf"a.mp4: ends after {frames} frames, .* tells of \d+ bytes and it has {size}"
    ):
        read_video(path)
    assert len(read_video(path, count=1)) == 1


def test_a_file_that_lost_its_last_byte_is_refused(make_video, cut_between_frames):
    path = cut_between_frames(80)
    assert len(read_video(path)) == 80
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(VideoError, match=r"a.mp4: .*cut"):
        read_video(path)


@pytest.fixture(params=[("a.avi", "mpeg4", "yuv420p"), ("a.avi", "mjpeg", "yuvj420p"), ("a.mkv", "mpeg4", "yuv420p")])
def long_video(request, make_video):
    """Noise of 200 frames, so that every frame takes up space, and the file it is in."""
    noise = np.random.default_rng(0).integers(0, 256, (200, 32, 32, 3), dtype=np.uint8)
    path = make_video(request.param[0], noise, *request.param[1:])
    assert len(read_video(path)) == 200
    return path, path.read_bytes()


@pytest.mark.parametrize("share", [0.5, 0.8, 0.9, 0.95, 0.97])
def test_a_file_cut_anywhere_is_refused_unless_it_lost_nothing(long_video, share):
    path, whole = long_video
    path.write_bytes(whole[: int(len(whole) * share)])
    if share > 0.8:  # the index at the end may be larger than what was cut off
        with contextlib.suppress(VideoError):
            assert len(read_video(path)) == 200
    else:
        with pytest.raises(VideoError, match=path.name):
            read_video(path)


def test_a_few_lost_frames_are_a_warning(make_video, pattern):
    path = make_video("a.avi", pattern(200, 32, 32), "mjpeg", "yuvj420p", pts=range(200))
    whole = path.read_bytes()
    end = whole.rfind(b"idx1")
    for _ in range(3):
        end = whole.rfind(b"00dc", 0, end)
    path.write_bytes(whole[:end])
    with pytest.warns(UserWarning, match=r"a.avi: ends after 197 frames, 98\.5% of the time announced"):
        assert len(read_video(path)) == 197


def test_a_guessed_duration_refuses_nothing(cut_between_frames, monkeypatch):
    monkeypatch.setattr("vpfast.data.video._DURATION_GUESSED", {"mp4"})
    monkeypatch.setattr("vpfast.data.video._check_index", lambda *of_file: None)
    with pytest.warns(UserWarning, match="was it cut off"):
        assert len(read_video(cut_between_frames(40))) == 40


@pytest.fixture
def gif(tmp_path):
    """The bytes of a GIF of nine colourful frames, each with a palette of its own, and the file they are in."""
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 256, (9, 20, 30, 3), dtype=np.uint8)
    images = [Image.fromarray(frame) for frame in noise]
    path = tmp_path / "a.gif"
    images[0].save(path, save_all=True, append_images=images[1:], comment=b"x" * 600)
    assert len(read_video(path)) == 9
    return path, path.read_bytes()


def test_a_gif_cut_anywhere_is_refused(gif):
    path, content = gif
    for length in range(20, len(content), 97):
        path.write_bytes(content[:length])
        cut_off = rf"a\.gif: (a GIF that is cut off, it ends at offset {length}|not a video)"
        with pytest.raises(VideoError, match=cut_off):
            read_video(path)
    path.write_bytes(content[:-1])
    with pytest.raises(VideoError, match=f"ends at offset {len(content) - 1} without a trailer"):
        read_video(path)


def test_a_gif_with_a_foreign_block_is_refused_and_bytes_after_its_end_are_not(gif):
    path, content = gif
    path.write_bytes(content + b"\0notes")
    assert len(read_video(path)) == 9
    path.write_bytes(content[:-1] + b"\x99;")
    with pytest.raises(VideoError, match=rf"no block can start with 0x99 \(offset {len(content) - 1}\)"):
        read_video(path)


def test_damage_that_motion_jpeg_could_paint_over_is_refused(make_video):
    noise = np.random.default_rng(1).integers(0, 256, (10, 64, 96, 3), dtype=np.uint8)
    path = make_video("a.avi", noise, "mjpeg", "yuvj420p")
    content = bytearray(path.read_bytes())
    starts = [at for at in range(len(content) - 4) if content[at : at + 4] == b"00dc"]
    middle = (starts[5] + starts[6]) // 2
    content[middle : middle + 200] = b"\xff" * 200
    path.write_bytes(content)
    with pytest.raises(VideoError, match=r"a.avi: .*damaged"):
        read_video(path)


def test_damage_in_the_middle_is_not_passed_on(make_video, pattern):
    path = make_video("a.avi", pattern(40, 64, 96), "mpeg4")
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 200] = np.random.default_rng(0).bytes(200)
    path.write_bytes(content)
    with pytest.raises(VideoError, match=r"a.avi: .*damaged"):
        read_video(path)


@pytest.mark.filterwarnings("ignore:.*was it cut off")
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_bytes_flipped_anywhere_give_frames_or_a_video_error(make_video, data):
    path = make_video("fuzz.mp4")
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    with contextlib.suppress(VideoError):
        assert read_video(path, count=12, at_least=1).dtype == torch.uint8


def test_kth_is_grey_and_read_to_the_bit(shared):
    import av

    path = shared / "data/kth/running/person09_running_d1_uncomp.avi"
    frames = read_video(path, channels=1)
    assert frames.shape == (325, 1, 120, 160)
    with av.open(str(path)) as container:
        first = next(container.decode(video=0)).to_ndarray(format="rgb24")
    assert np.array_equal(frames[0, 0].numpy(), first[..., 0])
    assert torch.equal(read_video(path)[:, :1], frames)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("bikes.mp4", (250, 3, 272, 640)),
        ("bigbuckbunny.mp4", (132, 3, 720, 1280)),
        ("nasa_13013.mp4", (325, 3, 180, 320)),
    ],
)
def test_real_clips(shared, name, shape):
    path = shared / "data/clips" / name
    assert read_video(path, size=(18, 32)).shape == (shape[0], 3, 18, 32)
    assert read_video(path, count=1).shape == (1, *shape[1:])


def test_a_real_folder_of_frames(shared):
    folder = shared / "data/kitti_raw/2011_09_26/image_02/data"
    assert read_video(folder, size=(128, 160), fit="crop", count=4).shape == (4, 3, 128, 160)
