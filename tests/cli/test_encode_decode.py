"""``vpfast encode`` and ``vpfast decode``: the right bytes, the right frames, and nothing half-written."""

import numpy as np
import pytest
import torch

import vpfast.models
from vpfast.cli import decode, encode
from vpfast.data import read_video
from vpfast.models import HRVQVAE, Codes, SHRVQVAEConfig
from vpfast.visual import fragment_blur, gaussian_noise, salt_and_pepper, write_gif

FILES = ["decoded.gif", "decoded.mp4", "decoded.npy"]
MADE = ["curves.png", "film.gif", "film.mp4", "strip.png"]
LAYERS = ["codes.png", "depths.gif", "depths.png", "heatmaps.png"]


@pytest.fixture
def model(code_weights):
    return vpfast.models.load(code_weights)


@pytest.fixture
def frames(video):
    return read_video(video, size=(16, 24), channels=1).float().div(255)


@pytest.fixture
def coded(command, code_weights, video, tmp_path):
    """The film as a file of codes."""
    file = tmp_path / "film.vpc"
    assert command("encode", video, "--weights", code_weights, "--out", file, "--device", "cpu")[0] == 0
    return file


def test_a_video_becomes_the_codes_of_its_frames(command, code_weights, model, video, frames, tmp_path):
    out = tmp_path / "film.vpc"
    code, said, err = command("encode", video, "--weights", code_weights, "--out", out)
    assert (code, err) == (0, "")
    codes = Codes.from_bytes(out.read_bytes())
    assert codes == model.encode(frames)
    size = out.stat().st_size
    assert f"12 frames of {video}, 16x24 grey, in 3 layers of 4: {out}" in said
    assert f"{size} bytes, {12 * 16 * 24 / size:.2f} times smaller than 8-bit frames (4,608 bytes)" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["film.avi", "film.vpc"]


def test_parts_of_a_video_give_what_the_whole_gives(command, code_weights, model, video, frames, tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "_FRAMES_AT_ONCE", 5)
    shown = []
    monkeypatch.setattr(
        HRVQVAE, "encode", lambda self, part, encode=HRVQVAE.encode: shown.append(len(part)) or encode(self, part)
    )
    out = tmp_path / "a.vpc"
    assert command("encode", video, "--weights", code_weights, "--out", out)[0] == 0
    assert shown == [5, 5, 2]
    assert Codes.from_bytes(out.read_bytes()) == model.encode(frames)
    args = ("--start", 3, "--count", 7, "--size", 8, 12, "--force")
    assert command("encode", video, "--weights", code_weights, "--out", out, *args)[0] == 0
    some = read_video(video, size=(8, 12), channels=1, start=3, count=7).float().div(255)
    assert Codes.from_bytes(out.read_bytes()) == model.encode(some)


def test_codes_become_pictures_and_numbers(command, code_weights, model, coded, frames, tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "_FRAMES_AT_ONCE", 5)
    out = tmp_path / "out"
    code, said, err = command("decode", coded, "--weights", code_weights, "--out", out, "--device", "cpu")
    assert (code, err) == (0, "")
    assert f"12 frames of {coded} from 3 layers of codes: {out}" in said
    assert sorted(path.name for path in out.iterdir()) == FILES
    found = np.load(out / "decoded.npy")
    assert (found.dtype, found.shape) == (np.float32, (12, 1, 16, 24))
    expected = model.decode(model.encode(frames))
    torch.testing.assert_close(torch.from_numpy(found), expected)
    shown = read_video(out / "decoded.gif", channels=1)
    assert (shown.float() / 255 - expected).abs().max() <= 0.5 / 255 + 1e-5
    assert read_video(out / "decoded.mp4").shape == (12, 3, 16, 24)


@pytest.mark.parametrize("layers", [1, 2])
def test_fewer_layers_give_the_coarser_video(command, code_weights, model, coded, frames, tmp_path, layers):
    out = tmp_path / "coarse.npy"
    code, said, _ = command("decode", coded, "--weights", code_weights, "--out", out, "--layers", layers)
    assert code == 0
    assert f"from {layers} layer{'s' * (layers > 1)} of codes" in said
    expected = model.decode(model.encode(frames), layers=layers)
    assert not torch.equal(expected, model.decode(model.encode(frames)))
    torch.testing.assert_close(torch.from_numpy(np.load(out)), expected)


