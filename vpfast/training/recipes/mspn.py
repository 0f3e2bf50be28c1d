"""MSPN: the pixel loss on clips, measured by the future frames beside repeating the last real one."""

import random

from torch import Tensor, nn

from vpfast.models import MSPN, MSPNConfig
from vpfast.models.mspn import pixel_loss
from vpfast.training.config import TrainConfig
from vpfast.training.recipes.recipe import BASELINE, MODEL, Comparison, Loss, Recipe, Sampling


def objective(model: nn.Module, frames: Tensor, config: TrainConfig, step: int) -> Loss:
    """MSPN's pixel loss on ``frames`` (B, T, C, H, W), with predictions fed back as ``config.loss.feedback`` says.

    MSPN paper, Eq. 5 and section III-B, Long-term Prediction.
    """
    fed_back = frames_fed_back(config, step)
    feedback = "detached" if config.loss.feedback == "detached" else "attached"
    output = model(frames[:, : frames.shape[1] - fed_back], horizon=fed_back, feedback=feedback)
    return Loss(pixel_loss(output, frames, config.loss.norm, config.loss.level_weights), {})


def frames_fed_back(config: TrainConfig, step: int) -> int:
    """How many of a clip's last frames the network does not see at this step."""
    if config.loss.feedback == "none":
        return 0
    if config.loss.feedback == "random":
        # Drawn from the step's number alone: the same in every process and after a resume.
        return random.Random(f"{config.seed}/{step}").randint(*config.loss.feedback_range)
    return config.horizon


def compare(model: MSPN, frames: Tensor, context: int, sampling: Sampling) -> Comparison:
    """The predicted future, and the simplest prediction there is."""
    seen, future = frames[:, :context], frames[:, context:]
    prediction = model.predict(seen, horizon=future.shape[1])
    return Comparison(future, {MODEL: prediction, BASELINE: seen[:, -1:].expand_as(future)}, MODEL, {})


RECIPE = Recipe(
    MSPN, MSPNConfig, "released-default", predicts=True, objective=objective, compare=compare, pixel_loss=True
)
