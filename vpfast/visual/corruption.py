"""Frames made worse on purpose: what a model is shown to see whether it makes them better (S-HR-VQVAE paper, Fig. 6).

All take float (T, C, H, W) in [0, 1] and give the same shape and type in [0, 1].
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad


def gaussian_blur(frames: Tensor, sigma: float) -> Tensor:
    """Blur by a Gaussian of standard deviation ``sigma`` pixels, cut off at 3 sigma; borders repeat.

    Raises:
        ValueError: sigma that is not a finite number above 0.
    """
    _check(math.isfinite(sigma) and sigma > 0, "sigma", sigma, "a finite number above 0")
    radius = math.ceil(3 * sigma)
    offsets = torch.arange(-radius, radius + 1, dtype=frames.dtype, device=frames.device)
    weights = torch.exp(-0.5 * (offsets / sigma).square())
    weights /= weights.sum()
    blurred = pad(frames.flatten(0, 1)[:, None], (radius, radius, radius, radius), mode="replicate")
    blurred = conv2d(conv2d(blurred, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))
    return blurred[:, 0].reshape(frames.shape).clamp(0, 1)


def fragment_blur(frames: Tensor, distance: int) -> Tensor:
    """The mean of four copies, shifted by ``distance`` pixels up, down, left and right; borders repeat.

    Raises:
        ValueError: a distance that is not a whole number from 1 to the shorter side of a frame.
    """
    height, width = frames.shape[-2:]
    fine = isinstance(distance, int) and 1 <= distance <= min(height, width)
    _check(fine, "distance", distance, f"a whole number from 1 to {min(height, width)}")
    wide = pad(frames, (distance, distance, distance, distance), mode="replicate")
    moves = ((0, distance), (2 * distance, distance), (distance, 0), (distance, 2 * distance))
    return torch.stack([wide[..., y : y + height, x : x + width] for y, x in moves]).mean(dim=0)


def gaussian_noise(frames: Tensor, decibels: float, seed: int = 0) -> Tensor:
    """Add Gaussian noise at a signal-to-noise ratio of ``decibels``, then clip.

    The signal is the mean square of the clip about its mean: a brighter background makes no stronger noise.

    Raises:
        ValueError: decibels that are not finite.
    """
    _check(math.isfinite(decibels), "decibels", decibels, "a finite number")
    scale = frames.double().std(correction=0).item() * 10 ** (-decibels / 20)
    noise = torch.randn(frames.shape, generator=_generator(seed), dtype=torch.float32)
    return (frames + scale * noise.to(frames)).clamp(0, 1)


def salt_and_pepper(frames: Tensor, share: float, seed: int = 0) -> Tensor:
    """Turn a ``share`` of the pixels white or black with equal probability, all channels of a pixel alike.

    Raises:
        ValueError: a share that is not in [0, 1].
    """
    _check(0 <= share <= 1, "share", share, "from 0 to 1")
    drawn = torch.rand(frames[:, :1].shape, generator=_generator(seed)).to(frames.device)
    speckled = frames.masked_fill(drawn < share, 0.0)
    return speckled.masked_fill(drawn < share / 2, 1.0)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _check(fine: bool, name: str, given: object, accepted: str) -> None:
    if not fine:
        raise ValueError(f"{name} must be {accepted}, got {given}")
