"""What training and evaluation need to know about a model, in one place."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vpfast.models._config import ModelConfig
from vpfast.training.config import LossConfig, TrainConfig


class Loss(NamedTuple):
    """What is minimised, a scalar, and what the log tells beside it: scalars without gradient."""

    total: Tensor
    parts: Mapping[str, Tensor]


class Comparison(NamedTuple):
    """What came of a batch of clips.

    ``real``: the frames to be met, (B, T, C, H, W) in [0, 1]. ``made``: by name, frames of that shape, not clamped.
    ``judged``: the name of those that a run is judged by. ``counts``: by the same names, how often each codeword of a
    codebook was chosen, (codewords,); empty for a model that has none.
    """

    real: Tensor
    made: Mapping[str, Tensor]
    judged: str
    counts: Mapping[str, Tensor]


@dataclass(frozen=True)
class Recipe:
    """How one kind of model is built, trained and measured.

    Attributes:
        model_class, config_class: of the model, and of the configuration that it is built from.
        preset: the configuration that ``model`` of a run changes where it names no other.
        predicts: whether frames after the ``context`` are predicted; if not, the frames of the context are made again.
        objective: (model, frames (B, T, C, H, W), configuration, step) -> the loss of that step.
        compare: (model, frames (B, T, C, H, W), context) -> what is measured; called without gradients.
    """

    model_class: Callable[[Any], nn.Module]
    config_class: type[ModelConfig]
    preset: str
    predicts: bool
    objective: Callable[[nn.Module, Tensor, TrainConfig, int], Loss]
    compare: Callable[[Any, Tensor, int], Comparison]

    def check(self, config: TrainConfig) -> None:
        """Raise ValueError, which names the key, where ``config`` asks what this kind of model has no use for."""
        if self.predicts and config.horizon < 1:
            raise ValueError(f"horizon: {config.horizon} given, must be at least 1: the frames to predict")
        if self.predicts:
            return
        if config.horizon != 0:
            raise ValueError(
                f"horizon: {config.horizon} given, must be 0: this model predicts nothing, it makes the frames of the "
                "context again"
            )
        if config.loss != LossConfig():
            raise ValueError(
                f"loss: {config.loss} given, must be left out: the terms of this model's loss are fields of model"
            )


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
