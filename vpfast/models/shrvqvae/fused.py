"""The encoder of frames without gradients on the CPU: convolutions with what follows them in the same pass.

By a program for matrix tiles where the processor has them, else by oneDNN. Bias, ReLU and the sum of a residual block
belong to the convolution before them, and weights are brought into the layout of either once and not at every call. The
numbers are those of the modules to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from vpfast.models.shrvqvae.codec import ResidualBlock, make_encoder
from vpfast.models.shrvqvae.config import SHRVQVAEConfig
from vpfast.models.shrvqvae.tiled import TiledEncoder
from vpfast.nn._as_made import is_as_made
from vpfast.ops import _native
from vpfast.ops._backend import autocast_is_on, current_backend, is_transformed

_LEAST_PIXELS = 2**14  # of all frames together; fewer do not pay for looking at the weights
_LARGEST_PIXEL = 1e4  # on the network's scale: frames further outside of [0, 1] are refused before
_OPERATORS = ("_reorder_convolution_weight", "_convolution_pointwise", "_convolution_pointwise_")


class Engine(Protocol):
    """An encoder with the weights that it had when this was made."""

    def __init__(self, encoder: nn.Sequential) -> None: ...

    def latent(self, frames: Tensor, gain: float) -> Tensor:
        """The map of ``(frames - 0.5) * gain``, float32 (N, C, H, W) -> (N, D, H / m, W / m), channels_last."""
        ...


class _Packed(NamedTuple):
    """``parameters``: as they were then. ``bounded``: frames of [0, 1] or a little more make finite maps alone."""

    parameters: Sequence[Tensor]
    engine: Engine
    bounded: bool


_PACKED: WeakKeyDictionary[nn.Module, _Packed] = WeakKeyDictionary()


def engine_of(encoder: nn.Sequential, config: SHRVQVAEConfig, frames: Tensor) -> Engine | None:
    """What takes the place of ``encoder`` for these frames; None where the modules must do it.

    They must where they are others than those that ``config`` makes, parametrized ones for instance, where somebody
    looks at them, and where a map might not be finite: oneDNN's ReLU makes 0 of NaN, which nobody would be told, and an
    infinity is no sum of bfloat16.
    """
    kind = _kind() if _serves(encoder, frames) and is_as_made(encoder, _as_made(config)) else None
    if kind is None:
        return None
    # Compared, and not watched by their version counters: no way to write into a weight evades that.
    parameters, known = list(encoder.parameters()), _PACKED.get(encoder)
    if known is None or type(known.engine) is not kind or not all(map(torch.equal, known.parameters, parameters)):
        copies = [parameter.detach().clone() for parameter in parameters]
        known = _PACKED[encoder] = _Packed(copies, kind(encoder), _is_bounded(encoder))
    return known.engine if known.bounded else None


@lru_cache(maxsize=4)
def _as_made(config: SHRVQVAEConfig) -> nn.Sequential:
    """The layers of such an encoder, without weights."""
    with torch.device("meta"):
        return make_encoder(config)


def _kind() -> type[Engine] | None:
    if _native.extension is not None and _native.extension.isa() == "amx":
        return TiledEncoder
    return OneDNNEncoder if _has_onednn() else None


def _serves(encoder: nn.Sequential, frames: Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and current_backend() in ("auto", "native")
        and frames.device.type == "cpu"
        and frames.dtype == torch.float32
        and frames.numel() > 0
        and frames[:, 0].numel() >= _LEAST_PIXELS
        and not autocast_is_on(frames)
        and not is_transformed(frames, *encoder.parameters())
    )


def _has_onednn() -> bool:
    return (
        torch.backends.mkldnn.is_available()
        and torch._C._get_mkldnn_enabled()
        and all(hasattr(torch.ops.mkldnn, name) for name in _OPERATORS)
    )


def _convolutions(encoder: nn.Sequential) -> list[nn.Conv2d]:
    return [module for module in encoder.modules() if isinstance(module, nn.Conv2d)]


def _is_bounded(encoder: nn.Sequential) -> bool:
    largest = _LARGEST_PIXEL
    for module in _convolutions(encoder):
        assert module.bias is not None
        added = module.weight.detach().double().abs().sum((1, 2, 3)) * largest + module.bias.detach().double().abs()
        largest += float(added.max())  # a block's output adds to its input
    return largest < torch.finfo(torch.bfloat16).max


class OneDNNEncoder:
    """By oneDNN's convolutions on channels_last maps."""

    def __init__(self, encoder: nn.Sequential) -> None:
        self._layers = list(encoder)
        self._weights: dict[nn.Module, Tensor] = {module: _in_layout(module) for module in _convolutions(encoder)}

    def latent(self, frames: Tensor, gain: float) -> Tensor:
        # Not empty_like: with one channel it would take the strides of the other layout.
        x = torch.empty(frames.shape, dtype=frames.dtype, memory_format=torch.channels_last)
        torch.sub(frames, 0.5, out=x)
        if gain != 1:
            x *= gain
        relu = [isinstance(module, nn.ReLU) for module in (*self._layers[1:], None)]
        for module, activated in zip(self._layers, relu, strict=True):
            if isinstance(module, nn.Conv2d):
                x = _convolved(x, module, self._weights[module], activated)
            elif isinstance(module, ResidualBlock):
                x = _with_residual(x, module.narrow, module.widen, self._weights, activated)
        return x


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
