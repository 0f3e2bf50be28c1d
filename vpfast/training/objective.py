"""What is minimised: the loss of a model on a batch of clips at one step."""

import random

from torch import Tensor, nn

from vpfast.models.mspn import pixel_loss
from vpfast.training.config import TrainConfig


def pixel_objective(model: nn.Module, frames: Tensor, config: TrainConfig, step: int) -> Tensor:
    """MSPN's pixel loss on ``frames`` (B, T, C, H, W), with predictions fed back as ``config.loss.feedback`` says.

    MSPN paper, Eq. 5 and section III-B, Long-term Prediction.
    """
    fed_back = frames_fed_back(config, step)
    feedback = "detached" if config.loss.feedback == "detached" else "attached"
    output = model(frames[:, : frames.shape[1] - fed_back], horizon=fed_back, feedback=feedback)
    return pixel_loss(output, frames, config.loss.norm, config.loss.level_weights)


def frames_fed_back(config: TrainConfig, step: int) -> int:
    """How many of a clip's last frames the network does not see at this step."""
    if config.loss.feedback == "none":
        return 0
    if config.loss.feedback == "random":
        # Drawn from the step's number alone: the same in every process and after a resume.
        return random.Random(f"{config.seed}/{step}").randint(*config.loss.feedback_range)
    return config.horizon
