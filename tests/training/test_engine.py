"""Whole runs: what they leave, how they stop and go on, and what they refuse."""

import dataclasses
import json
import os
import signal
import types
from pathlib import Path

import pytest
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file

import vpfast.models
from vpfast.training import LossConfig, OptimConfig, Stopped, checkpoint, engine, train
from vpfast.training.recipes import RECIPES, Loss
from vpfast.training.update import learning_rate


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def log(config):
    lines = [json.loads(line) for line in (Path(config.out) / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def stop_at(monkeypatch, step, name="mspn", signum=signal.SIGTERM):
    """Send this process a signal while that step is computed."""
    recipe = RECIPES[name]

    def interrupted(model, frames, config, at):
        if at + 1 == step:
            os.kill(os.getpid(), signum)
        return recipe.objective(model, frames, config, at)

    monkeypatch.setitem(RECIPES, name, dataclasses.replace(recipe, objective=interrupted))


def test_a_run_learns_and_leaves_what_it_should(tiny):
    config = tiny(steps=40, optim=OptimConfig(lr=3e-3), val_every=20)
    folder = train(config, progress=False)
    assert folder == Path(config.out) / "weights"
    records = log(config)
    assert [record["step"] for record in records] == list(range(1, 41))
    assert [record["step"] for record in records if "val_mse" in record] == [20, 40]
    assert sum(r["loss"] for r in records[-10:]) < 0.8 * sum(r["loss"] for r in records[:10])
    saved = [path.name for path in checkpoint.found(Path(config.out) / "checkpoints")]
    assert saved == ["step-00000038", "step-00000040"]
    assert not [path for path in Path(config.out).rglob(".*")]

    model, trained = checkpoint.read_weights(folder, vpfast.models.MSPN)
    assert trained == config
    assert same(model.state_dict(), weights(folder))
    assert isinstance(vpfast.models.load(Path(config.out) / "checkpoints" / saved[0]), vpfast.models.MSPN)


def test_the_best_weights_are_those_of_the_least_validation_error(tiny, monkeypatch):
    errors = iter([0.3, 0.1, 0.2])
    monkeypatch.setattr(engine, "validate", lambda *args: {"val_mse": next(errors)})
    config = tiny(steps=6, val_every=2, save_every=1, keep=6)
    train(config, progress=False)
    root = Path(config.out)
    assert same(weights(root / "best"), weights(root / "checkpoints" / "step-00000004"))
    assert not same(weights(root / "best"), weights(root / "weights"))


def test_a_resumed_run_knows_what_was_best(tiny, monkeypatch):
    errors = iter([0.1, 0.2, 0.3])
    monkeypatch.setattr(engine, "validate", lambda *args: {"val_mse": next(errors)})
    train(tiny(steps=2, val_every=2), progress=False)
    best = weights(Path(tiny().out) / "best")
    train(tiny(steps=6, val_every=2), resume=True, progress=False)
    assert same(weights(Path(tiny().out) / "best"), best)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"workers": 1, "loss": LossConfig(feedback="random", feedback_range=(1, 3))},
        {"optim": OptimConfig(schedule="cosine", warmup=2, clip_norm=1.0, weight_decay=1e-3), "precision": "bf16"},
    ],
)
def test_resuming_continues_bit_for_bit(tiny, monkeypatch, tmp_path, changes):
    whole = tiny(out=str(tmp_path / "whole"), **changes)
    train(whole, progress=False)

    broken = dataclasses.replace(whole, out=str(tmp_path / "broken"), save_every=0)
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        with pytest.raises(Stopped, match="SIGTERM after step 3"):
            train(broken, progress=False)
    assert not (tmp_path / "broken" / "weights").exists()
    torch.manual_seed(999)
    train(broken, resume=True, progress=False)

    assert same(weights(tmp_path / "whole" / "weights"), weights(tmp_path / "broken" / "weights"))
    assert log(whole) == log(broken)


