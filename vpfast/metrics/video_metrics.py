"""The errors of predicted video, streamed: sums are kept, frames are not."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vpfast.metrics.ssim import structural_similarity

EXACT_PSNR = 100.0
"""PSNR of a frame that is matched exactly, in dB, and the ceiling of every other: a mean stays finite and honest. One
pixel of a 128x128 RGB frame that is off by one 8-bit step is at 95 dB."""

_PIXELS_AT_ONCE = 1 << 21  # bounds the float64 working memory, about 20 times this many numbers

_FAR_OUT = 10.0  # a network that aims at [0, 1] may miss it by a little, 8-bit frames miss it by hundreds

_HEADINGS = {
    "mse": "MSE ↓",
    "mae": "MAE ↓",
    "mse_sum": "MSE (pixel sum) ↓",
    "mae_sum": "MAE (pixel sum) ↓",
    "psnr": "PSNR (dB) ↑",
    "ssim": "SSIM ↑",
}


def _default(prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
    prediction, target = prediction.clamp(0, 1), target.clamp(0, 1)
    difference = prediction - target
    squares, absolutes = difference.square().flatten(1), difference.abs().flatten(1)
    mse = squares.mean(dim=1)
    return {
        "mse": mse,
        "mae": absolutes.mean(dim=1),
        "mse_sum": squares.sum(dim=1),
        "mae_sum": absolutes.sum(dim=1),
        "psnr": -10 * torch.log10(mse.clamp(min=10 ** (-EXACT_PSNR / 10))),
        "ssim": structural_similarity(prediction, target),
    }


_PROTOCOLS: dict[str, Callable[[Tensor, Tensor], dict[str, Tensor]]] = {"default": _default}


@dataclass(frozen=True)
class Report:
    """Results: ``mean`` over clips and frames, ``per_frame`` over clips for each predicted step, by metric's name."""

    protocol: str
    clips: int
    mean: dict[str, float]
    per_frame: dict[str, list[float]]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and strings, ready for JSON."""
        return {
            "protocol": self.protocol,
            "clips": self.clips,
            "mean": dict(self.mean),
            "per_frame": {name: list(values) for name, values in self.per_frame.items()},
        }

    def markdown(self) -> str:
        """A table: one line for each predicted frame, the mean at the end, and below it the protocol's name."""
        names = list(self.mean)
        lines = [
            "| frame | " + " | ".join(_HEADINGS[name] for name in names) + " |",
            "|---:|" + "---:|" * len(names),
        ]
        for step, values in enumerate(zip(*self.per_frame.values(), strict=True), start=1):
            lines.append(f"| {step} | " + " | ".join(map(_number, names, values)) + " |")
        means = (f"**{_number(name, value)}**" for name, value in self.mean.items())
        lines.append("| **mean** | " + " | ".join(means) + " |")
        clips = f"{self.clips} clip{'' if self.clips == 1 else 's'}"
        return "\n".join([*lines, "", f"Protocol `{self.protocol}`, {clips}."])


def _number(name: str, value: float) -> str:
    digits = {"psnr": 2, "ssim": 4, "mse": 5, "mae": 5}.get(name, 2)
    return f"{value:.{digits}f}"


