"""Training, as the command line calls it: a run, or for a model that is trained in stages one run after another."""

import re
import shutil
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from vpfast import models
from vpfast._files import clear_up, new_folder, write_file
from vpfast.training import checkpoint, engine
from vpfast.training.config import TrainConfig, from_dict, leaves, to_dict, unknown_key
from vpfast.training.log import check_tensorboard
from vpfast.training.network import build_model
from vpfast.training.recipes import STAGES, recipe_named

# What trains several stages one after another, and which it leaves out.
_SEVERAL: dict[str, tuple[str, ...]] = {"all": (), "disjoint": ("joint",)}
# What a stage cannot have of its own: what is trained, and where it lies.
_SHARED = ("out", "init", "model", "stage", "stages")


def train(config: TrainConfig, resume: bool = False, progress: bool = True) -> Path:
    """Train as ``config`` says and return the folder of the finished weights.

    The folder ``config.out`` receives config.yaml, log.jsonl (one JSON object a step), checkpoints/ and, at the end,
    curves.png and weights/, which :func:`vpfast.models.load` reads; where a validation split is watched also best/, the
    weights that did best on it. With ``resume`` the run in that folder goes on from its last checkpoint that is whole,
    or from the start where there is none; on the CPU its weights then equal those of a run that was never interrupted,
    bit for bit, given the same number of threads. With ``optim.ema_decay`` the averaged weights are validated and
    written; checkpoints hold both. With ``patience`` a run may end before ``steps``, with the weights of its last step.

    In several processes (``accelerate launch --multi_gpu --num_processes 2 -m vpfast train ...``, on the CPU too, with
    ``--device cpu``; accelerate's own ``--cpu`` starts one process unless it is given an MPI host file) all of them
    have to see the same ``config.out``. The gradient is that of the clips of all of them.

    A model that is trained in stages has such a folder for each of them inside ``config.out``, named after the stage. A
    stage starts from the weights of the one before it, the first that is trained from ``config.init`` where that is
    given. ``config.out/weights`` is that of the stage trained last; ``resume`` goes on in the one that is not finished.

    SIGINT and SIGTERM save a checkpoint and end in :class:`~vpfast.training.Stopped`.

    Raises:
        ValueError: the configuration, the data, or the folder does not allow this run; the message names the key.
        FloatingPointError: the loss is not finite.
        Stopped: a signal came.
    """
    runs = runs_of(config)
    for each in runs.values() or [config]:
        check_tensorboard(each)
    if config.init is not None and not checkpoint.weights_of(Path(config.init)).is_dir():
        raise FileNotFoundError(
            f"init: {config.init} given, must be a folder of weights, or one of {', '.join(models.pretrained())}"
        )
    if not runs:
        return engine.run(config, resume, progress)
    out = Path(config.out)
    accelerator = engine.accelerator(config)
    main = accelerator.is_main_process
    # All processes look before the first one writes.
    start = engine.agreed(accelerator, lambda: _start_in(out, runs, config, resume))
    first, *_ = runs
    for stage, each in runs.items():
        if main and progress:
            print(f"stage {stage}: {each.steps} steps, in {each.out}", flush=True)
        try:
            ready = partial(_begin, out, config) if stage == first else lambda: None
            start = engine.run(each, resume, progress, start, last=stage == list(runs)[-1], ready=ready)
        except (ValueError, FloatingPointError) as error:
            told = _by_its_own_name(str(error), stage, config.stages.get(stage, {}))
            raise (FloatingPointError if isinstance(error, FloatingPointError) else ValueError)(told) from error
        except engine.Stopped as stop:  # it is the whole that is resumed, not the stage
            raise engine.Stopped(stop.step, stop.signum, config.out, stage) from None
    assert start is not None
    last = start
    engine.agreed(accelerator, lambda: _finish(out, last) if main else None)
    return out / "weights"


def _start_in(out: Path, runs: Mapping[str, TrainConfig], config: TrainConfig, resume: bool) -> Path | None:
    """The weights that the first of ``runs`` starts from, where they can be in the folder ``out``."""
    engine.check_folder(out, resume or config.stage not in _SEVERAL)
    for each in runs.values():
        engine.check_folder(Path(each.out), resume)
    _check_unchanged(runs, out)
    return _start(config)


def _begin(out: Path, config: TrainConfig) -> None:
    out.mkdir(parents=True, exist_ok=True)
    clear_up(out)
    write_file(out / "config.yaml", yaml.safe_dump(to_dict(config), sort_keys=False))


def _finish(out: Path, weights: Path) -> None:
    with new_folder(out / "weights", replace=True) as folder:
        shutil.copytree(weights, folder, dirs_exist_ok=True)


def runs_of(config: TrainConfig) -> dict[str, TrainConfig]:
    """The runs that ``config`` asks for, by stage, in their order; none where the model is trained in one go.

    Raises:
        ValueError: no such model or stage, or values of a stage that cannot be; names the key.
    """
    name = config.model.get("name", "mspn")
    recipe_named(name)
    if name not in STAGES:
        for key, default in (("stage", "all"), ("stages", {})):
            if (given := getattr(config, key)) != default:
                raise ValueError(f"{key}: {given!r} given, must be left out: a {name} is trained in one go")
        return {}
    _check_keys(config.stages, list(STAGES[name]))
    _check_heard(config, list(STAGES[name]))
    return {stage: _run_of(config, stage) for stage in _wanted(config)}


