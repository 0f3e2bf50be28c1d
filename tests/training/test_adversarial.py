"""MSPN's adversarial training: losses and turns by hand, and runs that keep what they promise."""

import dataclasses
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn

from vpfast.models import MSPN, MSPNConfig
from vpfast.models.mspn import pixel_loss
from vpfast.training import AdversarialConfig, OptimConfig, Stopped, checkpoint, train
from vpfast.training.adversarial import (
    AdversarialUpdate,
    Turns,
    build_discriminator,
    discriminator_loss,
    generator_loss,
)
from vpfast.training.feedback import unrolled
from vpfast.training.recipes import RECIPES
from vpfast.training.update import Context

SMALL = AdversarialConfig(enabled=True, channels=(4, 6, 8), first_frame=1, lr=1e-3, weight=2.0, cap=4)
TOLD = {"score", "turn_ends", "capped", "generator", "loss"}


@pytest.fixture
def context(tiny):
    """Makes what an update is made from: a tiny network on clips (2, 5, 1, 16, 16)."""

    def make(**changes):
        config = tiny(adversarial=dataclasses.replace(SMALL, **changes), optim=OptimConfig(lr=1e-3))
        torch.manual_seed(0)
        model = MSPN(MSPNConfig(in_channels=1, channels=(4, 8), levels=1, hidden_channels=4))
        return Context(model, [model], config, Accelerator(cpu=True), RECIPES["mspn"])

    return make


@pytest.fixture
def frames():
    return torch.rand(2, 5, 1, 16, 16, generator=torch.Generator().manual_seed(1))


def copies(*networks):
    return [{name: value.clone() for name, value in network.state_dict().items()} for network in networks]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def log(out):
    lines = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


# -- losses ----------------------------------------------------------------------------------------------------------


def test_losses_by_hand():
    real, predicted = torch.tensor([[0.5, 2.0]]), torch.tensor([[-1.0, 0.0, 0.5]])
    assert discriminator_loss(real, predicted).item() == pytest.approx((0.25 + 1.0) / 2 + (0 + 1 + 2.25) / 3)
    assert generator_loss(predicted).item() == pytest.approx((4 + 1 + 0.25) / 3)
    assert discriminator_loss(real, predicted, "linear").item() == pytest.approx(-(1.25 + 1 + 0.5 / 3))
    assert generator_loss(predicted, "linear").item() == pytest.approx(0.5 / 3)


@pytest.mark.parametrize("kind", ["least_squares", "linear"])
def test_the_networks_pull_apart(kind):
    """Down its gradient the discriminator raises Rs and lowers Ps, the generator raises Ps."""
    real, predicted = torch.tensor([0.3], requires_grad=True), torch.tensor([0.2], requires_grad=True)
    discriminator_loss(real, predicted, kind).backward()
    assert real.grad < 0 < predicted.grad
    predicted.grad = None
    generator_loss(predicted, kind).backward()
    assert predicted.grad < 0


# -- turns -----------------------------------------------------------------------------------------------------------


def test_turns_follow_algorithm_2():
    """Scores (Rs, Ps) -> whose update it was, and whether the loop ended with it; a window of one, c1 1, c2 2."""
    turns = Turns(AdversarialConfig(window=1, cap=100))
    seen = []
    for real, predicted in [
        (100, 99.5),
        (100, 99.0),
        (100, 98.9),
        (100, 97.0),
        (100, 98.0),
        (100, 98.1),
        (-100, -101.5),
    ]:
        generators = bool(turns.generators)
        now = turns.after(real, predicted)
        seen.append((generators, now.ends))
        assert not now.capped
        assert (now.real, now.predicted) == (real, predicted)
        assert (now.lower, now.upper) == pytest.approx((real - 2, real - 1))
    discriminator, generator = False, True
    assert seen == [
        (discriminator, False),
        (discriminator, False),  # Ps = Rs - c1 is not below
        (discriminator, True),
        (generator, False),
        (generator, False),  # Ps = Rs - c2 is not above
        (generator, True),
        (discriminator, True),  # tolerances are of |Rs|
    ]


