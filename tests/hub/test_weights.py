"""The models that come with the package: found by name from everywhere, small, and as good as their cards say."""

import math
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Subset

import vpfast.cli
from vpfast.cli._options import Options
from vpfast.metrics import VideoMetrics
from vpfast.models import MSPN, SHRVQVAE, load, pretrained
from vpfast.models.storage import PRETRAINED, folder_of
from vpfast.training import TrainConfig, checkpoint, train
from vpfast.training.clips import dataset
from vpfast.training.config import from_dict
from vpfast.training.stages import runs_of

CLASSES = {"mspn-one-digit": MSPN, "shrvqvae-one-digit": SHRVQVAE}
ROOT = Path(__file__).parents[2]
CLIP = ROOT / "assets" / "one-digit.gif"
CLIPS, CONTEXT, HORIZON = 40, 10, 10


def test_all_of_them_are_known():
    assert pretrained() == sorted(CLASSES)


@pytest.mark.parametrize("name", CLASSES)
def test_files_and_sizes(name):
    sizes = {path.name: path.stat().st_size for path in folder_of(name).iterdir()}
    assert set(sizes) == {"README.md", "config.json", "model.safetensors", "training.json"}
    assert sum(sizes.values()) < 1_100_000


@pytest.mark.parametrize("name", CLASSES)
def test_found_by_name(name):
    model = CLASSES[name].from_pretrained(name)
    assert type(load(name)) is CLASSES[name]
    assert not model.training
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    read, trained = checkpoint.read_weights(Path(name), nn.Module)
    assert type(read) is CLASSES[name]
    assert trained is not None
    assert (trained.context, trained.horizon, trained.data.frame_size) == (CONTEXT, HORIZON, (32, 32))


def test_what_lies_here_comes_before_what_is_packaged(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(PRETRAINED / "shrvqvae-one-digit", tmp_path / "mspn-one-digit")
    assert isinstance(load("mspn-one-digit"), SHRVQVAE)


def test_a_name_is_no_path_into_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("mspn-one-digit/../shrvqvae-one-digit", "mspn-one-digit/config.json", "/mspn-one-digit"):
        with pytest.raises(FileNotFoundError, match="does not exist"):
            load(name)


def test_what_there_is_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"x does not exist; .*, or one of {', '.join(CLASSES)}$"):
        load(tmp_path / "x")
    with pytest.raises(FileNotFoundError, match=rf"init: nothing given, .*, or one of {', '.join(CLASSES)}$"):
        train(TrainConfig(out=str(tmp_path / "run"), init="nothing"))


def command_of(name):
    """The words after ``vpfast train`` in the card."""
    (command,) = re.findall(r"^vpfast train (.*)$", (folder_of(name) / "README.md").read_text(), re.MULTILINE)
    return shlex.split(command)


def options():
    options = Options("test", "")
    options.add_config(TrainConfig)
    return options


@pytest.mark.parametrize("name", CLASSES)
def test_the_card_gives_the_command_that_trained_it(name):
    """Of a configuration in the repository, and its seed: what training.json holds, but for where it was written."""
    config = from_dict(TrainConfig, options().parse(command_of(name)))
    asked, trained = runs_of(config).get("joint", config), checkpoint.read_training(Path(name))
    assert trained is not None
    assert replace(trained, out=asked.out) == asked
    assert f"Seed {trained.seed}, " in (folder_of(name) / "README.md").read_text()


SHORTER = {
    "mspn-one-digit": ("--steps=2", "--optim.warmup=1", "--batch_size=2", "--context=2", "--horizon=2"),
    "shrvqvae-one-digit": (
        *(
            f"--stages.{stage}.{key}"
            for stage in ("autoencoder", "prior", "joint")
            for key in ("steps=2", "optim.warmup=1", "batch_size=2", "context=2")
        ),
        "--stages.prior.horizon=2",
        "--stages.joint.horizon=2",
    ),
}


