"""S-HR-VQVAE's third stage: Eq. 9, prior and decoder together, the decoder on what the prior chooses."""

import dataclasses
from collections.abc import Sequence

from torch import Tensor, nn

from vpfast.models import SHRVQVAE
from vpfast.models.shrvqvae import joint_terms
from vpfast.training.config import TrainConfig
from vpfast.training.recipes.prior import OF_THE_LOSS
from vpfast.training.recipes.prior import RECIPE as PRIOR
from vpfast.training.recipes.recipe import Loss, same_model


def objective(model: nn.Module, frames: Tensor, config: TrainConfig, step: int) -> Loss:
    """S-HR-VQVAE paper, Eq. 9, of the frames (B, T, C, H, W) after the context."""
    terms = joint_terms(model, frames, config.context)
    parts = {"prior": terms.prior.detach(), "reconstruction": terms.reconstruction.detach()}
    if config.model.get("loss_reduction") != "sum":
        return Loss(terms.total, parts)
    return Loss(terms.total, parts, terms.total - terms.prior, ("reconstruction",))


def trained(model: SHRVQVAE) -> Sequence[nn.Module]:
    """Encoder and codebooks stay as they are."""
    decoder = model.autoencoder.decoder
    return [decoder] if model.config.joint_trains == "decoder" else [model.prior, decoder]


def take_over(model: SHRVQVAE, other: nn.Module) -> str | None:
    """A model whose prior is trained."""
    return same_model(model, other, OF_THE_LOSS)


RECIPE = dataclasses.replace(PRIOR, objective=objective, trained=trained, take_over=take_over)
