"""One run of the training loop: in one process or many, on any device that Accelerate knows."""

import errno
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, GradientAccumulationPlugin, broadcast_object_list, gather_object
from torch import Tensor, nn
from torch.utils.data import Dataset

from vpfast._files import clear_up, new_folder, unwritable, write_file
from vpfast.training import checkpoint
from vpfast.training.average import Average
from vpfast.training.clips import StepBatches, check_apart, dataset, loader
from vpfast.training.config import TrainConfig, from_dict, leaves, to_dict
from vpfast.training.device import lay_out, pick_device
from vpfast.training.log import RunLog
from vpfast.training.network import build_model, recipe_for, start_from
from vpfast.training.signals import caught_signals
from vpfast.training.update import Context
from vpfast.training.validation import sample, validate

# What may differ between a run and its continuation without making it another run.
_FREE = (
    *("out", "steps", "workers", "device", "val_every", "val_clips", "save_every", "keep", "data.root", "data.cache"),
    *("patience", "checkpoint_activations", "tensorboard", "strip_every"),
)

_SHARDED = (DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM)

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)

T = TypeVar("T")


class Stopped(Exception):  # noqa: N818 - not a failure
    """The run in ``out`` was asked to stop after that step, of that stage if it has stages, has saved, and can be
    resumed."""

    def __init__(self, step: int, signum: int, out: str, stage: str | None = None) -> None:
        where = f"step {step}" if stage is None else f"step {step} of stage {stage}"
        super().__init__(f"stopped by {signal.Signals(signum).name} after {where}; saved in {out}, resume goes on")
        self.step, self.signum = step, signum


def run(
    config: TrainConfig,
    resume: bool = False,
    progress: bool = True,
    start: Path | None = None,
    last: bool = True,
    ready: Callable[[], object] = lambda: None,
) -> Path:
    """Train in one go as ``config`` says and return the folder of the finished weights.

    ``start``: the weights to start from where ``config.init`` names none. ``last``: whether nothing follows, so that a
    signal during the last step stops nothing any more. ``ready`` is called, in the main process, when nothing stands in
    the way of this run any more, before its first file is written. Otherwise, and for errors, see
    :func:`vpfast.training.train`,
    which also knows models that are trained in stages.
    """
    return _Run(config, resume, progress, start, ready).run(last)


