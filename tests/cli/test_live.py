"""``vpfast predict --live``: numbers and film are those of a stream, and whatever ends it leaves things whole."""

import gc
import json
import signal
from itertools import count, islice

import numpy as np
import pytest
import torch

import vpfast.models
from vpfast import Stream
from vpfast.cli import _live
from vpfast.data import read_video
from vpfast.metrics import VideoMetrics
from vpfast.models import MSPN, MSPNConfig
from vpfast.training import DataConfig, TrainConfig, checkpoint


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """An untrained network for 16x24 grey frames whose predictions are neither all black nor all alike."""
    folder = tmp_path_factory.mktemp("lively-weights")
    torch.manual_seed(0)
    model = MSPN(MSPNConfig(in_channels=1, channels=(4, 8), levels=1, hidden_channels=4))
    with torch.no_grad():
        for level in model.levels:
            level.head.weight.mul_(30)
            level.head.bias.fill_(0.5)
    data = DataConfig(kind="video-folder", root="x", size=(16, 24))
    checkpoint.write_weights(folder, model, TrainConfig(data=data, context=3, horizon=2, val_every=0))
    return folder


@pytest.fixture
def live(command, weights, video):
    """Runs ``vpfast predict --live`` on the film of 12 frames: (exit code, stdout, stderr)."""

    def run(*args, model=weights, source=video):
        return command("predict", source, "--weights", model, "--live", "--device", "cpu", *args)

    return run


def seen(video, size=(16, 24)):
    return read_video(video, size=size, channels=1).float().div(255)


def metrics(prediction, real):
    measured = VideoMetrics()
    measured.update(prediction.unsqueeze(1), real.unsqueeze(1))
    mean = measured.compute().mean
    return {name: pytest.approx(mean[name], rel=1e-5) for name in ("mse", "psnr")}


@pytest.mark.parametrize("horizon", [1, 3])
@pytest.mark.parametrize("kind", ["weights", "future_weights"])
def test_errors_are_those_of_a_stream(live, request, video, kind, horizon):
    weights = request.getfixturevalue(kind)
    code, said, told = live("--json", "--horizon", horizon, model=weights)
    assert (code, told) == (0, "")
    said = json.loads(said)

    stream = Stream(vpfast.models.load(weights).eval(), **({"context": 3} if kind == "future_weights" else {}))
    real, predictions = seen(video), []
    for frame in real:
        stream.push(frame)
        predictions.append(stream.rollout(horizon)[-1].clamp(0, 1))
    assert torch.stack(predictions).std() > 0.02
    assert said["errors"]["prediction"] == metrics(torch.stack(predictions[:-horizon]), real[horizon:])
    assert said["errors"]["repeat last frame"] == metrics(real[:-horizon], real[horizon:])
    assert said["frames_measured"] == 12 - horizon
    assert said.get("context") == (3 if kind == "future_weights" else None)
    assert {name: said[name] for name in ("frames", "missed", "horizon", "out", "stopped_by")} == {
        "frames": 12,
        "missed": 0,
        "horizon": horizon,
        "out": None,
        "stopped_by": None,
    }
    assert 0 < said["latency_ms"]["p50"] <= said["latency_ms"]["p99"] <= said["latency_ms"]["longest"]
    assert 0 < said["frames_per_second"] <= 1e3 / said["latency_ms"]["p50"] * 2


def test_what_is_printed(live, video):
    code, said, told = live()
    assert (code, told) == (0, "")
    assert said.startswith(f"12 frames of {video}, the next one predicted after each\nlatency ")
    assert "| mean of 11 frames | MSE | PSNR (dB) |" in said
    assert "| repeat last frame | " in said
    assert live("--horizon", 4)[1].startswith(f"12 frames of {video}, the one 4 further on predicted after each\n")


