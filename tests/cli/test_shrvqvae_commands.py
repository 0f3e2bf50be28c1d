"""The commands with an S-HR-VQVAE: trained in stages, predicting as MSPN does, coding as its autoencoder does."""

import numpy as np
import pytest
import torch

import vpfast.models
from vpfast.data import MovingDigits, read_video
from vpfast.models import MSPN, SHRVQVAE, Codes, MSPNConfig, SHRVQVAEConfig
from vpfast.training import DataConfig, TrainConfig, checkpoint

SMALL = {
    "channels": [4, 4],
    "residual_channels": 4,
    "prior_channels": 8,
    "prior_blocks": 1,
    "prior_attention_every": 1,
    "prior_heads": 2,
    "prior_head_dim": 4,
}
TINY = [
    *(word for key, value in SMALL.items() for word in (f"--model.{key}", str(value))),
    *("--data.size", "16", "--data.digit_size", "8", "--data.digits", "1", "--device", "cpu", "--context", "3"),
    *("--horizon", "2", "--val_every", "0", "--stages.prior.val_every", "2", "--stages.joint.val_every", "2"),
    *(word for stage in ("autoencoder", "prior", "joint") for word in (f"--stages.{stage}.steps", "2")),
]


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def model(future_weights):
    return vpfast.models.load(future_weights)


@pytest.fixture
def context(video):
    return read_video(video, size=(16, 24), channels=1, count=3).float().div(255)[None]


@pytest.fixture
def digits(tmp_path):
    """Weights of two stages that say they were trained on small moving digits."""
    data = DataConfig(size=16, digit_size=8, digits=1)
    for seed, stage in enumerate(("prior", "joint")):
        torch.manual_seed(seed)
        model = SHRVQVAE(SHRVQVAEConfig.preset("mnist-3x4", **SMALL))
        how = TrainConfig(model={"name": "shrvqvae"}, stage=stage, data=data, context=3, horizon=2, seed=5)
        checkpoint.write_weights(tmp_path / stage, model, how)
    return tmp_path


def test_train_goes_through_the_stages_and_resumes(command, out):
    args = ("train", "--config", "shrvqvae/mnist-3x4", *TINY, "--out", out)
    code, said, _ = command(*args)
    assert code == 0
    assert [line.split(":")[0] for line in said.splitlines()] == [
        "stage autoencoder",
        "stage prior",
        "stage joint",
        "weights",
    ]
    assert str(out / "weights") in said
    code, _, _ = command("train", "--out", out, "--resume", "--stages.joint.steps", 3)
    assert code == 0
    assert len((out / "joint" / "log.jsonl").read_text().splitlines()) == 3
    assert len((out / "prior" / "log.jsonl").read_text().splitlines()) == 2
    assert isinstance(vpfast.models.load(out / "weights"), SHRVQVAE)
    code, said, _ = command("evaluate", "--weights", out, "--clips", 2)
    assert code == 0
    assert "2 clips of the test split, 2 frames from 3" in said


def test_a_value_that_every_stage_overrides_is_refused(refused, out):
    said = refused("train", "--config", "shrvqvae/mnist-3x4", *TINY, "--steps", 7, "--out", out)
    assert "steps: 7 given, but every stage has its own; change stages.autoencoder.steps, stages.prior.steps" in said
    assert not out.exists()


def test_the_likeliest_future_is_predicted(command, future_weights, model, video, context, out):
    args = ("predict", video, "--weights", future_weights, "--horizon", 2, "--out", out, "--device", "cpu")
    code, said, err = command(*args)
    assert (code, err) == (0, "")
    assert said == f"2 frames predicted from 3 of {video}: {out}\n"
    assert torch.equal(torch.from_numpy(np.load(out / "prediction.npy")), model.predict(context, 2)[0])
    assert sorted(path.name for path in out.iterdir()) == [
        "prediction.gif",
        "prediction.mp4",
        "prediction.npy",
        "strip.png",
    ]


