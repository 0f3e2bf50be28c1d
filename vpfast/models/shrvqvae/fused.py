"""The encoder of frames without gradients on the CPU: oneDNN's convolutions with what follows them in the same pass.

Maps are channels_last. Bias, ReLU and the sum of a residual block belong to the convolution before them, and weights
are brought into oneDNN's layout once and not at every call. The numbers are those of the modules to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from vpfast.ops._backend import autocast_is_on, current_backend, is_transformed

_LEAST_PIXELS = 2**14  # of all frames together; fewer do not pay for looking at the weights
_LARGEST_PIXEL = 1e4  # on the network's scale: frames further outside of [0, 1] are refused before
_OPERATORS = ("_reorder_convolution_weight", "_convolution_pointwise", "_convolution_pointwise_")


class Packed(NamedTuple):
    """Weights and biases as they were when they were packed, and the weights in oneDNN's layout.

    ``bounded``: no frame of [0, 1] or a little more can make a map that is not finite.
    """

    parameters: Sequence[Tensor]
    weights: dict[nn.Module, Tensor]
    bounded: bool


_PACKED: WeakKeyDictionary[nn.Module, Packed] = WeakKeyDictionary()


def packed(encoder: nn.Sequential, frames: Tensor) -> Packed | None:
    """What :func:`latent` needs to take the place of ``encoder`` for these frames; None where the modules must do it.

    They must where somebody looks at them by hooks, and where a map might not be finite: oneDNN's ReLU makes 0 of NaN,
    which nobody would be told.
    """
    if not _serves(encoder, frames):
        return None
    # Compared, and not watched by their version counters: no way to write into a weight evades that.
    parameters, known = list(encoder.parameters()), _PACKED.get(encoder)
    if known is None or not all(map(torch.equal, known.parameters, parameters)):
        known = _PACKED[encoder] = _pack(encoder, parameters)
    return known if known.bounded else None


def latent(encoder: nn.Sequential, weights: Packed, frames: Tensor, gain: float) -> Tensor:
    """``encoder((frames - 0.5) * gain)``, float32 (N, C, H, W) -> (N, D, H / m, W / m), channels_last."""
    # Not empty_like: with one channel it would take the strides of the other layout.
    x = torch.empty(frames.shape, dtype=frames.dtype, memory_format=torch.channels_last)
    torch.sub(frames, 0.5, out=x)
    if gain != 1:
        x *= gain
    relu = [isinstance(module, nn.ReLU) for module in (*list(encoder)[1:], None)]
    for module, activated in zip(encoder, relu, strict=True):
        if isinstance(module, nn.Conv2d):
            x = _convolved(x, module, weights.weights[module], activated)
        elif not isinstance(module, nn.ReLU):
            narrow, widen = module.narrow, module.widen
            assert isinstance(narrow, nn.Conv2d)
            assert isinstance(widen, nn.Conv2d)
            x = _with_residual(x, narrow, widen, weights.weights, activated)
    return x


def _serves(encoder: nn.Sequential, frames: Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and current_backend() in ("auto", "native")
        and frames.device.type == "cpu"
        and frames.dtype == torch.float32
        and frames.numel() > 0
        and frames[:, 0].numel() >= _LEAST_PIXELS
        and torch.backends.mkldnn.is_available()
        and torch._C._get_mkldnn_enabled()
        and all(hasattr(torch.ops.mkldnn, name) for name in _OPERATORS)
        and not autocast_is_on(frames)
        and not is_transformed(frames, *encoder.parameters())
        and not any(module._forward_hooks or module._forward_pre_hooks for module in encoder.modules())
    )


def _pack(encoder: nn.Sequential, parameters: Sequence[Tensor]) -> Packed:
    convolutions = [module for module in encoder.modules() if isinstance(module, nn.Conv2d)]
    largest = _LARGEST_PIXEL
    for module in convolutions:
        assert module.bias is not None
        added = module.weight.detach().double().abs().sum((1, 2, 3)) * largest + module.bias.detach().double().abs()
        largest += float(added.max())  # a block's output adds to its input
    return Packed(
        [parameter.detach().clone() for parameter in parameters],
        {module: _in_layout(module) for module in convolutions},
        largest < torch.finfo(torch.float32).max,
    )


def _with_residual(
    x: Tensor, narrow: nn.Conv2d, widen: nn.Conv2d, packed: dict[nn.Module, Tensor], activated: bool
) -> Tensor:
    """x + what the block makes of it, in the memory of ``x``; ReLU of it where that follows."""
    inner = _convolved(torch.relu(x), narrow, packed[narrow], True)
    result: Tensor = torch.ops.mkldnn._convolution_pointwise_.binary(
        x,
        inner,
        packed[widen],
        widen.bias,
        [0, 0],
        [1, 1],
        [1, 1],
        1,
        "add",
        None,
        "relu" if activated else None,
        [],
        None,
    )
    return result


def _convolved(x: Tensor, module: nn.Conv2d, weight: Tensor, activated: bool) -> Tensor:
    result: Tensor = torch.ops.mkldnn._convolution_pointwise(
        x,
        weight,
        module.bias,
        list(module.padding),
        list(module.stride),
        list(module.dilation),
        module.groups,
        "relu" if activated else "none",
        [],
        "",
    )
    return result


def _in_layout(module: nn.Conv2d) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_convolution_weight(
        module.weight.detach(), list(module.padding), list(module.stride), list(module.dilation), module.groups, None
    )
    return packed
