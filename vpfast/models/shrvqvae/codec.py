"""The convolutions that make latent maps of frames, and frames of latent maps (paper, section 4.1)."""

from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from vpfast.models.shrvqvae.config import SHRVQVAEConfig


class ResidualBlock(nn.Module):
    """x + what a 3x3 convolution to a narrow map and a 1x1 convolution back make of it."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.narrow = nn.Conv2d(channels, inner, 3, padding=1)
        self.widen = nn.Conv2d(inner, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = self.widen(F.relu(self.narrow(F.relu(x))))
        return x + added


def make_encoder(config: SHRVQVAEConfig) -> nn.Sequential:
    """(N, C, H, W) -> (N, D, H / m, W / m), not activated."""
    layers: list[nn.Module] = []
    for narrow, wide in pairwise((config.in_channels, *config.channels)):
        layers += [nn.Conv2d(narrow, wide, 4, stride=2, padding=1), nn.ReLU()]
    top = config.channels[-1]
    last = nn.Conv2d(top, config.latent_channels, 1)
    return nn.Sequential(*layers, nn.Conv2d(top, top, 3, padding=1), *_residual_blocks(config), nn.ReLU(), last)


def make_decoder(config: SHRVQVAEConfig) -> nn.Sequential:
    """(N, D, h, w) -> (N, C, m h, m w), not activated."""
    layers: list[nn.Module] = []
    for wide, narrow in pairwise((*reversed(config.channels), config.in_channels)):
        layers += [nn.ReLU(), nn.ConvTranspose2d(wide, narrow, 4, stride=2, padding=1)]
    return nn.Sequential(nn.Conv2d(config.latent_channels, config.channels[-1], 1), *_residual_blocks(config), *layers)


def _residual_blocks(config: SHRVQVAEConfig) -> Sequence[nn.Module]:
    return [ResidualBlock(config.channels[-1], config.residual_channels) for _ in range(config.residual_blocks)]