def test_resuming_without_a_checkpoint_starts_anew_and_drops_the_old_log(tiny, tmp_path):
    whole = tiny(out=str(tmp_path / "whole"))
    train(whole, progress=False)
    killed = tiny(out=str(tmp_path / "killed"))
    Path(killed.out).mkdir()
    (Path(killed.out) / "log.jsonl").write_text('{"step": 1, "loss": 3}\n{"step": 2, "lo')
    train(killed, resume=True, progress=False)
    assert same(weights(tmp_path / "whole" / "weights"), weights(tmp_path / "killed" / "weights"))
    assert log(whole) == log(killed)


def test_more_steps_can_be_asked_of_a_finished_run(tiny):
    train(tiny(steps=4), progress=False)
    config = tiny(steps=6)
    train(config, resume=True, progress=False)
    assert [record["step"] for record in log(config)] == [1, 2, 3, 4, 5, 6]
    with pytest.raises(ValueError, match=r"steps: 5 given, but .* has 6 behind it"):
        train(tiny(steps=5), resume=True, progress=False)


def test_a_folder_in_use_and_another_run_are_refused(tiny):
    config = tiny(steps=1)
    train(config, progress=False)
    with pytest.raises(ValueError, match=r"out: .* is not empty; --resume"):
        train(config, progress=False)
    with pytest.raises(ValueError, match=r"batch_size: 3 given, but the run in .* was started with 2"):
        train(tiny(batch_size=3), resume=True, progress=False)


def test_a_loss_that_is_not_finite_ends_the_run(tiny, monkeypatch):
    broken = dataclasses.replace(
        RECIPES["mspn"], objective=lambda model, *rest: Loss(next(model.parameters()).sum() * float("nan"), {})
    )
    monkeypatch.setitem(RECIPES, "mspn", broken)
    config = tiny()
    with pytest.raises(FloatingPointError, match=r"loss is nan at step 1; a lower optim\.lr"):
        train(config, progress=False)
    assert not (Path(config.out) / "weights").exists()


def test_a_run_starts_from_given_weights(tiny, tmp_path):
    first = train(tiny(out=str(tmp_path / "first"), steps=1), progress=False)
    second = tiny(out=str(tmp_path / "second"), steps=1, init=str(first.parent), optim=OptimConfig(lr=1e-30))
    assert same(weights(train(second, progress=False)), weights(first))
    other = tiny(out=str(tmp_path / "third"), init=str(first), model={"preset": "compact"})
    with pytest.raises(ValueError, match="init: the weights in"):
        train(other, progress=False)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"chanels": [4, 8]}, r"unknown key 'model.chanels'; did you mean 'model.channels'\?"),
        ({"name": "vit"}, "model.name: 'vit' given"),
        ({"preset": "huge"}, "model: .*no preset 'huge'"),
        ({"levels": 9}, "model: .*levels"),
        ({"in_channels": 3}, "data.channels: 1 given, but the model's in_channels is 3"),
        ({"channels": [4] * 6}, "data.size: 16 given, must be a multiple of 32"),
    ],
)
def test_models_that_cannot_be_are_refused_before_the_folder_is_made(tiny, model, message):
    config = tiny(model=model)
    with pytest.raises(ValueError, match=message):
        train(config, progress=False)
    assert not Path(config.out).exists()


def test_of_accelerates_own_set_up_only_processes_and_devices_count(tiny, monkeypatch):
    """Accumulation would divide the loss, another precision would not be the run's, shards could not be saved."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    made = engine.accelerator(tiny())
    assert (made.gradient_accumulation_steps, made.mixed_precision) == (1, "no")
    shards = types.SimpleNamespace(distributed_type=DistributedType.FSDP)
    monkeypatch.setattr(engine, "Accelerator", lambda **how: shards)
    with pytest.raises(ValueError, match="accelerate is set up for FSDP, must be for plain data parallelism"):
        engine.accelerator(tiny())


def test_the_learning_rate_warms_up_and_falls(tiny):
    config = tiny(steps=10, optim=OptimConfig(lr=1.0, schedule="cosine", warmup=2))
    rates = [learning_rate(config, step) for step in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert 0 < rates[-1] < 0.1
