"""What the projects of the field mean by MSE, MAE, PSNR, SSIM and LPIPS. README.md beside this file has the table."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vpfast.metrics.ssim import structural_similarity

EXACT_PSNR = 100.0
"""PSNR of a frame that is matched exactly, in dB, and the ceiling of every other: a mean stays finite and honest. One
pixel of a 128x128 RGB frame that is off by one 8-bit step is at 95 dB."""

# VPTR's statistics of KTH: LPIPS is given frames as the network sees them.
_VPTR_MEAN, _VPTR_STD = 0.6013795, 2.7570653

Values = dict[str, Tensor]


@dataclass(frozen=True)
class Protocol:
    """One project's way of measuring.

    Attributes:
        measure: (prediction, target), float64 (N, C, H, W) each, the target in [0, 1] -> each frame's numbers, (N,).
        seen: frames (N, C, H, W) in [0, 1] -> what the network of LPIPS is given, where [-1, 1] is its own scale.
        fold: numbers of batches of clips by name, (batches, clips, T), and how many clips a full batch has -> the
            batches' numbers, (batches, T).
        batches: whether the number of clips in a batch makes a difference.
        lpips: the name under which LPIPS is told; ``lpips_x100`` is a hundred times it.
    """

    measure: Callable[[Tensor, Tensor], Values]
    seen: Callable[[Tensor], Tensor]
    fold: Callable[[Mapping[str, Tensor], int], Values] = lambda values, batch: {
        name: each.mean(dim=1) for name, each in values.items()
    }
    batches: bool = False
    lpips: str = "lpips"


def _default(prediction: Tensor, target: Tensor) -> Values:
    prediction, target = _clipped(prediction), _clipped(target)
    sums = _sums(prediction, target)
    size = target[0].numel()
    mse = sums["mse_sum"] / size
    return {
        "mse": mse,
        "mae": sums["mae_sum"] / size,
        **sums,
        "psnr": _psnr(mse),
        "ssim": structural_similarity(prediction, target),
    }


def _openstl(prediction: Tensor, target: Tensor) -> Values:
    """Errors before clipping, the rest after it. scikit-image took the range of floats to be 2 where none was given."""
    clipped = _clipped(prediction)
    return {
        **_sums(prediction, target),
        "psnr": _psnr((clipped - target).square().flatten(1).mean(dim=1)),
        "ssim": structural_similarity(clipped, target, data_range=2.0, border="valid", window="uniform"),
    }


def _simvp(prediction: Tensor, target: Tensor) -> Values:
    """As OpenSTL, which grew out of it, but for PSNR: 8-bit numbers are subtracted and squared as 8-bit numbers, modulo
    256, so that a difference of 16 counts as none and 255 as 1."""
    difference = _eight_bit(prediction) - _eight_bit(target)
    wrapped = difference.square().remainder(256)
    return _openstl(prediction, target) | {"psnr": _psnr(wrapped.flatten(1).mean(dim=1) / 255**2)}


def _predrnn(prediction: Tensor, target: Tensor) -> Values:
    prediction, target = _clipped(prediction), _clipped(target)
    eight, real = _eight_bit(prediction), _eight_bit(target)
    return {
        **_sums(prediction, target),
        "psnr": _psnr((eight - real).square().flatten(1).mean(dim=1) / 255**2),
        "ssim": structural_similarity(eight, real, data_range=255.0, border="valid", window="uniform"),
    }


def _mspn(prediction: Tensor, target: Tensor) -> Values:
    sums = _sums(prediction, target)
    ssim = structural_similarity(prediction, target, data_range=1.0, border="valid", window="uniform")
    return {**sums, "psnr": sums["mse_sum"] / target[0].numel(), "ssim": ssim}


def _mspn_fold(values: Mapping[str, Tensor], batch: int) -> Values:
    """PSNR of a batch is that of the mean error of its frames; ``psnr`` comes as each frame's error. The pixel sums are
    divided by the size of a full batch, in a last one that is smaller too."""
    means = {name: each.mean(dim=1) for name, each in values.items()}
    sums = {name: values[name].sum(dim=1) / batch for name in ("mse_sum", "mae_sum")}
    return means | sums | {"psnr": _psnr(means["psnr"])}


def _vptr(prediction: Tensor, target: Tensor) -> Values:
    mse = (prediction - target).square().flatten(1).mean(dim=1)
    return {
        **_sums(prediction, target),
        "psnr": -10 * torch.log10(mse + 1e-8),
        "ssim": structural_similarity(prediction, target, border="zeros"),
    }


def _sums(prediction: Tensor, target: Tensor) -> Values:
    difference = (prediction - target).flatten(1)
    return {"mse_sum": difference.square().sum(dim=1), "mae_sum": difference.abs().sum(dim=1)}


def _psnr(mse: Tensor) -> Tensor:
    return -10 * torch.log10(mse.clamp(min=10 ** (-EXACT_PSNR / 10)))


def _clipped(frames: Tensor) -> Tensor:
    return frames.clamp(0, 1)


def _eight_bit(frames: Tensor) -> Tensor:
    """Whole numbers 0 .. 255, cut off, not rounded. Of float32 frames they are those of the projects' float32 products:
    no float32 number is so near to k / 255 that the two would differ."""
    return (_clipped(frames) * 255).floor()


def _symmetric(frames: Tensor) -> Tensor:
    return 2 * frames - 1


BY_NAME: dict[str, Protocol] = {
    "default": Protocol(_default, lambda frames: _symmetric(_clipped(frames))),
    "openstl": Protocol(_openstl, lambda frames: _symmetric(_clipped(frames))),
    "predrnn": Protocol(_predrnn, _clipped),
    "simvp": Protocol(_simvp, lambda frames: _symmetric(_clipped(frames))),
    "mspn": Protocol(_mspn, _symmetric, _mspn_fold, batches=True, lpips="lpips_x100"),
    "vptr": Protocol(_vptr, lambda frames: (frames - _VPTR_MEAN) / _VPTR_STD),
}

PROTOCOLS: tuple[str, ...] = tuple(BY_NAME)
"""The names that :class:`vpfast.metrics.VideoMetrics` takes."""
