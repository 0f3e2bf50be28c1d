"""HR-VQVAE: Eq. 4 on single frames, measured by the frames made again from the first 1 .. n layers of codes."""

import torch
from torch import Tensor, nn

from vpfast.models import HRVQVAE, Codes, SHRVQVAEConfig
from vpfast.models.shrvqvae import hrvqvae_loss
from vpfast.training.config import TrainConfig
from vpfast.training.recipes.recipe import Comparison, Loss, Recipe, Sampling, counted


def objective(model: nn.Module, frames: Tensor, config: TrainConfig, step: int) -> Loss:
    """S-HR-VQVAE paper, Eq. 4, with every frame of ``frames`` (B, T, C, H, W) for itself."""
    output = model(frames)
    loss = hrvqvae_loss(output, frames)
    quantization = output.quantization_losses.detach().sum()
    parts = {"reconstruction": loss.detach() - quantization, "quantization": quantization}
    return Loss(loss, parts, loss, tuple(parts)) if output.loss_reduction == "sum" else Loss(loss, parts)


def compare(model: HRVQVAE, frames: Tensor, context: int, sampling: Sampling) -> Comparison:
    """Reconstructions by depth, and how often each codeword of the deepest layer in use was chosen."""
    codes = model.encode(frames)
    names = [counted(depth, "layer") for depth in range(1, codes.layers + 1)]
    made = {name: model.decode(codes, layers=depth) for depth, name in enumerate(names, start=1)}
    return Comparison(frames, made, names[-1], dict(zip(names, _counts(model, codes), strict=True)))


def _counts(model: HRVQVAE, codes: Codes) -> tuple[Tensor, ...]:
    """How often each codeword was chosen, (codewords of the layer,) for every layer."""
    sizes = model.quantizer.layout.sizes
    rows = model.quantizer.layout.rows(codes.indices)
    counts: tuple[Tensor, ...] = torch.bincount(rows.flatten(), minlength=sum(sizes)).split(list(sizes))
    return counts


def batchwise(model: HRVQVAE) -> str | None:
    """Averages, restarts and a start from data are of the batch that the quantizer is given."""
    if model.config.codebook_update == "ema":
        return "codebooks are averages over batches (model.codebook_update ema)"
    if model.config.dead_codes == "restart":
        return "codewords start from a batch and restart in it (model.dead_codes restart)"
    return None


RECIPE = Recipe(
    HRVQVAE,
    SHRVQVAEConfig,
    "kth-3x8",
    predicts=False,
    objective=objective,
    compare=compare,
    batchwise=batchwise,
)
