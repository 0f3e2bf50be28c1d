"""Checkpoints: all that a run needs to go on as if it had never stopped.

A checkpoint is a folder ``step-00000500`` that holds the model as :func:`vpfast.models.save` writes it and
``state.pt``, which is read with ``weights_only=True``: tensors and plain values, nothing that can run code.
"""

import json
import math
import random
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vpfast import models
from vpfast.models.storage import CONFIG, WEIGHTS
from vpfast.training.config import TrainConfig, from_dict, to_dict
from vpfast.training.files import new_folder

_TRAINING = "training.json"
WEIGHTS_FILES = frozenset({CONFIG, WEIGHTS, _TRAINING})
_NAME = re.compile(r"step-(\d{8})")

M = TypeVar("M", bound=nn.Module)


class Networks(NamedTuple):
    """The networks of a run: its model, and those that its update trains beside it, by name."""

    model: nn.Module
    others: Mapping[str, nn.Module] = {}


@dataclass
class State:
    """What a checkpoint holds beside the weights. The position in the data follows from ``step``.

    ``best`` is the least error on the validation clips so far.
    """

    step: int
    optimizers: dict[str, dict[str, Any]]
    scaler: dict[str, Any]
    random: dict[str, Any]
    best: float = math.inf


def save(root: Path, networks: Networks, state: State, config: TrainConfig) -> Path:
    """Write ``root/step-NNNNNNNN`` and delete all but the last ``config.keep`` checkpoints."""
    path = root / f"step-{state.step:08d}"
    with new_folder(path, replace=True) as folder:
        write_weights(folder, networks.model, config)
        for name, network in networks.others.items():
            save_file(_on_cpu(network), folder / _file_of(name))
        torch.save(vars(state), folder / "state.pt")
    for old in found(root)[: -config.keep]:
        shutil.rmtree(old)
    return path


def write_weights(folder: Path, model: nn.Module, config: TrainConfig) -> None:
    """The model, and beside it how it was trained: the size of its frames, its context, where its clips came from."""
    models.save(model, folder)
    (folder / _TRAINING).write_text(json.dumps(to_dict(config), indent=2) + "\n")


def read_weights(folder: Path, *kinds: type[M]) -> tuple[M, TrainConfig | None]:
    """The model in ``folder``, or in ``weights`` of a run's folder, and how it was trained where that is known.

    Raises:
        FileNotFoundError, ValueError: no model, a damaged one, or of none of ``kinds``; the message names the file.
    """
    folder = weights_of(folder)
    model = models.load(folder)
    if not isinstance(model, kinds):
        names = " or ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"{folder} holds a trained {type(model).__name__}, must be a {names}")
    path = folder / _TRAINING
    if not path.is_file():
        return model, None
    try:
        return model, from_dict(TrainConfig, json.loads(path.read_text()))
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} does not describe a training run: {error}") from error


def weights_of(folder: Path) -> Path:
    """``folder``, or where it is that of a finished run the one in it that holds the model."""
    inside = folder / "weights"
    return inside if inside.is_dir() and not (folder / CONFIG).exists() else folder


def found(root: Path) -> list[Path]:
    """The whole checkpoints in ``root``, oldest first."""
    if not root.is_dir():
        return []
    return sorted(path for path in root.iterdir() if _NAME.fullmatch(path.name))


def step_of(path: Path) -> int:
    """After how many steps the checkpoint at ``path`` was saved."""
    return int(path.name.partition("-")[2])


def load(path: Path, networks: Networks) -> State:
    """Put the weights at ``path`` into ``networks`` and return the rest.

    Raises:
        ValueError: a file is missing, damaged, or of another model; the message names the folder.
    """
    try:
        networks.model.load_state_dict(load_file(path / WEIGHTS))
        for name, network in networks.others.items():
            network.load_state_dict(load_file(path / _file_of(name)))
        state = State(**torch.load(path / "state.pt", map_location="cpu", weights_only=True))
    except Exception as error:  # safetensors, zipfile, pickle and torch each fail in their own way
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"the checkpoint {path} cannot be read ({reason}); delete it to go on from the one before"
        ) from error
    return state


def _file_of(name: str) -> str:
    return f"{name}.safetensors"


def _on_cpu(network: nn.Module) -> dict[str, Tensor]:
    return {key: tensor.detach().cpu().contiguous() for key, tensor in network.state_dict().items()}


def random_state() -> dict[str, Any]:
    """The state of every generator a run may draw from, as tensors and plain values."""
    kind, words, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(words).astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Undo :func:`random_state`. CUDA generators are set where there are as many devices as when it was saved."""
    random.setstate(state["python"])
    kind, words, *rest = state["numpy"]
    np.random.set_state((kind, words.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
