"""An HR-VQVAE is trained by the same loop: what is minimised, watched and kept, and that a run goes on exactly."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import vpfast.models
from vpfast.models import HRVQVAE, SHRVQVAEConfig
from vpfast.models.shrvqvae import hrvqvae_loss
from vpfast.training import LossConfig, OptimConfig, Stopped, checkpoint, train
from vpfast.training.clips import dataset
from vpfast.training.recipes import RECIPES, perplexity, recipe_of
from vpfast.training.recipes.hrvqvae import objective


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def log(config):
    lines = [json.loads(line) for line in (Path(config.out) / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def stop_at(monkeypatch, step):
    """End the run, as if the process had been killed, before that step is computed."""

    def killed(model, frames, config, at):
        if at + 1 == step:
            raise KeyboardInterrupt
        return objective(model, frames, config, at)

    monkeypatch.setitem(RECIPES, "hrvqvae", dataclasses.replace(RECIPES["hrvqvae"], objective=killed))


def test_a_run_learns_and_tells_how_deep(tiny_codes):
    config = tiny_codes(steps=60, optim=OptimConfig(lr=3e-3), val_every=30, batch_size=4)
    folder = train(config, progress=False)
    records = log(config)
    assert sum(r["loss"] for r in records[-10:]) < 0.5 * sum(r["loss"] for r in records[:10])
    for record in records:
        assert record["loss"] == pytest.approx(record["reconstruction"] + record["quantization"], rel=1e-5)

    model, trained = checkpoint.read_weights(folder, HRVQVAE)
    assert trained == config
    last = records[-1]
    clips = torch.stack(list(dataset(config.data, "val", 3, 3)))
    codes = model.encode(clips)
    for depth, name in enumerate(("1 layer", "2 layers", "3 layers"), start=1):
        errors = (model.decode(codes, depth) - clips).square().flatten(2).mean(2)
        assert last["val_psnr"][name] == pytest.approx(-10 * errors.log10().mean().item(), abs=1e-3)
    assert last["val_mse"] == pytest.approx(errors.mean().item(), rel=1e-5)
    assert last["val_perplexity"]["1 layer"] == pytest.approx(
        model.quantizer.perplexity(codes.indices)[0].item(), abs=1e-3
    )
    assert list(last["val_perplexity"]) == list(last["val_psnr"])


def test_the_loss_is_that_of_equation_4(tiny_codes):
    torch.manual_seed(0)
    model = HRVQVAE(SHRVQVAEConfig(in_channels=1, channels=(4,), dead_codes="ignore"))
    frames = torch.rand(2, 3, 1, 8, 8)
    loss = objective(model, frames, tiny_codes(), 0)
    assert torch.equal(loss.total, hrvqvae_loss(model(frames), frames))
    assert loss.total.requires_grad
    assert not any(part.requires_grad for part in loss.parts.values())


@pytest.mark.parametrize(
    "model",
    [
        {},
        {"codebook_update": "ema", "ema_decay": 0.5},
        {"codebook_update": "ema", "dead_codes": "ignore"},
        {"dead_code_threshold": 5.0, "ema_decay": 0.5},
    ],
)
def test_resuming_continues_bit_for_bit(tiny_codes, monkeypatch, tmp_path, model):
    """The start from data, averages, restarts and their draws included, wherever the run was cut."""
    whole = tiny_codes(model, out=str(tmp_path / "whole"), save_every=2)
    train(whole, progress=False)
    for step in (1, 2, 4):
        broken = dataclasses.replace(whole, out=str(tmp_path / f"broken{step}"))
        with monkeypatch.context() as patch:
            stop_at(patch, step)
            with pytest.raises(KeyboardInterrupt):
                train(broken, progress=False)
        torch.manual_seed(999)
        train(broken, resume=True, progress=False)
        assert same(weights(tmp_path / "whole" / "weights"), weights(tmp_path / f"broken{step}" / "weights"))
        assert same(weights(tmp_path / "whole" / "best"), weights(tmp_path / f"broken{step}" / "best"))
        assert log(whole) == log(broken)


def test_codes_restart_in_the_runs_above(tiny_codes):
    """What the last of them resumes would be nothing to resume if no codeword ever restarted."""
    config = tiny_codes({"dead_code_threshold": 5.0, "ema_decay": 0.5}, optim=OptimConfig(lr=1e-30), steps=4)
    before = weights(train(dataclasses.replace(config, steps=1), progress=False))["quantizer.codewords"]
    after = weights(train(config, resume=True, progress=False))["quantizer.codewords"]
    assert (before != after).any()


def test_a_run_starts_from_given_weights(tiny_codes, tmp_path):
    first = train(tiny_codes(out=str(tmp_path / "first"), steps=2), progress=False)
    still = OptimConfig(lr=1e-30)
    second = tiny_codes({"dead_codes": "ignore"}, out=str(tmp_path / "a"), steps=1, init=str(first), optim=still)
    with pytest.raises(ValueError, match="init: the weights in"):
        train(second, progress=False)
    third = tiny_codes(out=str(tmp_path / "b"), steps=1, init=str(first), optim=still)
    assert torch.equal(
        weights(train(third, progress=False))["quantizer.codewords"], weights(first)["quantizer.codewords"]
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"horizon": 2}, "horizon: 2 given, must be 0"),
        ({"loss": LossConfig(norm="mse")}, "loss.norm: .mse. given, must be left out"),
        ({"model": {"name": "hrvqvae", "layer": 3}}, r"unknown key 'model.layer'; did you mean 'model.layers'\?"),
        ({"model": {"name": "hrvqvae", "preset": "compact"}}, "model: .*no preset 'compact'"),
        ({"model": {"name": "hrvqvae", "channels": [4] * 5}}, "data.size: 16 given, must be a multiple of 32"),
        ({"model": {"name": ["hrvqvae"]}}, r"model.name: \['hrvqvae'\] given, must be 'mspn' or 'hrvqvae'"),
    ],
)
def test_runs_that_cannot_be_are_refused_before_the_folder_is_made(tiny_codes, changes, message):
    config = dataclasses.replace(tiny_codes(), **changes)
    with pytest.raises(ValueError, match=message):
        train(config, progress=False)
    assert not Path(config.out).exists()


def test_every_kind_of_model_has_a_recipe():
    for name, recipe in RECIPES.items():
        model = recipe.model_class(recipe.config_class.preset(recipe.preset, **SMALL[name]))
        assert recipe_of(model) is recipe
        assert isinstance(model, torch.nn.Module)
    with pytest.raises(TypeError, match="no recipe for a Linear"):
        recipe_of(torch.nn.Linear(1, 1))


SMALL = {
    "mspn": {"channels": (2, 2), "levels": 1, "hidden_channels": 2},
    "hrvqvae": {"channels": (2,)},
    "shrvqvae": {"channels": (2,), "prior_channels": 4, "prior_blocks": 1, "prior_attention_every": 1},
}


def test_perplexity_counts_codewords_used_alike():
    assert perplexity(torch.tensor([5, 5, 5, 0])) == pytest.approx(3)
    assert perplexity(torch.tensor([7, 0])) == pytest.approx(1)
    assert perplexity(torch.zeros(3)) == 0


def test_a_stopped_run_is_saved(tiny_codes, monkeypatch):
    import os
    import signal

    def stopped(model, frames, config, at):
        os.kill(os.getpid(), signal.SIGTERM)
        return objective(model, frames, config, at)

    with monkeypatch.context() as patch:
        patch.setitem(RECIPES, "hrvqvae", dataclasses.replace(RECIPES["hrvqvae"], objective=stopped))
        with pytest.raises(Stopped):
            train(tiny_codes(), progress=False)
    saved = checkpoint.found(Path(tiny_codes().out) / "checkpoints")
    assert isinstance(vpfast.models.load(saved[0]), HRVQVAE)