def test_the_first_layers_of_a_cut_file_can_be_decoded(command, refused, code_weights, coded, tmp_path):
    codes = Codes.from_bytes(coded.read_bytes())
    coded.write_bytes(coded.read_bytes()[: codes.header_bytes + 2 * codes.layer_bytes])
    args = ("decode", coded, "--weights", code_weights, "--out", tmp_path / "o.npy")
    assert "cut off" in refused(*args)
    assert command(*args, "--layers", 2)[0] == 0


@pytest.mark.parametrize("suffix", [".npy", ".gif", ".mp4", ".GIF", ".NPY"])
def test_one_file_can_be_asked_for(command, code_weights, coded, tmp_path, suffix):
    out = tmp_path / f"one{suffix}"
    assert command("decode", coded, "--weights", code_weights, "--out", out)[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["film.avi", "film.vpc", out.name]
    count = len(np.load(out)) if suffix.lower() == ".npy" else read_video(out).shape[0]
    assert count == 12


def cut(data):
    return data[:-1]


def flipped(data):
    return data[:-5] + bytes([data[-5] ^ 1]) + data[-4:]


def foreign(data):
    return b"GIF89a" + data


def longer(data):
    return data + b"x"


@pytest.mark.parametrize(
    ("spoil", "message"), [(cut, "cut off"), (flipped, "damaged"), (foreign, "no vpfast codes"), (longer, "follow")]
)
def test_files_that_are_no_codes_are_named(refused, code_weights, coded, tmp_path, spoil, message):
    coded.write_bytes(spoil(coded.read_bytes()))
    before = sorted(tmp_path.iterdir())
    said = refused("decode", coded, "--weights", code_weights, "--out", tmp_path / "out")
    assert f"vpfast: {coded}: " in said
    assert message in said
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("shape", [(0, 4, 6, 3), (2, 3, 4, 6, 3)])
def test_codes_that_are_not_of_one_clip_are_refused(refused, code_weights, tmp_path, shape):
    file = tmp_path / "other.vpc"
    file.write_bytes(Codes(torch.zeros(shape, dtype=torch.int64), 4, (16, 24), 1).to_bytes())
    assert f"{file}: holds codes of shape {shape}" in refused("decode", file, "--weights", code_weights, "--out", "o")


def test_other_weights_than_the_files_are_refused(refused, code_weights, weights, coded, tmp_path):
    torch.manual_seed(1)
    config = vpfast.models.load(code_weights).config
    for number, changes in enumerate(({}, {"codebook_size": 5}, {"in_channels": 3}, {"layers": 2})):
        other = HRVQVAE(SHRVQVAEConfig(**{**vars(config), **changes}))
        vpfast.models.save(other, tmp_path / str(number))
        said = refused("decode", coded, "--weights", tmp_path / str(number), "--out", tmp_path / "out")
        assert f"{coded}: these codes " in said
    for command in (["decode", coded], ["encode", tmp_path / "film.avi"]):
        said = refused(*command, "--weights", weights, "--out", tmp_path / "out")
        assert f"{weights} holds a trained MSPN, this needs an HRVQVAE" in said
    assert not (tmp_path / "out").exists()


def test_codes_weights_do_not_predict(refused, code_weights, video, tmp_path):
    said = refused("predict", video, "--weights", code_weights, "--out", tmp_path / "out")
    assert "holds a trained HRVQVAE, this needs an MSPN" in said


def test_videos_that_cannot_be_read_leave_nothing(refused, code_weights, video, tmp_path):
    video.write_bytes(video.read_bytes()[:200])
    assert "film.avi" in refused("encode", video, "--weights", code_weights, "--out", tmp_path / "a.vpc")
    assert "absent.avi" in refused(
        "encode", tmp_path / "absent.avi", "--weights", code_weights, "--out", tmp_path / "a"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["film.avi"]


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("encode", ["--start", 12], "film.avi: has no frame from --start 12 on"),
        ("encode", ["--start", -1], "--start: -1 given, must be a whole number of at least 0"),
        ("encode", ["--start", "1.5"], "--start: 1.5 given, must be a whole number of at least 0"),
        ("encode", ["--count", 0], "--count: 0 given, must be a whole number of at least 1"),
        ("encode", ["--size", 16, 25], "25 is not a multiple of 4"),
        ("encode", ["--weights", "/nowhere"], "/nowhere"),
        ("decode", ["--layers", 4], "layers must be 1 to 3"),
        ("decode", ["--layers", 0], "--layers: 0 given, must be a whole number of at least 1"),
        ("decode", ["--layers", "two"], "--layers: two given, must be a whole number of at least 1"),
        ("decode", ["--out", "film.png"], "--out film.png: must end in .gif, .mp4 or .npy, or be the name of a folder"),
        ("decode", ["--fps", 60], "fps must be above 0 and at most 50"),
        ("decode", ["--weights", "/nowhere"], "/nowhere"),
    ],
)
def test_bad_options_are_refused(refused, code_weights, video, coded, tmp_path, name, args, message):
    before = sorted(tmp_path.iterdir())
    shown = {"encode": video, "decode": coded}[name]
    assert message in refused(name, shown, "--weights", code_weights, "--out", tmp_path / "out", *args)
    assert sorted(tmp_path.iterdir()) == before


