"""The residual block that MSPN's encoders, decoders and discriminator are made of."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vpfast.nn._common import has_forward_hooks
from vpfast.nn.convolution import Conv2d, convolve_fused
from vpfast.ops._backend import is_transformed
from vpfast.ops._winograd_convolution import serves, takes

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
        if not torch.is_grad_enabled() and self._can_fuse(x):
            skip = self.skip(x)
            if not is_transformed(skip):  # the same sums in the same order, with activations and addition on the way
                return convolve_fused(self.body[2], convolve_fused(self.body[0], x, LEAK), LEAK, added=skip)
        return F.leaky_relu_(self.body(x).add_(self.skip(x)), LEAK)

    def _can_fuse(self, x: Tensor) -> bool:
        """Is the body what it was made as, without batch norms, and does nobody look at its parts by hooks?"""
        if len(self.body) != 3 or has_forward_hooks(self.body):
            return False
        first, activation, second = self.body
        if type(activation) is not nn.LeakyReLU or activation.negative_slope != LEAK:
            return False
        if not (type(first) is Conv2d and type(second) is Conv2d):
            return False
        return serves(x, first.weight, first.bias) and takes(second.weight, second.bias)
