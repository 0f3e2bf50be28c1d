"""The convolution that the blocks of MSPN are made of."""

from torch import Tensor, nn

from vpfast.ops._plane_convolution import fills_registers, is_narrow, plane_convolution, serves


class Conv2d(nn.Conv2d):
    """``torch.nn.Conv2d`` of stride 1 with an odd kernel that keeps maps at their size, zeros around them.

    Between few channels, in float32 and contiguous memory on a CPU with AVX-512, by a kernel of vpfast's own, to
    float32 accuracy. Else, and wherever operators are traced or counted, by torch's.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if serves(x, self.weight):
            return plane_convolution(x, self.weight, self.bias)
        return super().forward(x)


def is_faster_in_planes(model: nn.Module) -> bool:
    """On this CPU, in float32: are most of a model's convolutions faster in contiguous memory than in channels_last?"""
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    narrow = [each for each in convolutions if isinstance(each, Conv2d) and is_narrow(each.weight)]
    return fills_registers() and 2 * len(narrow) > len(convolutions)
