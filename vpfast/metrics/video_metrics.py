"""The errors of predicted video, streamed: sums are kept, frames are not."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vpfast.metrics.perceptual import Perceptual
from vpfast.metrics.protocols import BY_NAME, PROTOCOLS

_PIXELS_AT_ONCE = 1 << 21  # bounds the float64 working memory, about 20 times this many numbers
_IN_CACHE = 1 << 16  # the same on a CPU, where SSIM's many sums take half the time if they stay in its cache

_FAR_OUT = 10.0  # a network that aims at [0, 1] may miss it by a little, 8-bit frames miss it by hundreds

HEADINGS = {
    "mse": "MSE ↓",
    "mae": "MAE ↓",
    "mse_sum": "MSE (pixel sum) ↓",
    "mae_sum": "MAE (pixel sum) ↓",
    "psnr": "PSNR (dB) ↑",
    "ssim": "SSIM ↑",
    "lpips": "LPIPS ↓",
    "lpips_x100": "LPIPS x 100 ↓",
}
"""What a person reads in the place of a metric's name; the arrow points to better."""
"""By a metric's name: what it is called, with an arrow to the better side."""


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
            "| frame | " + " | ".join(HEADINGS[name] for name in names) + " |",
            "|---:|" + "---:|" * len(names),
        ]
        for step, values in enumerate(zip(*self.per_frame.values(), strict=True), start=1):
            lines.append(f"| {step} | " + " | ".join(map(_number, names, values)) + " |")
        means = (f"**{_number(name, value)}**" for name, value in self.mean.items())
        lines.append("| **mean** | " + " | ".join(means) + " |")
        clips = f"{self.clips} clip{'' if self.clips == 1 else 's'}"
        return "\n".join([*lines, "", f"Protocol `{self.protocol}`, {clips}."])


def _number(name: str, value: float) -> str:
    digits = {"psnr": 2, "ssim": 4, "mse": 5, "mae": 5, "lpips": 4}.get(name, 2)
    return f"{value:.{digits}f}"


