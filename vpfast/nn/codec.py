"""The encoder and the decoder with skip connections that stand inside MSPN's recurrent cells (paper, Fig. 3)."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vpfast.nn.bottleneck import Bottleneck, activated
from vpfast.nn.convolution import Conv2d

Widen = Literal["before_pool", "after_pool"]


def upsample(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C, 2H, 2W), bilinear with aligned corners."""
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)


class EncoderStage(nn.Module):
    """Bottleneck, 2x2 max pool, Bottleneck; one of the two Bottlenecks widens the maps."""

    def __init__(self, in_channels: int, out_channels: int, batch_norm: bool, widen: Widen) -> None:
        super().__init__()
        between = out_channels if widen == "before_pool" else in_channels
        self.before = Bottleneck(in_channels, between, batch_norm)
        self.after = Bottleneck(between, out_channels, batch_norm)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.after(F.max_pool2d(self.before(x), 2))
        return y


class Encoder(nn.Module):
    """(B, in_channels, H, W) -> maps of every stage, finest first: (B, channels[s], H/2^s, W/2^s).

    The last one is the bottleneck feature, the others are the decoder's skips.
    """

    def __init__(
        self,
        in_channels: int,
        channels: Sequence[int],
        kernel_size: int = 5,
        batch_norm: bool = False,
        widen: Widen = "before_pool",
    ) -> None:
        super().__init__()
        self.stem = Conv2d(in_channels, channels[0], kernel_size)
        self.stages = nn.ModuleList(EncoderStage(i, o, batch_norm, widen) for i, o in pairwise(channels))

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = [activated(self.stem, x)]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        return maps


class DecoderStage(nn.Module):
    """Bottleneck, bilinear x2, Bottleneck, then a 3x3 convolution over the result and the encoder's skip."""

    def __init__(self, in_channels: int, channels: int, out_channels: int, batch_norm: bool) -> None:
        super().__init__()
        self.before = Bottleneck(in_channels, channels, batch_norm)
        self.after = Bottleneck(channels, channels, batch_norm)
        self.merge = Conv2d(2 * channels, out_channels, 3)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        up = self.after(upsample(self.before(x)))
        y: Tensor = self.merge(torch.cat((up, skip), dim=1))
        return y


class Decoder(nn.Module):
    """Bottleneck feature and skips -> (B, out_channels, H, W), not activated.

    ``channels`` are the encoder's, finest first. ReLU follows every stage but the last.
    """

    def __init__(self, channels: Sequence[int], out_channels: int, batch_norm: bool = False) -> None:
        super().__init__()
        coarse_to_fine = list(reversed(channels))
        outs = [*coarse_to_fine[1:-1], out_channels]
        self.stages = nn.ModuleList(
            DecoderStage(i, r, o, batch_norm)
            for i, r, o in zip(coarse_to_fine[:-1], coarse_to_fine[1:], outs, strict=True)
        )

    def forward(self, feature: Tensor, skips: Sequence[Tensor]) -> Tensor:
        """``feature`` (B, channels[-1], h, w); ``skips`` finest first, one for each of ``channels[:-1]``."""
        x = feature
        for index, (stage, skip) in enumerate(zip(self.stages, reversed(skips), strict=True)):
            x = stage(x if index == 0 else F.relu(x), skip)
        return x