@pytest.mark.parametrize("name", CLASSES)
def test_the_command_of_the_card_gives_the_same_weights_again(name, tmp_path):
    """Shortened: in this process and in one of its own, with the same number of threads."""
    pytest.importorskip("sklearn", reason="needs scikit-learn's digits: pip install 'vpfast[demo]'")
    words = ["train", *command_of(name), *SHORTER[name], "--device=cpu"]
    assert vpfast.cli.main([*words, f"--out={tmp_path / 'here'}"]) == 0
    command = [sys.executable, "-m", "vpfast", *words, f"--out={tmp_path / 'there'}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    one, other = (load(tmp_path / place / "weights").state_dict() for place in ("here", "there"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    asked = from_dict(TrainConfig, options().parse([*command_of(name), *SHORTER[name], "--seed=1", "--device=cpu"]))
    moved = load(train(replace(asked, out=str(tmp_path / "another")), progress=False)).state_dict()
    assert not all(torch.equal(one[key], moved[key]) for key in one)


def card_figures(name):
    """The measured rows of the card: title -> metric -> mean."""
    lines = (folder_of(name) / "README.md").read_text().splitlines()
    (heading,) = [line for line in lines if line.startswith("| mean |")]
    titles = [cell.strip() for cell in heading.strip("|").split("|")[1:]]
    rows = {}
    for line in lines[lines.index(heading) + 2 :]:
        if not line.startswith("| "):
            break
        title, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        rows[title] = dict(zip(titles, map(float, cells), strict=True))
    return rows


@pytest.mark.parametrize("name", CLASSES)
def test_it_is_as_good_as_its_card_says(name):
    """On clips of the same test split as the card's, within four standard errors of so few."""
    pytest.importorskip("sklearn", reason="needs scikit-learn's digits: pip install 'vpfast[demo]'")
    told = card_figures(name)
    assert set(told) == {"prediction", "repeat last frame"}
    model, trained = checkpoint.read_weights(Path(name), MSPN, SHRVQVAE)
    assert trained is not None
    clips = Subset(dataset(trained.data, "test", CONTEXT + HORIZON, 1000, trained.seed), range(CLIPS))
    frames = torch.stack([clips[index] for index in range(CLIPS)])
    future = model.predict(frames[:, :CONTEXT], HORIZON)
    for title, made in {
        "prediction": future,
        "repeat last frame": frames[:, CONTEXT - 1, None].expand_as(future),
    }.items():
        found = [errors(made[index], frames[index, CONTEXT:]) for index in range(CLIPS)]
        for metric in ("mse", "ssim"):
            values = [each[metric] for each in found]
            spread = 4 * statistics.stdev(values) / math.sqrt(CLIPS)
            assert statistics.mean(values) == pytest.approx(told[title][metric], abs=spread), f"{title}: {metric}"
    assert told["prediction"]["mse"] < told["repeat last frame"]["mse"]


def errors(made, real):
    metrics = VideoMetrics()
    metrics.update(made[None], real[None])
    return metrics.compute().mean


@pytest.mark.parametrize("name", CLASSES)
def test_the_first_example_of_the_readme(name, tmp_path, monkeypatch, capsys):
    """A video is predicted at once, by a name."""
    pytest.importorskip("av", reason="needs PyAV: pip install 'vpfast[cli]'")
    monkeypatch.chdir(tmp_path)
    assert vpfast.cli.main(["predict", str(CLIP), "--weights", name, "--horizon", "4", "--out", "prediction"]) == 0
    assert f"4 frames predicted from 10 of {CLIP}: prediction" in capsys.readouterr().out
    made = np.load("prediction/prediction.npy")
    assert made.shape == (4, 1, 32, 32)
    assert {path.name for path in Path("prediction").iterdir()} >= {"prediction.gif", "strip.png"}


def test_training_goes_on_from_a_name(tmp_path):
    pytest.importorskip("sklearn", reason="needs scikit-learn's digits: pip install 'vpfast[demo]'")
    trained = checkpoint.read_training(Path("mspn-one-digit"))
    assert trained is not None
    kept = {key: getattr(trained, key) for key in ("model", "data")}
    config = TrainConfig(
        **kept,
        out=str(tmp_path / "run"),
        init="mspn-one-digit",
        context=2,
        horizon=1,
        steps=1,
        batch_size=1,
        val_every=0,
    )
    moved = load(train(config, progress=False)).state_dict()
    start = load("mspn-one-digit").state_dict()
    assert all(torch.allclose(moved[key], value, atol=2e-3) for key, value in start.items())
    assert any(not torch.equal(moved[key], value) for key, value in start.items())
