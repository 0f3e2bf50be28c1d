"""The convolution that the blocks of MSPN are made of."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from vpfast.ops import _plane_convolution as planes
from vpfast.ops import _winograd_convolution as winograd
from vpfast.ops._winograd_convolution import TransformedWeights


class Conv2d(nn.Conv2d):
    """``torch.nn.Conv2d`` of stride 1 with an odd kernel that keeps maps at their size, zeros around them.

    In float32 on a CPU by kernels of vpfast's own, to float32 accuracy: between few channels in contiguous memory with
    AVX-512, and of 3x3 between more in channels_last with AVX2. Else, and wherever operators are traced or counted, by
    torch's.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if planes.serves(x, self.weight):
            return planes.plane_convolution(x, self.weight, self.bias)
        if winograd.serves(x, self.weight):
            return winograd.winograd_convolution(x, self.weight, self.bias, transformed(self.weight))
        return super().forward(x)


def fuses(layer: nn.Module, like: Tensor) -> bool:
    """Can :func:`fused` do for this layer, on maps that lie like these?"""
    return isinstance(layer, Conv2d) and winograd.serves(like, layer.weight)


def fused(layer: nn.Module, x: Tensor, slope: float, added: Tensor | None = None) -> Tensor:
    """LeakyReLU of what a layer makes of x, plus ``added``, without gradients, in one pass."""
    assert isinstance(layer, Conv2d)
    weights = transformed(layer.weight)()
    return winograd.convolve(x, weights, layer.bias, layer.out_channels, added, slope)


def is_faster_in_planes(model: nn.Module) -> bool:
    """On this CPU, in float32: are most of a model's convolutions faster in contiguous memory than in channels_last?"""
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    narrow = [each for each in convolutions if isinstance(each, Conv2d) and planes.is_narrow(each.weight)]
    return planes.fills_registers() and 2 * len(narrow) > len(convolutions)


# --- weights that are used more than once -----------------------------------------------------------------------------

Transforms = dict[tuple[int, int], tuple[Tensor, TransformedWeights]]
"""By the identity and the version of a weight, which is kept beside so that its identity stays its own."""

_transforms: ContextVar[Transforms | None] = ContextVar("transforms", default=None)


@contextmanager
def weights_in_use(kept: Transforms | None = None) -> Iterator[None]:
    """Within, weights of convolutions are transformed once each. ``kept`` outlasts it; None: until gradients are done.

    A recurrent network enters it for a clip. Nothing may write into a weight's ``.data`` meanwhile, which would go
    unnoticed.
    """
    if torch.compiler.is_compiling() or (kept is None and _transforms.get() is not None):
        yield
        return
    made: Transforms = {} if kept is None else kept
    token = _transforms.set(made)
    try:
        yield
    finally:
        _transforms.reset(token)
        if kept is None:
            for _, each in made.values():
                each.forget()


def transformed(weight: Tensor) -> TransformedWeights:
    """What the kernel needs of a weight: a new one, or within :func:`weights_in_use` that of the call before."""
    made = _transforms.get()
    if made is None or not isinstance(weight, nn.Parameter):  # others are a new tensor for every call
        return TransformedWeights(weight)
    key = (id(weight), 0 if weight.is_inference() else weight._version)  # what has no versions cannot be written into
    if key not in made:
        made[key] = (weight, TransformedWeights(weight))
    return made[key][1]