def test_several_futures_are_drawn(command, future_weights, model, video, context, out):
    args = ("predict", video, "--weights", future_weights, "--horizon", 2, "--out", out, "--futures", 3)
    code, said, _ = command(*args, "--temperature", 0.7, "--top-k", 3, "--seed", 4)
    assert code == 0
    assert f"in 3 futures: {out}" in said
    drawn = torch.from_numpy(np.load(out / "prediction.npy"))
    assert drawn.shape == (3, 2, 1, 16, 24)
    expected = model.predict(context, 2, temperature=0.7, top_k=3, num_futures=3, seed=4)
    assert torch.equal(drawn, expected[0])
    four = read_video(out / "prediction.gif").shape[3]
    assert command(*args[:-2], "--temperature", 0.7, "--force")[0] == 0
    assert np.load(out / "prediction.npy").shape == (2, 1, 16, 24)
    assert read_video(out / "prediction.gif").shape[3] < four


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--futures", 3], "futures: 3 given, must be left out at temperature 0, which draws nothing"),
        (["--top-k", 2], "top_k: 2 given, must be left out at temperature 0"),
        (["--temperature", 1, "--top-k", 5], "top_k"),
        (["--temperature", -1], "temperature"),
        (["--temperature", "nan"], "temperature"),
        (["--temperature", "hot"], "--temperature"),
        (["--seed", -1], "--seed: -1 given, must be a whole number of at least 0"),
    ],
)
def test_draws_that_cannot_be_are_refused(refused, future_weights, video, out, args, message):
    assert message in refused("predict", video, "--weights", future_weights, "--out", out, *args)
    assert not out.exists()


def test_mspn_draws_nothing(refused, weights, video, out):
    said = refused("predict", video, "--weights", weights, "--out", out, "--temperature", 1)
    assert "temperature: 1.0 given, must be left out: this model draws nothing" in said


def test_both_stages_are_measured_on_the_same_clips(command, digits, tmp_path, read_json):
    args = ("evaluate", "--weights", digits / "joint", "--beside.disjoint", digits / "prior", "--clips", 3)
    code, said, err = command(*args, "--out", tmp_path / "n.json", "--strip", tmp_path / "s.png", "--strip_clip", 1)
    assert (code, err) == (0, "")
    found = MovingDigits(split="test", length=5, count=3, seed=5, size=16, digit_size=8, digits=1)
    clips = torch.stack([found[index] for index in range(3)])
    numbers = read_json(tmp_path / "n.json")
    made = {"repeat last frame": clips[:, 2:3].expand(-1, 2, -1, -1, -1)}
    for name, stage in (("prediction", "joint"), ("disjoint", "prior")):
        model = vpfast.models.load(digits / stage)
        made[name] = model.predict(clips[:, :3], 2)
        with torch.no_grad():
            output = model(clips, 3)
        right = (output.logits.argmax(-1) == output.codes)[:, 3:].float().mean(dim=(0, 1, 2, 3)).tolist()
        assert numbers[name]["foretold"]["accuracy"] == pytest.approx(right)
        assert f"| {name}: accuracy | " + " | ".join(f"{each:.4f}" for each in right) + " |" in said
    rows = [line.split("|")[1].strip() for line in said.splitlines() if line.startswith("| ")]
    assert rows[:4] == ["mean", "prediction", "disjoint", "repeat last frame"]
    for name, frames in made.items():
        mse = (frames - clips[:, 3:]).square().mean().item()
        assert numbers[name]["mean"]["mse"] == pytest.approx(mse, rel=1e-4)
    assert numbers["seed"] == 5
    assert (tmp_path / "s.png").read_bytes()[1:4] == b"PNG"


