"""Structural similarity (Wang et al., "Image Quality Assessment: From Error Visibility to Structural Similarity")."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW, SIGMA = 11, 1.5


def structural_similarity(
    prediction: Tensor, target: Tensor, data_range: float = 1.0, border: Literal["reflect", "valid"] = "reflect"
) -> Tensor:
    """SSIM of each image: two (N, C, H, W) -> (N,), mean over channels and positions. Gaussian window, sigma 1.5.

    ``border="reflect"`` lets the window reach over the edge, where the image is mirrored, and averages over every
    position, as torchmetrics does from 1.5 on; ``"valid"`` keeps to the positions whose window lies inside, as Wang's
    program and scikit-image do. Use float64: the variances are differences of numbers nearly alike.

    Raises:
        ValueError: an image smaller than the window.
    """
    if min(prediction.shape[-2:]) < WINDOW:
        raise ValueError(
            f"SSIM needs frames of at least {WINDOW}x{WINDOW} pixels, its window; got "
            f"{prediction.shape[-2]}x{prediction.shape[-1]}"
        )
    images, channels = prediction.shape[:2]
    x, y = prediction.flatten(0, 1), target.flatten(0, 1)
    moments = torch.stack([x, y, x * x, y * y, x * y])
    if border == "reflect":
        moments = F.pad(moments.unsqueeze(0), (WINDOW // 2,) * 4 + (0, 0), mode="reflect").squeeze(0)
    mean_x, mean_y, square_x, square_y, product = _blur(_blur(moments, dim=-2), dim=-1)

    variance_x = (square_x - mean_x * mean_x).clamp(min=0)
    variance_y = (square_y - mean_y * mean_y).clamp(min=0)
    covariance = product - mean_x * mean_y
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x * mean_x + mean_y * mean_y + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    ssim: Tensor = luminance * structure
    return ssim.reshape(images, channels, -1).mean(dim=(1, 2))


def _blur(x: Tensor, dim: int) -> Tensor:
    """Gaussian along one dimension, which shrinks by ``WINDOW - 1``. Eleven shifted sums: faster than a float64
    convolution on the CPU, and each image's result is the same whatever the batch around it."""
    bell = [math.exp(-((i - WINDOW // 2) ** 2) / (2 * SIGMA**2)) for i in range(WINDOW)]
    length = x.shape[dim] - WINDOW + 1
    result: Tensor = torch.zeros_like(x.narrow(dim, 0, length))
    for shift, weight in enumerate(bell):
        result.add_(x.narrow(dim, shift, length), alpha=weight / sum(bell))
    return result
