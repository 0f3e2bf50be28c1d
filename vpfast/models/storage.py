"""A model as a folder: ``model.safetensors`` beside ``config.json``. Nothing in it is ever unpickled.

Small trained models come with the package, each by a name that stands for its folder.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as deserialized
from safetensors.torch import save as serialized
from torch import Tensor, nn

from vpfast._files import new_file, remove_file
from vpfast._version import __version__

CONFIG, WEIGHTS = "config.json", "model.safetensors"
TRAINING = "training.json"  # beside them in what ``vpfast train`` writes: the configuration of the run
_UNDO = (
    "undo what was put on its layers, for example with torch.nn.utils.parametrize.remove_parametrizations, "
    "torch.nn.utils.remove_weight_norm or torch.nn.utils.prune.remove"
)
PRETRAINED = Path(__file__).parents[1] / "weights"


class _ModelClass(Protocol):
    def __call__(self, config: Any) -> nn.Module: ...


_kinds: dict[str, tuple[_ModelClass, type[Any]]] = {}

M = TypeVar("M", bound=nn.Module)


def storable(kind: str, config_class: type[Any]) -> Callable[[type[M]], type[M]]:
    """Class decorator: models of this class are saved under the name ``kind``.

    The class is built from one argument, an instance of the dataclass ``config_class``, and keeps it as ``config``.
    """

    def register(model_class: type[M]) -> type[M]:
        _kinds[kind] = (model_class, config_class)
        return model_class

    return register


def save(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write ``model`` into ``folder``, made where it is missing; other files in it are left alone.

    ``config.json`` holds ``{"model": kind, "config": {...}, "vpfast": version}``, ``model.safetensors`` every parameter
    and buffer in its own type. Both are written under temporary names, flushed to disk and renamed, so a crash leaves
    no half-written file.

    Raises:
        TypeError: not a model of :mod:`vpfast.models`.
        ValueError: a model that :func:`load` would refuse: with weights of several types, or other ones than its
            configuration calls for, as those of parametrized or pruned layers are.
        OSError: there is no room, or no permission.
    """
    write(as_files(model), Path(folder))


def write(contents: Mapping[str, bytes | None], folder: Path) -> None:
    """Write files of these names into ``folder`` as :func:`save` does; when all are there, those of None go."""
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as all_written:
        for name, data in contents.items():
            if data is not None:
                all_written.enter_context(new_file(folder / name, replace=True)).write_bytes(data)
    for name, data in contents.items():
        if data is None and (folder / name).is_file():
            remove_file(folder / name)


def as_files(model: nn.Module) -> dict[str, bytes]:
    """What :func:`save` writes: the content of each file by its name.

    Raises:
        TypeError, ValueError: as :func:`save`.
    """
    description = _describe(model)
    state = {key: tensor.detach().cpu().contiguous() for key, tensor in model.state_dict().items()}
    empty, what = _without_values(description), f"this {type(model).__name__}"
    _check_state(what, "its configuration", state, empty.state_dict(), f"; before it is saved, {_UNDO}")
    _check_types(what, state, empty, ": call .to(dtype) before it is saved")
    # The description travels inside the weights too: load() sees when the two files are of two different saves.
    weights = serialized(state, metadata={"vpfast": json.dumps(description)})
    return {CONFIG: (json.dumps(description, indent=2) + "\n").encode(), WEIGHTS: weights}


def load(folder: str | os.PathLike[str]) -> nn.Module:
    """The model that :func:`save` wrote into ``folder``: on the CPU, in its saved type, ready to predict.

    ``folder`` may be the name of a model that comes with the package, such as ``"mspn-one-digit"``. The model is in
    evaluation mode, so that batch norm uses and keeps the saved statistics; ``.train()`` it to train on.

    Raises:
        FileNotFoundError: the folder or one of its two files is missing.
        ValueError: the files are damaged, not vpfast's, of two different saves, or do not fit each other; the message
            names the file and what is wrong.
    """
    folder = folder_of(folder)
    for path in (folder, folder / CONFIG, folder / WEIGHTS):
        if not path.exists():
            named = "" if folder.exists() else f", or one of {', '.join(pretrained())}"
            raise FileNotFoundError(
                f"{path} does not exist; a saved model is a folder with {CONFIG} and {WEIGHTS}{named}"
            )
    for path in (folder / CONFIG, folder / WEIGHTS):
        if not path.is_file():  # to open a pipe would be to wait for its writer
            raise ValueError(f"{path} is not a file; a saved model is a folder with {CONFIG} and {WEIGHTS}")
    description = _read_description(folder / CONFIG)
    state, written_with = _read_weights(folder / WEIGHTS)
    if written_with is not None and written_with != {key: description[key] for key in ("model", "config")}:
        raise ValueError(f"{folder / WEIGHTS} was saved with another configuration than {CONFIG} beside it")
    try:
        model = _without_values(description)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise ValueError(f"{folder / CONFIG}: this version ({__version__}) cannot build it: {error}") from error
    _check_state(folder / WEIGHTS, f"{CONFIG} beside it", state, model.state_dict())
    _check_types(folder / WEIGHTS, state, model)
    model.load_state_dict(state, assign=True)
    object.__setattr__(model, "_loaded_from", folder.resolve())
    return model.eval()


