"""Long-term training: what of a clip the network sees, by feedback and step."""

import pytest
import torch
from torch import nn

from vpfast.models import MSPN, MSPNConfig
from vpfast.training import LossConfig
from vpfast.training.feedback import frames_fed_back, frames_seen, share_of_real, unrolled
from vpfast.training.recipes.mspn import objective


class Recorder(nn.Module):
    def forward(self, frames, horizon, feedback, seen, recompute):
        self.told = (frames.shape[1], horizon, feedback, seen)


@pytest.mark.parametrize(
    ("feedback", "expected"),
    [
        ("fixed", (3, 2, "attached", None)),
        ("detached", (3, 2, "detached", None)),
        ("none", (5, 0, "attached", None)),
    ],
)
def test_feedback_decides_what_the_network_sees(tiny, feedback, expected):
    recorder = Recorder()
    unrolled(recorder, torch.zeros(1, 5, 1, 16, 16), tiny(loss=LossConfig(feedback=feedback)), 7)
    assert recorder.told == expected


def test_random_feedback_is_drawn_from_the_step(tiny):
    config, recorder = tiny(loss=LossConfig(feedback="random", feedback_range=(1, 4))), Recorder()
    for step in range(20):
        unrolled(recorder, torch.zeros(1, 5, 1, 16, 16), config, step)
        drawn = frames_fed_back(config, step)
        assert recorder.told == (5 - drawn, drawn, "attached", None)
    assert {frames_fed_back(config, step) for step in range(100)} == {1, 2, 3, 4}
    assert frames_fed_back(tiny(loss=config.loss, seed=1), 3) in {1, 2, 3, 4}
    draws = [[frames_fed_back(tiny(loss=config.loss, seed=seed), step) for step in range(20)] for seed in (0, 1)]
    assert draws[0] != draws[1]


@pytest.mark.parametrize(
    ("sampling", "start", "middle", "end"),
    [("linear", 1.0, 0.5, 0.0), ("exponential", 1.0, 0.1, 0.01), ("sigmoid", 0.9933, 0.5, 0.0067)],
)
def test_ever_fewer_real_frames(tiny, sampling, start, middle, end):
    config = tiny(loss=LossConfig(feedback="scheduled", sampling=sampling, sampling_steps=100), context=2, horizon=50)
    shares = [share_of_real(config, step) for step in range(0, 201, 50)]
    assert shares[:3] == pytest.approx([start, middle, end], abs=1e-4)
    assert shares == sorted(shares, reverse=True)
    assert min(shares) >= 0
    for step in range(0, 201, 50):
        seen = [frames_seen(config, near) for near in range(step, step + 20)]
        assert all(len(each) == 52 and all(each[:2]) for each in seen)
        mean = sum(sum(each[2:]) for each in seen) / 1000
        assert mean == pytest.approx(share_of_real(config, step + 10), abs=0.11)
    assert frames_seen(config, 50) == frames_seen(config, 50) != frames_seen(config, 51)


def test_scheduled_sampling_ends_in_fixed_feedback(tiny):
    torch.manual_seed(0)
    model = MSPN(MSPNConfig(in_channels=1, channels=(4, 8), levels=1, hidden_channels=4))
    frames = torch.rand(2, 5, 1, 16, 16)

    def predictions(feedback, step):
        config = tiny(loss=LossConfig(feedback=feedback, sampling_steps=10))
        return unrolled(model, frames, config, step).predictions[0]

    assert torch.equal(predictions("scheduled", 10), predictions("fixed", 0))
    assert torch.equal(predictions("scheduled", 0), predictions("none", 0))
    between = [predictions("scheduled", step) for step in range(1, 10)]
    assert any(not torch.equal(each, predictions(name, 0)) for each in between for name in ("fixed", "none"))


def test_the_loss_is_of_real_frames_whatever_is_fed_back(tiny):
    torch.manual_seed(0)
    model = MSPN(MSPNConfig(in_channels=1, channels=(4, 8), levels=1, hidden_channels=4))
    frames = torch.rand(1, 5, 1, 16, 16)
    changed = frames.clone()
    changed[:, -1] = 0
    for feedback in ("fixed", "random", "detached", "scheduled", "none"):
        config = tiny(loss=LossConfig(feedback=feedback, feedback_range=(1, 2)))
        assert objective(model, frames, config, 0).total != objective(model, changed, config, 0).total