def test_what_is_there_is_kept_unless_forced(refused, command, code_weights, video, coded, tmp_path):
    before = coded.read_bytes()
    args = ("encode", video, "--weights", code_weights, "--out", coded, "--count", 3)
    assert f"--out {coded} exists already; --force replaces it" in refused(*args)
    assert coded.read_bytes() == before
    assert command(*args, "--force")[0] == 0
    assert len(Codes.from_bytes(coded.read_bytes())) == 3

    args = ("decode", coded, "--weights", code_weights, "--out")
    for out in (tmp_path / "a.gif", tmp_path / "folder"):
        assert command(*args, out)[0] == 0
        assert f"--out {out} exists already; --force" in refused(*args, out)
        assert command(*args, out, "--force")[0] == 0
    assert "is not of vpfast's making" in refused(*args, tmp_path, "--force")


def test_places_that_cannot_be_written_are_refused(refused, code_weights, video, coded, tmp_path):
    for out, message in ((tmp_path, "is a folder, must be a file"), (tmp_path / "no" / "a.vpc", "there is no folder")):
        assert message in refused("encode", video, "--weights", code_weights, "--out", out)
    said = refused("decode", coded, "--weights", code_weights, "--out", video / "out")
    assert f"{video} is a file" in said
    for file in (tmp_path / "absent.vpc", tmp_path):
        assert f"{file}: cannot be read" in refused("decode", file, "--weights", code_weights, "--out", tmp_path / "o")


