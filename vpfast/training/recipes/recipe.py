"""What training and evaluation need to know about a model, in one place."""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vpfast.models._config import ModelConfig
from vpfast.training.config import LossConfig, TrainConfig
from vpfast.training.update import Context, GradientUpdate, Update

MODEL, BASELINE = "prediction", "repeat last frame"
"""The names of what a model predicts, and of the simplest prediction there is."""


class Loss(NamedTuple):
    """What is minimised, a scalar, and what the log tells beside it: scalars without gradient.

    A batch may be computed in parts, by several processes or one after another. ``summed`` is that share of ``total``
    which is a sum over clips, so that the parts add up; the rest, where there is one, is a mean over clips. The same
    goes for those of ``parts`` that ``sums`` names.
    """

    total: Tensor
    parts: Mapping[str, Tensor]
    summed: Tensor | None = None
    sums: Collection[str] = ()


class Sampling(NamedTuple):
    """How a model that predicts codes chooses them; other models have no choice.

    ``temperature``: 0 takes the likeliest code everywhere, so that there is one future; above 0 codes are drawn.
    ``top_k``: draw among so many of the likeliest codewords; None: among all. ``futures``: how many futures are drawn
    for a clip. ``seed``: of the draws.
    """

    temperature: float = 0.0
    top_k: int | None = None
    futures: int = 1
    seed: int = 0


class Comparison(NamedTuple):
    """What came of a batch of clips.

    ``real``: the frames to be met, (B, T, C, H, W) in [0, 1]. ``made``: by name, frames of that shape, not clamped.
    ``judged``: the name of those that a run is judged by. ``counts``: by the same names, how often each codeword of a
    codebook was chosen, (codewords,); empty for a model that has none. ``scores``: by name, numbers for every clip and
    layer of codes, (B, n); empty for a model that predicts no codes.
    """

    real: Tensor
    made: Mapping[str, Tensor]
    judged: str
    counts: Mapping[str, Tensor]
    scores: Mapping[str, Tensor] = {}


@dataclass(frozen=True)
class Recipe:
    """How one kind of model is built, trained and measured.

    Attributes:
        model_class, config_class: of the model, and of the configuration that it is built from.
        preset: the configuration that ``model`` of a run changes where it names no other.
        predicts: whether frames after the ``context`` are predicted; if not, the frames of the context are made again.
        objective: (model, frames (B, T, C, H, W), configuration, step) -> the loss of that step.
        compare: (model, frames (B, T, C, H, W), context, sampling) -> what is measured; called without gradients.
        trained: (model) -> the parts of it that are trained; the others keep their weights and stay in evaluation mode.
        take_over: (model, other) -> puts the weights of ``other``, a model of any kind, into ``model``; returns None,
            or where they do not fit why, as the end of "the weights are ..."; ``model`` is then as it was.
        pixel_loss: whether the section ``loss`` of a run says what is minimised; if not, fields of the model do.
        samples: whether ``sampling`` makes a difference.
        update: (context) -> what takes the steps of a run.
        recomputes: whether ``checkpoint_activations`` makes a difference.
        batchwise: (model) -> what moves it once a batch, apart from gradients, so that a batch is not to be computed in
            parts, as the end of a sentence; None where nothing does.
    """

    model_class: Callable[[Any], nn.Module]
    config_class: type[ModelConfig]
    preset: str
    predicts: bool
    objective: Callable[[nn.Module, Tensor, TrainConfig, int], Loss]
    compare: Callable[[Any, Tensor, int, Sampling], Comparison]
    trained: Callable[[Any], Sequence[nn.Module]] = lambda model: [model]
    take_over: Callable[[Any, nn.Module], str | None] = lambda model, other: same_model(model, other)
    pixel_loss: bool = False
    samples: bool = False
    update: Callable[[Context], Update] = GradientUpdate
    recomputes: bool = False
    batchwise: Callable[[Any], str | None] = lambda model: None

    def check(self, config: TrainConfig) -> None:
        """Raise ValueError, which names the key, where ``config`` asks what this kind of model has no use for."""
        if self.predicts and config.horizon < 1:
            raise ValueError(f"horizon: {config.horizon} given, must be at least 1: the frames to predict")
        if not self.predicts and config.horizon != 0:
            raise ValueError(
                f"horizon: {config.horizon} given, must be 0: this model predicts nothing, it makes the frames of the "
                "context again"
            )
        if config.checkpoint_activations and not self.recomputes:
            raise ValueError(
                "checkpoint_activations: True given, must be false: this model has no rollout to recompute"
            )
        if not self.pixel_loss and config.loss != LossConfig():
            key, given = next(iter(vars(config.loss).items() - vars(LossConfig()).items()))
            raise ValueError(
                f"loss.{key}: {given!r} given, must be left out: the terms of this model's loss are fields of model"
            )
        if not self.pixel_loss and config.adversarial.enabled:
            raise ValueError("adversarial.enabled: True given, must be False: this model is trained without one")

    def check_sampling(self, sampling: Sampling) -> None:
        """Raise ValueError, which names the key, where a way to draw is asked for and nothing is drawn."""
        asked = {key: value for key, value in sampling._asdict().items() if value != Sampling._field_defaults[key]}
        asked.pop("seed", None)
        for key, value in asked.items():
            if not self.samples:
                raise ValueError(f"{key}: {value} given, must be left out: this model draws nothing")
            if sampling.temperature == 0:
                raise ValueError(f"{key}: {value} given, must be left out at temperature 0, which draws nothing")


def same_model(model: nn.Module, other: nn.Module, may_differ: Collection[str] = ()) -> str | None:
    """Put the weights of ``other`` into ``model``, which is of its class and, but for fields that ``may_differ``, of
    its configuration. Returns None, or what is different; ``model`` is then as it was."""
    if type(other) is not type(model):
        return f"of a {type(other).__name__}, this run trains a {type(model).__name__}"
    if (reason := different(model.config, other.config, may_differ)) is not None:
        return reason
    model.load_state_dict(other.state_dict())
    return None


def different(own: Any, other: Any, may_differ: Collection[str] = ()) -> str | None:
    """The first field in which two configurations of one class differ, in words; None where there is none."""
    for field in dataclasses.fields(own):
        given, here = getattr(other, field.name), getattr(own, field.name)
        if field.name not in may_differ and given != here:
            return f"of a model with {field.name} {given!r}, this run's has {here!r}"
    return None


def counted(count: int, thing: str) -> str:
    """``1 layer``, ``2 layers``, ..."""
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"


def perplexity(counts: Tensor) -> float:
    """exp of the entropy of a choice: as many codewords, all used alike, would carry as much. 0 where none was made."""
    total = counts.sum()
    if not total:
        return 0.0
    shares = counts.double() / total
    return float(torch.exp(-torch.xlogy(shares, shares).sum()))
