"""``vpfast evaluate``: the errors of a trained model on held-out clips, beside what to hold it to."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
from vpfast.training.evaluation import evaluate, shown, together
from vpfast.training.files import write_file
from vpfast.training.network import check_fit
from vpfast.training.recipes import BASELINE, MODEL, Sampling, recipe_of
from vpfast.visual import write_strip

DESCRIPTION = (
    "Measure a trained model on the test split of the data it was trained on, or of other data by --data.*: MSE, MAE, "
    "PSNR and SSIM under vpfast's default protocol. Of a model that predicts per frame and mean, beside repeating the "
    "last real frame; of one that codes frames for each number of layers, and how much of the codebooks is used. "
    "--beside.NAME FOLDER measures other weights on the same clips. Prints markdown; --out writes JSON, --strip a PNG."
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
    config, sampling = _checked(values)
    for key in ("out", "strip"):
        if values[key]:
            check_out_file(Path(values[key]), force=True, option=key)
    if values["strip"] and Path(values["strip"]).suffix.lower() != ".png":
        raise ValueError(f"--strip {values['strip']}: must end in .png")
    models = {MODEL: model} | _beside(values["beside"])
    for name, each in models.items():
        with _named("" if name == MODEL else f"beside.{name}: "):
            _check(each, config, sampling)
    recipe = recipe_of(model)
    count = values["clips"] or (DIGIT_CLIPS if config.data.kind == "moving-digits" else None)
    clips = dataset(config.data, values["split"], config.clip_length, count, config.seed)
    if values["strip_clip"] >= len(clips):  # type: ignore[arg-type]
        raise ValueError(f"strip_clip: {values['strip_clip']} given, must be below the {len(clips)} clips measured")  # type: ignore[arg-type]
    given = (config.context, config.batch_size, True, values["device"])
    evaluations = {name: evaluate(each, clips, *given, sampling=sampling) for name, each in models.items()}
    evaluation = together(evaluations) if len(models) > 1 else evaluations[MODEL]
    asked = {key: values[key] for key in ("weights", "split", "context", "horizon", "seed")}
    asked["clips"] = len(clips)  # type: ignore[arg-type]
    task = "{horizon} frames from {context}" if recipe.predicts else "{context} frames each, coded and made again"
    print(f"{{clips}} clips of the {{split}} split, {task}, protocol default\n".format(**asked))
    print(evaluation.markdown(per_frame=recipe.predicts))
    if values["out"]:
        write_file(Path(values["out"]), json.dumps({**asked, **evaluation.to_dict()}, indent=2) + "\n")
    if values["strip"]:
        clip = clips[values["strip_clip"]]
        rows = {name: shown(each, clip, config.context, values["device"], sampling) for name, each in models.items()}
        write_strip(values["strip"], {"truth": clip, **rows}, config.context if recipe.predicts else 0)
    return 0


def _beside(folders: dict[str, Any]) -> dict[str, nn.Module]:
    """The other models to measure, by the names that they were given."""
    models: dict[str, nn.Module] = {}
    for name, folder in folders.items():
        if name in (MODEL, BASELINE) or not isinstance(folder, str):
            raise ValueError(f"beside.{name}: {folder!r} given, must be --beside.NAME FOLDER with another name")
        with _named(f"beside.{name}: "):
            models[name], _ = read_weights(Path(folder), nn.Module)
    return models


def _check(model: nn.Module, config: TrainConfig, sampling: Sampling) -> None:
    """Raise ValueError where this model cannot be measured so; names the key."""
    recipe = recipe_of(model)
    recipe.check(config)
    recipe.check_sampling(sampling)
    check_fit(model.config, config.data)  # type: ignore[arg-type]


@contextmanager
def _named(prefix: str) -> Iterator[None]:
    """Puts ``prefix`` before what a refusal says."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(f"{prefix}{error}") from error


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
    options.add("temperature", float, 0.0, "S-HR-VQVAE: 0 takes the likeliest codes; above it they are drawn by seed")
    options.add("top_k", int | None, None, "S-HR-VQVAE: draw among so many codewords (default: all)")
    options.add("futures", int, 1, "S-HR-VQVAE: draw so many; the first one counts, the nearest one stands beside it")
    options.add("beside", dict[str, Any], {}, "other weights to measure on the same clips: --beside.NAME FOLDER")
    options.add("out", str | None, None, "a JSON file to write the numbers to")
    options.add("strip", str | None, None, "a PNG of one clip to write: what really happened, and what is predicted")
    options.add("strip_clip", int, 0, "which clip the strip shows, from 0")
    options.add_config(DataConfig, "data.", trained.data if trained else None)
    return options


def _checked(values: dict[str, Any]) -> tuple[TrainConfig, Sampling]:
    """The part of a run's configuration that an evaluation uses; ValueError names the key that cannot be."""
    for key, lowest in (("clips", 1), ("futures", 1), ("top_k", 1), ("temperature", 0), ("strip_clip", 0)):
        if values[key] is not None and not values[key] >= lowest:
            raise ValueError(f"{key}: {values[key]} given, must be at least {lowest}")
    kept = {key: values[key] for key in ("context", "horizon", "batch_size", "seed")}
    sampling = Sampling(**{key: values[key] for key in Sampling._fields})
    return TrainConfig(data=from_dict(DataConfig, values["data"]), val_every=0, **kept), sampling
