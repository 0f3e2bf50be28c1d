"""``vpfast evaluate``: the errors of a trained model on held-out clips, beside what to hold it to."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from vpfast.cli._options import Options
from vpfast.cli._out import check_out_file
from vpfast.data.moving_digits import Split
from vpfast.training.checkpoint import read_weights
from vpfast.training.clips import dataset
from vpfast.training.config import DataConfig, TrainConfig, from_dict
from vpfast.training.device import Device
from vpfast.training.evaluation import evaluate
from vpfast.training.files import write_file
from vpfast.training.network import check_fit
from vpfast.training.recipes import recipe_of

DESCRIPTION = (
    "Measure a trained model on the test split of the data it was trained on, or of other data by --data.*: MSE, MAE, "
    "PSNR and SSIM under vpfast's default protocol. Of a model that predicts per frame and mean, beside repeating the "
    "last real frame; of one that codes frames for each number of layers, and how much of the codebooks is used. "
    "Prints markdown; --out writes JSON."
)

DIGIT_CLIPS = 1000


def run(argv: Sequence[str]) -> int:
    """Evaluate; returns 0."""
    weights = _weights(argv)
    model, trained = (None, None) if weights is None else read_weights(weights, nn.Module)
    predicts = model is None or recipe_of(model).predicts
    values = _options(trained, horizon=10 if predicts else 0).parse(argv)
    if model is None:
        raise ValueError("--weights is missing: the folder of a trained model, such as runs/moving-digits/weights")
    config = _checked(values)
    if values["out"]:
        check_out_file(Path(values["out"]), force=True)
    recipe = recipe_of(model)
    recipe.check(config)
    check_fit(model.config, config.data)  # type: ignore[arg-type]
    count = values["clips"] or (DIGIT_CLIPS if config.data.kind == "moving-digits" else None)
    clips = dataset(config.data, values["split"], config.clip_length, count, config.seed)
    evaluation = evaluate(model, clips, config.context, config.batch_size, progress=True, device=values["device"])
    asked = {key: values[key] for key in ("weights", "split", "context", "horizon")}
    asked["clips"] = len(clips)  # type: ignore[arg-type]
    task = "{horizon} frames from {context}" if recipe.predicts else "{context} frames each, coded and made again"
    print(f"{{clips}} clips of the {{split}} split, {task}, protocol default\n".format(**asked))
    print(evaluation.markdown(per_frame=recipe.predicts))
    if values["out"]:
        write_file(Path(values["out"]), json.dumps({**asked, **evaluation.to_dict()}, indent=2) + "\n")
    return 0


def _weights(argv: Sequence[str]) -> Path | None:
    """``--weights`` is looked for first: how those weights were trained gives the other options their defaults."""
    if "-h" in argv or "--help" in argv:
        return None
    for arg, following in zip(argv, [*argv, ""][1:], strict=True):
        name, equals, value = arg.partition("=")
        if name == "--weights":
            return Path(value if equals else following)
    return None


def _options(trained: TrainConfig | None, horizon: int) -> Options:
    options = Options("vpfast evaluate", DESCRIPTION)
    options.add("weights", str, None, "a folder of weights, or a checkpoint; the options below default to its own")
    options.add("split", Split, "test", "which clips")
    options.add("context", int, trained.context if trained else 10, "real frames the model is given")
    options.add("horizon", int, trained.horizon if trained else horizon, "frames it predicts, if it does")
    options.add("clips", int | None, None, f"how many clips (default: {DIGIT_CLIPS} of moving digits, all of videos)")
    options.add("batch_size", int, 8, "clips at a time")
    options.add("seed", int, trained.seed if trained else 0, "moving-digits: decides the clips")
    options.add("device", Device, "auto", "auto takes the GPU if there is one that every operator can run on")
    options.add("out", str | None, None, "a JSON file to write the numbers to")
    options.add_config(DataConfig, "data.", trained.data if trained else None)
    return options


def _checked(values: dict[str, Any]) -> TrainConfig:
    """The part of a run's configuration that an evaluation uses; ValueError names the key that cannot be."""
    if values["clips"] is not None and values["clips"] < 1:
        raise ValueError(f"clips: {values['clips']} given, must be at least 1")
    kept = {key: values[key] for key in ("context", "horizon", "batch_size", "seed")}
    return TrainConfig(data=from_dict(DataConfig, values["data"]), val_every=0, **kept)
