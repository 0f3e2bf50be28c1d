"""The network of a run, built from the ``model`` section of its configuration."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vpfast import models
from vpfast.models import MSPN, MSPNConfig
from vpfast.training.checkpoint import weights_of
from vpfast.training.config import DataConfig, unknown_key


def build_model(options: Mapping[str, Any], data: DataConfig) -> MSPN:
    """A new model with random weights.

    Args:
        options: ``name`` (``mspn``), optionally ``preset``, and any field of the model's configuration. Without
            ``in_channels`` the model takes ``data.channels``.
        data: the clips it is for.

    Raises:
        ValueError: an unknown key or name, a value that cannot be, or frames that do not fit; names the key.
    """
    fields = dict(options)
    name = fields.pop("name", "mspn")
    if name != "mspn":
        raise ValueError(f"model.name: {name!r} given, must be 'mspn'")
    preset = fields.pop("preset", "released-default")
    known = [field.name for field in dataclasses.fields(MSPNConfig)]
    for key in fields:
        if key not in known:
            raise ValueError(unknown_key(f"model.{key}", [f"model.{each}" for each in ("name", "preset", *known)]))
    fields.setdefault("in_channels", data.channels)
    try:
        config = MSPNConfig.preset(preset, **fields)
    except ValueError as error:
        raise ValueError(f"model: {error}") from error
    check_fit(config, data)
    return MSPN(config)


def check_fit(config: MSPNConfig, data: DataConfig) -> None:
    """Raise ValueError, which names the key, where the network cannot take these frames."""
    if config.in_channels != data.channels:
        raise ValueError(f"data.channels: {data.channels} given, but the model's in_channels is {config.in_channels}")
    for side in data.frame_size:
        if side % config.multiple:
            raise ValueError(f"data.size: {side} given, must be a multiple of {config.multiple} for this model")


def start_from(model: MSPN, folder: str) -> None:
    """Put the weights in ``folder`` into ``model``.

    Raises:
        FileNotFoundError, ValueError: no model there, or another one than ``model``; the message names the folder.
    """
    other = models.load(weights_of(Path(folder)))
    if other.config != model.config:
        raise ValueError(f"init: the weights in {folder} are of {other.config}, this run's model is {model.config}")
    model.load_state_dict(other.state_dict())
