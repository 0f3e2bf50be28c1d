"""MSPN: the pixel loss on clips, measured by the future frames beside repeating the last real one."""

from torch import Tensor, nn

from vpfast.models import MSPN, MSPNConfig
from vpfast.models.mspn import pixel_loss
from vpfast.training.adversarial import AdversarialUpdate
from vpfast.training.config import TrainConfig
from vpfast.training.feedback import unrolled
from vpfast.training.recipes.recipe import BASELINE, MODEL, Comparison, Loss, Recipe, Sampling
from vpfast.training.update import Context, GradientUpdate, Update


def objective(model: nn.Module, frames: Tensor, config: TrainConfig, step: int) -> Loss:
    """MSPN's pixel loss on ``frames`` (B, T, C, H, W), with predictions fed back as ``config.loss.feedback`` says.

    MSPN paper, Eq. 5 and section III-B, Long-term Prediction.
    """
    output = unrolled(model, frames, config, step)
    loss = pixel_loss(output, frames, config.loss.norm, config.loss.level_weights)
    return Loss(loss, {}, summed=None if config.loss.norm == "mse" else loss)


def update(context: Context) -> Update:
    """Down the gradient of the pixel loss, or against a discriminator."""
    return AdversarialUpdate(context) if context.config.adversarial.enabled else GradientUpdate(context)


def compare(model: MSPN, frames: Tensor, context: int, sampling: Sampling) -> Comparison:
    """The predicted future, and the simplest prediction there is."""
    seen, future = frames[:, :context], frames[:, context:]
    prediction = model.predict(seen, horizon=future.shape[1])
    return Comparison(future, {MODEL: prediction, BASELINE: seen[:, -1:].expand_as(future)}, MODEL, {})


RECIPE = Recipe(
    MSPN,
    MSPNConfig,
    "released-default",
    predicts=True,
    objective=objective,
    compare=compare,
    pixel_loss=True,
    recomputes=True,
    update=update,
)
