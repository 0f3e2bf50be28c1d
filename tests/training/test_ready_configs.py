"""Every command that a packaged MSPN configuration gives in its head, and every ablation of Tables VI and VII."""

import itertools
import json
import shlex
from pathlib import Path

import pytest
import torch

import vpfast
from vpfast.cli._options import Options
from vpfast.training import TrainConfig
from vpfast.training.adversarial import build_discriminator
from vpfast.training.config import from_dict, to_dict
from vpfast.training.network import build_model

FILES = sorted((Path(vpfast.__file__).parent / "configs" / "mspn").glob("*.yaml"))
SMALL = "--config mspn/one-digit "  # the network that comes trained
COMMANDS = [
    line.removeprefix("#   vpfast train ")
    for path in FILES
    for line in path.read_text().splitlines()
    if line.startswith("#   vpfast train ")
]


def loaded(args):
    options = Options("test", "")
    options.add_config(TrainConfig)
    return from_dict(TrainConfig, options.parse(args))


def built(config):
    """How many parameters the networks of a run have: (model, discriminator). No memory is taken for them."""
    with torch.device("meta"):
        networks = [build_model(config), *([build_discriminator(config)] if config.adversarial.enabled else [])]
        frames = torch.zeros(2, config.data.channels, *config.data.frame_size)
        for judge in networks[1:]:
            assert judge(frames).shape == (2,)
    counts = [sum(parameter.numel() for parameter in network.parameters()) for network in networks]
    return counts[0], sum(counts[1:])


def test_rows_of_table_6_differ_in_their_network_alone():
    runs = [loaded(["--config", f"mspn/{row}", "--out", "run"]) for row in ("table-6", "wo_encinfo", "enc_lstm_dec")]
    assert len({json.dumps(run.model) for run in runs}) == 3
    assert len({json.dumps({**to_dict(run), "model": {}}) for run in runs}) == 1


def test_every_file_gives_a_command():
    assert len(FILES) >= 6
    for path in FILES:
        assert any(command.startswith(f"--config mspn/{path.stem} ") for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_in_the_files_are_valid(command):
    model, _ = built(loaded(shlex.split(command)))
    assert model > 10_000_000 or (SMALL in command and model < 300_000)


def test_table_1():
    config = loaded(["--config", "mspn/table-1", "--data.root", "x"])
    given = config.adversarial
    assert (config.optim.lr, given.lr, given.weight) == (1e-3, 1e-7, 100.0)
    assert (given.upper_tolerance, given.lower_tolerance, given.window) == (1 / 100, 1 / 50, 3)
    assert (config.context, config.loss.level_weights, given.loss) == (10, "paper", "least_squares")
    with torch.device("meta"):
        model = build_model(config)
    assert (model.config.levels, model.config.hidden_channels) == (4, 64)


# Registered parameters of the authors' code less those that its graph never uses: see the models' README.
@pytest.mark.parametrize(
    ("row", "parameters"),
    [
        ("table-6", 20_314_595),
        ("wo_encinfo", 15_890_915),
        ("enc_lstm_dec", 46_833_219),
    ],
)
def test_rows_of_table_6_with_and_without_each_strategy(row, parameters):
    for feedback, adversarial in itertools.product(("fixed", "none"), ("true", "false")):
        config = loaded(["--config", f"mspn/{row}", "--loss.feedback", feedback, "--adversarial.enabled", adversarial])
        model, discriminator = built(config)
        assert (config.loss.feedback, model, discriminator > 0) == (feedback, parameters, adversarial == "true")


@pytest.mark.parametrize("data", ["kth", "caltech", "kitti"])
@pytest.mark.parametrize(("feedback", "adversarial"), [("fixed", "true"), ("fixed", "false"), ("none", "false")])
def test_rows_of_table_7(data, feedback, adversarial):
    args = ["--config", f"mspn/{data}", "--data.root", "x"]
    config = loaded([*args, "--loss.feedback", feedback, "--adversarial.enabled", adversarial])
    _, discriminator = built(config)
    assert (config.loss.feedback, discriminator > 0) == (feedback, adversarial == "true")
