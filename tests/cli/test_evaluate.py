"""``vpfast evaluate``: the right clips, the right numbers, and the baseline beside them."""

import pytest
import torch

import vpfast.models
from vpfast.data import MovingDigits
from vpfast.models import HRVQVAE, MSPN, MSPNConfig, SHRVQVAEConfig
from vpfast.training import DataConfig, TrainConfig, checkpoint, evaluation


@pytest.fixture
def trained(tmp_path):
    """Weights that say they were trained on small moving digits."""
    folder = tmp_path / "weights"
    torch.manual_seed(0)
    model = MSPN(MSPNConfig(in_channels=1, channels=(4, 8), levels=1, hidden_channels=4))
    data = DataConfig(size=16, digit_size=8, digits=1)
    checkpoint.write_weights(folder, model, TrainConfig(data=data, context=3, horizon=2, seed=5))
    return folder


def test_the_numbers_are_those_of_the_test_split(command, trained, tmp_path, read_json):
    out = tmp_path / "numbers.json"
    code, said, _ = command("evaluate", "--weights", trained, "--clips", 5, "--out", out)
    assert code == 0
    digits = MovingDigits(split="test", length=5, count=5, seed=5, size=16, digit_size=8, digits=1)
    clips = torch.stack([digits[index] for index in range(5)])
    prediction = vpfast.models.load(trained).eval().predict(clips[:, :3], horizon=2).clamp(0, 1)
    numbers = read_json(out)
    assert (numbers["clips"], numbers["split"], numbers["context"], numbers["horizon"]) == (5, "test", 3, 2)
    for name, made in (("prediction", prediction), ("repeat last frame", clips[:, 2:3].expand(-1, 2, -1, -1, -1))):
        mse = (made - clips[:, 3:]).square().mean().item()
        assert numbers[name]["mean"]["mse"] == pytest.approx(mse, rel=1e-5)
        assert f"| {name} | " in said
        assert f"{mse:.5g}" in said


def test_codes_are_evaluated_by_depth(command, refused, tmp_path, read_json):
    torch.manual_seed(0)
    model = HRVQVAE(SHRVQVAEConfig(in_channels=1, channels=(4,), residual_channels=4, codebook_size=3, layers=2))
    data = DataConfig(size=16, digit_size=8, digits=1)
    checkpoint.write_weights(tmp_path / "w", model, TrainConfig(data=data, context=3, horizon=0, seed=5))
    args = ("evaluate", "--weights", tmp_path / "w", "--clips", 4, "--batch_size", 3, "--out", tmp_path / "n.json")
    code, said, err = command(*args)
    assert (code, err) == (0, "")  # a bar of progress is for a terminal
    assert "4 clips of the test split, 3 frames each, coded and made again" in said
    digits = MovingDigits(split="test", length=3, count=4, seed=5, size=16, digit_size=8, digits=1)
    clips = torch.stack([digits[index] for index in range(4)])
    codes, numbers = model.eval().encode(clips), read_json(tmp_path / "n.json")
    assert (numbers["context"], numbers["horizon"]) == (3, 0)
    for depth, name in enumerate(("1 layer", "2 layers"), start=1):
        mse = (model.decode(codes, depth) - clips).square().mean().item()
        assert numbers[name]["mean"]["mse"] == pytest.approx(mse, rel=1e-5)
        row = next(line for line in said.splitlines() if line.startswith(f"| {name} | "))
        assert f"| {mse:.5g} |" in row
        paths = (
            (codes.indices[..., :depth] * torch.tensor([3, 1])[-depth:]).sum(-1).flatten().unique(return_counts=True)
        )
        shares = paths[1] / paths[1].sum()
        use = numbers[name]["codes"]
        assert (use["codewords"], use["used"]) == (3**depth, len(shares))
        assert use["perplexity"] == pytest.approx((-(shares * shares.log()).sum()).exp().item(), rel=1e-5)
        assert row.endswith(f"| {len(shares)} of {3**depth} | {use['perplexity']:.1f} |")
    assert "horizon: 2 given, must be 0" in refused(*args, "--horizon", 2)
    (tmp_path / "w" / "training.json").unlink()  # weights that do not say how they were trained
    code, said, _ = command(*args, "--context", 3, "--seed", 5, "--data.size", 16, "--data.digit_size", 8)
    assert (code, "4 clips of the test split, 3 frames each" in said) == (0, True)
    assert "data.size: 31 given, must be a multiple of 2" in refused(*args, "--data.size", 31)


def test_other_clips_can_be_asked_for(command, trained, tmp_path, read_json):
    numbers = []
    for args in ([], ["--split", "val"], ["--horizon", "4"], ["--data.digits", "2"], ["--seed", "6"]):
        out = tmp_path / "numbers.json"
        assert command("evaluate", "--weights", trained, "--clips", 3, "--out", out, *args)[0] == 0
        numbers.append(read_json(out)["repeat last frame"]["mean"]["mse"])
    assert len(set(numbers)) == len(numbers)


def test_videos_are_evaluated_whole(command, weights, video, tmp_path, read_json):
    data = ["--data.root", video.parent, "--data.test.include", "*.avi", "--data.cache", tmp_path / "cache"]
    code, _, err = command("evaluate", "--weights", weights, *data, "--out", tmp_path / "n.json")
    assert code == 0, err
    assert read_json(tmp_path / "n.json")["clips"] == 2  # twelve frames hold two clips of five


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--split", "tset"], "split"),
        (["--clips", "0"], "clips: 0 given"),
        (["--horizon", "0"], "horizon: 0 given"),
        (["--data.kin", "x"], "did you mean '--data.kind'?"),
        (["--data.kind", "video-folder", "--data.root", "x"], "data.test.include: no pattern given"),
        (["--data.size", "17"], "data.size: 17 given, must be a multiple of 2"),
    ],
)
def test_bad_options_are_refused(refused, trained, tmp_path, args, message):
    assert message in refused("evaluate", "--weights", trained, "--out", tmp_path / "n.json", *args)
    assert not (tmp_path / "n.json").exists()


def test_a_place_that_cannot_be_written_is_refused_before_computing(refused, trained, tmp_path, monkeypatch):
    monkeypatch.setattr("vpfast.cli.evaluate.evaluated", lambda *args, **kwargs: pytest.fail("computed"))
    for out, message in ((tmp_path, "is a folder"), (tmp_path / "no" / "n.json", "there is no folder")):
        assert f"--out {out} " in refused("evaluate", "--weights", trained, "--out", out)
        assert message in refused("evaluate", "--weights", trained, "--out", out)


def test_the_device_can_be_chosen(command, trained, monkeypatch):
    asked = []
    pick = evaluation.pick_device
    monkeypatch.setattr(evaluation, "pick_device", lambda device: asked.append(device) or pick("cpu"))
    assert command("evaluate", "--weights", trained, "--clips", 1, "--device", "cpu")[0] == 0
    assert command("evaluate", "--weights", trained, "--clips", 1)[0] == 0
    assert asked == ["cpu", "auto"]


def test_weights_are_needed(refused):
    assert "--weights is missing" in refused("evaluate")
    assert "/nowhere" in refused("evaluate", "--weights", "/nowhere")
