"""MSPN's pixel loss (paper, Eq. 5) and the readings of it that are in use."""

from typing import Literal, get_args

import torch
from torch import Tensor

from vpfast.models._frames import check_device, check_float, check_values
from vpfast.models.mspn.config import DownSampling
from vpfast.models.mspn.network import MSPNOutput, shrink
from vpfast.nn._common import check_choice

Norm = Literal["sum_squares", "l2", "mse"]
LevelWeights = Literal["paper", "uniform"]


def pixel_loss(
    output: MSPNOutput,
    frames: Tensor,
    norm: Norm = "sum_squares",
    level_weights: LevelWeights = "paper",
) -> Tensor:
    """The distance of every level's predictions from the real frames, as one number.

    Args:
        output: what the model gave for T frames and horizon k: predictions P of T + k steps.
        frames: (B, T + k, C, H, W) in [0, 1], the real frames f, those that the model did not see included.
        norm: with d = P - f at time t and level l, and weights w_l,

            - ``"sum_squares"``: sum over t, l of w_l times the sum of d^2 over batch, channels, pixels (released code);
            - ``"l2"``: sum over t, l, batch of w_l times the Euclidean norm of d over channels and pixels (Eq. 5);
            - ``"mse"``: sum over l of w_l times the mean of d^2 over batch, t, channels and pixels.
        level_weights: ``"paper"``: w_l = (L - l) / L (Table I); ``"uniform"``: 1 (the released code).

    The first step has weight 0: its prediction is made from nothing. The frames of coarser levels are made as the model
    made its own (``output.down_sampling``). Sums are float32 for half-precision predictions.

    Raises:
        TypeError: frames that are not floating point.
        ValueError: an unknown option, fewer than two steps, or frames that do not have the shape and device of the
            predictions, are not finite or lie far outside [0, 1] (values are looked at as in ``MSPN.forward``).
    """
    for name, value, choices in (
        ("norm", norm, get_args(Norm)),
        ("level_weights", level_weights, get_args(LevelWeights)),
        ("the output's down_sampling", output.down_sampling, get_args(DownSampling)),
    ):
        check_choice("pixel_loss", name, value, choices)
    check_float(frames)
    finest = output.predictions[0]
    if frames.shape != finest.shape:
        raise ValueError(
            f"pixel_loss: frames must be the real frames of all {finest.shape[1]} steps, {tuple(finest.shape)}, "
            f"got {tuple(frames.shape)}"
        )
    if frames.shape[1] < 2:
        raise ValueError("pixel_loss needs at least 2 steps: the first has weight 0; got 1")
    check_device(frames, finest, "predictions")
    check_values(frames)

    levels = len(output.predictions)
    targets = frames[:, 1:].flatten(0, 1)
    total = finest.new_zeros((), dtype=torch.promote_types(finest.dtype, torch.float32))
    for level, predictions in enumerate(output.predictions):
        weight = (levels - level) / levels if level_weights == "paper" else 1.0
        made = predictions[:, 1:].flatten(0, 1).to(total.dtype)
        difference = made - shrink(targets, 2**level, output.down_sampling).to(total.dtype)
        total = total + weight * _reduce(difference, norm)
    return total


def _reduce(difference: Tensor, norm: Norm) -> Tensor:
    if norm == "l2":
        norms: Tensor = torch.linalg.vector_norm(difference, dim=(1, 2, 3))
        return norms.sum()
    squares = difference.square()
    return squares.sum() if norm == "sum_squares" else squares.mean()
