"""``vpfast predict``: what it writes, and that it writes nothing where it fails."""

import numpy as np
import pytest
import torch

import vpfast.models
from vpfast.data import read_video
from vpfast.ops import _backend

FILES = ["prediction.gif", "prediction.mp4", "prediction.npy", "strip.png"]


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def test_pictures_and_numbers_are_written(command, weights, video, out, tmp_path):
    code, said, _ = command("predict", video, "--weights", weights, "--horizon", 4, "--out", out, "--device", "cpu")
    assert code == 0
    assert str(out) in said
    assert sorted(path.name for path in out.iterdir()) == FILES
    assert all(path.stat().st_size > 0 for path in out.iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["film.avi", "out"]

    prediction = np.load(out / "prediction.npy")
    frames = read_video(video, size=(16, 24), channels=1, count=3).float().div(255)
    expected = vpfast.models.load(weights).eval().predict(frames.unsqueeze(0), horizon=4)[0].clamp(0, 1)
    assert prediction.dtype == np.float32
    assert torch.equal(torch.from_numpy(prediction), expected)
    # three frames of context and four predicted ones
    assert read_video(out / "prediction.gif").shape[0] == 7
    assert read_video(out / "prediction.mp4").shape[0] == 7


@pytest.mark.parametrize(("start", "first"), [(2, 2), (-5, 7)])
def test_the_context_starts_where_asked(command, weights, video, out, start, first):
    args = ("--weights", weights, "--out", out, "--horizon", 2, "--start", start, "--context", 4, "--size", 8, 12)
    assert command("predict", video, *args)[0] == 0
    frames = read_video(video, size=(8, 12), channels=1, start=first, count=4).float().div(255)
    expected = vpfast.models.load(weights).eval().predict(frames.unsqueeze(0), horizon=2)[0].clamp(0, 1)
    assert torch.equal(torch.from_numpy(np.load(out / "prediction.npy")), expected)


def test_a_video_may_end_with_its_context(command, weights, video, out):
    args = ("--weights", weights, "--out", out, "--horizon", 5, "--start", -3)
    assert command("predict", video, *args)[0] == 0
    assert np.load(out / "prediction.npy").shape == (5, 1, 16, 24)


def corrupt(video, tmp_path):
    path = tmp_path / "corrupt.avi"
    path.write_bytes(video.read_bytes()[:200])
    return path


def empty(video, tmp_path):
    path = tmp_path / "empty.mp4"
    path.write_bytes(b"")
    return path


def text(video, tmp_path):
    path = tmp_path / "text.mp4"
    path.write_text("this is no video\n" * 50)
    return path


def absent(video, tmp_path):
    return tmp_path / "absent.avi"


@pytest.mark.parametrize("make", [corrupt, empty, text, absent])
def test_videos_that_cannot_be_read_are_named(refused, weights, video, out, tmp_path, make):
    path = make(video, tmp_path)
    before = sorted(tmp_path.iterdir())
    assert path.name in refused("predict", path, "--weights", weights, "--out", out)
    assert sorted(tmp_path.iterdir()) == before


def test_a_video_too_short_for_the_context_is_named(refused, weights, video, out, tmp_path):
    said = refused("predict", video, "--weights", weights, "--out", out, "--context", 13)
    assert "film.avi" in said
    assert "12 frames" in said
    said = refused("predict", video, "--weights", weights, "--out", out, "--start", 10)
    assert "film.avi" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["film.avi"]


def test_a_failure_while_writing_leaves_nothing(command, weights, video, out, tmp_path, monkeypatch):
    from vpfast.cli import predict

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(predict, "write_strip", full)
    code, _, err = command("predict", video, "--weights", weights, "--out", out)
    assert (code, "No space left" in err) == (1, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["film.avi"]


def test_an_existing_folder_is_kept_unless_forced(refused, command, weights, video, out):
    out.mkdir()
    (out / "strip.png").write_text("x")
    args = ("predict", video, "--weights", weights, "--out", out, "--horizon", 2)
    assert f"--out {out} exists already; --force" in refused(*args)
    assert [path.name for path in out.iterdir()] == ["strip.png"]
    assert command(*args, "--force")[0] == 0
    assert sorted(path.name for path in out.iterdir()) == FILES


def test_force_takes_nothing_away_that_predict_did_not_write(refused, weights, video, tmp_path):
    before = video.read_bytes()
    assert "film.avi in it" in refused("predict", video, "--weights", weights, "--out", tmp_path, "--force")
    assert video.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["film.avi"]


def test_a_place_that_cannot_be_written_is_refused_by_its_option(refused, weights, video, tmp_path):
    said = refused("predict", video, "--weights", weights, "--out", video / "out")
    assert f"--out {video / 'out'} cannot be made: {video} is a file" in said


def test_a_start_before_the_video_is_refused(refused, weights, video, out):
    said = refused("predict", video, "--weights", weights, "--out", out, "--start", -13)
    assert "--start -13 given" in said
    assert "12 frames" in said
    assert not out.exists()


@pytest.mark.parametrize(("start", "told"), [(-5, True), (-6, False), (-3, False)])
def test_a_video_that_ends_within_the_horizon_is_told(command, weights, video, out, start, told):
    args = ("--weights", weights, "--out", out, "--horizon", 3, "--start", start)
    code, _, err = command("predict", video, *args)
    assert code == 0
    assert ("ends after 2 of the 3 frames predicted" in err) is told


def test_the_folder_of_a_run_stands_for_its_weights(command, weights, video, out, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "weights").symlink_to(weights)
    assert command("predict", video, "--weights", run, "--out", out, "--horizon", 2)[0] == 0


def test_a_refusal_of_the_operators_is_one_line(refused, weights, video, out, monkeypatch):
    monkeypatch.setattr(_backend, "_INTERPRETED", False)
    with vpfast.backend("triton"):
        assert "edlstm_gates" in refused("predict", video, "--weights", weights, "--out", out, "--device", "cpu")
    assert not out.exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--horizon", 0], "--horizon: 0 given, must be a whole number of at least 1"),
        (["--horizon", "x"], "--horizon"),
        (["--size", 16, 25], "25 is not a multiple of 2"),
        (["--size", 16], "--size"),
        (["--weights", "/nowhere"], "/nowhere"),
        (["--frames", 3], "--frames"),
    ],
)
def test_bad_options_are_refused(refused, weights, video, out, args, message):
    assert message in refused("predict", video, "--weights", weights, "--out", out, *args)
    assert not out.exists()