class _Run:
    def __init__(
        self, config: TrainConfig, resume: bool, progress: bool, start: Path | None, ready: Callable[[], object]
    ) -> None:
        self.config, self.out, self.ready = config, Path(config.out), ready
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

        lay_out(model, config)
        model.to(self.accelerator.device)
        self.plain = model
        self.at = checkpoint.Progress(step=0)
        saved = self._newest() if resume else None
        source = start if config.init is None else Path(config.init)
        if source is not None and saved is None:
            start_from(self.recipe, model, source)
        trained = self.recipe.trained(model)
        freeze_all_but(trained, model)
        decay = config.optim.ema_decay
        self.average = None if decay is None else Average(model, trained, decay)
        self.update = self.recipe.update(Context(model, trained, config, self.accelerator, self.recipe))
        if saved is not None:
            agreed(self.accelerator, lambda: self._resume(saved))

    def _validation_clips(self) -> Dataset[Tensor] | None:
        config = self.config
        if not config.val_every:
            return None
        return dataset(config.data, "val", config.clip_length, config.val_clips, config.seed)

    # -- the loop ------------------------------------------------------------------------------------------------

    def run(self, last: bool) -> Path:
        try:
            return self._run(last)
        except OSError as error:
            if error.errno not in _NO_ROOM or not _lies_in(self.out, error.filename):
                raise
            saved = checkpoint.found(self.out / "checkpoints")
            kept = f"{saved[-1].name} is kept, and resume goes on from there" if saved else "nothing was saved before"
            raise OSError(f"{self.out} cannot be written: {error.strerror}; {kept}") from error

    def _run(self, last: bool) -> Path:
        config = self.config
        agreed(self.accelerator, self._prepare_folder)
        with caught_signals() as caught:
            with self.log.opened(self.at.step) as log:
                self._loop(caught, log)
            with self._averaged():
                weights = self._write_weights("weights")
            signum = self._asked(caught)
        if signum and not last:
            raise Stopped(self.at.step, signum, config.out)
        return weights

    def _loop(self, caught: list[int], log: RunLog) -> None:
        config = self.config
        started = time.perf_counter()
        for frames in self._batches():
            record = self._step(frames)
            record["seconds"] = round(time.perf_counter() - started, 4)
            if self._due(config.val_every) and self.val is not None:
                record |= self._validate(self.val)
            log.write(record)
            signum, ends = self._asked(caught), ended(self.at, config)
            if self._due(config.save_every) or ends or signum:
                self._save()
            if log.wants_strip(self.at.step):
                clips = self.clips if self.val is None else self.val
                with self._averaged():
                    log.strip(self.at.step, *sample(self.recipe, self.plain, clips, config, self.accelerator))
            if ends:
                return
            if signum:
                raise Stopped(self.at.step, signum, config.out)
            started = time.perf_counter()

    def _asked(self, caught: list[int]) -> int:
        """The signal that asks the run to stop, 0 for none; the same in every process, whichever of them it came to."""
        mine = caught[0] if caught else 0
        if self.accelerator.num_processes == 1:
            return mine
        return int(self.accelerator.gather(torch.tensor([mine], device=self.accelerator.device)).max())

    def _batches(self) -> Iterator[Tensor]:
        config, accelerator = self.config, self.accelerator
        batches = StepBatches(
            len(self.clips),  # type: ignore[arg-type]
            config.batch_size * config.optim.accumulate,
            range(self.at.step, self.at.step if ended(self.at, config) else config.steps),
            config.seed,
            accelerator.process_index,
            accelerator.num_processes,
        )
        loaded = loader(self.clips, batches, config.workers, pin=accelerator.device.type == "cuda")
        loaded.worker_init_fn = _deaf
        yield from loaded

    def _step(self, frames: Tensor) -> dict[str, Any]:
        told = self.update(frames.to(self.accelerator.device, non_blocking=True), self.at.step)
        self.at = self.at._replace(step=self.at.step + 1)
        if self.average is not None:
            self.average.update(self.at.step)
        return {"step": self.at.step, **told, "clips": frames.shape[0] * self.accelerator.num_processes}

    def _validate(self, clips: Dataset[Tensor]) -> dict[str, Any]:
        """What the log tells of the validation clips; the weights are kept where they never did better."""
        with self._averaged():
            record = validate(self.recipe, self.plain, clips, self.config, self.accelerator)
            if record["val_mse"] < self.at.best:
                self.at = self.at._replace(best=record["val_mse"], stale=0)
                self._write_weights("best")
            else:
                self.at = self.at._replace(stale=self.at.stale + 1)
        return record

    def _averaged(self) -> AbstractContextManager[None]:
        """In the block the model has the weights that are validated and written in the end."""
        return nullcontext() if self.average is None else self.average.in_place()

    def _due(self, every: int) -> bool:
        return bool(every) and (self.at.step % every == 0 or self.at.step == self.config.steps)

    # -- what is kept --------------------------------------------------------------------------------------------

    def _prepare_folder(self) -> None:
        if not self.accelerator.is_main_process:
            return
        self.ready()
        self.out.mkdir(parents=True, exist_ok=True)
        for folder in (self.out, self.out / "checkpoints"):
            clear_up(folder)
        for path in checkpoint.found(self.out / "checkpoints"):
            if checkpoint.step_of(path) > self.at.step:  # passed over for the one that the run goes on from
                checkpoint.set_aside(path)
        write_file(self.out / "config.yaml", yaml.safe_dump(to_dict(self.config), sort_keys=False))

    def _save(self) -> None:
        scaler = self.accelerator.scaler
        state = checkpoint.State(
            progress=self.at,
            optimizers={name: optimizer.state_dict() for name, optimizer in self.update.optimizers.items()},
            scaler=scaler.state_dict() if scaler is not None else {},
            random=gather_object([checkpoint.random_state()]),
        )
        self._on_main(lambda: checkpoint.save(self.out / "checkpoints", self._networks(), state, self.config))

    def _newest(self) -> Path | None:
        """The newest checkpoint that is whole in every process; None where there is none at all.

        Raises:
            ValueError: all are damaged.
        """
        (saved,) = broadcast_object_list([checkpoint.found(self.out / "checkpoints")])
        damaged: dict[Path, str] = {}
        for path in reversed(saved):
            wrong = next(filter(None, gather_object([checkpoint.damage(path)])), None)
            if wrong is None:
                for each, reason in damaged.items() if self.accelerator.is_main_process else ():
                    told = f"the checkpoint {each} is damaged ({reason}); the one before is taken"
                    print(f"vpfast: {told}", file=sys.stderr)
                whole: Path = path
                return whole
            damaged[path] = wrong
        if damaged:
            told = "; ".join(f"{each.name}: {reason}" for each, reason in damaged.items())
            raise ValueError(
                f"every checkpoint in {saved[-1].parent} is damaged; without them the run starts anew ({told})"
            )
        return None

    def _resume(self, path: Path) -> None:
        state = checkpoint.load(path, self._networks())
        if state.progress.step > self.config.steps:
            raise ValueError(
                f"steps: {self.config.steps} given, but {self.out} has {state.progress.step} behind it already"
            )
        for name, optimizer in self.update.optimizers.items():
            optimizer.load_state_dict(state.optimizers[name])
        if state.scaler and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state.scaler)
        if len(state.random) != self.accelerator.num_processes and self.accelerator.is_main_process:
            print(
                f"vpfast: {path} was saved by {len(state.random)} processes, {self.accelerator.num_processes} go on: "
                "a step has as many clips for each of them as before",
                file=sys.stderr,
            )
        place = self.accelerator.process_index
        checkpoint.restore_random_state(state.random[place if place < len(state.random) else 0])
        self.at = state.progress

    def _networks(self) -> checkpoint.Networks:
        averages = {} if self.average is None else {"average": self.average}
        return checkpoint.Networks(self.plain, {**self.update.modules, **averages})

    def _write_weights(self, name: str) -> Path:
        def write() -> None:
            with new_folder(self.out / name, replace=True) as folder:
                checkpoint.write_weights(folder, self.plain, self.config)

        self._on_main(write)
        return self.out / name

    def _on_main(self, work: Callable[[], object]) -> None:
        """Do it in the main process; where it fails every process fails, and none waits for ever."""
        agreed(self.accelerator, work if self.accelerator.is_main_process else lambda: None)


