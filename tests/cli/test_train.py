"""``vpfast train``: configurations by name, file and option; every refusal before data is read; signals."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
import torch
import yaml

import vpfast.cli.train
import vpfast.models
from vpfast.cli import _options
from vpfast.cli.train import TrainConfig
from vpfast.training.config import from_dict
from vpfast.training.network import build_model
from vpfast.training.recipes import RECIPES
from vpfast.training.stages import runs_of

TINY = [
    *("--model.channels", "[4,8]", "--model.levels", "1", "--model.hidden_channels", "4"),
    *("--data.size", "16", "--data.digit_size", "8", "--batch_size", "2", "--context", "3", "--horizon", "2"),
    *("--val_every", "2", "--val_clips", "2", "--device", "cpu"),
]


@pytest.fixture
def out(tmp_path):
    return tmp_path / "run"


def test_tiny_numbers_are_zero_while_training(command, out, monkeypatch):
    def product():
        return (torch.tensor(1e-30) * torch.tensor(1e-10)).item()

    seen = []
    monkeypatch.setattr(vpfast.cli.train, "train", lambda config, resume: seen.append(product()))
    assert command("train", *TINY, "--steps", "2", "--out", out)[0] == 0
    assert seen == [0.0]
    assert 0 < product() < 1.2e-38


def test_train_and_resume(command, out):
    code, said, _ = command("train", *TINY, "--steps", "2", "--out", out)
    assert code == 0
    assert str(out / "weights") in said
    assert (out / "curves.png").read_bytes()[:4] == b"\x89PNG"
    resolved = from_dict(TrainConfig, yaml.safe_load((out / "config.yaml").read_text()))
    assert (resolved.steps, resolved.data.size, resolved.model["channels"]) == (2, 16, [4, 8])
    code, _, _ = command("train", "--out", out, "--resume", "--steps", "3")
    assert code == 0
    assert len((out / "log.jsonl").read_text().splitlines()) == 3


def test_a_run_that_is_not_there_is_not_gone_on_with(refused, command, out):
    """Nothing tells what to train; where something does, the first of many attempts finds no run either."""
    assert f"--resume: there is no {out}/config.yaml, so no run to go on with" in refused(
        "train", "--resume", "--out", out
    )
    assert not out.exists()
    code, _, _ = command("train", *TINY, "--steps", "1", "--resume", "--out", out)
    assert code == 0


def test_options_override_files_override_defaults(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("steps: 7\nmodel: {preset: compact, levels: 1}\ndata: {size: [32, 32]}\n")
    options = _options.Options("test", "")
    options.add_config(TrainConfig)
    values = options.parse(["--config", str(path), "--model.levels", "2", "--optim.lr", "3e-4"])
    config = from_dict(TrainConfig, values)
    assert (config.steps, config.data.size, config.optim.lr, config.context) == (7, (32, 32), 3e-4, 10)
    assert config.model == {"preset": "compact", "levels": 2}


@pytest.mark.parametrize("name", RECIPES)
def test_every_choice_of_a_model_can_be_given_as_it_is_called(name, tmp_path):
    """As an option and in a file, where YAML takes some words for something else."""
    options = _options.Options("test", "")
    options.add_config(TrainConfig)
    hints = get_type_hints(RECIPES[name].config_class)
    choices = [(key, choice) for key, hint in hints.items() if get_origin(hint) is Literal for choice in get_args(hint)]
    assert choices
    for key, choice in choices:
        path = tmp_path / "c.yaml"
        path.write_text(f"model: {{{key}: {choice}}}\n")
        for args in ([f"--model.{key}", choice], ["--config", str(path)]):
            assert options.parse(args)["model"] == {key: choice}


# Parameters in all. The paper prints 1.14 M for the 3-layer models, which are its best, and nothing for the others.
COUNTS = {
    "kth-1x512": 1_206_187,
    "kth-3x8": 1_144_835,
    "kth-9x2": 1_147_565,
    "mnist-1x64": 1_141_989,
    "mnist-3x4": 1_135_873,
    "mnist-6x2": 1_136_169,
    "mnist-9x2": 1_140_911,
}
NARROW = {"channels": [4, 8, 8], "levels": 2, "hidden_channels": 4}
SMALL = {
    **{f"mspn/{name}": NARROW for name in ("moving-digits", "kth", "caltech", "kitti", "table-1", "table-6")},
    **{f"mspn/{name}": NARROW for name in ("moving-mnist", "human36m")},
    **{f"mspn/{name}": NARROW for name in ("wo_encinfo", "enc_lstm_dec")},
    **{f"shrvqvae/{name}": {} for name in COUNTS},
    **{f"{model}/one-digit": {} for model in ("mspn", "shrvqvae")},
}


@pytest.mark.parametrize("name", SMALL)
def test_packaged_configurations_are_valid(name):
    options = _options.Options("test", "")
    options.add_config(TrainConfig)
    config = from_dict(TrainConfig, options.parse(["--config", name, "--data.root", "x"]))
    model = build_model(dataclasses.replace(config, model={**config.model, **SMALL[name]}))
    assert isinstance(model, vpfast.models.MSPN if name.startswith("mspn") else vpfast.models.SHRVQVAE)
    assert model.config.in_channels == config.data.channels
    runs = list(runs_of(config).values())
    assert [run.model["name"] for run in runs] == ([] if name.startswith("mspn") else ["hrvqvae", *["shrvqvae"] * 2])
    assert all((run.horizon > 0) == (run.model["name"] == "shrvqvae") for run in runs)
    assert all(run.optim.lr == 3e-4 for run in runs if name.partition("/")[2] in COUNTS)


@pytest.mark.parametrize("name", COUNTS)
def test_every_column_of_the_tables_has_its_size(name):
    """S-HR-VQVAE paper, Tables 1 and 3."""
    options = _options.Options("test", "")
    options.add_config(TrainConfig)
    config = from_dict(TrainConfig, options.parse(["--config", f"shrvqvae/{name}", "--data.root", "x"]))
    model = build_model(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == COUNTS[name]
    if name in ("kth-3x8", "mnist-3x4"):
        assert count == pytest.approx(1.14e6, rel=0.005)
    layers, codewords = map(int, name.partition("-")[2].split("x"))
    assert (model.config.layers, model.config.codebook_size) == (layers, codewords)
    assert config.out == f"runs/{name}"
    assert (config.context, config.horizon, config.optim.lr) == (10, 20 if name.startswith("kth") else 10, 3e-4)


def test_the_autoencoder_of_a_packaged_configuration_can_be_trained_for_itself():
    options = _options.Options("test", "")
    options.add_config(TrainConfig)
    args = ["--config", "shrvqvae/kth-3x8", "--data.root", "x", "--stage", "autoencoder"]
    (run,) = runs_of(from_dict(TrainConfig, options.parse(args))).values()
    assert isinstance(build_model(run), vpfast.models.HRVQVAE)


def test_keys_of_a_stage_are_changed_one_by_one(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("stages: {prior: {steps: 4, optim: {lr: 3e-4}}, joint: {steps: 3}}\n")
    options = _options.Options("test", "")
    options.add_config(TrainConfig)
    changes = ["--stages.prior.steps", "7", "--stages.prior.optim.warmup=2", "--stages.joint.optim.lr", "1e-3"]
    changes += ["--stages.joint.data.size", "[16, 16]", "--stages.joint.channels_last", "false"]
    for args in (["--config", str(path), *changes], [*changes, "--config", str(path)]):
        assert options.parse(args)["stages"] == {
            "prior": {"steps": 7, "optim": {"lr": 3e-4, "warmup": 2}},
            "joint": {"steps": 3, "optim": {"lr": 1e-3}, "data": {"size": [16, 16]}, "channels_last": False},
        }
    assert options.parse([])["stages"] == {}


def test_no_packaged_configuration_is_untested():
    listed = {str(path.relative_to(path.parents[1]).with_suffix("")) for path in _packaged()}
    assert listed == set(SMALL)


def _packaged():
    return list((Path(_options.__file__).parents[1] / "configs").rglob("*.yaml"))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--optim.lrr", "1"], "unknown key '--optim.lrr'; did you mean '--optim.lr'?"),
        (["--steps", "many"], "Got value: many"),
        (["--loss.norm", "l3"], "loss.norm: Expected one of"),
        (["--data.size", "[3]"], "data.size"),
        (["--steps"], "--steps: expected one argument"),
        (["extra"], "extra"),
        (["--steps", "0"], "steps: 0 given, must be at least 1"),
        (["--model.chanels", "3"], "did you mean 'model.channels'?"),
        (["--model.levels", "four"], "levels must be a positive integer, got 'four'"),
        (["--data.kind", "video-folder"], "data.root: nothing given"),
        (["--data.kind", "video-folder", "--data.root", "/nowhere", "--val_every", "0"], "/nowhere"),
        (["--data.root", "/nowhere"], "/nowhere"),
        (
            ["--config", "mspn/nothing"],
            "there are: mspn/caltech, mspn/enc_lstm_dec, ",
        ),
        (["--horizon", "0"], "horizon: 0 given, must be at least 1"),
        (["--config"], "--config"),
        (["--init", "/nowhere"], "/nowhere"),
        (["--stage", "prior"], "stage: 'prior' given, must be left out: a mspn is trained in one go"),
        (["--stages.prior.steps", "3"], "stages: {'prior': {'steps': 3}} given, must be left out"),
        (["--stages.prior.steps"], "--stages.prior.steps: expected one argument"),
        (["--stages.prior.steps", "--resume"], "--stages.prior.steps: expected one argument"),
        (["--stages.prior.optim.lr", "[1"], "[1: not readable as YAML"),
        (["--stages.prior.steps", "3", "--stages.prior.steps.x", "3"], "steps is 3, which holds no keys"),
        (["--model.name", "shrvqvae", "--stages.prio.steps", "3"], "did you mean 'stages.prior'?"),
    ],
)
def test_bad_options_are_refused(refused, out, args, message):
    assert message in refused("train", *TINY, "--out", out, *args)
    assert not out.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim: {lrr: 1}", "unknown key 'optim.lrr'; did you mean 'optim.lr'?"),
        ("stepz: 1", "unknown key 'stepz'; did you mean 'steps'?"),
        ("optim: 3", "optim: 3 given, must hold keys of its own"),
        ("steps: [1, 2]", "steps"),
        ("- 1", "must hold keys and values, got list"),
        ("a: {", "not readable as YAML"),
        ("", "must hold keys and values"),
    ],
)
def test_bad_files_are_refused(refused, out, tmp_path, text, message):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    assert message in refused("train", "--config", path, "--out", out)
    assert not out.exists()


def test_a_folder_in_use_is_refused(refused, out):
    out.mkdir()
    (out / "precious").write_text("x")
    assert "is not empty; --resume" in refused("train", *TINY, "--out", out)
    assert [path.name for path in out.iterdir()] == ["precious"]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_ends(out, signum):
    """One that comes to all processes, those that prepare clips too, as from a terminal or a batch system."""
    args = [*TINY, "--steps", "100000", "--workers", "1", "--out", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-m", "vpfast", "train", *args],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    log, patience = out / "log.jsonl", time.monotonic() + 60
    while not (log.is_file() and log.stat().st_size > 200):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < patience
        time.sleep(0.05)
    os.killpg(process.pid, signum)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signum
    assert f"stopped by {signum.name}" in err.splitlines()[-1]
    steps = len(log.read_text().splitlines())
    assert [path.name for path in (out / "checkpoints").iterdir()] == [f"step-{steps:08d}"]
    assert not (out / "weights").exists()