@pytest.mark.parametrize("out", ["out", "out.gif"])
def test_a_failure_while_writing_leaves_nothing(command, code_weights, coded, tmp_path, monkeypatch, out):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(decode._WRITERS, ".gif", full)
    code, _, err = command("decode", coded, "--weights", code_weights, "--out", tmp_path / out)
    assert (code, "No space left" in err) == (1, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["film.avi", "film.vpc"]


def test_frames_are_shown_layer_by_layer(command, code_weights, model, video, frames, tmp_path):
    out = tmp_path / "out"
    code, said, err = command("visualize", video, "--weights", code_weights, "--out", out, "--rows", 2)
    assert (code, err) == (0, "")
    assert sorted(path.name for path in out.iterdir()) == sorted([*MADE, *LAYERS])
    assert read_video(out / "depths.gif").shape[0] == 12
    psnr = -10 * (model.decode(model.encode(frames), 2) - frames).square().flatten(1).mean(1).log10().mean()
    assert f"  2 layers  PSNR {psnr:.2f} dB" in said
    assert said.splitlines()[1].endswith(" 32 times smaller")
    assert "exists already; --force" in refused_line(
        command("visualize", video, "--weights", code_weights, "--out", out)
    )
    again = command("visualize", video, "--weights", code_weights, "--out", out, "--force", "--start", 5, "--count", 2)
    assert again[0] == 0
    assert read_video(out / "depths.gif").shape[0] == 2


def test_frames_made_worse_are_shown_with_what_becomes_of_them(command, code_weights, model, video, frames, tmp_path):
    out = tmp_path / "out"
    args = ("visualize", video, "--weights", code_weights, "--out", out, "--rows", 2)
    code, said, err = command(*args, "--noise", 20, 5, "--fragment", 2, "--salt-and-pepper", 0.1, "--seed", 3)
    assert (code, err) == (0, "")
    worse = ("fragment.png", "noise.png", "salt-and-pepper.png")
    assert sorted(path.name for path in out.iterdir()) == sorted([*MADE, *LAYERS, *worse])
    for name, worse in (
        ("fragment 2 px", fragment_blur(frames, 2)),
        ("noise 20 dB", gaussian_noise(frames, 20, 3)),
        ("noise 5 dB", gaussian_noise(frames, 5, 3)),
        ("salt-and-pepper 0.1 of pixels", salt_and_pepper(frames, 0.1, 3)),
    ):
        before, after = (
            -10 * (clip - frames).square().flatten(1).mean(1).log10().mean()
            for clip in (worse, model.decode(model.encode(worse)))
        )
        (line,) = (line for line in said.splitlines() if line.startswith(f"{name}: "))
        assert f"PSNR {before:.2f} dB" in line.partition(";")[0]
        assert f"from 3 layers PSNR {after:.2f} dB" in line
    assert command(*args, "--blur", 1.5, "--force")[0] == 0
    assert "blur.png" in [path.name for path in out.iterdir()]
    assert "noise.png" not in [path.name for path in out.iterdir()]


def test_one_frame_is_called_one(command, code_weights, video, tmp_path):
    args = ("--weights", code_weights, "--out")
    said = [command("encode", video, *args, tmp_path / "a.vpc", "--count", 1)[1]]
    said.append(command("decode", tmp_path / "a.vpc", *args, tmp_path / "a.npy")[1])
    said.append(command("visualize", video, *args, tmp_path / "shown", "--count", 1)[1].splitlines()[-1])
    assert all(line.startswith("1 frame of ") for line in said)


def refused_line(result):
    assert result[0] == 2
    return result[2]


def test_what_cannot_be_shown_is_refused(refused, code_weights, video, tmp_path):
    args = ("visualize", video, "--weights", code_weights, "--out", tmp_path / "out")
    assert "film.avi: has 12 frames" in refused(*args, "--start", 12)
    assert "rows: 0 given, must be at least 1" in refused(*args, "--rows", 0)
    assert "start: -1 given, must be at least 0" in refused(*args, "--start", -1)
    assert "--blur 0.0: sigma must be a finite number above 0, got 0.0" in refused(*args, "--blur", 0)
    assert "--fragment 17: distance must be a whole number from 1 to 16" in refused(*args, "--fragment", 17)
    assert "noise element 1: Expected a float. Got value: loud" in refused(*args, "--noise", "loud")
    assert "--salt-and-pepper 2.0: share must be from 0 to 1" in refused(*args, "--salt-and-pepper", 2)
    assert "at least 11x11" in refused(*args, "--size", 8, 24)  # known after decoding, and still nothing is written
    assert [path.name for path in tmp_path.iterdir()] == ["film.avi"]


def test_colour_videos_are_coded_in_colour(command, tmp_path):
    torch.manual_seed(0)
    model = HRVQVAE(SHRVQVAEConfig(channels=(4,), residual_channels=4, latent_channels=4))
    vpfast.models.save(model, tmp_path / "weights")
    write_gif(tmp_path / "a.gif", torch.rand(3, 3, 12, 10))
    args = ("--weights", tmp_path / "weights", "--out")
    assert command("encode", tmp_path / "a.gif", *args, tmp_path / "a.vpc")[0] == 0  # frames as large as they are
    assert Codes.from_bytes((tmp_path / "a.vpc").read_bytes()).frame_size == (12, 10)
    assert command("decode", tmp_path / "a.vpc", *args, tmp_path / "a.npy")[0] == 0
    assert np.load(tmp_path / "a.npy").shape == (3, 3, 12, 10)