class VideoMetrics:
    """MSE, MAE, PSNR and SSIM of predicted frames, for each predicted step and in the mean.

    Protocol ``default``: prediction and target are clipped to [0, 1]. ``mse`` and ``mae`` are means over a frame's
    values, ``mse_sum`` and ``mae_sum`` their sums; ``psnr`` is -10 log10 of each frame's ``mse``, 100 dB at most, which
    an exact match gets; ``ssim`` is each frame's, Gaussian window 11x11 with sigma 1.5, data range 1, mirrored at the
    edges (torchmetrics' ``StructuralSimilarityIndexMeasure(data_range=1.0)``). Each is averaged over the clips.

    Arithmetic is float64, on the device of the frames where that has it, and one frame's numbers do not depend on the
    frames beside it: however the clips are split into batches, the result is the same to rounding. Memory is constant.

    Raises:
        ValueError: a protocol that does not exist.
    """

    def __init__(self, protocol: str = "default") -> None:
        if protocol not in _PROTOCOLS:
            raise ValueError(f"protocol {protocol!r} does not exist; there is: {', '.join(_PROTOCOLS)}")
        self.protocol = protocol
        self._evaluate = _PROTOCOLS[protocol]
        self._shape: tuple[int, ...] | None = None
        self._clips = 0
        self._sums: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Take in a batch: two float (B, T, C, H, W), the target in [0, 1]; (T, C, H, W) the same in every call.

        An empty batch is taken and changes nothing.

        Raises:
            TypeError: not floating point.
            ValueError: shapes that differ or change, frames under 11x11, NaN or infinity (a prediction that diverged
                has no meaningful mean), a target that is not in [0, 1], a prediction on another scale: beyond
                [-10, 10], where clipping would hide it.
        """
        self._check(prediction, target)
        steps = target.shape[1]
        chunk = max(1, _PIXELS_AT_ONCE // math.prod(target.shape[2:]))
        frames, real = prediction.flatten(0, 1), target.to(prediction.device).flatten(0, 1)
        parts = [
            self._evaluate(_double(frames[i : i + chunk]), _double(real[i : i + chunk]))
            for i in range(0, len(frames), chunk)
        ]
        for name in parts[0] if parts else ():
            sums = torch.cat([part[name] for part in parts]).view(-1, steps).sum(dim=0)
            self._sums[name] = sums + self._sums[name].to(sums.device) if name in self._sums else sums
        self._shape = tuple(target.shape[1:])
        self._clips += target.shape[0]

    def compute(self) -> Report:
        """The report over everything taken in so far.

        Raises:
            ValueError: nothing was taken in.
        """
        if self._clips == 0:
            raise ValueError("no frame was given to VideoMetrics.update, so there is nothing to report")
        per_frame = {name: (sums / self._clips).tolist() for name, sums in self._sums.items()}
        mean = {name: math.fsum(values) / len(values) for name, values in per_frame.items()}
        return Report(self.protocol, self._clips, mean, per_frame)

    def _check(self, prediction: Tensor, target: Tensor) -> None:
        if not (prediction.is_floating_point() and target.is_floating_point()):
            raise TypeError(
                f"frames must be floating point in [0, 1], got {prediction.dtype} and {target.dtype}; "
                "divide 8-bit frames by 255"
            )
        if prediction.shape != target.shape or target.dim() != 5 or 0 in target.shape[1:]:
            raise ValueError(
                f"prediction and target must both be (B, T, C, H, W), got {tuple(prediction.shape)} and "
                f"{tuple(target.shape)}"
            )
        if self._shape is not None and tuple(target.shape[1:]) != self._shape:
            raise ValueError(f"clips were {self._shape} (T, C, H, W) before, now {tuple(target.shape[1:])}")
        for name, frames in (("prediction", prediction), ("target", target)):
            bad = ~frames.isfinite().flatten(2).all(dim=2)
            if bad.any():
                clip, step = bad.nonzero()[0].tolist()
                raise ValueError(f"the {name} holds NaN or infinity, first in clip {clip} of the batch, frame {step}")
        if target.numel() and (target.min() < -0.01 or target.max() > 1.01):
            raise ValueError(
                f"the target must be in [0, 1], found {target.min().item():.4g} to {target.max().item():.4g}; "
                "divide 8-bit frames by 255"
            )
        if prediction.numel() and prediction.abs().max() > _FAR_OUT:
            raise ValueError(
                f"the prediction must be on the scale of [0, 1], found {prediction.min().item():.4g} to "
                f"{prediction.max().item():.4g}; divide 8-bit frames by 255 (or has the model diverged?)"
            )


def _double(frames: Tensor) -> Tensor:
    return (frames.cpu() if frames.device.type == "mps" else frames).double()
