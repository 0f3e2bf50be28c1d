"""The residual block that MSPN's encoders, decoders and discriminator are made of."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vpfast.nn._as_made import is_intercepted
from vpfast.nn.convolution import Conv2d, convolve_fused
from vpfast.ops._backend import is_transformed
from vpfast.ops._winograd_convolution import serves, takes

LEAK = 0.01  # slope of every LeakyReLU in MSPN


def activated(layer: nn.Module, x: Tensor) -> Tensor:
    """LeakyReLU of what a layer makes of x: in that memory, which spares training a map, unless others may hold it."""
    y = layer(x)
    return F.leaky_relu(y, LEAK, inplace=_is_own(layer))


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

        self.body = nn.Sequential(*convolution(in_channels, 3), nn.LeakyReLU(LEAK), *convolution(out_channels, 3))
        self.skip = nn.Sequential(*convolution(in_channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        skip = self.skip(x)
        if not self._has_own_body():
            return F.leaky_relu_(self.body(x) + skip, LEAK)
        layers = list(self.body)
        half = len(layers) // 2
        if not torch.is_grad_enabled() and _can_fuse(layers, x, skip):
            # The same sums in the same order, with activations and addition on the way.
            return convolve_fused(layers[2], convolve_fused(layers[0], x, LEAK), LEAK, added=skip)
        y = F.leaky_relu_(_through(layers[:half], x), LEAK)
        return F.leaky_relu_(_through(layers[half + 1 :], y) + skip, LEAK)

    def _has_own_body(self) -> bool:
        """Is the body what it was made as, and does nobody look at its parts, so that none but they hold its maps?"""
        if torch.compiler.is_compiling() or type(self.body) is not nn.Sequential or is_intercepted(self.body):
            return False
        kinds = [type(layer) for layer in self.body]
        half = len(kinds) // 2
        if kinds[:half] != kinds[half + 1 :] or kinds[:half] not in ([Conv2d], [Conv2d, nn.BatchNorm2d]):
            return False
        activation = self.body[half]
        return type(activation) is nn.LeakyReLU and activation.negative_slope == LEAK


def _is_own(layer: nn.Module) -> bool:
    """Does a layer give maps that nobody but its caller has?"""
    return type(layer) is Conv2d and not torch.compiler.is_compiling() and not is_intercepted(layer)


def _through(layers: Sequence[nn.Module], x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


def _can_fuse(layers: Sequence[nn.Module], x: Tensor, skip: Tensor) -> bool:
    """Can two convolutions, and nothing else but activations, be done in a pass each?"""
    first, second = layers[0], layers[-1]
    if len(layers) != 3 or is_transformed(skip):
        return False
    assert isinstance(first, Conv2d)
    assert isinstance(second, Conv2d)
    return serves(x, first.weight, first.bias) and takes(second.weight, second.bias)