def _lies_in(out: Path, name: object) -> bool:
    """Whether an error is of a file in ``out``. One that names no file came of writing, which happens nowhere else."""
    return not isinstance(name, str) or Path(name).absolute().is_relative_to(out.absolute())


def ended(at: checkpoint.Progress, config: TrainConfig) -> bool:
    """Whether a run that is so far has no step to go."""
    return at.step >= config.steps or (config.patience is not None and at.stale >= config.patience)


def agreed(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Do ``work`` in every process; where it fails in one it fails in all of them, so that none waits for another.

    Raises:
        OSError: it failed elsewhere. Where it failed, what was raised.
    """
    error: Exception | None = None
    try:
        done = work()
    except Exception as raised:
        error = raised
    failures = [each for each in gather_object([error and " ".join(str(error).split())]) if each]
    if error is not None:
        raise error
    if failures:
        raise OSError(f"another process failed: {failures[0]}")
    return done


def accelerator(config: TrainConfig) -> Accelerator:
    """Accelerate keeps one state a process, precision included; a second run in the same process needs a fresh one.

    Of what ``accelerate config`` may have been told it takes the processes and the devices: precision and accumulation
    are keys of a run.

    Raises:
        ValueError: a precision that the device does not have, or a way to share the work that vpfast has not.
    """
    AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    precision = {"fp32": "no"}.get(config.precision, config.precision)
    cpu = pick_device(config.device).type == "cpu"
    if cpu and config.precision == "fp16":  # Accelerate would compute in float32 and not say so
        raise ValueError("precision: 'fp16' given, must be 'fp32' or 'bf16' on the CPU")
    once = GradientAccumulationPlugin(num_steps=1)
    made = Accelerator(mixed_precision=precision, cpu=cpu, gradient_accumulation_plugin=once)
    if made.distributed_type in _SHARDED:
        raise ValueError(
            f"accelerate is set up for {made.distributed_type.value}, must be for plain data parallelism, in which "
            "every process holds the whole model; `accelerate launch --multi_gpu` overrides the set-up"
        )
    return made


def freeze_all_but(trained: Sequence[nn.Module], model: nn.Module) -> None:
    """Let gradients reach the parts ``trained`` of ``model``, and nothing else."""
    model.requires_grad_(False)
    for part in trained:
        part.requires_grad_(True)


def check_folder(out: Path, resume: bool) -> None:
    """Raise ValueError where a run cannot begin in the folder ``out`` or, with ``resume``, go on there."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"out: {out} is a file, must be a folder")
    if (reason := unwritable(out)) is not None:
        raise ValueError(f"out: {out} {reason}")
    if not resume and out.is_dir() and any(out.iterdir()):
        raise ValueError(f"out: {out} is not empty; --resume goes on with the run there, or choose another folder")


def _check_same_run(config: TrainConfig) -> None:
    path = Path(config.out) / "config.yaml"
    if not path.is_file():
        return
    try:
        now, before = to_dict(config), to_dict(from_dict(TrainConfig, yaml.safe_load(path.read_text())))
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} does not describe the run that is to go on: {reason}") from error
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


def _deaf(worker: int) -> None:
    """What asks a run to stop often comes to all its processes; one that prepares clips goes when the run lets it go.

    If it went at once, the run would be torn from its step and could not save.
    """
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)