def test_small_steps_keep_the_scores_between_the_bounds():
    """Each loop looks at one bound alone. What keeps Ps between both is that updates are small beside the band and that
    each network's own updates move Ps its way."""
    turns, step, predicted, seen = Turns(AdversarialConfig()), 0.001, 1.05, []
    for _ in range(400):
        predicted += step if turns.generators else -step
        seen.append(turns.after(1.0, predicted))
    first = next(place for place, now in enumerate(seen) if now.predicted < now.upper)
    assert all(now.lower < now.predicted < now.upper + 2 * step for now in seen[first:])
    assert sum(now.predicted < now.upper for now in seen[first:]) > 0.4 * len(seen[first:])
    assert not any(now.capped for now in seen)


def test_scores_are_means_of_the_last_three_updates():
    turns = Turns(AdversarialConfig())
    means = [turns.after(real, real - 6) for real in (3.0, 6.0, 0.0, 9.0)]
    assert [now.real for now in means] == [3.0, 4.5, 3.0, 5.0]
    assert [now.predicted for now in means] == [-3.0, -1.5, -3.0, -1.0]


def test_a_turn_ends_at_the_cap():
    turns = Turns(AdversarialConfig(cap=3))
    ends = [turns.after(1.0, 1.0) for _ in range(3)]
    assert [(now.ends, now.capped) for now in ends] == [(False, False), (False, False), (True, True)]
    assert turns.generators
    assert not turns.after(1.0, 1.0).capped  # and the score is reached at once


def test_turns_are_saved():
    turns, other = Turns(AdversarialConfig()), Turns(AdversarialConfig())
    for predicted in (0.9, 1.1, 0.2, 0.3):
        turns.after(1.0, predicted)
    other.load_state_dict(turns.state_dict())
    for predicted in (0.7, 1.5, 1.5, 0.1, 2.0):
        assert turns.after(1.0, predicted) == other.after(1.0, predicted)


def moved_down(network, start, other, rate):
    """``network`` has the gradients of ``other``, and every parameter has gone one step of Adam against its own."""
    for (name, parameter), expected in zip(network.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-4, atol=1e-5)
        step = -rate * parameter.grad / (parameter.grad.abs() + 1e-8)
        torch.testing.assert_close(parameter.detach() - start[name], step, rtol=1e-3, atol=1e-7)


# -- updates ---------------------------------------------------------------------------------------------------------