def _wanted(config: TrainConfig) -> list[str]:
    """The stages that are trained, in their order."""
    stages = list(STAGES[config.model["name"]])
    if config.stage not in _SEVERAL:
        return [config.stage]
    return [stage for stage in stages if stage not in _SEVERAL[config.stage]]


def _run_of(config: TrainConfig, stage: str) -> TrainConfig:
    """The run of one stage. That of the autoencoder is one of an HR-VQVAE like any other."""
    own = config.stages.get(stage, {})
    values = {**to_dict(config), "out": str(Path(config.out) / stage), "init": None, "stage": stage, "stages": {}}
    if stage == "autoencoder":
        values |= {"model": {**config.model, "name": "hrvqvae"}, "stage": "all", "horizon": 0}
    try:
        made = from_dict(TrainConfig, _overlaid(values, own))
        build_model(made)
    except ValueError as error:
        raise ValueError(_by_its_own_name(str(error), stage, own)) from error
    return made


def _by_its_own_name(message: str, stage: str, own: Mapping[str, Any]) -> str:
    """What a run of a stage says, with the names of keys that this stage has of its own as they were given."""
    for key in sorted(_leaves_of(own), key=len, reverse=True):
        place = rf"(?<![\w.]){re.escape(key)}(?![\w.])" if "." in key else rf"^{key}(?=:)|(?<![\w.]){key}(?= \()"
        message = re.sub(place, f"stages.{stage}.{key}", message, count=1)
    return message


def _overlaid(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` with ``changes``, section by section."""
    merged = dict(values)
    for key, value in changes.items():
        nested = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _overlaid(merged[key], value) if nested else value
    return merged


def _check_keys(given: Mapping[str, Any], stages: list[str]) -> None:
    """Raise ValueError for a stage that there is not, or a key that a stage cannot have of its own."""
    known = [key for key, _, _, _ in leaves(TrainConfig) if key not in _SHARED]
    for stage, own in given.items():
        if stage not in stages:
            raise ValueError(unknown_key(f"stages.{stage}", [f"stages.{each}" for each in stages]))
        if not isinstance(own, Mapping):
            raise ValueError(f"stages.{stage}: {own!r} given, must hold keys of its own")
        for key in _leaves_of(own):
            if key in _SHARED or key.startswith("model."):
                raise ValueError(f"stages.{stage}.{key}: must be left out, for all stages share it")
            if key not in known:
                raise ValueError(unknown_key(f"stages.{stage}.{key}", [f"stages.{stage}.{each}" for each in known]))


def _leaves_of(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The dotted keys of nested values."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves_of(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _check_heard(config: TrainConfig, stages: list[str]) -> None:
    """Raise ValueError for a value that would change nothing, because every stage has its own."""
    given = to_dict(config)
    for key, _, default, _ in leaves(TrainConfig):
        owned = [stage for stage in stages if engine.lookup(config.stages.get(stage), key) is not None]
        value = engine.lookup(given, key)
        if len(owned) == len(stages) and value != (list(default) if isinstance(default, tuple) else default):
            raise ValueError(
                f"{key}: {value!r} given, but every stage has its own; change "
                + ", ".join(f"stages.{s}.{key}" for s in owned)
            )


def _start(config: TrainConfig) -> Path | None:
    """The weights that the first stage to be trained starts from; None for random ones.

    Raises:
        ValueError: the stage before it is not trained.
    """
    if config.init is not None:
        return Path(config.init)
    stages = list(STAGES[config.model["name"]])
    place = stages.index(_wanted(config)[0])
    if place == 0:
        return None
    before = Path(config.out) / stages[place - 1]
    if not (before / "weights").is_dir():
        raise ValueError(
            f"stage: {config.stage!r} given, but {before} holds no weights to start from; train stage "
            f"{stages[place - 1]!r} there first, or give a folder of weights as init"
        )
    return before


def _check_unchanged(runs: Mapping[str, TrainConfig], out: Path) -> None:
    """Raise ValueError where a stage would go on although another one has started from its weights."""
    stages = list(STAGES["shrvqvae"])
    for stage, config in runs.items():
        saved = checkpoint.found(out / stage / "checkpoints")
        after = [each for each in stages[stages.index(stage) + 1 :] if (out / each).exists()]
        if saved and after and not _ended(saved[-1], config):
            raise ValueError(
                f"stages.{stage}.steps: {config.steps} given, but stage {after[0]!r} in {out} started after "
                f"{checkpoint.step_of(saved[-1])}; resume with that, or choose another out"
            )


def _ended(path: Path, config: TrainConfig) -> bool:
    """Whether the run of the checkpoint at ``path`` has no step to go; a damaged one is looked at when it is loaded."""
    return checkpoint.damage(path) is not None or engine.ended(checkpoint.progress_of(path), config)
