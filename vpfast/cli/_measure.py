"""What the commands share that measure trained models on the same clips: which models, which clips, and how."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils.data import Dataset

from vpfast.cli._options import Options
from vpfast.cli._video import WEIGHTS_HELP
from vpfast.data.moving_digits import Split
from vpfast.metrics import PROTOCOLS, VideoMetrics
from vpfast.metrics.video_metrics import HEADINGS
from vpfast.training.checkpoint import read_weights
from vpfast.training.clips import dataset
from vpfast.training.config import DataConfig, TrainConfig, from_dict
from vpfast.training.device import Device
from vpfast.training.evaluation import Evaluation, evaluate, together
from vpfast.training.network import check_fit
from vpfast.training.recipes import BASELINE, MODEL, Recipe, Sampling, recipe_of

DIGIT_CLIPS = 1000
TAKEN = ("", "truth", BASELINE)
"""What no model can be called."""


class Measured(NamedTuple):
    """The models by name, that of ``--weights`` first; how much they are shown of which data; how they choose."""

    models: dict[str, nn.Module]
    config: TrainConfig
    sampling: Sampling

    @property
    def recipe(self) -> Recipe:
        """Of the model of ``--weights``."""
        return recipe_of(next(iter(self.models.values())))

    def titled(self, evaluation: Evaluation) -> dict[str, nn.Module]:
        """The models by what the evaluation calls that which is judged of them."""
        first, *others = self.models.items()
        return {evaluation.judged: first[1], **dict(others)}


def read_first(argv: Sequence[str]) -> tuple[nn.Module | None, TrainConfig | None]:
    """The model of ``--weights`` and how it was trained, which gives the other options their defaults.

    None where ``--weights`` is missing or ``--help`` is asked for.
    """
    if "-h" in argv or "--help" in argv:
        return None, None
    for arg, following in zip(argv, [*argv, ""][1:], strict=True):
        name, equals, value = arg.partition("=")
        if name == "--weights":
            return read_weights(Path(value if equals else following), nn.Module)
    return None, None


def add_measuring_options(options: Options, model: nn.Module | None, trained: TrainConfig | None) -> None:
    """All that decides what is measured and how; not what becomes of the result."""
    horizon = 10 if model is None or recipe_of(model).predicts else 0
    options.add("weights", str, None, f"{WEIGHTS_HELP}; the options below default to its own")
    options.add("name", str, MODEL, "label of this model in the results")
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
    options.add_config(DataConfig, "data.", trained.data if trained else None)


def add_protocol_options(options: Options) -> None:
    """By which rules it is measured."""
    options.add("protocol", str | None, None, f"the rules of which project: {', '.join(PROTOCOLS)} (default: default)")
    options.add("lpips", bool, False, "measure LPIPS too, which needs the extra vpfast[lpips]")


def required(model: nn.Module | None) -> nn.Module:
    """The model; raises ValueError where :func:`read_first` found none."""
    if model is None:
        raise ValueError("--weights is missing: the folder of a trained model, such as runs/moving-digits/weights")
    return model


def measured(values: dict[str, Any], model: nn.Module | None) -> Measured:
    """What :func:`add_measuring_options` gave, with the models that stand beside the first one.

    Raises:
        ValueError, FileNotFoundError: what cannot be, or does not go together; names the key.
    """
    model = required(model)
    config, sampling = _checked(values)
    if values["name"] in TAKEN:
        raise ValueError(f"name: {values['name']!r} given, must be another name")
    models = {values["name"]: model} | _beside(values["beside"], values["name"])
    for name, each in models.items():
        with _named("" if each is model else f"beside.{name}: "):
            _check(each, config, sampling)
    return Measured(models, config, sampling)


def held_out(values: dict[str, Any], config: TrainConfig) -> Dataset[Tensor]:
    """The clips of ``--split``, (T, C, H, W) in [0, 1]: of moving digits so many, of videos all unless told."""
    count = values["clips"] or (DIGIT_CLIPS if config.data.kind == "moving-digits" else None)
    return dataset(config.data, values["split"], config.clip_length, count, config.seed)


def evaluated(subject: Measured, clips: Dataset[Tensor], values: dict[str, Any]) -> Evaluation:
    """All models on the same clips, side by side."""
    given = (subject.config.context, subject.config.batch_size, True, values["device"], subject.sampling)
    asked = (values["protocol"] or "default", values["lpips"])
    evaluations = {name: evaluate(model, clips, *given, *asked) for name, model in subject.models.items()}
    return evaluations[MODEL] if list(evaluations) == [MODEL] else together(evaluations)


def frame_errors(evaluation: Evaluation) -> dict[str, dict[str, list[float]]]:
    """Heading of a metric -> title of a report -> its values frame by frame; of a mean and a sum the mean alone."""
    names = list(evaluation.reports[evaluation.judged].per_frame)
    kept = [name for name in names if name.removesuffix("_sum") not in names or not name.endswith("_sum")]
    return {
        HEADINGS[name]: {title: report.per_frame[name] for title, report in evaluation.reports.items()} for name in kept
    }


def errors(made: Tensor, real: Tensor) -> dict[str, float]:
    """The means of the default protocol over the frames of one clip, (T, C, H, W)."""
    metrics = VideoMetrics()
    metrics.update(made[None], real[None])
    return metrics.compute().mean


def _beside(folders: dict[str, Any], first: str) -> dict[str, nn.Module]:
    """The other models to measure, by the names that they were given."""
    models: dict[str, nn.Module] = {}
    for name, folder in folders.items():
        if name in (first, *TAKEN) or not isinstance(folder, str):
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


def _checked(values: dict[str, Any]) -> tuple[TrainConfig, Sampling]:
    """The part of a run's configuration that measuring uses; ValueError names the key that cannot be."""
    for key, lowest in (("clips", 1), ("futures", 1), ("top_k", 1), ("temperature", 0)):
        if values[key] is not None and not values[key] >= lowest:
            raise ValueError(f"{key}: {values[key]} given, must be at least {lowest}")
    if values["protocol"] not in (None, *PROTOCOLS):
        raise ValueError(f"protocol: {values['protocol']!r} given, must be one of {', '.join(PROTOCOLS)}")
    kept = {key: values[key] for key in ("context", "horizon", "batch_size", "seed")}
    sampling = Sampling(**{key: values[key] for key in Sampling._fields})
    return TrainConfig(data=from_dict(DataConfig, values["data"]), val_every=0, **kept), sampling
