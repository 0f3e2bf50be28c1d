"""One optimisation step of a run: what is computed, and what moves."""

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from vpfast.training.config import TrainConfig

if TYPE_CHECKING:  # a recipe names its update, so this module comes first
    from vpfast.training.recipes.recipe import Loss, Recipe


@dataclass(frozen=True)
class Context:
    """What an update is made from.

    ``model``: on its device, with the weights it starts from, not yet prepared by Accelerate. ``trained``: the parts of
    it that the run trains; all other parameters need no gradient.
    """

    model: nn.Module
    trained: Sequence[nn.Module]
    config: TrainConfig
    accelerator: Accelerator
    recipe: "Recipe"

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Those that are trained."""
        return [parameter for part in self.trained for parameter in part.parameters()]

    def train_mode(self) -> None:
        """What is trained is in training mode, all else in evaluation mode: nothing in it may move."""
        self.model.eval()
        for part in self.trained:
            part.train()


class Update(Protocol):
    """One optimisation step of a run. Its constructor prepares with Accelerate what it trains.

    A checkpoint holds the model and what stands under ``modules`` and ``optimizers``; a run that goes on puts all of it
    back in place after the update was made. Everything else that a step needs must follow from its number.
    """

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """Networks beside the model, by name, as they were before Accelerate wrapped them."""
        ...

    @property
    def optimizers(self) -> Mapping[str, Optimizer]:
        """All of them, by name."""
        ...

    def __call__(self, frames: Tensor, step: int) -> dict[str, Any]:
        """Take step number ``step``, from 0, on this process's clips, (B, T, C, H, W) on its device.

        Returns:
            What the log tells, numbers or numbers by name, the same in every process; under ``"loss"`` what is
            minimised.

        Raises:
            FloatingPointError: the loss is not finite; nothing has moved then.
        """
        ...


class GradientUpdate:
    """The ordinary one: down the gradient of ``recipe.objective``, of all clips of a step.

    With ``optim.accumulate`` the clips pass in so many parts. The gradient is that of all of them at once, but for
    batch norm, whose statistics are those of a part.

    Raises:
        ValueError: something in the model moves once a batch, which parts of one would move several times.
    """

    def __init__(self, context: Context) -> None:
        self.context = context
        optim = context.config.optim
        check_parts(context)
        optimizer = torch.optim.Adam(context.parameters, optim.lr, weight_decay=optim.weight_decay, fused=True)
        self._model, self._optimizer = context.accelerator.prepare(context.model, optimizer)
        self.modules: dict[str, nn.Module] = {}
        self.optimizers: dict[str, Optimizer] = {"model": self._optimizer}

    def __call__(self, frames: Tensor, step: int) -> dict[str, float]:
        context = self.context
        rate = learning_rate(context.config, step)
        set_rate(self._optimizer, rate)
        context.train_mode()
        self._optimizer.zero_grad()
        parts = frames.chunk(context.config.optim.accumulate)
        told = [self._descend(part, step, len(parts), last=part is parts[-1]) for part in parts]
        record = tell(_joined(told), context.accelerator)
        check_finite(record["loss"], step, context.config)
        clip(context.accelerator, self._optimizer, context.parameters, context.config.optim.clip_norm)
        self._optimizer.step()
        return {**record, "lr": rate, **scale(context.accelerator)}

    def _descend(self, frames: Tensor, step: int, parts: int, last: bool) -> "Loss":
        """Add the gradient of one part; processes bring theirs together after the last."""
        context = self.context
        together = nullcontext() if last else context.accelerator.no_sync(self._model)
        with together:
            loss = context.recipe.objective(self._model, frames, context.config, step)
            context.accelerator.backward(to_minimise(loss, parts, context.accelerator.num_processes))
        return loss._replace(total=loss.total.detach(), summed=None if loss.summed is None else loss.summed.detach())


def check_parts(context: Context) -> None:
    """Raise ValueError where ``optim.accumulate`` asks for what the model does not allow."""
    why = context.recipe.batchwise(context.model)
    if context.config.optim.accumulate > 1 and why is not None:
        raise ValueError(
            f"optim.accumulate: {context.config.optim.accumulate} given, must be 1 where {why}; take a larger "
            "batch_size, or several processes"
        )


def to_minimise(loss: "Loss", parts: int, processes: int) -> Tensor:
    """What a process calls backward on for one of ``parts`` parts of its clips.

    Gradients add up over the parts and are averaged over the processes; so they become those of all clips at once.
    """
    if loss.summed is None:
        return loss.total / parts
    if loss.summed is loss.total:
        return loss.total * processes
    return (loss.total - loss.summed) / parts + loss.summed * processes


def tell(loss: "Loss", accelerator: Accelerator) -> dict[str, float]:
    """The loss of all clips of a process -> loss and its parts over the clips of all processes, for the log."""
    summed = torch.zeros_like(loss.total) if loss.summed is None else loss.summed
    numbers = torch.stack([part.detach().float() for part in (loss.total - summed, summed, *loss.parts.values())])
    reduced: Any = accelerator.reduce(numbers, "sum")
    mean, added, *parts = reduced.tolist()
    processes = accelerator.num_processes
    told = {"loss": mean / processes + added}
    for name, value in zip(loss.parts, parts, strict=True):
        told[name] = value if name in loss.sums else value / processes
    return told


def _joined(losses: "Sequence[Loss]") -> "Loss":
    """The losses of the parts of a batch -> that of the batch, without gradient."""
    first, count = losses[0], len(losses)
    if count == 1:
        return first
    parts = {}
    for name in first.parts:
        added = torch.stack([loss.parts[name] for loss in losses]).sum()
        parts[name] = added if name in first.sums else added / count
    total = torch.stack([loss.total for loss in losses]).sum()
    if first.summed is None:
        return first._replace(total=total / count, parts=parts)
    summed = torch.stack([loss.summed for loss in losses if loss.summed is not None]).sum()
    return first._replace(total=(total - summed) / count + summed, parts=parts, summed=summed)


def check_finite(loss: float, step: int, config: TrainConfig) -> None:
    """Raise FloatingPointError, which says what may help, where ``loss`` is no finite number."""
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"the loss is {loss} at step {step + 1}; a lower optim.lr (now {config.optim.lr}) or optim.clip_norm may "
            "help"
        )


def clip(
    accelerator: Accelerator, optimizer: Optimizer, parameters: Sequence[nn.Parameter], norm: float | None
) -> None:
    """Clip the gradients of ``parameters``, which are those of ``optimizer``, to ``norm``; None leaves them alone.

    Gradients that were scaled against underflow are brought back first.
    """
    if norm is not None:
        accelerator.unscale_gradients(optimizer)
        nn.utils.clip_grad_norm_(parameters, norm)


def scale(accelerator: Accelerator) -> dict[str, float]:
    """For the log: by what float16 gradients are scaled; nothing in other precisions.

    It falls where a gradient overflowed, and that step changed no weight.
    """
    return {} if accelerator.scaler is None else {"scale": accelerator.scaler.get_scale()}


def set_rate(optimizer: Optimizer, rate: float) -> None:
    """Give every parameter of ``optimizer`` this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def learning_rate(config: TrainConfig, step: int) -> float:
    """Warm-up, then constant or half a cosine down to 0 after the last step. A function of the step alone."""
    optim = config.optim
    if step < optim.warmup:
        return optim.lr * (step + 1) / optim.warmup
    if optim.schedule == "constant":
        return optim.lr
    done = (step - optim.warmup) / max(1, config.steps - optim.warmup)
    return optim.lr * 0.5 * (1 + math.cos(math.pi * done))
