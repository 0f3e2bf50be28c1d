"""S-HR-VQVAE is trained in stages: what each of them changes and leaves alone, and how they follow one another."""

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from vpfast.models import HRVQVAE, SHRVQVAE
from vpfast.models.shrvqvae import joint_loss, prior_loss
from vpfast.training import DataConfig, LossConfig, OptimConfig, Stopped, TrainConfig, checkpoint, train
from vpfast.training.clips import dataset
from vpfast.training.recipes import BASELINE, MODEL, RECIPES, STAGES, Sampling
from vpfast.training.recipes import joint as joint_stage
from vpfast.training.recipes import prior as prior_stage
from vpfast.training.stages import runs_of

MODEL_OF_THREE = {
    "name": "shrvqvae",
    "preset": "mnist-3x4",
    "channels": [4, 4],
    "residual_channels": 4,
    "prior_channels": 8,
    "prior_blocks": 1,
    "prior_attention_every": 1,
    "prior_heads": 2,
    "prior_head_dim": 4,
    "prior_ffn": 8,
    "prior_head": 8,
}
ORDER = ["autoencoder", "prior", "joint"]
SHORT = {"val_every": 0, "steps": 2}


@pytest.fixture
def staged(tiny):
    """The smallest run of three stages; ``model`` holds changes to the network."""

    def make(model=None, **changes):
        return tiny(model={**MODEL_OF_THREE, **(model or {})}, **changes)

    return make


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def log(out):
    lines = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def part(state, prefix):
    return {key: tensor for key, tensor in state.items() if key.startswith(prefix)}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of all stages, which nobody changes. Its configuration."""
    config = TrainConfig(
        out=str(tmp_path_factory.mktemp("trained") / "run"),
        model=MODEL_OF_THREE,
        data=DataConfig(size=16, digit_size=8, digits=1, clips=20),
        optim=OptimConfig(lr=3e-3),
        context=3,
        horizon=2,
        steps=6,
        batch_size=2,
        device="cpu",
        val_every=3,
        val_clips=3,
        save_every=2,
    )
    train(config, progress=False)
    return config


def test_every_stage_is_a_run_of_its_own(trained):
    root = Path(trained.out)
    names = [path.name for path in root.iterdir()]
    assert sorted(names) == sorted([*ORDER, "config.yaml", "weights"])
    for stage in ORDER:
        inside = sorted(path.name for path in (root / stage).iterdir())
        assert inside == ["best", "checkpoints", "config.yaml", "curves.png", "log.jsonl", "weights"]
        assert [record["step"] for record in log(root / stage)] == [1, 2, 3, 4, 5, 6]
    assert same(weights(root / "weights"), weights(root / "joint" / "weights"))
    alone, how = checkpoint.read_weights(root / "autoencoder", HRVQVAE)
    assert (alone.config.prior_channels, how.horizon, how.model["name"]) == (8, 0, "hrvqvae")
    _, how = checkpoint.read_weights(root, SHRVQVAE)
    assert (how.stage, how.horizon) == ("joint", 2)


def test_a_stage_trains_its_part_and_nothing_else(trained):
    root = Path(trained.out)
    alone = weights(root / "autoencoder" / "weights")
    first, second = (weights(root / stage / "weights") for stage in ("prior", "joint"))
    assert same(part(first, "autoencoder."), {f"autoencoder.{key}": tensor for key, tensor in alone.items()})
    moved = {key for key in first if not torch.equal(first[key], second[key])}
    for frozen in ("autoencoder.encoder.", "autoencoder.quantizer."):
        assert same(part(first, frozen), part(second, frozen))
    assert any(key.startswith("autoencoder.decoder.") for key in moved)
    assert any(key.startswith("prior.") for key in moved)


@pytest.mark.parametrize("update", ["gradient", "ema"])
def test_codebooks_do_not_move_however_they_were_learned(staged, update):
    """A large step and a threshold that declares codewords dead: in training mode the quantizer would restart them."""
    config = staged({"codebook_update": update, "dead_code_threshold": 50.0}, optim=OptimConfig(lr=1e-1), **SHORT)
    train(config, progress=False)
    root = Path(config.out)
    alone = weights(root / "autoencoder" / "weights")
    for stage in ("prior", "joint"):
        assert same(
            part(weights(root / stage / "weights"), "autoencoder.quantizer."),
            {f"autoencoder.{key}": tensor for key, tensor in part(alone, "quantizer.").items()},
        )


def test_the_decoder_alone_can_be_trained(staged):
    config = staged({"joint_trains": "decoder"}, **SHORT)
    train(config, progress=False)
    first, second = (weights(Path(config.out) / stage / "weights") for stage in ("prior", "joint"))
    assert same(part(first, "prior."), part(second, "prior."))
    assert not same(part(first, "autoencoder.decoder."), part(second, "autoencoder.decoder."))


def test_the_losses_are_those_of_equations_7_and_9(trained):
    model, _ = checkpoint.read_weights(Path(trained.out), SHRVQVAE)
    frames = torch.rand(2, 5, 1, 16, 16)
    output = model(frames, 3)
    loss = prior_stage.objective(model, frames, trained, 0)
    assert torch.equal(loss.total, prior_loss(output.logits, output.codes, 3, model.config))
    assert loss.total.requires_grad
    loss = joint_stage.objective(model, frames, trained, 0)
    assert torch.equal(loss.total, joint_loss(model, frames, 3))
    assert loss.total.item() == pytest.approx(loss.parts["prior"].item() + 0.11 * loss.parts["reconstruction"].item())
    assert not any(part.requires_grad for part in loss.parts.values())


def test_the_log_tells_how_well_codes_and_frames_are_foretold(trained):
    for stage in ("prior", "joint"):
        last = log(Path(trained.out) / stage)[-1]
        model, how = checkpoint.read_weights(Path(trained.out) / stage, SHRVQVAE)
        clips = torch.stack(list(dataset(how.data, "val", 5, 3)))
        mse = (model.predict(clips[:, :3], 2) - clips[:, 3:]).square().mean().item()
        assert last["val_mse"] == pytest.approx(mse, rel=1e-4)
        assert list(last["val_psnr"]) == [MODEL, BASELINE]
        with torch.no_grad():
            output = model(clips, 3)
        for layer in range(3):
            logits, codes = (
                output.logits[:, 3:, ..., layer, :].flatten(0, -2),
                output.codes[:, 3:, ..., layer].flatten(),
            )
            nats, right = cross_entropy(logits, codes).item(), (logits.argmax(-1) == codes).float().mean().item()
            assert last["val_cross_entropy"][f"layer {layer + 1}"] == pytest.approx(nats, abs=2e-5)
            assert last["val_accuracy"][f"layer {layer + 1}"] == pytest.approx(right, abs=2e-5)


def test_several_futures_are_held_to_the_nearest(trained):
    model, _ = checkpoint.read_weights(Path(trained.out), SHRVQVAE)
    frames = torch.rand(2, 5, 1, 16, 16)
    compared = prior_stage.compare(model, frames, 3, Sampling(temperature=1.0, futures=4, seed=3))
    drawn = model.predict(frames[:, :3], 2, temperature=1.0, num_futures=4, seed=3)
    errors = (drawn - frames[:, None, 3:]).square().mean(dim=(2, 3, 4, 5))
    assert torch.equal(compared.made[MODEL], drawn[:, 0])
    best = (compared.made["best of 4"] - frames[:, 3:]).square().mean(dim=(1, 2, 3, 4))
    assert torch.allclose(best, errors.min(dim=1).values)
    assert list(compared.made) == [MODEL, "best of 4", BASELINE]


def interrupt(monkeypatch, stage, step):
    """End the run, as if the process had been killed, before that step of a stage is computed."""
    recipe = STAGES["shrvqvae"][stage]

    def killed(model, frames, config, at):
        if at + 1 == step:
            raise KeyboardInterrupt
        return recipe.objective(model, frames, config, at)

    if stage == "autoencoder":
        monkeypatch.setitem(RECIPES, "hrvqvae", dataclasses.replace(recipe, objective=killed))
    else:
        monkeypatch.setitem(STAGES["shrvqvae"], stage, dataclasses.replace(recipe, objective=killed))


@pytest.mark.parametrize(
    ("stage", "step"), [("autoencoder", 4), ("prior", 1), ("prior", 4), ("joint", 1), ("joint", 6)]
)
def test_resuming_continues_bit_for_bit_in_the_stage_that_is_not_finished(trained, monkeypatch, tmp_path, stage, step):
    broken = dataclasses.replace(trained, out=str(tmp_path / "broken"))
    with monkeypatch.context() as patch:
        interrupt(patch, stage, step)
        with pytest.raises(KeyboardInterrupt):
            train(broken, progress=False)
    begun = [each for each in ORDER if (tmp_path / "broken" / each).exists()]
    assert begun == ORDER[: ORDER.index(stage) + 1]
    assert not (tmp_path / "broken" / "weights").exists()
    torch.manual_seed(999)
    train(broken, resume=True, progress=False)
    for each in ORDER:
        here, there = Path(trained.out) / each, tmp_path / "broken" / each
        assert same(weights(here / "weights"), weights(there / "weights"))
        assert same(weights(here / "best"), weights(there / "best"))
        assert log(here) == log(there)
    assert same(weights(Path(trained.out) / "weights"), weights(tmp_path / "broken" / "weights"))


def test_stages_one_at_a_time_are_stages_one_after_another(trained, tmp_path):
    out = str(tmp_path / "single")
    for stage in ORDER:
        folder = train(dataclasses.replace(trained, out=out, stage=stage), progress=False)
        assert same(weights(folder), weights(Path(out) / stage / "weights"))
        assert same(weights(folder), weights(Path(trained.out) / stage / "weights"))


def test_disjoint_training_is_all_but_the_last_stage_which_can_follow(trained, tmp_path):
    config = dataclasses.replace(trained, out=str(tmp_path), stage="disjoint")
    train(config, progress=False)
    assert not (tmp_path / "joint").exists()
    disjoint = weights(tmp_path / "weights")
    assert same(disjoint, weights(Path(trained.out) / "prior" / "weights"))
    train(dataclasses.replace(config, stage="joint"), progress=False)
    assert same(weights(tmp_path / "weights"), weights(Path(trained.out) / "weights"))


def test_a_stage_can_start_from_weights_elsewhere(trained, tmp_path):
    """Those of the stage before it, or its own; and with another loss."""
    still = OptimConfig(lr=1e-30)
    before = weights(Path(trained.out) / "prior" / "weights")
    for stage, init, model in (("prior", "prior", {}), ("joint", "prior", {"joint_weight": 1.0})):
        config = dataclasses.replace(
            trained, out=str(tmp_path / stage), stage=stage, init=f"{trained.out}/{init}", optim=still, steps=1
        )
        config = dataclasses.replace(config, model={**config.model, **model})
        after = weights(train(config, progress=False))
        assert same(before, after)
    config = dataclasses.replace(config, out=str(tmp_path / "a"), init=f"{trained.out}/autoencoder")
    with pytest.raises(ValueError, match=r"init: the weights in .* are of a HRVQVAE, this run trains a SHRVQVAE"):
        train(config, progress=False)
    config = dataclasses.replace(config, stage="prior", model={**config.model, "scaling": "unit"})
    with pytest.raises(ValueError, match="are of a model with scaling 'half', this run's has 'unit'"):
        train(config, progress=False)


def test_a_prior_starts_from_an_autoencoder_that_was_trained_for_itself(tiny_codes, staged, tmp_path):
    """Its weights know no field of the prior."""
    alike = {key: value for key, value in MODEL_OF_THREE.items() if not key.startswith("prior") and key != "name"}
    alone = train(tiny_codes({**alike, "latent_channels": 4, "codebook_size": 4}, **SHORT), progress=False)
    config = staged(out=str(tmp_path / "a"), stage="prior", init=str(alone), **SHORT)
    found = part(weights(train(config, progress=False)), "autoencoder.")
    assert same(found, {f"autoencoder.{key}": tensor for key, tensor in weights(alone).items()})


def test_a_run_can_be_moved_between_stages(staged, tmp_path):
    config = staged(stage="autoencoder", **SHORT)
    train(config, progress=False)
    shutil.move(config.out, tmp_path / "moved")
    train(dataclasses.replace(config, out=str(tmp_path / "moved"), stage="prior"), progress=False)
    shutil.move(tmp_path / "moved", tmp_path / "again")
    train(dataclasses.replace(config, out=str(tmp_path / "again"), stage="all"), resume=True, progress=False)
    assert (tmp_path / "again" / "joint" / "weights").is_dir()


def test_stages_have_values_of_their_own(staged):
    config = staged(
        stages={
            "autoencoder": {"context": 1, "batch_size": 7, "data": {"speed": 0.2}},
            "joint": {"optim": {"lr": 1e-4}, "steps": 9},
        }
    )
    first, second, third = runs_of(config).values()
    assert (first.context, first.horizon, first.batch_size, first.data.speed) == (1, 0, 7, 0.2)
    assert first.data.digit_size == 8
    assert (second.context, second.horizon, second.batch_size, second.optim, second.steps) == (3, 2, 2, config.optim, 6)
    assert (third.optim, third.steps, third.data) == (OptimConfig(lr=1e-4), 9, config.data)
    assert [each.out for each in (first, second, third)] == [f"{config.out}/{stage}" for stage in ORDER]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": {"priors": {"steps": 1}}}, r"unknown key 'stages.priors'; did you mean 'stages.prior'\?"),
        ({"stages": {"prior": {"step": 1}}}, r"unknown key 'stages.prior.step'; did you mean 'stages.prior.steps'\?"),
        ({"stages": {"prior": {"optim": {"lrr": 1}}}}, "unknown key 'stages.prior.optim.lrr'; did you mean"),
        ({"stages": {"prior": {"optim": 1}}}, "unknown key 'stages.prior.optim'"),
        ({"stages": {"prior": {"steps": {"a": 1}}}}, "unknown key 'stages.prior.steps.a'"),
        ({"stages": {"prior": 3}}, "stages.prior: 3 given, must hold keys of its own"),
        ({"stages": {"prior": {"model": {"layers": 2}}}}, "stages.prior.model.layers: must be left out"),
        ({"stages": {"prior": {"out": "x"}}}, "stages.prior.out: must be left out"),
        ({"stages": {"prior": {"steps": 0}}}, "stages.prior.steps: 0 given, must be at least 1"),
        ({"stages": {"prior": {"steps": "many"}}}, "stages.prior.steps: 'many' given, must be a whole number"),
        ({"stages": {"prior": {"channels_last": 1}}}, "stages.prior.channels_last: 1 given, must be true or false"),
        ({"stages": {"prior": {"data": {"root": 3}}}}, "stages.prior.data.root: 3 given, must be a text"),
        ({"stages": {"prior": {"horizon": 0}}}, "stages.prior.horizon: 0 given, must be at least 1"),
        ({"stages": {"autoencoder": {"horizon": 3}}}, "stages.autoencoder.horizon: 3 given, must be 0"),
        ({"stages": {stage: {"steps": 3} for stage in ORDER}}, "steps: 6 given, but every stage has its own; change"),
        ({"horizon": 0}, "horizon: 0 given, must be at least 1"),
        ({"loss": LossConfig(norm="mse")}, "loss.norm: 'mse' given, must be left out"),
        ({"model": {**MODEL_OF_THREE, "prior_heads": 0}}, "model: .*prior_heads"),
        ({"stage": "prior"}, "stage: 'prior' given, but .*autoencoder holds no weights to start from; train stage"),
        ({"stage": "decoder"}, "stage: 'decoder' given, must be 'all' or 'disjoint' or 'autoencoder' or"),
        ({"model": {"name": "hrvqvae"}, "stage": "prior"}, "stage: 'prior' given, must be left out: a hrvqvae"),
        (
            {"model": {"name": "mspn"}, "stages": {"prior": {}}},
            "stages: .* given, must be left out: a mspn is trained in one go",
        ),
    ],
)
def test_runs_that_cannot_be_are_refused_before_the_folder_is_made(staged, changes, message):
    with pytest.raises(ValueError, match=message):
        train(staged(**changes), progress=False)
    assert not Path(staged().out).exists()


def test_what_is_there_is_not_trained_again(staged):
    config = staged(**SHORT)
    train(config, progress=False)
    with pytest.raises(ValueError, match=r"out: .* is not empty; --resume"):
        train(config, progress=False)
    with pytest.raises(ValueError, match=r"out: .*/prior is not empty; --resume"):
        train(dataclasses.replace(config, stage="prior"), progress=False)
    longer = {"prior": {"steps": 3}}
    with pytest.raises(ValueError, match=r"stages.prior.steps: 3 given, but stage 'joint' in .* started after 2"):
        train(dataclasses.replace(config, stages=longer), resume=True, progress=False)
    with pytest.raises(ValueError, match=r"batch_size: 3 given, but the run in .*/joint was started with 2"):
        train(dataclasses.replace(config, stages={"joint": {"batch_size": 3}}), resume=True, progress=False)
    train(dataclasses.replace(config, stages={"joint": {"steps": 3}}), resume=True, progress=False)
    assert [record["step"] for record in log(Path(config.out) / "joint")] == [1, 2, 3]


@pytest.fixture
def stopped(monkeypatch):
    """A signal comes while that step of a stage is computed."""

    def stop(stage, step):
        recipe = STAGES["shrvqvae"][stage]

        def objective(model, frames, config, at):
            if at + 1 == step:
                os.kill(os.getpid(), signal.SIGTERM)
            return recipe.objective(model, frames, config, at)

        monkeypatch.setitem(STAGES["shrvqvae"], stage, dataclasses.replace(recipe, objective=objective))

    return stop


@pytest.mark.parametrize("step", [1, 2])
def test_a_stopped_stage_is_saved_and_no_other_begins(staged, stopped, step):
    """In its last step too."""
    stopped("prior", step)
    with pytest.raises(Stopped, match=rf"by SIGTERM after step {step} of stage prior; saved in {staged().out}, resume"):
        train(staged(**SHORT), progress=False)
    out = Path(staged().out)
    saved = checkpoint.found(out / "prior" / "checkpoints")
    assert checkpoint.step_of(saved[-1]) == step
    assert not (out / "joint").exists()
    train(staged(**SHORT), resume=True, progress=False)
    assert [record["step"] for record in log(out / "joint")] == [1, 2]


def test_a_signal_in_the_very_last_step_stops_nothing(staged, stopped):
    stopped("joint", 2)
    assert train(staged(**SHORT), progress=False) == Path(staged().out) / "weights"
