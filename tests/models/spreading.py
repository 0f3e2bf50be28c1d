"""A model whose codes say something before it is trained."""

import torch
from torch import Tensor

from vpfast.models import SHRVQVAE


@torch.no_grad()
def spread(model: SHRVQVAE, frames: Tensor) -> None:
    """Latents of ``frames`` (B, T, C, H, W) and codewords of standard deviation near 1, and logits far from uniform."""
    latent = model.autoencoder.encoder(frames.flatten(0, 1) - 0.5)
    deviation, mean = torch.std_mean(latent, dim=(0, 2, 3))
    last = model.autoencoder.encoder[-1]
    last.weight.div_(deviation[:, None, None, None])
    last.bias.sub_(mean).div_(deviation)
    for depth, codebook in enumerate(model.autoencoder.quantizer.codebooks):
        codebook.copy_(0.6**depth * torch.randn(codebook.shape))
    for head in model.prior.heads:
        head.weight.mul_(20)
