"""``vpfast visualize`` with every kind of model that predicts, alone and beside others, of videos and of splits."""

import pytest
import torch

import vpfast.models
from vpfast.cli import visualize
from vpfast.data import MovingDigits, read_video
from vpfast.models import MSPN, MSPNConfig
from vpfast.training import DataConfig, TrainConfig, checkpoint

MADE = ["curves.png", "film.gif", "film.mp4", "strip.png"]
LAYERS = ["codes.png", "depths.gif", "depths.png", "heatmaps.png"]


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def frames(video):
    return read_video(video, size=(16, 24), channels=1).float().div(255)


@pytest.fixture
def drawn(monkeypatch):
    """What the writers of pictures were given, by their names."""
    kept = {}
    for name in ("write_strip", "write_frame_curves", "side_by_side", "write_depths"):
        real = getattr(visualize, name)

        def spy(*args, real=real, name=name, **options):
            kept[name] = args
            return real(*args, **options)

        monkeypatch.setattr(visualize, name, spy)
    return kept


@pytest.fixture
def digit_weights(tmp_path):
    torch.manual_seed(0)
    model = MSPN(MSPNConfig(in_channels=1, channels=(4, 8), levels=1, hidden_channels=4))
    data = DataConfig(size=16, digit_size=8, digits=1)
    (tmp_path / "digits").mkdir()
    checkpoint.write_weights(tmp_path / "digits", model, TrainConfig(data=data, context=3, horizon=2, seed=5))
    return tmp_path / "digits"


def mse(made, real):
    return (made.clamp(0, 1) - real).square().flatten(2).mean(2).mean(0).tolist()


def test_mspn_is_drawn_with_errors_over_all_clips_of_the_video(command, weights, video, frames, out, drawn):
    code, said, err = command("visualize", video, "--weights", weights, "--out", out)
    assert (code, err) == (0, "")
    assert sorted(path.name for path in out.iterdir()) == MADE
    clips = torch.stack([frames[:5], frames[5:10]])
    predicted = vpfast.models.load(weights).predict(clips[:, :3], horizon=2)
    rows = drawn["write_strip"][1]
    assert torch.equal(rows["truth"], clips[0])
    torch.testing.assert_close(rows["prediction"], predicted[0].clamp(0, 1))
    _, panels, first, title, *_ = drawn["write_frame_curves"]
    assert (first, title) == (4, "Errors frame by frame, mean of 2 clips")
    assert list(panels) == ["MSE ↓", "MAE ↓", "PSNR (dB) ↑", "SSIM ↑"]
    assert panels["MSE ↓"]["prediction"] == pytest.approx(mse(predicted, clips[:, 3:]), rel=1e-4)
    assert panels["MSE ↓"]["repeat last frame"] == pytest.approx(mse(clips[:, 2:3], clips[:, 3:]), rel=1e-4)
    film = drawn["side_by_side"][0]["prediction"]
    assert torch.equal(film[:3], clips[0, :3])
    assert len(film) == len(read_video(out / "film.gif")) == len(read_video(out / "film.mp4")) == 5
    assert said.splitlines()[-1] == f"12 frames of {video}: {out}"
    assert "repeat last frame  PSNR" in said


def test_another_clip_of_the_video_can_be_drawn(command, refused, weights, video, frames, out, drawn):
    args = ("visualize", video, "--weights", weights, "--start", 1, "--clip", 1)
    assert command(*args, "--out", out)[0] == 0
    assert torch.equal(drawn["write_strip"][1]["truth"], frames[6:11])
    assert "clip: 1 given, must be below the 1 clips of 6 frames" in refused(*args, "--count", 6, "--out", f"{out}2")


def test_a_model_of_codes_that_predicts_is_drawn_both_ways(command, future_weights, video, frames, out, drawn):
    code, said, err = command("visualize", video, "--weights", future_weights, "--out", out, "--noise", 10)
    assert (code, err) == (0, "")
    assert sorted(path.name for path in out.iterdir()) == sorted([*MADE, *LAYERS, "noise.png"])
    model = vpfast.models.load(future_weights)
    torch.testing.assert_close(drawn["write_strip"][1]["prediction"], model.predict(frames[None, :3], 2)[0])
    assert torch.equal(drawn["write_depths"][1], frames)
    assert said.startswith("       prediction  PSNR")