def training_of(model: nn.Module) -> dict[str, Any] | None:
    """How ``model`` was trained: what the folder that it was loaded from says of the very same weights.

    None where that is not known: a new model, one that was changed since it was loaded, or a folder that says nothing,
    is gone, or holds other weights by now. A path from the root of the file system is cut to its last part, for it
    tells of one machine alone.
    """
    folder: Path | None = getattr(model, "_loaded_from", None)
    if folder is None:
        return None
    try:
        told = json.loads((folder / TRAINING).read_text())
        state, _ = _read_weights(folder / WEIGHTS)
    except (OSError, ValueError, RecursionError):
        return None
    current = model.state_dict()
    unchanged = state.keys() == current.keys() and all(_same(state[key], current[key].cpu()) for key in state)
    return _without_places(told) if unchanged and isinstance(told, dict) else None


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def _without_places(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_places(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_places(each) for each in value]
    return os.path.basename(value.rstrip("/")) if isinstance(value, str) and value.startswith("/") else value


def pretrained() -> list[str]:
    """The names of the models that come with the package."""
    return sorted(path.parent.name for path in PRETRAINED.glob(f"*/{CONFIG}"))


def folder_of(name: str | os.PathLike[str]) -> Path:
    """``name`` as the path of a folder or, where nothing is there, as the name of a model of the package."""
    path = Path(name)
    return PRETRAINED / path if not path.exists() and str(path) in pretrained() else path


def _describe(model: nn.Module) -> dict[str, Any]:
    for kind, (model_class, _) in _kinds.items():
        if type(model) is model_class:
            # Through JSON once, so that what is compared later has the types that a reader gets (lists, not tuples).
            config = json.loads(json.dumps(dataclasses.asdict(model.config)))  # type: ignore[call-overload]
            return {"model": kind, "config": config, "vpfast": __version__}
    raise TypeError(f"can save a {' or '.join(c.__name__ for c, _ in _kinds.values())}, got {type(model).__name__}")  # type: ignore[attr-defined]


def _read_description(path: Path) -> dict[str, Any]:
    try:
        description = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(description, dict) or not isinstance(description.get("config"), dict):
        raise ValueError(f'{path} does not describe a vpfast model: it needs "model" and "config"')
    if description.get("model") not in list(_kinds):
        raise ValueError(f'{path}: "model" is {description.get("model")!r}; this version knows {", ".join(_kinds)}')
    return description


def _read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        state = read_tensors(path)
        written_with = json.loads(metadata["vpfast"]) if "vpfast" in metadata else None
        if written_with is not None:
            written_with = {key: written_with[key] for key in ("model", "config")}
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error
    return state, written_with


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name, on the CPU, in memory of their own: none is tied to the file.

    Through the bytes, for safetensors 0.8 loses two Python integers for each tensor that it takes out of an open file:
    a process that loads again and again would grow.

    Raises:
        OSError: the file cannot be read.
        SafetensorError, ValueError, KeyError: it is damaged.
    """
    return deserialized(path.read_bytes())  # type: ignore[no-any-return]


def _without_values(description: dict[str, Any]) -> nn.Module:
    """A new model of this description whose tensors have shapes and types alone."""
    model_class, config_class = _kinds[description["model"]]
    with torch.device("meta"):
        return model_class(config_class(**description["config"]))


def _check_state(
    where: object, beside: str, found: dict[str, Tensor], needed: dict[str, Tensor], advice: str = ""
) -> None:
    for key in sorted(found.keys() - needed.keys()):
        raise ValueError(f"{where} holds {key!r}, which {beside} does not know{advice}")
    for key in sorted(needed.keys() - found.keys()):
        raise ValueError(f"{where} lacks {key!r}, which {beside} calls for{advice}")
    for key, tensor in needed.items():
        if found[key].shape != tensor.shape:
            raise ValueError(
                f"{where}: {key!r} has shape {tuple(found[key].shape)}, but {beside} calls for "
                f"{tuple(tensor.shape)}{advice}"
            )
        if found[key].is_floating_point() != tensor.is_floating_point():
            raise ValueError(f"{where}: {key!r} is of {found[key].dtype}, must be of a type such as {tensor.dtype}")


def _check_types(where: object, found: dict[str, Tensor], model: nn.Module, advice: str = "") -> None:
    """A model computes in one type, but for parameters that it keeps in float32 beside half precision; ValueError names
    one of another. Casts ``model``, whose tensors these are to be, to that type."""
    first, _ = next(model.named_parameters())
    dtype = found[first].dtype
    for key, parameter in model.to(dtype).named_parameters():
        if found[key].dtype not in (dtype, parameter.dtype):
            raise ValueError(
                f"{where}: {key!r} is of {found[key].dtype}, {first!r} of {dtype}; all must be of one type{advice}"
            )
