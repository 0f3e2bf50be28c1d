"""One run of the training loop: in one process or many, on any device that Accelerate knows."""

import math
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.utils.data import Dataset

from vpfast.training import checkpoint
from vpfast.training.clips import StepBatches, check_apart, dataset, loader
from vpfast.training.config import TrainConfig, from_dict, leaves, to_dict
from vpfast.training.device import pick_device
from vpfast.training.files import new_folder, write_file
from vpfast.training.log import RunLog
from vpfast.training.network import build_model, recipe_for, start_from
from vpfast.training.update import Context
from vpfast.training.validation import sample, validate

# What may differ between a run and its continuation without making it another run.
_FREE = (
    *("out", "steps", "workers", "device", "val_every", "val_clips", "save_every", "keep", "data.root", "data.cache"),
    *("tensorboard", "strip_every"),
)


class Stopped(Exception):  # noqa: N818 - not a failure
    """The run in ``out`` was asked to stop after that step, of that stage if it has stages, has saved, and can be
    resumed."""

    def __init__(self, step: int, signum: int, out: str, stage: str | None = None) -> None:
        where = f"step {step}" if stage is None else f"step {step} of stage {stage}"
        super().__init__(f"stopped by {signal.Signals(signum).name} after {where}; saved in {out}, resume goes on")
        self.step, self.signum = step, signum


def run(
    config: TrainConfig, resume: bool = False, progress: bool = True, start: Path | None = None, last: bool = True
) -> Path:
    """Train in one go as ``config`` says and return the folder of the finished weights.

    ``start``: the weights to start from where ``config.init`` names none. ``last``: whether nothing follows, so that a
    signal during the last step stops nothing any more. Otherwise, and for errors, see :func:`vpfast.training.train`,
    which also knows models that are trained in stages.
    """
    return _Run(config, resume, progress, start).run(last)


class _Run:
    def __init__(self, config: TrainConfig, resume: bool, progress: bool, start: Path | None) -> None:
        self.config, self.out = config, Path(config.out)
        torch.manual_seed(config.seed)
        self.recipe = recipe_for(config)
        model = build_model(config)
        check_folder(Path(config.out), resume)
        if resume:
            _check_same_run(config)
        self.accelerator = accelerator(config)
        self.log = RunLog(config, self.accelerator.is_main_process, progress)
        check_apart(config.data)
        self.clips = dataset(config.data, "train", config.clip_length, seed=config.seed)
        self.val = self._validation_clips()

        if config.channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        model.to(self.accelerator.device)
        self.plain = model
        self.step, self.best = 0, math.inf
        saved = checkpoint.found(self.out / "checkpoints") if resume else []
        source = start if config.init is None else Path(config.init)
        if source is not None and not saved:
            start_from(self.recipe, model, source)
        trained = self.recipe.trained(model)
        _freeze_all_but(trained, model)
        self.update = self.recipe.update(Context(model, trained, config, self.accelerator, self.recipe))
        if saved:
            self._resume(saved[-1])

    def _validation_clips(self) -> Dataset[Tensor] | None:
        config = self.config
        if not config.val_every:
            return None
        return dataset(config.data, "val", config.clip_length, config.val_clips, config.seed)

    # -- the loop ------------------------------------------------------------------------------------------------

    def run(self, last: bool) -> Path:
        config, main = self.config, self.accelerator.is_main_process
        if main:
            self.out.mkdir(parents=True, exist_ok=True)
            write_file(self.out / "config.yaml", yaml.safe_dump(to_dict(config), sort_keys=False))
        with _signals() as caught, self.log.opened(self.step) as log:
            started = time.perf_counter()
            for frames in self._batches():
                record = self._step(frames)
                record["seconds"] = round(time.perf_counter() - started, 4)
                if self._due(config.val_every) and self.val is not None:
                    record |= self._validate(self.val)
                log.write(record)
                if self._due(config.save_every) or self._due(config.steps) or caught:
                    self._save()
                if log.wants_strip(self.step):
                    clips = self.clips if self.val is None else self.val
                    log.strip(self.step, *sample(self.recipe, self.plain, clips, config, self.accelerator))
                if caught and self.step < config.steps:
                    raise Stopped(self.step, caught[0], config.out)
                started = time.perf_counter()
        weights = self._finish()
        if caught and not last:
            raise Stopped(self.step, caught[0], config.out)
        return weights

    def _batches(self) -> Iterator[Tensor]:
        config, accelerator = self.config, self.accelerator
        batches = StepBatches(
            len(self.clips),  # type: ignore[arg-type]
            config.batch_size * config.optim.accumulate,
            range(self.step, config.steps),
            config.seed,
            accelerator.process_index,
            accelerator.num_processes,
        )
        yield from loader(self.clips, batches, config.workers, pin=accelerator.device.type == "cuda")

    def _step(self, frames: Tensor) -> dict[str, Any]:
        told = self.update(frames.to(self.accelerator.device, non_blocking=True), self.step)
        self.step += 1
        return {"step": self.step, **told, "clips": frames.shape[0] * self.accelerator.num_processes}

    def _validate(self, clips: Dataset[Tensor]) -> dict[str, Any]:
        """What the log tells of the validation clips; the weights are kept where they never did better."""
        record = validate(self.recipe, self.plain, clips, self.config, self.accelerator)
        if record["val_mse"] < self.best:
            self.best = record["val_mse"]
            self._write_weights("best")
        return record

    def _due(self, every: int) -> bool:
        return bool(every) and (self.step % every == 0 or self.step == self.config.steps)

    # -- what is kept --------------------------------------------------------------------------------------------

    def _save(self) -> None:
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            state = checkpoint.State(
                step=self.step,
                best=self.best,
                optimizers={name: optimizer.state_dict() for name, optimizer in self.update.optimizers.items()},
                scaler=scaler.state_dict() if scaler is not None else {},
                random=checkpoint.random_state(),
            )
            checkpoint.save(self.out / "checkpoints", self._networks(), state, self.config)
        self.accelerator.wait_for_everyone()

    def _resume(self, path: Path) -> None:
        state = checkpoint.load(path, self._networks())
        if state.step > self.config.steps:
            raise ValueError(f"steps: {self.config.steps} given, but {self.out} has {state.step} behind it already")
        for name, optimizer in self.update.optimizers.items():
            optimizer.load_state_dict(state.optimizers[name])
        if state.scaler and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state.scaler)
        checkpoint.restore_random_state(state.random)
        self.step, self.best = state.step, state.best

    def _networks(self) -> checkpoint.Networks:
        return checkpoint.Networks(self.plain, self.update.modules)

    def _finish(self) -> Path:
        return self._write_weights("weights")

    def _write_weights(self, name: str) -> Path:
        if self.accelerator.is_main_process:
            with new_folder(self.out / name, replace=True) as folder:
                checkpoint.write_weights(folder, self.plain, self.config)
        self.accelerator.wait_for_everyone()
        return self.out / name


