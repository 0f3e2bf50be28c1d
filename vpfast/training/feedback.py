"""MSPN's long-term training (paper, section III-B and Fig. 5): what of a clip the network sees, what it feeds itself.

A frame that is not seen is replaced, at every level, by the finest prediction of that step, scaled down; the loss is
always that of the real frames.
"""

import math
import random

from torch import Tensor, nn

from vpfast.models.mspn import MSPNOutput
from vpfast.training.config import TrainConfig


def unrolled(model: nn.Module, frames: Tensor, config: TrainConfig, step: int) -> MSPNOutput:
    """The predictions of all frames (B, T, C, H, W) of a clip at that step, fed back as ``config.loss.feedback`` says.

    The last frames are hidden: ``config.horizon`` of them, with gradient through what stands in for them (``fixed``) or
    without (``detached``), or a number drawn for the step (``random``). ``scheduled`` hides each of the last
    ``config.horizon`` frames by a draw of its own; ``none`` hides none. Draws follow from (seed, step) alone: they are
    the same in every process, and after a resume.
    """
    hidden = frames_fed_back(config, step)
    output: MSPNOutput = model(
        frames[:, : frames.shape[1] - hidden],
        horizon=hidden,
        feedback="detached" if config.loss.feedback == "detached" else "attached",
        seen=frames_seen(config, step) if config.loss.feedback == "scheduled" else None,
        recompute=config.checkpoint_activations,
    )
    return output


def frames_fed_back(config: TrainConfig, step: int) -> int:
    """How many of a clip's last frames are replaced by predictions at this step, whatever else is."""
    if config.loss.feedback in ("none", "scheduled"):
        return 0
    if config.loss.feedback == "random":
        return _draws(config, step).randint(*config.loss.feedback_range)
    return config.horizon


def frames_seen(config: TrainConfig, step: int) -> list[bool]:
    """Scheduled sampling: for each frame of a clip whether the network sees it at this step."""
    draws, share = _draws(config, step), share_of_real(config, step)
    return [True] * config.context + [draws.random() < share for _ in range(config.horizon)]


def share_of_real(config: TrainConfig, step: int) -> float:
    """With what probability a frame after the context is seen at this step. With x = step / ``loss.sampling_steps``:

    ``linear``: 1 - x, then 0. ``exponential``: 0.01^x. ``sigmoid``: from 0.993 at x = 0 to 0.007 at x = 1.
    """
    done = step / config.loss.sampling_steps
    if config.loss.sampling == "linear":
        return max(0.0, 1.0 - done)
    if config.loss.sampling == "exponential":
        return float(0.01**done)
    return 0.5 * (1.0 - math.tanh(5.0 * (done - 0.5)))


def _draws(config: TrainConfig, step: int) -> random.Random:
    return random.Random(f"{config.seed}/{step}")
