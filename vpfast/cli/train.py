"""``vpfast train``: from a YAML file and dotted options to a folder of weights."""

import os
from collections.abc import Sequence
from pathlib import Path

import yaml

from vpfast.cli._denormals import denormals_as_zero
from vpfast.cli._options import Options
from vpfast.training import TrainConfig, train
from vpfast.training.config import from_dict, to_dict
from vpfast.training.dry_run import dry_run, report

DESCRIPTION = (
    "Train a model. Options override the YAML file, e.g. --config mspn/moving-digits --optim.lr 3e-4 "
    "--model.hidden_channels 16. The run's folder receives config.yaml, log.jsonl, checkpoints/, weights/, curves.png."
)


def run(argv: Sequence[str]) -> int:
    """Train; returns 0 when the weights are written."""
    options = Options("vpfast train", DESCRIPTION)
    options.add_config(TrainConfig)
    options.add_flag("resume", "go on with the run in --out, with its own config.yaml if no --config is given")
    options.add_flag("dry-run", "print the configuration, parameters, memory and FLOPs; read no data, write nothing")
    values = options.parse(argv)
    given = {arg.partition("=")[0] for arg in argv if arg.startswith("--")}
    if values["resume"] and "--config" not in given:
        before = Path(values["out"]) / "config.yaml"
        if before.is_file():
            values = options.parse(["--config", str(before), *argv])
        elif given <= {"--resume", "--out"}:
            raise ValueError(f"--resume: there is no {before}, so no run to go on with; say where, or what to train")
    resume, dry = values.pop("resume"), values.pop("dry_run")
    config = from_dict(TrainConfig, values)
    if dry:
        return _tell(config)
    with denormals_as_zero():
        weights = train(config, resume=resume)
    if os.environ.get("RANK", "0") == "0":  # one process of several speaks for all
        print(f"weights: {weights}")
    return 0


def _tell(config: TrainConfig) -> int:
    costs = dry_run(config)
    print(yaml.safe_dump(to_dict(config), sort_keys=False))
    print(report(costs))
    return 0