def test_a_video_too_short_to_predict_is_still_coded(command, refused, future_weights, weights, video, out):
    args = ("visualize", video, "--count", 4, "--out", out)
    said = refused(*args, "--weights", weights)
    assert f"{video}: 4 frames read, fewer than the 5 of --context and --horizon" in said
    code, _, err = command(*args, "--weights", future_weights)
    assert (code, err) == (0, f"vpfast: 4 frames of {video} are too few to predict any (5 needed)\n")
    assert sorted(path.name for path in out.iterdir()) == LAYERS


def test_without_a_video_a_clip_of_the_split_is_drawn(command, refused, digit_weights, out, drawn):
    args = ("visualize", "--weights", digit_weights, "--clips", 3, "--clip", 2, "--out", out)
    code, said, _ = command(*args)
    assert (code, said.splitlines()[-1]) == (0, f"clip 2 of 3 of the test split: {out}")
    digits = MovingDigits(split="test", length=5, count=3, seed=5, size=16, digit_size=8, digits=1)
    assert torch.equal(drawn["write_strip"][1]["truth"], digits[2])
    clips = torch.stack([digits[index] for index in range(3)])
    panel = drawn["write_frame_curves"][1]["MSE ↓"]
    assert panel["repeat last frame"] == pytest.approx(mse(clips[:, 2:3], clips[:, 3:]), rel=1e-4)
    assert "clip: 3 given, must be below the 3 clips measured" in refused(*args, "--clip", 3, "--force")
    assert "exists already; --force" in refused(*args)


def test_several_models_lie_side_by_side(command, future_weights, weights, video, out, drawn):
    args = ("visualize", video, "--weights", weights, "--name", "MSPN", "--beside.codes", future_weights, "--out", out)
    assert command(*args)[0] == 0
    assert list(drawn["write_strip"][1]) == list(drawn["side_by_side"][0]) == ["truth", "MSPN", "codes"]
    for panel in drawn["write_frame_curves"][1].values():
        assert list(panel) == ["MSPN", "codes", "repeat last frame"]
    assert sorted(path.name for path in out.iterdir()) == MADE  # layers are of the model of --weights alone


def test_models_of_codes_lie_side_by_side(command, code_weights, video, out, drawn):
    args = ("visualize", video, "--weights", code_weights, "--beside.again", code_weights, "--out", out)
    code, said, _ = command(*args)
    assert code == 0
    assert torch.equal(drawn["write_strip"][1]["prediction"], drawn["write_strip"][1]["again"])
    assert drawn["write_frame_curves"][2] == 1
    assert "prediction, 1 layer  PSNR" in said
    assert drawn["write_strip"][1]["again"].shape == (12, 1, 16, 24)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--blur", "1"], "blur: given, must be left out: a MSPN has no codes to repair it"),
        (["--clip", "-1"], "clip: -1 given, must be at least 0"),
        (["--fps", "60"], "fps: 60.0 given, must be above 0 and at most 50"),
        (["--size", "0", "8"], "size: [0, 8] given, must be from 1 to 8192 each"),
        (["--size", "17", "24"], "must be a multiple of 2"),
        (["--protocol", "x"], "protocol: 'x' given, must be one of default, openstl"),
        (["--name", "repeat last frame"], "name: 'repeat last frame' given, must be another name"),
        (["--beside.prediction", "x"], "beside.prediction: 'x' given, must be --beside.NAME FOLDER with another name"),
        (["--horizon", "10"], "12 frames read, fewer than the 13"),
    ],
)
def test_what_cannot_be_drawn_is_refused(refused, weights, video, out, args, message):
    assert message in refused("visualize", video, "--weights", weights, "--out", out, *args)
    assert not out.exists()


@pytest.mark.parametrize("args", [["--start", "1"], ["--count", "5"], ["--size", "16", "24"]])
def test_what_is_of_a_video_needs_one(refused, digit_weights, out, args):
    said = refused("visualize", "--weights", digit_weights, "--out", out, *args)
    assert "must be left out without a video" in said


def test_weights_and_a_place_are_needed(refused, weights, video, out):
    assert "--weights is missing" in refused("visualize", video, "--out", out)
    assert "out: nothing given, must be the folder to write" in refused("visualize", video, "--weights", weights)
