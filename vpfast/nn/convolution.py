"""The convolution that the blocks of MSPN are made of."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from vpfast.ops import _plane_convolution as planes
from vpfast.ops import _winograd_convolution as winograd
from vpfast.ops._backend import has_registers
from vpfast.ops._winograd_convolution import TransformedWeight


class Conv2d(nn.Conv2d):
    """``torch.nn.Conv2d`` of stride 1 with an odd kernel that keeps maps at their size, zeros around them.

    In float32 on a CPU with AVX2 by kernels of vpfast's own, to float32 accuracy: between few channels in contiguous
    memory, and of 3x3 between more in channels_last. Else, and wherever operators are traced or counted, by torch's.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias  # read once: a parametrization computes them, and may count how often
        if planes.serves(x, weight, bias):
            return planes.plane_convolution(x, weight, bias)
        if winograd.serves(x, weight, bias):
            return winograd.winograd_convolution(x, weight, bias, _known(weight))
        y: Tensor = self._conv_forward(x, weight, bias)
        return y


def convolve_fused(layer: nn.Module, x: Tensor, slope: float, added: Tensor | None = None) -> Tensor:
    """LeakyReLU of what a layer makes of x, plus ``added``, without gradients, in one pass."""
    assert isinstance(layer, Conv2d)
    weights = (_known(layer.weight) or TransformedWeight(layer.weight))()
    return winograd.convolve(x, weights, layer.bias, layer.out_channels, added, slope)


def is_faster_in_planes(model: nn.Module, height: int, width: int) -> bool:
    """On this CPU, in float32, for frames of this size: are most of a model's convolutions faster in contiguous memory
    than in channels_last?"""
    return planes.has_whole_rows(height, width) and is_mostly_narrow(model)


def is_mostly_narrow(model: nn.Module) -> bool:
    """Are most of a model's convolutions such that kernels in planes could serve, on this CPU?"""
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    narrow = [each for each in convolutions if isinstance(each, Conv2d) and planes.is_narrow(each.weight)]
    return has_registers() and 2 * len(narrow) > len(convolutions)


# --- weights that are used more than once -----------------------------------------------------------------------------

Transforms = dict[tuple[int, int], TransformedWeight]
"""By the identity and the version of the weight."""

_transforms: ContextVar[Transforms | None] = ContextVar("transforms", default=None)


@contextmanager
def weights_in_use(kept: Transforms | None = None) -> Iterator[Transforms]:
    """Within, weights of convolutions are transformed once each. ``kept`` outlasts it, else they are forgotten after.

    A recurrent network enters it for a clip. Nothing may write into a weight's ``.data`` meanwhile, which would go
    unnoticed.
    """
    outer = _transforms.get() if kept is None and not torch.compiler.is_compiling() else None
    if torch.compiler.is_compiling() or outer is not None:
        yield {} if outer is None else outer
        return
    made: Transforms = {} if kept is None else kept
    token = _transforms.set(made)
    try:
        yield made
    finally:
        _transforms.reset(token)
        if kept is None:
            for each in made.values():
                each.forget()


def _known(weight: Tensor) -> TransformedWeight | None:
    """Within :func:`weights_in_use` what was made of this weight before. Only parameters last; and what was made in
    inference mode has no versions, so that nobody would see it written into."""
    made = _transforms.get()
    if made is None or not isinstance(weight, nn.Parameter) or weight.is_inference():
        return None
    key = (id(weight), weight._version)
    if key not in made or made[key].weight is not weight:
        made[key] = TransformedWeight(weight)
    return made[key]
