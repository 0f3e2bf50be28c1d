"""The residual block that MSPN's encoders, decoders and discriminator are made of."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vpfast.nn.convolution import Conv2d, fused, fuses

LEAK = 0.01  # slope of every LeakyReLU in MSPN


class Bottleneck(nn.Module):
    """Two 3x3 convolutions beside a 1x1 convolution, summed: (B, in_channels, H, W) -> (B, out_channels, H, W).

    The skip is a 1x1 convolution even where both widths are equal. LeakyReLU 0.01 stands between the two convolutions
    and after the sum. With ``batch_norm`` each of the three convolutions is followed by a BatchNorm2d.
    """

    def __init__(self, in_channels: int, out_channels: int, batch_norm: bool = False) -> None:
        super().__init__()

        def convolution(channels: int, kernel_size: int) -> list[nn.Module]:
            layer = Conv2d(channels, out_channels, kernel_size)
            return [layer, nn.BatchNorm2d(out_channels)] if batch_norm else [layer]

        self.body = nn.Sequential(
            *convolution(in_channels, 3), nn.LeakyReLU(LEAK, inplace=True), *convolution(out_channels, 3)
        )
        self.skip = nn.Sequential(*convolution(in_channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.body[0], self.body[-1]
        if len(self.body) == 3 and not torch.is_grad_enabled() and fuses(first, x) and fuses(second, x):
            # The same sums in the same order, with the activations and the skip's addition on the way.
            return fused(second, fused(first, x, LEAK), LEAK, added=self.skip(x))
        return F.leaky_relu_(self.body(x).add_(self.skip(x)), LEAK)