def test_the_discriminators_update_by_hand(context, frames):
    made = context(first_frame=2)
    update = AdversarialUpdate(made)
    judge = build_discriminator(made.config)
    judge.load_state_dict(update.discriminator.state_dict())
    before = copies(made.model)[0]
    with torch.no_grad():
        predictions = made.model(frames[:, :3], horizon=2).predictions[0]
    loss = discriminator_loss(judge(frames[:, 2:]), judge(predictions[:, 2:]))
    loss.backward()
    start = copies(update.discriminator)[0]
    told = update(frames, 0)
    assert told["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert told["generator"] == 0
    assert same(made.model.state_dict(), before)
    moved_down(update.discriminator, start, judge, 1e-3)
    assert all(parameter.grad is None for parameter in made.model.parameters())


def test_the_generators_update_by_hand(context, frames):
    made = context(first_frame=2)
    update = AdversarialUpdate(made)
    update.turns.generators.fill_(True)
    model, judge = MSPN(made.model.config), build_discriminator(made.config).eval()
    model.load_state_dict(made.model.state_dict())
    judge.load_state_dict(update.discriminator.state_dict())
    before = copies(update.discriminator)[0]
    output = model(frames[:, :3], horizon=2)
    pixel, scores = pixel_loss(output, frames), judge(output.predictions[0][:, 2:])
    loss = pixel + 2.0 * (scores - 1).square().mean()
    loss.backward()
    start = copies(made.model)[0]
    told = update(frames, 0)
    assert told["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert (told["pixel"], told["generator"]) == (pytest.approx(pixel.item(), rel=1e-5), 1)
    assert same(update.discriminator.state_dict(), before)
    moved_down(made.model, start, model, 1e-3)


def test_a_loss_that_is_not_finite_moves_nothing(context, frames):
    made = context()
    update = AdversarialUpdate(made)
    nn.init.constant_(update.discriminator.score[2].bias, float("nan"))
    for generators in (False, True):
        update.turns.generators.fill_(generators)
        before = copies(made.model, update.turns)
        with pytest.raises(FloatingPointError, match="loss is nan at step 1"):
            update(frames, 0)
        assert all(same(a, b) for a, b in zip(before, copies(made.model, update.turns), strict=True))


def test_learning_rates_fall_together(context, frames):
    made = context(lr=1e-4)
    made = dataclasses.replace(
        made, config=dataclasses.replace(made.config, optim=OptimConfig(lr=1e-2, schedule="cosine"))
    )
    update = AdversarialUpdate(made)
    told = update(frames, 3)
    assert told["lr"] == pytest.approx(0.5e-2)
    assert update.optimizers["discriminator"].param_groups[0]["lr"] == pytest.approx(0.5e-4)


# -- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"precision": "bf16", "channels_last": False}])
def test_resuming_amid_a_turn_continues_bit_for_bit(tiny, monkeypatch, tmp_path, changes):
    whole = tiny(out=str(tmp_path / "whole"), adversarial=SMALL, steps=10, val_every=0, save_every=0, **changes)
    train(whole, progress=False)
    broken = dataclasses.replace(whole, out=str(tmp_path / "broken"))
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        with pytest.raises(Stopped):
            train(broken, progress=False)
    torch.manual_seed(999)
    train(broken, resume=True, progress=False)
    assert log(whole.out) == log(broken.out)
    last = [checkpoint.found(Path(run.out) / "checkpoints")[-1] for run in (whole, broken)]
    for path in last[0].rglob("*.safetensors"):
        assert same(load_file(path), load_file(last[1] / path.relative_to(last[0])))
    records = log(whole.out)
    assert {record["generator"] for record in records} == {0.0, 1.0}
    assert all(record.keys() >= TOLD for record in records)
    assert all(list(record["score"]) == ["Rs", "Ps", "Rs - c2", "Rs - c1"] for record in records)


def stop_at(monkeypatch, step):
    """Send this process a signal while that step is computed."""

    def interrupted(model, frames, config, at):
        if at + 1 == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return unrolled(model, frames, config, at)

    monkeypatch.setattr("vpfast.training.adversarial.unrolled", interrupted)


def test_a_cap_that_strikes_is_told(tiny, capsys):
    train(
        tiny(adversarial=dataclasses.replace(SMALL, upper_tolerance=1e3, lower_tolerance=1e4, cap=2)),
        progress=False,
    )
    said = capsys.readouterr().err
    assert "step 2: the discriminator's turn ended at adversarial.cap (2 updates) with Ps" in said
    assert [record["capped"] for record in log(tiny().out)[:2]] == [0.0, 1.0]


def test_weights_of_a_run_are_a_model_alone(tiny):
    folder = train(tiny(adversarial=SMALL, steps=2), progress=False)
    model, config = checkpoint.read_weights(folder, MSPN)
    assert config.adversarial == SMALL
    assert all(value.isfinite().all() for value in model.state_dict().values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adversarial": SMALL, "model": {"name": "hrvqvae"}, "horizon": 0}, "adversarial.enabled: True given"),
    ],
)
def test_runs_that_cannot_be_are_refused(tiny, changes, message):
    config = tiny(**changes)
    with pytest.raises(ValueError, match=message):
        train(config, progress=False)
    assert not Path(config.out).exists()
