"""Checkpoints: all that a run needs to go on as if it had never stopped.

A checkpoint is a folder ``step-00000500`` that holds the model as :func:`vpfast.models.save` writes it, every other
network as ``NAME.safetensors``, ``state.pt``, which is read with ``weights_only=True``: tensors and plain values,
nothing that can run code; and ``checkpoint.json``, which tells how far the run is and the SHA-256 of every other file,
so that damage is seen.
"""

import hashlib
import io
import json
import math
import random
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from vpfast import models
from vpfast._files import new_folder
from vpfast.models.storage import CONFIG, TRAINING, WEIGHTS, as_files, folder_of, read_tensors
from vpfast.training.config import TrainConfig, from_dict, to_dict

_STATE, _PROGRESS = "state.pt", "checkpoint.json"
WEIGHTS_FILES = frozenset({CONFIG, WEIGHTS, TRAINING})
_NAME = re.compile(r"step-(\d{8})")

M = TypeVar("M", bound=nn.Module)


class Stateful(Protocol):
    """What a checkpoint can hold as a file of tensors."""

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> Any: ...


class Networks(NamedTuple):
    """The networks of a run: its model, and what else has weights, by name."""

    model: nn.Module
    others: Mapping[str, Stateful] = {}


class Progress(NamedTuple):
    """How far a run is. The position in the data follows from ``step``, the steps that it has behind it.

    ``best`` is the least error on the validation clips so far, ``stale`` how many validations have not improved on it.
    """

    step: int
    best: float = math.inf
    stale: int = 0


@dataclass
class State:
    """What a checkpoint holds beside the weights. ``random``: the random state of every process."""

    progress: Progress
    optimizers: dict[str, dict[str, Any]]
    scaler: dict[str, Any]
    random: list[dict[str, Any]]


def save(root: Path, networks: Networks, state: State, config: TrainConfig) -> Path:
    """Write ``root/step-NNNNNNNN`` and delete all but the last ``config.keep`` checkpoints.

    Raises:
        OSError: there is no room, or no permission; then nothing is deleted.
    """
    path = root / f"step-{state.progress.step:08d}"
    with new_folder(path, replace=True) as folder:
        write_weights(folder, networks.model, config)
        for name, network in networks.others.items():
            (folder / _file_of(name)).write_bytes(safetensors.torch.save(_on_cpu(network)))
        # By way of memory, since torch.save tells of a full disk in its own words.
        held = io.BytesIO()
        torch.save({"optimizers": state.optimizers, "scaler": state.scaler, "random": state.random}, held)
        (folder / _STATE).write_bytes(held.getbuffer())
        digests = {each.name: _digest(each) for each in sorted(folder.iterdir())}
        described = {**state.progress._asdict(), "sha256": digests}
        (folder / _PROGRESS).write_text(json.dumps(described, indent=2) + "\n")
    for old in found(root)[: -config.keep]:
        shutil.rmtree(old)
    return path


def write_weights(folder: Path, model: nn.Module, config: TrainConfig) -> None:
    """The model as :func:`vpfast.models.save` writes it, and beside it how it was trained: the size of its frames, its
    context, where its clips came from. Into a folder that nobody reads yet, made where it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in as_files(model).items():
        (folder / name).write_bytes(data)
    (folder / TRAINING).write_text(json.dumps(to_dict(config), indent=2) + "\n")


def read_weights(folder: Path, *kinds: type[M]) -> tuple[M, TrainConfig | None]:
    """The model in ``folder``, or in ``weights`` of a run's folder, and how it was trained where that is known.

    ``folder`` may be the name of a model that comes with the package.

    Raises:
        FileNotFoundError, ValueError: no model, a damaged one, or of none of ``kinds``; the message names the file.
    """
    folder = weights_of(folder)
    model = models.load(folder)
    if not isinstance(model, kinds):
        names = " or ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"{folder} holds a trained {type(model).__name__}, this needs an {names}")
    return model, read_training(folder)


def read_training(folder: Path) -> TrainConfig | None:
    """How the model in ``folder`` was trained, or that in ``weights`` of a run's folder; None where it is not known.

    Raises:
        ValueError: the file that says so is damaged; the message names it.
    """
    path = weights_of(folder) / TRAINING
    if not path.exists():
        return None
    if not path.is_file():
        raise ValueError(f"{path} does not describe a training run: it is not a file")
    try:
        return from_dict(TrainConfig, json.loads(path.read_text()))
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} does not describe a training run: {error}") from error


def weights_of(folder: Path) -> Path:
    """The folder that holds the model: ``folder``, in that of a finished run the one inside, or that of a model of the
    package of this name."""
    folder = folder_of(folder)
    inside = folder / "weights"
    return inside if inside.is_dir() and not (folder / CONFIG).exists() else folder


def found(root: Path) -> list[Path]:
    """The checkpoints in ``root``, oldest first. Each was whole when it was written."""
    if not root.is_dir():
        return []
    return sorted(path for path in root.iterdir() if _NAME.fullmatch(path.name))


def step_of(path: Path) -> int:
    """After how many steps the checkpoint at ``path`` was saved."""
    return int(path.name.partition("-")[2])


def damage(path: Path) -> str | None:
    """What is wrong with the files of the checkpoint at ``path``, in words; None where all are as they were written."""
    try:
        digests = json.loads((path / _PROGRESS).read_text())["sha256"]
        for name, digest in digests.items():
            if not (path / name).is_file():
                return f"{name} is missing"
            if _digest(path / name) != digest:
                return f"{name} is not what was written"
        progress_of(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{_PROGRESS} cannot be read: {' '.join(str(error).split())}"
    return None


def set_aside(path: Path) -> None:
    """Rename a damaged checkpoint, so that it is none any more."""
    aside = path.with_name(f"{path.name}.damaged")
    if aside.exists():
        shutil.rmtree(aside)
    path.rename(aside)


def progress_of(path: Path) -> Progress:
    """How far the run was at the checkpoint at ``path``.

    Raises:
        OSError, ValueError, KeyError, TypeError: it is damaged.
    """
    described = json.loads((path / _PROGRESS).read_text())
    return Progress(int(described["step"]), float(described["best"]), int(described["stale"]))


def load(path: Path, networks: Networks) -> State:
    """Put the weights at ``path`` into ``networks`` and return the rest.

    Raises:
        ValueError: a file is missing, damaged, or of another model; the message names the folder.
    """
    try:
        networks.model.load_state_dict(read_tensors(path / WEIGHTS))
        for name, network in networks.others.items():
            network.load_state_dict(read_tensors(path / _file_of(name)))
        rest = torch.load(path / _STATE, map_location="cpu", weights_only=True)
        return State(progress_of(path), **rest)
    except Exception as error:  # safetensors, zipfile, pickle and torch each fail in their own way
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"the checkpoint {path} cannot be read ({reason}); delete it to go on from the one before"
        ) from error


def _digest(path: Path) -> str:
    made = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**20):
            made.update(part)
    return made.hexdigest()


def _file_of(name: str) -> str:
    return f"{name}.safetensors"


def _on_cpu(network: Stateful) -> dict[str, Tensor]:
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