def test_the_strip_shows_the_clip_that_was_asked_for(command, digits, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("vpfast.cli.evaluate.write_strip", lambda *args: drawn.append(args))
    args = ("evaluate", "--weights", digits / "joint", "--beside.disjoint", digits / "prior", "--clips", 3)
    assert command(*args, "--strip", tmp_path / "s.png", "--strip_clip", 2)[0] == 0
    (_, rows, context) = drawn[0]
    clip = MovingDigits(split="test", length=5, count=3, seed=5, size=16, digit_size=8, digits=1)[2]
    assert (list(rows), context) == (["truth", "prediction", "disjoint"], 3)
    assert torch.equal(rows["truth"], clip)
    assert torch.equal(rows["disjoint"], vpfast.models.load(digits / "prior").predict(clip[None, :3], 2)[0])


def test_futures_are_measured(command, digits, tmp_path, read_json):
    args = ("evaluate", "--weights", digits / "joint", "--clips", 2, "--out", tmp_path / "n.json")
    assert command(*args, "--temperature", 1, "--futures", 3)[0] == 0
    numbers = read_json(tmp_path / "n.json")
    assert numbers["best of 3"]["mean"]["mse"] <= numbers["prediction"]["mean"]["mse"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--futures", 0], "futures: 0 given, must be at least 1"),
        (["--futures", 2], "futures: 2 given, must be left out at temperature 0"),
        (["--temperature", -1], "temperature: -1.0 given, must be at least 0"),
        (["--strip_clip", 3], "strip_clip: 3 given, must be below the 3 clips measured"),
        (["--strip", "/nowhere/s.png"], "--strip /nowhere/s.png cannot be written"),
        (["--strip", "s.jpg"], "--strip s.jpg: must end in .png"),
        (["--beside", "{prediction: x}"], "beside.prediction: 'x' given, must be --beside.NAME FOLDER with another"),
        (["--beside.other", "/nowhere"], "beside.other: /nowhere"),
        (["--data.size", 18], "data.size: 18 given, must be a multiple of 4"),
    ],
)
def test_measurements_that_cannot_be_are_refused(refused, digits, args, message):
    assert message in refused("evaluate", "--weights", digits / "joint", "--clips", 3, *args)


def test_what_stands_beside_must_fit_too(refused, digits, tmp_path, weights, code_weights):
    torch.manual_seed(0)
    vpfast.models.save(MSPN(MSPNConfig(in_channels=3, channels=(4, 8), levels=1, hidden_channels=4)), tmp_path / "rgb")
    args = ("evaluate", "--weights", digits / "joint", "--clips", 1)
    said = refused(*args, "--beside.mspn", tmp_path / "rgb")
    assert "beside.mspn: data.channels: 1 given, but the model's in_channels is 3" in said
    assert "beside.codes: horizon: 2 given, must be 0" in refused(*args, "--beside.codes", code_weights)
    said = refused(*args, "--beside.mspn", weights, "--temperature", 1)
    assert "beside.mspn: temperature: 1.0 given, must be left out" in said


def test_another_model_stands_beside(command, digits, weights):
    code, said, _ = command("evaluate", "--weights", digits / "joint", "--clips", 1, "--beside.MSPN", weights)
    assert code == 0
    assert "| MSPN | " in said


def test_its_autoencoder_codes_videos(command, future_weights, model, video, tmp_path):
    file, args = tmp_path / "film.vpc", ("--weights", future_weights, "--out")
    assert command("encode", video, *args, file)[0] == 0
    frames = read_video(video, size=(16, 24), channels=1).float().div(255)
    assert Codes.from_bytes(file.read_bytes()) == model.autoencoder.encode(frames)
    assert command("decode", file, *args, tmp_path / "a.npy", "--layers", 2)[0] == 0
    expected = model.autoencoder.decode(model.autoencoder.encode(frames), 2)
    assert torch.allclose(torch.from_numpy(np.load(tmp_path / "a.npy")), expected, atol=1e-6)
    assert command("visualize", video, *args, tmp_path / "shown")[0] == 0