def accelerator(config: TrainConfig) -> Accelerator:
    """Accelerate keeps one state a process, precision included; a second run in the same process needs a fresh one."""
    AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    precision = {"fp32": "no"}.get(config.precision, config.precision)
    return Accelerator(mixed_precision=precision, cpu=pick_device(config.device).type == "cpu")


def _freeze_all_but(trained: Sequence[nn.Module], model: nn.Module) -> None:
    model.requires_grad_(False)
    for part in trained:
        part.requires_grad_(True)


def check_folder(out: Path, resume: bool) -> None:
    """Raise ValueError where a run cannot begin in the folder ``out`` or, with ``resume``, go on there."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"out: {out} is a file, must be a folder")
    if not resume and out.is_dir() and any(out.iterdir()):
        raise ValueError(f"out: {out} is not empty; --resume goes on with the run there, or choose another folder")


def _check_same_run(config: TrainConfig) -> None:
    path = Path(config.out) / "config.yaml"
    if not path.is_file():
        return
    now, before = to_dict(config), to_dict(from_dict(TrainConfig, yaml.safe_load(path.read_text())))
    for key, _, _, _ in leaves(TrainConfig):
        if key not in _FREE and lookup(now, key) != lookup(before, key):
            raise ValueError(
                f"{key}: {lookup(now, key)} given, but the run in {config.out} was started with "
                f"{lookup(before, key)}; resume with that, or choose another out"
            )


def lookup(values: Any, key: str) -> Any:
    """What stands under a dotted key in nested plain values; None where there is nothing."""
    for part in key.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM; a second one of a kind acts as it did before."""
    caught: list[int] = []
    before: dict[int, Any] = {}

    def handle(signum: int, frame: FrameType | None) -> None:
        caught.append(signum)
        signal.signal(signum, before[signum])

    if threading.current_thread() is threading.main_thread():
        for signum in (signal.SIGINT, signal.SIGTERM):
            before[signum] = signal.getsignal(signum)
            signal.signal(signum, handle)
    try:
        yield caught
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
