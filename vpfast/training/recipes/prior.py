"""S-HR-VQVAE's second stage: Eq. 7, the ST-PixelCNN learns to continue the codes of an autoencoder that stays as it is.

Measured, like any S-HR-VQVAE, by the frames predicted, and by how well the prior foretells each code of the real ones.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from vpfast.models import HRVQVAE, SHRVQVAE, SHRVQVAEConfig
from vpfast.models.shrvqvae import SHRVQVAEOutput, prior_loss
from vpfast.models.shrvqvae.config import PRIOR_FIELDS
from vpfast.training.config import TrainConfig
from vpfast.training.recipes.recipe import (
    BASELINE,
    MODEL,
    Comparison,
    Loss,
    Recipe,
    Sampling,
    different,
    same_model,
)

# What may differ from the weights that a run starts from: it is no part of the network.
OF_THE_LOSS = frozenset(name for name in PRIOR_FIELDS if name.startswith(("prior_loss_", "joint_")))


def objective(model: nn.Module, frames: Tensor, config: TrainConfig, step: int) -> Loss:
    """S-HR-VQVAE paper, Eq. 7, of the frames (B, T, C, H, W) after the context."""
    output: SHRVQVAEOutput = model(frames, config.context)
    loss = prior_loss(output.logits, output.codes, output.context, output.config)
    with torch.no_grad():
        right = foretold(output)["accuracy"].mean()
    return Loss(loss, {"accuracy": right})


def compare(model: SHRVQVAE, frames: Tensor, context: int, sampling: Sampling) -> Comparison:
    """The predicted future beside the simplest prediction there is, and what the prior makes of the real codes.

    Of several futures the first is the prediction; the one with the least squared error stands beside it.
    """
    seen, future = frames[:, :context], frames[:, context:]
    drawn = model.predict(
        seen,
        future.shape[1],
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        num_futures=sampling.futures,
        seed=sampling.seed,
    )
    made = {MODEL: drawn[:, 0]}
    if sampling.futures > 1:
        made[f"best of {sampling.futures}"] = _nearest(drawn, future)
    made[BASELINE] = seen[:, -1:].expand_as(future)
    return Comparison(future, made, MODEL, {}, foretold(model(frames, context)))


def foretold(output: SHRVQVAEOutput) -> dict[str, Tensor]:
    """How well each code of the future is foretold from the real ones before it, each (B, n).

    ``cross_entropy`` in nats, ``accuracy`` the share of codes that were thought the likeliest.
    """
    logits, codes = output.logits[:, output.context :].float(), output.codes[:, output.context :]
    nats = cross_entropy(logits.movedim(-1, 1), codes, reduction="none")
    right = (logits.argmax(dim=-1) == codes).float()
    return {"cross_entropy": nats.flatten(1, 3).mean(dim=1), "accuracy": right.flatten(1, 3).mean(dim=1)}


def take_over(model: SHRVQVAE, other: nn.Module) -> str | None:
    """An autoencoder alone is where this stage begins; a whole model is trained on."""
    if not isinstance(other, HRVQVAE):
        return same_model(model, other, OF_THE_LOSS)
    if (reason := different(model.config, other.config, PRIOR_FIELDS)) is not None:
        return reason
    model.autoencoder.load_state_dict(other.state_dict())
    return None


def _nearest(drawn: Tensor, real: Tensor) -> Tensor:
    """Of the futures (B, F, k, C, H, W) that with the least squared error, (B, k, C, H, W)."""
    errors = (drawn.float() - real[:, None].float()).square().flatten(2).mean(dim=2)
    return drawn[torch.arange(len(drawn), device=drawn.device), errors.argmin(dim=1)]


RECIPE = Recipe(
    SHRVQVAE,
    SHRVQVAEConfig,
    "kth-3x8",
    predicts=True,
    objective=objective,
    compare=compare,
    trained=lambda model: [model.prior],
    take_over=take_over,
    samples=True,
)
