"""A convolution over time, height and width that sees only what comes before, made of two-dimensional ones."""

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vpfast.nn._common import check_choice, check_counts, check_kernels, check_volumes

MaskKind = Literal["A", "B"]
Conditioning = Literal["raster", "eq6", "past_frames"]


class MaskedConv3d(nn.Module):
    """A causal convolution of maps (B, C, T, H, W): outputs depend on earlier frames and positions.

    The kernel covers kh x kw positions of the present frame and of kt - 1 past ones. Of each frame it uses the
    following number of taps, the first ones in raster order; c is the number of taps before the centre:

    ===============  ====================  ====================
    conditioning     mask A: past, present mask B: past, present
    ===============  ====================  ====================
    ``raster``       all, c                all, c + 1
    ``eq6``          c, none               c + 1, c + 1
    ``past_frames``  all, none             all, all
    ===============  ====================  ====================

    The first convolution on codes has mask A: its features do not depend on the code at their own position. All later
    ones have mask B. Such a stack never leaks. Within its receptive field, the feature at (t, j) depends under
    ``raster`` on all of the past frames and on the positions before j of frame t; under ``eq6`` (Eq. 6, literally) on
    the positions before j of past frames; under ``past_frames`` on past frames only.

    There are no parameters for masked taps. Parameters are ``past`` (out, in, kt - 1, taps), the oldest frame first,
    ``present`` (out, in, taps), each absent where it has no taps, and ``bias`` (out,). Outside of the maps are zeros.
    It is computed as convolutions of single frames, with the taps filled up to whole rows.

    Args:
        in_channels, out_channels: channels of input and output.
        kernel_size: (kt, kh, kw), kh and kw odd.
        mask: ``"A"`` or ``"B"``.
        conditioning: ``"raster"``, ``"eq6"`` or ``"past_frames"``.
        bias: whether there is one.

    Raises:
        ValueError: channels or kt below 1, kh or kw not odd, an unknown mask or conditioning, or a kernel none of whose
            taps is left.
    """

    past: nn.Parameter | None
    present: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, int, int] = (2, 3, 3),
        mask: MaskKind = "B",
        conditioning: Conditioning = "raster",
        bias: bool = True,
    ) -> None:
        super().__init__()
        check_counts(_OWNER, in_channels=in_channels, out_channels=out_channels)
        check_choice(_OWNER, "mask", mask, get_args(MaskKind))
        check_choice(_OWNER, "conditioning", conditioning, get_args(Conditioning))
        if not isinstance(kernel_size, (tuple, list)) or len(kernel_size) != 3:
            raise ValueError(f"{_OWNER}: kernel_size must be (kt, kh, kw), got {kernel_size!r}")
        frames, height, width = kernel_size
        check_counts(_OWNER, kernel_frames=frames)
        check_kernels(_OWNER, kernel_height=height, kernel_width=width)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size = (frames, height, width)
        self.mask, self.conditioning = mask, conditioning
        past, present = _taps(height * width, mask, conditioning)
        for name, shape in (("past", (frames - 1, past)), ("present", (present,))):
            full = torch.empty(out_channels, in_channels, *shape) if math.prod(shape) else None
            self.register_parameter(name, None if full is None else nn.Parameter(full))
        if self.past is None and self.present is None:
            raise ValueError(
                f"{_OWNER}: no tap of kernel_size {self.kernel_size} is left by mask {mask!r}, conditioning "
                f"{conditioning!r}; take a larger kernel"
            )
        self.register_parameter("bias", nn.Parameter(torch.empty(out_channels)) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform within 1 / sqrt(fan in), as torch's convolutions start; only taps that exist are counted."""
        taps = sum(weight[0, 0].numel() for weight in (self.past, self.present) if weight is not None)
        bound = 1 / math.sqrt(self.in_channels * taps)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, T, H, W) -> (B, out_channels, T, H, W), position-major in memory (channels_last_3d).

        Input of that layout is read as it is. It is :meth:`from_present` plus :meth:`from_past`.

        Raises:
            TypeError: not floating point, or another type than the weights outside of autocast.
            ValueError: another shape, an empty grid, or another device.
        """
        return self.from_present(x) + self.from_past(x)

    def from_present(self, x: Tensor) -> Tensor:
        """What the output at each frame owes to that frame of ``x``, and the bias. Shapes and errors of ``forward``."""
        return self._sum(x, range(0, 1), self.bias)

    def from_past(self, x: Tensor) -> Tensor:
        """What the output at each frame owes to the frames of ``x`` before it. Shapes and errors of ``forward``."""
        return self._sum(x, range(1, self.kernel_size[0]), None)

    def frame_taps(self, frames: Tensor, lag: int, bias: Tensor | None = None) -> Tensor:
        """What single frames (N, in_channels, H, W) add to the output ``lag`` frames later: (N, out_channels, H, W).

        ``lag`` 0 is the present frame, up to kt - 1; ``frames`` should be channels_last, as the result is.

        Raises:
            ValueError: a lag at which there are no taps.
        """
        weight = self.present if lag == 0 else self.past
        if weight is None or not 0 <= lag < self.kernel_size[0]:
            raise ValueError(
                f"{_OWNER}: kernel_size {self.kernel_size}, mask {self.mask!r}, {self.conditioning!r} has no taps at "
                f"lag {lag}"
            )
        taps = weight if lag == 0 else weight[:, :, -lag]
        _, height, width = self.kernel_size
        rows = -(-taps.shape[-1] // width)
        kernel = F.pad(taps, (0, rows * width - taps.shape[-1])).unflatten(-1, (rows, width))
        # The kernel begins with its top row, so that padding as for all kh rows gives rows too many at the bottom.
        return F.conv2d(frames, kernel, bias, padding=(height // 2, width // 2))[:, :, : frames.shape[2]]

    def _sum(self, x: Tensor, lags: range, bias: Tensor | None) -> Tensor:
        check_volumes(_OWNER, x, self.in_channels, next(self.parameters()))
        batch, _, times, height, width = x.shape
        x = x.movedim(1, -1).contiguous()
        parts = []
        for lag in lags:
            if (self.present if lag == 0 else self.past) is None or lag >= times:
                continue
            frames = x[:, : times - lag].flatten(0, 1).movedim(-1, 1)
            part = self.frame_taps(frames, lag, bias).movedim(1, -1).unflatten(0, (batch, times - lag))
            parts.append(F.pad(part, (0, 0, 0, 0, 0, 0, lag, 0)) if lag else part)
        if not parts:
            empty = x.new_zeros(self.out_channels) if bias is None else bias
            parts = [empty.expand(batch, times, height, width, self.out_channels)]
        return sum(parts[1:], parts[0]).movedim(-1, 1)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, mask={self.mask!r}, "
            f"conditioning={self.conditioning!r}, bias={self.bias is not None}"
        )


_OWNER = "MaskedConv3d"


def _taps(taps: int, mask: MaskKind, conditioning: Conditioning) -> tuple[int, int]:
    """How many of ``taps`` a past frame keeps, and the present one."""
    before = taps // 2
    return {
        ("raster", "A"): (taps, before),
        ("raster", "B"): (taps, before + 1),
        ("eq6", "A"): (before, 0),
        ("eq6", "B"): (before + 1, before + 1),
        ("past_frames", "A"): (taps, 0),
        ("past_frames", "B"): (taps, taps),
    }[conditioning, mask]
