"""Structural similarity (Wang et al., "Image Quality Assessment: From Error Visibility to Structural Similarity")."""

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

Border = Literal["reflect", "zeros", "valid"]
Window = Literal["gaussian", "uniform"]

WINDOW, SIGMA = 11, 1.5
UNIFORM = 7


def structural_similarity(
    prediction: Tensor,
    target: Tensor,
    data_range: float = 1.0,
    border: Border = "reflect",
    window: Window = "gaussian",
) -> Tensor:
    """SSIM of each image: two (N, C, H, W) -> (N,), mean over channels and positions.

    ``window="gaussian"``: 11x11, sigma 1.5, as Wang's program. ``"uniform"``: 7x7, all weights alike, and variances
    divided by 48, not 49: what scikit-image does unless told otherwise.

    ``border="reflect"`` lets the window reach over the edge, where the image is mirrored, and averages over every
    position, as torchmetrics does from 1.5 on; ``"zeros"`` fills with black there; ``"valid"`` keeps to the positions
    whose window lies inside, as Wang's program and scikit-image do. Use float64: the variances are differences of
    numbers nearly alike.

    Raises:
        ValueError: an image smaller than the window; a border or window that does not exist.
    """
    if border not in get_args(Border) or window not in get_args(Window):
        raise ValueError(
            f"border {border!r} and window {window!r} given, must be one of {', '.join(get_args(Border))} and one of "
            f"{', '.join(get_args(Window))}"
        )
    weights = _gaussian() if window == "gaussian" else [1 / UNIFORM] * UNIFORM
    width = len(weights)
    if min(prediction.shape[-2:]) < width:
        raise ValueError(
            f"SSIM needs frames of at least {width}x{width} pixels, its window; got "
            f"{prediction.shape[-2]}x{prediction.shape[-1]}"
        )
    images, channels = prediction.shape[:2]
    x, y = prediction.flatten(0, 1), target.flatten(0, 1)
    moments = torch.stack([x, y, x * x, y * y, x * y])
    if border != "valid":
        mode = "reflect" if border == "reflect" else "constant"
        moments = F.pad(moments.unsqueeze(0), (width // 2,) * 4 + (0, 0), mode=mode).squeeze(0)
    mean_x, mean_y, square_x, square_y, product = _blur(_blur(moments, weights, dim=-2), weights, dim=-1)

    unbiased = 1.0 if window == "gaussian" else width**2 / (width**2 - 1)
    variance_x = unbiased * (square_x - mean_x * mean_x).clamp(min=0)
    variance_y = unbiased * (square_y - mean_y * mean_y).clamp(min=0)
    covariance = unbiased * (product - mean_x * mean_y)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x * mean_x + mean_y * mean_y + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    ssim: Tensor = luminance * structure
    return ssim.reshape(images, channels, -1).mean(dim=(1, 2))


def _gaussian() -> list[float]:
    bell = [math.exp(-((i - WINDOW // 2) ** 2) / (2 * SIGMA**2)) for i in range(WINDOW)]
    return [weight / sum(bell) for weight in bell]


def _blur(x: Tensor, weights: list[float], dim: int) -> Tensor:
    """A weighted mean along one dimension, which shrinks by ``len(weights) - 1``. Shifted sums: faster than a float64
    convolution on the CPU, and each image's result is the same whatever the batch around it."""
    length = x.shape[dim] - len(weights) + 1
    result: Tensor = torch.zeros_like(x.narrow(dim, 0, length))
    for shift, weight in enumerate(weights):
        result.add_(x.narrow(dim, shift, length), alpha=weight)
    return result