def test_nothing_is_measured_of_what_has_not_come(live):
    code, said, _ = live("--horizon", 12, "--json")
    assert code == 0
    assert (json.loads(said)["errors"], json.loads(said)["frames_measured"]) == ({}, 0)
    assert "PSNR" not in live("--horizon", 12)[1]


def test_the_film_shows_what_came_beside_its_prediction(live, weights, video, tmp_path):
    out = tmp_path / "live.mp4"
    code, said, _ = live("--out", out, "--horizon", 2)
    assert (code, str(out) in said) == (0, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["film.avi", "live.mp4"]
    film = read_video(out).float().div(255)
    assert film.shape[0] == 12 + 2  # the last two predictions stand alone

    stream = Stream(vpfast.models.load(weights).eval())
    real, predictions = seen(video), []
    for frame in real:
        stream.push(frame)
        predictions.append(stream.rollout(2)[-1].clamp(0, 1))
    scale, top, left = 256 // 24, 35, 12
    truth = film[:, :, top : top + 16 * scale, left : left + 24 * scale].mean(1, keepdim=True)
    left += 24 * scale + 12
    predicted = film[:, :, top : top + 16 * scale, left : left + 24 * scale].mean(1, keepdim=True)
    small = [torch.nn.functional.avg_pool2d(each, scale) for each in (truth, predicted)]
    assert (small[0][:12] - real).abs().mean() < 0.03
    assert (small[1][2:] - torch.stack(predictions)).abs().mean() < 0.03
    assert (predicted[:2, :, 4:-4, 4:-4] > 0.98).all()  # nothing had been predicted of the first two: white
    assert (truth[12:, :, 4:-4, 4:-4] > 0.98).all()  # and the last two never came


def test_the_film_has_the_rate_of_the_video_or_the_one_asked_for(live, tmp_path):
    from vpfast.data.video import frame_rate

    assert live("--out", tmp_path / "a.mp4", "--frames", 3)[0] == 0
    assert live("--out", tmp_path / "b.mp4", "--frames", 3, "--fps", 7)[0] == 0
    assert [frame_rate(tmp_path / name) for name in ("a.mp4", "b.mp4")] == [10, 7]


def test_a_folder_of_frames(live, video, tmp_path):
    from PIL import Image

    folder = tmp_path / "frames"
    folder.mkdir()
    for number, frame in enumerate(read_video(video)):
        Image.fromarray(frame.permute(1, 2, 0).numpy()).save(folder / f"{number}.png")
    assert json.loads(live("--json", source=folder)[1])["frames"] == 12


@pytest.mark.parametrize(
    ("args", "frames"), [(["--frames", 5], 5), (["--frames", 30, "--loop"], 30), (["--frames", 30], 12)]
)
def test_it_ends_after_the_frames_asked_for(live, args, frames):
    assert json.loads(live("--json", *args)[1])["frames"] == frames


def test_an_shrvqvae_remembers_the_context_asked_for(live, future_weights):
    contexts = [
        json.loads(live("--json", *args, model=future_weights)[1])["context"] for args in ([], ["--context", 5])
    ]
    assert contexts == [3, 5]


# --- how it ends ------------------------------------------------------------------------------------------------------


def interrupt(monkeypatch, after, act):
    """Let ``act`` happen while the frame after that many is looked at."""
    pushed, push = count(1), Stream.push

    def interrupted(self, frame):
        if next(pushed) == after:
            act()
        return push(self, frame)

    monkeypatch.setattr(Stream, "push", interrupted)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_keeps_what_was_seen(live, tmp_path, monkeypatch, signum):
    before = signal.getsignal(signum)
    interrupt(monkeypatch, 7, lambda: signal.raise_signal(signum))
    code, said, _ = live("--json", "--loop", "--out", tmp_path / "live.mp4")
    assert code == 128 + signum
    assert (json.loads(said)["frames"], json.loads(said)["stopped_by"]) == (7, signum.name)
    assert read_video(tmp_path / "live.mp4").shape[0] == 7 + 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["film.avi", "live.mp4"]
    assert signal.getsignal(signum) == before


def test_a_signal_is_told(live, video, monkeypatch):
    interrupt(monkeypatch, 1, lambda: signal.raise_signal(signal.SIGINT))
    assert live()[1].startswith(f"1 frame of {video}, until SIGINT, the next one predicted after each\nlatency ")


@pytest.fixture
def default_interrupt():
    """What SIGINT does to a program; a process that runs tests beside others may ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("default_interrupt")
def test_a_second_interrupt_gives_up(live, tmp_path, monkeypatch):
    interrupt(monkeypatch, 7, lambda: [signal.raise_signal(signal.SIGINT) for _ in range(2)])
    code, said, _ = live("--loop", "--out", tmp_path / "live.mp4")
    assert (code, said) == (128 + signal.SIGINT, "")
    assert [path.name for path in tmp_path.iterdir()] == ["film.avi"]


def test_a_failure_on_the_way_leaves_nothing(live, tmp_path, monkeypatch):
    def full():
        raise OSError(28, "No space left on device")

    interrupt(monkeypatch, 7, full)
    code, said, err = live("--out", tmp_path / "live.mp4")
    assert (code, said, "No space left" in err) == (1, "", True)
    assert [path.name for path in tmp_path.iterdir()] == ["film.avi"]


def test_a_video_that_is_cut_off_is_named(refused, weights, video, tmp_path):
    path = tmp_path / "cut.avi"
    path.write_bytes(video.read_bytes()[:-400])
    said = refused("predict", path, "--weights", weights, "--live", "--out", tmp_path / "live.mp4")
    assert "cut.avi" in said
    assert sorted(each.name for each in tmp_path.iterdir()) == ["cut.avi", "film.avi"]


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args", [["--start", 0], ["--temperature", 0.5], ["--top-k", 2], ["--futures", 2], ["--seed", 0]]
)
def test_options_that_do_not_go_with_live(refused, weights, video, args):
    assert f"{args[0]} does not go with --live" in refused("predict", video, "--weights", weights, "--live", *args)


@pytest.mark.parametrize("args", [["--frames", 3], ["--loop"], ["--pace"], ["--bfloat16"], ["--json"]])
def test_options_that_go_only_with_live(refused, weights, video, tmp_path, args):
    said = refused("predict", video, "--weights", weights, "--out", tmp_path / "out", *args)
    assert f"{args[0]} goes only with --live" in said
    assert [path.name for path in tmp_path.iterdir()] == ["film.avi"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--context", 5], "--context 5 does not go with --live and an MSPN"),
        (["--out", "live.gif"], "--out live.gif: must end in .mp4 with --live"),
        (["--out", "/nowhere/live.mp4"], "--out /nowhere/live.mp4 cannot be written: there is no folder /nowhere"),
        (["--frames", 0], "--frames: 0 given, must be a whole number of at least 1"),
        (["--size", 16, 25], "25 is not a multiple of 2"),
    ],
)
def test_bad_options_are_refused(refused, weights, video, args, message):
    assert message in refused("predict", video, "--weights", weights, "--live", *args)


def test_a_film_that_exists_is_kept_unless_forced(refused, live, weights, video, tmp_path):
    out = tmp_path / "live.mp4"
    out.write_text("x")
    assert "exists already; --force" in refused("predict", video, "--weights", weights, "--live", "--out", out)
    assert out.read_text() == "x"
    assert live("--out", out, "--force", "--frames", 2)[0] == 0
    assert read_video(out).shape[0] == 3


def test_bfloat16_is_near_float32(live):
    exact, fast = (json.loads(live("--json", *args)[1])["errors"] for args in ([], ["--bfloat16"]))
    # A CPU without its instructions computes in float32 instead.
    has_bfloat16 = torch.cuda.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert (fast["prediction"]["mse"] != exact["prediction"]["mse"]) == has_bfloat16
    assert fast["prediction"]["mse"] == pytest.approx(exact["prediction"]["mse"], rel=0.02)
    assert fast["repeat last frame"] == exact["repeat last frame"]


def test_bfloat16_for_codes(live, future_weights, video):
    code, said, _ = live("--json", "--bfloat16", model=future_weights)
    assert code == 0
    model = vpfast.models.load(future_weights).eval()
    stream, real = Stream(vpfast.optimize(model, torch.bfloat16), context=3), seen(video)
    predictions = torch.stack([stream.push(frame).clamp(0, 1) for frame in real])
    assert json.loads(said)["errors"]["prediction"] == metrics(predictions[:-1], real[1:])


def test_without_live_a_folder_is_needed(refused, weights, video):
    assert "--out is needed: the folder to write" in refused("predict", video, "--weights", weights)


# --- its parts --------------------------------------------------------------------------------------------------------


class Clock:
    """Time that passes only in ``sleep``, and where a test says so."""

    def __init__(self, monkeypatch):
        self.now, self.slept = 100.0, []
        monkeypatch.setattr(_live.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(_live.time, "sleep", self.sleep)

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds


def test_a_pace_waits_and_misses_what_was_overtaken(monkeypatch):
    clock, took = Clock(monkeypatch), []
    frames = _live.Frames(lambda: iter(range(10)), count=8, rate=10)
    for frame in frames:
        took.append(frame)
        clock.now += 0.26 if frame == 2 else 0.04  # frames 3 and 4 have come meanwhile, and 4 is the one to take
    assert took == [0, 1, 2, 4, 5, 6, 7]
    assert frames.missed == 1
    assert clock.slept == pytest.approx([0, 0.06, 0.06, 0, 0, 0.06, 0.06], abs=1e-9)


def test_without_a_pace_nobody_waits(monkeypatch):
    clock = Clock(monkeypatch)
    assert list(_live.Frames(lambda: iter(range(3)), loop=True, count=7)) == [0, 1, 2, 0, 1, 2, 0]
    assert clock.slept == []


def test_a_paced_run_shows_a_line_on_a_terminal(live, monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    code, said, told = live("--pace", "--frames", 6)
    assert code == 0
    assert "6 frames of" in said
    assert "live:" in told
    assert "p50 " in told
    assert "p99 " in told


def test_latencies_come_within_a_percent():
    durations = np.random.default_rng(0).lognormal(-5, 1, 5000)
    latencies = _live.Latencies()
    for each in durations:
        latencies.add(each)
    for share in (0.5, 0.99):
        exact = np.quantile(durations, share, method="inverted_cdf")
        assert latencies.quantile(share) == pytest.approx(exact, rel=0.01)
    assert latencies.quantile(1) == durations.max()


@pytest.mark.parametrize("seconds", [0.0, 1e-9, 1e9])
def test_latencies_beyond_all_bins_are_counted(seconds):
    latencies = _live.Latencies()
    latencies.add(seconds)
    assert latencies.quantile(0.5) <= seconds
    assert latencies.quantile(1) == seconds


def test_nothing_grows_with_the_frames():
    torch.manual_seed(0)
    model = MSPN(MSPNConfig(in_channels=1, channels=(4, 8), levels=1, hidden_channels=4)).eval()
    watcher = _live.Watcher(Stream(model), 3, torch.device("cpu"))
    alive = []

    def frames():
        for number in count():
            if number % 100 == 99:
                gc.collect()
                alive.append(len(gc.get_objects()))
            yield torch.randint(0, 256, (1, 8, 8), dtype=torch.uint8)

    watcher.watch(_live.Frames(lambda: islice(frames(), 400)), lambda *shown: None, [])
    assert watcher.looked == 400
    assert alive[3] - alive[1] < 100, "200 frames left more than an object for every other frame"
