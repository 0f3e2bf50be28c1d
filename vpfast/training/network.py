"""The network of a run, built from the ``model`` section of its configuration."""

import dataclasses
from pathlib import Path
from typing import Protocol

from torch import nn

from vpfast import models
from vpfast.training.checkpoint import weights_of
from vpfast.training.config import DataConfig, TrainConfig, unknown_key
from vpfast.training.recipes import Recipe, recipe_named


class FrameSizes(Protocol):
    """What every model's configuration says about the frames that it takes."""

    @property
    def in_channels(self) -> int: ...

    @property
    def multiple(self) -> int: ...


def recipe_for(config: TrainConfig) -> Recipe:
    """How the model of this run is built, trained and measured.

    Raises:
        ValueError: no model or stage of that name, or settings that it has no use for; names the key.
    """
    recipe = recipe_named(config.model.get("name", "mspn"), config.stage)
    recipe.check(config)
    return recipe


def build_model(config: TrainConfig) -> nn.Module:
    """A new model with random weights, as ``config.model`` describes it.

    That holds ``name`` (``mspn`` where it is missing), optionally ``preset``, and any field of the model's own
    configuration. Without ``in_channels`` the model takes ``data.channels``.

    Raises:
        ValueError: an unknown key or name, a value that cannot be, or frames that do not fit; names the key.
    """
    recipe = recipe_for(config)
    fields = {key: value for key, value in config.model.items() if key != "name"}
    preset = fields.pop("preset", recipe.preset)
    known = [field.name for field in dataclasses.fields(recipe.config_class)]
    for key in fields:
        if key not in known:
            raise ValueError(unknown_key(f"model.{key}", [f"model.{each}" for each in ("name", "preset", *known)]))
    fields.setdefault("in_channels", config.data.channels)
    try:
        built = recipe.config_class.preset(preset, **fields)
    except ValueError as error:
        raise ValueError(f"model: {error}") from error
    check_fit(built, config.data)  # type: ignore[arg-type]
    return recipe.model_class(built)


def check_fit(config: FrameSizes, data: DataConfig) -> None:
    """Raise ValueError, which names the key, where the network cannot take these frames."""
    if config.in_channels != data.channels:
        raise ValueError(f"data.channels: {data.channels} given, but the model's in_channels is {config.in_channels}")
    for side in data.frame_size:
        if side % config.multiple:
            raise ValueError(f"data.size: {side} given, must be a multiple of {config.multiple} for this model")


def start_from(recipe: Recipe, model: nn.Module, folder: Path) -> None:
    """Put the weights in ``folder`` into ``model``.

    Raises:
        FileNotFoundError, ValueError: no model there, or one that ``model`` cannot start from; names the folder.
    """
    if (reason := recipe.take_over(model, models.load(weights_of(folder)))) is not None:
        raise ValueError(f"init: the weights in {folder} are {reason}")