class VideoMetrics:
    """MSE, MAE, PSNR, SSIM and LPIPS of predicted frames, for each predicted step and in the mean.

    Protocol ``default``: prediction and target are clipped to [0, 1]. ``mse`` and ``mae`` are means over a frame's
    values, ``mse_sum`` and ``mae_sum`` their sums; ``psnr`` is -10 log10 of each frame's ``mse``, 100 dB at most, which
    an exact match gets; ``ssim`` is each frame's, Gaussian window 11x11 with sigma 1.5, data range 1, mirrored at the
    edges (torchmetrics' ``StructuralSimilarityIndexMeasure(data_range=1.0)``). Each is averaged over the clips. The
    other protocols (``vpfast.metrics.PROTOCOLS``) measure as other projects do; README.md beside this file tells how.

    Arithmetic is float64, on the device of the frames where that has it, and one frame's numbers do not depend on the
    frames beside it: however the clips are split into calls of ``update``, the result is the same to rounding. Memory
    is constant.

    Args:
        protocol: one of ``vpfast.metrics.PROTOCOLS``.
        lpips: whether to measure LPIPS too (float32, AlexNet), which needs the extra ``vpfast[lpips]``; or what is to
            measure it, a function of two (N, C, H, W) on the protocol's scale to (N,).
        batch: protocol ``mspn``: how many clips, in the order they come, make a batch, whose frames have one PSNR
            together. The released test uses 1, or 32 for Moving MNIST.

    Raises:
        ValueError: a protocol that does not exist; a batch where none makes a difference.
        ImportError, FileNotFoundError: LPIPS is asked for, and what it needs is missing.
    """

    def __init__(
        self, protocol: str = "default", lpips: bool | Callable[[Tensor, Tensor], Tensor] = False, batch: int = 1
    ) -> None:
        if protocol not in BY_NAME:
            raise ValueError(f"protocol {protocol!r} does not exist; there is: {', '.join(PROTOCOLS)}")
        self.protocol = protocol
        self._protocol = BY_NAME[protocol]
        if batch < 1 or (batch > 1 and not self._protocol.batches):
            accepted = "at least 1" if self._protocol.batches else f"1: protocol {protocol!r} measures frame by frame"
            raise ValueError(f"batch: {batch} given, must be {accepted}")
        self.batch = batch
        self._distance = Perceptual() if lpips is True else lpips or None
        self._shape: tuple[int, ...] | None = None
        self._clips = 0
        self._batches = 0
        self._sums: dict[str, Tensor] = {}
        self._waiting: dict[str, Tensor] = {}  # numbers of clips that do not make a batch yet, (clips, T)

    @torch.no_grad()
    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add clips: two float tensors (B, T, C, H, W), the target in [0, 1]; (T, C, H, W) the same in every call.

        B = 0 changes nothing.

        Raises:
            TypeError: not floating point.
            ValueError: shapes that differ or change, frames smaller than SSIM's window (or too small for LPIPS), NaN or
                infinity (a prediction that diverged has no meaningful mean), a target that is not in [0, 1], a
                prediction on another scale: beyond [-10, 10], where clipping would hide it.
        """
        self._check(prediction, target)
        steps = target.shape[1]
        frames, real = _on_one_device(prediction.flatten(0, 1), target.flatten(0, 1))
        values = _in_chunks(self._measure, frames, real, _IN_CACHE if frames.device.type == "cpu" else _PIXELS_AT_ONCE)
        if self._distance is not None:
            values |= _in_chunks(self._perceptual, frames, real, _PIXELS_AT_ONCE)
        if len(frames):
            self._take({name: each.view(-1, steps) for name, each in values.items()})
        self._shape = tuple(target.shape[1:])
        self._clips += target.shape[0]

    def compute(self) -> Report:
        """The report over all clips so far.

        Raises:
            ValueError: there were no clips.
        """
        if self._clips == 0:
            raise ValueError("no frame was given to VideoMetrics.update, so there is nothing to report")
        sums, batches = self._sums, self._batches
        if self._waiting:
            last = self._fold({name: each.unsqueeze(0) for name, each in self._waiting.items()})
            sums = {name: each + sums.get(name, 0.0) for name, each in last.items()}
            batches += 1
        per_frame = {name: (each / batches).tolist() for name, each in sums.items()}
        mean = {name: math.fsum(values) / len(values) for name, values in per_frame.items()}
        return Report(self.protocol, self._clips, mean, per_frame)

    def _measure(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        return self._protocol.measure(prediction.double(), target.double())

    def _perceptual(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        assert self._distance is not None
        name, seen = self._protocol.lpips, self._protocol.seen
        distance = self._distance(seen(prediction.double()), seen(target.double())).double()
        return {name: distance * (100 if name == "lpips_x100" else 1)}

    def _take(self, values: dict[str, Tensor]) -> None:
        """Add the numbers (clips, T) of whole batches to the sums, and let the rest wait."""
        if self._waiting:
            values = {name: torch.cat([self._waiting[name], each]) for name, each in values.items()}
        clips = len(next(iter(values.values())))
        whole = clips // self.batch
        self._waiting = (
            {name: each[whole * self.batch :] for name, each in values.items()} if clips % self.batch else {}
        )
        if whole:
            batches = {name: each[: whole * self.batch].unflatten(0, (whole, -1)) for name, each in values.items()}
            for name, each in self._fold(batches).items():
                self._sums[name] = each + self._sums.get(name, 0.0)
            self._batches += whole

    def _fold(self, batches: dict[str, Tensor]) -> dict[str, Tensor]:
        """(batches, clips, T) -> (T,), summed over the batches."""
        return {name: each.sum(dim=0) for name, each in self._protocol.fold(batches, self.batch).items()}

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


def _on_one_device(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Where the prediction is, if float64 is there too."""
    place = torch.device("cpu") if prediction.device.type == "mps" else prediction.device
    return prediction.to(place), target.to(place)


def _in_chunks(
    measure: Callable[[Tensor, Tensor], dict[str, Tensor]], prediction: Tensor, target: Tensor, numbers: int
) -> dict[str, Tensor]:
    """Each frame's numbers, on the CPU, of (N, C, H, W) -> (N,), some frames at a time: about so many numbers."""
    size = max(1, numbers // math.prod(target.shape[1:]))
    parts = [measure(prediction[i : i + size], target[i : i + size]) for i in range(0, len(target), size)]
    return {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]} if parts else {}
